"""How far a reward model's preferences between policy models are from people's, with intervals.

Per pair: the paired empirical win rate, and the mismatch degree (METHOD.md section 1). Per model: the overvaluation in
Elo points, from a Bradley-Terry fit to the reward model's own paired wins, anchored to the Arena's mean.

Intervals and p-values come from a bootstrap that carries prompt and rating uncertainty (``mismatch_values.py``).
"""

from collections.abc import Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field

from charm_core.comparison_graph import mutually_beaten_groups
from charm_core.elo import rating_standard_errors, select_ratings
from charm_core.mismatch_values import (
    MismatchValues,
    mean_absolute_estimate,
    mismatch_degree,
    mismatch_replicates,
    mismatch_values,
    model_p_values,
    overvaluation_rmse_estimate,
    pair_p_values,
    pair_points,
    rated_group,
)
from charm_core.records import Estimate, Record
from charm_core.resampling import holm_adjusted, percentile_estimate
from charm_core.scores import (
    PairOutcomes,
    ScoreMatrix,
    pairs_with,
    preference_outcomes,
    score_matrix,
    score_outcomes,
    win_rate_outcomes,
)
from charm_core.tables import RATINGS, validate

__all__ = [
    "MismatchConfig",
    "MismatchReport",
    "ModelMismatch",
    "PairMismatch",
    "empirical_win_rate",
    "measure_mismatch",
    "measure_preference_mismatch",
    "measure_win_rate_mismatch",
    "mismatch_degree",
    "own_ratings",
]

FloatArray = NDArray[np.float64]


class MismatchConfig(Record):
    """How to measure mismatch."""

    bootstrap_replicates: int = Field(1000, ge=50, description="Bootstrap replicates for intervals and p-values.")
    confidence: float = Field(0.95, gt=0.5, lt=1.0, description="Coverage of the intervals.")
    significance: float = Field(0.05, gt=0.0, lt=0.5, description="Family-wise error rate of the flags (Holm).")
    seed: int = Field(0, ge=0, description="Seed of the bootstrap.")


class ModelMismatch(Record):
    """One policy model: how the reward model sees it against how people see it."""

    policy_model: str
    rating: float = Field(description="Arena rating, Elo points.")
    rating_standard_error: float = Field(description="Its standard error; 0 where the board gives no interval.")
    reward_model_rating: float | None = Field(description="Elo that the reward model's own wins amount to.")
    overvaluation: Estimate = Field(description="Reward model's Elo minus Arena rating, Elo points.")
    mismatch_degree: Estimate = Field(description="Mean over the opponents.")
    mean_score: float | None = Field(description="Mean over its own prompts; None for pairwise preferences.")
    p_value: float = Field(description="Of 'its overvaluation is 0'.")
    p_value_holm: float = Field(description="The same, corrected for the number of models.")
    flagged: bool = Field(description="Whether the corrected p-value is below the significance.")
    prompts: int = Field(description="Prompts on which it was compared with another model.")
    note: str = ""


class PairMismatch(Record):
    """One pair; positive mismatch degree: ``model_a`` is overvalued against ``model_b``."""

    model_a: str
    model_b: str
    prompts: int = Field(description="Prompts that both answered.")
    win_rate: Estimate = Field(description="Empirical, paired, of model_a; ties half.")
    win_probability: float = Field(description="What the ratings imply.")
    mismatch_degree: Estimate
    tie_rate: float
    p_value_holm: float = Field(description="Of 'the mismatch degree is 0', corrected for the number of pairs.")
    flagged: bool


class MismatchReport(Record):
    """The answer to "is this reward model biased?"."""

    models: tuple[ModelMismatch, ...]
    pairs: tuple[PairMismatch, ...]
    mean_absolute_mismatch: Estimate = Field(description="Mean of |mismatch degree| over all pairs.")
    overvaluation_rmse: Estimate = Field(description="Root mean square overvaluation, Elo points.")
    tie_rate: float = Field(description="Share of all paired comparisons that tie.")
    smallest_score_gap: float | None = Field(description="Smallest non-zero difference of two scores on one prompt.")
    prompts: int
    config: MismatchConfig


def empirical_win_rate(scores: pl.DataFrame, model_a: str, model_b: str) -> float:
    """Share of shared prompts on which ``model_a`` scores higher than ``model_b``; equal scores count half.

    Raises:
        TableError: A bad table, an unknown model, or no shared prompt.
    """
    return float(score_outcomes(score_matrix(scores, [model_a, model_b])).win_rate[0])


def measure_mismatch(
    scores: pl.DataFrame, ratings: pl.DataFrame, config: MismatchConfig | None = None, focus: Sequence[str] = ()
) -> MismatchReport:
    """Compare a reward model's scores with the Arena.

    Args:
        scores: A SCORES frame. Missing cells are allowed: every pair uses the prompts that it shares.
        ratings: A RATINGS frame of one board at one date; it may hold more models.
        config: Settings.
        focus: Only pairs with at least one of these models count, such as models that a calibration never saw.

    Raises:
        TableError, GraphError: See ``score_matrix``.
        RatingsError: A policy model has no rating.
    """
    matrix = score_matrix(scores)
    means = np.nanmean(matrix.values, axis=0)
    return _report(
        pairs_with(score_outcomes(matrix), focus),
        ratings,
        config or MismatchConfig(),
        means,
        gap=_smallest_score_gap(matrix),
    )


def measure_preference_mismatch(
    preferences: pl.DataFrame, ratings: pl.DataFrame, config: MismatchConfig | None = None
) -> MismatchReport:
    """Compare a judge's pairwise preferences with the Arena; a star (many models against one baseline) will do.

    Args:
        preferences: A PREFERENCES frame.
        ratings: A RATINGS frame of one board at one date; it may hold more models.
        config: Settings.

    Raises:
        TableError, GraphError: See ``preference_outcomes``.
        RatingsError: A policy model has no rating.
    """
    return _report(preference_outcomes(preferences), ratings, config or MismatchConfig(), means=None, gap=None)


def measure_win_rate_mismatch(
    win_rates: pl.DataFrame, ratings: pl.DataFrame, config: MismatchConfig | None = None
) -> MismatchReport:
    """Compare published win rates with the Arena; see ``scores.win_rate_outcomes`` for what stands in for the prompts.

    Args:
        win_rates: A WIN_RATES frame.
        ratings: A RATINGS frame of one board at one date; it may hold more models.
        config: Settings.

    Raises:
        TableError, GraphError: See ``win_rate_outcomes``.
        RatingsError: A policy model has no rating.
    """
    return _report(win_rate_outcomes(win_rates), ratings, config or MismatchConfig(), means=None, gap=None)


def own_ratings(scores: pl.DataFrame) -> pl.DataFrame:
    """The Elo that a reward model's own paired wins amount to, with mean 0.

    Args:
        scores: A SCORES frame.

    Returns:
        A RATINGS frame without intervals; finite also where a model wins or loses everything (continuity-corrected).
    """
    outcomes = score_outcomes(score_matrix(scores))
    equal = np.zeros(len(outcomes.policy_models))
    nothing = [pl.lit(None, dtype=RATINGS.columns[name]).alias(name) for name in ("rating_low", "rating_high", "votes")]
    # what is more than for models that people find equally good
    rating = mismatch_values(outcomes, equal).overvaluation
    frame = pl.DataFrame({"policy_model": list(outcomes.policy_models), "rating": rating})
    return validate(frame.with_columns(nothing), RATINGS)


def _report(
    outcomes: PairOutcomes,
    ratings: pl.DataFrame,
    config: MismatchConfig,
    means: FloatArray | None,
    gap: float | None,
) -> MismatchReport:
    board = select_ratings(ratings, outcomes.policy_models)
    point = mismatch_values(outcomes, board.get_column("rating").to_numpy())
    replicates = mismatch_replicates(outcomes, board, replicates=config.bootstrap_replicates, seed=config.seed)
    notes = _infinite_notes(outcomes)
    comparisons = outcomes.shared.sum()
    return MismatchReport(
        models=_models(outcomes, board, point, replicates, config, means, notes),
        pairs=_pairs(outcomes, point, replicates, config),
        mean_absolute_mismatch=mean_absolute_estimate(point, replicates, config.confidence),
        overvaluation_rmse=overvaluation_rmse_estimate(outcomes, point, replicates, config.confidence),
        tie_rate=float((outcomes.tie_rate * outcomes.shared).sum() / comparisons),
        smallest_score_gap=gap,
        prompts=len(outcomes.prompt_ids),
        config=config,
    )


def _models(
    outcomes: PairOutcomes,
    board: pl.DataFrame,
    point: MismatchValues,
    replicates: MismatchValues,
    config: MismatchConfig,
    means: FloatArray | None,
    notes: dict[int, str],
) -> tuple[ModelMismatch, ...]:
    ratings, errors = board.get_column("rating").to_numpy(), rating_standard_errors(board)
    p_values = model_p_values(outcomes, point, replicates, list(notes))
    adjusted = holm_adjusted(p_values)
    prompts = _compared_prompts(outcomes)
    models = []
    for index, name in enumerate(outcomes.policy_models):
        overvaluation = percentile_estimate(
            float(point.overvaluation[index]), replicates.overvaluation[:, index], config.confidence
        )
        if index in notes:
            wins_all = point.model_degree[index] > 0
            overvaluation = Estimate(
                value=None, low=overvaluation.low if wins_all else None, high=None if wins_all else overvaluation.high
            )
        models.append(
            ModelMismatch(
                policy_model=name,
                rating=float(ratings[index]),
                rating_standard_error=float(errors[index]),
                reward_model_rating=None if index in notes else float(ratings[index] + point.overvaluation[index]),
                overvaluation=overvaluation,
                mismatch_degree=percentile_estimate(
                    float(point.model_degree[index]), replicates.model_degree[:, index], config.confidence
                ),
                mean_score=None if means is None else float(means[index]),
                p_value=float(p_values[index]),
                p_value_holm=float(adjusted[index]),
                flagged=bool(adjusted[index] < config.significance),
                prompts=int(prompts[index]),
                note=notes.get(index, ""),
            )
        )
    return tuple(models)


def _pairs(
    outcomes: PairOutcomes, point: MismatchValues, replicates: MismatchValues, config: MismatchConfig
) -> tuple[PairMismatch, ...]:
    adjusted = holm_adjusted(pair_p_values(outcomes, point, replicates))
    shared, tie_rate = outcomes.shared, outcomes.tie_rate
    return tuple(
        PairMismatch(
            model_a=outcomes.policy_models[outcomes.first[pair]],
            model_b=outcomes.policy_models[outcomes.second[pair]],
            prompts=int(shared[pair]),
            win_rate=percentile_estimate(float(point.win_rate[pair]), replicates.win_rate[:, pair], config.confidence),
            win_probability=float(point.probability[pair]),
            mismatch_degree=percentile_estimate(
                float(point.degree[pair]), replicates.degree[:, pair], config.confidence
            ),
            tie_rate=float(tie_rate[pair]),
            p_value_holm=float(adjusted[pair]),
            flagged=bool(adjusted[pair] < config.significance),
        )
        for pair in range(shared.size)
    )


def _infinite_notes(outcomes: PairOutcomes) -> dict[int, str]:
    beaten = pair_points(outcomes) > 0
    groups = mutually_beaten_groups(beaten)
    if len(groups) == 1:
        return {}
    rated = rated_group(outcomes)
    return {index: _why_infinite(beaten, group) for group in groups if group != rated for index in group}


def _why_infinite(beaten: NDArray[np.bool_], group: list[int]) -> str:
    inside = np.asarray(group)
    others = np.setdiff1d(np.arange(beaten.shape[0]), inside)
    who = "it" if len(group) == 1 else f"it and {len(group) - 1} more, taken together,"
    if not beaten[np.ix_(others, inside)].any():
        what = "on every prompt preferred to the other models"
    elif not beaten[np.ix_(inside, others)].any():
        what = "on no prompt preferred to another model"
    else:
        what = "always preferred to some models and never to the others"
    return f"no finite Elo, because {who} {'is' if len(group) == 1 else 'are'} {what}; the interval is one-sided"


def _compared_prompts(outcomes: PairOutcomes) -> NDArray[np.int64]:
    present = np.isfinite(outcomes.outcomes)
    return np.asarray(
        [
            present[:, (outcomes.first == index) | (outcomes.second == index)].any(axis=1).sum()
            for index in range(len(outcomes.policy_models))
        ]
    )


def _smallest_score_gap(matrix: ScoreMatrix) -> float | None:
    # neighbours in sorted order hold the smallest gaps; NaN sorts last and its differences are dropped
    gaps = np.diff(np.sort(matrix.values, axis=1), axis=1)
    positive = gaps[gaps > 0]
    return float(positive.min()) if positive.size else None
