"""How well a reward model agrees with the Arena over policy models, and whether another one does better.

The mean score of a policy model is taken over its own prompts; where cells are missing, models are therefore compared
on different prompts (the paired win rates of ``mismatch.py`` are not affected).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
import scipy
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from charm_core.elo import rating_standard_errors, select_ratings
from charm_core.errors import TableError
from charm_core.mismatch import MismatchConfig
from charm_core.mismatch_values import (
    MismatchValues,
    mean_absolute_estimate,
    mismatch_replicates,
    mismatch_values,
    overvaluation_rmse,
    overvaluation_rmse_estimate,
)
from charm_core.records import Estimate, Record
from charm_core.resampling import bootstrap_weights, normal_p_values, percentile_estimate, reflected_estimate
from charm_core.scores import PairOutcomes, ScoreMatrix, pairs_with, score_matrix, score_outcomes
from charm_core.tables import RESPONSES, SCORES, validate

FloatArray = NDArray[np.float64]


class EloAgreement(Record):
    """Agreement of one reward model with one board."""

    pearson: Estimate = Field(description="Mean score per policy model against rating.")
    spearman: Estimate
    kendall: Estimate = Field(description="Kendall's tau-b.")
    rating_rmse: Estimate = Field(
        description="Root mean square of the reward model's own Elo minus the rating, points."
    )
    policy_models: int
    prompts: int
    note: str = ""


class MismatchComparison(Record):
    """Two reward models on the same prompts and policy models; a difference is after minus before."""

    before: Estimate = Field(description="Mean |mismatch degree|.")
    after: Estimate
    difference: Estimate
    ratio: Estimate = Field(description="After divided by before.")
    p_value: float = Field(description="Of 'the difference is 0'.")
    rating_rmse_difference: Estimate = Field(description="Elo points.")
    spearman_difference: Estimate = Field(description="Of the mean scores with the ratings.")
    policy_models: int
    prompts: int


class McNemar(Record):
    """Two reward models on the same items, right or wrong."""

    items: int
    only_a: int = Field(description="Items that only the first gets right.")
    only_b: int
    p_value: float = Field(description="Exact, two-sided; 1 where they never differ.")


class ScoreLengthCorrelation(Record):
    """Whether longer responses score higher; None where a side does not vary."""

    overall: float | None = Field(description="Spearman, all responses, length in characters.")
    within_prompt: float | None = Field(description="Pearson of score and log length, each minus its prompt's mean.")
    responses: int


@dataclass(frozen=True, kw_only=True)
class _Correlations:
    pearson: FloatArray
    spearman: FloatArray
    kendall: FloatArray


@dataclass(frozen=True, kw_only=True)
class _Measured:
    outcomes: PairOutcomes
    point: MismatchValues
    replicates: MismatchValues
    correlations: _Correlations
    correlation_replicates: _Correlations

    def rating_rmse(self, values: MismatchValues) -> FloatArray:
        return overvaluation_rmse(self.outcomes, values)


def elo_agreement(scores: pl.DataFrame, ratings: pl.DataFrame, config: MismatchConfig | None = None) -> EloAgreement:
    """Correlate mean scores with ratings, and compare the reward model's own Elo with the Arena's.

    Args:
        scores: A SCORES frame.
        ratings: A RATINGS frame of one board at one date; it may hold more models.
        config: Settings; intervals carry prompt and rating uncertainty.

    Returns:
        A correlation is None where the mean scores or the ratings do not vary.

    Raises:
        TableError, GraphError: See ``score_matrix``.
        RatingsError: A policy model has no rating.
    """
    settings = config or MismatchConfig()
    matrix = score_matrix(scores)
    measured = _measure(matrix, select_ratings(ratings, matrix.policy_models), settings)
    point, replicates = measured.correlations, measured.correlation_replicates
    few = len(matrix.policy_models) < 4
    return EloAgreement(
        pearson=percentile_estimate(float(point.pearson), replicates.pearson, settings.confidence),
        spearman=percentile_estimate(float(point.spearman), replicates.spearman, settings.confidence),
        kendall=percentile_estimate(float(point.kendall), replicates.kendall, settings.confidence),
        rating_rmse=overvaluation_rmse_estimate(
            measured.outcomes, measured.point, measured.replicates, settings.confidence
        ),
        policy_models=len(matrix.policy_models),
        prompts=len(matrix.prompt_ids),
        note="a correlation over fewer than four policy models says little" if few else "",
    )


def compare_mismatch(
    before_scores: pl.DataFrame,
    after_scores: pl.DataFrame,
    ratings: pl.DataFrame,
    config: MismatchConfig | None = None,
    focus: Sequence[str] = (),
) -> MismatchComparison:
    """Compare two reward models with a paired bootstrap: the same resample and the same rating draws for both.

    Args:
        before_scores: A SCORES frame of one reward model.
        after_scores: A SCORES frame of the other; only cells that both have are used.
        ratings: A RATINGS frame of one board at one date; it may hold more models.
        config: Settings.
        focus: Only pairs with at least one of these models count; the correlations are over all models.

    Raises:
        TableError: A bad table, or no cell in common.
        GraphError: See ``score_matrix``.
        RatingsError: A policy model has no rating.
    """
    settings = config or MismatchConfig()
    before_matrix, after_matrix = _common_matrices(before_scores, after_scores)
    board = select_ratings(ratings, before_matrix.policy_models)
    before, after = (_measure(matrix, board, settings, focus) for matrix in (before_matrix, after_matrix))
    points = [float(side.point.mean_absolute_degree) for side in (before, after)]
    replicates = [side.replicates.mean_absolute_degree for side in (before, after)]
    differences = replicates[1] - replicates[0]
    return MismatchComparison(
        before=mean_absolute_estimate(before.point, before.replicates, settings.confidence),
        after=mean_absolute_estimate(after.point, after.replicates, settings.confidence),
        difference=reflected_estimate(points[1] - points[0], differences, settings.confidence),
        ratio=_ratio(points, replicates, settings.confidence),
        p_value=float(normal_p_values(np.asarray([points[1] - points[0]]), differences[:, None])[0]),
        rating_rmse_difference=reflected_estimate(
            float(after.rating_rmse(after.point) - before.rating_rmse(before.point)),
            after.rating_rmse(after.replicates) - before.rating_rmse(before.replicates),
            settings.confidence,
        ),
        spearman_difference=percentile_estimate(
            float(after.correlations.spearman - before.correlations.spearman),
            after.correlation_replicates.spearman - before.correlation_replicates.spearman,
            settings.confidence,
        ),
        policy_models=len(before_matrix.policy_models),
        prompts=len(before_matrix.prompt_ids),
    )


def mcnemar(correct_a: ArrayLike, correct_b: ArrayLike) -> McNemar:
    """Exact McNemar test: of the items on which two reward models differ, is one right more often?

    Args:
        correct_a: Shape ``(n,)``, whether the first is right on each item.
        correct_b: Shape ``(n,)``, the same items in the same order.

    Raises:
        TableError: Not the same number of items, none, or values other than true and false.
    """
    first, second = np.asarray(correct_a), np.asarray(correct_b)
    if first.ndim != 1 or first.shape != second.shape or first.size == 0:
        raise TableError(f"McNemar needs two lists of the same items, got {first.shape} and {second.shape}; align them")
    if first.dtype != np.bool_ or second.dtype != np.bool_:
        raise TableError(
            f"McNemar needs true and false, not {first.dtype} and {second.dtype}; compare with a threshold"
        )
    only_a, only_b = int((first & ~second).sum()), int((second & ~first).sum())
    p_value = float(scipy.stats.binomtest(only_a, only_a + only_b, 0.5).pvalue) if only_a + only_b else 1.0
    return McNemar(items=first.size, only_a=only_a, only_b=only_b, p_value=p_value)


def score_length_correlation(scores: pl.DataFrame, responses: pl.DataFrame) -> ScoreLengthCorrelation:
    """Correlation of score with response length, to see whether one bias was traded for another.

    Args:
        scores: A SCORES frame.
        responses: A RESPONSES frame that holds every scored response.

    Raises:
        TableError: A bad table, or a score without a response.
    """
    scored, texts = validate(scores, SCORES), validate(responses, RESPONSES)
    cells = scored.join(texts, on=["prompt_id", "policy_model"])
    if cells.height < scored.height:
        raise TableError(
            f"{scored.height - cells.height} scores have no response in the responses table; "
            f"use the responses that were scored"
        )
    length = pl.col("response").str.len_chars()
    centred = cells.select(
        pl.col("score"),
        length.alias("length"),
        (pl.col("score") - pl.col("score").mean().over("prompt_id")).alias("score_within"),
        (length.log1p() - length.log1p().mean().over("prompt_id")).alias("length_within"),
    )
    score, characters, score_within, length_within = (column.to_numpy().astype(np.float64) for column in centred)
    return ScoreLengthCorrelation(
        overall=_or_none(_pearson(scipy.stats.rankdata(score), scipy.stats.rankdata(characters))),
        within_prompt=_or_none(_pearson(score_within, length_within)),
        responses=cells.height,
    )


def _measure(matrix: ScoreMatrix, board: pl.DataFrame, config: MismatchConfig, focus: Sequence[str] = ()) -> _Measured:
    outcomes = pairs_with(score_outcomes(matrix), focus)
    ratings = board.get_column("rating").to_numpy()
    return _Measured(
        outcomes=outcomes,
        point=mismatch_values(outcomes, ratings),
        replicates=mismatch_replicates(outcomes, board, replicates=config.bootstrap_replicates, seed=config.seed),
        correlations=_correlations(np.nanmean(matrix.values, axis=0), ratings),
        correlation_replicates=_correlation_replicates(matrix, board, config),
    )


def _common_matrices(before: pl.DataFrame, after: pl.DataFrame) -> tuple[ScoreMatrix, ScoreMatrix]:
    first, second = validate(before, SCORES), validate(after, SCORES)
    key = ["prompt_id", "policy_model"]
    common = first.join(second, on=key, how="semi")
    if common.is_empty():
        raise TableError(
            "the two score tables have no prompt and policy model in common; score the same responses with both"
        )
    return score_matrix(common), score_matrix(second.join(common, on=key, how="semi"))


def _correlation_replicates(matrix: ScoreMatrix, board: pl.DataFrame, config: MismatchConfig) -> _Correlations:
    for_prompts, for_ratings = (np.random.default_rng(child) for child in np.random.SeedSequence(config.seed).spawn(2))
    present = np.isfinite(matrix.values)
    # centred, because single precision would lose small differences between large scores
    centred = np.where(present, matrix.values - np.nanmean(matrix.values), 0.0)
    means = []
    for weights in bootstrap_weights(len(matrix.prompt_ids), config.bootstrap_replicates, for_prompts):
        drawn = weights.astype(np.float64)
        with np.errstate(invalid="ignore"):
            means.append((drawn @ centred) / (drawn @ present))
    draws = for_ratings.standard_normal((config.bootstrap_replicates, board.height))
    return _correlations(
        np.concatenate(means), board.get_column("rating").to_numpy() + draws * rating_standard_errors(board)
    )


def _correlations(means: FloatArray, ratings: FloatArray) -> _Correlations:
    upper = np.triu_indices(means.shape[-1], 1)
    mean_signs = np.sign(means[..., :, None] - means[..., None, :])[..., upper[0], upper[1]]
    rating_signs = np.sign(ratings[..., :, None] - ratings[..., None, :])[..., upper[0], upper[1]]
    untied = np.sqrt((mean_signs**2).sum(axis=-1) * (rating_signs**2).sum(axis=-1))
    with np.errstate(invalid="ignore", divide="ignore"):
        kendall = (mean_signs * rating_signs).sum(axis=-1) / untied
    return _Correlations(
        pearson=_pearson(means, ratings),
        spearman=_pearson(scipy.stats.rankdata(means, axis=-1), scipy.stats.rankdata(ratings, axis=-1)),
        kendall=np.asarray(kendall),
    )


def _pearson(first: FloatArray, second: FloatArray) -> FloatArray:
    """Over the last axis; NaN where a side does not vary."""
    one = first - first.mean(axis=-1, keepdims=True)
    other = second - second.mean(axis=-1, keepdims=True)
    product = np.sqrt((one**2).sum(axis=-1) * (other**2).sum(axis=-1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((one * other).sum(axis=-1) / product)


def _ratio(points: list[float], replicates: list[FloatArray], confidence: float) -> Estimate:
    if min(points) <= 0.0 or min(float(side.min()) for side in replicates) <= 0.0:
        return Estimate(value=points[1] / points[0] if points[0] > 0.0 else None)
    logarithm = reflected_estimate(
        float(np.log(points[1] / points[0])), np.log(replicates[1] / replicates[0]), confidence
    )
    return Estimate(**{name: float(np.exp(value)) for name, value in logarithm.model_dump().items()})


def _or_none(value: FloatArray) -> float | None:
    return float(value) if np.isfinite(value) else None
