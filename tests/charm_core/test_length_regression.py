"""Length regression takes out what length is worth, and nothing else."""

import numpy as np
import polars as pl
import pytest

from charm_core.errors import TableError
from charm_core.length_regression import fit_length_curve, without_length
from charm_core.tables import RESPONSES, SCORES


def tables(prompts: int = 120, *, worth: float = 2.0, liked: float = 0.0) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Scores that grow with log length, with noise, and prompts of different difficulty; ``b`` is liked for itself."""
    draws = np.random.default_rng(0)
    rows = []
    for n in range(prompts):
        level = draws.normal(0, 5)
        for model in "abc":
            length = int(np.exp(draws.uniform(3, 7)))
            score = level + worth * np.log1p(length) + draws.normal(0, 0.3) + (liked if model == "b" else 0.0)
            rows.append((f"p{n:03d}", model, float(score), "x" * length))
    frame = pl.DataFrame(rows, schema=["prompt_id", "policy_model", "score", "response"], orient="row")
    return frame.select(list(SCORES.columns)), frame.select(list(RESPONSES.columns))


def slope_within_prompts(scores: pl.DataFrame, responses: pl.DataFrame) -> float:
    table = scores.join(responses, on=["prompt_id", "policy_model"])
    log = pl.col("response").str.len_chars().cast(pl.Float64).log1p()
    centred = table.select(
        x=log - log.mean().over("prompt_id"), y=pl.col("score") - pl.col("score").mean().over("prompt_id")
    )
    x, y = centred["x"].to_numpy(), centred["y"].to_numpy()
    return float(x @ y / (x @ x))


def test_what_length_is_worth_is_gone_and_the_rest_stays():
    scores, responses = tables(liked=1.5)
    assert slope_within_prompts(scores, responses) == pytest.approx(2.0, abs=0.1)
    corrected = without_length(scores, responses, fit_length_curve(scores, responses))
    assert abs(slope_within_prompts(corrected, responses)) < 0.1
    liked = corrected.group_by("policy_model").agg(pl.col("score").mean()).sort("policy_model")["score"].to_numpy()
    assert liked[1] - (liked[0] + liked[2]) / 2 == pytest.approx(1.5, abs=0.15)


def test_scores_without_a_length_effect_are_left_alone():
    scores, responses = tables(worth=0.0)
    corrected = without_length(scores, responses, fit_length_curve(scores, responses))
    assert np.abs((corrected["score"] - scores["score"]).to_numpy()).max() < 0.25


def test_a_curve_is_fitted_on_some_prompts_and_used_on_others():
    scores, responses = tables()
    seen = scores.filter(pl.col("prompt_id") < "p060")
    curve = fit_length_curve(seen, responses)
    unseen = scores.filter(pl.col("prompt_id") >= "p060")
    assert abs(slope_within_prompts(without_length(unseen, responses, curve), responses)) < 0.15
    assert curve.at(np.array([-5.0, 50.0])).tolist() == [curve.score[0], curve.score[-1]]


def test_what_cannot_be_fitted_is_an_error():
    scores, responses = tables(4)
    with pytest.raises(TableError, match="same length"):
        fit_length_curve(scores, responses.with_columns(response=pl.lit("abc")))
    with pytest.raises(TableError, match="have no response, first"):
        fit_length_curve(scores, responses.head(3))
