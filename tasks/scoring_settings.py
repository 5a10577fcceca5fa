"""How scoring is done: with how many processes, in shards of what size, on which machines. No score depends on it but by rounding."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class ScoringProcesses(BaseModel):
    """The processes that score on one machine, each with a share of the prompts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: int | None = Field(
        default=None, description="None: one per GPU; without a GPU two for a light reward model, else one."
    )
    cores: int | None = Field(default=None, description="Cores that they share without a GPU; none: all.")

    def identity(self) -> dict[str, Any]:
        """What goes into cache keys: nothing, as for the batches."""
        return {}


class RayCluster(BaseModel):
    """Machines that shards are done on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    address: str = Field(description="As ray.init takes it: host:port of the head.")
    cores: int = Field(default=1, ge=1, description="Cores of a shard.")
    gpus: int | None = Field(default=None, ge=0, description="GPUs of a shard; none: one if the cluster has any.")


class ScoringSettings(BaseModel):
    """How scoring is done."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    processes: ScoringProcesses = Field(default=ScoringProcesses(), description="On one machine.")
    shard_texts: int = Field(default=50_000, ge=1, description="Most texts per shard, on average.")
    ray: RayCluster | None = Field(default=None, description="Where shards are done; none: here, one after another.")
    deployment: str | None = Field(default=None, description="Whose Prefect workers do the shards instead.")


_DEFAULT = ScoringSettings()
_settings: ContextVar[ScoringSettings] = ContextVar("charm_scoring", default=_DEFAULT)


@contextmanager
def use_scoring(settings: ScoringSettings) -> Iterator[None]:
    """Scoring inside is done like this."""
    token = _settings.set(settings)
    try:
        yield
    finally:
        _settings.reset(token)


def scoring_settings() -> ScoringSettings:
    """What ``use_scoring`` said."""
    return _settings.get()
