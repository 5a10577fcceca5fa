"""The page about an evaluation: all numbers of a run in, one self-contained HTML file out.

``render_evaluation_page`` is pure: the same ``EvaluationData`` gives the same text, byte for byte.
"""

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict

from tasks.arena import Board
from tasks.caching import step
from tasks.evidence import BenchmarkRows, DomainParts, board_info, read_domain
from tasks.pages.evaluation_page_data import EvaluatedModel, EvaluationData
from tasks.pages.evaluation_text import evaluation_answer
from tasks.pages.report_data import PolicyModelResponses, Provenance, ReportDomain, VariantName
from tasks.pages.report_figures import PageFigure, alignment_figures, reliability_figures
from tasks.pages.reporting import page_environment
from tasks.pages.sheets import standalone
from tasks.store import ArtifactRef, ArtifactStore


class EvaluationParts(BaseModel):
    """All that the page is made of, by what is stored about it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    simulated: bool
    models: tuple[EvaluatedModel, ...]
    benchmarks: tuple[ArtifactRef, ...]
    board: Board | None
    domains: tuple[DomainParts, ...]
    responses: tuple[PolicyModelResponses, ...]
    confidence: float
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    provenance: Provenance


class EvaluationPage(BaseModel):
    """The finished page."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    html: ArtifactRef
    data: ArtifactRef


@step(version=1)
def compose_evaluation_page(store: ArtifactStore, parts: EvaluationParts) -> EvaluationPage:
    """Gather the results and render the page."""
    benchmarks = [store.read_record(ref, BenchmarkRows) for ref in parts.benchmarks]
    labels = {model.variant: model.label for model in parts.models}
    same = ("title", "simulated", "models", "responses", "confidence", "warnings", "notes", "provenance")
    data = EvaluationData(
        **{name: getattr(parts, name) for name in same},
        benchmarks=tuple(row for one in benchmarks for row in one.rows),
        reliability=tuple(row for one in benchmarks for row in one.reliability),
        board=board_info(parts.board) if parts.board else None,
        domains=tuple(_labelled(read_domain(store, domain), labels) for domain in parts.domains),
    )
    return EvaluationPage(
        html=store.write_bytes(render_evaluation_page(data).encode(), "evaluation", ".html"),
        data=store.write_record(data, "evaluation_data"),
    )


def render_evaluation_page(data: EvaluationData) -> str:
    """Render the page: HTML without any request to the outside."""
    return (
        page_environment()
        .get_template("evaluation_page.html.j2")
        .render(
            data=data,
            answer=evaluation_answer(data),
            figures=evaluation_figures(data),
            columns=[(model.variant, model.label) for model in data.models],
        )
    )


def evaluation_figures(data: EvaluationData) -> dict[str, PageFigure]:
    """Every figure that the data has numbers for, by name."""
    drawn = reliability_figures(data.reliability, {model.variant: model.label for model in data.models})
    for index, domain in enumerate(data.domains):
        drawn += alignment_figures(domain, f"-{index}" if index else "")
    return {figure.name: figure for figure in drawn}


def evaluation_figures_for_tracking(data: EvaluationData) -> dict[str, bytes]:
    """The figures as SVG files of their own: file name to content."""
    return {
        f"{name}.svg": standalone(figure.wide or figure.narrow) for name, figure in evaluation_figures(data).items()
    }


def _labelled(domain: ReportDomain, labels: Mapping[VariantName, str]) -> ReportDomain:
    """The domain with the reward models' own names."""
    variants = tuple(
        variant.model_copy(update={"label": labels.get(variant.name, variant.label)}) for variant in domain.variants
    )
    return domain.model_copy(update={"variants": variants})
