"""The method's steps: choose models, fit offsets, build debiased pairs."""

import polars as pl
from pydantic import BaseModel, ConfigDict, Field

from charm_core.mismatch import own_ratings
from charm_core.offset_check import OffsetCheck, split_half_check
from charm_core.offsets import OffsetConfig, OffsetFit, apply_offsets, fit_offsets
from charm_core.preferences import PairSummary, PreferenceConfig, build_preference_pairs
from charm_core.selection import Selection, SelectionConfig, select_models
from charm_core.tables import PAIRS, PROMPTS, RATINGS, RESPONSES, SCORES
from tasks.caching import step
from tasks.prompts import ResponseSet
from tasks.report_data import ReportVariant
from tasks.store import ArtifactRef, ArtifactStore


class View(BaseModel):
    """Which part of the scores a step looks at."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    label: str = Field(description="How a sentence names it, such as 'held-out prompts'.")
    parts: tuple[str, ...] = Field(default=(), description="Parts of the split; all prompts if empty.")
    policy_models: tuple[str, ...] = Field(default=(), description="Policy models; all if empty.")
    focus: tuple[str, ...] = Field(
        default=(), description="Only pairs with at least one of these models; all if empty."
    )


class PairSet(BaseModel):
    """Preference pairs and their summary."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pairs: ArtifactRef
    summary: PairSummary


@step(version=1)
def choose_models(store: ArtifactStore, evidence: ArtifactRef, config: SelectionConfig) -> Selection:
    """The overvalued models and the reference models, each with the reason."""
    return select_models(store.read_record(evidence, ReportVariant).mismatch, config)


@step(version=1)
def fit_model_offsets(
    store: ArtifactStore,
    scores: ArtifactRef,
    ratings: ArtifactRef,
    split: ArtifactRef,
    view: View,
    selection: Selection,
    config: OffsetConfig,
) -> ArtifactRef:
    """The offset that each policy model's scores need to agree with people."""
    fit = fit_offsets(
        read_view(store, scores, split, view),
        store.read_table(ratings, RATINGS),
        config,
        [choice.policy_model for choice in selection.references],
    )
    return store.write_record(fit, "offsets")


@step(version=1)
def check_offsets(
    store: ArtifactStore, scores: ArtifactRef, ratings: ArtifactRef, config: OffsetConfig, splits: int
) -> OffsetCheck:
    """What offsets alone would do: fitted on half of the prompts and judged on the other half, many times."""
    return split_half_check(store.read_table(scores, SCORES), store.read_table(ratings, RATINGS), config, splits)


@step(version=1)
def offset_scores(store: ArtifactStore, scores: ArtifactRef, offsets: ArtifactRef) -> ArtifactRef:
    """Calibrated scores of the policy models that have an offset; a model that the calibration never saw has none."""
    fit = store.read_record(offsets, OffsetFit)
    known = [offset.policy_model for offset in fit.offsets]
    table = store.read_table(scores, SCORES).filter(pl.col("policy_model").is_in(known))
    return store.write_table(apply_offsets(table, fit), SCORES)


@step(version=1)
def rate_by_scores(
    store: ArtifactStore, scores: ArtifactRef, ratings: ArtifactRef, split: ArtifactRef, view: View
) -> ArtifactRef:
    """Ratings that the reward model's own wins amount to: what the control is trained towards instead of people's."""
    own = own_ratings(read_view(store, scores, split, view), store.read_table(ratings, RATINGS))
    return store.write_table(own, RATINGS)


@step(version=1)
def build_pairs(
    store: ArtifactStore,
    responses: ResponseSet,
    scores: ArtifactRef,
    offsets: ArtifactRef | None,
    split: ArtifactRef,
    view: View,
    selection: Selection,
    config: PreferenceConfig,
) -> PairSet:
    """Preference pairs in the order of the calibrated scores; without offsets, the control."""
    calibrated = read_view(store, scores, split, view)
    models = calibrated.get_column("policy_model").unique().sort().to_list()
    fitted = store.read_record(offsets, OffsetFit).as_mapping() if offsets else {}
    built = build_preference_pairs(
        store.read_table(responses.prompts, PROMPTS),
        store.read_table(responses.responses, RESPONSES),
        calibrated,
        {model: fitted.get(model, 0.0) for model in models},
        config,
        selection,
    )
    return PairSet(pairs=store.write_table(built.frame, PAIRS), summary=built.summary)


def read_view(store: ArtifactStore, scores: ArtifactRef, split: ArtifactRef | None, view: View) -> pl.DataFrame:
    """The rows of a SCORES table that a view shows."""
    table = store.read_table(scores, SCORES)
    if split is not None and view.parts:
        chosen = store.read_frame(split).filter(pl.col("part").is_in(view.parts))
        table = table.join(chosen.select("prompt_id"), on="prompt_id", how="semi")
    if view.policy_models:
        table = table.filter(pl.col("policy_model").is_in(view.policy_models))
    return table
