import json
from itertools import combinations
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from charm_core.elo import win_probability
from charm_core.errors import RatingsError, TableError
from charm_core.mismatch import (
    MismatchConfig,
    MismatchReport,
    empirical_win_rate,
    measure_mismatch,
    measure_preference_mismatch,
    measure_win_rate_mismatch,
    mismatch_degree,
    own_ratings,
)
from charm_core.mismatch_values import mismatch_replicates, mismatch_values, rated_group
from charm_core.scores import score_matrix, score_outcomes

GOLDEN = Path(__file__).parent / "golden"
QUICK = MismatchConfig(bootstrap_replicates=200)


def _scores(values: np.ndarray, names: list[str] | None = None) -> pl.DataFrame:
    models = names or [f"m{index}" for index in range(values.shape[1])]
    rows = [
        (f"p{row:05d}", models[column], float(values[row, column]))
        for row in range(values.shape[0])
        for column in range(values.shape[1])
        if np.isfinite(values[row, column])
    ]
    return pl.DataFrame(
        rows, schema={"prompt_id": pl.String, "policy_model": pl.String, "score": pl.Float64}, orient="row"
    )


def _ratings(values: list[float], names: list[str] | None = None, error: float | None = None) -> pl.DataFrame:
    models = names or [f"m{index}" for index in range(len(values))]
    half = None if error is None else 1.959963984540054 * error
    return pl.DataFrame(
        {
            "policy_model": models,
            "rating": values,
            "rating_low": [None if half is None else value - half for value in values],
            "rating_high": [None if half is None else value + half for value in values],
            "votes": [None] * len(values),
        },
        schema={
            "policy_model": pl.String,
            "rating": pl.Float64,
            "rating_low": pl.Float64,
            "rating_high": pl.Float64,
            "votes": pl.Int64,
        },
    )


def _drawn(models: int, prompts: int, seed: int, lift: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(prompts, 1)) + rng.normal(size=(prompts, models))
    values[:, 0] += lift
    return values


def test_the_published_example_of_the_bias() -> None:
    # gemma-2-9b-it-simpo (1216) against gpt-4-1106-preview (1250): Elo predicts 45.1 %, a judge says 65.9 %
    assert win_probability(1216, 1250) == pytest.approx(0.451, abs=5e-4)
    assert mismatch_degree(0.659, win_probability(1216, 1250)) == pytest.approx((0.659 - 0.4512) / 0.5488, abs=5e-4)


def test_mismatch_degree_is_antisymmetric_and_bounded() -> None:
    assert mismatch_degree(1.0, 0.3) == pytest.approx(1.0)
    assert mismatch_degree(0.2, 0.7) == pytest.approx(-mismatch_degree(0.8, 0.3))
    assert mismatch_degree(0.4, 0.4) == 0.0


def test_win_rate_counts_ties_half() -> None:
    table = _scores(np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [2.0, 1.0]]))
    assert empirical_win_rate(table, "m0", "m1") == 0.625
    assert empirical_win_rate(table, "m1", "m0") == 0.375


def test_two_models_by_hand() -> None:
    # 3 of 4 prompts is +190.85 Elo; the ratings say +100: half of the excess on either side of the common anchor
    report = measure_mismatch(_scores(np.array([[1.0, 0], [1, 0], [1, 0], [0, 1]])), _ratings([1100, 1000]), QUICK)
    first, second = report.models
    assert first.overvaluation.value == pytest.approx((400 * np.log10(3) - 100) / 2)
    assert second.overvaluation.value == pytest.approx(-(400 * np.log10(3) - 100) / 2)
    assert first.reward_model_rating == pytest.approx(1050 + 200 * np.log10(3))
    expected = (0.75 - win_probability(1100, 1000)) / win_probability(1100, 1000)
    assert report.pairs[0].mismatch_degree.value == pytest.approx(float(expected))
    assert first.mismatch_degree.value == pytest.approx(float(expected))
    assert report.mean_absolute_mismatch.value == pytest.approx(float(expected))
    assert report.overvaluation_rmse.value == pytest.approx((400 * np.log10(3) - 100) / 2)
    assert first.mean_score == 0.75


def test_golden_report() -> None:
    golden = json.loads((GOLDEN / "mismatch.json").read_text())
    values = np.array([[np.nan if cell is None else cell for cell in row] for row in golden["scores"]])
    report = measure_mismatch(_scores(values), _ratings(golden["ratings"], error=5.0), QUICK)
    assert [pair.win_rate.value for pair in report.pairs] == pytest.approx(golden["win_rates"])
    assert [pair.mismatch_degree.value for pair in report.pairs] == pytest.approx(golden["mismatch_degrees"])
    assert [model.overvaluation.value for model in report.models] == pytest.approx(golden["overvaluations"], abs=1e-4)
    assert report.tie_rate == pytest.approx(golden["tie_rate"])
    assert report.smallest_score_gap == pytest.approx(golden["smallest_score_gap"])


def test_a_planted_overvaluation_is_found_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    ratings = [1000.0, 1050.0, 1100.0, 1150.0]
    # logistic differences of Gumbel scores make the paired win rates exactly those of the ratings
    values = rng.gumbel(size=(4000, 4)) + (np.array(ratings) + np.array([0, 90, 0, 0])) * np.log(10) / 400
    report = measure_mismatch(_scores(values), _ratings(ratings, error=3.0))
    planted = np.array([-22.5, 67.5, -22.5, -22.5])
    for model, truth in zip(report.models, planted, strict=True):
        assert model.overvaluation.low <= truth <= model.overvaluation.high
        assert model.overvaluation.high - model.overvaluation.low < 30
    assert report.models[1].flagged
    assert report.models[1].p_value_holm < 1e-6


def test_no_bias_raises_few_flags() -> None:
    rng = np.random.default_rng(7)
    ratings = np.linspace(1000, 1200, 6)
    flagged = 0
    for _ in range(60):
        values = rng.gumbel(size=(150, 6)) + ratings * np.log(10) / 400
        report = measure_mismatch(_scores(values), _ratings(ratings.tolist()), MismatchConfig(bootstrap_replicates=100))
        flagged += any(model.flagged for model in report.models)
    # a family-wise error of 5 %: more than 9 of 60 has a probability below 1 in 1,000
    assert flagged <= 9


def test_intervals_cover_the_truth() -> None:
    rng = np.random.default_rng(11)
    ratings, covered, trials = np.array([1000.0, 1060.0, 1150.0]), 0, 150
    for seed in range(trials):
        board = ratings + rng.normal(0, 15, 3)
        values = rng.gumbel(size=(200, 3)) + ratings * np.log(10) / 400
        config = MismatchConfig(bootstrap_replicates=200, seed=seed)
        estimate = (
            measure_mismatch(_scores(values), _ratings(board.tolist(), error=15.0), config).models[0].overvaluation
        )
        covered += estimate.low <= 0 <= estimate.high
    assert 0.88 <= covered / trials <= 0.995


def test_rating_uncertainty_widens_the_intervals() -> None:
    table = _scores(_drawn(3, 500, seed=1))
    widths = [
        (
            estimate := measure_mismatch(table, _ratings([1000, 1010, 1020], error=error), QUICK)
            .models[0]
            .overvaluation
        ).high
        - estimate.low
        for error in (None, 30.0)
    ]
    assert widths[1] > 1.5 * widths[0]


def test_ties_and_the_smallest_gap_are_reported() -> None:
    report = measure_mismatch(
        _scores(np.array([[1.0, 1.0, 3.0], [2.0, 2.0625, 9.0], [3.0, 1.0, 2.0]])), _ratings([1, 2, 3]), QUICK
    )
    assert report.tie_rate == pytest.approx(1 / 9)
    assert report.smallest_score_gap == 0.0625
    assert report.pairs[0].tie_rate == pytest.approx(1 / 3)


def test_missing_cells_leave_each_pair_its_shared_prompts() -> None:
    values = _drawn(3, 200, seed=2)
    values[:150, 2] = np.nan
    report = measure_mismatch(_scores(values), _ratings([1000, 1000, 1000]), QUICK)
    assert [pair.prompts for pair in report.pairs] == [200, 50, 50]
    assert [model.prompts for model in report.models] == [200, 200, 50]
    assert report.pairs[0].win_rate.value == pytest.approx(np.mean(values[:, 0] > values[:, 1]))
    rare, common = report.models[2].overvaluation, report.models[0].overvaluation
    assert rare.high - rare.low > 1.2 * (common.high - common.low)


def test_a_model_that_wins_everything_has_no_finite_elo_but_is_flagged() -> None:
    values = _drawn(4, 100, seed=3)
    values[:, 3] = values[:, :3].max(axis=1) + 1.0
    report = measure_mismatch(_scores(values), _ratings([1000, 1000, 1000, 1000]), QUICK)
    winner = report.models[3]
    assert winner.overvaluation.value is None
    assert winner.reward_model_rating is None
    assert winner.overvaluation.low > 300
    assert winner.overvaluation.high is None
    assert "on every prompt preferred" in winner.note
    assert winner.flagged
    alone = measure_mismatch(_scores(values[:, :3]), _ratings([1000, 1000, 1000]), QUICK)
    for model, expected in zip(report.models[:3], alone.models, strict=True):
        assert model.overvaluation.value == pytest.approx(expected.overvaluation.value, abs=1e-6)
        assert model.note == ""


def test_a_model_that_loses_everything() -> None:
    values = _drawn(3, 100, seed=3)
    values[:, 0] = values[:, 1:].min(axis=1) - 1.0
    loser = measure_mismatch(_scores(values), _ratings([1000, 1000, 1000]), QUICK).models[0]
    assert (loser.overvaluation.value, loser.overvaluation.low) == (None, None)
    assert loser.overvaluation.high < -300
    assert "on no prompt preferred" in loser.note


def test_two_models_of_which_one_always_wins() -> None:
    report = measure_mismatch(_scores(np.array([[1.0, 0.0]] * 40)), _ratings([1000, 1000]), QUICK)
    assert [model.overvaluation.value for model in report.models] == [None, None]
    assert report.overvaluation_rmse.value is None
    assert report.pairs[0].win_rate.value == 1.0
    assert report.pairs[0].win_rate.low < 0.99
    assert report.models[0].flagged


def test_three_wins_of_three_prove_nothing() -> None:
    report = measure_mismatch(_scores(np.array([[1.0, 0.0]] * 3)), _ratings([1000, 1000]), QUICK)
    assert not report.models[0].flagged
    assert not report.pairs[0].flagged


def test_p_values_are_not_floored_by_the_replicates() -> None:
    values = _drawn(20, 800, seed=4, lift=2.0)
    report = measure_mismatch(_scores(values), _ratings([1000.0] * 20), MismatchConfig(bootstrap_replicates=50))
    lifted = max(report.models, key=lambda model: model.overvaluation.value)
    assert lifted.policy_model == "m0"
    assert lifted.p_value_holm < 1e-10


def test_the_report_survives_json_and_repeats_itself() -> None:
    arguments = (_scores(_drawn(3, 60, seed=5)), _ratings([1000, 1010, 1020], error=4.0), QUICK)
    report = measure_mismatch(*arguments)
    assert MismatchReport.model_validate_json(report.model_dump_json()) == report
    assert measure_mismatch(*arguments) == report


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), constant=st.floats(-1e4, 1e4), scale=st.sampled_from([0.5, 2.0, 1024.0]))
def test_what_must_change_nothing(seed: int, constant: float, scale: float) -> None:
    rng = np.random.default_rng(seed)
    values = rng.integers(-5, 5, size=(40, 3)).astype(float)
    plain = measure_mismatch(_scores(values), _ratings([1000, 1100, 1050]), MismatchConfig(bootstrap_replicates=50))
    prompt_shift = rng.integers(-100, 100, size=(40, 1))
    shuffled = _scores(values * scale + prompt_shift).sample(fraction=1.0, shuffle=True, seed=seed)
    moved = measure_mismatch(
        shuffled, _ratings([1000 + constant, 1100 + constant, 1050 + constant]), MismatchConfig(bootstrap_replicates=50)
    )
    assert [model.overvaluation.value for model in moved.models] == pytest.approx(
        [model.overvaluation.value for model in plain.models], abs=1e-6
    )
    assert [pair.mismatch_degree.value for pair in moved.pairs] == pytest.approx(
        [pair.mismatch_degree.value for pair in plain.pairs], abs=1e-9
    )


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_overvaluations_average_to_zero_and_match_total_wins(seed: int) -> None:
    outcomes = score_outcomes(score_matrix(_scores(_drawn(4, 50, seed))))
    ratings = np.array([1000.0, 1040.0, 1080.0, 1120.0])
    values = mismatch_values(outcomes, ratings)
    if len(rated_group(outcomes)) < 4:
        return
    assert values.overvaluation.mean() == pytest.approx(0.0, abs=1e-8)
    own = ratings + values.overvaluation
    surplus = outcomes.win_rate - win_probability(own[outcomes.first], own[outcomes.second])
    for model in range(4):
        total = surplus[outcomes.first == model].sum() - surplus[outcomes.second == model].sum()
        assert total == pytest.approx(0.0, abs=1e-9)


def test_replicates_of_two_reward_models_are_paired() -> None:
    values = _drawn(3, 300, seed=6)
    board = _ratings([1000, 1010, 1020], error=20.0)
    same = [
        mismatch_replicates(score_outcomes(score_matrix(_scores(table))), board, replicates=80, seed=9).degree
        for table in (values, values + 0.0, np.round(values, 1))
    ]
    np.testing.assert_array_equal(same[0], same[1])
    assert np.corrcoef(same[0][:, 0], same[2][:, 0])[0, 1] > 0.9


def _preferences(models: int, prompts: int, seed: int) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    rows = [
        (f"p{prompt}", f"m{model}", "base", float(rng.beta(1 + model, 2)))
        for model in range(models)
        for prompt in range(prompts)
    ]
    schema = {"prompt_id": pl.String, "model_a": pl.String, "model_b": pl.String, "preference_a": pl.Float64}
    return pl.DataFrame(rows, schema=schema, orient="row")


def test_a_star_of_judge_preferences() -> None:
    table = _preferences(4, 300, seed=0)
    names = ["base", "m0", "m1", "m2", "m3"]
    report = measure_preference_mismatch(table, _ratings([1000, 1000, 1000, 1000, 1000], names), QUICK)
    assert len(report.pairs) == 4
    assert [model.policy_model for model in report.models] == names
    by_name = {model.policy_model: model for model in report.models}
    # in a star each edge is fitted exactly: the difference of two overvaluations is that pair's logit
    rate = table.filter(pl.col("model_a") == "m3")["preference_a"].mean()
    difference = by_name["m3"].overvaluation.value - by_name["base"].overvaluation.value
    assert difference == pytest.approx(400 * np.log10(rate / (1 - rate)), abs=1e-3)
    assert by_name["m3"].mean_score is None
    assert report.smallest_score_gap is None
    assert by_name["m3"].flagged


def test_hard_preferences_say_the_same_as_scores() -> None:
    values = _drawn(3, 120, seed=8)
    rows = [
        (f"p{row:05d}", f"m{j}", f"m{k}", 0.5 + 0.5 * float(np.sign(values[row, j] - values[row, k])))
        for row in range(120)
        for j, k in combinations(range(3), 2)
    ]
    schema = {"prompt_id": pl.String, "model_a": pl.String, "model_b": pl.String, "preference_a": pl.Float64}
    board = _ratings([1000, 1020, 1040])
    judged = measure_preference_mismatch(pl.DataFrame(rows, schema=schema, orient="row"), board, QUICK)
    scored = measure_mismatch(_scores(values), board, QUICK)
    assert judged.pairs == scored.pairs
    assert judged.mean_absolute_mismatch == scored.mean_absolute_mismatch


def test_an_unrated_model_is_an_error_with_the_nearest_names() -> None:
    with pytest.raises(RatingsError, match=r"'m2' has no rating.*m1"):
        measure_mismatch(_scores(_drawn(3, 5, seed=0)), _ratings([1000, 1010]), QUICK)


def test_one_model_is_an_error() -> None:
    with pytest.raises(TableError, match="at least two policy models"):
        measure_mismatch(_scores(np.array([[1.0]])), _ratings([1000]), QUICK)


@pytest.mark.parametrize("bias", [0.0, 15.0, 100.0])
def test_the_interval_of_the_mean_absolute_mismatch_covers_the_truth(bias: float) -> None:
    rng = np.random.default_rng(13)
    ratings = np.linspace(1000, 1200, 5)
    seen = ratings + np.array([bias, 0, 0, 0, 0])
    pairs = np.array(list(combinations(range(5), 2))).T
    degrees = mismatch_degree(win_probability(*seen[pairs]), win_probability(*ratings[pairs]))
    truth, covered, trials = float(np.abs(degrees).mean()), 0, 60
    for seed in range(trials):
        values = rng.gumbel(size=(200, 5)) + seen * np.log(10) / 400
        config = MismatchConfig(bootstrap_replicates=200, seed=seed)
        estimate = measure_mismatch(_scores(values), _ratings(ratings.tolist()), config).mean_absolute_mismatch
        covered += estimate.low <= truth + 1e-12 and truth <= estimate.high
    # at 95 % fewer than 51 of 60 has a probability below 1 in 1,000
    assert covered >= 51


def test_focus_keeps_only_pairs_with_the_models_of_interest() -> None:
    table, board = _scores(_drawn(4, 80, seed=9)), _ratings([1000, 1010, 1020, 1030])
    everything, focused = (measure_mismatch(table, board, QUICK, focus=focus) for focus in ((), ("m3",)))
    assert [(pair.model_a, pair.model_b) for pair in focused.pairs] == [("m0", "m3"), ("m1", "m3"), ("m2", "m3")]
    values = {(pair.model_a, pair.model_b): pair.mismatch_degree.value for pair in everything.pairs}
    assert all(pair.mismatch_degree.value == values[pair.model_a, pair.model_b] for pair in focused.pairs)
    with pytest.raises(TableError, match=r"no scores for the policy models \[nobody\]"):
        measure_mismatch(table, board, QUICK, focus=("nobody",))


def test_own_ratings_are_the_reward_models_elo() -> None:
    table, board = _scores(_drawn(3, 80, seed=10)), _ratings([1000, 1010, 1020], error=5.0)
    own = own_ratings(table)
    report = measure_mismatch(table, board, QUICK)
    assert own["rating"].to_list() == pytest.approx([model.reward_model_rating - 1010 for model in report.models])
    assert own["rating_low"].null_count() == 3


def _win_rates(*rows: tuple[str, str, float, float, int]) -> pl.DataFrame:
    schema = {
        "model_a": pl.String,
        "model_b": pl.String,
        "win_rate": pl.Float64,
        "standard_error": pl.Float64,
        "prompts": pl.Int64,
    }
    return pl.DataFrame(rows, schema=schema, orient="row")


def test_published_win_rates_keep_their_mean_and_standard_error() -> None:
    table = _win_rates(("x", "base", 0.659, 0.015, 805), ("y", "base", 0.2, 0.01, 800))
    names = ["base", "x", "y"]
    report = measure_win_rate_mismatch(table, _ratings([1250, 1216, 1100], names), MismatchConfig())
    by_name = {pair.model_a: pair for pair in report.pairs}
    assert by_name["x"].win_rate.value == pytest.approx(0.659, abs=1e-6)
    assert by_name["x"].win_rate.high - by_name["x"].win_rate.low == pytest.approx(2 * 1.96 * 0.015, rel=0.1)
    assert by_name["y"].win_rate.high - by_name["y"].win_rate.low == pytest.approx(2 * 1.96 * 0.01, rel=0.1)
    assert by_name["x"].flagged


def test_a_published_win_rate_of_nearly_nothing_does_not_crash() -> None:
    table = _win_rates(("x", "base", 0.002, 0.002, 800))
    report = measure_win_rate_mismatch(table, _ratings([1250, 1000], ["base", "x"]), QUICK)
    assert report.models[0].overvaluation.value > 0


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("x", "b", 1.2, 0.1, 10)], "1 win rates are unusable.*1.2"),
        ([("x", "b", 0.2, -0.1, 10)], "standard error is not negative"),
        ([("x", "b", 0.2, 0.1, 1)], "at least two prompts"),
        ([("x", "x", 0.2, 0.1, 10)], "two different models"),
        ([("x", "b", 0.2, 0.1, 10), ("b", "x", 0.8, 0.1, 10)], "given in both orders"),
    ],
)
def test_bad_win_rates(rows: list[tuple[str, str, float, float, int]], message: str) -> None:
    with pytest.raises(TableError, match=message):
        measure_win_rate_mismatch(_win_rates(*rows), _ratings([1000, 1000], ["b", "x"]), QUICK)
