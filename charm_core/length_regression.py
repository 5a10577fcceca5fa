"""Length regression: take out of each score what a reward model gives for the length alone. A post-hoc correction without ratings.

Source: post-hoc reward calibration by locally weighted regression (Huang et al. 2024). The smooth curve of score over
log length is fitted on calibration responses, with tricube weights and robustness iterations (Cleveland's LOWESS), and
subtracted everywhere. It corrects a length bias and no other: an offset that is not a matter of length stays.
"""

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from charm_core.errors import TableError
from charm_core.tables import RESPONSES, SCORES, validate

FloatArray = NDArray[np.float64]

_GRID = 64
_ITERATIONS = 12
"""Of levels and curve in turn; what is left of an error shrinks by the number of responses per prompt each time."""
_ROBUST_ITERATIONS = 2


@dataclass(frozen=True, kw_only=True)
class LengthCurve:
    """What a reward model gives for length: a piecewise linear curve, constant beyond its ends."""

    log_length: FloatArray
    score: FloatArray

    def at(self, log_length: FloatArray) -> FloatArray:
        """The curve's value at each log length."""
        return np.interp(log_length, self.log_length, self.score)


def fit_length_curve(scores: pl.DataFrame, responses: pl.DataFrame, *, span: float = 0.5) -> LengthCurve:
    """Fit the curve of score over log(1 + characters).

    Each prompt has a level of its own, fitted in turn with the curve, because a hard prompt has other lengths and other
    scores: only what length does within a prompt is taken out.

    Args:
        scores: SCORES.
        responses: RESPONSES that hold every scored response.
        span: Share of the responses that each local fit looks at, in (0, 1].

    Raises:
        TableError: A score without its response, or responses that all have one length.
    """
    table = _with_lengths(scores, responses)
    x, score = table.get_column("log_length").to_numpy(), table.get_column("score").to_numpy()
    prompt = table.get_column("prompt_id").rank("dense").to_numpy().astype(np.int64) - 1
    grid = np.unique(np.quantile(x, np.linspace(0.0, 1.0, _GRID)))
    if grid.size < 2:
        raise TableError(
            "all responses have the same length, so nothing can be said about length; leave this correction out"
        )
    curve, weights = np.zeros(grid.size), np.ones(x.size)
    for iteration in range(_ITERATIONS):
        rest = score - np.interp(x, grid, curve)
        level = np.bincount(prompt, rest) / np.bincount(prompt)
        if iteration >= _ITERATIONS - _ROBUST_ITERATIONS:
            weights = _bisquare(rest - level[prompt])
        curve = _local_fits(grid, x, score - level[prompt], weights, span)
    return LengthCurve(log_length=grid, score=curve - float(curve.mean()))


def without_length(scores: pl.DataFrame, responses: pl.DataFrame, curve: LengthCurve) -> pl.DataFrame:
    """SCORES minus the curve's value at each response's length.

    Raises:
        TableError: A score without its response.
    """
    table = _with_lengths(scores, responses)
    taken = pl.Series(curve.at(table.get_column("log_length").to_numpy()))
    return validate(table.select("prompt_id", "policy_model", pl.col("score") - taken), SCORES)


def _with_lengths(scores: pl.DataFrame, responses: pl.DataFrame) -> pl.DataFrame:
    lengths = validate(responses, RESPONSES).select(
        "prompt_id", "policy_model", log_length=pl.col("response").str.len_chars().cast(pl.Float64).log1p()
    )
    table = validate(scores, SCORES).join(lengths, on=["prompt_id", "policy_model"], how="left", maintain_order="left")
    missing = table.filter(pl.col("log_length").is_null())
    if not missing.is_empty():
        raise TableError(
            f"{missing.height} scores have no response, first {missing.row(0, named=True)}; give the responses that were scored"
        )
    return table


def _bisquare(residual: FloatArray) -> FloatArray:
    """Weights that leave outliers out; 1 everywhere where most residuals are 0."""
    scale = 6.0 * float(np.median(np.abs(residual)))
    if scale == 0.0:
        return np.ones(residual.size)
    return np.square(1.0 - np.square(np.minimum(np.abs(residual) / scale, 1.0)))


def _local_fits(grid: FloatArray, x: FloatArray, y: FloatArray, weights: FloatArray, span: float) -> FloatArray:
    """At each grid point the value of a straight line, fitted with tricube weights to the nearest share of points."""
    nearest = max(2, int(np.ceil(span * x.size)))
    values = np.empty(grid.size)
    for index, centre in enumerate(grid):
        distance = np.abs(x - centre)
        reach = max(float(np.partition(distance, nearest - 1)[nearest - 1]), 1e-12)
        local = weights * np.power(1.0 - np.power(np.minimum(distance / reach, 1.0), 3), 3)
        values[index] = _line_at(centre, x, y, local)
    return values


def _line_at(centre: float, x: FloatArray, y: FloatArray, weights: FloatArray) -> float:
    total = float(weights.sum())
    if total <= 0.0:
        return float(np.average(y))
    mean_x, mean_y = float(weights @ x) / total, float(weights @ y) / total
    spread = float(weights @ np.square(x - mean_x))
    slope = float(weights @ ((x - mean_x) * (y - mean_y))) / spread if spread > 1e-12 * total else 0.0
    return mean_y + slope * (centre - mean_x)
