import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.special import expit

from charm_core.cross_prompt_offsets import (
    CrossPromptTarget,
    cross_prompt_replicates,
    cross_prompt_win_rate,
    solve_cross_prompt,
)


def _target(scores: np.ndarray, reference: np.ndarray, probability: float) -> CrossPromptTarget:
    return CrossPromptTarget(scores=scores, reference=reference, rows=np.arange(scores.size), probability=probability)


def _brute_force(scores: np.ndarray, reference: np.ndarray, offset: float, temperature: float, block: int) -> float:
    """The reference implementation's loop over blocks, in NumPy."""
    wins = 0.0
    for start in range(0, len(scores), block):
        one, other = scores[start : start + block] + offset, reference[start : start + block]
        wins += expit((one[:, None] - other[None, :]) / temperature).mean() * len(one)
    return wins / len(scores)


@pytest.mark.parametrize("block", [1000, 64, 50])
def test_the_smooth_win_rate_is_the_references(block: int) -> None:
    rng = np.random.default_rng(0)
    scores, reference = rng.normal(1, 1, 130), rng.normal(0, 2, 130)
    rate = cross_prompt_win_rate(scores, reference, 0.3, score_temperature=0.1, block_prompts=block)
    assert rate == pytest.approx(_brute_force(scores, reference, 0.3, 0.1, block), abs=1e-12)


@pytest.mark.parametrize("probability", [0.02, 0.419, 0.5, 0.97])
def test_the_smooth_offset_is_the_brute_force_root(probability: float) -> None:
    rng = np.random.default_rng(1)
    scores, reference = rng.normal(1, 1, 150), rng.normal(0, 2, 150)
    offset, _ = solve_cross_prompt([_target(scores, reference, probability)], score_temperature=0.1, block_prompts=64)
    root = brentq(lambda at: _brute_force(scores, reference, at, 0.1, 64) - probability, -30, 30, xtol=1e-12)
    assert offset == pytest.approx(root, abs=1e-8)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 100_000), number=st.integers(1, 25), probability=st.floats(0.01, 0.99))
def test_the_hard_offset_is_a_quantile_of_all_differences(seed: int, number: int, probability: float) -> None:
    rng = np.random.default_rng(seed)
    scores, reference = rng.normal(size=number), rng.normal(size=number)
    offset, _ = solve_cross_prompt([_target(scores, reference, probability)], score_temperature=0.0, block_prompts=2)
    rate = np.mean(0.5 + 0.5 * np.sign(scores[:, None] + offset - reference[None, :]))
    assert abs(rate - probability) <= 0.5 / number**2 + 1e-9
    hard = cross_prompt_win_rate(scores, reference, offset, score_temperature=0.0, block_prompts=2)
    assert hard == pytest.approx(float(rate), abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 100_000), number=st.integers(1, 10), probability=st.floats(0.01, 0.99))
def test_ties_count_half_and_the_nearest_reachable_rate_is_taken(seed: int, number: int, probability: float) -> None:
    rng = np.random.default_rng(seed)
    scores, reference = (rng.integers(-2, 3, size=number).astype(float) for _ in range(2))
    offset, _ = solve_cross_prompt([_target(scores, reference, probability)], score_temperature=0.0, block_prompts=2)

    def rate(at: float) -> float:
        return float(np.mean(0.5 + 0.5 * np.sign(scores[:, None] + at - reference[None, :])))

    nearest = min(abs(rate(step / 4) - probability) for step in range(-24, 25))
    assert abs(rate(offset) - probability) == pytest.approx(nearest, abs=1e-9)


def test_several_references_share_one_offset() -> None:
    rng = np.random.default_rng(2)
    scores = rng.normal(size=80)
    targets = [_target(scores, rng.normal(size=80), 0.3), _target(scores, rng.normal(1, 1, size=80), 0.2)]
    offset, _ = solve_cross_prompt(targets, score_temperature=0.1, block_prompts=1000)
    rates = [_brute_force(target.scores, target.reference, offset, 0.1, 1000) for target in targets]
    assert np.mean(rates) == pytest.approx(0.25, abs=1e-9)


def test_prompt_difficulty_leaks() -> None:
    # METHOD.md section 2: with the target .419 the paired win rate ends at .36
    rng = np.random.default_rng(3)
    difficulty = rng.normal(0, 1.4, 4000)
    scores, reference = difficulty + rng.normal(0.8, 1, 4000), difficulty + rng.normal(0, 1, 4000)
    offset, _ = solve_cross_prompt([_target(scores, reference, 0.419)], score_temperature=0.1, block_prompts=1000)
    assert np.mean(scores + offset > reference) == pytest.approx(0.36, abs=0.02)


@pytest.mark.parametrize("temperature", [0.0, 0.1])
def test_replicates_are_those_of_solving_every_resample(temperature: float) -> None:
    rng = np.random.default_rng(4)
    difficulty = rng.normal(size=200)
    target = _target(difficulty + rng.normal(size=200), difficulty + rng.normal(size=200), 0.4)
    offset, _ = solve_cross_prompt([target], score_temperature=temperature, block_prompts=64)
    fast = cross_prompt_replicates(
        [target],
        offset,
        np.full((200, 1), 0.4),
        200,
        np.random.default_rng(5),
        score_temperature=temperature,
        block_prompts=64,
    )
    drawn = np.random.default_rng(5).integers(200, size=(200, 200), dtype=np.int32)
    slow = [
        solve_cross_prompt(
            [_target(target.scores[rows], target.reference[rows], 0.4)], score_temperature=temperature, block_prompts=64
        )[0]
        for rows in np.sort(drawn, axis=1)
    ]
    assert np.std(fast) == pytest.approx(np.std(slow), rel=0.1)
    assert np.corrcoef(fast, slow)[0, 1] > 0.95


def test_scores_that_never_vary_have_replicates_all_the_same() -> None:
    target = _target(np.ones(20), np.zeros(20), 0.5)
    offset, _ = solve_cross_prompt([target], score_temperature=0.0, block_prompts=10)
    assert offset == -1.0
    replicates = cross_prompt_replicates(
        [target], offset, np.full((5, 1), 0.5), 20, np.random.default_rng(0), score_temperature=0.0, block_prompts=10
    )
    np.testing.assert_array_equal(replicates, np.full(5, -1.0))
