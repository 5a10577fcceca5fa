"""Tables: one gate, and what comes out of it is canonical."""

import math

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from charm_core.errors import TableError
from charm_core.tables import BATTLES, MESSAGES, PAIRS, PROMPTS, RATINGS, RESPONSES, SCORES, validate

NAMES = st.text(alphabet="abcdé–0 ", min_size=1, max_size=4)


def scores(**columns: list[object]) -> pl.DataFrame:
    return pl.DataFrame({"prompt_id": ["p1", "p2"], "policy_model": ["m", "m"], "score": [1.0, 2.0]} | columns)


def prompts(messages: object) -> pl.DataFrame:
    return pl.DataFrame(
        {"prompt_id": ["a", "b"], "prompt_set": ["s", "s"], "messages": [[{"role": "user", "content": "x"}], messages]},
        schema=dict(PROMPTS.columns),
    )


@given(
    rows=st.lists(
        st.tuples(NAMES, NAMES, st.floats(allow_nan=False, allow_infinity=False)),
        min_size=1,
        max_size=20,
        unique_by=lambda row: row[:2],
    ),
    data=st.data(),
)
def test_any_order_of_rows_and_columns_gives_the_same_table(rows: list[tuple[str, str, float]], data: st.DataObject):
    frame = pl.DataFrame(rows, schema=dict(SCORES.columns), orient="row")
    shuffled = pl.DataFrame(data.draw(st.permutations(rows)), schema=dict(SCORES.columns), orient="row").select(
        data.draw(st.permutations(list(SCORES.columns)))
    )
    first, second = validate(frame, SCORES), validate(shuffled, SCORES)
    assert first.equals(second)
    assert list(first.schema.items()) == list(SCORES.columns.items())
    assert validate(first, SCORES).equals(first)


def test_missing_and_unexpected_columns_are_both_named():
    with pytest.raises(TableError, match=r"missing \['score'\]; not expected \['Score'\]"):
        validate(scores().rename({"score": "Score"}), SCORES)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_name_their_row(value: float):
    with pytest.raises(TableError, match=r"1 values that are NaN or infinite.*'p2'"):
        validate(scores(score=[1.0, value]), SCORES)


def test_nan_is_refused_in_a_nullable_column_and_null_is_not():
    frame = pl.DataFrame(
        {"policy_model": ["m"], "rating": [1.0], "rating_low": [None], "rating_high": [None], "votes": [None]}
    )
    assert validate(frame, RATINGS).row(0) == ("m", 1.0, None, None, None)
    with pytest.raises(TableError, match=r"rating_low.*NaN"):
        validate(frame.with_columns(rating_low=pl.lit(math.nan)), RATINGS)


@pytest.mark.parametrize("column", ["prompt_id", "policy_model", "score"])
def test_nulls_name_their_column(column: str):
    frame = scores().with_columns(pl.when(pl.col("prompt_id") == "p1").then(column).alias(column))
    with pytest.raises(TableError, match=rf"column '{column}'.*1 nulls"):
        validate(frame, SCORES)


def test_a_column_of_nulls_only_is_nulls_and_not_a_wrong_type():
    with pytest.raises(TableError, match=r"2 nulls"):
        validate(scores(score=[None, None]), SCORES)


def test_duplicate_keys_are_counted_and_the_first_is_shown():
    with pytest.raises(TableError, match=r"2 rows whose prompt_id, policy_model occur more than once.*'p1'"):
        validate(scores(prompt_id=["p1", "p1"]), SCORES)


def test_a_table_without_rows_is_an_error_unless_it_may_be_empty():
    with pytest.raises(TableError, match=r"has no rows"):
        validate(scores().clear(), SCORES)
    empty = pl.DataFrame(schema=dict(PAIRS.columns))
    assert validate(empty, PAIRS).is_empty()


@pytest.mark.parametrize(
    ("column", "values"),
    [("score", ["1.0", "2.0"]), ("score", [True, False]), ("score", [[1.0], [2.0]]), ("policy_model", [1, 2])],
)
def test_a_column_of_the_wrong_kind_is_refused(column: str, values: list[object]):
    with pytest.raises(TableError, match=f"column '{column}'.*must be"):
        validate(scores(**{column: values}), SCORES)


@pytest.mark.parametrize("dtype", [pl.Int8, pl.Int64, pl.UInt32, pl.Float32])
def test_other_numeric_types_are_taken_where_no_value_changes(dtype: pl.DataType):
    frame = scores(score=[1, 2]).with_columns(pl.col("score").cast(dtype))
    assert validate(frame, SCORES).get_column("score").to_list() == [1.0, 2.0]


@pytest.mark.parametrize("votes", [10.5, 2.0**63, math.inf])
def test_a_number_that_the_type_cannot_hold_is_refused_and_not_rounded(votes: float):
    frame = pl.DataFrame(
        {"policy_model": ["m"], "rating": [1.0], "rating_low": [0.0], "rating_high": [2.0], "votes": [votes]}
    )
    with pytest.raises(TableError, match=r"'votes'.*cannot hold"):
        validate(frame, RATINGS)


def test_an_integer_beyond_the_precision_of_a_float_is_refused():
    with pytest.raises(TableError, match=r"'score'.*cannot hold"):
        validate(scores(score=[2**53 + 1, 1]), SCORES)


def test_whole_floats_are_taken_as_integers():
    frame = pl.DataFrame({"battle_id": [1.0, 0.0], "model_a": "a", "model_b": "b", "winner": "tie"})
    assert validate(frame, BATTLES).get_column("battle_id").to_list() == [0, 1]


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "user", "content": None}],
        [{"role": None, "content": "x"}],
        [{"role": "user", "content": "x"}, None],
    ],
)
def test_conversations_must_be_complete(messages: object):
    with pytest.raises(TableError, match=r"'messages'.*1 conversations without messages.*'b'"):
        validate(prompts(messages), PROMPTS)


def test_complete_conversations_pass_unchanged():
    frame = prompts([{"role": "system", "content": ""}, {"role": "user", "content": "y"}])
    assert validate(frame, PROMPTS).equals(frame)
    assert frame.schema["messages"] == MESSAGES


def test_no_table_shares_a_name_with_another():
    names = [schema.name for schema in (PROMPTS, RESPONSES, SCORES, RATINGS, BATTLES, PAIRS)]
    assert len(set(names)) == len(names)
