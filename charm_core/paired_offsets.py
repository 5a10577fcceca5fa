"""Offsets from paired comparisons: the exact solution for two models, the convex one for K (METHOD.md section 2)."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from charm_core.elo import win_probability
from charm_core.resampling import bootstrap_weights

FloatArray = NDArray[np.float64]

_HARD_STEPS = 20
_PATIENCE = 3
_REACH = 30.0
_NEWTON_STEPS = 100


@dataclass(frozen=True, kw_only=True)
class ExactOffset:
    """Offset of one model against another."""

    offset: float
    win_rate: float
    """Paired win rate with the offset added, ties half."""
    tie_block: int
    """Prompts whose equal differences make the target unreachable; 0 where ``|win_rate - P| <= 1/(2n)``."""


@dataclass(frozen=True, kw_only=True)
class PairDifferences:
    """Score differences of one pair on its shared prompts."""

    first: int
    second: int
    rows: NDArray[np.intp] | None
    """The shared prompts; None for all of them."""
    values: FloatArray
    """Score of ``first`` minus score of ``second``."""


@dataclass(frozen=True, kw_only=True)
class PairedSolution:
    """Offsets with mean 0 and how they were reached."""

    offsets: FloatArray
    iterations: int
    smooth_offsets: FloatArray
    """Solution at the last temperature, before sharpening."""
    temperature: float
    """The last one, in the unit of the scores."""


def pair_differences(values: FloatArray) -> list[PairDifferences]:
    """Differences of all pairs of columns that share a row, from an n×K matrix with NaN where there is no score."""
    present = np.isfinite(values)
    complete = bool(present.all())
    pairs = []
    for first, second in combinations(range(values.shape[1]), 2):
        rows = None if complete else np.flatnonzero(present[:, first] & present[:, second])
        chosen = values if rows is None else values[rows]
        if len(chosen):
            difference = np.ascontiguousarray(chosen[:, first] - chosen[:, second])
            pairs.append(PairDifferences(first=first, second=second, rows=rows, values=difference))
    return pairs


def exact_offset(first: FloatArray, second: FloatArray, probability: float) -> ExactOffset:
    """The offset on ``first`` that brings its paired win rate closest to ``probability``.

    Read off the order statistics of the differences: the threshold lies half-way between two neighbours. Equal
    differences (to rounding) move together; where that keeps the target out of reach the nearest reachable win rate
    is taken, which may be the one at which the whole block ties. Of two equally near, the smaller offset. O(n log n).

    Args:
        first: Scores of one model, shape ``(n,)``.
        second: Scores of the other on the same prompts.
        probability: Target win rate of ``first``.
    """
    differences = np.sort(first - second)
    number = differences.size
    rounding = 8 * np.finfo(np.float64).eps * float(max(np.abs(first).max(), np.abs(second).max()))
    starts = np.concatenate([[0], np.flatnonzero(np.diff(differences) > rounding) + 1, [number]])
    lowest, highest = differences[starts[:-1]], differences[starts[1:] - 1]
    # beyond either end one typical gap is as good as any other distance
    beyond = max(float(differences[-1] - differences[0]) / (2 * max(number - 1, 1)), 4 * rounding) or 1.0
    thresholds = np.concatenate([[lowest[0] - beyond], (highest[:-1] + lowest[1:]) / 2, [highest[-1] + beyond]])
    # threshold b has the blocks from b on above it
    rates, blocks = 1.0 - starts / number, np.diff(starts)
    nearest = int(np.argmin(np.abs(rates - probability)))
    around = range(max(nearest - 1, 0), min(nearest + 2, rates.size))
    candidates = [-float(thresholds[index]) for index in around]
    reached = [_win_rate(first + candidate - second) for candidate in candidates]
    for index in around:
        # a block whose differences are equal to the last bit can be made to tie; rounding may still break the tie
        if index < lowest.size and blocks[index] > 1 and lowest[index] == highest[index]:
            tied = _win_rate(first - float(lowest[index]) - second)
            if abs(tied - (rates[index] - 0.5 * blocks[index] / number)) < 0.25 / number:
                candidates.append(-float(lowest[index]))
                reached.append(tied)
    misses = [round(abs(rate - probability), 12) for rate in reached]
    best = min(range(len(candidates)), key=lambda index: (misses[index], abs(candidates[index])))
    reachable = abs(reached[best] - probability) <= 0.5 / number + 1e-12
    return ExactOffset(
        offset=candidates[best],
        win_rate=reached[best],
        tie_block=0 if reachable else int(blocks[min(max(around.start, 0), blocks.size - 1) : around.stop].max()),
    )


def solve_paired(
    pairs: Sequence[PairDifferences], ratings: FloatArray, start: FloatArray, smoothing: Sequence[float]
) -> PairedSolution:
    """Minimise the convex objective of METHOD.md section 2, then sharpen.

    The gradient equates every model's total win rate with what its rating predicts. It is solved at each relative
    temperature in turn. Sharpening then minimises the squared mismatch degrees of the hard win rates, weighted by shared
    prompts: what no offsets can remove is spread over the pairs as mismatch counts it.

    Args:
        pairs: Differences; the pairs must connect all models.
        ratings: Shape ``(K,)`` in Elo points.
        start: First guess, shape ``(K,)`` in the unit of the scores.
        smoothing: Temperatures as multiples of the spread of the differences, falling.
    """
    target = np.asarray([float(win_probability(ratings[pair.first], ratings[pair.second])) for pair in pairs])
    spread = difference_spread(pairs)
    offsets = start - start.mean()
    iterations = 0
    for relative in smoothing:
        offsets, taken = _newton(pairs, target, offsets, relative * spread)
        iterations += taken
    temperature = smoothing[-1] * spread
    sharp, taken = _sharpened(pairs, target, offsets, temperature)
    return PairedSolution(offsets=sharp, iterations=iterations + taken, smooth_offsets=offsets, temperature=temperature)


def paired_replicates(
    pairs: Sequence[PairDifferences],
    solution: PairedSolution,
    drawn_ratings: FloatArray,
    prompts: int,
    rng: np.random.Generator,
) -> FloatArray:
    """Bootstrap replicates of the offsets: one resample of the prompts for all pairs, ratings drawn in each.

    Each is one Newton step, with the replicate's own gradient and Hessian, from the solution at the last temperature
    (what is left is of second order in the sampling noise), moved by what sharpening moved the point estimate.

    Args:
        pairs: Differences.
        solution: The point estimate.
        drawn_ratings: Shape ``(B, K)`` in Elo points.
        prompts: Number of prompts n.
        rng: Source of the resamples.

    Returns:
        Shape ``(B, K)``, each row with mean 0.
    """
    first, second = _indices(pairs)
    wins, curvature, shared = _per_prompt(pairs, solution, prompts)
    target = win_probability(drawn_ratings[:, first], drawn_ratings[:, second])
    steps: list[FloatArray] = [np.empty((0, drawn_ratings.shape[1]))]
    row = 0
    for drawn in bootstrap_weights(prompts, len(drawn_ratings), rng):
        weights = drawn.astype(np.float64)
        of_block = target[row : row + len(weights)]
        row += len(weights)
        gradient = _scattered(weights @ wins - of_block * (weights @ shared), first, second, drawn_ratings.shape[1])
        steps.append(_newton_step(gradient, _laplacians(weights @ curvature, first, second, gradient.shape[1])))
    moved = _bounded(np.concatenate(steps), _REACH * solution.temperature)
    return np.asarray(solution.offsets + moved - moved.mean(axis=1, keepdims=True))


def difference_spread(pairs: Sequence[PairDifferences]) -> float:
    """Pooled standard deviation of the differences around their pair's mean; what temperatures are relative to."""
    number = sum(pair.values.size for pair in pairs)
    squares = sum(float(((pair.values - pair.values.mean()) ** 2).sum()) for pair in pairs)
    largest = max(float(np.abs(pair.values).max()) for pair in pairs)
    spread = float(np.sqrt(squares / number))
    # differences that never vary leave a step function: any width will do
    return spread if spread > 1e-12 * largest else (largest or 1.0)


def hard_win_rates(pairs: Sequence[PairDifferences], offsets: FloatArray) -> FloatArray:
    """Paired win rates with the offsets added, ties half, shape ``(P,)``."""
    return np.asarray([_win_rate(pair.values + (offsets[pair.first] - offsets[pair.second])) for pair in pairs])


def _win_rate(differences: FloatArray) -> float:
    return float(0.5 + 0.5 * (np.count_nonzero(differences > 0) - np.count_nonzero(differences < 0)) / differences.size)


def _newton(
    pairs: Sequence[PairDifferences], target: FloatArray, offsets: FloatArray, temperature: float
) -> tuple[FloatArray, int]:
    iteration, moved = 0, float("inf")
    # convergence is quadratic: what is left after such a step is far below the sampling noise
    while moved > 1e-5 * temperature and iteration < _NEWTON_STEPS:
        step = _bounded(_newton_step(*_derivatives(pairs, target, offsets, temperature)), temperature)
        offsets, moved, iteration = offsets + step, float(np.abs(step).max()), iteration + 1
    return offsets - offsets.mean(), iteration


def _sharpened(
    pairs: Sequence[PairDifferences], target: FloatArray, offsets: FloatArray, temperature: float
) -> tuple[FloatArray, int]:
    """Gauss-Newton on the squared mismatch degrees of the hard win rates, with smooth slopes, keeping the best."""
    first, second = _indices(pairs)
    number = np.asarray([float(pair.values.size) for pair in pairs])
    weights = number / np.maximum(target, 1.0 - target) ** 2
    best, smallest, since, iteration = offsets, np.inf, 0, 0
    while since < _PATIENCE and smallest > 0.0 and iteration < _HARD_STEPS:
        residual = hard_win_rates(pairs, offsets) - target
        loss = float(weights @ residual**2)
        since = 0 if loss < smallest else since + 1
        if loss < smallest:
            best, smallest = offsets, loss
        slope = (
            np.asarray([_curvature(_half_angle(pair, offsets, temperature), temperature) for pair in pairs]) / number
        )
        gradient = _scattered(weights * slope * residual, first, second, offsets.size)
        hessian = _laplacians(weights * slope**2, first, second, offsets.size)
        offsets = offsets + _bounded(_newton_step(gradient, hessian), temperature)
        iteration += 1
    return best - best.mean(), iteration


def _derivatives(
    pairs: Sequence[PairDifferences], target: FloatArray, offsets: FloatArray, temperature: float
) -> tuple[FloatArray, FloatArray]:
    """Gradient and Hessian of the objective, each pair weighted by its shared prompts."""
    surplus, curvature = np.empty(len(pairs)), np.empty(len(pairs))
    for index, pair in enumerate(pairs):
        half = _half_angle(pair, offsets, temperature)
        surplus[index] = half.size * (0.5 - target[index]) + 0.5 * half.sum()
        curvature[index] = _curvature(half, temperature)
    first, second = _indices(pairs)
    return _scattered(surplus, first, second, offsets.size), _laplacians(curvature, first, second, offsets.size)


def _half_angle(pair: PairDifferences, offsets: FloatArray, temperature: float) -> FloatArray:
    # σ(x) = (1 + tanh(x/2))/2, hence σ(1-σ) = (1 - tanh²)/4: one array gives both derivatives
    shift = offsets[pair.first] - offsets[pair.second]
    return np.asarray(np.tanh((pair.values + shift) * (0.5 / temperature)))


def _curvature(half: FloatArray, temperature: float) -> float:
    return float(half.size - half @ half) / (4.0 * temperature)


def _per_prompt(
    pairs: Sequence[PairDifferences], solution: PairedSolution, prompts: int
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Smooth wins, curvatures and presence of each pair on each prompt, all of shape (n, P)."""
    wins, curvature, shared = np.zeros((3, prompts, len(pairs)))
    for index, pair in enumerate(pairs):
        half = _half_angle(pair, solution.smooth_offsets, solution.temperature)
        rows = slice(None) if pair.rows is None else pair.rows
        wins[rows, index] = 0.5 + 0.5 * half
        curvature[rows, index] = (1.0 - half**2) / (4.0 * solution.temperature)
        shared[rows, index] = 1.0
    return wins, curvature, shared


def _indices(pairs: Sequence[PairDifferences]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    return np.asarray([pair.first for pair in pairs]), np.asarray([pair.second for pair in pairs])


def _scattered(surplus: FloatArray, first: NDArray[np.intp], second: NDArray[np.intp], models: int) -> FloatArray:
    """Sum over each model's pairs, counted against the second model: shape (..., P) to (..., K)."""
    sign = np.zeros((first.size, models))
    sign[np.arange(first.size), first] = 1.0
    sign[np.arange(first.size), second] = -1.0
    return np.asarray(surplus @ sign)


def _laplacians(weights: FloatArray, first: NDArray[np.intp], second: NDArray[np.intp], models: int) -> FloatArray:
    """Weighted graph Laplacians: shape (..., P) to (..., K, K)."""
    matrix = np.zeros((*weights.shape[:-1], models, models))
    matrix[..., first, second] = -weights
    matrix[..., second, first] = -weights
    index = np.arange(models)
    matrix[..., index, index] = -matrix.sum(axis=-1)
    return matrix


def _newton_step(gradient: FloatArray, hessian: FloatArray) -> FloatArray:
    models = gradient.shape[-1]
    scale = np.diagonal(hessian, axis1=-2, axis2=-1).max(axis=-1)[..., None, None] + np.finfo(np.float64).tiny
    # the constant fixes the gauge (mean 0), the ridge keeps saturated sigmoids from a division by zero
    regular = hessian + scale * (1.0 / models + 1e-10 * np.eye(models))
    return np.asarray(np.linalg.solve(regular, -gradient[..., None])[..., 0])


def _bounded(step: FloatArray, temperature: float) -> FloatArray:
    # no difference moves by more than one temperature: within that a Newton step cannot overshoot
    return np.asarray(step / np.maximum(np.ptp(step, axis=-1, keepdims=True) / temperature, 1.0))
