import json
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from charm_core.errors import ConfigError, TableError
from charm_core.preferences import PreferenceConfig, build_preference_pairs, split_prompts
from charm_core.selection import ModelChoice, Selection
from charm_core.tables import MESSAGES, PAIRS, validate

GOLDEN = Path(__file__).parent / "golden"
ALL = PreferenceConfig(strategy="all_pairs")
ZERO = {"a": 0.0, "b": 0.0, "c": 0.0}


def _prompts(number: int, text: str = "question") -> pl.DataFrame:
    return pl.DataFrame(
        {
            "prompt_id": [f"p{index}" for index in range(number)],
            "prompt_set": ["test"] * number,
            "messages": [[{"role": "user", "content": f"{text} {index}"}] for index in range(number)],
        },
        schema={"prompt_id": pl.String, "prompt_set": pl.String, "messages": MESSAGES},
    )


def _responses(number: int, **texts: str) -> pl.DataFrame:
    rows = [(f"p{index}", model, texts.get(model, f"by {model}")) for index in range(number) for model in "abc"]
    return pl.DataFrame(
        rows, schema={"prompt_id": pl.String, "policy_model": pl.String, "response": pl.String}, orient="row"
    )


def _scores(*cells: tuple[float | None, float | None, float | None]) -> pl.DataFrame:
    rows = [
        (f"p{index}", model, score)
        for index, scores in enumerate(cells)
        for model, score in zip("abc", scores, strict=True)
        if score is not None
    ]
    return pl.DataFrame(
        rows, schema={"prompt_id": pl.String, "policy_model": pl.String, "score": pl.Float64}, orient="row"
    )


def _selection(overvalued: str, references: str) -> Selection:
    sides = [tuple(ModelChoice(policy_model=name, reason="test") for name in side) for side in (overvalued, references)]
    return Selection(overvalued=sides[0], references=sides[1])


def _orders(frame: pl.DataFrame) -> list[tuple[str, str, str]]:
    return frame.select("prompt_id", "chosen_model", "rejected_model").rows()


def test_a_worked_example() -> None:
    pairs = build_preference_pairs(
        _prompts(1), _responses(1), _scores((3.0, 2.0, None)), {"a": -1.5, "b": 0.0, "c": 0.0}, ALL
    )
    assert validate(pairs.frame, PAIRS).equals(pairs.frame)
    row = pairs.frame.row(0, named=True)
    assert row["prompt"] == [{"role": "user", "content": "question 0"}]
    assert row["chosen"] == [{"role": "assistant", "content": "by b"}]
    assert row["rejected"] == [{"role": "assistant", "content": "by a"}]
    assert (row["chosen_model"], row["rejected_model"]) == ("b", "a")
    assert (row["chosen_score"], row["rejected_score"]) == (2.0, 3.0)
    assert (row["chosen_calibrated"], row["rejected_calibrated"], row["margin"]) == (2.0, 1.5, 0.5)
    assert row["flipped"] is True
    assert pairs.summary.flip_rate == 1.0
    assert pairs.summary.median_margin == 0.5


def test_the_control_flips_nothing() -> None:
    pairs = build_preference_pairs(_prompts(2), _responses(2), _scores((3, 2, 1), (1, 2, 3)), ZERO, ALL)
    assert (pairs.summary.pairs, pairs.summary.flipped) == (6, 0)
    assert (pairs.frame["margin"] == pairs.frame["chosen_score"] - pairs.frame["rejected_score"]).all()


def test_ties_and_identical_texts_give_no_pair() -> None:
    pairs = build_preference_pairs(
        _prompts(2), _responses(2, c="by b"), _scores((1.0, 1.0, 5.0), (2.0, 1.0, 1.5)), ZERO, ALL
    )
    assert _orders(pairs.frame) == [("p0", "c", "a"), ("p1", "a", "b"), ("p1", "a", "c")]
    assert (pairs.summary.ties_dropped, pairs.summary.identical_dropped) == (1, 2)


def test_a_raw_tie_that_offsets_break_is_a_pair_but_not_a_flip() -> None:
    pairs = build_preference_pairs(_prompts(1), _responses(1), _scores((1.0, 1.0, None)), {"a": 0.5, "b": 0.0}, ALL)
    assert _orders(pairs.frame) == [("p0", "a", "b")]
    assert pairs.summary.flipped == 0


def test_each_overvalued_model_meets_each_reference() -> None:
    config = PreferenceConfig()
    pairs = build_preference_pairs(_prompts(1), _responses(1), _scores((3, 2, 1)), ZERO, config, _selection("ab", "c"))
    assert _orders(pairs.frame) == [("p0", "a", "c"), ("p0", "b", "c")]
    only_named = build_preference_pairs(
        _prompts(1), _responses(1), _scores((3, 2, 1)), {"a": 0.0, "c": 0.0}, config, _selection("a", "c")
    )
    assert _orders(only_named.frame) == [("p0", "a", "c")]


def test_extremes_are_of_the_calibrated_scores() -> None:
    config = PreferenceConfig(strategy="extremes")
    pairs = build_preference_pairs(
        _prompts(3),
        _responses(3),
        _scores((3, 2, 1), (1, 1, 1), (4, None, None)),
        {"a": -5.0, "b": 0.0, "c": 0.0},
        config,
    )
    assert _orders(pairs.frame) == [("p0", "b", "a"), ("p1", "b", "a")]
    assert pairs.frame["flipped"].to_list() == [True, False]


def test_small_margins_can_be_left_out() -> None:
    config = PreferenceConfig(strategy="all_pairs", min_margin=1.0)
    pairs = build_preference_pairs(_prompts(1), _responses(1), _scores((3.0, 2.5, 2.0)), ZERO, config)
    assert _orders(pairs.frame) == [("p0", "a", "c")]
    assert pairs.summary.small_margin_dropped == 2


def test_a_limit_keeps_the_same_candidates_whatever_the_offsets() -> None:
    config = PreferenceConfig(strategy="all_pairs", max_pairs_per_prompt=1, seed=3)
    cells = _scores(*[(3.0, 2.0, 1.0)] * 30)
    control, debiased = (
        build_preference_pairs(_prompts(30), _responses(30), cells, offsets, config)
        for offsets in (ZERO, {"a": -9.0, "b": 0.0, "c": 4.0})
    )

    def unordered(frame: pl.DataFrame) -> list[tuple[str, frozenset[str]]]:
        return [(prompt, frozenset(models)) for prompt, *models in _orders(frame)]

    assert sorted(unordered(control.frame), key=str) == sorted(unordered(debiased.frame), key=str)
    assert control.summary.pairs == 30
    assert control.summary.over_limit_dropped == 60
    assert len(set(unordered(control.frame))) == 30
    assert len({models for _, models in unordered(control.frame)}) == 3


def test_the_split_is_by_prompt_and_its_rows_add_up() -> None:
    config = PreferenceConfig(strategy="all_pairs", held_out_fraction=0.3)
    pairs = build_preference_pairs(_prompts(200), _responses(200), _scores(*[(3, 2, 1)] * 200), ZERO, config)
    sides = pairs.frame.group_by("prompt_id").agg(pl.col("split").n_unique())["split"]
    assert sides.max() == 1
    summary = pairs.summary
    assert summary.train + summary.held_out == summary.pairs == 600
    assert summary.train_prompts + summary.held_out_prompts == 200
    assert 40 <= summary.held_out_prompts <= 80


def test_the_split_hangs_on_the_text_alone() -> None:
    golden = json.loads((GOLDEN / "prompt_split.json").read_text())
    split = split_prompts(_prompts(len(golden["split"])), golden["held_out_fraction"], golden["seed"])
    assert split["split"].to_list() == golden["split"]
    renamed = _prompts(20).with_columns(pl.format("other-{}", "prompt_id").alias("prompt_id"))
    assert split_prompts(renamed, 0.5)["split"].equals(split_prompts(_prompts(20), 0.5)["split"])


def test_another_seed_is_another_split() -> None:
    one, two = (split_prompts(_prompts(100), 0.5, seed)["split"].to_list() for seed in (0, 1))
    assert one != two


@settings(max_examples=20, deadline=None)
@given(fraction=st.floats(0, 0.99), more=st.floats(0, 0.99))
def test_a_larger_fraction_holds_out_more_of_the_same(fraction: float, more: float) -> None:
    low, high = sorted((fraction, more))
    smaller, larger = (split_prompts(_prompts(50), share)["split"].to_list() for share in (low, high))
    assert all(b == "held_out" for a, b in zip(smaller, larger, strict=True) if a == "held_out")


def test_no_pair_at_all_is_a_summary_not_a_crash() -> None:
    pairs = build_preference_pairs(_prompts(1), _responses(1), _scores((1.0, 1.0, 1.0)), ZERO, ALL)
    assert pairs.frame.is_empty()
    assert (pairs.summary.pairs, pairs.summary.flip_rate, pairs.summary.median_margin) == (0, 0.0, None)


def test_a_strategy_without_its_models_is_an_error() -> None:
    for selection in (None, _selection("", "a")):
        with pytest.raises(ConfigError, match="at least one overvalued and one reference model"):
            build_preference_pairs(_prompts(1), _responses(1), _scores((1, 2, 3)), ZERO, PreferenceConfig(), selection)


def test_scores_of_unknown_texts_are_errors() -> None:
    with pytest.raises(TableError, match=r"3 scores have no prompt .*'p1'"):
        build_preference_pairs(_prompts(1), _responses(2), _scores((1, 2, 3), (1, 2, 3)), ZERO, ALL)
    with pytest.raises(TableError, match=r"3 scores have no response .*'p1'"):
        build_preference_pairs(_prompts(2), _responses(1), _scores((1, 2, 3), (1, 2, 3)), ZERO, ALL)


def test_a_model_without_an_offset_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"no offset for the policy models \[c\]"):
        build_preference_pairs(_prompts(1), _responses(1), _scores((1, 2, 3)), {"a": 0.0, "b": 0.0}, ALL)


def test_a_limit_on_all_pairs_keeps_whole_random_prompts_whatever_the_offsets() -> None:
    draws = [(float(n % 5), float(n % 3), float(n % 7) + 0.5) for n in range(40)]
    limited = ALL.model_copy(update={"max_pairs": 30, "held_out_fraction": 0.0})
    built = [
        build_preference_pairs(_prompts(40), _responses(40), _scores(*draws), offsets, limited)
        for offsets in (ZERO, {"a": 2.0, "b": 0.25, "c": 0.0})
    ]
    prompts = [set(pairs.frame["prompt_id"]) for pairs in built]
    assert prompts[0] == prompts[1]
    assert len(prompts[0]) == 10
    assert prompts[0] != {f"p{n}" for n in range(10)}
    assert built[1].frame.height == 30
    assert built[1].summary.over_limit_dropped == 40 * 3 - 30
    other = build_preference_pairs(
        _prompts(40), _responses(40), _scores(*draws), ZERO, limited.model_copy(update={"seed": 1})
    )
    assert set(other.frame["prompt_id"]) != prompts[0]
