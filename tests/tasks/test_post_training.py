"""The whole loop, step by step and as small as it can be: taught, sampled, labelled by the truth, post-trained, compared."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pytest
from prefect import flow

from charm_core.errors import ConfigError, ModelError
from charm_core.policy_comparison import ComparisonConfig, PolicyComparison, compare_policies
from charm_core.preferences import PreferenceConfig
from charm_core.reward_model.post_training_job import PostTrainingConfig, TinyPolicyConfig
from charm_core.sampling import Decoding
from charm_core.simulated_reading import fresh_prompts, quality_of, read_texts
from charm_core.simulation import SimulationConfig, simulate_arena
from charm_core.tables import PAIRS, PROMPTS, RESPONSES, SCORES
from tasks.caching import use_store
from tasks.debiasing import ChosenModels, PairSet, build_pairs
from tasks.policy_comparison import compare_answers, comparison_markdown, comparison_metrics, comparison_summary
from tasks.policy_models import TransformersBackend
from tasks.post_training import (
    PolicyFolder,
    PostTrainedPolicy,
    answer_prompts,
    check_apart,
    draw_prompts,
    identify_policy,
    number_samples,
    post_train_policy,
    repeat_prompts,
    sample_candidates,
    score_by_truth,
    teach_policy,
)
from tasks.prompts import ResponseSet
from tasks.store import ArtifactRef, ArtifactStore
from tests.charm_core.reward_model.tiny import pairs_table
from tests.tiny_policy_model import save_policy_model

WORLD = SimulationConfig(prompts=20, label_prompts=10, battles=500, topics=4, facts_per_topic=3)
DECODING = Decoding(sampling_temperature=1.0, max_tokens=60)
TEACHING = TinyPolicyConfig(epochs=4)
TRAINING = PostTrainingConfig(
    beta=0.05, epochs=3, learning_rate=5e-3, pairs_per_step=16, pairs_per_pass=16, max_length=128, threads_per_rank=1
)
NAMES = ("untouched", "truth-labelled")


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(url=str(tmp_path / "store"), work_folder=str(tmp_path / "work"))


@dataclass(frozen=True, kw_only=True)
class Looped:
    store: ArtifactStore
    policy: PolicyFolder
    candidates: ResponseSet
    truth: ArtifactRef
    pairs: PairSet
    trained: PostTrainedPolicy
    exam: ArtifactRef
    answers: ResponseSet
    comparison: ArtifactRef


@flow
def loop(store: ArtifactStore) -> Looped:
    policy = teach_policy(WORLD, 120, TEACHING)
    prompts, exam = draw_prompts(WORLD, 120, "practice"), draw_prompts(WORLD, 120, "exam")
    check_apart(store, prompts, exam)
    candidates = sample_candidates(store, prompts, policy, DECODING, 4)
    truth = score_by_truth(WORLD, candidates)
    pairs = build_pairs(
        candidates, truth, None, ChosenModels(overvalued=(), references=()), PreferenceConfig(strategy="extremes")
    )
    trained = post_train_policy(policy, pairs.pairs, TRAINING)
    answers = answer_prompts(store, exam, dict(zip(NAMES, (policy, trained.model), strict=True)), DECODING)
    comparison = compare_answers(answers, NAMES, (NAMES,), ComparisonConfig(bootstrap_replicates=200), WORLD)
    return Looped(
        store=store,
        policy=policy,
        candidates=candidates,
        truth=truth,
        pairs=pairs,
        trained=trained,
        exam=exam,
        answers=answers,
        comparison=comparison,
    )


@pytest.fixture(scope="module")
def looped(tmp_path_factory: pytest.TempPathFactory, prefect_session: None) -> Iterator[Looped]:
    folder = tmp_path_factory.mktemp("loop")
    with use_store(ArtifactStore(url=str(folder / "store"), work_folder=str(folder / "work"))) as store:
        yield loop(store)


@pytest.mark.slow
class TestTheLoop:
    def test_the_candidates_are_different_answers_to_the_same_prompts(self, looped: Looped):
        responses = looped.store.read_table(looped.candidates.responses, RESPONSES)
        assert looped.candidates.policy_models == ("sample#1", "sample#2", "sample#3", "sample#4")
        assert responses.height == 4 * 120
        assert responses.group_by("prompt_id").agg(pl.col("response").n_unique()).get_column("response").mean() > 3.9
        assert set(responses.get_column("prompt_id")) == set(fresh_prompts(WORLD, 120, "practice")["prompt_id"])

    def test_the_policy_writes_in_the_arenas_words(self, looped: Looped):
        vocabulary = set(simulate_arena(WORLD).vocabulary)
        texts = looped.store.read_table(looped.candidates.responses, RESPONSES).get_column("response")
        words = {word for text in texts for word in re.findall(r"[a-z]+", text)}
        assert words <= vocabulary
        assert len(words) > 100
        assert not any(" ." in text for text in texts)  # a full stop follows its word, as in the writers' texts

    def test_the_pairs_are_ordered_by_the_truth(self, looped: Looped):
        frame = looped.store.read_frame(looped.pairs.pairs)
        truth = looped.store.read_table(looped.truth, SCORES)
        best = truth.group_by("prompt_id").agg(pl.col("score").max())
        joined = frame.join(best, on="prompt_id")
        assert joined.get_column("chosen_score").equals(joined.get_column("score"), check_names=False)

    def test_the_post_trained_policy_answers_better(self, looped: Looped):
        outcome = looped.trained.outcome
        assert outcome.last_loss < outcome.first_loss
        found = looped.store.read_record(looped.comparison, PolicyComparison)
        (win,) = found.win_rates
        assert (win.policy_model, win.opponent, win.judge, win.prompts) == ("truth-labelled", "untouched", "truth", 120)
        gain = next(item.difference for item in found.differences if item.measure == "true quality")
        assert gain.low > 0
        assert win.win_rate.low > 0.5

    def test_the_comparison_is_of_what_was_answered(self, looped: Looped):
        responses = looped.store.read_table(looped.answers.responses, RESPONSES)
        prompts = looped.store.read_table(looped.exam, PROMPTS)
        read = read_texts(WORLD, prompts, responses)
        expected = compare_policies(
            {"quality": quality_of(WORLD, read)}, NAMES, [NAMES], ComparisonConfig(bootstrap_replicates=200)
        )
        found = looped.store.read_record(looped.comparison, PolicyComparison)
        assert [mean.value for mean in found.means if mean.measure == "true quality"] == [
            mean.value for mean in expected.means
        ]
        length = next(mean for mean in found.means if mean.measure == "characters")
        own = responses.filter(policy_model="untouched").get_column("response").str.len_chars()
        assert length.value.value == pytest.approx(own.mean())

    def test_tables_and_metrics_say_the_same(self, looped: Looped):
        found = looped.store.read_record(looped.comparison, PolicyComparison)
        text, metrics = comparison_markdown(found), comparison_metrics(found)
        quality = next(mean.value for mean in found.means if mean.measure == "true quality")
        assert f"| untouched | {quality.value:.2f} [{quality.low:.2f}, {quality.high:.2f}] |" in text
        assert metrics["untouched/true quality"] == quality.value
        assert metrics["truth-labelled over untouched/win rate by truth"] == found.win_rates[0].win_rate.value
        lines = comparison_summary(found, "loop", simulated=True)
        assert lines[0] == "loop: 2 policies on 120 exam prompts"
        assert "This is a simulation" in lines[1]

    def test_a_second_loop_starts_no_process(self, looped: Looped, monkeypatch: pytest.MonkeyPatch):
        def nothing(*_: object, **__: object) -> None:
            raise AssertionError("a process was started")

        monkeypatch.setattr("tasks.launching.run_worker", nothing)
        with use_store(looped.store) as store:
            assert loop(store) == looped

    def test_a_policy_is_its_weights_and_not_its_place(self, looped: Looped, tmp_path: Path):
        copied = looped.policy.model_copy(
            update={"spec": looped.policy.spec.model_copy(update={"path": str(tmp_path), "batch_size": 3})}
        )
        pairs = looped.pairs.pairs
        assert post_train_policy.key(copied, pairs, TRAINING) == post_train_policy.key(looped.policy, pairs, TRAINING)
        other = post_train_policy.key(looped.trained.model, pairs, TRAINING)
        assert other != post_train_policy.key(looped.policy, pairs, TRAINING)


def test_repeated_prompts_come_back_as_candidates(store: ArtifactStore):
    prompts = store.write_table(fresh_prompts(WORLD, 3, "few"), PROMPTS)
    asked = store.read_table(repeat_prompts.function(store, prompts, 2), PROMPTS)
    assert asked.height == 6
    samples = asked.select(
        "prompt_id",
        pl.lit("policy").alias("policy_model"),
        pl.col("prompt_id").alias("response"),
        # one request failed for good
        pl.when(pl.col("prompt_id") == "few-000001#2")
        .then(pl.lit("failed"))
        .otherwise(pl.lit("complete"))
        .alias("status"),
        pl.lit(None, pl.String).alias("finish_reason"),
        pl.lit(None, pl.Int64).alias("prompt_tokens"),
        pl.lit(None, pl.Int64).alias("response_tokens"),
    )
    found = number_samples.function(store, prompts, store.write_frame(samples, "samples"), 2)
    rows = set(store.read_table(found.responses, RESPONSES).iter_rows())
    assert rows == {
        (f"few-00000{prompt}", f"sample#{number}", f"few-00000{prompt}#{number}")
        for prompt, number in ((0, 1), (0, 2), (1, 1), (2, 1), (2, 2))
    }


def test_what_is_judged_on_must_not_be_trained_on(store: ArtifactStore):
    exam = fresh_prompts(WORLD, 5, "exam")
    same = exam.head(2).with_columns(prompt_id=pl.lit("other ") + pl.col("prompt_id"))
    with pytest.raises(ConfigError, match="2 prompts are in both prompts and exam_prompts, the first is 'other exam-0"):
        check_apart(store, store.write_table(same, PROMPTS), store.write_table(exam, PROMPTS))


def test_a_policy_model_of_the_users(tmp_path: Path):
    folder = save_policy_model(tmp_path / "model")
    policy = identify_policy(TransformersBackend(path=str(folder), dtype="float32", batch_size=4))
    assert (policy.spec.engine, policy.spec.path, policy.spec.batch_size) == ("transformers", str(folder), 4)
    again = identify_policy(TransformersBackend(path=str(save_policy_model(tmp_path / "copy")), dtype="float32"))
    assert again.identity() == policy.identity()
    with pytest.raises(ConfigError, match="there is no folder"):
        identify_policy(TransformersBackend(path=str(tmp_path / "nowhere")))


def test_what_is_wrong_with_the_model_arrives_from_its_process(store: ArtifactStore, tmp_path: Path):
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text("{}")
    policy = identify_policy(TransformersBackend(path=str(empty)))
    with pytest.raises(ModelError, match=r"the policy model .* cannot be loaded"):
        post_train_policy.function(store, policy, store.write_table(pairs_table(), PAIRS), TRAINING)
