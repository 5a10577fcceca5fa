import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from charm_core.agreement import compare_mismatch, elo_agreement, mcnemar, score_length_correlation
from charm_core.errors import TableError
from charm_core.mismatch import MismatchConfig, measure_mismatch

QUICK = MismatchConfig(bootstrap_replicates=200)


def _scores(values: np.ndarray) -> pl.DataFrame:
    rows = [
        (f"p{row:05d}", f"m{column}", float(values[row, column]))
        for row in range(values.shape[0])
        for column in range(values.shape[1])
        if np.isfinite(values[row, column])
    ]
    return pl.DataFrame(
        rows, schema={"prompt_id": pl.String, "policy_model": pl.String, "score": pl.Float64}, orient="row"
    )


def _ratings(values: list[float], error: float | None = None) -> pl.DataFrame:
    half = None if error is None else 1.959963984540054 * error
    return pl.DataFrame(
        {
            "policy_model": [f"m{index}" for index in range(len(values))],
            "rating": values,
            "rating_low": [None if half is None else value - half for value in values],
            "rating_high": [None if half is None else value + half for value in values],
            "votes": [None] * len(values),
        },
        schema_overrides={"rating": pl.Float64, "rating_low": pl.Float64, "rating_high": pl.Float64, "votes": pl.Int64},
    )


def _drawn(ratings: list[float], prompts: int, seed: int, bias: tuple[float, ...] = ()) -> np.ndarray:
    rng = np.random.default_rng(seed)
    lift = np.pad(np.array(bias, dtype=float), (0, len(ratings) - len(bias)))
    return rng.gumbel(size=(prompts, len(ratings))) + (np.array(ratings) + lift) * np.log(10) / 400


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), models=st.integers(3, 7))
def test_correlations_are_those_of_scipy(seed: int, models: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.integers(-3, 4, size=(5, models)).astype(float)
    ratings = rng.choice([1000.0, 1010.0, 1020.0, 1030.0], size=models)
    means = values.mean(axis=0)
    if np.ptp(means) == 0 or np.ptp(ratings) == 0:
        return
    agreement = elo_agreement(_scores(values), _ratings(ratings.tolist()), MismatchConfig(bootstrap_replicates=50))
    assert agreement.pearson.value == pytest.approx(stats.pearsonr(means, ratings).statistic, abs=1e-9)
    # five means of whole numbers tie only up to rounding: compare ranks of the rounded means
    rounded = np.round(means, 9)
    assert agreement.spearman.value == pytest.approx(stats.spearmanr(rounded, ratings).statistic, abs=1e-9)
    assert agreement.kendall.value == pytest.approx(stats.kendalltau(rounded, ratings).statistic, abs=1e-9)


def test_a_faithful_reward_model_agrees() -> None:
    ratings = [1000.0, 1060.0, 1120.0, 1180.0, 1240.0]
    agreement = elo_agreement(_scores(_drawn(ratings, 2000, seed=0)), _ratings(ratings, error=2.0), QUICK)
    assert agreement.spearman.value == 1.0
    assert agreement.pearson.low > 0.98
    assert agreement.rating_rmse.value < 12
    assert agreement.rating_rmse.low < 2
    assert agreement.note == ""


def test_the_rmse_is_that_of_the_mismatch_report() -> None:
    ratings = [1000.0, 1060.0, 1120.0]
    table, board = _scores(_drawn(ratings, 300, seed=1, bias=(80,))), _ratings(ratings, error=4.0)
    assert elo_agreement(table, board, QUICK).rating_rmse == measure_mismatch(table, board, QUICK).overvaluation_rmse


def test_scores_that_never_vary_have_no_correlation() -> None:
    agreement = elo_agreement(_scores(np.zeros((10, 3))), _ratings([1000, 1010, 1020]), QUICK)
    assert (agreement.pearson.value, agreement.spearman.value, agreement.kendall.value) == (None, None, None)
    assert "fewer than four" in agreement.note


def test_missing_cells_use_each_models_own_prompts() -> None:
    values = _drawn([1000.0, 1100.0, 1200.0], 100, seed=2)
    values[:40, 0] = np.nan
    agreement = elo_agreement(_scores(values), _ratings([1000, 1100, 1200]), QUICK)
    expected = np.corrcoef(np.nanmean(values, axis=0), [1000, 1100, 1200])[0, 1]
    assert agreement.pearson.value == pytest.approx(expected)
    assert agreement.pearson.low <= expected <= agreement.pearson.high


def test_a_corrected_reward_model_is_significantly_better() -> None:
    ratings = [1000.0, 1060.0, 1120.0, 1180.0]
    values = _drawn(ratings, 500, seed=3, bias=(150,))
    corrected = values - np.array([150, 0, 0, 0]) * np.log(10) / 400
    comparison = compare_mismatch(_scores(values), _scores(corrected), _ratings(ratings, error=4.0), QUICK)
    assert comparison.difference.value == pytest.approx(comparison.after.value - comparison.before.value)
    assert comparison.difference.high < 0
    assert comparison.ratio.value == pytest.approx(comparison.after.value / comparison.before.value)
    assert comparison.ratio.low <= comparison.ratio.value <= comparison.ratio.high < 0.6
    assert comparison.p_value < 1e-6
    assert comparison.rating_rmse_difference.value < -30
    assert comparison.spearman_difference.value > 0


def test_pairing_makes_a_small_difference_visible() -> None:
    ratings = [1000.0, 1060.0, 1120.0, 1180.0]
    values = _drawn(ratings, 400, seed=4, bias=(150,))
    slightly = values - np.array([8, 0, 0, 0]) * np.log(10) / 400
    comparison = compare_mismatch(_scores(values), _scores(slightly), _ratings(ratings, error=10.0), QUICK)
    alone = comparison.before.high - comparison.before.low
    assert comparison.difference.high - comparison.difference.low < 0.3 * alone
    assert comparison.difference.high < 0


def test_a_reward_model_is_not_better_than_itself() -> None:
    table = _scores(_drawn([1000.0, 1060.0, 1120.0], 100, seed=5))
    comparison = compare_mismatch(table, table, _ratings([1000, 1060, 1120], error=5.0), QUICK)
    assert (comparison.difference.value, comparison.difference.low, comparison.difference.high) == (0.0, 0.0, 0.0)
    assert comparison.p_value == 1.0
    assert comparison.ratio.value == 1.0


def test_only_common_cells_are_compared() -> None:
    before = _scores(_drawn([1000.0, 1060.0, 1120.0], 60, seed=6))
    after = before.filter(pl.col("prompt_id") < "p00040").filter(
        ~((pl.col("policy_model") == "m1") & (pl.col("prompt_id") < "p00010"))
    )
    comparison = compare_mismatch(before, after, _ratings([1000, 1060, 1120]), QUICK)
    assert comparison.prompts == 40
    assert comparison.difference.value == 0.0


def test_nothing_in_common_is_an_error() -> None:
    table = _scores(np.zeros((3, 2)))
    other = table.with_columns(pl.format("other-{}", "prompt_id").alias("prompt_id"))
    with pytest.raises(TableError, match="no prompt and policy model in common"):
        compare_mismatch(table, other, _ratings([1000, 1010]), QUICK)


def test_mcnemar_by_hand() -> None:
    # 9 against 1 discordant items: two-sided 2 (1 + 10) / 2^10
    first = np.array([True] * 9 + [False] + [True] * 5)
    second = np.array([False] * 9 + [True] + [True] * 5)
    result = mcnemar(first, second)
    assert (result.items, result.only_a, result.only_b) == (15, 9, 1)
    assert result.p_value == pytest.approx(22 / 1024)
    assert mcnemar(second, first).p_value == result.p_value


def test_mcnemar_without_a_difference() -> None:
    assert mcnemar([True, False], [True, False]).p_value == 1.0


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (np.array([True]), np.array([True, False]), "align them"),
        (np.array([], dtype=bool), np.array([], dtype=bool), "lists of the same items"),
        (np.array([0.2]), np.array([True]), "true and false, not float64"),
    ],
)
def test_mcnemar_wants_the_same_items(first: np.ndarray, second: np.ndarray, message: str) -> None:
    with pytest.raises(TableError, match=message):
        mcnemar(first, second)


def _responses(*lengths: tuple[int, int]) -> pl.DataFrame:
    rows = [
        (f"p{row:05d}", f"m{column}", "é" * length)
        for row, cells in enumerate(lengths)
        for column, length in enumerate(cells)
    ]
    return pl.DataFrame(
        rows, schema={"prompt_id": pl.String, "policy_model": pl.String, "response": pl.String}, orient="row"
    )


def test_length_correlation_overall_and_within_prompts() -> None:
    # longer is better on each prompt, but the prompt with the longer responses has the lower scores
    correlation = score_length_correlation(_scores(np.array([[5.0, 6.0], [1.0, 2.0]])), _responses((1, 2), (10, 20)))
    assert correlation.overall == pytest.approx(stats.spearmanr([5, 6, 1, 2], [1, 2, 10, 20]).statistic)
    assert correlation.overall < 0
    assert correlation.within_prompt > 0.95
    assert correlation.responses == 4


def test_length_correlation_of_equal_lengths_does_not_exist() -> None:
    correlation = score_length_correlation(_scores(np.array([[1.0, 2.0]])), _responses((3, 3)))
    assert (correlation.overall, correlation.within_prompt) == (None, None)


def test_scores_without_responses_are_an_error() -> None:
    with pytest.raises(TableError, match="2 scores have no response"):
        score_length_correlation(_scores(np.zeros((2, 2))), _responses((1, 2)))
