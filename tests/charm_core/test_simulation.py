import re

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal
from pydantic import ValidationError

from charm_core.bradley_terry import ratings_from_battles
from charm_core.errors import TableError
from charm_core.mismatch import MismatchConfig, measure_mismatch
from charm_core.simulated_people import vote_probabilities
from charm_core.simulated_writers import draw_counts, label_utility, true_quality, vary_writers
from charm_core.simulation import (
    HELD_OUT_WRITERS,
    WRITERS,
    SimulationConfig,
    planted_overvaluation,
    simulate_arena,
    truth_accuracy,
)
from charm_core.tables import BATTLES, PAIRS, PROMPTS, RESPONSES, SCORES, validate

SMALL = SimulationConfig(prompts=40, label_prompts=30, battles=4000)
FRAMES = ("prompts", "responses", "battles", "true_quality", "biased_pairs", "writers")


@pytest.fixture(scope="module")
def arena():
    return simulate_arena(SMALL)


def test_same_seed_gives_the_same_arena(arena):
    again = simulate_arena(SMALL)
    for name in FRAMES:
        assert_frame_equal(getattr(arena, name), getattr(again, name))
    assert arena.vocabulary == again.vocabulary


def test_another_seed_gives_another_arena(arena):
    other = simulate_arena(SMALL.model_copy(update={"seed": 1}))
    assert [name for name in FRAMES if getattr(arena, name).equals(getattr(other, name))] == []
    assert arena.vocabulary != other.vocabulary


def test_more_votes_change_votes_only(arena):
    other = simulate_arena(SMALL.model_copy(update={"battles": 5000}))
    assert [name for name in FRAMES if not getattr(arena, name).equals(getattr(other, name))] == ["battles"]


def test_frames_are_canonical_and_complete(arena):
    schemas = {
        "prompts": PROMPTS,
        "responses": RESPONSES,
        "battles": BATTLES,
        "true_quality": SCORES,
        "biased_pairs": PAIRS,
    }
    for name, schema in schemas.items():
        assert_frame_equal(getattr(arena, name), validate(getattr(arena, name), schema))
    cells = arena.prompts.select("prompt_id").join(arena.writers.select("policy_model"), how="cross")
    assert_frame_equal(arena.responses.select("prompt_id", "policy_model"), cells)
    assert_frame_equal(arena.true_quality.select("prompt_id", "policy_model"), cells)


def test_names_cannot_be_mistaken_for_real_policy_models(arena):
    names = arena.writers.get_column("policy_model").to_list()
    assert len(names) == 9
    assert all(name.startswith("sim-") for name in names)
    assert arena.writers.filter("held_out").get_column("policy_model").to_list() == list(HELD_OUT_WRITERS)


def test_vocabulary_covers_every_word(arena):
    texts = [
        *arena.responses.get_column("response"),
        *(messages[0]["content"] for messages in arena.prompts.get_column("messages")),
        *(messages[0]["content"] for messages in arena.biased_pairs.get_column("rejected")),
    ]
    words = {word for text in texts for word in re.findall(r"\w+|[^\w\s]", text)}
    assert words <= set(arena.vocabulary)
    assert len(set(arena.vocabulary)) == len(arena.vocabulary)


def test_labels_are_on_prompts_of_their_own(arena):
    labelled = set(arena.biased_pairs.get_column("prompt_id"))
    assert labelled
    assert labelled.isdisjoint(arena.prompts.get_column("prompt_id"))
    assert set(arena.biased_pairs.get_column("split")) == {"train"}


def test_labelled_texts_are_those_of_the_named_writers(arena):
    texts = pl.concat(
        [
            arena.biased_pairs.select("prompt_id", pl.col(f"{side}_model").alias("model"), pl.col(side).alias("text"))
            for side in ("chosen", "rejected")
        ]
    )
    distinct = texts.with_columns(pl.col("text").list.first().struct.field("content")).unique()
    assert distinct.select("prompt_id", "model").is_unique().all()
    assert distinct.select("prompt_id", "text").is_unique().all()


def test_texts_realise_the_true_quality():
    # every style word is out of the way: what is left are fillers, rights, myths and words beside the point
    config = SMALL.model_copy(update={"topics": 4, "facts_per_topic": 2})
    arena = simulate_arena(config)
    start = len(arena.vocabulary) - (20 + 12 + 4 + 60) - 4 * 4
    facts, myths = arena.vocabulary[start : start + 8], arena.vocabulary[start + 8 : start + 16]
    topics = arena.vocabulary[start - 4 : start]
    asked = dict(zip(arena.prompts["prompt_id"], (m[0]["content"] for m in arena.prompts["messages"]), strict=True))
    expected = []
    for prompt_id, _, response in arena.responses.iter_rows():
        own = {fact for number, fact in enumerate(facts) if topics[number // 2] in asked[prompt_id].split()}
        words = re.findall(r"\w+", response)
        wrong = sum(word in myths or (word in facts and word not in own) for word in words)
        expected.append(config.quality_scale * (sum(word in own for word in words) - wrong))
    assert arena.true_quality.get_column("score").to_list() == pytest.approx(expected)


def test_people_vote_on_quality_alone_and_labellers_do_not():
    config = SimulationConfig()
    counts = draw_counts(np.random.default_rng(0), WRITERS, 5000, config)
    styles = np.array([writer.flourish for writer in WRITERS])
    extra = label_utility(counts, config) - true_quality(counts, config)
    assert extra == pytest.approx(config.bias * counts.flourish)
    assert np.argmax(extra.mean(axis=0)) == np.argmax(styles)
    within = np.corrcoef(true_quality(counts, config)[:, 4], counts.flourish[:, 4])[0, 1]
    assert abs(within) < 0.05


def test_vote_probabilities():
    won, lost = vote_probabilities(np.array([0.0, 1.0, 1.0]), np.array([0.0, 0.0, 0.0]), 0.0)
    assert won == pytest.approx([0.5, 1 / (1 + np.exp(-1)), 1 / (1 + np.exp(-1))])
    assert won + lost == pytest.approx(1.0)
    won, lost = vote_probabilities(np.array([0.0]), np.array([0.0]), 0.6)
    assert won == lost == pytest.approx(1 / (1 + np.exp(0.6)))


def test_ratings_follow_true_quality(arena):
    ratings = ratings_from_battles(arena.battles)
    quality = arena.true_quality.group_by("policy_model").agg(pl.col("score").mean()).sort("policy_model")
    assert set(arena.battles.get_column("winner")) == {"model_a", "model_b", "tie", "tie (bothbad)"}
    assert np.corrcoef(ratings.get_column("rating"), quality.get_column("score"))[0, 1] > 0.9


def test_planted_overvaluation_is_the_bias_and_nothing_else():
    planted = planted_overvaluation(SimulationConfig())
    assert sum(planted.values()) == pytest.approx(0.0, abs=1e-6)
    assert max(planted, key=planted.__getitem__) == "sim-coral"
    assert planted["sim-coral"] > planted["sim-heron"] > 50 > 0 > planted["sim-iris"]
    assert set(planted_overvaluation(SimulationConfig(bias=0.0)).values()) == {0.0}
    weaker = planted_overvaluation(SimulationConfig(bias=0.1))
    assert 0 < weaker["sim-coral"] < planted["sim-coral"]


def test_planted_overvaluation_is_what_the_audit_of_the_labellers_finds():
    # labellers' votes instead of a reward model's scores, on other draws: the same Elo points within noise
    config = SimulationConfig()
    rng = np.random.default_rng(5)
    counts = draw_counts(
        rng, vary_writers(np.random.default_rng(np.random.SeedSequence(0).spawn(6)[0]), config), 8000, config
    )
    ids = [f"{row:05d}" for row in range(8000)]
    cells = pl.DataFrame({"prompt_id": ids}).join(
        pl.DataFrame({"policy_model": [w.name for w in WRITERS]}), how="cross"
    )
    felt = {
        name: cells.with_columns(pl.Series("score", (utility + rng.gumbel(size=utility.shape)).ravel()))
        for name, utility in (("quality", true_quality(counts, config)), ("liking", label_utility(counts, config)))
    }
    ratings = pl.DataFrame({"policy_model": [w.name for w in WRITERS], "rating": 1000.0}).with_columns(
        rating_low=pl.lit(None, pl.Float64), rating_high=pl.lit(None, pl.Float64), votes=pl.lit(None, pl.Int64)
    )
    found = {
        name: {
            m.policy_model: m.overvaluation.value for m in measure_mismatch(scores, ratings, MismatchConfig()).models
        }
        for name, scores in felt.items()
    }
    without_ties = planted_overvaluation(config.model_copy(update={"tie_band": 0.0}))
    for model, points in without_ties.items():
        assert found["liking"][model] - found["quality"][model] == pytest.approx(points, abs=8)


def test_an_unbiased_perfect_scorer_is_nearly_unbiased_in_the_audit():
    arena = simulate_arena(SimulationConfig(label_prompts=10))
    report = measure_mismatch(arena.true_quality, ratings_from_battles(arena.battles), MismatchConfig())
    assert report.mean_absolute_mismatch.value < 0.08


def test_truth_accuracy_of_known_scores():
    quality = _scores({("p", "a"): 1.0, ("p", "b"): 2.0, ("p", "c"): 3.0, ("q", "a"): 1.0, ("q", "b"): 1.0})
    scores = _scores({("p", "a"): 0.0, ("p", "b"): 0.0, ("p", "c"): -1.0, ("q", "a"): 5.0, ("q", "b"): 1.0})
    # a against b is a tie, c is the best and comes last; q has no better response
    assert truth_accuracy(scores, quality).value == pytest.approx(0.5 / 3)
    assert truth_accuracy(quality, quality).value == 1.0
    reversed_scores = quality.with_columns(-pl.col("score"))
    assert truth_accuracy(reversed_scores, quality).value == 0.0


def test_truth_accuracy_interval_covers_the_truth_of_a_noisy_scorer():
    rng = np.random.default_rng(2)
    cells = {(f"{prompt:03d}", model): 0.0 for prompt in range(300) for model in "ab"}
    quality = _scores({key: float(key[1] == "b") for key in cells})
    right = rng.random(300) < 0.7
    scores = _scores({(p, m): float((m == "b") == right[int(p)]) for p, m in cells})
    estimate = truth_accuracy(scores, quality)
    assert estimate.low < 0.7 < estimate.high
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * np.sqrt(0.21 / 300), rel=0.15)
    assert truth_accuracy(scores, quality) == estimate


def test_truth_accuracy_names_a_response_of_unknown_quality():
    quality = _scores({("p", "a"): 1.0, ("p", "b"): 2.0})
    with pytest.raises(TableError, match="'q', 'a'"):
        truth_accuracy(_scores({("p", "a"): 1.0, ("q", "a"): 2.0}), quality)
    with pytest.raises(TableError, match="at least two writers"):
        truth_accuracy(_scores({("p", "a"): 1.0}), quality)


@pytest.mark.parametrize(
    "wrong",
    [
        {"seed": -1},
        {"prompts": 9},
        {"prompts": 100_001},
        {"battles": 10},
        {"label_prompts": 0},
        {"label_pairs_per_prompt": 37},
        {"bias": -0.1},
        {"bias": float("nan")},
        {"bias": float("inf")},
        {"quality_scale": 0.0},
        {"tie_band": -1.0},
        {"style_variation": -0.1},
        {"habit_strength": 0.0},
        {"topics": 3},
        {"facts_per_topic": 1},
        {"prompts": "many"},
        {"writers": 12},
    ],
)
def test_settings_out_of_bounds_are_refused(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        SimulationConfig(**wrong)


def test_smallest_and_extreme_settings_still_give_an_arena():
    config = SimulationConfig(
        prompts=10, label_prompts=10, battles=500, topics=4, facts_per_topic=2, label_pairs_per_prompt=1,
        bias=5.0, style_variation=3.0, ability_variation=0.0, difficulty_variation=0.0, writer_variation=0.0,
    )  # fmt: skip
    arena = simulate_arena(config)
    assert arena.prompts.height == 10
    assert 0 < arena.biased_pairs.height <= 10


def _scores(cells):
    rows = [(prompt, model, score) for (prompt, model), score in cells.items()]
    return pl.DataFrame(rows, schema=dict(SCORES.columns), orient="row")
