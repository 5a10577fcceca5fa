"""Ratings and what they imply."""

import math

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from charm_core.elo import (
    ELO_POINTS_PER_LOGIT,
    Alias,
    present_ratings,
    rating_standard_errors,
    resolve_aliases,
    select_ratings,
    win_probability,
    win_probability_matrix,
)
from charm_core.errors import RatingsError, TableError
from charm_core.tables import RATINGS

RATING = st.floats(min_value=-5000, max_value=5000, allow_nan=False)


def board(**ratings: float) -> pl.DataFrame:
    return named_board({name.replace("_", "-"): rating for name, rating in ratings.items()})


def named_board(ratings: dict[str, float], width: float | None = 10.0) -> pl.DataFrame:
    return pl.DataFrame(
        [
            (name, value, value - width if width else None, value + width if width else None, 5)
            for name, value in ratings.items()
        ],
        schema=dict(RATINGS.columns),
        orient="row",
    )


def alias(policy_model: str, arena_name: str, match: str = "exact") -> Alias:
    return Alias.model_validate(
        {"policy_model": policy_model, "arena_name": arena_name, "match": match, "reason": "a stand-in"}
    )


def test_equal_ratings_are_a_coin_toss():
    assert win_probability(1273, 1273) == 0.5


@pytest.mark.parametrize(
    ("rating", "other", "expected"),
    [
        (1216.0, 1250.0, 0.451),  # gemma-2-9b-it-simpo against gpt-4-1106-preview, the data's MANIFEST
        (1400.0, 1000.0, 10 / 11),
        (1000.0, 1400.0, 1 / 11),
        (1000.0 + ELO_POINTS_PER_LOGIT, 1000.0, 1 / (1 + math.exp(-1))),
    ],
)
def test_published_and_worked_examples(rating: float, other: float, expected: float):
    assert win_probability(rating, other) == pytest.approx(expected, abs=5e-4 if expected == 0.451 else 1e-12)


@given(rating=RATING, other=RATING, shift=RATING)
def test_only_differences_matter_and_both_sides_add_to_one(rating: float, other: float, shift: float):
    probability = float(win_probability(rating, other))
    assert 0 <= probability <= 1
    assert probability + float(win_probability(other, rating)) == pytest.approx(1, abs=1e-15)
    assert float(win_probability(rating + shift, other + shift)) == pytest.approx(probability, abs=1e-9)
    assert float(win_probability(rating, other)) == pytest.approx(1 / (1 + 10 ** ((other - rating) / 400)), abs=1e-12)


@given(low=RATING, high=RATING, other=RATING)
def test_a_higher_rating_never_wins_less(low: float, high: float, other: float):
    low, high = sorted((low, high))
    assert win_probability(low, other) <= win_probability(high, other)


def test_enormous_differences_do_not_overflow():
    assert win_probability(1e300, -1e300) == 1.0
    assert win_probability(-1e9, 1e9) == 0.0


@given(ratings=st.lists(RATING, min_size=1, max_size=6))
def test_the_matrix_holds_every_ordered_pair(ratings: list[float]):
    matrix = win_probability_matrix(ratings)
    assert matrix.shape == (len(ratings), len(ratings))
    assert np.all(np.diag(matrix) == 0.5)
    np.testing.assert_allclose(matrix + matrix.T, 1, atol=1e-15)
    assert matrix[0, -1] == win_probability(ratings[0], ratings[-1])


def test_the_matrix_keeps_leading_axes():
    stacked = np.array([[0.0, 100.0, 200.0], [50.0, 60.0, 70.0]])
    matrices = win_probability_matrix(stacked)
    assert matrices.shape == (2, 3, 3)
    np.testing.assert_array_equal(matrices[1], win_probability_matrix(stacked[1]))


def test_standard_errors_come_from_the_interval_and_are_zero_without_one():
    table = pl.concat([named_board({"a": 1000.0}, width=19.59963984540054), named_board({"b": 1.0}, width=None)])
    np.testing.assert_allclose(rating_standard_errors(table), [10.0, 0.0])


def test_ratings_are_selected_in_the_order_asked_for():
    chosen = select_ratings(board(a=1.0, b=2.0, c=3.0), ["c", "a"])
    assert chosen.get_column("policy_model").to_list() == ["c", "a"]
    assert chosen.get_column("rating").to_list() == [3.0, 1.0]
    assert dict(chosen.schema) == dict(RATINGS.columns)


def test_an_unknown_model_lists_the_nearest_names_and_is_never_matched():
    with pytest.raises(RatingsError, match=r"'gpt-4o-2024-05-13 ' has no rating.*nearest names: gpt-4o-2024-05-13"):
        select_ratings(named_board({"gpt-4o-2024-05-13": 1285.0, "llama": 1.0}), ["gpt-4o-2024-05-13 "])
    with pytest.raises(RatingsError, match=r"nearest names: GPT-4"):
        select_ratings(named_board({"GPT-4": 1.0}), ["gpt-4"])
    with pytest.raises(RatingsError, match=r"no similar name"):
        select_ratings(named_board({"abc": 1.0}), ["zzzzzz"])


def test_every_unknown_model_is_reported_at_once():
    with pytest.raises(RatingsError, match=r"'x1'.*'x2'"):
        select_ratings(board(a=1.0), ["x1", "a", "x2"])


def test_an_interval_that_does_not_hold_its_rating_is_refused():
    table = board(a=1.0, b=2.0).with_columns(rating_low=pl.lit(900.0))
    with pytest.raises(RatingsError, match=r"interval of 'a' does not contain its rating"):
        select_ratings(table, ["b"])


def test_the_rounding_of_published_boards_is_accepted():
    table = board(a=1000.0).with_columns(rating_low=pl.lit(1000.4), rating_high=pl.lit(999.6))
    assert select_ratings(table, ["a"]).height == 1


def test_a_model_with_two_ratings_is_refused():
    with pytest.raises(TableError, match=r"occur more than once"):
        select_ratings(pl.concat([board(a=1.0), board(a=2.0)]), ["a"])


def test_an_exact_alias_needs_no_consent_and_is_reported():
    ratings, applied = resolve_aliases(board(arena=7.0), ["mine"], [alias("mine", "arena"), alias("other", "nowhere")])
    assert ratings.select("policy_model", "rating").rows() == [("mine", 7.0)]
    assert [entry.policy_model for entry in applied] == ["mine"]


def test_a_near_match_needs_consent_that_names_the_model():
    table = [alias("mine", "arena", "near")]
    with pytest.raises(RatingsError, match=r"'mine' is only nearly 'arena' .a stand-in.; add it to arena.accept_near"):
        resolve_aliases(board(arena=7.0), ["mine"], table, accept_near=["arena"])
    ratings, applied = resolve_aliases(board(arena=7.0), ["mine"], table, accept_near=["mine"])
    assert ratings.get_column("rating").to_list() == [7.0]
    assert applied[0].match == "near"


@pytest.mark.parametrize("second", [alias("mine", "b"), alias("mine", "a", "exact")])
def test_an_ambiguous_alias_is_refused(second: Alias):
    first = alias("mine", "a", "near")
    with pytest.raises(RatingsError, match=r"maps 'mine' to both"):
        resolve_aliases(board(a=1.0, b=2.0), ["mine"], [first, second], accept_near=["mine"])


def test_an_alias_counts_even_if_the_board_has_the_name():
    ratings, applied = resolve_aliases(board(mine=1.0, arena=2.0), ["mine"], [alias("mine", "arena")])
    assert ratings.get_column("rating").to_list() == [2.0]
    assert len(applied) == 1


def test_an_alias_to_a_name_that_the_board_lacks_lists_the_nearest():
    with pytest.raises(RatingsError, match=r"'arena-x' has no rating.*arena-y"):
        resolve_aliases(board(arena_y=1.0), ["mine"], [alias("mine", "arena-x")])


def test_all_problems_come_in_one_message():
    with pytest.raises(RatingsError, match=r"only nearly.*'zzz' has no rating"):
        resolve_aliases(board(arena=7.0), ["mine", "zzz"], [alias("mine", "arena", "near")])


def test_resolved_ratings_are_sorted_and_keep_their_own_interval():
    ratings, _ = resolve_aliases(board(a=1.0, b=2.0), ["zed", "a"], [alias("zed", "b")])
    assert ratings.select("policy_model", "rating", "rating_low").rows() == [("a", 1.0, -9.0), ("zed", 2.0, -8.0)]


def unknown(policy_model: str) -> Alias:
    return Alias(policy_model=policy_model, match="unknown", reason="a private model")


def test_a_model_that_was_reviewed_and_has_no_rating_says_why():
    with pytest.raises(RatingsError, match=r"'mine' is known to have no rating .a private model.; leave it out"):
        resolve_aliases(board(a=1.0), ["mine"], [unknown("mine")])
    with pytest.raises(RatingsError, match=r"alias table says that 'a' has no rating .*but this board has; review it"):
        resolve_aliases(board(a=1.0), ["a"], [unknown("a")])


@pytest.mark.parametrize(
    "entry",
    [
        {"match": "unknown", "arena_name": "a"},
        {"match": "exact"},
        {"match": "near", "arena_name": ""},
        {"match": "unknown", "other_names": ("x",)},
        {"match": "exact", "arena_name": "a", "reason": ""},
    ],
)
def test_entries_that_contradict_themselves_are_refused(entry: dict[str, object]):
    with pytest.raises(ValidationError):
        Alias.model_validate({"policy_model": "mine", "reason": "because"} | entry)


def test_a_mirrors_other_name_is_used_and_reported():
    entry = alias("mine", "arena").model_copy(update={"other_names": ("Arena (display)", "ARENA")})
    ratings, applied = resolve_aliases(named_board({"ARENA": 7.0}), ["mine"], [entry])
    assert ratings["rating"].to_list() == [7.0]
    assert (applied[0].arena_name, applied[0].other_names) == ("ARENA", ())
    with pytest.raises(RatingsError, match=r"several names of the alias table on this board: 'arena', 'ARENA'"):
        resolve_aliases(named_board({"ARENA": 7.0, "arena": 8.0}), ["mine"], [entry])


def test_earlier_boards_may_lack_a_model():
    table = [alias("mine", "arena"), alias("late", "arena-late")]
    found = present_ratings(board(arena=7.0, a=1.0), ["mine", "late", "a", "b"], table)
    assert found.select("policy_model", "rating").rows() == [("a", 1.0), ("mine", 7.0)]
    assert present_ratings(board(x=1.0), ["mine"], table).is_empty()
    assert present_ratings(board(x=1.0), [], table).schema == RATINGS.columns


def test_what_forbids_an_alias_forbids_it_on_earlier_boards_too():
    with pytest.raises(RatingsError, match=r"only nearly"):
        present_ratings(board(x=1.0), ["mine"], [alias("mine", "arena", "near")])
    with pytest.raises(RatingsError, match=r"known to have no rating"):
        present_ratings(board(x=1.0), ["mine"], [unknown("mine")])
