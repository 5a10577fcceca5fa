"""Policy models through a board's dates."""

import datetime

import polars as pl
import pytest

from charm_core.elo import win_probability
from charm_core.rating_history import BoardSeries, DatedRatings, board_series, first_complete
from charm_core.rating_movement import RecalibrationRule
from charm_core.tables import RATINGS

BACKGROUND = {f"m{index}": 1000.5 + index for index in range(50)}
DAYS = [datetime.date(2025, 1, day) for day in (1, 8, 15, 22)]


def dated(
    day: datetime.date, ratings: dict[str, float], *, shift: float = 0.0, policy: tuple[str, ...] = ("a", "b")
) -> DatedRatings:
    everything = {name: rating + shift for name, rating in (BACKGROUND | ratings).items()}
    rows = [(name, rating, rating - 4, rating + 4, None) for name, rating in everything.items()]
    table = pl.DataFrame(rows, schema=dict(RATINGS.columns), orient="row")
    return DatedRatings(
        date=day, ratings=table, rated=table.filter(pl.col("policy_model").is_in(policy)).sort("policy_model")
    )


def series(*dates: DatedRatings) -> BoardSeries:
    return board_series("x", dates, RecalibrationRule())


def test_shifts_of_the_anchor_are_taken_out_up_to_the_last_date():
    ratings = {"a": 1100.5, "b": 1050.5}
    found = series(*(dated(day, ratings, shift=shift) for day, shift in zip(DAYS, (0, 60, 60, 40), strict=True)))
    assert [point.shift for point in found.points] == [None, pytest.approx(60), pytest.approx(0), pytest.approx(-20)]
    for point in found.points:
        assert {one.policy_model: one.rating.value for one in point.rated} == pytest.approx({"a": 1140.5, "b": 1090.5})
        assert point.rated[0].rating.low == pytest.approx(1136.5)
    assert [point.rated[0].published for point in found.points] == [1100.5, 1160.5, 1160.5, 1140.5]


def test_win_probabilities_and_their_intervals():
    (point,) = series(dated(DAYS[0], {"a": 1100.5, "b": 1050.5})).points
    (pair,) = point.pairs
    assert (pair.model_a, pair.model_b) == ("a", "b")
    assert pair.win_probability.value == pytest.approx(float(win_probability(1100.5, 1050.5)))
    low, high = pair.win_probability.low or 0, pair.win_probability.high or 0
    assert low < (pair.win_probability.value or 0) < high
    # both ends of both intervals at once would be too wide
    assert float(win_probability(1096.5, 1054.5)) < low
    assert high < float(win_probability(1104.5, 1046.5))


def test_a_model_that_is_missing_on_a_date_has_no_point_there():
    found = series(
        dated(DAYS[0], {"a": 1100.5, "b": 1050.5}),
        dated(DAYS[1], {"a": 1100.5}),
        dated(DAYS[2], {"a": 1100.5, "b": 1050.5}),
    )
    assert [len(point.rated) for point in found.points] == [2, 1, 2]
    assert [len(point.pairs) for point in found.points] == [1, 0, 1]
    assert [(point.added, point.dropped, point.due) for point in found.points[1:]] == [(0, 1, True), (1, 0, True)]
    assert "b no longer rated" in found.points[1].why
    assert first_complete(found) == 0


def test_the_first_complete_date():
    found = series(
        dated(DAYS[0], {"a": 1100.5}),
        dated(DAYS[1], {"a": 1100.5, "b": 1050.5}),
        dated(DAYS[2], {"a": 1100.5, "b": 1050.5}),
    )
    assert first_complete(found) == 1


def test_what_moved_is_said_of_each_step():
    found = series(dated(DAYS[0], {"a": 1100.5, "b": 1050.5}), dated(DAYS[1], {"a": 1180.5, "b": 1050.5}))
    assert found.points[1].moved == 1
    assert found.points[1].largest == pytest.approx(float(win_probability(130, 0) - win_probability(50, 0)))
    assert found.points[1].due is True


def test_a_board_without_intervals_has_points_without_intervals():
    bare = dated(DAYS[0], {"a": 1100.5, "b": 1050.5})
    none = [pl.lit(None, pl.Float64).alias(side) for side in ("rating_low", "rating_high")]
    (point,) = series(
        DatedRatings(date=bare.date, ratings=bare.ratings.with_columns(none), rated=bare.rated.with_columns(none))
    ).points
    assert point.rated[0].rating.low is None
    assert point.pairs[0].win_probability.low is None
