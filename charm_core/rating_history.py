"""Ratings of policy models through the dates of one board, and what moved from each date to the next.

Ratings are put on the scale of the last date: the common shifts of the anchor (``rating_movement``) are added up backwards.
Win probabilities need no such thing. A model without a rating on some date has no point there, and nothing is filled in.
"""

import datetime
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from pydantic import Field

from charm_core.elo import ELO_POINTS_PER_LOGIT, win_probability
from charm_core.leaderboards import DateKind
from charm_core.rating_movement import (
    RecalibrationRule,
    board_movement,
    known_standard_errors,
    pair_movement,
)
from charm_core.records import Estimate, Record

_INTERVAL_Z = 1.959963984540054


class ModelPoint(Record):
    """One policy model on one date."""

    policy_model: str
    published: float = Field(description="Rating as published, Elo points.")
    rating: Estimate = Field(description="On the scale of the last date, with the published interval.")


class PairPoint(Record):
    """One pair of policy models on one date."""

    model_a: str
    model_b: str
    win_probability: Estimate


class DatePoint(Record):
    """One date of a board, and what is new against the date before."""

    date: datetime.date
    snapshot: str = Field("", description="Digest of the snapshot.")
    models: int = Field(description="Models on the board.")
    rated: tuple[ModelPoint, ...]
    pairs: tuple[PairPoint, ...]
    shift: float | None = Field(None, description="Anchor's shift since the date before; None on the first date.")
    added: int = 0
    dropped: int = 0
    moved: int = Field(0, description="Models that moved beyond chance.")
    largest: float | None = Field(None, description="Largest |change| of a win probability since the date before.")
    mean: float | None = None
    mean_by_chance: float | None = None
    due: bool | None = None
    why: str = ""


class BoardSeries(Record):
    """One board through time."""

    board: str
    date_kind: DateKind = Field("stated", description="What kind of dates they are.")
    points: tuple[DatePoint, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class DatedRatings:
    """One date to be put into a series."""

    date: datetime.date
    ratings: pl.DataFrame
    """The whole board, a RATINGS frame: it tells how the anchor shifted."""
    rated: pl.DataFrame
    """The policy models under their own names, as far as they are on it."""
    snapshot: str = ""


def board_series(
    board: str, dates: Sequence[DatedRatings], rule: RecalibrationRule, *, date_kind: DateKind = "stated"
) -> BoardSeries:
    """Trace policy models through a board's dates.

    Args:
        board: What it is called.
        dates: In order.
        rule: What counts as moved.
        date_kind: What kind of dates they are.

    Raises:
        RatingsError: Two dates that follow each other have no model in common.
    """
    movements = [
        board_movement(before.ratings, after.ratings, significance=rule.significance)
        for before, after in itertools.pairwise(dates)
    ]
    shifts = np.asarray([movement.shift for movement in movements])
    # what is still to come until the last date
    ahead = np.concatenate([np.cumsum(shifts[::-1])[::-1], [0.0]])
    points = [_point(date, float(offset)) for date, offset in zip(dates, ahead, strict=True)]
    for index, movement in enumerate(movements, start=1):
        pairs = pair_movement(dates[index - 1].rated, dates[index].rated, rule)
        points[index] = points[index].model_copy(
            update={
                "shift": movement.shift,
                "added": len(movement.added),
                "dropped": len(movement.dropped),
                "moved": len(movement.moved),
                "largest": pairs.largest,
                "mean": pairs.mean,
                "mean_by_chance": pairs.mean_by_chance,
                "due": pairs.due,
                "why": pairs.why,
            }
        )
    return BoardSeries(board=board, date_kind=date_kind, points=tuple(points))


def first_complete(series: BoardSeries) -> int:
    """Index of the first date that has every policy model which the last date has."""
    wanted = {one.policy_model for one in series.points[-1].rated}
    complete = (
        index for index, point in enumerate(series.points) if wanted <= {one.policy_model for one in point.rated}
    )
    return next(complete)


def _point(dated: DatedRatings, offset: float) -> DatePoint:
    rated = dated.rated
    names, values = rated.get_column("policy_model").to_list(), rated.get_column("rating").to_numpy()
    first, second = np.triu_indices(len(names), 1)
    chances = win_probability(values[first], values[second])
    errors = known_standard_errors(rated)
    slope = chances * (1.0 - chances) / ELO_POINTS_PER_LOGIT
    half = _INTERVAL_Z * slope * np.sqrt(errors[first] ** 2 + errors[second] ** 2)
    return DatePoint(
        date=dated.date,
        snapshot=dated.snapshot,
        models=dated.ratings.height,
        rated=tuple(
            ModelPoint(
                policy_model=row["policy_model"],
                published=row["rating"],
                rating=Estimate(
                    value=row["rating"] + offset,
                    low=None if row["rating_low"] is None else row["rating_low"] + offset,
                    high=None if row["rating_high"] is None else row["rating_high"] + offset,
                ),
            )
            for row in rated.iter_rows(named=True)
        ),
        pairs=tuple(
            PairPoint(
                model_a=names[first[index]],
                model_b=names[second[index]],
                win_probability=_estimate(float(chances[index]), float(half[index])),
            )
            for index in range(first.size)
        ),
    )


def _estimate(value: float, half: float) -> Estimate:
    if np.isnan(half):
        return Estimate(value=value)
    return Estimate(value=value, low=max(0.0, value - half), high=min(1.0, value + half))
