"""Shards as flow runs of a deployment, done by Prefect workers wherever they are.

Whoever asks watches its runs on the Prefect server. A run tells that server every few seconds that it lives; one that has not for a
while was lost with its machine, and its shard is given to another worker. How long that is, is measured by the asker's own clock
between what it sees, so that no two clocks need to agree.
"""

import contextlib
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun, State, StateType, WorkerStatus
from prefect.exceptions import ObjectNotFound, PrefectException
from prefect.states import Cancelled, Cancelling, Crashed

from charm_core import errors
from charm_core.errors import CharmError, ServiceError, WorkerLostError
from tasks.publishing import run_logger

BEAT_SECONDS = 10.0
"""Between two signs of life."""
LOST_SECONDS = 90.0
"""Without one."""
STARTING_SECONDS = 900.0
"""From when a worker has taken a run to its first line: a machine may have to be started for it."""
UNTAKEN_SECONDS = 60.0
"""After which somebody is told that no worker takes the runs."""
TRIES = 3
_POLL_SECONDS = 2.0
_AWAY_SECONDS = 300.0
"""How long a Prefect server may be away."""
_PAGE = 100
_BEAT = "charm.beat"
_WORKER = "prefect.worker.name"
_ERROR = re.compile(r"\b([A-Z]\w+Error): (.*)", re.DOTALL)


@contextlib.contextmanager
def signs_of_life(flow_run_id: UUID) -> Iterator[None]:
    """Tell the Prefect server now and then that a flow run of this process lives."""
    ended = threading.Event()

    def beat() -> None:
        number = 0
        while True:
            number += 1
            # a server that is away misses one; whoever watches sees neither the run nor the time pass
            with contextlib.suppress(httpx.HTTPError, PrefectException), get_client(sync_client=True) as client:
                client.update_flow_run_labels(flow_run_id, {_BEAT: number})
            if ended.wait(BEAT_SECONDS):
                return

    thread = threading.Thread(target=beat, name="signs-of-life", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@dataclass(kw_only=True)
class _Shard:
    """A shard that somebody else does."""

    number: int
    parameters: Mapping[str, Any]
    tries: int = 0
    run: FlowRun | None = None
    changed: float = 0.0
    """When something of the run was seen to change, in seconds of this process's clock."""
    told: bool = False
    """That no worker takes it."""
    outcome: CharmError | None = None
    done: bool = False


class _Away:
    """Endures a Prefect server that is away for some minutes."""

    def __init__(self) -> None:
        self._since: float | None = None

    @contextlib.contextmanager
    def endured(self) -> Iterator[None]:
        """Leave out what fails because the server is away.

        Raises:
            ServiceError: It has been for too long.
        """
        now = time.monotonic()
        try:
            yield
        except httpx.HTTPError as error:
            if isinstance(error, httpx.HTTPStatusError) and not error.response.is_server_error:
                raise  # it is there, and refuses
            if self._since is None:
                self._since = now
                run_logger().warning("the Prefect server does not answer (%s); waiting for it", error)
            if now - self._since > _AWAY_SECONDS:
                raise ServiceError(
                    f"the Prefect server did not answer for {_AWAY_SECONDS:.0f} seconds ({error}); finished shards are kept, run again to "
                    "go on"
                ) from None
        else:
            self._since = None

    def has_answered(self, shards: Sequence[_Shard]) -> None:
        """It tells how shards are: where it was away, none could give a sign of life meanwhile."""
        if self._since is not None:
            for shard in shards:
                shard.changed = time.monotonic()


class ShardRuns:
    """Flow runs of a deployment, one per shard."""

    def __init__(self, deployment: str, name: str) -> None:
        """Find the deployment.

        Args:
            deployment: flow/deployment.
            name: What the runs are called, with their number behind it.

        Raises:
            ServiceError: There is none of that name on the Prefect server.
        """
        self._name, self._away = name, _Away()
        with get_client(sync_client=True) as client:
            try:
                found = client.read_deployment_by_name(deployment)
            except (ObjectNotFound, ValueError):
                raise ServiceError(
                    f"the Prefect server has no deployment {deployment!r}; make it with deployments/prepare_prefect.sh, or unset "
                    f"CHARM_SCORING_DEPLOYMENT to score on this machine"
                ) from None
        self._deployment, self._pool = found.id, found.work_pool_name

    def do(self, parameters: Sequence[Mapping[str, Any]], on_done: Callable[[int], None]) -> None:
        """Have all of them done.

        Args:
            parameters: Of every run.
            on_done: Called with the number of runs that are done.

        Raises:
            CharmError: A run failed, after all others have ended: what they did is recorded.
            WorkerLostError: A shard was lost three times.
            ServiceError: The server is away for minutes.
        """
        shards = [_Shard(number=number, parameters=each) for number, each in enumerate(parameters, start=1)]
        try:
            for shard in shards:
                self._start(shard, len(shards))
            while open_shards := [shard for shard in shards if not shard.done]:
                time.sleep(_POLL_SECONDS)
                with self._away.endured():
                    self._look_at(open_shards, len(shards))
                on_done(sum(shard.done and shard.outcome is None for shard in shards))
        except BaseException:
            self._cancel([shard for shard in shards if not shard.done])
            raise
        failed = [shard.outcome for shard in shards if shard.outcome is not None]
        if failed:
            raise failed[0]

    def _start(self, shard: _Shard, of: int) -> None:
        again = f" · try {shard.tries + 1}" if shard.tries else ""
        with get_client(sync_client=True) as client:
            shard.run = client.create_flow_run_from_deployment(
                self._deployment,
                parameters=dict(shard.parameters),
                name=f"{self._name} · shard {shard.number} of {of}{again}",
                tags=["charm", "shard"],
            )
        shard.tries, shard.changed, shard.told = shard.tries + 1, time.monotonic(), False

    def _look_at(self, shards: Sequence[_Shard], of: int) -> None:
        ids = [shard.run.id for shard in shards if shard.run is not None]
        with get_client(sync_client=True) as client:
            found = [run for start in range(0, len(ids), _PAGE) for run in _read(client, ids[start : start + _PAGE])]
        self._away.has_answered(shards)
        by_id = {run.id: run for run in found}
        for shard in shards:
            run = by_id.get(shard.run.id) if shard.run is not None else None
            if run is None:
                self._lost(shard, of, "somebody has deleted its run")
            else:
                self._look(shard, run, of)

    def _look(self, shard: _Shard, run: FlowRun, of: int) -> None:
        """Draw conclusions from what a run looks like now."""
        before, shard.run = shard.run, run
        now = time.monotonic()
        if before is None or _traits(before) != _traits(run):
            shard.changed = now
        quiet = now - shard.changed
        if run.state is None:
            return
        if run.state.is_final():
            self._take_end(shard, run, of)
        elif (why := self._why_lost(run, quiet)) is not None:
            self._give_up(shard, of, why)
        elif run.state.type == StateType.SCHEDULED and quiet > UNTAKEN_SECONDS and not shard.told:
            shard.told = True
            run_logger().warning(
                "no worker has taken %s yet; start one: prefect worker start --pool %s --limit 1", run.name, self._pool
            )

    def _take_end(self, shard: _Shard, run: FlowRun, of: int) -> None:
        """What follows from how a run ended."""
        kind, error = run.state_type, _own_error(run)
        if kind == StateType.COMPLETED:
            shard.done = True
        elif kind == StateType.CANCELLED:
            shard.done, shard.outcome = True, ServiceError(f"{run.name} was cancelled; finished shards are kept")
        elif error is None or isinstance(error, WorkerLostError):  # its machine may be why
            self._lost(shard, of, (run.state and run.state.message) or f"it ended as {run.state_name}")
        else:
            shard.done, shard.outcome = True, error

    def _why_lost(self, run: FlowRun, quiet: float) -> str | None:
        """Why a run is given up of which nothing new was seen for some seconds; None: it is not."""
        if run.state_type == StateType.RUNNING and quiet > LOST_SECONDS:
            return f"its machine has given no sign of life for {quiet:.0f} seconds"
        if run.state_type == StateType.PENDING and quiet > STARTING_SECONDS:
            return f"it has not started within {quiet:.0f} seconds"
        if run.state_type == StateType.PENDING and quiet > LOST_SECONDS and self._has_lost_its_worker(run):
            return "the worker that took it has gone"
        return None

    def _has_lost_its_worker(self, run: FlowRun) -> bool:
        """Whether the worker that took a run is not there any more, as far as the server knows."""
        name = run.labels.get(_WORKER)
        if name is None or self._pool is None:  # a worker writes its name before it starts anything
            return True
        with get_client(sync_client=True) as client:
            workers = client.read_workers_for_work_pool(self._pool)
        return not any(worker.name == name and worker.status == WorkerStatus.ONLINE for worker in workers)

    def _give_up(self, shard: _Shard, of: int, why: str) -> None:
        if shard.run is not None:
            with get_client(sync_client=True) as client:
                client.set_flow_run_state(shard.run.id, Crashed(message=f"Lost: {why}."), force=True)
        self._lost(shard, of, why)

    def _lost(self, shard: _Shard, of: int, why: str) -> None:
        name = shard.run.name if shard.run is not None else f"shard {shard.number}"
        if shard.tries >= TRIES:
            shard.done = True
            shard.outcome = WorkerLostError(f"{name} was lost, as were its tries before: {why}")
            return
        run_logger().warning("%s was lost; another worker gets it. Why: %s", name, why)
        self._start(shard, of)

    def _cancel(self, shards: Sequence[_Shard]) -> None:
        """Nobody waits for these any more. What the server does not take is done, and recorded, for nothing."""
        for run in [shard.run for shard in shards if shard.run is not None]:
            state: State[Any] = Cancelling() if run.state_type == StateType.RUNNING else Cancelled()
            with contextlib.suppress(httpx.HTTPError, PrefectException), get_client(sync_client=True) as client:
                client.set_flow_run_state(run.id, state)


def _read(client: SyncPrefectClient, ids: list[UUID]) -> list[FlowRun]:
    return client.read_flow_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=ids)), limit=len(ids))


def _traits(run: FlowRun) -> tuple[Any, ...]:
    return (run.id, run.state and run.state.id, run.labels.get(_BEAT))


def _own_error(run: FlowRun) -> CharmError | None:
    """The error that a run failed with if it is one of ours, which would come again on any machine."""
    if run.state is None or run.state.type != StateType.FAILED:
        return None
    found = _ERROR.search(run.state.message or "")
    kind = getattr(errors, found[1], None) if found else None
    if found is None or not (isinstance(kind, type) and issubclass(kind, CharmError)):
        return None
    return kind(f"{run.name}: {found[2]}")
