"""``kill -9`` of the flow, of the ranks that train and of their launcher, at every stage."""

import os
import re
import signal
from dataclasses import dataclass, replace

import psutil
import pytest

from tasks.ledger import Ledger
from tests.faults.night import GONE, MODEL, Night, Point, called, opened, renamed, requested, results


@dataclass(frozen=True)
class Stage:
    """A part of the job."""

    point: Point
    """Where in it."""
    again: tuple[str, ...] = ()
    """Steps that are under way there."""


TRAINING = renamed(r"checkpoints/step-00000002$")
STAGES = {
    "simulating": Stage(renamed(r"/steps/simulate_sources-"), ("simulate_sources",)),
    "scoring": Stage(renamed(r"charm-scoring-.*scores\.parquet$"), ("score_responses",)),
    "training": Stage(TRAINING, ("train_reward_model",)),
    "evaluating": Stage(renamed(r"/steps/evaluate_variant-"), ("evaluate_variant",)),
    "reporting": Stage(renamed(r"/store/report/"), ("compose_report",)),
    "packaging": Stage(renamed(r"/released_model/.*/\.charm-manifest\.json$"), ("package_model",)),
    "registering": Stage(requested(r"POST /api/2\.0/mlflow/model-versions/create")),
    "ending": Stage(renamed(r"/notes/")),
}
"""Parts to which ``prepare`` brings a job that has been done."""

WAY = {
    "opening": renamed(r"/store/probe/"),
    "simulating": STAGES["simulating"].point,
    "splitting": renamed(r"/steps/split_responses-"),
    "scoring": STAGES["scoring"].point,
    "measuring": STAGES["evaluating"].point,
    "fitting offsets": renamed(r"/steps/fit_model_offsets-"),
    "building pairs": renamed(r"/steps/build_pairs-"),
    "training": TRAINING,
    "saving the model": renamed(r"/train-.*/model$"),
    "storing the model": renamed(r"/store/reward_model/.*/\.charm-manifest\.json$"),
    "training the control": TRAINING,
    "scoring again": STAGES["scoring"].point,
    "evaluating": STAGES["evaluating"].point,
    "picking": renamed(r"/steps/pick_best_of_n-"),
    "scoring repeatedly": STAGES["scoring"].point,
    "reporting": STAGES["reporting"].point,
    "packaging": STAGES["packaging"].point,
    "registering": STAGES["registering"].point,
    "judging": requested(r"POST /api/2\.0/mlflow/model-versions/set-tag"),
    "ending": STAGES["ending"].point,
}
"""All stages of a job that starts from nothing, in their order."""


def prepare(night: Night, stage: str) -> list[str]:
    """Make the job come to a stage again; the steps that it then has to do."""
    again = list(STAGES[stage].again)
    if stage == "training":
        night.forget(*again, name="calibrated")
        return again
    if stage == "registering":
        night.client().delete_registered_model(MODEL)
    if again:
        night.forget(*again)
    return sorted(call.step for call in night.ledger().calls if call.step in again)


def assert_as_undisturbed(night: Night, undisturbed: Ledger) -> None:
    """The same digests from the same keys, one registered version, nothing left running anywhere."""
    assert results(night.ledger()) == results(undisturbed)
    assert night.jobs[-1].no_process_is_left()
    assert "RUNNING" not in night.statuses().values()
    assert night.running_flow_runs() == []
    digests = [version.tags["digest"] for version in night.client().search_model_versions(f"name = '{MODEL}'")]
    assert len(digests) == len(set(digests)) == 1
    assert not list((night.home / "work" / "locks").glob("*"))
    # the locks of devices stay, as the night's home does
    assert not [path for path in night.temporary.glob("charm-*") if not path.name.startswith("charm-devices-")]


def assert_kept(night: Night, finished: dict[str, tuple[int, int]]) -> None:
    """What was finished is there, and was not done again."""
    assert finished.items() <= night.records().items()


def steps_done(night: Night) -> list[list[int]]:
    """How often each optimiser step was done, for every training."""
    logs = [log.read_text() for log in (night.home / "work").glob("train-*/progress/training.log")]
    found = []
    for log in logs:
        total = int(re.findall(r"; (\d+) steps, \d+ done before", log)[-1])
        found.append([log.count(f"step {step} of {total}:") for step in range(1, total + 1)])
    return found


def test_the_flow_is_killed_at_every_stage(night: Night, undisturbed: Ledger):
    night.forget_all()
    finished: dict[str, tuple[int, int]] = {}
    for stage, point in WAY.items():
        job = night.start(point)
        job.halted()
        job.kill()
        assert job.no_process_is_left(), stage
        assert_kept(night, finished)
        finished = night.records()
    night.finish()
    assert_kept(night, finished)
    assert_as_undisturbed(night, undisturbed)
    # where it was killed a checkpoint was there, and the step after that was done again; the base's, the control's, the calibrated
    assert [done[0] for done in steps_done(night)] == [1, 1, 1]
    assert night.flow_run_states() == ["CRASHED"] * (len(WAY) - 1) + ["COMPLETED"]


def ranks(launcher: psutil.Process) -> list[psutil.Process]:
    """The two processes that train, in order of their rank."""
    return sorted(launcher.children(), key=lambda process: int(process.environ()["RANK"]))


@dataclass(frozen=True)
class Moment:
    """A time in a training."""

    first: Point
    """In a training from the beginning."""
    then: Point
    """In one that goes on from a checkpoint."""
    again: int | None = None
    """Index of the optimiser step that had been done after the last checkpoint."""


MOMENTS = {
    "it has not begun": Moment(*[called("charm_core.reward_model.worker._join_group")] * 2),
    "in a step": Moment(
        replace(called("charm_core.reward_model.engines.ZeroEngine.step"), passed=2),
        called("charm_core.reward_model.engines.ZeroEngine.step"),
    ),
    "it writes a checkpoint": Moment(*[opened(r"checkpoints/partial-00000002-\d+/state\.json$")] * 2, again=1),
    "it evaluates": Moment(
        replace(called("charm_core.reward_model.training._Trainer._evaluate"), passed=1),
        called("charm_core.reward_model.training._Trainer._evaluate"),
    ),
    "it saves the model": Moment(*[opened(r"/model\.partial/tokenizer")] * 2, again=-1),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_both_ranks_are_killed_one_after_the_other(night: Night, undisturbed: Ledger, moment: str):
    again = prepare(night, "training")
    when = MOMENTS[moment]
    job = night.start(when.first, when.then)
    launcher = psutil.Process(job.halted()).parent()
    ranks(launcher)[0].kill()
    launcher.wait(timeout=GONE)
    job.go_on()
    # the run tries again by itself, from the last checkpoint
    launcher = psutil.Process(job.halted(1)).parent()
    ranks(launcher)[1].kill()
    job.go_on(1)
    assert job.wait() == 0, job.output()
    assert night.ran() == again
    (done,) = steps_done(night)
    if when.again is not None:
        assert 1 <= done.pop(when.again) <= 3
    assert set(done) == {1}
    assert_as_undisturbed(night, undisturbed)
    assert night.flow_run_states() == ["COMPLETED"]


def test_the_launcher_of_a_training_is_killed(night: Night, undisturbed: Ledger):
    again = prepare(night, "training")
    job = night.start(TRAINING)
    psutil.Process(job.halted()).parent().kill()
    job.go_on()
    assert job.wait() == 0, job.output()
    assert night.ran() == again
    assert [done[0] for done in steps_done(night)] == [1]
    assert_as_undisturbed(night, undisturbed)
    assert night.flow_run_states() == ["COMPLETED"]


def test_a_process_that_scores_is_killed(night: Night, undisturbed: Ledger):
    again = prepare(night, "scoring")
    job = night.start(STAGES["scoring"].point)
    os.kill(job.halted(), signal.SIGKILL)
    # as the system does it when memory runs out; the run tries again by itself
    assert job.wait() == 0, job.output()
    assert night.ran() == again
    assert_as_undisturbed(night, undisturbed)
    assert night.flow_run_states() == ["COMPLETED"]
