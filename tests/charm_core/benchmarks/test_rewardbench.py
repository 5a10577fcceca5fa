from pathlib import Path
from typing import Any

import polars as pl
import pytest

from charm_core.benchmarks.benchmark import length_outcomes
from charm_core.benchmarks.figures import roll_up
from charm_core.benchmarks.outcomes import Measure
from charm_core.benchmarks.results import benchmark_result
from charm_core.benchmarks.rewardbench import OFFICIAL_ITEMS, PRIOR_ROLLUPS, ROLLUPS, SECTIONS, rewardbench
from tests.charm_core.benchmarks.made_up import pair, result_as_written, values

# right items per subset of two reward models whose figures are published (RM-R1-UIUC/RM-R1, arXiv 2505.02387)
RIGHT = {
    "RM-R1-Qwen2.5-Instruct-32B": {
        "alpacaeval-easy": 94, "alpacaeval-hard": 91, "alpacaeval-length": 91, "mt-bench-easy": 26, "mt-bench-med": 39,
        "mt-bench-hard": 31, "llmbar-natural": 95, "llmbar-adver-neighbor": 104, "llmbar-adver-GPTInst": 78,
        "llmbar-adver-GPTOut": 34, "llmbar-adver-manual": 37,
        "refusals-dangerous": 93, "refusals-offensive": 98, "xstest-should-refuse": 152, "xstest-should-respond": 235,
        "donotanswer": 102,
        "math-prm": 416, "hep-cpp": 162, "hep-go": 159, "hep-java": 157, "hep-js": 161, "hep-python": 160, "hep-rust": 159,
    },
    "RM-R1-DeepSeek-Distilled-Qwen-32B": {
        "alpacaeval-easy": 96, "alpacaeval-hard": 89, "alpacaeval-length": 88, "mt-bench-easy": 28, "mt-bench-med": 40,
        "mt-bench-hard": 26, "llmbar-natural": 93, "llmbar-adver-neighbor": 100, "llmbar-adver-GPTInst": 73,
        "llmbar-adver-GPTOut": 34, "llmbar-adver-manual": 40,
        "refusals-dangerous": 91, "refusals-offensive": 99, "xstest-should-refuse": 152, "xstest-should-respond": 235,
        "donotanswer": 97,
        "math-prm": 438, "hep-cpp": 161, "hep-go": 157, "hep-java": 156, "hep-js": 154, "hep-python": 159, "hep-rust": 154,
    },
}  # fmt: skip
PUBLISHED = {
    "RM-R1-Qwen2.5-Instruct-32B": {"Chat": 95.3, "Chat Hard": 83.1, "Safety": 91.9, "Reasoning": 95.2, "overall": 91.4},
    "RM-R1-DeepSeek-Distilled-Qwen-32B": {
        "Chat": 95.3, "Chat Hard": 80.3, "Safety": 91.1, "Reasoning": 96.8, "overall": 90.9,
    },
}  # fmt: skip


def _subset(subset: str, right: int) -> list[dict[str, Any]]:
    items = OFFICIAL_ITEMS[Measure(subset, "accuracy")]
    return [pair(n, subset, *(("1", "0") if n < right else ("0", "1"))) for n in range(items)]


def test_the_official_sizes() -> None:
    assert len(OFFICIAL_ITEMS) == 23
    assert sum(OFFICIAL_ITEMS.values()) == 2985
    assert {section: sum(weights.values()) for section, weights in SECTIONS.items()} == {
        "Chat": 358,
        "Chat Hard": 456,
        "Safety": 740,
        "Reasoning": 984 + 984,
    }


@pytest.mark.parametrize("model", RIGHT)
def test_published_sections_follow_from_the_right_items_of_each_subset(model: str) -> None:
    result = result_as_written(rewardbench(row for subset, n in RIGHT[model].items() for row in _subset(subset, n)))
    found = values(result)
    assert {section: round(100 * (found[section, "accuracy"] or 0.0), 1) for section in PUBLISHED[model]} == PUBLISHED[
        model
    ]
    assert {figure.note for figure in result.figures} == {""}
    assert result.figure("overall").items == 2985


def test_the_xstest_weights_are_not_swapped() -> None:
    # all wrong but xstest-should-respond, which has 250 of the section's 740
    rows = [
        row for subset in SECTIONS["Safety"] for row in _subset(subset, 0 if subset != "xstest-should-respond" else 250)
    ]
    assert result_as_written(rewardbench(rows)).figure("Safety").value.value == pytest.approx(250 / 740)


def test_math_counts_as_much_as_code() -> None:
    rows = [row for subset in SECTIONS["Reasoning"] for row in _subset(subset, 447 if subset == "math-prm" else 0)]
    assert result_as_written(rewardbench(rows)).figure("Reasoning").value.value == 0.5


def test_a_tie_is_a_loss() -> None:
    figure = result_as_written(rewardbench([pair(1, "hep-go", "1", "1")])).figure("hep-go")
    assert (figure.value.value, figure.tie_rate) == (0.0, 1.0)


def test_sections_count_the_same_whatever_their_size() -> None:
    rows = [pair(1, "hep-go", "1", "0")] + [pair(n, "donotanswer", "0", "1") for n in range(5)]
    assert result_as_written(rewardbench(rows)).figure("overall").value.value == 0.5


def test_prior_sets_are_a_fifth_section_with_half_weight() -> None:
    rows = [
        pair(1, "hep-go", "1", "0"),
        pair(1, "shp", "0", "1"),
        pair(1, "summarize", "1", "0"),
        pair(2, "summarize", "1", "0"),
    ]
    result = result_as_written(rewardbench(rows))
    # the prior sets count the same whatever their size: (0 + 1) / 2
    assert result.figure("Prior Sets").value.value == 0.5
    assert result.figure("overall").value.value == 1.0
    assert result.figure("overall with prior sets").value.value == pytest.approx((1.0 + 0.5 * 0.5) / 1.5)
    with_prior = roll_up(
        {
            Measure(part, "accuracy"): value
            for part, value in zip([*SECTIONS, "Prior Sets"], (0.9, 0.5, 0.8, 0.6, 0.4), strict=True)
        },
        (*ROLLUPS, *PRIOR_ROLLUPS[1:]),
    )
    assert with_prior[Measure("overall with prior sets", "accuracy")] == pytest.approx(
        (0.9 + 0.5 + 0.8 + 0.6 + 0.2) / 4.5
    )


def test_a_prompt_may_be_a_conversation() -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    (item,) = rewardbench([pair(1, "anthropic_hhh", "1", "0") | {"prompt": turns}]).items
    assert [message.content for message in item.messages] == ["a", "b", "c"]


@pytest.mark.real
def test_every_published_row_follows_from_its_sections(shared_data: Path) -> None:
    published = pl.read_csv(shared_data / "published_rm_benchmark_scores.csv").filter(
        (pl.col("benchmark") == "RewardBench v1") & (pl.col("metric") != "score")
    )
    rows = published.pivot(on="metric", index="model", values="value").to_dicts()
    assert len(rows) == 12
    columns = {
        "Chat": "chat",
        "Chat Hard": "chat_hard",
        "Safety": "safety",
        "Reasoning": "reasoning",
        "Prior Sets": "prior_sets",
    }
    for row in rows:
        parts = {Measure(section, "accuracy"): row[column] for section, column in columns.items()}
        rolled = roll_up(parts, (*ROLLUPS, *PRIOR_ROLLUPS))
        # parts and wholes are rounded to 0.1
        assert rolled[Measure("overall with prior sets", "accuracy")] == pytest.approx(
            row["avg_with_prior_sets"], abs=0.1
        ), row


@pytest.mark.real
def test_real_rows_and_their_length_baseline(shared_data: Path) -> None:
    rows = pl.read_parquet(shared_data / "rewardbench_partial.parquet").rename({"item": "id"})
    benchmark = rewardbench(rows.iter_rows(named=True))
    result = benchmark_result(benchmark, length_outcomes(benchmark), replicates=100)
    assert len(benchmark.items) == 1403
    assert result.figure("Chat Hard").note == "without mt-bench-hard: not comparable with published figures"
    assert result.figure("Reasoning").note == "without math-prm: not comparable with published figures"
    subsets = [figure for figure in result.figures if Measure(figure.subset, figure.metric) in OFFICIAL_ITEMS]
    assert len(subsets) == 11
    for figure in subsets:
        assert figure.items == OFFICIAL_ITEMS[Measure(figure.subset, figure.metric)]
        assert figure.note == ""
        assert figure.length_only == figure.value.value
    # adversarial items were made so that length misleads; a bug changes the length of code either way
    assert result.figure("llmbar-adver-GPTInst").length_only < 0.25
    assert 0.3 < result.figure("Reasoning").length_only < 0.7
