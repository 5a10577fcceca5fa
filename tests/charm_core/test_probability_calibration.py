import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from charm_core.benchmarks.benchmark import pair_margins
from charm_core.benchmarks.rewardbench import rewardbench
from charm_core.errors import TableError
from charm_core.probability_calibration import fit_score_temperature, pair_probabilities, probability_calibration
from tests.charm_core.benchmarks.made_up import pair, scores_as_written


def test_probabilities_are_bradley_terry() -> None:
    found = pair_probabilities([0.0, np.log(3.0), -np.log(3.0), 800.0], score_temperature=1.0)
    np.testing.assert_allclose(found, [0.5, 0.75, 0.25, 1.0])
    np.testing.assert_allclose(pair_probabilities([2 * np.log(3.0)], score_temperature=2.0), [0.75])


def test_calibration_by_hand() -> None:
    # all right responses first; the last pair is one in which the second is favoured, by 0.85
    result = probability_calibration([0.92, 0.96, 0.65, 0.15], bins=5, replicates=10)
    bins = [(each.low, each.pairs, each.mean_probability, each.win_rate) for each in result.bins]
    assert bins == [
        (0.5, 0, None, None),
        (pytest.approx(0.6), 1, pytest.approx(0.65), 1.0),
        (pytest.approx(0.7), 0, None, None),
        (pytest.approx(0.8), 1, pytest.approx(0.85), 0.0),
        (pytest.approx(0.9), 2, pytest.approx(0.94), 1.0),
    ]
    assert result.expected_calibration_error.value == pytest.approx((0.35 + 0.85 + 2 * 0.06) / 4)
    assert result.brier.value == pytest.approx((0.08**2 + 0.04**2 + 0.35**2 + 0.85**2) / 4)
    assert (result.mean_probability, result.win_rate) == pytest.approx(((0.92 + 0.96 + 0.65 + 0.85) / 4, 0.75))


def test_within_a_bin_errors_cancel() -> None:
    # 0.7 in mean, right 7 times in 10
    outcomes = [1.0] * 7 + [0.0] * 3
    result = probability_calibration([0.68, 0.72] * 5, outcomes, bins=2, replicates=10)
    assert result.expected_calibration_error.value == pytest.approx(0.0, abs=1e-12)


def test_equal_scores_are_half_a_win_whichever_response_is_named_first() -> None:
    for outcome in (0.0, 0.5, 1.0):
        result = probability_calibration([0.5], [outcome], replicates=10)
        assert (result.win_rate, result.expected_calibration_error.value) == (0.5, 0.0)
    assert probability_calibration([0.5], [1.0], replicates=10).brier.value == 0.25


def test_a_bin_begins_at_its_lower_edge() -> None:
    assert [each.pairs for each in probability_calibration([0.5, 0.74, 0.75, 0.25], bins=2, replicates=10).bins] == [
        2,
        2,
    ]


def test_certainty_is_in_the_last_bin() -> None:
    result = probability_calibration([1.0, 0.0], bins=4, replicates=10)
    assert [each.pairs for each in result.bins] == [0, 0, 0, 2]
    assert result.bins[-1].win_rate == 0.5


@given(
    st.lists(st.tuples(st.integers(0, 99), st.sampled_from([0.0, 0.5, 1.0]), st.booleans()), min_size=1, max_size=30)
)
def test_turning_pairs_around_changes_nothing(pairs: list[tuple[int, float, bool]]) -> None:
    # half percents: off 0.5 and off the edges of the bins, where rounding decides
    named = [((2 * percent + 1) / 200, outcome) for percent, outcome, _ in pairs]
    turned = [
        (1.0 - probability, 1.0 - outcome) if turn else (probability, outcome)
        for (probability, outcome), (_, _, turn) in zip(named, pairs, strict=True)
    ]
    results = [probability_calibration(*np.array(each).T, bins=5, replicates=2) for each in (named, turned)]
    for name in ("expected_calibration_error", "brier"):
        assert getattr(results[0], name).value == pytest.approx(getattr(results[1], name).value, abs=1e-9)


def test_true_probabilities_have_no_calibration_error() -> None:
    rng = np.random.default_rng(0)
    margins = rng.normal(0.0, 2.0, 20_000)
    outcomes = (rng.random(margins.size) < pair_probabilities(margins)).astype(float)
    result = probability_calibration(pair_probabilities(margins), outcomes, replicates=200)
    assert result.expected_calibration_error.value == pytest.approx(0.0, abs=0.015)
    assert result.expected_calibration_error.low == pytest.approx(0.0, abs=0.005)
    inflated = probability_calibration(pair_probabilities(3 * margins), outcomes, replicates=200)
    assert inflated.expected_calibration_error.low is not None
    assert inflated.expected_calibration_error.low > 0.08
    assert inflated.mean_probability > inflated.win_rate + 0.05


def test_the_fitted_temperature_is_the_one_that_the_outcomes_were_drawn_with() -> None:
    rng = np.random.default_rng(1)
    margins = rng.normal(0.0, 5.0, 20_000)
    outcomes = (rng.random(margins.size) < pair_probabilities(margins, 4.0)).astype(float)
    assert fit_score_temperature(margins, outcomes) == pytest.approx(4.0, rel=0.05)
    # the unit of the scores does not matter, nor which response is named first
    assert fit_score_temperature(1e-4 * margins, outcomes) == pytest.approx(4e-4, rel=0.05)
    assert fit_score_temperature(-margins, 1.0 - outcomes) == pytest.approx(fit_score_temperature(margins, outcomes))


def test_a_temperature_by_hand() -> None:
    # margins of 1, right three times in four: sigmoid(1 / T) = 3/4
    assert fit_score_temperature([1.0, 1.0, 1.0, -1.0]) == pytest.approx(1.0 / np.log(3.0))


@pytest.mark.parametrize("margins", [[1.0, 2.0], [-1.0, -2.0], [1.0, -1.0], [0.0, 0.0], [-1.0, -1.0, 1.0]])
def test_where_no_temperature_is_best_there_is_none(margins: list[float]) -> None:
    assert fit_score_temperature(margins) is None


def test_pairs_of_one_unit_are_drawn_together() -> None:
    rng = np.random.default_rng(0)
    right = np.repeat(rng.random(200) < 0.7, 9)
    probabilities = np.where(right, 0.7, 0.3)
    alone = probability_calibration(probabilities, replicates=500).brier
    together = probability_calibration(probabilities, units=np.repeat(np.arange(200), 9), replicates=500).brier
    width = [each.high - each.low for each in (alone, together) if each.high is not None and each.low is not None]
    assert width[1] / width[0] == pytest.approx(3.0, rel=0.15)


def test_margins_of_a_benchmark_are_what_it_takes() -> None:
    benchmark = rewardbench([pair(1, "hep-go", "3", "1"), pair(2, "hep-go", "1", "2"), pair(3, "hep-go", "1", "1")])
    margins = pair_margins(benchmark, scores_as_written(benchmark))
    result = probability_calibration(
        pair_probabilities(margins.get_column("margin")), units=margins.get_column("unit"), replicates=10
    )
    assert (result.pairs, result.win_rate) == (3, 0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "probabilities must be a list of numbers with at least one"),
        (([[0.5]],), "not of shape"),
        (([float("nan"), 0.5],), "1 of 2 probabilities are NaN or infinite"),
        (([1.5],), r"probabilities must be in \[0, 1\], not 1.5 to 1.5; use pair_probabilities"),
        (([0.5, 0.5], [1.0]), r"needs 2 outcomes in \[0, 1\], one per pair, not 1 from"),
        (([0.5], [2.0]), r"needs 1 outcomes in \[0, 1\]"),
    ],
)
def test_bad_values(arguments: tuple[list[float], ...], message: str) -> None:
    with pytest.raises(TableError, match=message):
        probability_calibration(*arguments)


def test_more_bad_values() -> None:
    with pytest.raises(TableError, match="needs 2 units, one per pair"):
        probability_calibration([0.5, 0.5], units=["a"])
    with pytest.raises(TableError, match=r"the score temperature must be a positive number, not 0\.0"):
        pair_probabilities([1.0], 0.0)
    with pytest.raises(TableError, match="1 of 1 margins are NaN or infinite"):
        pair_probabilities([float("inf")])
