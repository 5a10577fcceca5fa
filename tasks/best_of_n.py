"""Best-of-n: what each reward model picks from several responses to a prompt, and what that is worth."""

import polars as pl

from charm_core.best_of_n import BestOfNConfig, BestOfNReport, Known, measure_best_of_n
from charm_core.tables import PREFERENCES, RATINGS, RESPONSES, SCORES
from tasks.caching import step
from tasks.evaluation import View
from tasks.store import ArtifactRef, ArtifactStore


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
