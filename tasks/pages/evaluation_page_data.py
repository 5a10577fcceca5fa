"""All that the page about an evaluation is made of."""

from pydantic import Field

from charm_core.records import Record
from tasks.pages.report_data import (
    BenchmarkRow,
    BoardInfo,
    PolicyModelResponses,
    Provenance,
    ReportDomain,
    ReportReliability,
    VariantName,
)


class EvaluatedModel(Record):
    """One reward model. Its variant is its place: ``untouched`` is the first one, ``calibrated`` the one held against it."""

    variant: VariantName
    label: str
    path: str
    digest: str


class EvaluationData(Record):
    """All numbers of one evaluation. What is None or empty leaves its section out."""

    title: str
    simulated: bool = False
    models: tuple[EvaluatedModel, ...] = Field(min_length=1, max_length=2)
    benchmarks: tuple[BenchmarkRow, ...] = ()
    reliability: tuple[ReportReliability, ...] = ()
    board: BoardInfo | None = None
    domains: tuple[ReportDomain, ...] = ()
    responses: tuple[PolicyModelResponses, ...] = ()
    confidence: float = Field(description="Coverage of the benchmarks' intervals.")
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    provenance: Provenance

    def label(self, variant: VariantName) -> str:
        """What a reward model is called."""
        return next((model.label for model in self.models if model.variant == variant), variant)
