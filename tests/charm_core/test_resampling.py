import numpy as np
import pytest

from charm_core import resampling
from charm_core.resampling import (
    bootstrap_weights,
    holm_adjusted,
    normal_p_values,
    percentile_estimate,
    reflected_estimate,
)


def test_each_resample_draws_as_many_items_as_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resampling, "_BLOCK_CELLS", 70)
    blocks = list(bootstrap_weights(20, 10, np.random.default_rng(0)))
    weights = np.concatenate(blocks)
    assert [len(block) for block in blocks] == [3, 3, 3, 1]
    assert weights.shape == (10, 20)
    assert (weights.sum(axis=1) == 20).all()
    assert weights.max() > 1


def test_weights_are_those_of_sampling_with_replacement() -> None:
    weights = np.concatenate(list(bootstrap_weights(50, 4000, np.random.default_rng(1))))
    assert weights.mean() == 1.0
    assert weights.var() == pytest.approx(1 - 1 / 50, rel=0.02)


def test_holm_worked_example() -> None:
    # sorted 0.01, 0.02, 0.03, 0.04: times 4, 3, 2, 1 and never falling
    np.testing.assert_allclose(holm_adjusted(np.array([0.03, 0.01, 0.04, 0.02])), [0.06, 0.04, 0.06, 0.06])


def test_p_values_have_no_floor_from_the_number_of_replicates() -> None:
    replicates = np.random.default_rng(0).normal(5.0, 0.5, size=(100, 1))
    (p_value,) = normal_p_values(np.array([5.0]), replicates)
    assert 0 < p_value < 1e-15


def test_p_value_of_one_where_there_is_no_estimate_and_zero_where_there_is_no_doubt() -> None:
    replicates = np.array([[np.nan, 1.0, 0.0], [np.nan, 1.0, 0.0]])
    np.testing.assert_array_equal(normal_p_values(np.array([np.nan, 1.0, 0.0]), replicates), [1.0, 0.0, 1.0])


def test_percentiles_leave_nan_replicates_out() -> None:
    estimate = percentile_estimate(0.5, np.array([np.nan, 0.0, 1.0]), 0.9)
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((0.5, 0.05, 0.95))


def test_reflection_undoes_the_bias_of_a_mean_absolute_value() -> None:
    # replicates lie above the estimate because of their own noise, so the truth lies below it
    estimate = reflected_estimate(1.0, np.linspace(1.2, 2.2, 1001), 0.9, floor=0.0)
    assert (estimate.low, estimate.high) == pytest.approx((0.0, 1.0))


def test_no_replicates_give_no_interval() -> None:
    estimate = reflected_estimate(1.0, np.empty(0), 0.95)
    assert (estimate.value, estimate.low, estimate.high) == (1.0, None, None)
