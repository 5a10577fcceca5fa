import numpy as np
import polars as pl
import pytest

from charm_core.errors import GraphError, TableError
from charm_core.scores import preference_outcomes, score_matrix, score_outcomes


def _scores(**models: list[float | None]) -> pl.DataFrame:
    rows = [
        (f"p{index}", model, value)
        for model, values in models.items()
        for index, value in enumerate(values)
        if value is not None
    ]
    return pl.DataFrame(
        rows, schema={"prompt_id": pl.String, "policy_model": pl.String, "score": pl.Float64}, orient="row"
    )


def _preferences(*rows: tuple[str, str, str, float]) -> pl.DataFrame:
    schema = {"prompt_id": pl.String, "model_a": pl.String, "model_b": pl.String, "preference_a": pl.Float64}
    return pl.DataFrame(rows, schema=schema, orient="row")


def test_missing_cells_are_nan_and_models_are_sorted() -> None:
    matrix = score_matrix(_scores(b=[1.0, 2.0], a=[3.0, None]))
    assert matrix.policy_models == ("a", "b")
    assert matrix.prompt_ids == ("p0", "p1")
    np.testing.assert_array_equal(matrix.values, [[3.0, 1.0], [np.nan, 2.0]])


def test_models_keep_the_order_asked_for() -> None:
    matrix = score_matrix(_scores(a=[1.0], b=[2.0], c=[3.0]), ["c", "a"])
    np.testing.assert_array_equal(matrix.values, [[3.0, 1.0]])


def test_wins_ties_and_missing_prompts() -> None:
    outcomes = score_outcomes(
        score_matrix(_scores(a=[1.0, 2.0, 3.0, None], b=[0.0, 2.0, 4.0, 1.0], c=[None, None, 1.0, 5.0]))
    )
    assert list(zip(outcomes.first.tolist(), outcomes.second.tolist(), strict=True)) == [(0, 1), (0, 2), (1, 2)]
    np.testing.assert_array_equal(outcomes.win_rate, [0.5, 1.0, 0.5])
    np.testing.assert_array_equal(outcomes.shared, [3, 1, 2])
    np.testing.assert_allclose(outcomes.tie_rate, [1 / 3, 0.0, 0.0])


def test_a_pair_without_a_shared_prompt_is_left_out_if_the_graph_holds_together() -> None:
    outcomes = score_outcomes(score_matrix(_scores(a=[1.0, None], b=[0.0, 1.0], c=[None, 2.0])))
    assert list(zip(outcomes.first.tolist(), outcomes.second.tolist(), strict=True)) == [(0, 1), (1, 2)]


@pytest.mark.parametrize(
    ("table", "models", "error", "message"),
    [
        (_scores(a=[1.0]), None, TableError, "at least two policy models"),
        (_scores(a=[1.0], b=[float("nan")]), None, TableError, "NaN or infinite.*'b'"),
        (_scores(a=[float("inf")], b=[1.0]), None, TableError, "NaN or infinite, first inf"),
        (_scores(a=[1.0], b=[1.0]), ["a", "z"], TableError, r"no scores for the policy models \[z\]"),
        (_scores(a=[1.0], b=[1.0]), ["a", "b", "a"], TableError, r"\[a\] are asked for more than once"),
        (_scores(a=[1.0, None], b=[None, 1.0]), None, TableError, "scores on the same prompt"),
        (_scores(a=[1.0, None], b=[1.0, None], c=[None, 1.0], d=[None, 1.0]), None, GraphError, r"\[a, b\]; \[c, d\]"),
        (pl.concat([_scores(a=[1.0], b=[1.0]), _scores(a=[2.0])]), None, TableError, "more than once"),
        (_scores(a=[1.0]).clear(), None, TableError, "no rows"),
        (_scores(a=[1.0]).rename({"score": "reward"}), None, TableError, "missing.*score"),
    ],
)
def test_each_bad_table_has_its_own_message(
    table: pl.DataFrame, models: list[str] | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        score_matrix(table, models)


def test_preferences_of_a_star() -> None:
    outcomes = preference_outcomes(
        _preferences(("p0", "x", "base", 0.9), ("p1", "x", "base", 0.5), ("p0", "base", "y", 0.2))
    )
    assert outcomes.policy_models == ("base", "x", "y")
    np.testing.assert_allclose(outcomes.win_rate, [0.3, 0.2], rtol=1e-6)
    np.testing.assert_array_equal(outcomes.tie_rate, [0.5, 0.0])


def test_a_pair_judged_in_both_orders_counts_once() -> None:
    outcomes = preference_outcomes(_preferences(("p0", "a", "b", 1.0), ("p0", "b", "a", 0.5)))
    np.testing.assert_array_equal(outcomes.shared, [1])
    np.testing.assert_allclose(outcomes.win_rate, [0.75])


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([("p0", "a", "b", 1.5)], TableError, r"outside of \[0, 1\].*1.5"),
        ([("p0", "a", "a", 0.5)], TableError, "with itself"),
        ([("p0", "a", "b", 0.5), ("p0", "c", "d", 0.5)], GraphError, r"\[a, b\]; \[c, d\]"),
    ],
)
def test_each_bad_preference_has_its_own_message(
    rows: list[tuple[str, str, str, float]], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        preference_outcomes(_preferences(*rows))
