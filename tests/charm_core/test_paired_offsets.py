import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from charm_core.elo import win_probability
from charm_core.paired_offsets import (
    difference_spread,
    exact_offset,
    hard_win_rates,
    pair_differences,
    paired_replicates,
    solve_paired,
)

SMOOTHING = (1.0, 0.3, 0.1)


def _win_rate(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.mean(0.5 + 0.5 * np.sign(first - second)))


def _values(prompts: int, models: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(prompts, 1)) + rng.normal(size=(prompts, models)) + np.arange(models) * 0.3


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 100_000), number=st.integers(1, 40), probability=st.floats(0.001, 0.999))
def test_without_ties_the_target_is_met_within_half_a_prompt(seed: int, number: int, probability: float) -> None:
    rng = np.random.default_rng(seed)
    first, second = rng.normal(size=number), rng.normal(size=number)
    exact = exact_offset(first, second, probability)
    reached = _win_rate(first + exact.offset, second)
    assert reached == pytest.approx(exact.win_rate, abs=1e-12)
    assert abs(reached - probability) <= 0.5 / number + 1e-9
    assert exact.tie_block == 0


@settings(max_examples=200, deadline=None)
@given(
    first=st.lists(st.integers(-3, 3), min_size=1, max_size=15),
    seed=st.integers(0, 1000),
    probability=st.floats(0.001, 0.999),
)
def test_with_tie_blocks_nothing_reachable_is_nearer(first: list[int], seed: int, probability: float) -> None:
    ours = np.array(first, dtype=float)
    other = np.random.default_rng(seed).integers(-3, 4, size=ours.size).astype(float)
    exact = exact_offset(ours, other, probability)
    reachable = [_win_rate(ours + step / 4, other) for step in range(-40, 41)]
    nearest = min(abs(rate - probability) for rate in reachable)
    assert abs(exact.win_rate - probability) <= max(nearest, 0.5 / ours.size) + 1e-9
    assert _win_rate(ours + exact.offset, other) == pytest.approx(exact.win_rate, abs=1e-12)
    assert (exact.tie_block > 0) == (nearest > 0.5 / ours.size + 1e-9)


def test_the_threshold_lies_half_way_between_neighbours() -> None:
    exact = exact_offset(np.array([1.0, 2.0, 4.0, 8.0]), np.zeros(4), 0.5)
    assert exact.offset == -3.0


def test_a_single_block_can_tie_or_win_or_lose() -> None:
    first, second = np.full(10, 2.0), np.full(10, 1.0)
    assert exact_offset(first, second, 0.6).offset == -1.0
    assert exact_offset(first, second, 0.6).tie_block == 10
    assert exact_offset(first, second, 0.9).win_rate == 1.0
    assert exact_offset(first, second, 0.1).win_rate == 0.0


def test_a_target_beyond_all_prompts_moves_past_the_last_one() -> None:
    exact = exact_offset(np.array([1.0, 2.0]), np.zeros(2), 0.999)
    assert exact.win_rate == 1.0
    assert exact.offset > -1.0


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), probability=st.floats(0.05, 0.95))
def test_swapping_the_models_negates_the_offset(seed: int, probability: float) -> None:
    rng = np.random.default_rng(seed)
    first, second = rng.normal(size=25), rng.normal(size=25)
    there, back = exact_offset(first, second, probability), exact_offset(second, first, 1 - probability)
    assert back.offset == pytest.approx(-there.offset, abs=1e-9)


def test_the_joint_solution_is_the_exact_one_for_two_models() -> None:
    for seed in range(10):
        values = _values(400, 2, seed)
        ratings = np.array([1000.0, 1080.0])
        exact = exact_offset(values[:, 0], values[:, 1], float(win_probability(1000, 1080)))
        joint = solve_paired(pair_differences(values), ratings, np.zeros(2), SMOOTHING).offsets
        # the hard win rate is a step function: both lie on a step next to the target
        assert hard_win_rates(pair_differences(values), joint)[0] == pytest.approx(exact.win_rate, abs=2 / 400 + 1e-9)
        assert joint[0] - joint[1] == pytest.approx(exact.offset, abs=0.02)


def test_the_smooth_solution_is_the_minimum_of_the_objective() -> None:
    values, ratings = _values(150, 4, 0), np.array([1000.0, 1100.0, 1050.0, 980.0])
    values[:30, 2] = np.nan
    pairs = pair_differences(values)
    solution = solve_paired(pairs, ratings, np.zeros(4), (1.0, 0.3))
    temperature = 0.3 * difference_spread(pairs)

    def objective(free: np.ndarray) -> float:
        offsets = np.append(free, -free.sum())
        total = 0.0
        for pair in pairs:
            shift = offsets[pair.first] - offsets[pair.second]
            smooth = temperature * np.logaddexp(0, (pair.values + shift) / temperature).sum()
            total += (
                smooth - pair.values.size * float(win_probability(ratings[pair.first], ratings[pair.second])) * shift
            )
        return total

    best = minimize(objective, np.zeros(3), method="BFGS", options={"gtol": 1e-6}).x
    np.testing.assert_allclose(solution.smooth_offsets[:3], best, atol=1e-5)


def _squared_mismatch(values: np.ndarray, ratings: np.ndarray, offsets: np.ndarray) -> float:
    pairs = pair_differences(values)
    target = np.array([float(win_probability(ratings[pair.first], ratings[pair.second])) for pair in pairs])
    return float(np.sum(((hard_win_rates(pairs, offsets) - target) / np.maximum(target, 1 - target)) ** 2))


def test_sharpening_leaves_nothing_that_a_small_move_would_gain() -> None:
    rng = np.random.default_rng(1)
    values, ratings = _values(2000, 4, 1), np.array([1000.0, 1020.0, 990.0, 1100.0])
    values[:, 3] *= 3.0  # spreads that differ: no offsets fit all pairs
    solution = solve_paired(pair_differences(values), ratings, np.zeros(4), SMOOTHING)
    reached = _squared_mismatch(values, ratings, solution.offsets)
    assert reached < _squared_mismatch(values, ratings, solution.smooth_offsets)
    for _ in range(200):
        moved = solution.offsets + rng.normal(0, 0.05, 4)
        assert _squared_mismatch(values, ratings, moved) > reached - 2e-4


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.sampled_from([1e-6, 0.01, 1.0, 1e5]), shift=st.floats(-1000, 1000))
def test_unit_and_origin_of_scores_do_not_matter(seed: int, scale: float, shift: float) -> None:
    values, ratings = _values(80, 3, seed), np.array([1000.0, 1050.0, 1100.0])
    plain = solve_paired(pair_differences(values), ratings, np.zeros(3), SMOOTHING)
    moved = values * scale + np.array([0.0, shift * scale, 0.0])
    other = solve_paired(pair_differences(moved), ratings, -moved.mean(axis=0), SMOOTHING)
    expected = plain.smooth_offsets - np.array([0.0, shift, 0.0])
    np.testing.assert_allclose(other.smooth_offsets / scale, expected - expected.mean(), atol=1e-4 + 1e-9 * abs(shift))


def test_a_start_from_far_away_converges() -> None:
    values, ratings = _values(200, 3, 2), np.array([1000.0, 1050.0, 1100.0])
    near = solve_paired(pair_differences(values), ratings, np.zeros(3), SMOOTHING)
    far = solve_paired(pair_differences(values), ratings, np.array([30.0, -40.0, 10.0]), SMOOTHING)
    np.testing.assert_allclose(far.smooth_offsets, near.smooth_offsets, atol=1e-4)


def test_constant_differences_do_not_crash() -> None:
    values = np.tile(np.array([[5.0, 1.0, 2.0]]), (20, 1))
    solution = solve_paired(pair_differences(values), np.array([1000.0, 1000.0, 1000.0]), np.zeros(3), SMOOTHING)
    assert np.isfinite(solution.offsets).all()


def test_replicates_are_those_of_fitting_every_resample() -> None:
    values, ratings = _values(300, 3, 3), np.array([1000.0, 1050.0, 1100.0])
    pairs = pair_differences(values)
    solution = solve_paired(pairs, ratings, np.zeros(3), SMOOTHING)
    fast = paired_replicates(pairs, solution, np.tile(ratings, (300, 1)), 300, np.random.default_rng(0))
    rng = np.random.default_rng(0)
    drawn = rng.integers(300, size=(300, 300), dtype=np.int32)
    slow = np.array(
        [
            solve_paired(pair_differences(values[rows]), ratings, solution.offsets, SMOOTHING).smooth_offsets
            for rows in drawn
        ]
    )
    moved = fast - solution.offsets + solution.smooth_offsets
    np.testing.assert_allclose(moved.mean(axis=0), slow.mean(axis=0), atol=0.01)
    np.testing.assert_allclose(moved.std(axis=0), slow.std(axis=0), rtol=0.05)
    assert np.corrcoef(moved[:, 0], slow[:, 0])[0, 1] > 0.99


def test_missing_rows_are_left_out_of_a_pair_only() -> None:
    values = np.array([[1.0, 2.0, np.nan], [4.0, np.nan, 1.0], [0.0, 0.0, 0.0]])
    pairs = pair_differences(values)
    assert [(pair.first, pair.second, pair.values.tolist()) for pair in pairs] == [
        (0, 1, [-1.0, 0.0]),
        (0, 2, [3.0, 0.0]),
        (1, 2, [0.0]),
    ]
