"""Post-training end to end: in a simulated arena that is as small as it can be, and with a policy model and a judge of one's own."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from charm_core.best_of_n import BestOfNConfig, BestOfNReport
from charm_core.mismatch import MismatchConfig
from charm_core.offsets import OffsetConfig
from charm_core.policy_comparison import ComparisonConfig, PolicyComparison
from charm_core.preferences import PreferenceConfig
from charm_core.responses import SplitConfig
from charm_core.reward_model.post_training_job import PostTrainingConfig, TinyPolicyConfig
from charm_core.reward_model.spec import RewardModelSpec, TrainingConfig
from charm_core.sampling import Decoding
from charm_core.simulation import HELD_OUT_WRITERS, SimulationConfig
from flows.command_line import run_from_command_line
from flows.post_train import PostTrainOutcome, post_train
from flows.presets import POST_TRAIN, demo_post_training
from flows.runs import CalibrationRun, PostTrainRun, SimulatedPolicy
from tasks.judging import JudgeConfig
from tasks.policy_models import OpenAIBackend, TransformersBackend
from tasks.prompt_sets import PromptSetConfig
from tasks.simulation import SimulatedWorld
from tests.charm_core.reward_model.tiny import save_model
from tests.endpoint_server import Asked, EndpointServer, Reply, completion
from tests.tiny_policy_model import WORDS, save_policy_model

PLAIN = {"zero_stage": None, "threads_per_rank": 1}
CALIBRATION = CalibrationRun(
    name="tiny",
    simulation=SimulatedWorld(
        arena=SimulationConfig(prompts=40, label_prompts=30, battles=2000, topics=4, facts_per_topic=4),
        base_training=TrainingConfig(epochs=1, learning_rate=1e-3, pairs_per_step=90, **PLAIN),
    ),
    split=SplitConfig(held_out_policy_models=HELD_OUT_WRITERS),
    mismatch=MismatchConfig(bootstrap_replicates=50),
    calibration=OffsetConfig(bootstrap_replicates=20),
    preferences=PreferenceConfig(strategy="all_pairs"),
    training=TrainingConfig(objective="win_rate_matching", learning_rate=5e-4, pairs_per_step=200, **PLAIN),
)
TRAINING = PostTrainingConfig(
    beta=0.05, epochs=2, learning_rate=5e-3, pairs_per_step=16, pairs_per_pass=16, max_length=128, threads_per_rank=1
)
TINY = PostTrainRun(
    name="tiny",
    simulation=SimulatedPolicy(
        calibration=CALIBRATION, teaching=TinyPolicyConfig(epochs=2), writers_prompts=60, prompts=80, exam_prompts=60
    ),
    responses_per_prompt=3,
    decoding=Decoding(sampling_temperature=1.0, max_tokens=60),
    training=TRAINING,
    best_of_n=BestOfNConfig(sizes=(1, 2, 3), bootstrap_replicates=50),
    comparison=ComparisonConfig(bootstrap_replicates=50),
)


def read(path: str) -> str:
    return Path(path).read_text()


class TestSettings:
    def test_the_preset_survives_the_command_line(self, capsys: pytest.CaptureFixture[str], tmp_path: Path):
        assert run_from_command_line("post_train", PostTrainRun, POST_TRAIN, str, ["--show-config"]) == 0
        shown = capsys.readouterr().out
        (tmp_path / "run.toml").write_text(shown)
        arguments = ["--config", str(tmp_path / "run.toml"), "--training.epochs", "7"]
        seen: list[PostTrainRun] = []
        run_from_command_line("post_train", PostTrainRun, POST_TRAIN, lambda run: str(seen.append(run)), arguments)
        demo = demo_post_training()
        assert seen == [demo.model_copy(update={"training": demo.training.model_copy(update={"epochs": 7.0})})]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"simulation": None}, "policy_model, prompts, exam_prompts, reward_models missing"),
            ({"prompts": PromptSetConfig(source="x.jsonl")}, "a simulation brings its own policy_model, prompts"),
            ({"preferences": PreferenceConfig()}, "have no reference model: use strategy extremes or all_pairs"),
        ],
    )
    def test_settings_that_contradict_each_other_are_refused(self, changes: dict, message: str):
        with pytest.raises(ValidationError, match=message):
            PostTrainRun(**{name: getattr(TINY, name) for name in TINY.model_fields_set} | changes)

    def test_names_of_policies_are_not_names_of_reward_models(self):
        prompts = PromptSetConfig(source="x.jsonl")
        with pytest.raises(ValidationError, match=r"may not be called \['truth'\]"):
            PostTrainRun(
                policy_model=TransformersBackend(path="x"),
                prompts=prompts,
                exam_prompts=prompts,
                reward_models={"truth": RewardModelSpec(path="x")},
            )

    def test_a_simulated_policy_needs_a_simulated_calibration(self):
        real = CALIBRATION.model_dump() | {
            "simulation": None,
            "arena": {"source": "x"},
            "responses": {"source": "x"},
            "reward_model": {"path": "x"},
        }
        with pytest.raises(ValidationError, match="calibration must be of a simulation"):
            SimulatedPolicy(calibration=CalibrationRun.model_validate(real))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, prefect_session: None) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CHARM_HOME", str(folder))
        yield folder


def fresh_steps(run: PostTrainRun) -> tuple[PostTrainOutcome, set[str]]:
    """Run and say which steps did not come from the cache: by its own account, for Prefect's states arrive late."""
    outcome = post_train(run)
    counted = re.search(r"^Steps +\d+ steps reused, (\d+) ran$", outcome.summary, re.MULTILINE)
    assert counted is not None
    if counted[1] == "0":
        return outcome, set()
    ran = re.search(r"^ +ran: (.*)$", outcome.summary, re.MULTILINE)
    assert ran is not None
    return outcome, {part.split(" × ")[0] for part in ran[1].split(", ")}


@pytest.mark.slow
class TestSimulatedArena:
    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def outcome(cls, home: Path) -> PostTrainOutcome:
        return post_train(TINY)

    def test_every_labeller_has_its_policy_and_all_are_compared(self, outcome: PostTrainOutcome):
        names = ["untouched", "base-labelled", "control-labelled", "calibrated-labelled", "truth-labelled"]
        assert list(outcome.policies) == names
        assert len({policy.digest for policy in outcome.policies.values()}) == len(names)
        found = PolicyComparison.model_validate_json(read(outcome.comparison.uri))
        assert list(found.policy_models) == names
        assert found.prompts == 60
        pairs = {(win.opponent, win.policy_model) for win in found.win_rates}
        assert pairs == {
            *(("untouched", name) for name in names[1:]),
            ("base-labelled", "calibrated-labelled"),
            ("control-labelled", "calibrated-labelled"),
        }
        measures = {mean.measure for mean in found.means}
        assert {"true quality", "flourishes", "score of base", "score of calibrated"} <= measures

    def test_best_of_n_of_the_labelled_responses_is_measured_too(self, outcome: PostTrainOutcome):
        report = BestOfNReport.model_validate_json(read(outcome.best_of_n.uri))
        assert (report.candidates, report.prompts, report.policy_models) == (3, 80, ("sample",))
        assert {item.scorer for item in report.values} == {"base", "control", "calibrated"}
        assert {(item.before, item.after) for item in report.differences} == {
            ("base", "calibrated"),
            ("control", "calibrated"),
        }

    def test_the_summary_says_what_came_out(self, outcome: PostTrainOutcome):
        assert "This is a simulation" in outcome.summary
        assert re.search(r"truth-labelled beats untouched by truth on [01]\.\d\d \[", outcome.summary)
        for policy in outcome.policies.values():
            assert policy.spec.path in outcome.summary

    def test_a_second_run_is_cached_in_every_step(self, outcome: PostTrainOutcome):
        again, fresh = fresh_steps(TINY)
        assert fresh == set()
        assert (again.comparison, again.best_of_n) == (outcome.comparison, outcome.best_of_n)

    def test_another_beta_trains_again_and_samples_nothing_again_to_label(self, outcome: PostTrainOutcome):
        run = TINY.model_copy(update={"training": TRAINING.model_copy(update={"beta": 0.5})})
        _, fresh = fresh_steps(run)
        trained = {"post_train_policy", "sample_shard", "join_shards", "join_answers", "score_responses"}
        assert fresh == {*trained, "compare_answers"}


def by_length(asked: Asked) -> Reply:
    """A judge that likes the longer response."""
    question = asked.body["messages"][0]["content"]
    first, second = (
        re.search(f"<{place}-message>\n(.*)\n</{place}-message>", question, re.DOTALL) for place in ("first", "second")
    )
    lengths = [len(found[1]) if found else 0 for found in (first, second)]
    return Reply(
        completion("[[TIE]]" if lengths[0] == lengths[1] else f"[[{'FIRST' if lengths[0] > lengths[1] else 'SECOND'}]]")
    )


@pytest.mark.slow
def test_a_policy_model_reward_model_and_judge_of_ones_own(home: Path, tmp_path: Path):
    for name, words in (("practice", WORDS[:30]), ("exam", WORDS[30:])):
        lines = [json.dumps({"prompt": f"{word} {other}"}) for word in words for other in WORDS[:4]]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    with EndpointServer(by_length) as server:
        run = PostTrainRun(
            name="own",
            policy_model=TransformersBackend(path=str(save_policy_model(tmp_path / "policy")), dtype="float32"),
            prompts=PromptSetConfig(source=str(tmp_path / "practice.jsonl")),
            exam_prompts=PromptSetConfig(source=str(tmp_path / "exam.jsonl")),
            reward_models={"mine": RewardModelSpec(path=str(save_model(tmp_path / "rm")), max_length=64)},
            judge=JudgeConfig(backend=OpenAIBackend(base_url=server.url, model="judge")),
            decoding=Decoding(sampling_temperature=1.0, max_tokens=20),
            training=TRAINING,
            best_of_n=BestOfNConfig(sizes=(2,), bootstrap_replicates=50),
            comparison=ComparisonConfig(bootstrap_replicates=50),
        )
        outcome = post_train(run)
    assert list(outcome.policies) == ["untouched", "mine-labelled"]
    found = PolicyComparison.model_validate_json(read(outcome.comparison.uri))
    (win,) = found.win_rates
    assert (win.policy_model, win.opponent, win.judge, win.prompts) == ("mine-labelled", "untouched", "judge", 40)
    # what it was trained for, more of the reward model's own score, it has learnt
    gain = next(item.difference for item in found.differences if item.measure == "score of mine")
    assert gain.low > 0
    assert "This is a simulation" not in outcome.summary
