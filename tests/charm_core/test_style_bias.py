import numpy as np
import polars as pl
import pytest

from charm_core.agreement import score_length_correlation
from charm_core.errors import TableError
from charm_core.style_bias import compare_style_correlations, style_correlations

PLAIN = "word " * 20
MARKED = "# Title\n- one\n- two\n**bold** " + "word " * 15


def tables(score, prompts: int = 40, seed: int = 0) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Four responses a prompt, long or short, plain or marked up; ``score`` makes a number of (words, marks, difficulty)."""
    rng = np.random.default_rng(seed)
    scores, responses = [], []
    for prompt in range(prompts):
        difficulty = rng.normal(0, 50)
        for model in range(4):
            words, marks = int(rng.integers(1, 60)), int(rng.integers(0, 9))
            text = "\n".join(["word"] * words + ["- item"] * marks)
            scores.append((f"p{prompt:02d}", f"m{model}", score(words + marks, marks, difficulty, rng)))
            responses.append((f"p{prompt:02d}", f"m{model}", text))
    return (
        pl.DataFrame(scores, schema=["prompt_id", "policy_model", "score"], orient="row"),
        pl.DataFrame(responses, schema=["prompt_id", "policy_model", "response"], orient="row"),
    )


def test_a_reward_model_that_pays_for_markdown_alone_is_told_from_one_that_pays_for_length():
    pays_for_marks = style_correlations(*tables(lambda _words, marks, *_: float(np.log1p(marks))))
    assert pays_for_marks.markdown.within_prompt.value == pytest.approx(1.0)
    assert pays_for_marks.length.within_prompt.value < 0.6
    nothing = style_correlations(*tables(lambda *values: values[3].normal()))
    for found in (nothing.length, nothing.markdown):
        assert found.within_prompt.low < 0 < found.within_prompt.high
    assert (nothing.prompts, nothing.responses) == (40, 160)


def test_what_belongs_to_the_prompt_does_not_count():
    scores, responses = tables(lambda words, _marks, difficulty, _rng: np.log1p(words) + difficulty)
    apart = style_correlations(scores, responses)
    assert abs(apart.length.overall) < 0.3
    assert apart.length.within_prompt.value > 0.9
    lifted = scores.with_columns(score=pl.col("score") - 1000.0 * (pl.col("prompt_id") < "p20"))
    moved = style_correlations(lifted, responses)
    assert moved.length.within_prompt.value == pytest.approx(apart.length.within_prompt.value)


def test_length_is_measured_as_elsewhere():
    scores, responses = tables(lambda words, marks, difficulty, rng: words - marks + difficulty / 10 + rng.normal(0, 9))
    known, found = score_length_correlation(scores, responses), style_correlations(scores, responses).length
    assert found.overall == pytest.approx(known.overall)
    assert found.within_prompt.value == pytest.approx(known.within_prompt)


def test_markdown_counts_headers_bold_and_lists():
    rows = [("p", "a", MARKED), ("p", "b", PLAIN)]
    responses = pl.DataFrame(rows, schema=["prompt_id", "policy_model", "response"], orient="row")
    scores = pl.DataFrame({"prompt_id": ["p", "p"], "policy_model": ["a", "b"], "score": [1.0, 0.0]})
    found = style_correlations(scores, responses)
    assert found.markdown.within_prompt.value == pytest.approx(1.0)
    assert found.markdown.overall == pytest.approx(1.0)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_neither_scale_nor_order_of_rows_matters(scale: float):
    scores, responses = tables(lambda words, _marks, _difficulty, rng: words + rng.normal(0, 20))
    scaled = scores.with_columns(pl.col("score") * scale + 7 * scale).sample(fraction=1.0, shuffle=True, seed=1)
    found, known = (style_correlations(one, responses, replicates=50) for one in (scaled, scores))
    assert found.length.within_prompt.model_dump() == pytest.approx(known.length.within_prompt.model_dump())
    assert found.markdown.within_prompt.model_dump() == pytest.approx(known.markdown.within_prompt.model_dump())


def test_what_does_not_vary_has_no_correlation():
    scores, responses = tables(lambda _words, _marks, difficulty, _rng: difficulty)
    found = style_correlations(scores, responses)
    assert found.length.within_prompt.value is None
    same = responses.with_columns(response=pl.lit("the same"))
    assert style_correlations(scores, same).markdown.overall is None


def test_a_bias_that_was_traded_for_another_is_seen():
    before, responses = tables(lambda words, _marks, _difficulty, rng: np.log1p(words) + rng.normal(0, 0.5))
    after, _ = tables(lambda words, marks, _difficulty, rng: np.log1p(marks) - 0 * words + rng.normal(0, 0.5))
    found = compare_style_correlations(before, after, responses)
    assert found.length.high < 0 < found.markdown.low
    same = compare_style_correlations(before, before, responses)
    assert same.length.model_dump() == {"value": 0.0, "low": 0.0, "high": 0.0}
    one, other = (style_correlations(side, responses).length.within_prompt.value for side in (before, after))
    assert found.length.value == pytest.approx(other - one)


def test_the_interval_covers_what_other_prompts_show():
    """Of 200 worlds about 95 % of the intervals hold the correlation that very many prompts have."""

    def score(words, _marks, _difficulty, rng):
        return np.log1p(words) + rng.normal(0, 1.0)

    truth = style_correlations(*tables(score, 4000), replicates=2).length.within_prompt.value
    found = [
        style_correlations(*tables(score, 60, seed), replicates=200).length.within_prompt for seed in range(1, 201)
    ]
    assert 0.89 <= np.mean([one.low <= truth <= one.high for one in found]) <= 0.99


def test_a_score_without_its_response_is_an_error():
    scores, responses = tables(lambda *_: 1.0)
    with pytest.raises(TableError, match="1 scores have no response"):
        style_correlations(scores, responses[1:])
    with pytest.raises(TableError, match="no response in common"):
        compare_style_correlations(scores[:4], scores[4:], responses)
