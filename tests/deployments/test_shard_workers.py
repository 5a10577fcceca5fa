"""The shards of a scoring on two real Prefect workers, one of which is lost with its machine: it costs its shard and no other."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from prefect import flow
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterDeploymentId
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_URL, PREFECT_LOGGING_TO_API_ENABLED, temporary_settings

from tasks import shard_runs
from tasks.caching import use_store
from tasks.scoring import RewardModelRef, Scored, score_responses
from tasks.scoring_settings import ScoringSettings, use_scoring
from tasks.store import ArtifactStore
from tests.charm_core.reward_model import tiny
from tests.prefect_server import PrefectServer
from tests.tasks.tiny_scoring import response_set, reward_model

pytestmark = [pytest.mark.slow, pytest.mark.deployment]

NAME = "score-shard/workers"
SHARDS = 4


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectServer]:
    server = PrefectServer(tmp_path_factory.mktemp("site"))
    try:
        server.start()
        server.run("prefect", "work-pool", "create", "shards", "--type", "process")
        server.run("prefect", "--no-prompt", "deploy", "--name", NAME.partition("/")[2])
        for _ in range(2):
            server.start_worker("shards", "--limit", "1")
        yield server
    finally:
        server.stop()


def store(folder: Path) -> ArtifactStore:
    return ArtifactStore(url=str(folder / "home" / "store"), work_folder=str(folder / "home" / "work"))


def scored(store: ArtifactStore, model: RewardModelRef, deployment: str | None) -> Scored:
    answered = response_set(store, 40)

    @flow(name="asker", flow_run_name="audit my-rm")
    def scores() -> Any:
        return score_responses(model, answered)

    settings = ScoringSettings(shard_texts=40, deployment=deployment)
    with use_store(store), use_scoring(settings):
        return scores()  # type: ignore[no-any-return]


class Loss(threading.Thread):
    """Kills a worker with all its processes, as a power cut would, when it has the second shard that is scored."""

    def __init__(self, workers: list[int]) -> None:
        super().__init__(daemon=True)
        self._workers = {pid: psutil.Process(pid) for pid in workers}
        self.seen: set[int] = set()
        self.lost: int | None = None
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.05):
            for pid, worker in self._workers.items():
                if pid == self.lost:
                    continue
                below = worker.children(recursive=True)
                scoring = {one.pid for one in below if is_scoring(one)}
                self.seen |= scoring
                if scoring and len(self.seen) >= 2 and self.lost is None:
                    self.lost = pid
                    for one in [worker, *below]:
                        os.kill(one.pid, signal.SIGKILL)


def is_scoring(process: psutil.Process) -> bool:
    try:
        return "charm_core.reward_model.worker" in process.cmdline()
    except psutil.Error:
        return False


def runs(server: PrefectServer) -> list[FlowRun]:
    with server.client() as client:
        deployment = client.read_deployment_by_name(NAME).id
        mine = FlowRunFilter(deployment_id=FlowRunFilterDeploymentId(any_=[deployment]))
        return sorted(client.read_flow_runs(flow_run_filter=mine), key=lambda run: run.name)


def test_a_machine_that_is_lost_costs_its_shard(tmp_path: Path, server: PrefectServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shard_runs, "LOST_SECONDS", 30.0)
    folder = tiny.save_model(tmp_path / "rm")
    model = reward_model(folder)
    loss = Loss(server.workers())
    loss.start()
    try:
        with temporary_settings({PREFECT_API_URL: server.url, PREFECT_LOGGING_TO_API_ENABLED: False}):
            there = scored(store(server.folder), model, NAME)
    finally:
        loss.done.set()
        loss.join()
    assert loss.lost is not None
    assert len(loss.seen) == SHARDS + 1
    ended = [(run.name.partition(" · ")[2], run.state_name) for run in runs(server)]
    again = [name for name, _ in ended if name.endswith("· try 2")]
    assert len(again) == 1
    assert sorted(name for name, state in ended if state == "Completed") == sorted(
        [f"shard {n} of {SHARDS}" for n in range(1, SHARDS + 1) if not again[0].startswith(f"shard {n} ")] + again
    )
    assert [state for name, state in ended if state != "Completed"] == ["Crashed"]
    with temporary_settings({PREFECT_API_URL: server.url, PREFECT_LOGGING_TO_API_ENABLED: False}):
        here = scored(store(tmp_path), model, None)
    assert there.scores.digest == here.scores.digest
    assert there.summary == here.summary
