"""The only cache policy: a step's result is reused if its inputs' content, its configuration and its version are the same.

Keyed by nothing else: not by code, run id, path or store. So a change of what a step computes must come with a new
version of the step; the golden test of tests/tasks recalls it. Before a recorded result is served, every file that it
refers to is checked against its digest; if one is missing or damaged the record is dropped and the step runs again.
"""

import contextlib
import enum
import functools
import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar, cast, runtime_checkable

import fsspec
from prefect import Task
from prefect.cache_policies import CachePolicy
from prefect.context import TaskRunContext
from prefect.filesystems import RemoteFileSystem
from pydantic import BaseModel

from charm_core.errors import ConfigError
from tasks.store import ArtifactRef, ArtifactStore

P = ParamSpec("P")
R = TypeVar("R")

_store: ContextVar[ArtifactStore] = ContextVar("charm_store")


@runtime_checkable
class HasIdentity(Protocol):
    """An input whose identity is less than all of its fields: a file is its digest, not its path."""

    def identity(self) -> dict[str, Any]:
        """What of it goes into cache keys."""
        ...


@contextlib.contextmanager
def use_store(store: ArtifactStore) -> Iterator[ArtifactStore]:
    """Steps called inside write to this store."""
    token = _store.set(store)
    try:
        yield store
    finally:
        _store.reset(token)


def content_key(step: str, version: int, inputs: Mapping[str, Any]) -> str:
    """Cache key of a step.

    Args:
        step: Its name.
        version: Raised whenever the step computes something else from the same inputs.
        inputs: Its arguments by name: references, pydantic settings, plain values and collections of them.

    Raises:
        ConfigError: An input of a kind that has no stable content, such as a path or a data frame.
    """
    content = {"step": step, "version": version, "inputs": {name: _identity(value, name) for name, value in inputs.items()}}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()
    return f"{step}-v{version}-{digest}"


def _identity(value: Any, name: str) -> Any:
    if isinstance(value, HasIdentity):
        return _identity(value.identity(), name)
    if isinstance(value, ArtifactRef):
        return {"kind": value.kind, "digest": value.digest}
    if isinstance(value, BaseModel):
        return {field: _identity(getattr(value, field), name) for field in type(value).model_fields}
    if isinstance(value, Mapping):
        return {str(key): _identity(item, name) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_identity(item, name) for item in value]
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, date):
        return value.isoformat()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ConfigError(
        f"input {name!r} of a step is a {type(value).__name__}, which has no stable content to make a cache key of; "
        f"pass an ArtifactRef, a settings model or a plain value"
    )


@dataclass
class ContentPolicy(CachePolicy):
    """Prefect's view of ``content_key``, with stale records dropped before Prefect looks them up."""

    step: str = ""
    version: int = 0

    def compute_key(
        self, task_ctx: TaskRunContext, inputs: dict[str, Any], flow_parameters: dict[str, Any], **kwargs: Any
    ) -> str:
        """Key of this call; see ``content_key``. The flow's parameters play no part."""
        store: ArtifactStore = inputs["store"]
        keyed = {name: value for name, value in inputs.items() if name != "store"}
        key = content_key(self.step, self.version, keyed)
        _drop_if_stale(task_ctx, store, key)
        return key


def _drop_if_stale(task_ctx: TaskRunContext, store: ArtifactStore, key: str) -> None:
    results = task_ctx.result_store
    if not results.exists(key):
        return
    recorded = results.read(key).result
    if all(store.is_sound(ref) for ref in _references(recorded)):
        return
    filesystem, path = fsspec.core.url_to_fs(f"{store.records_url()}/{key}")
    with contextlib.suppress(FileNotFoundError):  # another run on this store found it stale at the same time
        filesystem.rm_file(path)


def _references(value: Any) -> Iterator[ArtifactRef]:
    if isinstance(value, ArtifactRef):
        yield value
    elif isinstance(value, BaseModel):
        for field in type(value).model_fields:
            yield from _references(getattr(value, field))
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _references(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _references(item)


class Step(Generic[P, R]):
    """A cached Prefect task whose first parameter, the store, is filled in from ``use_store``."""

    def __init__(self, function: Callable[Concatenate[ArtifactStore, P], R], version: int, **options: Any) -> None:
        self.name = function.__name__
        self.version = version
        self.function = function
        self._signature = inspect.signature(function)
        self._task: Task[..., R] = Task(
            function,
            name=self.name,
            cache_policy=ContentPolicy(step=self.name, version=version),
            persist_result=True,
            result_serializer="json",  # readable, and nothing is ever unpickled
            cache_result_in_memory=False,  # a record dropped as stale must be gone
            **options,
        )
        functools.update_wrapper(self, function)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the step, or take its recorded result, in the current flow."""
        store = _store.get()
        self.key(*args, **kwargs)  # Prefect would only log a key that cannot be made, and run uncached
        return cast(R, self._bound(store)(store, *args, **kwargs))

    def key(self, *args: P.args, **kwargs: P.kwargs) -> str:
        """Cache key of a call with these arguments."""
        bound = self._signature.bind(None, *args, **kwargs)
        bound.apply_defaults()
        inputs = dict(list(bound.arguments.items())[1:])
        return content_key(self.name, self.version, inputs)

    def _bound(self, store: ArtifactStore) -> Task[..., R]:
        filesystem, path = fsspec.core.url_to_fs(store.records_url())
        if "file" in filesystem.protocol:
            return self._task.with_options(result_storage=Path(path))
        bound = self._task.with_options()
        # with_options accepts only blocks that are saved on a server; a worker without that server must work too
        bound.result_storage = RemoteFileSystem(basepath=store.records_url())
        return bound


def step(
    *, version: int, **options: Any
) -> Callable[[Callable[Concatenate[ArtifactStore, P], R]], Step[P, R]]:
    """Make a function a cached step.

    Args:
        version: Raise it when the step computes something else from the same inputs.
        options: Further options of ``prefect.task`` (retries, run name, tags).
    """
    return lambda function: Step(function, version, **options)
