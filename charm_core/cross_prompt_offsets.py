"""The reference implementation's offset estimator, kept for reproduction and for the ablation.

It compares every score of one model with every score of the other *across different prompts*, which lets prompt
difficulty leak into the offset (METHOD.md section 2). The reference smooths with a sigmoid at 0.1 raw units within
blocks of 1,000 prompts and runs 100 Adam steps; here the same equation is solved as the one-dimensional root that it
is. Source: HexagonStar/CHARM, ``src/calibrate.py``.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from charm_core.resampling import bootstrap_weights

FloatArray = NDArray[np.float64]

_EVALUATIONS = 200


@dataclass(frozen=True, kw_only=True)
class CrossPromptTarget:
    """One comparison with a reference model."""

    scores: FloatArray
    """Shape ``(m,)``: the model's scores on the prompts that it shares with the reference model, in prompt order."""
    reference: FloatArray
    """Shape ``(m,)``: the reference model's scores on them."""
    rows: NDArray[np.intp]
    """Shape ``(m,)``: which prompts these are."""
    probability: float
    """Target win rate of the model."""


def cross_prompt_win_rate(
    scores: FloatArray, reference: FloatArray, offset: float, *, score_temperature: float, block_prompts: int
) -> float:
    """Win rate over all comparisons across prompts.

    Args:
        scores: Shape ``(m,)``.
        reference: Shape ``(m,)``.
        offset: Added to ``scores``.
        score_temperature: Of the sigmoid, in raw score units; 0 for hard wins (ties half) over all m² comparisons.
        block_prompts: With a temperature, only prompts of one block are compared, and blocks count by their size.
    """
    if score_temperature == 0.0:
        return _hard_rate(np.sort(scores), np.sort(reference), offset)
    total = sum(
        len(half) * (0.5 + 0.5 * float(half.mean()))
        for half in _half_angles(scores, reference, offset, score_temperature, block_prompts)
    )
    return total / scores.size


def solve_cross_prompt(
    targets: Sequence[CrossPromptTarget], *, score_temperature: float, block_prompts: int
) -> tuple[float, int]:
    """The offset at which the model's mean cross-prompt win rate against its references is what the ratings predict.

    Returns:
        The offset and the number of evaluations. Without a temperature the win rate is a step function: the offset is
        half-way between the two steps that enclose the target.
    """
    low = min(float(target.reference.min() - target.scores.max()) for target in targets)
    high = max(float(target.reference.max() - target.scores.min()) for target in targets)
    margin = 40.0 * score_temperature + 1e-3 * (high - low) + float(np.finfo(np.float64).tiny)
    low, high = low - margin, high + margin
    if score_temperature == 0.0:
        return _hard_root(targets, low, high)
    offset, moved, evaluations = 0.5 * (low + high), float("inf"), 0
    while moved > 1e-10 * (abs(offset) + score_temperature) and evaluations < _EVALUATIONS:
        surplus, slope = _smooth_surplus(targets, offset, score_temperature, block_prompts)
        evaluations += 1
        low, high = (low, offset) if surplus > 0 else (offset, high)
        newton = offset - surplus / slope if slope > 0 else np.inf
        # Newton while it stays inside of the bracket, else bisection
        following = newton if low < newton < high else 0.5 * (low + high)
        offset, moved = following, abs(following - offset)
    return offset, evaluations


def cross_prompt_replicates(
    targets: Sequence[CrossPromptTarget],
    offset: float,
    drawn_probabilities: FloatArray,
    prompts: int,
    rng: np.random.Generator,
    *,
    score_temperature: float,
    block_prompts: int,
) -> FloatArray:
    """Bootstrap replicates of one model's offset, each one Newton step from the point estimate.

    Args:
        targets: The model's comparisons.
        offset: Point estimate.
        drawn_probabilities: Shape ``(B, references)``: targets from drawn ratings.
        prompts: Number of prompts n.
        rng: Source of the resamples.
        score_temperature: See ``cross_prompt_win_rate``.
        block_prompts: See ``cross_prompt_win_rate``.

    Returns:
        Shape ``(B,)``.
    """
    slope = np.mean([_slope(target, offset, score_temperature, block_prompts) for target in targets])
    if slope <= 0:
        return np.full(len(drawn_probabilities), offset)
    surplus = []
    for weights in bootstrap_weights(prompts, len(drawn_probabilities), rng):
        rates = [_weighted_rate(target, offset, weights, score_temperature, block_prompts) for target in targets]
        surplus.append(np.mean(rates, axis=0))
    return np.asarray(offset - (np.concatenate(surplus) - drawn_probabilities.mean(axis=1)) / slope)


def _hard_rate(ordered: FloatArray, ordered_reference: FloatArray, offset: float) -> float:
    moved = ordered + offset
    below = np.searchsorted(ordered_reference, moved, side="left").sum()
    not_above = np.searchsorted(ordered_reference, moved, side="right").sum()
    return float(0.5 * (below + not_above) / (ordered.size * ordered_reference.size))


def _hard_root(targets: Sequence[CrossPromptTarget], low: float, high: float) -> tuple[float, int]:
    sides = [(np.sort(target.scores), np.sort(target.reference)) for target in targets]
    wanted = float(np.mean([target.probability for target in targets]))
    rounding = (
        8
        * np.finfo(np.float64).eps
        * max(abs(low), abs(high), *(np.abs(side).max() for pair in sides for side in pair))
    )
    beyond, evaluations = 0.5 * (high - low), 0
    while high - low > rounding and evaluations < _EVALUATIONS:
        middle = 0.5 * (low + high)
        rate = _mean_rate(sides, middle)
        evaluations += 1
        low, high = (middle if rate <= wanted else low), (middle if rate >= wanted else high)
    # the bracket now holds one step, or lies on a plateau that has just the wanted rate
    before, step, after = _neighbouring_steps(sides, low - rounding, high + rounding, beyond)
    places = [0.5 * (before + step), 0.5 * (step + after), step, 0.5 * (before + after)]
    misses = [round(abs(_mean_rate(sides, place) - wanted), 12) for place in places]
    return places[int(np.argmin(misses))], evaluations


def _mean_rate(sides: Sequence[tuple[FloatArray, FloatArray]], offset: float) -> float:
    return float(np.mean([_hard_rate(scores, reference, offset) for scores, reference in sides]))


def _neighbouring_steps(
    sides: Sequence[tuple[FloatArray, FloatArray]], low: float, high: float, beyond: float
) -> tuple[float, float, float]:
    """The last difference of two scores below ``low``, one between, and the first above ``high``."""
    below, between, above = [low - beyond], [high], [high + beyond]
    for scores, reference in sides:
        lower = np.searchsorted(reference, scores + low, side="left")
        upper = np.searchsorted(reference, scores + high, side="right")
        has_lower, has_upper, has_step = lower > 0, upper < reference.size, lower < upper
        below.append(float((reference[lower[has_lower] - 1] - scores[has_lower]).max(initial=-np.inf)))
        above.append(float((reference[upper[has_upper]] - scores[has_upper]).min(initial=np.inf)))
        between.append(float((reference[lower[has_step]] - scores[has_step]).min(initial=np.inf)))
    nearest = min(between)
    return (
        max(below[1:]) if np.isfinite(max(below[1:])) else below[0],
        nearest,
        (min(above[1:]) if np.isfinite(min(above[1:])) else above[0]),
    )


def _half_angles(
    scores: FloatArray, reference: FloatArray, offset: float, temperature: float, block: int
) -> Iterator[FloatArray]:
    """``2σ - 1`` of all comparisons in each block."""
    for start in range(0, scores.size, block):
        one, other = scores[start : start + block], reference[start : start + block]
        yield np.tanh((one[:, None] + (offset - other)[None, :]) * (0.5 / temperature))


def _smooth_surplus(
    targets: Sequence[CrossPromptTarget], offset: float, temperature: float, block: int
) -> tuple[float, float]:
    surplus, slope = 0.0, 0.0
    for target in targets:
        for half in _half_angles(target.scores, target.reference, offset, temperature, block):
            share = len(half) / target.scores.size
            flat = half.ravel()
            surplus += share * (0.5 + 0.5 * float(half.mean()) - target.probability)
            slope += share * (1.0 - float(flat @ flat) / flat.size) / (4.0 * temperature)
    return surplus, slope


def _slope(target: CrossPromptTarget, offset: float, temperature: float, block: int) -> float:
    if temperature > 0.0:
        return _smooth_surplus([target], offset, temperature, block)[1]
    width = 0.1 * float(np.sqrt(target.scores.var() + target.reference.var()))
    if width == 0.0:
        return 0.0
    scores, reference = np.sort(target.scores), np.sort(target.reference)
    rise = _hard_rate(scores, reference, offset + width) - _hard_rate(scores, reference, offset - width)
    return rise / (2.0 * width)


def _weighted_rate(
    target: CrossPromptTarget, offset: float, weights: NDArray[np.float32], temperature: float, block: int
) -> FloatArray:
    """Cross-prompt win rate of each resample, shape ``(b,)``, from weights of shape ``(b, n)``."""
    drawn = weights[:, target.rows].astype(np.float64)
    if temperature == 0.0:
        return _weighted_hard_rate(target, offset, drawn)
    rates = np.zeros(len(drawn))
    for index, half in enumerate(_half_angles(target.scores, target.reference, offset, temperature, block)):
        of_block = drawn[:, index * block : (index + 1) * block]
        number = np.maximum(of_block.sum(axis=1), 1.0)
        rates += 0.5 * number + 0.5 * ((of_block @ half) * of_block).sum(axis=1) / number
    return np.asarray(rates / np.maximum(drawn.sum(axis=1), 1.0))


def _weighted_hard_rate(target: CrossPromptTarget, offset: float, drawn: FloatArray) -> FloatArray:
    order = np.argsort(target.reference)
    ordered = target.reference[order]
    moved = target.scores + offset
    left, right = np.searchsorted(ordered, moved, side="left"), np.searchsorted(ordered, moved, side="right")
    rates = np.empty(len(drawn))
    for index, weights in enumerate(drawn):
        cumulative = np.concatenate([[0.0], np.cumsum(weights[order])])
        won = weights @ (cumulative[left] + cumulative[right])
        rates[index] = 0.5 * won / max(cumulative[-1], 1.0) ** 2
    return rates
