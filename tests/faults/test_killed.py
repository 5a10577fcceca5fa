"""``kill -9`` of the flow, of the ranks that train and of their launcher, at every stage."""

import os
import signal
from dataclasses import dataclass

import psutil
import pytest

from tasks.ledger import Ledger
from tests.faults.night import MODEL, Night, Point, renamed, requested, results


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
    digests = [version.tags["digest"] for version in night.client().search_model_versions(f"name = '{MODEL}'")]
    assert len(digests) == len(set(digests)) == 1
    assert not list((night.home / "work" / "locks").glob("*"))


@pytest.mark.parametrize("stage", STAGES)
def test_the_flow_is_killed(night: Night, undisturbed: Ledger, stage: str):
    again = prepare(night, stage)
    job = night.start(STAGES[stage].point)
    job.halted()
    job.kill()
    assert job.no_process_is_left()
    night.finish()
    # what was finished before is taken; of the steps that were under way at most one had ended
    assert len(again) - len(night.ran()) <= max(0, len(again) - 1)
    assert set(night.ran()) <= set(again)
    assert_as_undisturbed(night, undisturbed)
    assert set(night.flow_run_states()) == {"CRASHED", "COMPLETED"}


def ranks(launcher: psutil.Process) -> list[psutil.Process]:
    """The two processes that train, in order of their rank."""
    return sorted(launcher.children(), key=lambda process: int(process.environ()["RANK"]))


@pytest.mark.parametrize("victim", ["rank 0", "rank 1", "launcher"])
def test_a_process_that_trains_is_killed(night: Night, undisturbed: Ledger, victim: str):
    again = prepare(night, "training")
    job = night.start(TRAINING)
    launcher = psutil.Process(job.halted()).parent()
    killed = launcher if victim == "launcher" else ranks(launcher)[int(victim[-1])]
    os.kill(killed.pid, signal.SIGKILL)
    job.go_on()
    # the run tries again by itself, from the last checkpoint
    assert job.wait() == 0, job.output()
    assert night.ran() == again
    (log,) = (night.home / "work").glob("train-*/progress/training.log")
    assert log.read_text().count("step 1 of ") == 1
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
