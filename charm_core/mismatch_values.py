"""Win rates, mismatch degrees and overvaluations as arrays: point estimates and paired bootstrap replicates.

Each replicate resamples prompts, once for all models, and draws every rating from its own interval. A pair that one
side wins on every prompt of a replicate would look certain however few prompts there are; its win rate is drawn from
the Beta(wins + 1/2, losses + 1/2) posterior instead.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr

from charm_core.bradley_terry import solve_strengths
from charm_core.comparison_graph import mutually_beaten_groups
from charm_core.elo import ELO_POINTS_PER_LOGIT, rating_standard_errors, win_probability
from charm_core.records import Estimate
from charm_core.resampling import bootstrap_weights, normal_p_values, percentile_estimate, reflected_estimate
from charm_core.scores import PairOutcomes

FloatArray = NDArray[np.float64]

_LEAST_WINS = 1e-3
_MEAN_ABSOLUTE_NORMAL = float(np.sqrt(2.0 / np.pi))


@dataclass(frozen=True, kw_only=True)
class MismatchValues:
    """Point estimates (leading axes absent) or replicates (leading axis B)."""

    win_rate: FloatArray
    """Shape ``(..., P)``."""
    probability: FloatArray
    """Shape ``(..., P)``."""
    degree: FloatArray
    """Shape ``(..., P)``."""
    model_degree: FloatArray
    """Shape ``(..., K)``."""
    overvaluation: FloatArray
    """Shape ``(..., K)`` in Elo points; always finite (continuity-corrected where there is no finite optimum)."""

    @property
    def mean_absolute_degree(self) -> FloatArray:
        """Shape ``(...)``."""
        return np.asarray(np.nanmean(np.abs(self.degree), axis=-1))


def mismatch_degree(win_rate: ArrayLike, win_probability: ArrayLike) -> FloatArray:
    """``(W - P) / max(P, 1 - P)``: signed, within [-1, 1], positive where the first model is overvalued.

    Args:
        win_rate: Empirical, ties half; any shape.
        win_probability: What the ratings imply; broadcast against ``win_rate``.
    """
    rate, probability = np.asarray(win_rate, dtype=np.float64), np.asarray(win_probability, dtype=np.float64)
    return np.asarray((rate - probability) / np.maximum(probability, 1.0 - probability))


def mismatch_values(outcomes: PairOutcomes, ratings: FloatArray) -> MismatchValues:
    """Point estimates; see ``MismatchValues``.

    Args:
        outcomes: What each pair did on each prompt.
        ratings: Shape ``(K,)`` in Elo points.
    """
    shared, rates = outcomes.shared, outcomes.win_rate
    rated = rated_group(outcomes)
    if len(mutually_beaten_groups(pair_points(outcomes) > 0)) == 1:
        return _values(outcomes, ratings, rates, rates * shared, shared, rated)
    certain = np.where(rates <= 0, 0.5 / shared, np.where(rates >= 1, 1.0 - 0.5 / shared, rates))
    values = _values(outcomes, ratings, rates, certain * shared, shared, rated)
    if len(rated) == ratings.size:
        return values
    # inside of the group the optimum is finite and needs no correction
    points = pair_points(outcomes)[np.ix_(np.asarray(rated), np.asarray(rated))]
    relative = ELO_POINTS_PER_LOGIT * solve_strengths(points[None])[0] - ratings[rated]
    values.overvaluation[rated] = relative - relative.mean()
    return values


def mismatch_replicates(outcomes: PairOutcomes, ratings: pl.DataFrame, *, replicates: int, seed: int) -> MismatchValues:
    """Bootstrap replicates of ``mismatch_values``, with prompt and rating uncertainty in each.

    Two calls with the same seed, prompts and ratings use the same resamples and the same rating draws, whatever the
    outcomes: that is the paired comparison of two reward models.

    Args:
        outcomes: What each pair did on each prompt.
        ratings: A RATINGS frame whose rows are the outcomes' policy models, in their order.
        replicates: Number of replicates B.
        seed: Seed of all draws.
    """
    for_prompts, for_ratings, for_certain = (
        np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(3)
    )
    centre = ratings.get_column("rating").to_numpy()
    draws = for_ratings.standard_normal((replicates, centre.size))
    drawn_ratings = centre + draws * rating_standard_errors(ratings)
    wins, shared = _resampled_wins(outcomes, replicates, for_prompts)
    wins = _certain_drawn(wins, shared, for_certain)
    with np.errstate(invalid="ignore"):
        rates = wins / shared
    start = (mismatch_values(outcomes, centre).overvaluation + centre) / ELO_POINTS_PER_LOGIT
    return _values(outcomes, drawn_ratings, rates, wins, shared, rated_group(outcomes), start=start)


def mean_absolute_estimate(point: MismatchValues, replicates: MismatchValues, confidence: float) -> Estimate:
    """Mean |mismatch degree| over all pairs with a reflected interval that also allows for its noise floor.

    The mean of absolute values is too high by up to ``E|N(0, s)| = 0.8 s`` for a pair with standard error s. The bootstrap
    sees less than half of that where the truth is near 0, so the lower end takes off all of it for every pair that is
    within two standard errors of 0.
    """
    value = float(point.mean_absolute_degree)
    reflected = reflected_estimate(value, replicates.mean_absolute_degree, confidence, floor=0.0)
    errors = np.nanstd(replicates.degree, axis=0)
    floor = float(np.mean(np.where(np.abs(point.degree) < 2.0 * errors, _MEAN_ABSOLUTE_NORMAL * errors, 0.0)))
    plain = percentile_estimate(value, replicates.mean_absolute_degree, confidence)
    if reflected.low is None or plain.low is None or plain.high is None:
        return reflected
    low = min(reflected.low, max(value - floor - 0.5 * (plain.high - plain.low), 0.0))
    return Estimate(value=value, low=low, high=reflected.high)


def overvaluation_rmse(outcomes: PairOutcomes, values: MismatchValues) -> FloatArray:
    """Root mean square overvaluation over the rated group in Elo points, shape ``(...)``; NaN where no model is rated."""
    if len(mutually_beaten_groups(pair_points(outcomes) > 0)[0]) == 1:
        return np.full(values.overvaluation.shape[:-1], np.nan)
    return np.asarray(np.sqrt(np.mean(values.overvaluation[..., rated_group(outcomes)] ** 2, axis=-1)))


def overvaluation_rmse_estimate(
    outcomes: PairOutcomes, point: MismatchValues, replicates: MismatchValues, confidence: float
) -> Estimate:
    """Root mean square overvaluation with a reflected interval that also allows for its noise floor.

    Sampling variance adds to the mean square; the lower end starts from what is left without it.
    """
    value, drawn = float(overvaluation_rmse(outcomes, point)), overvaluation_rmse(outcomes, replicates)
    reflected = reflected_estimate(value, drawn, confidence, floor=0.0)
    plain = percentile_estimate(value, drawn, confidence)
    if reflected.low is None or plain.low is None or plain.high is None:
        return reflected
    variance = float(replicates.overvaluation[:, rated_group(outcomes)].var(axis=0).mean())
    without_noise = float(np.sqrt(max(value**2 - variance, 0.0)))
    low = min(reflected.low, max(without_noise - 0.5 * (plain.high - plain.low), 0.0))
    return Estimate(value=value, low=low, high=reflected.high)


def pair_p_values(outcomes: PairOutcomes, point: MismatchValues, replicates: MismatchValues) -> FloatArray:
    """Two-sided p-values of "the mismatch degree is 0", shape ``(P,)``.

    From bootstrap standard errors; for a pair that one side wins on every prompt, whose outcomes say nothing about their
    spread, from the spread under the hypothesis itself.
    """
    certain = (point.win_rate <= 0) | (point.win_rate >= 1)
    z = np.abs(point.win_rate - point.probability) / _errors_if_unbiased(outcomes, point, replicates)
    return np.where(certain, 2.0 * ndtr(-z), normal_p_values(point.degree, replicates.degree))


def model_p_values(
    outcomes: PairOutcomes, point: MismatchValues, replicates: MismatchValues, without_elo: Sequence[int]
) -> FloatArray:
    """Two-sided p-values of "the overvaluation is 0", shape ``(K,)``.

    From bootstrap standard errors; for a model without a finite Elo, from its mean surplus of wins and the largest
    spread that this can have under the hypothesis, however its pairs hang together.
    """
    p_values = normal_p_values(point.overvaluation, replicates.overvaluation)
    surplus = point.win_rate - point.probability
    errors = _errors_if_unbiased(outcomes, point, replicates)
    for model in without_elo:
        leads, trails = outcomes.first == model, outcomes.second == model
        z = abs(surplus[leads].sum() - surplus[trails].sum()) / errors[leads | trails].sum()
        p_values[model] = 2.0 * ndtr(-z)
    return p_values


def pair_points(outcomes: PairOutcomes) -> FloatArray:
    """Shape ``(K, K)``: entry ``[j, k]`` is the prompts on which j wins against k, ties half."""
    return _pair_matrix(outcomes, outcomes.win_rate * outcomes.shared, outcomes.shared)


def rated_group(outcomes: PairOutcomes) -> list[int]:
    """The models with a finite Elo relative to one another: the largest group in which all beat all along some chain.

    The overvaluation is anchored to the Arena's mean over this group. It is all models unless the reward model prefers
    one, or several, on every single prompt.
    """
    group = mutually_beaten_groups(pair_points(outcomes) > 0)[0]
    # one lone model rates nothing: then none has a finite Elo and all share the anchor
    return group if len(group) > 1 else list(range(len(outcomes.policy_models)))


def _values(
    outcomes: PairOutcomes,
    ratings: FloatArray,
    rates: FloatArray,
    wins: FloatArray,
    shared: FloatArray,
    anchored: list[int],
    start: FloatArray | None = None,
) -> MismatchValues:
    probability = win_probability(ratings[..., outcomes.first], ratings[..., outcomes.second])
    degree = mismatch_degree(rates, probability)
    points = _pair_matrix(outcomes, wins, shared)
    strengths = solve_strengths(points.reshape(-1, *points.shape[-2:]), start=start).reshape(ratings.shape)
    relative = ELO_POINTS_PER_LOGIT * strengths - ratings
    return MismatchValues(
        win_rate=rates,
        probability=probability,
        degree=degree,
        model_degree=_mean_over_opponents(outcomes, degree),
        overvaluation=relative - relative[..., anchored].mean(axis=-1, keepdims=True),
    )


def _errors_if_unbiased(outcomes: PairOutcomes, point: MismatchValues, replicates: MismatchValues) -> FloatArray:
    of_prompts = point.probability * (1.0 - point.probability) / outcomes.shared
    return np.asarray(np.sqrt(of_prompts + replicates.probability.var(axis=0)))


def _pair_matrix(outcomes: PairOutcomes, wins: FloatArray, shared: FloatArray) -> FloatArray:
    models = len(outcomes.policy_models)
    points = np.zeros((*wins.shape[:-1], models, models))
    points[..., outcomes.first, outcomes.second] = wins
    points[..., outcomes.second, outcomes.first] = shared - wins
    return points


def _mean_over_opponents(outcomes: PairOutcomes, degree: FloatArray) -> FloatArray:
    pairs, models = outcomes.first.size, len(outcomes.policy_models)
    sign = np.zeros((pairs, models))
    sign[np.arange(pairs), outcomes.first] = 1.0
    sign[np.arange(pairs), outcomes.second] = -1.0
    present = np.isfinite(degree)
    opponents = present @ np.abs(sign)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((np.where(present, degree, 0.0) @ sign) / opponents)


def _resampled_wins(outcomes: PairOutcomes, replicates: int, rng: np.random.Generator) -> tuple[FloatArray, FloatArray]:
    """Wins of each pair's first model and shared prompts, both of shape (B, P)."""
    present = np.isfinite(outcomes.outcomes)
    complete = bool(present.all())
    filled = outcomes.outcomes if complete else np.where(present, outcomes.outcomes, np.float32(0.0))
    mask = None if complete else present.astype(np.float32)
    wins, shared = [], []
    for weights in bootstrap_weights(len(outcomes.prompt_ids), replicates, rng):
        # halves of whole numbers below 2**24: single precision is exact
        wins.append((weights @ filled).astype(np.float64))
        if mask is not None:
            shared.append((weights @ mask).astype(np.float64))
    all_wins = np.concatenate(wins)
    all_shared = np.concatenate(shared) if shared else np.full_like(all_wins, len(outcomes.prompt_ids))
    return all_wins, all_shared


def _certain_drawn(wins: FloatArray, shared: FloatArray, rng: np.random.Generator) -> FloatArray:
    certain = (shared > 0) & ((wins <= 0) | (wins >= shared))
    number = shared[certain]
    # outcomes that stand for published win rates may lie outside of [0, 1]
    drawn = np.clip(wins, 0.0, shared)
    share = rng.beta(drawn[certain] + 0.5, number - drawn[certain] + 0.5)
    # a draw may round to certainty again: keep it at a finite Elo
    drawn[certain] = np.clip(number * share, _LEAST_WINS, number - _LEAST_WINS)
    return drawn
