import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from charm_core.elo import win_probability
from charm_core.errors import ConfigError, GraphError, RatingsError, TableError
from charm_core.mismatch import MismatchConfig, measure_mismatch
from charm_core.offsets import OffsetConfig, OffsetFit, apply_offsets, fit_offsets

POINT = OffsetConfig(bootstrap_replicates=0)


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


def _ratings(*values: float, error: float | None = None) -> pl.DataFrame:
    half = None if error is None else 1.959963984540054 * error
    return pl.DataFrame(
        {
            "policy_model": [f"m{index}" for index in range(len(values))],
            "rating": list(values),
            "rating_low": [None if half is None else value - half for value in values],
            "rating_high": [None if half is None else value + half for value in values],
            "votes": [None] * len(values),
        },
        schema_overrides={"rating": pl.Float64, "rating_low": pl.Float64, "rating_high": pl.Float64, "votes": pl.Int64},
    )


def _drawn(prompts: int, models: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(prompts, 1)) + rng.normal(size=(prompts, models)) + np.arange(models) * 0.4


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), prompts=st.integers(2, 60), gap=st.floats(-400, 400))
def test_two_models_reach_the_target_within_half_a_prompt(seed: int, prompts: int, gap: float) -> None:
    fit = fit_offsets(_scores(_drawn(prompts, 2, seed)), _ratings(1000 + gap, 1000), POINT, ["m1"])
    assert fit.residual <= 0.5 / prompts + 1e-9
    assert fit.as_mapping()["m1"] == 0.0


def test_applying_the_offsets_does_what_the_fit_says() -> None:
    table, board = _scores(_drawn(500, 4, seed=0)), _ratings(1000, 1050, 1100, 990)
    fit = fit_offsets(table, board, POINT, ["m2"])
    config = MismatchConfig(bootstrap_replicates=50)
    before, after = (measure_mismatch(scores, board, config) for scores in (table, apply_offsets(table, fit)))
    assert after.mean_absolute_mismatch.value == pytest.approx(fit.mean_absolute_mismatch)
    assert max(abs(pair.win_rate.value - pair.win_probability) for pair in after.pairs) == pytest.approx(fit.residual)
    assert after.mean_absolute_mismatch.value < 0.1 * before.mean_absolute_mismatch.value
    assert all(abs(model.overvaluation.value) < 3 for model in after.models)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), constant=st.floats(-1e4, 1e4))
def test_what_must_change_nothing(seed: int, constant: float) -> None:
    values = np.random.default_rng(seed).integers(-8, 8, size=(50, 3)) * 0.25
    plain = fit_offsets(_scores(values), _ratings(1000, 1050, 1100), POINT, ["m0"]).as_mapping()
    shuffled = _scores(values + np.arange(50)[:, None]).sample(fraction=1.0, shuffle=True, seed=seed)
    moved = fit_offsets(
        shuffled, _ratings(1000 + constant, 1050 + constant, 1100 + constant), POINT, ["m0"]
    ).as_mapping()
    # ratings of the size of the constant leave rounding error, and the hard win rate is a step function
    assert moved == pytest.approx(plain, abs=1e-6)


def test_the_gauge_is_the_reference_models_mean() -> None:
    table, board = _scores(_drawn(200, 4, seed=1)), _ratings(1000, 1050, 1100, 990)
    one = fit_offsets(table, board, POINT, ["m0"])
    two = fit_offsets(table, board, POINT, ["m1", "m3"]).as_mapping()
    assert one.as_mapping()["m0"] == 0.0
    assert two["m1"] + two["m3"] == pytest.approx(0.0)
    assert {k: v - two["m0"] for k, v in two.items()} == pytest.approx(one.as_mapping())
    assert one == fit_offsets(table, board, OffsetConfig(bootstrap_replicates=0, reference_model="m0"))


def test_planted_offsets_come_back_with_covering_intervals() -> None:
    rng = np.random.default_rng(0)
    ratings, planted = np.array([1000.0, 1060.0, 1120.0]), np.array([0.0, 0.5, -0.3])
    covered = np.zeros(3)
    for seed in range(60):
        difficulty = rng.normal(0, 2, size=(300, 1))
        values = difficulty + rng.gumbel(size=(300, 3)) + ratings * np.log(10) / 400 + planted
        fit = fit_offsets(_scores(values), _ratings(*ratings), OffsetConfig(seed=seed), ["m0"])
        for index, model in enumerate(fit.offsets):
            covered[index] += (
                model.offset.low <= -planted[index] + 1e-12 and -planted[index] - 1e-12 <= model.offset.high
            )
    assert covered[0] == 60
    assert (covered[1:] >= 52).all()


def test_rating_uncertainty_widens_the_intervals() -> None:
    table = _scores(_drawn(400, 3, seed=2))
    sharp, vague = (
        fit_offsets(table, _ratings(1000, 1020, 1040, error=e), OffsetConfig(), ["m0"]) for e in (1.0, 60.0)
    )
    widths = [fit.offsets[1].offset.high - fit.offsets[1].offset.low for fit in (sharp, vague)]
    assert widths[1] > 1.5 * widths[0]
    assert sharp.as_mapping() == vague.as_mapping()


def test_two_models_have_intervals_around_the_exact_offset() -> None:
    fit = fit_offsets(_scores(_drawn(300, 2, seed=3)), _ratings(1000, 1100), OffsetConfig(), ["m0"])
    offset = fit.offsets[1].offset
    assert offset.low < offset.value < offset.high
    assert fit.offsets[0].offset.low == fit.offsets[0].offset.high == 0.0


def test_tie_blocks_are_said() -> None:
    values = np.array([[1.0, 0.0]] * 8 + [[0.0, 2.0]] * 2)
    fit = fit_offsets(_scores(values), _ratings(1000, 1200), POINT, ["m1"])
    assert "a block of 8 prompts has equal score differences" in fit.note
    assert "shares only 10 prompts" in fit.note


def test_missing_responses_are_allowed() -> None:
    values = _drawn(400, 3, seed=4)
    values[:100, 0] = np.nan
    values[300:, 2] = np.nan
    fit = fit_offsets(_scores(values), _ratings(1000, 1030, 1060), OffsetConfig(), ["m1"])
    assert fit.residual < 0.05
    assert all(model.offset.low <= model.offset.value <= model.offset.high for model in fit.offsets)


def test_a_chain_of_pairs_is_enough() -> None:
    values = _drawn(200, 3, seed=5)
    values[:100, 0] = np.nan
    values[100:, 2] = np.nan
    fit = fit_offsets(_scores(values), _ratings(1000, 1030, 1060), POINT, ["m0"])
    # m0 and m2 share nothing: each pair of the chain is met by itself
    assert fit.residual <= 1.0 / 100


@pytest.mark.parametrize("temperature", [0.0, 0.1])
def test_cross_prompt_holds_all_models_against_the_reference(temperature: float) -> None:
    values, ratings = _drawn(200, 3, seed=6), [1000.0, 1030.0, 1060.0]
    config = OffsetConfig(estimator="cross_prompt", score_temperature=temperature, block_prompts=1000)
    fit = fit_offsets(_scores(values), _ratings(*ratings), config, ["m0"])
    offsets = fit.as_mapping()
    assert offsets["m0"] == 0.0
    for model in (1, 2):
        margin = values[:, model][:, None] + offsets[f"m{model}"] - values[:, 0][None, :]
        rate = np.mean(margin > 0) if temperature == 0.0 else np.mean(0.5 + 0.5 * np.tanh(margin / 0.2))
        assert rate == pytest.approx(float(win_probability(ratings[model], ratings[0])), abs=2e-5)
        estimate = fit.offsets[model].offset
        assert estimate.low < estimate.value < estimate.high
    # judged by what mismatch measures, it is no match for the paired estimator
    assert fit.residual > fit_offsets(_scores(values), _ratings(*ratings), POINT, ["m0"]).residual
    assert "leaks" in fit.note


def test_the_fit_survives_json_and_repeats_itself() -> None:
    arguments = (_scores(_drawn(60, 3, seed=7)), _ratings(1000, 1030, 1060, error=5.0), OffsetConfig(), ["m0"])
    fit = fit_offsets(*arguments)
    assert OffsetFit.model_validate_json(fit.model_dump_json()) == fit
    assert fit_offsets(*arguments) == fit


def test_apply_offsets_adds_them() -> None:
    table = _scores(np.array([[1.0, 2.0], [3.0, np.nan]]))
    calibrated = apply_offsets(table, {"m0": 0.5, "m1": -1.0, "unused": 9.0})
    assert calibrated.rows() == [("p00000", "m0", 1.5), ("p00000", "m1", 1.0), ("p00001", "m0", 3.5)]


@pytest.mark.parametrize(
    ("offsets", "message"),
    [({"m0": 1.0}, r"no offset for the policy models \[m1\]"), ({"m0": float("nan"), "m1": 0.0}, "finite numbers.*m0")],
)
def test_bad_offsets(offsets: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        apply_offsets(_scores(np.zeros((1, 2))), offsets)


@pytest.mark.parametrize(
    ("table", "references", "error", "message"),
    [
        (_scores(np.zeros((3, 2))), [], ConfigError, r"need a reference model .*\[m0, m1\]"),
        (_scores(np.zeros((3, 2))), ["x"], ConfigError, r"\[x\] have no scores"),
        (_scores(np.zeros((3, 1))), ["m0"], TableError, "at least two policy models"),
        (_scores(np.zeros((3, 4))), ["m0"], RatingsError, "'m3' has no rating"),
        (_scores(np.array([[0, 0, np.nan], [np.nan, np.nan, 0]])), ["m0"], GraphError, r"\[m0, m1\]; \[m2\]"),
        (_scores(np.array([[0.0, np.nan], [np.nan, 0.0]])), ["m0"], TableError, "on the same prompt"),
    ],
)
def test_each_bad_input_has_its_own_message(
    table: pl.DataFrame, references: list[str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        fit_offsets(table, _ratings(1000, 1030, 1060), POINT, references)


def test_cross_prompt_needs_prompts_shared_with_the_reference() -> None:
    table = _scores(np.array([[0.0, 1.0, np.nan], [np.nan, 1.0, 2.0]]))
    with pytest.raises(GraphError, match=r"'m2' shares no prompt with the reference models \[m0\]"):
        fit_offsets(table, _ratings(1000, 1030, 1060), OffsetConfig(estimator="cross_prompt"), ["m0"])


@pytest.mark.parametrize("smoothing", [(), (0.0,), (0.1, 0.3)])
def test_smoothing_must_fall(smoothing: tuple[float, ...]) -> None:
    with pytest.raises(ValidationError):
        OffsetConfig(smoothing=smoothing)
