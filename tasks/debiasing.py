"""The method's steps: choose models, fit offsets, build debiased pairs."""

import polars as pl
from pydantic import BaseModel, ConfigDict

from charm_core.mismatch import own_ratings
from charm_core.offset_check import OffsetCheck, split_half_check
from charm_core.offsets import OffsetConfig, OffsetFit, apply_offsets, fit_offsets
from charm_core.preferences import PairSummary, PreferenceConfig, build_preference_pairs
from charm_core.selection import ModelChoice, Selection, SelectionConfig, select_models
from charm_core.tables import PAIRS, PROMPTS, RATINGS, RESPONSES, SCORES
from tasks.caching import step
from tasks.pages.report_data import ReportVariant
from tasks.prompts import ResponseSet
from tasks.store import ArtifactRef, ArtifactStore


class ChosenModels(BaseModel):
    """Who takes part in the correction. Without the reasons: another reason for the same choice changes no result."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    overvalued: tuple[str, ...]
    references: tuple[str, ...]

    @classmethod
    def of(cls, selection: Selection) -> "ChosenModels":
        """Names only."""
        return cls(overvalued=selection.overvalued_models, references=selection.reference_models)

    def as_selection(self) -> Selection:
        """As the method wants it."""
        overvalued, references = (
            tuple(ModelChoice(policy_model=name, reason="chosen before") for name in names)
            for names in (self.overvalued, self.references)
        )
        return Selection(overvalued=overvalued, references=references)


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
    references: tuple[str, ...],
    config: OffsetConfig,
) -> ArtifactRef:
    """The offset that each policy model's scores need to agree with people."""
    fit = fit_offsets(
        store.read_table(scores, SCORES),
        store.read_table(ratings, RATINGS),
        config,
        references,
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


@step(version=2)
def rate_by_scores(store: ArtifactStore, scores: ArtifactRef) -> ArtifactRef:
    """Ratings that the reward model's own wins amount to: what the control is trained towards instead of people's.

    They know nothing of people's ratings, so that other ones leave the control as it is.
    """
    return store.write_table(own_ratings(store.read_table(scores, SCORES)), RATINGS)


@step(version=1)
def build_pairs(
    store: ArtifactStore,
    responses: ResponseSet,
    scores: ArtifactRef,
    offsets: ArtifactRef | None,
    chosen: ChosenModels,
    config: PreferenceConfig,
) -> PairSet:
    """Preference pairs in the order of the calibrated scores; without offsets, the control."""
    calibrated = store.read_table(scores, SCORES)
    models = calibrated.get_column("policy_model").unique().sort().to_list()
    fitted = store.read_record(offsets, OffsetFit).as_mapping() if offsets else {}
    built = build_preference_pairs(
        store.read_table(responses.prompts, PROMPTS),
        store.read_table(responses.responses, RESPONSES),
        calibrated,
        {model: fitted.get(model, 0.0) for model in models},
        config,
        chosen.as_selection(),
    )
    return PairSet(pairs=store.write_table(built.frame, PAIRS), summary=built.summary)
