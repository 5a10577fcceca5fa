"""Shards of a large scoring: how large they are, and where they are done.

Without a cluster they are done here, one after another, each on all devices of this machine. With Ray they are Prefect tasks
on its machines, side by side; Ray gives a shard that is lost with its worker to another one.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from charm_core.errors import ConfigError
from tasks.caching import Step
from tasks.scoring_launch import ScoringProcesses, scoring_processes

if TYPE_CHECKING:
    from prefect.task_runners import TaskRunner

R = TypeVar("R")


class RayCluster(BaseModel):
    """Machines that shards are done on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    address: str = Field(description="As ray.init takes it: host:port of the head, or local for one on this machine.")
    cores: int = Field(default=1, ge=1, description="Cores of a shard.")
    gpus: int | None = Field(default=None, ge=0, description="GPUs of a shard; none: one if the cluster has any.")


class ShardSettings(BaseModel):
    """How large shards are, and where they are done. Scores are the same up to rounding."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    texts: int = Field(default=50_000, ge=1, description="Most texts per shard, on average.")
    ray: RayCluster | None = Field(default=None, description="None: on this machine.")


_HERE = ShardSettings()
_settings: ContextVar[ShardSettings] = ContextVar("charm_shards", default=_HERE)


@contextmanager
def use_shards(settings: ShardSettings) -> Iterator[None]:
    """Scoring inside is cut and done like this."""
    token = _settings.set(settings)
    try:
        yield
    finally:
        _settings.reset(token)


def shard_settings() -> ShardSettings:
    """What ``use_shards`` said."""
    return _settings.get()


def run_shards(shard: Step[..., R], calls: Sequence[tuple[Any, ...]], on_done: Callable[[int], None]) -> list[R]:
    """Do all shards, here or on the cluster.

    Args:
        shard: The step of one shard. Its last argument says with how many processes, which is filled in here.
        calls: The other arguments, without the store, per shard.
        on_done: Called with the number of shards that are done.
    """
    cluster = _settings.get().ray
    if cluster is None:
        return shard.map([(*arguments, scoring_processes()) for arguments in calls], None, on_done)
    with _ray_runner(cluster) as runner:
        gpus = _gpus_per_shard(cluster)
        processes = ScoringProcesses(processes=gpus or 1, cores=cluster.cores)
        with _resources(cluster, gpus):
            return shard.map([(*arguments, processes) for arguments in calls], runner, on_done)


def _ray_runner(cluster: RayCluster) -> "TaskRunner[Any]":
    try:
        from prefect_ray import RayTaskRunner
    except ImportError:
        raise ConfigError(
            "a Ray cluster is named, but Ray is not installed here: pip install '.[ray]', on every machine of the cluster too"
        ) from None
    return RayTaskRunner(address=cluster.address)


def _gpus_per_shard(cluster: RayCluster) -> int:
    import ray

    if cluster.gpus is not None:
        return cluster.gpus
    return 1 if ray.cluster_resources().get("GPU") else 0


def _resources(cluster: RayCluster, gpus: int) -> AbstractContextManager[Any]:
    from prefect_ray.context import remote_options

    return remote_options(num_cpus=cluster.cores, num_gpus=gpus)
