from itertools import combinations

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from charm_core.best_of_n import (
    BestOfNConfig,
    BestOfNReport,
    Known,
    best_pick_rate,
    judge_values,
    measure_best_of_n,
    pick_probabilities,
    policy_model_of,
    sample_name,
)
from charm_core.errors import RatingsError, TableError
from charm_core.simulation import SimulationConfig, simulate_arena, truth_accuracy

FEW = st.integers(0, 3).map(float)  # few values, so that ties are frequent
CONFIG = BestOfNConfig(sizes=(1, 2, 3), bootstrap_replicates=200)


def by_enumeration(scores: list[float], values: list[float], n: int) -> tuple[list[float], float]:
    """Pick probabilities and how often the pick is among the best, from all draws."""
    picked, best = [0.0] * len(scores), 0.0
    draws = list(combinations(range(len(scores)), n))
    for draw in draws:
        top = max(scores[k] for k in draw)
        favourites = [k for k in draw if scores[k] == top]
        for k in favourites:
            picked[k] += 1 / len(favourites) / len(draws)
            best += (values[k] == max(values[other] for other in draw)) / len(favourites) / len(draws)
    return picked, best


def table(rows: dict[tuple[str, str], float]) -> pl.DataFrame:
    return pl.DataFrame(
        [(prompt, model, value) for (prompt, model), value in rows.items()],
        schema={"prompt_id": pl.String, "policy_model": pl.String, "score": pl.Float64},
        orient="row",
    )


def responses(rows: dict[tuple[str, str], str]) -> pl.DataFrame:
    return table(dict.fromkeys(rows, 0.0)).select(
        "prompt_id", "policy_model", pl.Series("response", list(rows.values()))
    )


def ratings(values: dict[str, float]) -> pl.DataFrame:
    return pl.DataFrame(
        {"policy_model": list(values), "rating": list(values.values())}
    ).with_columns(rating_low=None, rating_high=None, votes=None)  # fmt: skip


def value(report: BestOfNReport, scorer: str, n: int, measure: str) -> float | None:
    (found,) = [item for item in report.values if (item.scorer, item.n, item.measure) == (scorer, n, measure)]
    return found.value.value


@given(arrays.arrays(np.float64, st.tuples(st.integers(1, 3), st.integers(2, 6)), elements=FEW), st.data())
@settings(deadline=None)
def test_it_is_what_counting_all_draws_gives(scores, data):
    values = data.draw(arrays.arrays(np.float64, scores.shape, elements=FEW))
    n = data.draw(st.integers(1, scores.shape[1]))
    expected = [by_enumeration(row, worth, n) for row, worth in zip(scores.tolist(), values.tolist(), strict=True)]
    assert pick_probabilities(scores, n) == pytest.approx(np.array([picked for picked, _ in expected]))
    assert best_pick_rate(scores, values, n) == pytest.approx(np.array([best for _, best in expected]))


def test_a_worked_example():
    # of 4 responses: the best of 2 is the top one in 3 of 6 draws, the next in 2, the third in 1, the last never
    assert pick_probabilities(np.array([[4.0, 3.0, 2.0, 1.0]]), 2).tolist() == [[3 / 6, 2 / 6, 1 / 6, 0.0]]
    # two at the top share what they win: 3 draws with the other two, and the one with both
    assert pick_probabilities(np.array([[3.0, 3.0, 1.0]]), 2).tolist() == [[0.5, 0.5, 0.0]]


def test_one_of_one_is_blind_and_all_is_the_favourite():
    scores = np.array([[0.3, -1.0, 7.0, 2.0]])
    assert pick_probabilities(scores, 1).tolist() == [[0.25] * 4]
    assert pick_probabilities(scores, 4).tolist() == [[0.0, 0.0, 1.0, 0.0]]


def test_many_candidates_neither_overflow_nor_lose_a_share():
    scores = np.random.default_rng(0).normal(size=(3, 400)).round(1)
    for n in (1, 2, 200, 399, 400):
        probabilities = pick_probabilities(scores, n)
        assert probabilities.sum(axis=1) == pytest.approx(np.ones(3))
        assert (probabilities >= 0).all()


@pytest.mark.parametrize("n", [0, 4])
def test_a_draw_that_cannot_be_is_an_error(n):
    with pytest.raises(TableError, match=rf"{n} of 3 candidates cannot be drawn"):
        pick_probabilities(np.zeros((1, 3)), n)
    with pytest.raises(TableError, match=rf"{n} of 3 candidates cannot be drawn"):
        best_pick_rate(np.zeros((1, 3)), np.zeros((1, 3)), n)


@pytest.fixture(scope="module")
def arena():
    return simulate_arena(SimulationConfig(prompts=60, label_prompts=10, battles=500))


class TestSimulatedArena:
    def test_of_two_the_share_of_right_picks_is_the_accuracy_against_the_truth(self, arena):
        rng = np.random.default_rng(0)
        truth = arena.true_quality.get_column("score").to_numpy()
        # no two responses to a prompt may be equally good, for an accuracy leaves those out
        distinct = truth + 1e-6 * np.arange(truth.size)
        quality = arena.true_quality.with_columns(score=pl.Series(distinct))
        scores = arena.true_quality.with_columns(score=pl.Series(truth + rng.normal(0, 2, truth.size)))
        report = measure_best_of_n({"rm": scores}, arena.responses, Known(quality=quality), CONFIG)
        assert value(report, "rm", 2, "truly best") == pytest.approx(truth_accuracy(scores, quality).value)
        assert value(report, "rm", 1, "truly best") == 1.0

    def test_who_scores_by_truth_gets_the_best_possible_and_more_of_it_with_n(self, arena):
        known = Known(quality=arena.true_quality)
        config = BestOfNConfig(sizes=(1, 3, 9), bootstrap_replicates=50)
        report = measure_best_of_n({"truth": arena.true_quality}, arena.responses, known, config)
        assert (report.candidates, report.prompts, report.prompts_left_out) == (9, 60, 0)
        found = [item for item in report.values if item.measure == "quality"]
        assert [item.value.value for item in found] == pytest.approx([item.best_possible for item in found])
        means = [item.value.value for item in found]
        assert means == sorted(means)
        assert means[0] == pytest.approx(arena.true_quality.get_column("score").mean())
        best = arena.true_quality.group_by("prompt_id").agg(pl.col("score").max()).get_column("score").mean()
        assert means[-1] == pytest.approx(best)

    def test_a_liking_for_length_shows_and_its_absence_too(self, arena):
        length = arena.responses.select(
            "prompt_id", "policy_model", pl.col("response").str.len_chars().cast(pl.Float64).alias("score")
        )
        scores = {"long": length, "short": length.with_columns(-pl.col("score"))}
        report = measure_best_of_n(scores, arena.responses, Known(), CONFIG, compared=[("short", "long")])
        assert value(report, "long", 1, "length") == value(report, "short", 1, "length")
        assert value(report, "long", 3, "length") > value(report, "long", 2, "length")
        assert value(report, "short", 3, "length") < value(report, "short", 2, "length")
        gains = {item.n: item.difference for item in report.differences}
        assert (gains[1].value, gains[1].low, gains[1].high) == (0.0, 0.0, 0.0)
        assert gains[2].low > 0


def test_picks_are_paired_by_prompt():
    # one reward model always prefers b, the other a; b is worth 10 more whatever the prompt, so the gain has no spread
    names = [(f"p{n}", model) for n in range(20) for model in ("a", "b")]
    likes_b = table({name: float(name[1] == "b") for name in names})
    likes_a = table({name: float(name[1] == "a") for name in names})
    worth = table({name: int(name[0][1:]) + 10.0 * (name[1] == "b") for name in names})
    texts = responses(dict.fromkeys(names, "text"))
    report = measure_best_of_n(
        {"a": likes_a, "b": likes_b}, texts, Known(quality=worth), BestOfNConfig(sizes=(2, 99)), [("a", "b")]
    )
    (gain,) = [item.difference for item in report.differences if item.measure == "quality"]
    assert (gain.value, gain.low, gain.high) == pytest.approx((10.0, 10.0, 10.0))
    spread = next(item.value for item in report.values if item.measure == "quality")
    assert spread.high - spread.low > 2
    assert {item.n for item in report.values} == {2}  # 99 of 2 cannot be


def test_ratings_are_of_policy_models_and_samples_of_one_share_its_rating():
    names = [sample_name("strong", 1), sample_name("strong", 2), "weak"]
    assert [policy_model_of(name) for name in names] == ["strong", "strong", "weak"]
    scores = table({("p", name): rank for rank, name in zip((3.0, 1.0, 2.0), names, strict=True)})
    texts = responses({("p", name): "x" * length for name, length in zip(names, (1, 2, 3), strict=True)})
    known = Known(ratings=ratings({"strong": 1200.0, "weak": 1000.0}))
    report = measure_best_of_n({"rm": scores}, texts, known, CONFIG)
    # draws of two: strong1 wins two of three, weak one
    assert value(report, "rm", 2, "rating") == pytest.approx(1200 * 2 / 3 + 1000 / 3)
    assert value(report, "rm", 3, "length") == 1.0
    assert {(item.n, item.policy_model): item.share for item in report.shares} == pytest.approx(
        {
            (1, "strong"): 2 / 3, (1, "weak"): 1 / 3, (2, "strong"): 2 / 3, (2, "weak"): 1 / 3, (3, "strong"): 1.0, (3, "weak"): 0.0
        }
    )  # fmt: skip
    assert report.policy_models == ("strong", "weak")


def test_a_judge_who_compared_all_with_one_opponent():
    preferences = pl.DataFrame(
        {
            "prompt_id": ["p", "p", "p", "q", "q"],
            "model_a": ["a", "base", "c", "a", "base"],
            "model_b": ["base", "b", "base", "base", "b"],
            "preference_a": [1.0, 0.75, 0.5, 1.0, 1.0],
        }
    )
    values = {(prompt, model): score for prompt, model, score in judge_values(preferences).iter_rows()}
    assert values["p", "a"] == 1.0
    assert values["p", "b"] == 0.25
    assert values["p", "base"] == pytest.approx((0.0 + 0.75 + 0.5) / 3)
    names = [(prompt, model) for prompt in "pq" for model in "abc"]
    scores = table({name: {"a": 1.0, "b": 2.0, "c": 3.0}[name[1]] for name in names})
    texts = responses(dict.fromkeys(names, "text"))
    report = measure_best_of_n({"rm": scores}, texts, Known(preferences=preferences), CONFIG)
    # the judge did not see c at q, so only p counts; of {a, b, c} the reward model picks c, the judge prefers a
    assert {item.prompts for item in report.values if item.measure.startswith("judge")} == {1}
    assert value(report, "rm", 3, "judge") == 0.5
    assert value(report, "rm", 3, "judge's best") == 0.0
    assert value(report, "rm", 2, "judge's best") == pytest.approx(1 / 3)  # right about b and c alone
    assert next(item.best_possible for item in report.values if (item.measure, item.n) == ("judge", 3)) == 1.0


def test_a_prompt_without_all_scores_is_left_out_of_all_and_counted():
    names = [(prompt, model) for prompt in "pqr" for model in "abc"]
    full = table({name: float(ord(name[1])) for name in names})
    holed = full.filter(~((pl.col("prompt_id") == "q") & (pl.col("policy_model") == "b")))
    texts = responses(dict.fromkeys(names, "text"))
    report = measure_best_of_n({"full": full, "holed": holed}, texts, Known(), CONFIG)
    assert (report.prompts, report.prompts_left_out, report.candidates) == (2, 1, 3)


def test_what_cannot_be_measured_says_why():
    names = [("p", "a"), ("p", "b"), ("q", "a"), ("q", "b")]
    scores, texts = table(dict.fromkeys(names, 1.0)), responses(dict.fromkeys(names, "text"))
    with pytest.raises(RatingsError, match=r"\['b'\] have no rating"):
        measure_best_of_n({"rm": scores}, texts, Known(ratings=ratings({"a": 1.0})))
    with pytest.raises(TableError, match="the scored response of 'a' to 'q' is not in the responses table"):
        measure_best_of_n({"rm": scores}, texts.filter(pl.col("prompt_id") == "p"), Known())
    with pytest.raises(TableError, match="at least two responses per prompt"):
        measure_best_of_n({"rm": scores.filter(pl.col("policy_model") == "a")}, texts, Known())
    gaps = {"one": scores.head(2), "other": scores.tail(2)}
    with pytest.raises(TableError, match="of no prompt are all 2 candidates scored"):
        measure_best_of_n(gaps, texts, Known())
    with pytest.raises(TableError, match="of no prompt do all candidates have the measure 'quality'"):
        measure_best_of_n({"rm": scores}, texts, Known(quality=scores.head(1)))
    with pytest.raises(TableError, match="at least one reward model"):
        measure_best_of_n({}, texts, Known())


@pytest.mark.real
def test_an_llm_judge_and_published_responses(shared_data):
    """AlpacaEval's judge compared every response with one opponent's; who picks the longest pleases it more than chance."""
    judged = (
        pl.read_parquet(shared_data / "alpacaeval_judge_prefs.parquet")
        .filter(pl.col("arena_model").is_not_null(), pl.col("annotator") == "weighted_alpaca_eval_gpt4_turbo")
        .select(
            "prompt_id", pl.col("arena_model").alias("model_a"), pl.lit("baseline").alias("model_b"), "p_model_wins"
        )
        .rename({"p_model_wins": "preference_a"})
        .drop_nulls()
        .unique(["prompt_id", "model_a"])
    )
    texts = (
        pl.read_parquet(shared_data / "responses.parquet")
        .filter(benchmark="alpaca_eval")
        .join(judged, left_on=["prompt_id", "model"], right_on=["prompt_id", "model_a"], how="semi")
        .select("prompt_id", pl.col("model").alias("policy_model"), "response")
        .unique(["prompt_id", "policy_model"], maintain_order=True)
    )
    length = texts.select("prompt_id", "policy_model", score=pl.col("response").str.len_chars().cast(pl.Float64))
    scores = {"longest": length, "shortest": length.with_columns(-pl.col("score"))}
    report = measure_best_of_n(scores, texts, Known(preferences=judged), BestOfNConfig(sizes=(1, 4)))
    assert report.prompts > 500
    blind, longest, shortest = (
        value(report, *which, "judge") for which in (("longest", 1), ("longest", 4), ("shortest", 4))
    )
    assert shortest < blind < longest
