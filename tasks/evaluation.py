"""What a reward model's scores are worth on prompts and policy models that the calibration never saw."""

import polars as pl
from pydantic import BaseModel, ConfigDict, Field

from charm_core.agreement import compare_mismatch, elo_agreement
from charm_core.mismatch import (
    MismatchConfig,
    measure_mismatch,
    measure_preference_mismatch,
    measure_win_rate_mismatch,
)
from charm_core.reward_model.jobs import ScoringSummary
from charm_core.simulation import SimulationConfig, planted_overvaluation, truth_accuracy
from charm_core.style_bias import StyleCorrelations, compare_style_correlations, style_correlations
from charm_core.tables import PREFERENCES, RATINGS, RESPONSES, SCORES, WIN_RATES
from tasks.caching import step
from tasks.pages.report_data import (
    PlantedBias,
    ReportComparison,
    ReportStyleComparison,
    ReportVariant,
    ScoreQuantiles,
    ScoringNotes,
    TruthReport,
    VariantName,
    VariantValue,
)
from tasks.simulation import SimulatedSources
from tasks.store import ArtifactRef, ArtifactStore

LABELS: dict[VariantName, str] = {
    "untouched": "Untouched",
    "offsets": "Offsets at inference",
    "control": "Control (δ = 0)",
    "calibrated": "Calibrated",
}

_QUANTILES = {"quantile_05": 0.05, "quantile_25": 0.25, "median": 0.5, "quantile_75": 0.75, "quantile_95": 0.95}


class View(BaseModel):
    """Which part of the scores a step looks at."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    label: str = Field(description="How a sentence names it, such as 'held-out prompts'.")
    parts: tuple[str, ...] = Field(default=(), description="Parts of the split; all prompts if empty.")
    policy_models: tuple[str, ...] = Field(default=(), description="Policy models; all if empty.")
    focus: tuple[str, ...] = Field(
        default=(), description="Only pairs with at least one of these models; all if empty."
    )


@step(version=2)
def evaluate_variant(
    store: ArtifactStore,
    name: VariantName,
    scores: ArtifactRef,
    responses: ArtifactRef | None,
    ratings: ArtifactRef,
    split: ArtifactRef | None,
    view: View,
    config: MismatchConfig,
    scoring: ScoringSummary | None = None,
) -> ArtifactRef:
    """Mismatch, agreement with Elo, spread of scores and what style is worth, of one variant."""
    seen = _read_view(store, scores, split, view)
    board = store.read_table(ratings, RATINGS)
    style = _style(seen, store.read_table(responses, RESPONSES), config) if responses is not None else None
    variant = ReportVariant(
        name=name,
        label=LABELS[name],
        mismatch=measure_mismatch(seen, board, config, view.focus),
        agreement=elo_agreement(seen, board, config) if seen.get_column("policy_model").n_unique() > 2 else None,
        score_quantiles=_score_quantiles(seen),
        scoring=_scoring_notes(scoring) if scoring else None,
        length_correlation=style.length.overall if style else None,
        style=style,
    )
    return store.write_record(variant, "evidence")


@step(version=1)
def evaluate_preferences(
    store: ArtifactStore, preferences: ArtifactRef, ratings: ArtifactRef, config: MismatchConfig
) -> ArtifactRef:
    """Mismatch of a judge's pairwise preferences."""
    report = measure_preference_mismatch(
        store.read_table(preferences, PREFERENCES), store.read_table(ratings, RATINGS), config
    )
    return store.write_record(ReportVariant(name="untouched", label="Judge", mismatch=report), "evidence")


@step(version=1)
def evaluate_win_rates(
    store: ArtifactStore, win_rates: ArtifactRef, ratings: ArtifactRef, config: MismatchConfig
) -> ArtifactRef:
    """Mismatch of published win rates."""
    report = measure_win_rate_mismatch(
        store.read_table(win_rates, WIN_RATES), store.read_table(ratings, RATINGS), config
    )
    return store.write_record(ReportVariant(name="untouched", label="Published win rates", mismatch=report), "evidence")


@step(version=1)
def judge_truth(
    store: ArtifactStore,
    simulated: SimulatedSources,
    world: SimulationConfig,
    scores: tuple[tuple[VariantName, ArtifactRef], ...],
    evidence: ArtifactRef,
    split: ArtifactRef,
    view: View,
) -> ArtifactRef:
    """What only a simulation can know: planted against estimated bias, accuracy against the true quality."""
    found = {
        model.policy_model: model.overvaluation for model in store.read_record(evidence, ReportVariant).mismatch.models
    }
    planted = planted_overvaluation(world)
    quality = store.read_table(simulated.true_quality, SCORES)
    truth = TruthReport(
        planted=tuple(
            PlantedBias(
                policy_model=model, planted=planted[model], estimated=found[model], held_out=model in view.focus
            )
            for model in sorted(found)
        ),
        accuracy=tuple(
            VariantValue(variant=name, value=truth_accuracy(_read_view(store, ref, split, view), quality))
            for name, ref in scores
        ),
    )
    return store.write_record(truth, "truth")


@step(version=1)
def compare_variants(
    store: ArtifactStore,
    before: tuple[VariantName, ArtifactRef],
    after: tuple[VariantName, ArtifactRef],
    ratings: ArtifactRef,
    split: ArtifactRef | None,
    view: View,
    config: MismatchConfig,
) -> ArtifactRef:
    """Paired comparison of mean |MD|: the same resamples of prompts and draws of ratings for both variants."""
    comparison = compare_mismatch(
        _read_view(store, before[1], split, view),
        _read_view(store, after[1], split, view),
        store.read_table(ratings, RATINGS),
        config,
        view.focus,
    )
    return store.write_record(ReportComparison(before=before[0], after=after[0], comparison=comparison), "comparison")


@step(version=1)
def compare_styles(
    store: ArtifactStore,
    before: tuple[VariantName, ArtifactRef],
    after: tuple[VariantName, ArtifactRef],
    responses: ArtifactRef,
    split: ArtifactRef | None,
    view: View,
    config: MismatchConfig,
) -> ArtifactRef:
    """Paired comparison of what length and Markdown are worth to two variants."""
    differences = compare_style_correlations(
        _read_view(store, before[1], split, view),
        _read_view(store, after[1], split, view),
        store.read_table(responses, RESPONSES),
        replicates=config.bootstrap_replicates,
        seed=config.seed,
        confidence=config.confidence,
    )
    record = ReportStyleComparison(before=before[0], after=after[0], differences=differences)
    return store.write_record(record, "style_comparison")


def _style(scores: pl.DataFrame, responses: pl.DataFrame, config: MismatchConfig) -> StyleCorrelations:
    return style_correlations(
        scores,
        responses,
        replicates=config.bootstrap_replicates,
        seed=config.seed,
        confidence=config.confidence,
    )


def _scoring_notes(summary: ScoringSummary) -> ScoringNotes:
    return ScoringNotes(
        texts=summary.texts,
        prompts_cut=summary.prompts_cut,
        responses_cut=summary.responses_cut,
        batch_drift=summary.batch_drift,
        max_length=summary.max_length,
    )


def _score_quantiles(scores: pl.DataFrame) -> tuple[ScoreQuantiles, ...]:
    grouped = scores.group_by("policy_model").agg(
        pl.col("score").quantile(level, "linear").alias(name) for name, level in _QUANTILES.items()
    )
    return tuple(ScoreQuantiles.model_validate(row) for row in grouped.sort("policy_model").to_dicts())


def _read_view(store: ArtifactStore, scores: ArtifactRef, split: ArtifactRef | None, view: View) -> pl.DataFrame:
    """The rows of a SCORES table that a view shows."""
    table = store.read_table(scores, SCORES)
    if split is not None and view.parts:
        chosen = store.read_frame(split).filter(pl.col("part").is_in(view.parts))
        table = table.join(chosen.select("prompt_id"), on="prompt_id", how="semi")
    if view.policy_models:
        table = table.filter(pl.col("policy_model").is_in(view.policy_models))
    return table
