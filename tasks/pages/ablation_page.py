"""The effect report's page: all numbers in, one self-contained HTML file out. Pure functions."""

from collections.abc import Mapping, Sequence

from charm_core.ablation import CellSummary
from charm_core.records import Estimate, Record
from tasks.pages.report_data import Provenance
from tasks.pages.report_text import aligned, number, span
from tasks.pages.templates import template_environment


class Measure(Record):
    """A column of the table."""

    name: str
    label: str
    digits: int
    better: int
    """-1: less is better, 1: more is, 0: neither."""


MEASURES: tuple[Measure, ...] = (
    Measure(name="mismatch", label="mean |MD|, held-out prompts", digits=3, better=-1),
    Measure(name="mismatch_new", label="mean |MD|, held-out models", digits=3, better=-1),
    Measure(name="rmse", label="overvaluation RMSE (Elo)", digits=0, better=-1),
    Measure(name="spearman", label="Spearman with Elo", digits=2, better=1),
    Measure(name="kendall", label="Kendall with Elo", digits=2, better=1),
    Measure(name="truth", label="accuracy against the truth", digits=3, better=1),
    Measure(name="length", label="score–length correlation", digits=2, better=0),
    Measure(name="pairs", label="pairs trained on", digits=0, better=0),
    Measure(name="seconds", label="training (s)", digits=0, better=0),
)
"""Columns in order; a benchmark's figures come after them, under its own name."""


class RunnerUp(Record):
    """The second best trained recipe."""

    cell: str
    difference: Estimate
    """By how much its mean |MD| is higher than that of the best, paired by seed."""


class AblationPage(Record):
    """All numbers of the page."""

    title: str
    reward_model: str
    simulated: bool
    board: str
    seeds: tuple[int, ...]
    against: str
    cells: tuple[CellSummary, ...]
    best: str | None
    """The best trained recipe; None if none is clearly better than ``against``."""
    runner_up: RunnerUp | None
    measures: tuple[Measure, ...]
    skipped: tuple[str, ...] = ()
    provenance: Provenance


def best_of(cells: Sequence[CellSummary], recipes: Sequence[str]) -> CellSummary | None:
    """Of these recipes the trained one whose mean |MD| is clearly below the control's and lowest; None if none is clearly below."""
    clear = [cell for cell in cells if (difference := cell.against.get("mismatch")) and _below_zero(difference)]
    trained = [cell for cell in clear if "pairs" in cell.means and cell.cell in recipes]
    return min(trained, key=lambda cell: cell.means["mismatch"].value or 0.0, default=None)


def ablation_answer(page: AblationPage) -> str:
    """What came out, in two sentences."""
    where = f"over {len(page.seeds)} seeds" if len(page.seeds) > 1 else "with one seed"
    control = next(cell for cell in page.cells if cell.cell == page.against)
    of = number(control.means["mismatch"].value, 3)
    best = next((cell for cell in page.cells if cell.cell == page.best), None)
    if best is None:
        return f"No trained recipe is clearly better than the control ({page.against}, mean |MD| {of}) on held-out prompts {where}."
    difference = best.against["mismatch"]
    return (
        f"Of the trained recipes, {best.cell} has the lowest mean |MD| on held-out prompts {where}: "
        f"{number(best.means['mismatch'].value, 3)}, against {of} of the control "
        f"(difference {number(difference.value, 3, signed=True)} {span(difference, 3, signed=True)}). {_next(page)}".strip()
    )


def _next(page: AblationPage) -> str:
    second = page.runner_up
    if second is None:
        return ""
    by = f"{number(second.difference.value, 3)} {span(second.difference, 3, signed=True)}"
    if second.difference.low is not None and second.difference.low > 0:
        return f"The next, {second.cell}, is worse by {by}."
    return f"That it is better than the next, {second.cell}, is not shown: the difference is {by}."


def ablation_text(page: AblationPage) -> str:
    """The table for a terminal."""
    header = ["recipe", *(measure.label for measure in page.measures[:4])]
    rows = [
        [cell.cell, *(_cell_text(cell.means.get(measure.name), measure.digits) for measure in page.measures[:4])]
        for cell in page.cells
    ]
    return "\n\n".join([ablation_answer(page), aligned([header, *rows]), *page.skipped])


def render_ablation(page: AblationPage) -> str:
    """One HTML page without any request to the outside."""
    environment = template_environment()
    environment.filters.update(number=number, span=span)
    template = environment.get_template("ablation.html.j2")
    return template.render(page=page, answer=ablation_answer(page), verdict=_verdict, bar=_bar(page.cells))


def _cell_text(estimate: Estimate | None, digits: int) -> str:
    return "–" if estimate is None else f"{number(estimate.value, digits)} {span(estimate, digits)}".strip()


def _below_zero(estimate: Estimate) -> bool:
    return estimate.high is not None and estimate.high < 0


def _verdict(estimate: Estimate | None, better: int) -> str:
    """``better``, ``worse`` or nothing, by where the interval of a difference lies."""
    if estimate is None or estimate.low is None or estimate.high is None or better == 0:
        return ""
    side = -1 if estimate.high < 0 else 1 if estimate.low > 0 else 0
    return "" if side == 0 else "better" if side == better else "worse"


def _bar(cells: Sequence[CellSummary]) -> Mapping[str, tuple[float, float, float]]:
    """Cell to the left end, the middle and the right end of its mean |MD| in percent of the widest."""
    most = max((_end(cell.means["mismatch"]) for cell in cells if "mismatch" in cell.means), default=1.0) or 1.0
    return {
        cell.cell: (
            100 * max(_low(cell.means["mismatch"]), 0.0) / most,
            100 * (cell.means["mismatch"].value or 0.0) / most,
            100 * _end(cell.means["mismatch"]) / most,
        )
        for cell in cells
        if "mismatch" in cell.means
    }


def _end(estimate: Estimate) -> float:
    return estimate.high if estimate.high is not None else estimate.value or 0.0


def _low(estimate: Estimate) -> float:
    return estimate.low if estimate.low is not None else estimate.value or 0.0
