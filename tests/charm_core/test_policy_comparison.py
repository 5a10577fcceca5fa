import numpy as np
import polars as pl
import pytest

from charm_core.errors import TableError
from charm_core.policy_comparison import ComparisonConfig, PolicyComparison, compare_policies

CONFIG = ComparisonConfig(bootstrap_replicates=200)


def table(values: dict[str, list[float | None]]) -> pl.DataFrame:
    rows = [
        (f"p{number:02d}", model, value)
        for model, column in values.items()
        for number, value in enumerate(column)
        if value is not None
    ]
    return pl.DataFrame(rows, schema=["prompt_id", "policy_model", "score"], orient="row")


def difference(found: PolicyComparison, before: str, after: str, measure: str = "quality"):
    (item,) = [
        item for item in found.differences if (item.before, item.after, item.measure) == (before, after, measure)
    ]
    return item.difference


def test_a_worked_example():
    quality = table({"base": [1.0, 2.0, 3.0, 4.0], "better": [2.0, 3.0, 3.0, 9.0]})
    found = compare_policies(
        {"quality": quality}, ["base", "better"], [("base", "better")], CONFIG, decided_by={"truth": "quality"}
    )
    assert found.prompts == 4
    assert [mean.value.value for mean in found.means] == [2.5, 4.25]
    assert difference(found, "base", "better").value == 1.75
    (win,) = found.win_rates
    # three wins and a tie
    assert (win.policy_model, win.opponent, win.judge, win.prompts) == ("better", "base", "truth", 4)
    assert win.win_rate.value == 3.5 / 4


def test_differences_are_paired_by_prompt():
    hard = np.random.default_rng(0).normal(0, 10, 50)
    quality = table({"base": list(hard), "better": list(hard + 0.5)})
    found = compare_policies({"quality": quality}, ["base", "better"], [("base", "better")], CONFIG)
    gain = difference(found, "base", "better")
    assert (gain.value, gain.low, gain.high) == pytest.approx((0.5, 0.5, 0.5))
    spread = found.means[0].value
    assert spread.high - spread.low > 1


def test_only_prompts_that_all_answered_count():
    quality = table({"a": [1.0, 2.0, None, 5.0], "b": [1.0, None, 7.0, 4.0]})
    length = table({"a": [10.0, 20.0, 30.0, None], "b": [10.0, 20.0, 30.0, 40.0]})
    found = compare_policies({"quality": quality, "length": length}, ["b", "a"], [("b", "a")], CONFIG)
    assert found.prompts == 1
    assert difference(found, "b", "a").value == 0.0
    assert found.policy_models == ("b", "a")


def test_a_judge_decides_whichever_side_it_named_first():
    quality = table({"base": [0.0, 0.0], "new": [0.0, 0.0]})
    preferences = pl.DataFrame(
        {
            "prompt_id": ["p00", "p01", "p02"],
            "model_a": ["base", "new", "base"],
            "model_b": ["new", "base", "other"],
            "preference_a": [0.25, 1.0, 0.0],
        }
    )
    pairs = [("base", "new"), ("new", "base")]
    found = compare_policies({"q": quality}, ["base", "new"], pairs, CONFIG, preferences={"judge": preferences})
    assert [(win.policy_model, win.win_rate.value, win.prompts) for win in found.win_rates] == [
        ("new", 0.875, 2), ("base", 0.125, 2)
    ]  # fmt: skip


def test_what_cannot_be_compared_says_why():
    with pytest.raises(TableError, match="no prompt has a measured response of all of"):
        compare_policies({"q": table({"a": [1.0, None], "b": [None, 2.0]})}, ["a", "b"], [])
    with pytest.raises(TableError, match="at least one measure"):
        compare_policies({}, ["a", "b"], [])
