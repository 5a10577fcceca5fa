"""Are a reward model's probabilities true? Expected calibration error, Brier score and reliability bins of pairs.

A Bradley-Terry reward model says that response j beats k with probability sigmoid((s_j - s_k) / score_temperature). Which of
the two is called first is arbitrary, so a pair is turned to the side that the reward model favours: its probability is then
in [0.5, 1], its outcome 1 if that side is the right one. Where both scores are equal the probability is 0.5 and the outcome
half a win, whichever side is named first.

Reward models differ in the scale of their scores, and training on its own labels inflates it; ``fit_score_temperature``
takes that out, so that what is left is the shape. Source: Guo et al., arXiv 1706.04599 (calibration error over bins of equal
width, temperature scaling).
"""

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray
from pydantic import Field
from scipy.special import expit

from charm_core.errors import TableError
from charm_core.records import Estimate, Record
from charm_core.resampling import bootstrap_weights, percentile_estimate, reflected_estimate

FloatArray = NDArray[np.float64]


class ReliabilityBin(Record):
    """Pairs of about the same probability."""

    low: float
    high: float = Field(description="The bin is [low, high), the last one includes 1.")
    pairs: int
    mean_probability: float | None = Field(description="Of the favoured side; None in an empty bin.")
    win_rate: float | None = Field(description="How often the favoured side is the right one; None in an empty bin.")


class ProbabilityCalibration(Record):
    """How far probabilities are from what happens."""

    pairs: int
    expected_calibration_error: Estimate = Field(description="Mean |probability - win rate| over bins, by pairs.")
    brier: Estimate = Field(description="Mean squared error of the probability; 0.25 is that of always saying 0.5.")
    mean_probability: float = Field(description="Of the favoured side; above the win rate: overconfident.")
    win_rate: float = Field(description="How often the favoured side is the right one, equal scores half.")
    bins: tuple[ReliabilityBin, ...]


def pair_probabilities(margins: ArrayLike, score_temperature: float = 1.0) -> FloatArray:
    """Probability of the first response, sigmoid(margin / score_temperature).

    Args:
        margins: Score of the first response minus that of the second.
        score_temperature: In the unit of the scores, above 0.

    Raises:
        TableError: Margins that are NaN or infinite, or a temperature that is not positive.
    """
    values = _finite(margins, "margins")
    if not (np.isfinite(score_temperature) and score_temperature > 0.0):
        raise TableError(f"the score temperature must be a positive number, not {score_temperature}")
    return np.asarray(expit(values / score_temperature))


def fit_score_temperature(margins: ArrayLike, outcomes: ArrayLike | None = None) -> float | None:
    """The temperature under which what happened is most likely.

    Args:
        margins: Score of the first response minus that of the second.
        outcomes: 1 where the first is right, 0 where the second is; all 1 if None.

    Returns:
        None where no temperature is best: the scores are no better than chance, always right, or all equal.

    Raises:
        TableError: Not one outcome per margin, or values that cannot be used.
    """
    values = _finite(margins, "margins")
    happened = _outcomes(outcomes, values.size)
    spread = float(np.sqrt(np.mean(values**2)))
    if spread == 0.0:
        return None
    scaled = values / spread

    def slope(steepness: float) -> float:
        """Of the mean surprise; it rises with the steepness, so there is at most one best."""
        return float(np.mean((expit(steepness * scaled) - happened) * scaled))

    at_infinity = float(np.mean(((scaled > 0.0) - happened) * scaled))
    if slope(0.0) >= 0.0 or at_infinity <= 0.0:
        return None
    steep = 1.0
    while slope(steep) <= 0.0:
        steep *= 2.0
    return spread / float(scipy.optimize.brentq(slope, 0.0, steep))


def probability_calibration(
    probabilities: ArrayLike,
    outcomes: ArrayLike | None = None,
    *,
    units: ArrayLike | None = None,
    bins: int = 10,
    replicates: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> ProbabilityCalibration:
    """Hold probabilities against what happened.

    Args:
        probabilities: Shape ``(n,)``, of the first response of each pair.
        outcomes: Shape ``(n,)``, in [0, 1]: 1 where the first is right, 0.5 for a draw; all 1 if None, as where the right
            response is named first.
        units: Shape ``(n,)``: pairs of one unit (an item, a prompt) are drawn together by the bootstrap; each on its own
            if None.
        bins: Number of bins of equal width over [0.5, 1].
        replicates: Bootstrap replicates.
        seed: Of the resampling.
        confidence: Coverage of the intervals.

    Returns:
        The interval of the calibration error is the reflected one, because chance raises a mean of absolute values.

    Raises:
        TableError: No pairs, different lengths, or values outside of [0, 1].
    """
    given = _finite(probabilities, "probabilities")
    happened = _outcomes(outcomes, given.size)
    if ((given < 0.0) | (given > 1.0)).any():
        raise TableError(f"probabilities must be in [0, 1], not {given.min()} to {given.max()}; use pair_probabilities")
    favoured, right = _favoured(given, happened)
    places = np.searchsorted(_edges(bins)[1:-1], favoured, side="right")
    sums = _sums_per_unit(_unit_numbers(units, given.size), places, favoured, right, (given - happened) ** 2, bins)
    errors, squares = [], []
    for weights in bootstrap_weights(len(sums), replicates, np.random.default_rng(seed)):
        drawn = np.tensordot(weights.astype(np.float64), sums, axes=1)
        errors.append(_calibration_error(drawn))
        squares.append(_brier(drawn))
    whole = sums.sum(axis=0)
    return ProbabilityCalibration(
        pairs=given.size,
        expected_calibration_error=reflected_estimate(
            float(_calibration_error(whole)), np.concatenate(errors), confidence, floor=0.0
        ),
        brier=percentile_estimate(float(_brier(whole)), np.concatenate(squares), confidence),
        mean_probability=float(favoured.mean()),
        win_rate=float(right.mean()),
        bins=_reliability_bins(whole, bins),
    )


def _favoured(probabilities: FloatArray, outcomes: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Probability and outcome of the side that the reward model favours."""
    turned = probabilities < 0.5
    favoured = np.where(turned, 1.0 - probabilities, probabilities)
    right = np.where(turned, 1.0 - outcomes, outcomes)
    return favoured, np.where(probabilities == 0.5, 0.5, right)


def _sums_per_unit(
    units: NDArray[np.intp],
    places: NDArray[np.intp],
    favoured: FloatArray,
    right: FloatArray,
    squared: FloatArray,
    bins: int,
) -> FloatArray:
    """Shape ``(units, bins, 4)``: number of pairs, their probabilities, outcomes and squared errors."""
    sums = np.zeros((int(units.max()) + 1, bins, 4))
    np.add.at(sums, (units, places), np.stack([np.ones_like(favoured), favoured, right, squared], axis=1))
    return sums


def _calibration_error(sums: FloatArray) -> FloatArray:
    """Over the last two axes, bins and sums."""
    return np.asarray(np.abs(sums[..., 1] - sums[..., 2]).sum(axis=-1) / sums[..., 0].sum(axis=-1))


def _brier(sums: FloatArray) -> FloatArray:
    return np.asarray(sums[..., 3].sum(axis=-1) / sums[..., 0].sum(axis=-1))


def _reliability_bins(sums: FloatArray, bins: int) -> tuple[ReliabilityBin, ...]:
    edges = _edges(bins)
    return tuple(
        ReliabilityBin(
            low=float(low),
            high=float(high),
            pairs=int(pairs),
            mean_probability=float(probability / pairs) if pairs else None,
            win_rate=float(wins / pairs) if pairs else None,
        )
        for low, high, (pairs, probability, wins, _) in zip(edges[:-1], edges[1:], sums, strict=True)
    )


def _edges(bins: int) -> FloatArray:
    return np.linspace(0.5, 1.0, bins + 1)


def _finite(values: ArrayLike, what: str) -> FloatArray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise TableError(f"{what} must be a list of numbers with at least one, not of shape {array.shape}")
    if not np.isfinite(array).all():
        raise TableError(
            f"{int((~np.isfinite(array)).sum())} of {array.size} {what} are NaN or infinite; leave them out"
        )
    return array


def _outcomes(outcomes: ArrayLike | None, size: int) -> FloatArray:
    if outcomes is None:
        return np.ones(size)
    array = _finite(outcomes, "outcomes")
    if array.size != size or (array < 0.0).any() or (array > 1.0).any():
        raise TableError(
            f"needs {size} outcomes in [0, 1], one per pair, not {array.size} from {array.min()} to {array.max()}"
        )
    return array


def _unit_numbers(units: ArrayLike | None, size: int) -> NDArray[np.intp]:
    if units is None:
        return np.arange(size)
    names, numbers = np.unique(np.asarray(units), return_inverse=True)
    if numbers.shape != (size,):
        raise TableError(f"needs {size} units, one per pair, not {numbers.shape} ({names.size} different ones)")
    return np.asarray(numbers)
