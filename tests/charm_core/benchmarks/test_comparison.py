import numpy as np
import polars as pl
import pytest
from scipy.stats import binomtest

from charm_core.agreement import mcnemar
from charm_core.benchmarks.benchmark import Benchmark, benchmark_outcomes, benchmark_texts
from charm_core.benchmarks.comparison import compare_outcomes, sidak_adjusted
from charm_core.benchmarks.rewardbench import rewardbench
from charm_core.benchmarks.rewardbench_2 import rewardbench_2
from charm_core.benchmarks.rmb import rmb
from charm_core.errors import TableError
from tests.charm_core.benchmarks.made_up import best_of_four, outcomes_as_written, pair


def _outcomes(benchmark: Benchmark, right: set[str]) -> pl.DataFrame:
    """Of a reward model that is right on these prompts: it prefers the response "c", otherwise "r"."""
    prompts, responses = benchmark_texts([benchmark])
    texts = prompts.select("prompt_id", prompt=pl.col("messages").list.first().struct.field("content"))
    score = (
        pl.when(pl.col("prompt").is_in(sorted(right)))
        .then(pl.col("response") == "c")
        .otherwise(pl.col("response") == "r")
    )
    scores = responses.join(texts, on="prompt_id").select("prompt_id", "policy_model", score=score.cast(pl.Float64))
    return benchmark_outcomes(benchmark, scores)


def _benchmark(sizes: dict[str, int]) -> Benchmark:
    return rewardbench(pair(n, subset, "c", "r") for subset, size in sizes.items() for n in range(size))


def _prompts(subset: str, *numbers: int) -> set[str]:
    return {f"{subset} {number}" for number in numbers}


def test_mcnemar_per_subset_and_its_corrections() -> None:
    benchmark = _benchmark({"hep-go": 20, "hep-js": 20})
    before = _outcomes(benchmark, _prompts("hep-go", 0, 1) | _prompts("hep-js", *range(10)))
    after = _outcomes(benchmark, _prompts("hep-go", 0, *range(2, 12)) | _prompts("hep-js", *range(12)))
    figures = {figure.subset: figure for figure in compare_outcomes(benchmark, before, after).figures}
    go, js = figures["hep-go"], figures["hep-js"]
    assert (go.before, go.after, go.difference.value) == (0.1, 0.55, pytest.approx(0.45))
    assert (go.test.name, go.test.only_before, go.test.only_after) == ("McNemar", 1, 10)
    # 2 · (1 + 11) / 2 ** 11 and 2 · 1 / 2 ** 2
    assert (go.test.p_value, js.test.p_value) == pytest.approx((24 / 2048, 0.5))
    assert (go.test.p_value_holm, js.test.p_value_holm) == pytest.approx((48 / 2048, 0.5))
    assert (go.test.p_value_sidak, js.test.p_value_sidak) == pytest.approx((1 - (1 - 24 / 2048) ** 2, 0.75))


def test_mcnemar_is_the_one_of_agreement() -> None:
    benchmark = _benchmark({"hep-go": 30})
    rng = np.random.default_rng(2)
    first, second = (set(rng.permutation([f"hep-go {n}" for n in range(30)])[:15]) for _ in range(2))
    (figure,) = (
        figure
        for figure in compare_outcomes(benchmark, _outcomes(benchmark, first), _outcomes(benchmark, second)).figures
        if figure.subset == "hep-go"
    )
    names = [f"hep-go {n}" for n in range(30)]
    expected = mcnemar([name in first for name in names], [name in second for name in names])
    assert (figure.test.only_before, figure.test.only_after, figure.test.p_value) == (
        expected.only_a,
        expected.only_b,
        expected.p_value,
    )


def test_averages_have_the_bootstrap_and_no_correction() -> None:
    benchmark = _benchmark({"hep-go": 40, "donotanswer": 40})
    before = _outcomes(benchmark, _prompts("hep-go", *range(10)) | _prompts("donotanswer", *range(20)))
    after = _outcomes(benchmark, _prompts("hep-go", *range(30)) | _prompts("donotanswer", *range(20)))
    overall = compare_outcomes(benchmark, before, after).figures[0]
    assert (overall.subset, overall.test.name) == ("overall", "bootstrap")
    assert overall.difference.value == pytest.approx(0.25)
    assert overall.difference.low is not None
    assert 0.15 < overall.difference.low < 0.25
    assert overall.test.p_value < 1e-6
    assert (overall.test.p_value_sidak, overall.test.p_value_holm, overall.test.only_after) == (None, None, None)


def test_the_bootstrap_is_paired() -> None:
    # two halves of the items, one half right: apart each accuracy varies, their difference does not
    benchmark = _benchmark({"hep-go": 100})
    half = _outcomes(benchmark, _prompts("hep-go", *range(50)))
    figure = compare_outcomes(benchmark, half, half).figures[0]
    assert (figure.difference.low, figure.difference.value, figure.difference.high) == (0.0, 0.0, 0.0)
    assert figure.test.p_value == 1.0


def test_fractional_credit_has_a_sign_test() -> None:
    halves = [best_of_four(n, "Math", "1", "1", "0", "0") for n in range(8)]
    benchmark = rewardbench_2(halves)
    tied = outcomes_as_written(benchmark)
    won = tied.with_columns(
        credit=pl.when(pl.col("item_id") == "Math/0").then(0.25).otherwise(1.0), won=pl.col("item_id") != "Math/0"
    )
    figure = compare_outcomes(benchmark, tied, won).figures[-1]
    assert (figure.test.name, figure.test.only_before, figure.test.only_after) == ("sign", 1, 7)
    assert figure.test.p_value == pytest.approx(binomtest(1, 8).pvalue)


def _rmb_pairs(pairs: int, per_prompt: int) -> Benchmark:
    return rmb(
        {
            "pair_uid": str(n),
            "category_path": "Pairwise_set/Harmlessness/S1",
            "conversation_input": [{"role": "user", "content": f"prompt {n // per_prompt}"}],
            "chosen": {"llm_name": "x", "answer": "c"},
            "reject": {"llm_name": f"y{n}", "answer": "r"},
        }
        for n in range(pairs)
    )


def test_items_that_share_a_prompt_are_one_unit() -> None:
    benchmark = _rmb_pairs(10, per_prompt=5)
    before, after = _outcomes(benchmark, set()), _outcomes(benchmark, {"prompt 0", "prompt 1"})
    figures = compare_outcomes(benchmark, before, after).figures
    pairwise = next(figure for figure in figures if figure.subset == "Harmlessness")
    # ten pairs gained, but only two prompts: nothing is proven
    assert (pairwise.test.name, pairwise.test.only_after, pairwise.test.p_value) == ("sign", 2, 0.5)
    assert pairwise.items == 10


def test_what_one_unit_gains_and_loses_cancels() -> None:
    benchmark = _rmb_pairs(4, per_prompt=2)
    base = _outcomes(benchmark, set())
    right = pl.Series(np.repeat([1.0, 0.0, 1.0, 1.0], 2))  # each item in its goal and in its category
    wrong = pl.Series(np.repeat([0.0, 1.0, 0.0, 1.0], 2))
    before, after = (base.with_columns(credit=column) for column in (right, wrong))
    figure = compare_outcomes(benchmark, before, after).figures[-1]
    # the first prompt loses one pair and gains another, the second loses one
    assert (figure.test.name, figure.test.only_before, figure.test.only_after, figure.test.p_value) == (
        "sign",
        1,
        0,
        1.0,
    )


def test_only_the_same_items_can_be_compared() -> None:
    one, two = _benchmark({"hep-go": 3}), _benchmark({"hep-go": 4})
    with pytest.raises(TableError, match=r"not judged on the same items of RewardBench: only one has \('hep-go/3'"):
        compare_outcomes(one, _outcomes(one, set()), _outcomes(two, set()))
    other_units = _outcomes(one, set()).with_columns(unit=pl.lit("all"))
    with pytest.raises(TableError, match="their units differ"):
        compare_outcomes(one, _outcomes(one, set()), other_units)


def test_sidak_worked_example() -> None:
    np.testing.assert_allclose(sidak_adjusted(np.array([0.01, 0.5, 1.0, 0.0])), [1 - 0.99**4, 1 - 0.5**4, 1.0, 0.0])
    # small p-values keep their digits
    assert sidak_adjusted(np.array([1e-20, 1.0]))[0] == pytest.approx(2e-20)
