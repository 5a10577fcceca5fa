"""What moved between two snapshots: the anchor's shift taken out, chance told from movement."""

import numpy as np
import polars as pl
import pytest
from scipy.stats import norm

from charm_core.elo import win_probability
from charm_core.errors import RatingsError
from charm_core.rating_movement import (
    PairMovement,
    RecalibrationRule,
    across_boards,
    board_movement,
    known_standard_errors,
    pair_movement,
    weighted_median,
)
from charm_core.tables import RATINGS

Z = 1.959963984540054


def board(ratings: dict[str, float], error: float | None = 2.0, *, seed: int | None = None) -> pl.DataFrame:
    """A board whose intervals come from one standard error; with a seed, drawn with that error."""
    noise = np.zeros(len(ratings)) if seed is None else np.random.default_rng(seed).normal(0, error or 0, len(ratings))
    rows = [
        (name, rating + noise[i], *((None, None) if error is None else (rating + noise[i] - Z * error, rating + noise[i] + Z * error)), 10)
        for i, (name, rating) in enumerate(ratings.items())
    ]  # fmt: skip
    return pl.DataFrame(rows, schema=dict(RATINGS.columns), orient="row")


MANY = {f"m{index:03d}": 1000.25 + index for index in range(200)}


class TestBoards:
    def test_added_and_dropped_models_are_named(self):
        movement = board_movement(board({"a": 1.5, "b": 2.5, "c": 3.5}), board({"b": 2.5, "c": 3.5, "d": 4.5}))
        assert (movement.added, movement.dropped) == (("d",), ("a",))

    def test_a_common_shift_is_no_movement(self):
        movement = board_movement(board(MANY), board({name: rating + 60 for name, rating in MANY.items()}))
        assert movement.shift == pytest.approx(60)
        assert not movement.moved
        assert max(abs(change.change.value or 0) for change in movement.changes) < 1e-9

    def test_models_that_moved_do_not_bend_the_shift(self):
        after = {name: rating + 60 + (100 if name < "m030" else 0) for name, rating in MANY.items()}
        movement = board_movement(board(MANY), board(after))
        assert movement.shift == pytest.approx(60)
        assert {change.policy_model for change in movement.moved} == {name for name in MANY if name < "m030"}
        assert movement.changes[0].change.value == pytest.approx(100)

    def test_the_joint_interval_is_that_of_two_independent_ratings(self):
        after = MANY | {"m000": MANY["m000"] + 8}
        change = board_movement(board(MANY, 2.0), board(after, 1.5)).changes[0]
        half = Z * np.hypot(2.0, 1.5)
        assert (change.change.low, change.change.high) == pytest.approx((8 - half, 8 + half))
        p = 2 * norm.sf(8 / np.hypot(2.0, 1.5))
        assert change.p_value_holm == pytest.approx(min(1, 200 * p))
        assert (change.beyond_interval, change.moved) == (True, False)  # one of 200 is expected to be this far off

    def test_by_chance_alone_hardly_anything_moves(self):
        flagged = beyond = 0
        for seed in range(30):
            movement = board_movement(board(MANY, seed=seed), board(MANY, seed=1000 + seed))
            flagged += bool(movement.moved)
            beyond += sum(change.beyond_interval for change in movement.changes)
        assert beyond / (30 * len(MANY)) == pytest.approx(0.05, abs=0.015)
        assert flagged <= 5  # 5 % of 30 boards, and some luck

    def test_where_there_are_no_intervals_nothing_is_said_to_move(self):
        movement = board_movement(board(MANY, None), board(MANY | {"m000": 2000.25}, None))
        assert not movement.moved
        assert movement.changes[0].change.value == pytest.approx(999.99, abs=0.1)
        assert movement.changes[0].p_value_holm is None
        assert movement.changes[0].change.low is None

    def test_the_model_that_the_board_is_anchored_to_is_not_judged(self):
        anchored = pl.col("policy_model") == "m100"
        fixed = [
            pl.when(anchored).then(pl.col("rating")).otherwise(pl.col(side)).alias(side)
            for side in ("rating_low", "rating_high")
        ]
        after = {name: rating + (0 if name == "m100" else 3) for name, rating in MANY.items()}
        movement = board_movement(board(MANY).with_columns(fixed), board(after).with_columns(fixed))
        assert movement.shift == pytest.approx(3)
        (anchor,) = [change for change in movement.changes if change.policy_model == "m100"]
        assert (anchor.p_value_holm, anchor.moved) == (None, False)

    def test_whole_numbers_carry_their_rounding(self):
        rounded = board({"a": 1000.0, "b": 1010.0}, 1.0)
        assert known_standard_errors(rounded) == pytest.approx(np.sqrt([1 + 1 / 12, 1 + 1 / 12]))
        assert known_standard_errors(board({"a": 1000.5}, 1.0)) == pytest.approx([1.0])
        assert np.isnan(known_standard_errors(board({"a": 1000.5}, None))).all()

    def test_boards_without_a_common_model_are_not_one_board(self):
        with pytest.raises(RatingsError, match=r"no model in common"):
            board_movement(board({"a": 1.5}), board({"b": 1.5}))


class TestPairs:
    def test_a_shift_of_the_anchor_changes_no_win_probability(self):
        ratings = {"a": 1250.5, "b": 1200.5, "c": 1180.5}
        movement = pair_movement(board(ratings), board({k: v + 60 for k, v in ratings.items()}), RecalibrationRule())
        assert movement.largest == pytest.approx(0, abs=1e-12)
        assert (movement.due, len(movement.pairs)) == (False, 3)
        assert "none of 3 win probabilities moved" in movement.why

    def test_the_interval_is_that_of_a_simulation(self):
        before, after = {"a": 1250.25, "b": 1180.25}, {"a": 1240.25, "b": 1190.25}
        (pair,) = pair_movement(board(before, 4.0), board(after, 3.0), RecalibrationRule()).pairs
        rng = np.random.default_rng(0)
        then = win_probability(1250.25 + 4 * rng.normal(size=200_000), 1180.25 + 4 * rng.normal(size=200_000))
        now = win_probability(1240.25 + 3 * rng.normal(size=200_000), 1190.25 + 3 * rng.normal(size=200_000))
        low, high = np.quantile(now - then, [0.025, 0.975])
        assert (pair.change.low, pair.change.high) == pytest.approx((low, high), abs=3e-4)
        assert pair.change.value == pytest.approx(pair.after - pair.before)

    def test_a_model_that_moved_makes_a_recalibration_due_and_is_named(self):
        ratings = {"a": 1250.5, "b": 1200.5, "c": 1180.5}
        movement = pair_movement(board(ratings), board(ratings | {"c": 1230.5}), RecalibrationRule())
        assert movement.due is True
        assert {(pair.model_a, pair.model_b) for pair in movement.moved} == {("a", "c"), ("b", "c")}
        assert "2 of 3 win probabilities moved" in movement.why
        assert "b over c: 52.9 % to 45.7 %" in movement.why

    def test_a_change_that_is_certain_but_small_can_be_let_pass(self):
        ratings = {"a": 1250.5, "b": 1200.5}
        after = ratings | {"b": 1203.5}
        assert pair_movement(board(ratings, 0.1), board(after, 0.1), RecalibrationRule()).due is True
        rule = RecalibrationRule(smallest_change=0.01)
        movement = pair_movement(board(ratings, 0.1), board(after, 0.1), rule)
        assert movement.due is False
        assert "by more than 0.01" in movement.why

    def test_by_chance_alone_a_recalibration_is_rarely_due(self):
        ratings = {f"p{index}": 1200.25 + 10 * index for index in range(7)}
        due, means, expected = 0, [], []
        for seed in range(200):
            movement = pair_movement(
                board(ratings, 3.0, seed=seed), board(ratings, 3.0, seed=5000 + seed), RecalibrationRule()
            )
            due += bool(movement.due)
            means.append(movement.mean)
            expected.append(movement.mean_by_chance)
        assert due <= 20  # Holm keeps it below 5 % of 200; twice that would be a fault
        assert np.mean(means) == pytest.approx(np.mean(expected), rel=0.05)

    @pytest.mark.parametrize(
        ("before", "after", "due", "why"),
        [
            ({"a": 1.5, "b": 2.5}, {"a": 1.5, "b": 2.5, "c": 3.5}, True, r"c now rated"),
            ({"a": 1.5, "b": 2.5, "c": 3.5}, {"a": 1.5, "b": 2.5}, True, r"c no longer rated"),
            ({"a": 1.5}, {"a": 1.5}, None, r"fewer than two"),
            ({}, {}, None, r"fewer than two"),
        ],
    )
    def test_models_that_come_and_go(self, before, after, due, why):
        movement = pair_movement(board(before), board(after), RecalibrationRule())
        assert movement.due is due
        assert why in movement.why

    def test_without_intervals_it_cannot_be_judged(self):
        ratings = {"a": 1250.5, "b": 1200.5}
        movement = pair_movement(board(ratings, None), board(ratings | {"b": 1250.5}, None), RecalibrationRule())
        assert (movement.due, movement.mean_by_chance) == (None, None)
        assert movement.largest == pytest.approx(0.0715, abs=1e-3)
        assert "no intervals" in movement.why


def verdict(due: bool | None, largest: float = 0.01) -> PairMovement:
    ratings = {"a": 1250.5, "b": 1200.5}
    found = pair_movement(board(ratings), board(ratings), RecalibrationRule())
    return found.model_copy(update={"due": due, "largest": largest, "why": f"because {due}"})


def test_several_boards_give_one_decision():
    assert across_boards([("x", verdict(False)), ("y", verdict(True))]) == (True, "on y: because True")
    due, why = across_boards([("x", verdict(False, 0.02)), ("y", verdict(None)), ("z", verdict(False, 0.03))])
    assert due is False
    assert "on 2 of 3 boards (the others give no intervals)" in why
    assert why.endswith("(a over b, z)")
    assert across_boards([("x", verdict(None))]) == (None, "on x: because None")


@pytest.mark.parametrize(
    ("values", "weights", "expected"),
    [
        ([1.0, 2.0, 9.0], [1.0, 1.0, 1.0], 2.0),
        ([1.0, 2.0], [1.0, 1.0], 1.5),
        ([1.0, 2.0, 9.0], [1.0, 1.0, 5.0], 9.0),
        ([9.0, 1.0, 2.0], [np.nan, 1.0, 1.0], 1.5),
        ([9.0, 1.0, 2.0], [np.nan, np.nan, np.nan], 2.0),
    ],
)
def test_weighted_medians(values, weights, expected):
    assert weighted_median(np.array(values), np.array(weights)) == expected
