"""Best-of-n: what each reward model picks from several responses to a prompt, and what that is worth."""

import polars as pl

from charm_core.best_of_n import BestOfNConfig, BestOfNReport, Known, Measure, measure_best_of_n
from charm_core.records import Estimate
from charm_core.tables import PREFERENCES, RATINGS, RESPONSES, SCORES
from tasks.caching import step
from tasks.evaluation import View
from tasks.store import ArtifactRef, ArtifactStore

MEASURES: dict[Measure, tuple[str, int, float]] = {
    "rating": ("Elo of the picked model", 1, 1.0),
    "length": ("Characters", 0, 1.0),
    "judge": ("Judge's preference (%)", 1, 100.0),
    "judge's best": ("Judge prefers no other (%)", 1, 100.0),
    "quality": ("True quality (logits)", 2, 1.0),
    "truly best": ("None is truly better (%)", 1, 100.0),
}
"""Heading, digits and unit of each measure in a table."""


@step(version=1)
def pick_best_of_n(
    store: ArtifactStore,
    scores: tuple[tuple[str, ArtifactRef], ...],
    responses: ArtifactRef,
    config: BestOfNConfig,
    *,
    ratings: ArtifactRef | None = None,
    preferences: ArtifactRef | None = None,
    quality: ArtifactRef | None = None,
    split: ArtifactRef | None = None,
    view: View | None = None,
    compared: tuple[tuple[str, str], ...] = (),
) -> ArtifactRef:
    """Best-of-n of several reward models on the same responses.

    Args:
        store: Where everything is.
        scores: Reward model and its SCORES.
        responses: RESPONSES that were scored.
        config: For which n.
        ratings: RATINGS of the policy models.
        preferences: PREFERENCES of a judge.
        quality: SCORES with the true quality, of a simulation.
        split: Which prompt belongs to which part.
        view: Prompts and policy models to look at; default: all.
        compared: Reward models to subtract, (before, after).

    Returns:
        A BestOfNReport.
    """
    known = Known(
        ratings=store.read_table(ratings, RATINGS) if ratings else None,
        preferences=store.read_table(preferences, PREFERENCES) if preferences else None,
        quality=store.read_table(quality, SCORES) if quality else None,
    )
    parts = store.read_frame(split) if split else None
    shown = {name: _shown(store.read_table(ref, SCORES), parts, view) for name, ref in scores}
    report = measure_best_of_n(shown, store.read_table(responses, RESPONSES), known, config, compared)
    return store.write_record(report, "best_of_n")


def best_of_n_markdown(report: BestOfNReport, labels: dict[str, str] | None = None) -> str:
    """One table per measure, a row per n and a column per reward model, then the differences.

    Args:
        report: What was measured.
        labels: How reward models are called; default: by their names.
    """
    left_out = report.prompts_left_out
    head = f"{report.candidates} responses to each of {report.prompts:,} prompts"
    tail = f"; {left_out:,} prompts lack a score of one and are left out." if left_out else "."
    measures = dict.fromkeys(value.measure for value in report.values)
    return "\n\n".join([head + tail, *(_measure_table(report, measure, labels or {}) for measure in measures)])


def _measure_table(report: BestOfNReport, measure: Measure, labels: dict[str, str]) -> str:
    heading, digits, unit = MEASURES[measure]
    values = [value for value in report.values if value.measure == measure]
    gains = [item for item in report.differences if item.measure == measure]
    columns = [labels.get(name, name) for name in dict.fromkeys(value.scorer for value in values)]
    pairs = dict.fromkeys((item.before, item.after) for item in gains)
    columns += [f"{labels.get(after, after)} − {labels.get(before, before)}" for before, after in pairs]
    limits = {value.n: value.best_possible for value in values if value.best_possible is not None}
    head = ["n", *columns, *(["best possible"] if limits else [])]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for n in dict.fromkeys(value.n for value in values):
        estimates = [item.value for item in values if item.n == n] + [item.difference for item in gains if item.n == n]
        cells = [_cell(estimate, digits, unit) for estimate in estimates]
        cells += [f"{limits[n] * unit:.{digits}f}"] if limits else []
        lines.append(f"| {n} | {' | '.join(cells)} |")
    return f"**{heading}**\n\n" + "\n".join(lines)


def best_of_n_metrics(report: BestOfNReport) -> dict[str, float | None]:
    """Numbers for MLflow."""
    return {
        # MLflow allows no apostrophe
        f"{item.scorer}/best of {item.n}/{item.measure.replace(chr(39), '')}": item.value.value
        for item in report.values
    }


def _shown(scores: pl.DataFrame, parts: pl.DataFrame | None, view: View | None) -> pl.DataFrame:
    """The rows of SCORES that a view shows."""
    if view is None:
        return scores
    if parts is not None and view.parts:
        chosen = parts.filter(pl.col("part").is_in(view.parts)).select("prompt_id")
        scores = scores.join(chosen, on="prompt_id", how="semi")
    return scores.filter(pl.col("policy_model").is_in(view.policy_models)) if view.policy_models else scores


def _cell(estimate: Estimate, digits: int, unit: float) -> str:
    ends = (estimate.value, estimate.low, estimate.high)
    value, low, high = ("?" if end is None else f"{end * unit:.{digits}f}" for end in ends)
    return f"{value} [{low}, {high}]"
