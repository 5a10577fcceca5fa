import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray

from charm_core.benchmarks.benchmark import length_outcomes
from charm_core.benchmarks.figures import roll_up
from charm_core.benchmarks.outcomes import Measure
from charm_core.benchmarks.results import benchmark_result
from charm_core.benchmarks.rm_bench import (
    DIFFICULTIES,
    DOMAINS,
    OFFICIAL_ITEMS,
    ROLLUPS,
    RmBenchItem,
    parse_rm_bench,
    rm_bench,
)
from charm_core.errors import TableError
from tests.charm_core.benchmarks.made_up import outcomes_as_written, result_as_written, values

CONTRADICTORY = {
    # domain mean and difficulty mean differ
    "REWARDANYTHING-8B",
    "RM-R1-Qwen-Instruct-32B",
    "GPT-4.1",
    "Qwen3-8B",
    "DeepSeek V3",
    "Skywork-Reward-Llama-3.1-8B-v0.2",
    "GRM-Llama3.2-3B-rewardmodel-ft",
    "FsfairX-LLLaMA3-RM-v0.1",
    # both agree on 76.3, the overall figure says 76.1
    "RM-R1-Qwen-Instruct-14B",
}
"""Rows of the published leaderboard that contradict themselves."""


def _raw(number: int, **changes: Any) -> dict[str, Any]:
    item = {
        "id": number,
        "prompt": f"q{number}",
        "chosen": ["aa", "bbbb", "cccccc"],
        "rejected": ["d", "eeeee", "ffffff"],
    }
    return item | changes


def _items(file: str, *both: tuple[list[float], list[float]]) -> tuple[RmBenchItem, ...]:
    """Items whose responses are their scores."""
    raw = [
        _raw(number, prompt=f"{file} {number}", chosen=[str(v) for v in chosen], rejected=[str(v) for v in rejected])
        for number, (chosen, rejected) in enumerate(both)
    ]
    return parse_rm_bench([item | {"domain": file} for item in raw])


RIGHT, WRONG = ([9, 9, 9], [0, 0, 0]), ([0, 0, 0], [9, 9, 9])


def test_one_item_by_hand() -> None:
    # chosen 1, 2, 3 against rejected 0.5, 2, 2.5:   > rejected 0.5  2    2.5
    #   hard: (1>2, 1>2.5, 2>2.5) = 0/3   chosen 1        T        F    F
    #   normal: (1>.5, 2>2, 3>2.5) = 2/3  chosen 2        T        F    F
    #   easy: (2>.5, 3>.5, 3>2) = 3/3     chosen 3        T        T    T
    result = result_as_written(rm_bench(_items("chat", ([1, 2, 3], [0.5, 2, 2.5]))))
    found = values(result)
    assert [found["overall", name] for name in DIFFICULTIES] == pytest.approx([0.0, 2 / 3, 1.0])
    assert found["overall", "accuracy"] == pytest.approx(5 / 9)
    assert result.figure("overall").tie_rate == pytest.approx(1 / 9)


def test_the_upper_triangle_is_plain_chosen_against_styled_rejected() -> None:
    # only the plainest chosen response beats only the most styled rejected one
    found = values(result_as_written(rm_bench(_items("chat", ([5, 0, 0], [9, 9, 1])))))
    assert [found["chat", name] for name in DIFFICULTIES] == pytest.approx([1 / 3, 0.0, 0.0])


def test_the_safety_files_are_pooled_by_item() -> None:
    items = _items("safety-refuse", RIGHT, RIGHT, RIGHT) + _items("safety-response", WRONG)
    safety = result_as_written(rm_bench(items)).figure("safety")
    assert (safety.items, safety.value.value) == (4, 0.75)


def test_domains_count_the_same_whatever_their_size() -> None:
    result = result_as_written(rm_bench(_items("chat", RIGHT) + _items("code", WRONG, WRONG, WRONG)))
    assert (result.figure("overall", "hard").value.value, result.figure("overall").value.value) == (0.5, 0.5)


def test_ties_are_losses() -> None:
    figure = result_as_written(rm_bench(_items("math", ([1, 1, 1], [1, 1, 1])))).figure("overall")
    assert (figure.value.value, figure.tie_rate) == (0.0, 1.0)


def test_the_length_baseline_is_scoring_by_length() -> None:
    benchmark = rm_bench(parse_rm_bench([_raw(1), _raw(2, chosen=["x", "y" * 9, "z"])], "chat"))
    # of the first item: hard 0/3; of the second "x" and the nine "y" against 1, 5 and 6 letters: one of three
    outcomes = length_outcomes(benchmark).filter(pl.col("metric") == "hard").sort("item_id")
    assert outcomes["credit"].to_list() == pytest.approx([0.0, 1 / 3])


def test_the_file_can_come_from_the_items() -> None:
    items = parse_rm_bench([_raw(1, domain="safety-refuse"), _raw(1, domain="math")])
    assert [(item.file, item.domain) for item in items] == [("safety-refuse", "safety"), ("math", "math")]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (_raw(1, domain="poetry"), "domain 'poetry'; it must be one of"),
        ({"id": 1, "prompt": "q", "domain": "chat", "chosen": ["a", "b", "c"]}, r"lacks \['rejected'\]"),
        (_raw(1, domain="chat", chosen=["a", "b"]), "three chosen and three rejected"),
        (_raw(1, domain="chat", prompt=None), "needs a prompt"),
    ],
)
def test_bad_items(item: dict[str, Any], message: str) -> None:
    with pytest.raises(TableError, match=message):
        parse_rm_bench([item])


def test_an_item_twice_is_an_error() -> None:
    with pytest.raises(TableError, match="'chat/1' occurs twice"):
        parse_rm_bench([_raw(1), _raw(1)], "chat")


def test_no_items_are_an_error() -> None:
    with pytest.raises(TableError, match="no items"):
        rm_bench(())


def _random_items(sizes: dict[str, int]) -> tuple[RmBenchItem, ...]:
    rng = np.random.default_rng(0)
    items: tuple[RmBenchItem, ...] = ()
    for file, size in sizes.items():
        raw = [
            _raw(
                n,
                prompt=f"{file} {n}",
                **{side: [str(v) for v in rng.integers(0, 4, 3)] for side in ("chosen", "rejected")},
            )
            for n in range(size)
        ]
        items += parse_rm_bench([item | {"domain": file} for item in raw])
    return items


def _wins(items: Sequence[RmBenchItem]) -> NDArray[np.bool_]:
    """Shape ``(items, 3, 3)``: chosen style by rejected style, from responses that are their scores."""
    chosen, rejected = (np.asarray([[float(v) for v in getattr(item, side)] for item in items]) for side in _SIDES)
    return np.asarray(chosen[:, :, None] > rejected[:, None, :])


_SIDES = ("chosen", "rejected")
_CELLS = {"hard": [(0, 1), (0, 2), (1, 2)], "normal": [(0, 0), (1, 1), (2, 2)], "easy": [(1, 0), (2, 0), (2, 1)]}


def _means(wins: NDArray[np.bool_]) -> dict[str, float]:
    return {name: float(np.mean([wins[:, i, j].mean() for i, j in cells])) for name, cells in _CELLS.items()}


def test_the_figures_are_those_of_the_matrices() -> None:
    items = _random_items({"chat": 7, "math": 11, "code": 5, "safety-refuse": 3, "safety-response": 4})
    wins, domains = _wins(items), np.asarray([item.domain for item in items])
    expected = {domain: _means(wins[domains == domain]) for domain in DOMAINS}
    result = result_as_written(rm_bench(items))
    found = values(result)
    for domain, means in expected.items():
        assert found[domain, "accuracy"] == pytest.approx(np.mean(list(means.values())))
        for difficulty, mean in means.items():
            assert found[domain, difficulty] == pytest.approx(mean)
    for difficulty in DIFFICULTIES:
        assert found["overall", difficulty] == pytest.approx(np.mean([one[difficulty] for one in expected.values()]))
    assert found["overall", "accuracy"] == pytest.approx(np.mean([list(one.values()) for one in expected.values()]))
    assert (result.figure("overall").items, result.figure("safety").items) == (30, 7)
    assert [(figure.subset, figure.metric) for figure in result.figures[:4]] == [
        ("overall", "accuracy"),
        ("overall", "hard"),
        ("overall", "normal"),
        ("overall", "easy"),
    ]


def test_the_intervals_are_those_of_drawing_items_within_domains() -> None:
    items = _random_items({"chat": 30, "math": 40})
    wins, domains = _wins(items), np.asarray([item.domain for item in items])
    rng, drawn = np.random.default_rng(0), []
    for _ in range(4000):
        parts = [part[rng.integers(0, len(part), len(part))] for part in (wins[domains == d] for d in ("chat", "math"))]
        drawn.append([_means(part) for part in parts])
    benchmark = rm_bench(items)
    result = benchmark_result(benchmark, outcomes_as_written(benchmark), replicates=4000)
    for metric in DIFFICULTIES:
        value = result.figure("overall", metric).value
        expected = np.quantile([np.mean([one[metric] for one in both]) for both in drawn], [0.025, 0.975])
        assert (value.low, value.high) == pytest.approx(tuple(expected), abs=0.01)


def test_an_item_is_won_per_difficulty_if_all_three_comparisons_are() -> None:
    # hard: 2>2 (tie), 2>1, 3>1; normal: 2>1, 3>2, 9>1; easy: 3>1, 9>1, 9>2
    (item,) = parse_rm_bench([_raw(1, chosen=["2", "3", "9"], rejected=["1", "2", "1"])], "chat")
    table = outcomes_as_written(rm_bench([item])).select("metric", "credit", "won", "tied")
    assert {row["metric"]: (row["won"], row["tied"]) for row in table.to_dicts()} == {
        "hard": (False, pytest.approx(1 / 3)),
        "normal": (True, 0.0),
        "easy": (True, 0.0),
    }


def test_a_missing_domain_is_said() -> None:
    result = result_as_written(rm_bench(_random_items({"chat": 2})))
    assert result.figure("overall", "hard").note == (
        "without math and code and safety: not comparable with published figures"
    )
    assert result.figure("chat").note == "2 of 129 items: not comparable with published figures"


@pytest.mark.real
def test_every_published_row_is_recomputed_from_its_parts(shared_data: Path) -> None:
    table = pl.read_csv(shared_data / "published_rm_benchmark_scores.csv").filter(
        (pl.col("benchmark") == "RM-Bench") & pl.col("source").str.contains("RM-Bench-Leaderboard")
    )
    rows = table.pivot(on="metric", index="model", values="value").to_dicts()
    assert len(rows) == 51
    overall = Measure("overall", "accuracy")
    contradictory, recomputed = set(), 0
    for row in rows:
        by_domain = {Measure(name, "accuracy"): row[name] for name in DOMAINS if row[name] is not None}
        difficulties = [row[name] for name in DIFFICULTIES if row[name] is not None]
        wholes = [roll_up(by_domain, ROLLUPS)[overall]] if len(by_domain) == 4 else []
        wholes += [float(np.mean(difficulties))] if len(difficulties) == 3 else []
        # parts and wholes are rounded to 0.1
        wrong = [whole for whole in wholes if abs(whole - row["overall"]) > 0.101]
        contradictory |= {row["model"]} if wrong else set()
        recomputed += bool(wholes)
    assert contradictory == CONTRADICTORY
    assert recomputed == 49  # two rows publish no parts: J1-Llama-70B and EvalPlanner-Llama-8B


@pytest.mark.real
def test_the_real_files_and_their_length_baseline(shared_data: Path) -> None:
    items: tuple[RmBenchItem, ...] = ()
    for file in ("chat", "code", "safety-refuse", "safety-response"):
        items += parse_rm_bench(json.loads((shared_data / "rm_bench" / f"{file}_filtered.json").read_text()), file)
    benchmark = rm_bench(items)
    result = benchmark_result(benchmark, length_outcomes(benchmark), replicates=100)
    # longer styles come later: length alone finds the easy comparisons and loses the hard ones
    assert result.figure("overall", "easy").length_only > 0.8
    assert result.figure("overall", "hard").length_only < 0.2
    assert result.figure("overall").value.value == pytest.approx(result.figure("overall").length_only)
    assert result.figure("chat", "hard").note == ""
    for domain in ("chat", "code", "safety"):
        assert result.figure(domain, "hard").items == OFFICIAL_ITEMS[Measure(domain, "hard")]
