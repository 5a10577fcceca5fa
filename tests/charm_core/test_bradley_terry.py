import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from evalica import Winner, bradley_terry
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from charm_core.bradley_terry import (
    BattleCounts,
    bootstrap_ratings,
    counts_from_battles,
    fit_bradley_terry,
    ratings_from_battles,
    solve_strengths,
)
from charm_core.elo import ELO_POINTS_PER_LOGIT, win_probability
from charm_core.errors import ConfigError, GraphError, TableError
from charm_core.tables import RATINGS, validate

GOLDEN = Path(__file__).parent / "golden"


def _battles(*rows: tuple[str, str, str]) -> pl.DataFrame:
    frame = pl.DataFrame(rows, schema={"model_a": pl.String, "model_b": pl.String, "winner": pl.String}, orient="row")
    return frame.with_row_index("battle_id").with_columns(pl.col("battle_id").cast(pl.Int64))


def _drawn_battles(strengths: np.ndarray, number: int, seed: int, tie_rate: float = 0.2) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    first = rng.integers(strengths.size, size=number)
    second = (first + rng.integers(1, strengths.size, size=number)) % strengths.size
    won = rng.random(number) < 1 / (1 + np.exp(strengths[second] - strengths[first]))
    winner = np.where(rng.random(number) < tie_rate, "tie", np.where(won, "model_a", "model_b"))
    names = np.array([f"m{index}" for index in range(strengths.size)])
    return _battles(*zip(names[first].tolist(), names[second].tolist(), winner.tolist(), strict=True))


def _counts(points: np.ndarray) -> BattleCounts:
    names = tuple(f"m{index}" for index in range(len(points)))
    return BattleCounts(policy_models=names, wins=points.astype(float), ties=np.zeros_like(points, dtype=float))


def test_counts_hold_every_outcome() -> None:
    counts = counts_from_battles(
        _battles(
            ("a", "b", "model_a"),
            ("b", "a", "model_b"),
            ("b", "a", "model_a"),
            ("a", "b", "tie"),
            ("b", "a", "tie (bothbad)"),
        )
    )
    np.testing.assert_array_equal(counts.wins, [[0, 2], [1, 0]])
    np.testing.assert_array_equal(counts.ties, [[0, 2], [2, 0]])
    np.testing.assert_array_equal(counts.points, [[0, 3], [2, 0]])


def test_two_models_worked_example() -> None:
    # 3 of 4 is an odds ratio of 3: 400 log10 3 = 190.85 Elo points; the sandwich of a binomial is 1/sqrt(n p q)
    fit = fit_bradley_terry(_counts(np.array([[0, 3], [1, 0]])), anchor_model="m1", anchor=1000)
    assert fit.ratings == pytest.approx((1000 + 400 * np.log10(3), 1000))
    assert fit.standard_errors == pytest.approx((ELO_POINTS_PER_LOGIT / np.sqrt(4 * 0.75 * 0.25), 0.0), abs=1e-6)
    assert (fit.battles, fit.votes) == (4, (4, 4))


def test_the_fit_is_the_high_precision_optimum() -> None:
    counts = counts_from_battles(_drawn_battles(np.linspace(-1, 1, 12), 3000, seed=0))
    points = counts.points

    def negative(free: np.ndarray) -> float:
        strengths = np.append(free, -free.sum())
        return float((points * np.logaddexp(0, strengths[None, :] - strengths[:, None])).sum())

    best = minimize(negative, np.zeros(11), method="BFGS", options={"gtol": 1e-7}).x
    strengths = solve_strengths(points[None])[0]
    np.testing.assert_allclose(strengths[:-1], best, atol=1e-7)
    # at the optimum every model's expected points equal its points, to rounding error
    expected = (points + points.T) * win_probability(
        ELO_POINTS_PER_LOGIT * strengths[:, None], ELO_POINTS_PER_LOGIT * strengths[None, :]
    )
    np.testing.assert_allclose(expected.sum(axis=1), points.sum(axis=1), rtol=1e-12)


def test_the_fit_agrees_with_evalica() -> None:
    battles = _drawn_battles(np.linspace(-1, 1, 8), 4000, seed=1)
    winners = {"model_a": Winner.X, "model_b": Winner.Y, "tie": Winner.Draw}
    peer = bradley_terry(
        battles["model_a"].to_list(),
        battles["model_b"].to_list(),
        [winners[winner] for winner in battles["winner"]],
        tolerance=1e-12,
        limit=100_000,
    ).scores
    fit = fit_bradley_terry(counts_from_battles(battles), anchor=0.0)
    theirs = ELO_POINTS_PER_LOGIT * np.log(np.array([peer[name] for name in fit.policy_models]))
    np.testing.assert_allclose(fit.ratings, theirs - theirs.mean(), atol=1e-4)


def test_golden_counts() -> None:
    golden = json.loads((GOLDEN / "bradley_terry.json").read_text())
    counts = BattleCounts(
        policy_models=tuple(golden["policy_models"]), wins=np.array(golden["wins"]), ties=np.array(golden["ties"])
    )
    fit = fit_bradley_terry(counts)
    assert fit.ratings == pytest.approx(golden["ratings"], abs=1e-6)
    assert fit.standard_errors == pytest.approx(golden["standard_errors"], abs=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=12, max_size=12), st.permutations(range(4)), st.floats(-500, 3000))
def test_order_and_anchor_change_nothing_but_order_and_anchor(
    cells: list[int], order: list[int], anchor: float
) -> None:
    points = np.zeros((4, 4))
    points[~np.eye(4, dtype=bool)] = cells
    plain = np.array(fit_bradley_terry(_counts(points)).ratings)
    permuted = np.array(fit_bradley_terry(_counts(points[np.ix_(order, order)]), anchor=anchor).ratings)
    np.testing.assert_allclose(permuted - anchor, plain[order] - 1000, atol=1e-6)
    assert permuted.mean() == pytest.approx(anchor, abs=1e-6)


def test_an_extreme_record_still_converges() -> None:
    points = np.array([[0, 1_000_000, 0], [1, 0, 1_000_000], [0, 1, 0]])
    ratings = fit_bradley_terry(_counts(points)).ratings
    assert np.diff(ratings) == pytest.approx([-400 * 6, -400 * 6])


def test_sandwich_and_bootstrap_agree_where_the_model_holds() -> None:
    counts = counts_from_battles(_drawn_battles(np.linspace(-1, 1, 6), 4000, seed=2))
    fit = fit_bradley_terry(counts)
    replicates = bootstrap_ratings(counts, replicates=600, seed=3)
    assert replicates.shape == (600, 6)
    np.testing.assert_allclose(replicates.std(axis=0), fit.standard_errors, rtol=0.12)
    np.testing.assert_allclose(replicates.mean(axis=0), fit.ratings, atol=0.3 * max(fit.standard_errors))
    np.testing.assert_array_equal(replicates, bootstrap_ratings(counts, replicates=600, seed=3))


def test_ties_narrow_the_sandwich() -> None:
    tied = BattleCounts(policy_models=("a", "b"), wins=np.zeros((2, 2)), ties=np.array([[0.0, 10.0], [10.0, 0.0]]))
    split = _counts(np.array([[0, 5], [5, 0]]))
    assert fit_bradley_terry(tied).standard_errors == pytest.approx((0.0, 0.0), abs=1e-9)
    assert min(fit_bradley_terry(split).standard_errors) > 50


def test_a_bootstrap_resample_without_a_loss_stays_finite() -> None:
    replicates = bootstrap_ratings(_counts(np.array([[0, 6], [1, 0]])), replicates=200)
    assert np.isfinite(replicates).all()
    assert np.abs(replicates - 1000).max() < 400


def test_the_bootstrap_keeps_a_named_anchor() -> None:
    replicates = bootstrap_ratings(_counts(np.array([[0, 6], [4, 0]])), replicates=10, anchor=1200, anchor_model="m1")
    assert (replicates[:, 1] == 1200).all()


def test_ratings_frame_has_intervals_and_votes() -> None:
    frame = ratings_from_battles(_drawn_battles(np.linspace(-1, 1, 4), 500, seed=4))
    assert validate(frame, RATINGS).equals(frame)
    assert frame["votes"].sum() == 1000
    assert (frame["rating_low"] < frame["rating"]).all()
    assert frame["rating"].mean() == pytest.approx(1000)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("a", "b", "tie"), ("c", "d", "tie")], r"2 groups .*\[a, b\]; \[c, d\]"),
        ([("a", "b", "tie"), ("c", "a", "model_a")], r"\[c\] never lost to any other model"),
        ([("a", "b", "tie"), ("c", "a", "model_b")], r"\[c\] never beat any other model"),
        (
            [("a", "b", "tie"), ("c", "d", "tie"), ("e", "f", "tie"), ("a", "c", "model_a"), ("c", "e", "model_a")],
            r"\[c, d\] only lost to some and only beat others",
        ),
    ],
)
def test_ratings_that_do_not_exist_are_errors_that_name_the_models(
    rows: list[tuple[str, str, str]], message: str
) -> None:
    with pytest.raises(GraphError, match=message):
        ratings_from_battles(_battles(*rows))


@pytest.mark.parametrize(
    ("rows", "message"),
    [([("a", "b", "A")], "none of .*first 'A'"), ([("a", "a", "tie")], "against itself, first 'a'")],
)
def test_bad_battles(rows: list[tuple[str, str, str]], message: str) -> None:
    with pytest.raises(TableError, match=message):
        counts_from_battles(_battles(*rows))


def test_repeated_battles_are_refused() -> None:
    one = _battles(("a", "b", "tie"))
    with pytest.raises(TableError, match="more than once"):
        counts_from_battles(pl.concat([one, one]))


@pytest.mark.parametrize(
    ("wins", "ties", "message"),
    [
        (np.zeros((2, 3)), np.zeros((2, 2)), "2×2"),
        (np.array([[0, np.nan], [1, 0]]), np.zeros((2, 2)), "finite"),
        (np.array([[0, -1.0], [1, 0]]), np.zeros((2, 2)), "not negative"),
        (np.eye(2), np.zeros((2, 2)), "diagonal"),
        (np.zeros((2, 2)), np.array([[0, 1.0], [0, 0]]), "symmetric"),
    ],
)
def test_bad_counts(wins: np.ndarray, ties: np.ndarray, message: str) -> None:
    with pytest.raises(TableError, match=message):
        BattleCounts(policy_models=("a", "b"), wins=wins, ties=ties)


def test_one_model_is_not_enough() -> None:
    with pytest.raises(TableError, match="at least two"):
        BattleCounts(policy_models=("a",), wins=np.zeros((1, 1)), ties=np.zeros((1, 1)))


def test_an_anchor_without_battles_is_an_error() -> None:
    with pytest.raises(ConfigError, match="'z' took part in no battle"):
        fit_bradley_terry(_counts(np.array([[0, 1], [1, 0]])), anchor_model="z")
