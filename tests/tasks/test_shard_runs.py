"""Shards on Prefect workers: whoever takes one, its scores are those of this machine; one that is lost is given to another worker.

The server is real. A thread of this process stands in for the workers, so that it can be told when to fail; real ones are killed in
tests/deployments/test_shard_workers.py.
"""

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.flow_engine import run_flow
from prefect.states import Cancelled, Crashed, Failed, Pending, Running

from charm_core.errors import ConfigError, ModelError, ServiceError, TrainingError
from flows.score_shard import score_shard
from tasks import scoring, shard_runs
from tasks.caching import use_store
from tasks.scoring import RewardModelRef, Scored, score_responses, score_responses_shard
from tasks.scoring_settings import ScoringSettings, use_scoring
from tasks.store import ArtifactStore
from tests.charm_core.reward_model import tiny
from tests.tasks.tiny_scoring import response_set, reward_model, scoring_here

pytestmark = pytest.mark.usefixtures("prefect_session")

Does = Callable[[SyncPrefectClient, FlowRun], None]
TEXTS, SHARDS = 60, 2


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CHARM_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("CHARM_STORE", raising=False)
    return tmp_path / "home"


@pytest.fixture
def store(home: Path) -> ArtifactStore:
    return ArtifactStore(url=str(home / "store"), work_folder=str(home / "work"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("rm"))


@pytest.fixture
def model(folder: Path) -> RewardModelRef:
    return reward_model(folder)


@pytest.fixture(autouse=True)
def processes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Texts of every shard; what a scoring process does is done in this one, for starting it takes seconds."""
    counts: list[int] = []
    monkeypatch.setattr(scoring, "run_scoring", scoring_here(counts))
    for one in (score_responses, score_responses_shard):
        monkeypatch.setattr(one._task, "retry_delay_seconds", 0)
    monkeypatch.setattr(shard_runs, "_POLL_SECONDS", 0.2)
    monkeypatch.setattr(shard_runs, "BEAT_SECONDS", 0.2)
    return counts


@pytest.fixture(autouse=True)
def bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Should the stand-in fail, the asker does not wait for ever."""
    looks, deadline = shard_runs.ShardRuns._look_at, time.monotonic() + 300

    def look_at(self: shard_runs.ShardRuns, *arguments: Any) -> None:
        assert time.monotonic() < deadline, "no end in sight"
        looks(self, *arguments)

    monkeypatch.setattr(shard_runs.ShardRuns, "_look_at", look_at)


class Clock:
    """The asker's clock, which can be put forward: no test waits for minutes, and none depends on how busy the machine is."""

    sleep = staticmethod(time.sleep)

    def __init__(self) -> None:
        self.ahead = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(shard_runs, "time", found)
    return found


class StandIn(threading.Thread):
    """Takes flow runs of a deployment as a worker does, and does with the first ones what it was told to, with all others their work."""

    def __init__(self, deployment: uuid.UUID, *first: Does) -> None:
        super().__init__(daemon=True)
        self._deployment = DeploymentFilter(id=DeploymentFilterId(any_=[deployment]))
        self._first = list(first)
        self._taken: set[uuid.UUID] = set()
        self._ended = threading.Event()

    def run(self) -> None:
        with get_client(sync_client=True) as client:
            while not self._ended.wait(0.1):
                for run in self.runs(client):
                    if run.id not in self._taken and run.state is not None and run.state.type == StateType.SCHEDULED:
                        self._taken.add(run.id)
                        (self._first.pop(0) if self._first else works)(client, run)

    def runs(self, client: SyncPrefectClient) -> list[FlowRun]:
        found = client.read_flow_runs(deployment_filter=self._deployment)
        return sorted(found, key=lambda run: (run.created, run.name))

    def __enter__(self) -> "StandIn":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.join()


def works(_client: SyncPrefectClient, run: FlowRun) -> None:
    with suppress(Exception):  # what fails there is told by its state
        run_flow(score_shard, flow_run=run, parameters=score_shard.validate_parameters(run.parameters))


def fails(message: str) -> Does:
    def does(client: SyncPrefectClient, run: FlowRun) -> None:
        client.set_flow_run_state(run.id, Running(), force=True)
        client.set_flow_run_state(run.id, Failed(message=message), force=True)

    return does


def falls_silent(client: SyncPrefectClient, run: FlowRun) -> None:
    client.set_flow_run_state(run.id, Running(), force=True)
    client.update_flow_run_labels(run.id, {"charm.beat": 1})


def taken_by(worker: str | None, *, there: bool = False) -> Does:
    """Taken, and then nothing."""

    def does(client: SyncPrefectClient, run: FlowRun) -> None:
        client.set_flow_run_state(run.id, Pending(), force=True)
        if worker is not None:
            client.update_flow_run_labels(run.id, {"prefect.worker.name": worker})
        if there:
            assert run.work_pool_name is not None
            client.send_worker_heartbeat(run.work_pool_name, worker_name=worker, heartbeat_interval_seconds=30)

    return does


@pytest.fixture
def deployment() -> Iterator[tuple[str, uuid.UUID]]:
    name = f"workers-{uuid.uuid4().hex[:8]}"
    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name=name, type="process"))
        flow_id = client.create_flow(score_shard)
        yield (
            f"score-shard/{name}",
            client.create_deployment(flow_id, name, work_pool_name=name, enforce_parameter_schema=False),
        )


def scored(store: ArtifactStore, model: RewardModelRef, deployment: str | None) -> Scored:
    @flow(name="asker", flow_run_name="audit my-rm")
    def scores() -> Any:
        return score_responses(model, response_set(store, TEXTS // 3))

    with use_store(store), use_scoring(ScoringSettings(shard_texts=TEXTS // SHARDS, deployment=deployment)):
        return scores()  # type: ignore[no-any-return]


def states(stand_in: StandIn) -> list[tuple[str, str]]:
    with get_client(sync_client=True) as client:
        return [(run.name, run.state_name or "") for run in stand_in.runs(client)]


def test_workers_give_the_scores_of_this_machine(
    tmp_path: Path,
    store: ArtifactStore,
    model: RewardModelRef,
    deployment: tuple[str, uuid.UUID],
    processes: list[int],
):
    name, number = deployment
    with StandIn(number) as stand_in:
        there = scored(store, model, name)
    assert sum(processes) == TEXTS
    assert states(stand_in) == [(f"audit my-rm · shard {n} of {SHARDS}", "Completed") for n in range(1, SHARDS + 1)]
    here = scored(ArtifactStore(url=str(tmp_path / "other"), work_folder=str(tmp_path / "work")), model, None)
    assert there.scores.digest == here.scores.digest
    assert there.summary == here.summary


def test_what_is_recorded_is_asked_of_nobody(
    store: ArtifactStore, model: RewardModelRef, deployment: tuple[str, uuid.UUID], processes: list[int]
):
    first = scored(store, model, None)
    store.forget_step(score_responses.key(model, response_set(store, TEXTS // 3)))
    assert scored(store, model, deployment[0]) == first
    assert len(processes) == SHARDS


@pytest.mark.parametrize(
    ("trouble", "later"),
    [
        (fails("Flow run encountered an exception: BrokenPipeError: [Errno 32] Broken pipe"), 0.0),
        (fails("Flow run encountered an exception: WorkerLostError: ended by signal 9"), 0.0),
        (falls_silent, shard_runs.LOST_SECONDS),
        (taken_by(None), shard_runs.LOST_SECONDS),
        (taken_by("a worker that has gone"), shard_runs.LOST_SECONDS),
        (taken_by("a worker that is there", there=True), shard_runs.STARTING_SECONDS),
    ],
    ids=["broken pipe", "killed", "silent", "taken by nobody", "its worker has gone", "never starts"],
)
def test_a_lost_shard_is_given_to_another_worker(
    trouble: Does,
    later: float,
    store: ArtifactStore,
    model: RewardModelRef,
    deployment: tuple[str, uuid.UUID],
    processes: list[int],
    clock: Clock,
):
    def works_and_time_goes_by(client: SyncPrefectClient, run: FlowRun) -> None:
        works(client, run)
        clock.ahead += later + 5

    with StandIn(deployment[1], trouble, works_and_time_goes_by) as stand_in:
        scored(store, model, deployment[0])
    ended = states(stand_in)
    assert len(ended) == SHARDS + 1
    assert [name for name, state in ended if state == "Completed"] == [
        *(f"audit my-rm · shard {n} of {SHARDS}" for n in range(2, SHARDS + 1)),
        f"audit my-rm · shard 1 of {SHARDS} · try 2",
    ]
    assert dict(ended)[f"audit my-rm · shard 1 of {SHARDS}"] in ("Failed", "Crashed")
    assert sum(processes) == TEXTS


def test_a_run_that_lives_is_waited_for(
    store: ArtifactStore, model: RewardModelRef, deployment: tuple[str, uuid.UUID], processes: list[int], clock: Clock
):
    def takes_its_time(client: SyncPrefectClient, run: FlowRun) -> None:
        client.set_flow_run_state(run.id, Running(), force=True)
        for beat in range(4):
            client.update_flow_run_labels(run.id, {"charm.beat": beat})
            time.sleep(0.5)
            clock.ahead += 0.7 * shard_runs.LOST_SECONDS
        client.set_flow_run_state(run.id, Pending(), force=True)
        works(client, run)

    with StandIn(deployment[1], takes_its_time) as stand_in:
        scored(store, model, deployment[0])
    assert len(states(stand_in)) == SHARDS
    assert sum(processes) == TEXTS


def test_a_shard_that_is_lost_three_times_is_an_error_and_the_others_are_kept(
    store: ArtifactStore, model: RewardModelRef, deployment: tuple[str, uuid.UUID], processes: list[int]
):
    lost: list[str] = []

    def loses_the_first(client: SyncPrefectClient, run: FlowRun) -> None:
        if "shard 1 of" in run.name:
            lost.append(run.name)
            client.set_flow_run_state(run.id, Crashed(message="the machine is broken"), force=True)
        else:
            works(client, run)

    with (
        StandIn(deployment[1], *[loses_the_first] * (SHARDS + 2)),
        pytest.raises(TrainingError, match=r"try 3 was lost, as were its tries before: the machine is broken"),
    ):
        scored(store, model, deployment[0])
    assert len(lost) == 3
    assert len(processes) == SHARDS - 1
    with StandIn(deployment[1]):
        scored(store, model, deployment[0])
    assert len(processes) == SHARDS


def test_an_error_that_would_come_again_comes_once_and_as_it_was(
    store: ArtifactStore, model: RewardModelRef, deployment: tuple[str, uuid.UUID], processes: list[int]
):
    with (
        StandIn(deployment[1], fails("Flow run encountered an exception: ModelError: no such folder")) as stand_in,
        pytest.raises(ModelError, match=f"audit my-rm · shard 1 of {SHARDS}: no such folder"),
    ):
        scored(store, model, deployment[0])
    assert [state for _, state in states(stand_in)] == ["Failed", *["Completed"] * (SHARDS - 1)]
    assert len(processes) == SHARDS - 1


def test_a_cancelled_shard_is_not_done_again(
    store: ArtifactStore, model: RewardModelRef, deployment: tuple[str, uuid.UUID]
):
    def cancels(client: SyncPrefectClient, run: FlowRun) -> None:
        client.set_flow_run_state(run.id, Cancelled(), force=True)

    with StandIn(deployment[1], cancels) as stand_in, pytest.raises(ServiceError, match=r"shard 1 of 2 was cancelled"):
        scored(store, model, deployment[0])
    assert len(states(stand_in)) == SHARDS


def test_a_run_that_somebody_deletes_is_given_to_another_worker(
    store: ArtifactStore, model: RewardModelRef, deployment: tuple[str, uuid.UUID], processes: list[int]
):
    with StandIn(deployment[1], lambda client, run: client.delete_flow_run(run.id)) as stand_in:
        scored(store, model, deployment[0])
    assert [state for _, state in states(stand_in)] == ["Completed"] * SHARDS
    assert sum(processes) == TEXTS


class AwayFor:
    """Stands in for the server's answer about flow runs: it does not come a few times."""

    def __init__(self, times: int) -> None:
        self.times = times
        self._answer = shard_runs._read

    def __call__(self, client: SyncPrefectClient, ids: list[uuid.UUID]) -> list[FlowRun]:
        self.times -= 1
        if self.times >= 0:
            raise httpx.ConnectError("connection refused")
        return self._answer(client, ids)


def test_a_server_that_is_away_is_waited_for_and_no_shard_counts_as_lost(
    store: ArtifactStore,
    model: RewardModelRef,
    deployment: tuple[str, uuid.UUID],
    processes: list[int],
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
):
    def takes_longer_than_that(client: SyncPrefectClient, run: FlowRun) -> None:
        falls_silent(client, run)
        time.sleep(1.0)
        monkeypatch.setattr(shard_runs, "_read", away := AwayFor(5))
        while away.times > 3:
            time.sleep(0.1)
        clock.ahead += 2 * shard_runs.LOST_SECONDS
        while away.times >= 0:
            time.sleep(0.1)
        client.set_flow_run_state(run.id, Pending(), force=True)
        works(client, run)

    with StandIn(deployment[1], takes_longer_than_that) as stand_in:
        scored(store, model, deployment[0])
    assert len(states(stand_in)) == SHARDS
    assert sum(processes) == TEXTS


def test_a_server_that_stays_away_is_an_error(
    store: ArtifactStore,
    model: RewardModelRef,
    deployment: tuple[str, uuid.UUID],
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(shard_runs, "_read", away := AwayFor(1_000_000))

    def sleep(_seconds: float) -> None:
        clock.ahead += 110.0

    monkeypatch.setattr(clock, "sleep", sleep)
    with pytest.raises(
        ServiceError, match=r"did not answer for 300 seconds \(connection refused\); finished shards are"
    ):
        scored(store, model, deployment[0])
    assert away.times == 1_000_000 - 4


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (422, pytest.raises(httpx.HTTPStatusError, match="it says 422")),
        (503, pytest.raises(ServiceError, match="it says")),
    ],
)
def test_a_server_that_takes_no_new_try_is_not_asked_for_ever(
    status: int,
    expected: Any,
    store: ArtifactStore,
    model: RewardModelRef,
    deployment: tuple[str, uuid.UUID],
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
):
    """It tells how the first try is, so it is there; but not every time of a 503 counts as its coming back."""
    starts = shard_runs.ShardRuns._start

    def refuses(self: shard_runs.ShardRuns, shard: Any, of: int) -> None:
        if shard.tries:
            clock.ahead += 110.0
            request = httpx.Request("POST", "http://127.0.0.1/api")
            raise httpx.HTTPStatusError(f"it says {status}", request=request, response=httpx.Response(status))
        starts(self, shard, of)

    monkeypatch.setattr(shard_runs.ShardRuns, "_start", refuses)
    crash = fails("Flow run encountered an exception: BrokenPipeError: [Errno 32] Broken pipe")
    with StandIn(deployment[1], crash), expected:
        scored(store, model, deployment[0])


def test_who_gives_up_leaves_no_run_behind(
    store: ArtifactStore,
    model: RewardModelRef,
    deployment: tuple[str, uuid.UUID],
    monkeypatch: pytest.MonkeyPatch,
):
    looked: list[int] = []

    def interrupts(self: shard_runs.ShardRuns, *_: object) -> None:
        looked.append(1)
        if len(looked) > SHARDS:
            raise KeyboardInterrupt

    monkeypatch.setattr(shard_runs.ShardRuns, "_look", interrupts)
    with StandIn(deployment[1], falls_silent) as stand_in:
        stand_in._first += [lambda _client, _run: None] * SHARDS
        with pytest.raises(KeyboardInterrupt):
            scored(store, model, deployment[0])
    ended = [state for _, state in states(stand_in)]
    assert sorted(set(ended)) in (["Cancelled"], ["Cancelled", "Cancelling"])


def test_a_worker_with_another_store_is_an_error(
    tmp_path: Path, store: ArtifactStore, model: RewardModelRef, deployment: tuple[str, uuid.UUID], processes: list[int]
):
    elsewhere = ArtifactStore(url=str(tmp_path / "elsewhere"), work_folder=str(tmp_path / "work"))
    with StandIn(deployment[1]), pytest.raises(ConfigError, match=f"store of this worker is {store.url}, that of the"):
        scored(elsewhere, model, deployment[0])
    assert processes == []


def test_a_deployment_that_is_not_there_is_named(store: ArtifactStore, model: RewardModelRef):
    with pytest.raises(
        ServiceError, match=r"no deployment 'score-shard/nobody'; make it with deployments/prepare_prefect"
    ):
        scored(store, model, "score-shard/nobody")


def test_that_no_worker_takes_a_shard_is_said_once(
    store: ArtifactStore,
    model: RewardModelRef,
    deployment: tuple[str, uuid.UUID],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    monkeypatch.setattr(shard_runs, "UNTAKEN_SECONDS", 0.0)
    pool = deployment[0].partition("/")[2]

    def said() -> int:
        return sum(f"prefect worker start --pool {pool} --limit 1" in line for line in caplog.messages)

    class Late(StandIn):
        def run(self) -> None:
            while said() < SHARDS and not self._ended.wait(0.1):
                pass
            time.sleep(1.0)
            super().run()

    with Late(deployment[1]):
        scored(store, model, deployment[0])
    assert said() == SHARDS
