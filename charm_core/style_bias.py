"""Does a reward model pay for style? Correlation of its scores with length and with Markdown.

A bias can be traded for another one (arXiv 2605.27996), so both are shown before and after a calibration. The measure is
taken within prompts: score and style, each minus its mean over the responses to the same prompt, so that prompts whose
answers are long and good alike say nothing. Style enters as ``log(1 + count)``: characters for length; headers, bold
passages and list items outside of code blocks for Markdown. Intervals are a bootstrap over prompts, the same resamples for
two reward models that are compared.
"""

from dataclasses import dataclass

import numpy as np
import polars as pl
import scipy
from numpy.typing import NDArray
from pydantic import Field

from charm_core.errors import TableError
from charm_core.records import Estimate, Record
from charm_core.resampling import bootstrap_weights, percentile_estimate
from charm_core.style_control import style_counts
from charm_core.tables import RESPONSES, SCORES, validate

FloatArray = NDArray[np.float64]

STYLES = ("length", "markdown")

_ROUNDING = 1e-13


class StyleCorrelation(Record):
    """Correlation of score with one kind of style; None where a side does not vary."""

    overall: float | None = Field(description="Spearman over all responses, whatever their prompt.")
    within_prompt: Estimate = Field(description="Pearson of score and log(1 + style), each minus its prompt's mean.")


class StyleCorrelations(Record):
    """What style is worth to one reward model."""

    length: StyleCorrelation
    markdown: StyleCorrelation
    prompts: int
    responses: int


class StyleDifferences(Record):
    """Within-prompt correlations of one reward model minus those of another, on the same responses."""

    length: Estimate
    markdown: Estimate
    prompts: int
    responses: int


@dataclass(frozen=True, kw_only=True, eq=False)
class _Centred:
    """Scores and style of the same responses, each minus its prompt's mean, as sums per prompt."""

    score: FloatArray
    styles: FloatArray
    """Counts, shape ``(responses, styles)``."""
    products: FloatArray
    """Shape ``(prompts, styles, 3)``: sums of score × style, score² and style²."""


def style_correlations(
    scores: pl.DataFrame, responses: pl.DataFrame, *, replicates: int = 1000, seed: int = 0, confidence: float = 0.95
) -> StyleCorrelations:
    """Correlate scores with the length and the Markdown of responses.

    Args:
        scores: A SCORES frame.
        responses: A RESPONSES frame that holds every scored response.
        replicates: Bootstrap replicates.
        seed: Of the resampling.
        confidence: Coverage of the intervals.

    Raises:
        TableError: A bad table, or a score without a response.
    """
    cells = _cells(scores, responses, ["score"])
    centred = _centred(cells, "score")
    drawn = _replicates(centred, replicates, seed)
    points = _correlation(centred.products.sum(axis=0))
    found = {
        name: StyleCorrelation(
            overall=_spearman(centred.score, centred.styles[:, index]),
            within_prompt=percentile_estimate(float(points[index]), drawn[:, index], confidence),
        )
        for index, name in enumerate(STYLES)
    }
    return StyleCorrelations(**found, prompts=len(centred.products), responses=cells.height)


def compare_style_correlations(
    before: pl.DataFrame,
    after: pl.DataFrame,
    responses: pl.DataFrame,
    *,
    replicates: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> StyleDifferences:
    """By how much two reward models differ in what style is worth to them, after minus before.

    Args:
        before: A SCORES frame of one reward model.
        after: A SCORES frame of the other; only responses that both have scored are used.
        responses: A RESPONSES frame that holds every scored response.
        replicates: Bootstrap replicates, the same resamples for both.
        seed: Of the resampling.
        confidence: Coverage of the intervals.

    Raises:
        TableError: A bad table, a score without a response, or no response in common.
    """
    other = validate(after, SCORES).rename({"score": "other"})
    both = validate(before, SCORES).join(other, on=["prompt_id", "policy_model"])
    if both.is_empty():
        raise TableError("the two score tables have no response in common; score the same responses with both")
    cells = _cells(both, responses, ["score", "other"])
    sides = [_centred(cells, column) for column in ("score", "other")]
    points = [_correlation(side.products.sum(axis=0)) for side in sides]
    drawn = [_replicates(side, replicates, seed) for side in sides]
    values, differences = points[1] - points[0], drawn[1] - drawn[0]
    found = {
        name: percentile_estimate(float(values[index]), differences[:, index], confidence)
        for index, name in enumerate(STYLES)
    }
    return StyleDifferences(**found, prompts=len(sides[0].products), responses=cells.height)


def _cells(scores: pl.DataFrame, responses: pl.DataFrame, columns: list[str]) -> pl.DataFrame:
    """Columns prompt_id, those of the scores, length and markdown, by prompt and policy model."""
    scored = validate(scores, SCORES) if columns == ["score"] else scores
    cells = scored.join(validate(responses, RESPONSES), on=["prompt_id", "policy_model"])
    if cells.height < scored.height:
        raise TableError(
            f"{scored.height - cells.height} scores have no response in the responses table; "
            f"use the responses that were scored"
        )
    ordered = cells.sort("prompt_id", "policy_model")
    counts = style_counts(ordered.get_column("response"))
    markdown = counts.select(pl.sum_horizontal("headers", "bold", "lists").alias("markdown"))
    return pl.concat([ordered.select("prompt_id", *columns), counts.select("length"), markdown], how="horizontal")


def _centred(cells: pl.DataFrame, column: str) -> _Centred:
    def within(values: pl.Expr) -> pl.Expr:
        return values - values.mean().over("prompt_id")

    frame = cells.select(
        within(pl.col(column)).alias("score"), *(within(pl.col(name).log1p()).alias(name) for name in STYLES)
    )
    raw = cells.select(column, *(pl.col(name).log1p() for name in STYLES)).to_numpy()
    within_prompt = frame.to_numpy().copy()
    # centring leaves rounding errors where nothing varies
    within_prompt[np.abs(within_prompt) <= _ROUNDING * np.abs(raw).max(axis=0)] = 0.0
    score, styles = within_prompt[:, 0], within_prompt[:, 1:]
    products = np.stack(
        [score[:, None] * styles, np.broadcast_to(score[:, None] ** 2, styles.shape), styles**2], axis=2
    )
    prompts = cells.get_column("prompt_id").rank("dense").to_numpy() - 1
    sums = np.zeros((int(prompts.max()) + 1, len(STYLES), 3))
    np.add.at(sums, prompts, products)
    return _Centred(score=cells.get_column(column).to_numpy(), styles=cells.select(STYLES).to_numpy(), products=sums)


def _replicates(centred: _Centred, replicates: int, seed: int) -> FloatArray:
    """Shape ``(replicates, styles)``."""
    blocks = bootstrap_weights(len(centred.products), replicates, np.random.default_rng(seed))
    return np.concatenate(
        [_correlation(np.tensordot(weights.astype(np.float64), centred.products, axes=1)) for weights in blocks]
    )


def _correlation(sums: FloatArray) -> FloatArray:
    """From sums of products, squares and squares along the last axis; NaN where a side does not vary."""
    scale = np.sqrt(sums[..., 1] * sums[..., 2])
    return np.asarray(np.where(scale > 0.0, sums[..., 0], np.nan) / np.where(scale > 0.0, scale, 1.0))


def _spearman(first: FloatArray, second: FloatArray) -> float | None:
    one, other = (scipy.stats.rankdata(side) - (len(side) + 1) / 2 for side in (first, second))
    scale = float(np.sqrt((one**2).sum() * (other**2).sum()))
    return float(one @ other) / scale if scale > 0.0 else None
