"""Where the shards of a large scoring are done.

Without a cluster they are done here, one after another, each on all devices of this machine. With Ray they are Prefect tasks
on its machines, side by side; Ray gives a shard that is lost with its worker to another one. With a deployment each is a flow run
that does the same task on a Prefect worker; see ``shard_runs``.
"""

import socket
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TypeVar

from prefect.runtime import flow_run

from charm_core.errors import ConfigError, ServiceError
from tasks.caching import Step, current_store
from tasks.scoring_settings import RayCluster, ScoringProcesses, scoring_settings
from tasks.shard_runs import ShardRuns

if TYPE_CHECKING:
    from prefect.task_runners import TaskRunner

R = TypeVar("R")

_CONNECT_SECONDS = 10.0


def run_shards(shard: Step[..., R], calls: Sequence[tuple[Any, ...]], on_done: Callable[[int], None]) -> list[R]:
    """Do all shards, here or on the cluster.

    Args:
        shard: The step of one shard. Its last argument says with how many processes, which is filled in here.
        calls: The other arguments, without the store, per shard.
        on_done: Called with the number of shards that are done.
    """
    settings = scoring_settings()
    if settings.ray is not None:
        return _run_on_ray(settings.ray, shard, calls, on_done)
    here = [(*arguments, settings.processes) for arguments in calls]
    if settings.deployment is None:
        return shard.map(here, None, on_done)
    _run_on_workers(settings.deployment, shard, calls, on_done)
    return shard.map(here)  # all of them are recorded


def _run_on_workers(
    deployment: str, shard: Step[..., R], calls: Sequence[tuple[Any, ...]], on_done: Callable[[int], None]
) -> None:
    """See that every shard is recorded in the store, done by whichever worker takes it."""
    missing = [arguments for arguments in calls if not shard.is_recorded(*arguments, ScoringProcesses())]
    if not missing:
        return
    store = current_store().url
    ShardRuns(deployment, str(flow_run.name or "scoring")).do(
        [{"store": store, **shard.named(*arguments)} for arguments in missing],
        lambda done: on_done(len(calls) - len(missing) + done),
    )


def _run_on_ray(
    cluster: RayCluster, shard: Step[..., R], calls: Sequence[tuple[Any, ...]], on_done: Callable[[int], None]
) -> list[R]:
    _check_answers(cluster.address)
    with _ray_runner(cluster) as runner:
        gpus = _gpus_per_shard(cluster)
        processes = ScoringProcesses(number=gpus or 1, cores=cluster.cores)
        with _resources(cluster, gpus):
            return shard.map([(*arguments, processes) for arguments in calls], runner, on_done)


def _check_answers(address: str) -> None:
    """Fail at once if nobody listens there: Ray itself would try for minutes, and then end the process."""
    host, _, port = address.rpartition("//")[2].rpartition(":")
    if not port.isdigit():  # a name of Ray's, such as auto
        return
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        raise ServiceError(
            f"the Ray cluster at {address} does not answer ({error}); start it with `ray start --head --port {port}`, or unset "
            f"CHARM_RAY_ADDRESS to score on this machine"
        ) from None


def _ray_runner(cluster: RayCluster) -> "TaskRunner[Any]":
    try:
        from prefect_ray import RayTaskRunner
    except ImportError:
        raise ConfigError(
            "a Ray cluster is named, but Ray is not installed here: pip install '.[ray]', on every machine of the cluster too"
        ) from None
    runner: TaskRunner[Any] = RayTaskRunner(address=cluster.address)
    return runner


def _gpus_per_shard(cluster: RayCluster) -> int:
    import ray

    if cluster.gpus is not None:
        return cluster.gpus
    return 1 if ray.cluster_resources().get("GPU") else 0


def _resources(cluster: RayCluster, gpus: int) -> AbstractContextManager[Any]:
    from prefect_ray.context import remote_options

    options: AbstractContextManager[Any] = remote_options(num_cpus=cluster.cores, num_gpus=gpus)
    return options
