import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from charm_core.agreement import mcnemar
from charm_core.benchmarks.benchmark import length_outcomes
from charm_core.benchmarks.figures import roll_up
from charm_core.benchmarks.outcomes import Measure
from charm_core.benchmarks.results import benchmark_result
from charm_core.benchmarks.rm_bench import (
    DIFFICULTIES,
    DOMAINS,
    OFFICIAL_ITEMS,
    ROLLUPS,
    DomainAccuracy,
    RmBenchItem,
    accuracy_by_difficulty,
    average_domains,
    parse_rm_bench,
    rm_bench,
    rm_bench_length_baseline,
    rm_bench_replicates,
    rm_bench_texts,
    rm_bench_wins,
    score_rm_bench,
)
from charm_core.errors import TableError
from charm_core.tables import PROMPTS, RESPONSES, validate
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


def _scores(items: tuple[RmBenchItem, ...], values: list[tuple[list[float], list[float]]]) -> pl.DataFrame:
    rows = [
        (item.prompt_id, f"{side}-{style + 1}", float(score))
        for item, both in zip(items, values, strict=True)
        for side, scores in zip(("chosen", "rejected"), both, strict=True)
        for style, score in enumerate(scores)
    ]
    return pl.DataFrame(
        rows, schema={"prompt_id": pl.String, "policy_model": pl.String, "score": pl.Float64}, orient="row"
    )


def test_one_item_by_hand() -> None:
    # chosen 1, 2, 3 against rejected 0.5, 2, 2.5:   > rejected 0.5  2    2.5
    #   hard: (1>2, 1>2.5, 2>2.5) = 0/3   chosen 1        T        F    F
    #   normal: (1>.5, 2>2, 3>2.5) = 2/3  chosen 2        T        F    F
    #   easy: (2>.5, 3>.5, 3>2) = 3/3     chosen 3        T        T    T
    items = parse_rm_bench([_raw(1)], "chat")
    result = score_rm_bench(items, _scores(items, [([1, 2, 3], [0.5, 2, 2.5])]))
    assert (result.hard, result.normal, result.easy) == pytest.approx((0.0, 2 / 3, 1.0))
    assert result.total == pytest.approx(5 / 9)
    assert result.tie_rate == pytest.approx(1 / 9)
    assert result.note == "without math and code and safety: not comparable with published totals"


def test_the_upper_triangle_is_plain_chosen_against_styled_rejected() -> None:
    wins = np.zeros((1, 3, 3), dtype=np.bool_)
    wins[0, 0, 2] = True
    accuracy = accuracy_by_difficulty(wins, "chat")
    assert (accuracy.hard, accuracy.normal, accuracy.easy) == pytest.approx((1 / 3, 0.0, 0.0))


def test_the_safety_files_are_pooled_by_item() -> None:
    refuse, respond = (
        parse_rm_bench([_raw(1), _raw(2), _raw(3)], "safety-refuse"),
        parse_rm_bench([_raw(1)], "safety-response"),
    )
    right, wrong = ([9, 9, 9], [0, 0, 0]), ([0, 0, 0], [9, 9, 9])
    items = refuse + respond
    result = score_rm_bench(items, _scores(items, [right, right, right, wrong]))
    (safety,) = result.domains
    assert (safety.domain, safety.items, safety.mean) == ("safety", 4, 0.75)


def test_domains_count_the_same_whatever_their_size() -> None:
    chat, code = parse_rm_bench([_raw(1)], "chat"), parse_rm_bench([_raw(1), _raw(2), _raw(3)], "code")
    right, wrong = ([9, 9, 9], [0, 0, 0]), ([0, 0, 0], [9, 9, 9])
    items = chat + code
    result = score_rm_bench(items, _scores(items, [right, wrong, wrong, wrong]))
    assert [domain.domain for domain in result.domains] == ["chat", "code"]
    assert (result.hard, result.total) == (0.5, 0.5)


def test_ties_are_losses() -> None:
    items = parse_rm_bench([_raw(1)], "math")
    result = score_rm_bench(items, _scores(items, [([1, 1, 1], [1, 1, 1])]))
    assert (result.total, result.tie_rate) == (0.0, 1.0)


def test_the_texts_to_score_are_tables() -> None:
    items = parse_rm_bench([_raw(7)], "chat")
    prompts, responses = rm_bench_texts(items)
    assert validate(prompts, PROMPTS).equals(prompts)
    assert validate(responses, RESPONSES).equals(responses)
    assert prompts.row(0) == ("rm_bench/chat/7", "rm_bench/chat", [{"role": "user", "content": "q7"}])
    assert dict(responses.select("policy_model", "response").rows())["rejected-2"] == "eeeee"


def test_the_length_baseline_is_scoring_by_length() -> None:
    items = parse_rm_bench([_raw(1), _raw(2, chosen=["x", "y" * 9, "z"])], "chat")
    _, responses = rm_bench_texts(items)
    by_length = responses.select(
        "prompt_id", "policy_model", pl.col("response").str.len_chars().cast(pl.Float64).alias("score")
    )
    assert rm_bench_length_baseline(items) == score_rm_bench(items, by_length)
    assert rm_bench_length_baseline(items[:1]).hard == 0.0


def test_wins_of_two_reward_models_can_be_compared() -> None:
    items = parse_rm_bench([_raw(1)], "chat")
    one = rm_bench_wins(items, _scores(items, [([1, 2, 3], [0.5, 2, 2.5])]))
    two = rm_bench_wins(items, _scores(items, [([3, 3, 3], [0, 0, 0])]))
    result = mcnemar(one.ravel(), two.ravel())
    assert (result.only_a, result.only_b) == (0, 4)


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
    with pytest.raises(TableError, match="'rm_bench/chat/1' occurs twice"):
        parse_rm_bench([_raw(1), _raw(1)], "chat")


def test_a_text_without_a_score_is_an_error() -> None:
    items = parse_rm_bench([_raw(1)], "chat")
    scores = _scores(items, [([1, 2, 3], [0, 0, 0])]).filter(pl.col("policy_model") != "rejected-3")
    with pytest.raises(TableError, match=r"1 RM-Bench responses have no score.*rejected-3"):
        score_rm_bench(items, scores)


def test_no_items_are_an_error() -> None:
    with pytest.raises(TableError, match="no items"):
        rm_bench_length_baseline(())


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


def test_in_the_common_form_the_figures_are_the_same() -> None:
    items = _random_items({"chat": 7, "math": 11, "code": 5, "safety-refuse": 3, "safety-response": 4})
    scores = _scores(items, [([float(v) for v in item.chosen], [float(v) for v in item.rejected]) for item in items])
    expected = score_rm_bench(items, scores)
    found = values(result_as_written(rm_bench(items)))
    for difficulty in DIFFICULTIES:
        assert found["overall", difficulty] == pytest.approx(getattr(expected, difficulty))
    assert found["overall", "accuracy"] == pytest.approx(expected.total)
    for domain in expected.domains:
        assert found[domain.domain, "accuracy"] == pytest.approx(domain.mean)
        for difficulty in DIFFICULTIES:
            assert found[domain.domain, difficulty] == pytest.approx(getattr(domain, difficulty))
    result = result_as_written(rm_bench(items))
    assert result.figure("overall").tie_rate == pytest.approx(expected.tie_rate)
    assert (result.figure("overall").items, result.figure("safety").items) == (30, 7)
    assert [(figure.subset, figure.metric) for figure in result.figures[:4]] == [
        ("overall", "accuracy"),
        ("overall", "hard"),
        ("overall", "normal"),
        ("overall", "easy"),
    ]


def test_in_the_common_form_the_intervals_are_the_same() -> None:
    items = _random_items({"chat": 30, "math": 40})
    scores = _scores(items, [([float(v) for v in item.chosen], [float(v) for v in item.rejected]) for item in items])
    replicates = rm_bench_replicates(items, scores, 4000)
    benchmark = rm_bench(items)
    result = benchmark_result(benchmark, outcomes_as_written(benchmark), replicates=4000)
    for name, metric in {"hard": "hard", "normal": "normal", "easy": "easy", "total": "accuracy"}.items():
        value = result.figure("overall", metric).value
        assert (value.low, value.high) == pytest.approx(tuple(np.quantile(replicates[name], [0.025, 0.975])), abs=0.01)


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
def test_published_totals_follow_from_their_parts(shared_data: Path) -> None:
    table = pl.read_csv(shared_data / "published_rm_benchmark_scores.csv").filter(
        (pl.col("benchmark") == "RM-Bench") & pl.col("source").str.contains("RM-Bench-Leaderboard")
    )
    wide = table.pivot(on="metric", index="model", values="value", aggregate_function="first")
    complete = wide.drop_nulls(["easy", "normal", "hard", "overall", *DOMAINS])
    consistent = complete.filter((pl.col("domain_avg") - pl.col("difficulty_avg")).abs() <= 0.15)
    assert (complete.height, complete.height - consistent.height) == (40, 8)
    for row in consistent.iter_rows(named=True):
        difficulties = {name: row[name] for name in ("hard", "normal", "easy")}
        middle = np.mean(list(difficulties.values()))
        # the table gives only the margins of the domain × difficulty figures; an additive table has these margins
        domains = [
            DomainAccuracy(
                domain=name, items=1, **{key: row[name] + value - middle for key, value in difficulties.items()}
            )
            for name in DOMAINS
        ]
        result = average_domains(domains)
        assert result.total == pytest.approx(row["overall"], abs=0.25), row["model"]
        assert result.note == ""
        shift = np.mean([row[name] for name in DOMAINS]) - middle
        assert (result.hard, result.normal, result.easy) == pytest.approx(
            tuple(value + shift for value in difficulties.values())
        )


@pytest.mark.real
def test_the_real_files_and_their_length_baseline(shared_data: Path) -> None:
    items: tuple[RmBenchItem, ...] = ()
    for file in ("chat", "code", "safety-refuse", "safety-response"):
        items += parse_rm_bench(json.loads((shared_data / "rm_bench" / f"{file}_filtered.json").read_text()), file)
    baseline = rm_bench_length_baseline(items)
    assert [(domain.domain, domain.items) for domain in baseline.domains] == [
        ("chat", 129),
        ("code", 228),
        ("safety", 441),
    ]
    # longer styles come later: length alone finds the easy comparisons and loses the hard ones
    assert baseline.easy > 0.8
    assert baseline.hard < 0.2
    result = benchmark_result(rm_bench(items), length_outcomes(rm_bench(items)), replicates=100)
    assert result.figure("overall", "hard").length_only == pytest.approx(baseline.hard)
    assert result.figure("overall").value.value == pytest.approx(baseline.total)
    assert result.figure("chat", "hard").note == ""
    assert OFFICIAL_ITEMS[Measure("safety", "hard")] == result.figure("safety", "hard").items
