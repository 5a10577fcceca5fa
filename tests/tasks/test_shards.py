"""Scoring in shards: the same scores, a finished shard is never done again, and a lost worker costs its shard."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from prefect import flow

from charm_core.errors import ConfigError, ModelError, ServiceError, TrainingError, WorkerLostError
from charm_core.reward_model.jobs import ScoringJob, ScoringSummary
from tasks import scoring
from tasks.caching import use_store
from tasks.scoring import RewardModelRef, Scored, score_responses, score_responses_shard
from tasks.scoring_settings import RayCluster, ScoringProcesses, ScoringSettings, use_scoring
from tasks.store import ArtifactStore
from tasks.worker_processes import OnLine
from tests.charm_core.reward_model import tiny
from tests.tasks.tiny_scoring import response_set, reward_model, scoring_here

pytestmark = pytest.mark.usefixtures("prefect_session")

PROMPTS_IN_ALL = 40
SHARD_TEXTS = 40
"""Of 120, so that there are four shards."""


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(url=str(tmp_path / "store"), work_folder=str(tmp_path / "work"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("rm"))


@pytest.fixture
def model(folder: Path) -> RewardModelRef:
    return reward_model(folder)


def scored(store: ArtifactStore, model: RewardModelRef, settings: ScoringSettings) -> Scored:
    @flow
    def scores() -> Any:
        return score_responses(model, response_set(store, PROMPTS_IN_ALL))

    with use_store(store), use_scoring(settings):
        return scores()  # type: ignore[no-any-return]


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Texts of every shard; what the process does is done in this one, for starting it takes seconds."""
    counts: list[int] = []
    monkeypatch.setattr(scoring, "run_scoring", scoring_here(counts))
    return counts


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for one in (score_responses, score_responses_shard):
        monkeypatch.setattr(one._task, "retry_delay_seconds", 0)


def test_shards_give_the_scores_of_one_piece(store: ArtifactStore, model: RewardModelRef, processes: list[int]):
    whole = scored(store, model, ScoringSettings())
    assert processes == [120]
    assert (
        scored(store, model, ScoringSettings(shard_texts=SHARD_TEXTS)) == whole
    )  # it is known, however it would be cut
    assert processes == [120]
    store.forget_step(score_responses.key(model, response_set(store, PROMPTS_IN_ALL)))
    cut = scored(store, model, ScoringSettings(shard_texts=SHARD_TEXTS))
    assert len(processes) == 5
    assert sum(processes[1:]) == 120
    one, many = (store.read_frame(each.scores) for each in (whole, cut))
    assert many.drop("score").equals(one.drop("score"))
    assert many["score"].to_list() == pytest.approx(one["score"].to_list(), abs=1e-5)
    assert cut.summary.model_dump(exclude={"padding_share"}) == pytest.approx(
        whole.summary.model_dump(exclude={"padding_share"}), abs=1e-5
    )


def test_the_size_of_shards_does_not_matter_where_one_is_enough(
    store: ArtifactStore, model: RewardModelRef, processes: list[int]
):
    first = scored(store, model, ScoringSettings(shard_texts=120))
    store.forget_step(score_responses.key(model, response_set(store, PROMPTS_IN_ALL)))
    assert scored(store, model, ScoringSettings(shard_texts=100_000)) == first
    assert processes == [120, 120]


def test_finished_shards_are_not_done_again(
    store: ArtifactStore, model: RewardModelRef, processes: list[int], monkeypatch: pytest.MonkeyPatch
):
    works = scoring.run_scoring

    def fails_third(job: ScoringJob, progress: Callable[[int, int], None], log: OnLine) -> ScoringSummary:
        if len(processes) == 2:
            raise ModelError("out of luck")
        return works(job, progress, log)

    monkeypatch.setattr(scoring, "run_scoring", fails_third)
    with pytest.raises(ModelError, match="out of luck"):
        scored(store, model, ScoringSettings(shard_texts=SHARD_TEXTS))
    monkeypatch.setattr(scoring, "run_scoring", works)
    scored(store, model, ScoringSettings(shard_texts=SHARD_TEXTS))
    assert len(processes) == 4
    assert sum(processes) == 120


@pytest.mark.usefixtures("impatient")
def test_a_shard_that_is_lost_is_tried_three_times_and_not_nine(
    store: ArtifactStore, model: RewardModelRef, monkeypatch: pytest.MonkeyPatch
):
    tries = []

    def killed(job: ScoringJob, _progress: Callable[[int, int], None], _log: OnLine) -> ScoringSummary:
        tries.append(job)
        raise WorkerLostError("ended by signal 9")

    monkeypatch.setattr(scoring, "run_scoring", killed)
    with pytest.raises(TrainingError, match="a shard was lost three times: ended by signal 9"):
        scored(store, model, ScoringSettings(shard_texts=SHARD_TEXTS))
    assert len(tries) == 3


def test_a_reward_model_that_changes_while_a_run_lasts_is_an_error(
    store: ArtifactStore, model: RewardModelRef, processes: list[int]
):
    other = model.model_copy(update={"digest": "0" * 64})
    with pytest.raises(ModelError, match="is not what it was when this run began"):
        scored(store, other, ScoringSettings(shard_texts=SHARD_TEXTS))
    assert processes == []


def test_a_cluster_needs_ray(store: ArtifactStore, model: RewardModelRef, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "prefect_ray", None)
    with pytest.raises(ConfigError, match="Ray is not installed here: pip install"):
        scored(store, model, ScoringSettings(shard_texts=SHARD_TEXTS, ray=RayCluster(address="local")))


def test_a_cluster_that_does_not_answer_is_named(store: ArtifactStore, model: RewardModelRef):
    nobody = RayCluster(address="127.0.0.1:9")  # the discard port: nothing listens
    with pytest.raises(ServiceError, match=r"Ray cluster at 127.0.0.1:9 does not answer .* unset CHARM_RAY_ADDRESS"):
        scored(store, model, ScoringSettings(shard_texts=SHARD_TEXTS, ray=nobody))


def scoring_processes_of(workers: str) -> list[psutil.Process]:
    """Processes that score, started by processes of that name."""
    found = []
    for process in psutil.process_iter():
        try:
            if "charm_core.reward_model.worker" in process.cmdline() and process.parent().name().startswith(workers):
                found.append(process)
        except (psutil.Error, AttributeError):
            continue
    return found


class Killer(threading.Thread):
    """Kills the Ray worker under whose hands the third shard is, and counts the processes that ever scored."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.seen: set[int] = set()
        self.killed: int | None = None
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.05):
            for process in scoring_processes_of("ray::"):
                self.seen.add(process.pid)
                if len(self.seen) == 3 and self.killed is None:
                    self.killed = process.ppid()
                    os.kill(self.killed, signal.SIGKILL)


@pytest.fixture
def cluster() -> Iterator[str]:
    """Address of a Ray cluster of two nodes with one core each, on loopback."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install '.[ray]'")
    pytest.importorskip("prefect_ray", reason="prefect-ray is not installed: pip install '.[ray]'")
    from ray.cluster_utils import Cluster

    two = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    two.add_node(num_cpus=1)
    try:
        yield two.address
    finally:
        two.shutdown()


@pytest.mark.slow
def test_ray_does_a_lost_shard_again_and_no_other(
    tmp_path: Path, store: ArtifactStore, model: RewardModelRef, cluster: str
):
    killer = Killer()
    killer.start()
    try:
        there = scored(store, model, ScoringSettings(shard_texts=SHARD_TEXTS, ray=RayCluster(address=cluster)))
    finally:
        killer.done.set()
        killer.join()
    assert killer.killed is not None
    assert len(killer.seen) == 4 + 1
    other = ArtifactStore(url=str(tmp_path / "other"), work_folder=str(tmp_path / "other-work"))
    # the number of threads decides how sums are rounded
    as_there = ScoringProcesses(number=1, cores=1)
    here = scored(other, model, ScoringSettings(shard_texts=SHARD_TEXTS, processes=as_there))
    assert there.scores.digest == here.scores.digest
    assert there.summary == here.summary
