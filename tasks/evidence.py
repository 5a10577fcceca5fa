"""From the stored results of a run to one report."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from charm_core.best_of_n import BestOfNReport
from charm_core.offsets import OffsetFit
from charm_core.preferences import PairSummary
from charm_core.promotion import GateConfig
from charm_core.promotion_evidence import RepeatedScores
from charm_core.selection import Selection
from tasks.arena import Board
from tasks.caching import step
from tasks.pages.report_data import (
    BenchmarkRow,
    BoardInfo,
    CurvePoint,
    PolicyModelResponses,
    Provenance,
    ReportComparison,
    ReportData,
    ReportDomain,
    ReportReliability,
    ReportStyleComparison,
    ReportVariant,
    TrainingCurve,
    TruthReport,
    VariantName,
)
from tasks.pages.report_text import model_card
from tasks.pages.reporting import render_report
from tasks.promotion import gate_section, judge_report
from tasks.store import ArtifactRef, ArtifactStore
from tasks.training import Curve

_CURVE_FIELDS = ("step", "loss", "learning_rate", "accuracy", "margin_mean")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DomainParts(_Part):
    """One set of prompts and policy models, by what is stored about it."""

    label: str
    description: str = ""
    held_out_models: tuple[str, ...] = ()
    variants: tuple[ArtifactRef, ...]
    comparisons: tuple[ArtifactRef, ...] = ()
    styles: tuple[ArtifactRef, ...] = ()


class CurveParts(_Part):
    """One training run, by its stored curve."""

    variant: VariantName
    label: str
    curve: ArtifactRef


class BenchmarkRows(_Part):
    """Lines of the benchmark table, and how true probabilities are."""

    rows: tuple[BenchmarkRow, ...]
    reliability: tuple[ReportReliability, ...] = ()


class ReportParts(_Part):
    """All that a report is made of."""

    kind: Literal["audit", "calibrate"]
    title: str
    reward_model: str
    base_model: str = ""
    simulated: bool = False
    board: Board
    domains: tuple[DomainParts, ...]
    selection: Selection | None = None
    offsets: ArtifactRef | None = None
    pairs: PairSummary | None = None
    curves: tuple[CurveParts, ...] = ()
    benchmarks: tuple[ArtifactRef, ...] = ()
    responses: tuple[PolicyModelResponses, ...] = ()
    truth: ArtifactRef | None = None
    best_of_n: tuple[ArtifactRef, ...] = ()
    repeated_scores: ArtifactRef | None = None
    gate: GateConfig | None = None
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    provenance: Provenance


class Report(_Part):
    """A finished report."""

    html: ArtifactRef
    data: ArtifactRef
    card: ArtifactRef


@step(version=3)
def compose_report(store: ArtifactStore, parts: ReportParts) -> Report:
    """Gather the results, render the page and the model card."""
    benchmarks = tuple(store.read_record(ref, BenchmarkRows) for ref in parts.benchmarks)
    data = ReportData(
        **parts.model_dump(include={"kind", "title", "reward_model", "base_model", "simulated", "warnings", "notes"}),
        board=board_info(parts.board),
        domains=tuple(read_domain(store, domain) for domain in parts.domains),
        selection=parts.selection,
        offsets=store.read_record(parts.offsets, OffsetFit) if parts.offsets else None,
        pairs=parts.pairs,
        responses=parts.responses,
        curves=tuple(_curve(store, curve) for curve in parts.curves),
        benchmarks=tuple(row for one in benchmarks for row in one.rows),
        reliability=tuple(row for one in benchmarks for row in one.reliability),
        truth=store.read_record(parts.truth, TruthReport) if parts.truth else None,
        best_of_n=tuple(store.read_record(ref, BestOfNReport) for ref in parts.best_of_n),
        repeated_scores=store.read_record(parts.repeated_scores, RepeatedScores) if parts.repeated_scores else None,
        provenance=parts.provenance,
    )
    if parts.gate is not None:
        data = data.model_copy(update={"verdict": judge_report(data, parts.gate)})
    return Report(
        html=store.write_bytes(render_report(data).encode(), "report", ".html"),
        data=store.write_record(data, "report_data"),
        card=store.write_bytes((model_card(data) + gate_section(data)).encode(), "model_card", ".md"),
    )


def board_info(board: Board) -> BoardInfo:
    """What a page says of a board."""
    return BoardInfo(
        name=board.name,
        category=board.category,
        style_control=board.style_control,
        date=board.date.isoformat() if board.date else "",
        source=board.source if not board.revision else f"{board.source}, revision {board.revision}",
        licence=". ".join(part for part in (board.licence, board.attribution) if part),
        digest=board.ratings.digest,
        note="; ".join(board.notes),
    )


def read_domain(store: ArtifactStore, parts: DomainParts) -> ReportDomain:
    """One set of prompts and policy models, from what is stored about it."""
    return ReportDomain(
        label=parts.label,
        description=parts.description,
        held_out_models=parts.held_out_models,
        variants=tuple(store.read_record(ref, ReportVariant) for ref in parts.variants),
        comparisons=tuple(store.read_record(ref, ReportComparison) for ref in parts.comparisons),
        styles=tuple(store.read_record(ref, ReportStyleComparison) for ref in parts.styles),
    )


def _curve(store: ArtifactStore, parts: CurveParts) -> TrainingCurve:
    steps = store.read_record(parts.curve, Curve).steps
    return TrainingCurve(
        variant=parts.variant,
        label=parts.label,
        points=tuple(
            CurvePoint(
                **{name: record.get(name) for name in _CURVE_FIELDS},
                held_out_loss=record.get("eval_loss"),
                held_out_accuracy=record.get("eval_accuracy"),
            )
            for record in steps
            if "loss" in record  # before the first step there is only an evaluation
        ),
    )
