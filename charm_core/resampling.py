"""Bootstrap resamples, intervals and corrected p-values."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from charm_core.records import Estimate

FloatArray = NDArray[np.float64]

_BLOCK_CELLS = 4_000_000
"""Weights held at one time: 16 MB in single precision, whatever the number of replicates."""


def bootstrap_weights(items: int, replicates: int, rng: np.random.Generator) -> Iterator[NDArray[np.float32]]:
    """How often each item occurs in each bootstrap resample, in blocks of replicates.

    Args:
        items: Number of items n; each resample draws n with replacement.
        replicates: Number of resamples in all.
        rng: Source of randomness. The same seed gives the same resamples, which is how two reward models are paired.

    Yields:
        Shape ``(b, n)``; the block sizes b add up to ``replicates``.
    """
    block = max(1, min(replicates, _BLOCK_CELLS // items))
    for start in range(0, replicates, block):
        size = min(block, replicates - start)
        drawn = rng.integers(items, size=(size, items), dtype=np.int32)
        drawn += np.arange(size, dtype=np.int32)[:, None] * np.int32(items)
        yield np.bincount(drawn.ravel(), minlength=size * items).reshape(size, items).astype(np.float32)


def percentile_estimate(value: float, replicates: FloatArray, confidence: float) -> Estimate:
    """Point estimate with the percentile interval of its replicates; NaN replicates are left out."""
    low, high = _quantiles(replicates, confidence)
    return Estimate(value=_finite(value), low=_finite(low), high=_finite(high))


def reflected_estimate(value: float, replicates: FloatArray, confidence: float, floor: float | None = None) -> Estimate:
    """Point estimate with the reflected ("basic") bootstrap interval.

    For a mean of absolute values or a root mean square, sampling noise biases the estimate upwards and biases its
    replicates upwards once more; percentiles would add the two, reflection takes the second to estimate the first.

    Args:
        value: Point estimate.
        replicates: Shape ``(B,)``; NaN replicates are left out.
        confidence: Coverage.
        floor: Smallest possible value, if there is one.

    Returns:
        The interval is cut at ``floor`` and widened, where needed, to contain ``value``.
    """
    low, high = _quantiles(replicates, confidence)
    reflected_low, reflected_high = min(2 * value - high, value), max(2 * value - low, value)
    if floor is not None:
        reflected_low = max(reflected_low, floor)
    return Estimate(value=_finite(value), low=_finite(reflected_low), high=_finite(reflected_high))


def normal_p_values(values: FloatArray, replicates: FloatArray) -> FloatArray:
    """Two-sided p-values of "the true value is 0" from bootstrap standard errors.

    Counting replicates beyond 0 cannot go below 1/(B+1), which a correction for many models then lifts over any
    threshold; the normal tail has no such floor.

    Args:
        values: Shape ``(m,)``; NaN gives p = 1.
        replicates: Shape ``(B, m)``; NaN replicates are left out.

    Returns:
        Shape ``(m,)``.
    """
    centred = np.ma.masked_invalid(replicates)
    errors = centred.std(axis=0, ddof=1).filled(np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.where(values == 0.0, 0.0, np.abs(values) / errors)
    return np.asarray(np.where(np.isnan(z), 1.0, 2.0 * ndtr(-z)))


def holm_adjusted(p_values: FloatArray) -> FloatArray:
    """Holm's step-down adjustment: rejecting where the result is at most α keeps the family-wise error at α."""
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(p_values.size, 0, -1)
    adjusted = np.empty_like(p_values)
    adjusted[order] = np.minimum(np.maximum.accumulate(p_values[order] * factors), 1.0)
    return adjusted


def _quantiles(replicates: FloatArray, confidence: float) -> tuple[float, float]:
    finite = replicates[np.isfinite(replicates)]
    if finite.size == 0:
        return np.nan, np.nan
    low, high = np.quantile(finite, [(1.0 - confidence) / 2.0, (1.0 + confidence) / 2.0])
    return float(low), float(high)


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
