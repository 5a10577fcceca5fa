"""The effect report: what each recipe measured, over all seeds, as one table and one page."""

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from charm_core.ablation import CellMeasures, summarise_cells
from charm_core.length_regression import fit_length_curve, without_length
from charm_core.tables import RESPONSES, SCORES
from tasks.caching import step
from tasks.evidence import BenchmarkRows
from tasks.pages.ablation_page import MEASURES, AblationPage, Measure, RunnerUp, best_of, render_ablation
from tasks.pages.report_data import Provenance, ReportVariant, TruthReport
from tasks.store import ArtifactRef, ArtifactStore


class AblationReport(BaseModel):
    """The page and its numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    html: ArtifactRef
    data: ArtifactRef


@step(version=1)
def remove_length(
    store: ArtifactStore, fitted_on: ArtifactRef, responses: ArtifactRef, scores: ArtifactRef, answers: ArtifactRef
) -> ArtifactRef:
    """Scores without what length is worth, as fitted on other scores and their responses."""
    curve = fit_length_curve(store.read_table(fitted_on, SCORES), store.read_table(responses, RESPONSES))
    corrected = without_length(store.read_table(scores, SCORES), store.read_table(answers, RESPONSES), curve)
    return store.write_table(corrected, SCORES)


def measures_of(
    store: ArtifactStore, known: ArtifactRef, new: ArtifactRef | None, truth: ArtifactRef | None
) -> dict[str, float]:
    """The columns of one recipe and seed, from its stored evidence on held-out prompts and on held-out policy models."""
    evidence = store.read_record(known, ReportVariant)
    values = {
        "mismatch": evidence.mismatch.mean_absolute_mismatch.value,
        "mismatch_new": store.read_record(new, ReportVariant).mismatch.mean_absolute_mismatch.value if new else None,
        "rmse": evidence.mismatch.overvaluation_rmse.value,
        "spearman": evidence.agreement.spearman.value if evidence.agreement else None,
        "kendall": evidence.agreement.kendall.value if evidence.agreement else None,
        "truth": store.read_record(truth, TruthReport).accuracy[0].value.value if truth else None,
        "length": evidence.length_correlation,
    }
    return {name: value for name, value in values.items() if value is not None}


def headline_figures(store: ArtifactStore, benchmarks: Sequence[ArtifactRef]) -> dict[str, float]:
    """The first figure of each benchmark, which is the overall one where there is one, of the only variant in it."""
    first = [store.read_record(ref, BenchmarkRows).rows[0] for ref in benchmarks]
    figures = {f"{row.benchmark} {row.subset}, {row.metric}": row.values[0].value.value for row in first}
    return {name: value for name, value in figures.items() if value is not None}


def _runner_up(cells: tuple[CellMeasures, ...], recipes: tuple[str, ...], best: str) -> RunnerUp | None:
    """The trained recipe with the next lowest mean |MD|, and by how much it is higher, paired by seed."""
    others = [
        one
        for one in summarise_cells(cells, against=best)
        if one.cell in recipes and one.cell != best and "pairs" in one.means and "mismatch" in one.against
    ]
    second = min(others, key=lambda one: one.means["mismatch"].value or 0.0, default=None)
    return RunnerUp(cell=second.cell, difference=second.against["mismatch"]) if second else None


@step(version=2)
def compose_ablation(
    store: ArtifactStore,
    title: str,
    reward_model: str,
    board: str,
    simulated: bool,
    cells: tuple[CellMeasures, ...],
    against: str,
    recipes: tuple[str, ...],
    skipped: tuple[str, ...],
    provenance: Provenance,
) -> AblationReport:
    """Summarise the cells and render the page."""
    names = {name for cell in cells for name in cell.values}
    further = sorted(names - {measure.name for measure in MEASURES})
    summaries = summarise_cells(cells, against=against)
    best = best_of(summaries, recipes)
    page = AblationPage(
        title=title,
        reward_model=reward_model,
        simulated=simulated,
        board=board,
        seeds=tuple(sorted({cell.seed for cell in cells})),
        against=against,
        cells=summaries,
        best=best.cell if best else None,
        runner_up=_runner_up(cells, recipes, best.cell) if best else None,
        measures=(
            *(measure for measure in MEASURES if measure.name in names),
            *(Measure(name=name, label=name, digits=3, better=1) for name in further),
        ),
        skipped=skipped,
        provenance=provenance,
    )
    return AblationReport(
        html=store.write_bytes(render_ablation(page).encode(), "ablation", ".html"),
        data=store.write_record(page, "ablation_data"),
    )
