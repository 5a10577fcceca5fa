"""The only cache policy: a step's result is reused if its inputs' content, configuration and version are the same.

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
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar, runtime_checkable

from prefect import Task
from prefect.cache_policies import CachePolicy
from prefect.filesystems import WritableFileSystem
from prefect.futures import as_completed
from prefect.results import ResultRecord  # type: ignore[attr-defined] # re-exported, though not by name
from prefect.task_runners import TaskRunner
from prefect.transactions import CommitMode, transaction
from prefect.utilities.callables import get_call_parameters
from pydantic import BaseModel, TypeAdapter

from charm_core.errors import ArtifactError, ConfigError
from tasks.ledger import StepCall, note_call
from tasks.locks import held_alone
from tasks.progress import step_line
from tasks.store import ArtifactRef, ArtifactStore

logger = logging.getLogger(__name__)

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


def current_store() -> ArtifactStore:
    """The store that ``use_store`` named: for what only looks things up, outside of steps."""
    return _store.get()


def content_key(step: str, version: int, inputs: Mapping[str, Any]) -> str:
    """Cache key of a step.

    Args:
        step: Its name.
        version: Raised whenever the step computes something else from the same inputs.
        inputs: Its arguments by name: references, pydantic settings, plain values and collections of them.

    Raises:
        ConfigError: An input of a kind that has no stable content, such as a path or a data frame.
    """
    content = {"step": step, "version": version, "inputs": identities(inputs)}
    try:
        text = json.dumps(content, sort_keys=True, allow_nan=False)
    except ValueError:
        raise ConfigError(f"an input of the step {step!r} is NaN or infinite; give a finite number or none") from None
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f"{step}-v{version}-{digest}"


def identities(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What of each input goes into cache keys, as plain values.

    Raises:
        ConfigError: An input of a kind that has no stable content.
    """
    return {name: _identity(value, name) for name, value in inputs.items()}


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
    """Prefect's view of ``content_key``: made before the call, for Prefect runs uncached if making a key fails."""

    content_key: str = ""

    def compute_key(self, *_: Any, **__: Any) -> str:
        """The key of this call. The flow's parameters and the task's code play no part."""
        return self.content_key


def _is_reusable(store: ArtifactStore, key: str, kind: TypeAdapter[Any]) -> bool:
    """Whether a sound result is recorded; a record that is stale is dropped, so that Prefect does not find it either."""
    try:
        record: ResultRecord[Any] = ResultRecord.deserialize(store.read_step(key))
        recorded = kind.validate_python(record.result)
    except ArtifactError:  # missing or damaged: to Prefect too it is not there
        return False
    except ValueError as error:
        logger.warning("the record %s is of another form; the step runs again: %s", key, error)
        store.forget_step(key)
        return False
    if not all(store.is_sound(ref) for ref in _references(recorded)):
        logger.warning("a file of %s is missing or damaged; the step runs again", key)
        store.forget_step(key)
        return False
    return True


def _alone(store: ArtifactStore, key: str) -> contextlib.AbstractContextManager[None]:
    """Nobody else on this machine runs this step on these inputs meanwhile; of two runs at once one takes the other's results."""
    return held_alone(
        Path(store.work_folder, "locks", f"{key}.lock"), f"another run is at the step {key}; waiting for it"
    )


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


class StepRecords(WritableFileSystem):
    """Prefect's view of the records of finished steps.

    Prefect's own storage blocks write in place, so a reader in another process can meet half a record.
    """

    store: ArtifactStore
    key: str

    def read_path(self, path: str, **_: Any) -> bytes:  # type: ignore[override] # Prefect calls either kind
        """The content of a record."""
        return self.store.read_step(_record_name(path))

    def write_path(self, path: str, content: bytes, **_: Any) -> None:  # type: ignore[override]
        """Write a record, whole or not at all."""
        if _record_name(path) == self.key:  # Prefect stores the errors of failed runs too, which nobody reads
            self.store.write_step(self.key, content)

    def _resolve_path(self, path: str) -> str:
        return self.store.step_url(_record_name(path))


def _record_name(path: str) -> str:
    return path.rsplit("/", 1)[-1]


class Step(Generic[P, R]):
    """A cached Prefect task whose first parameter, the store, is filled in from ``use_store``."""

    def __init__(self, function: Callable[Concatenate[ArtifactStore, P], R], version: int, **options: Any) -> None:
        self.name = function.__name__
        self.version = version
        self.function = function
        self._signature = inspect.signature(function)
        self._kind: TypeAdapter[R] = TypeAdapter(self._signature.return_annotation)
        self._task: Task[..., Any] = Task(
            self._plain(function),
            name=self.name,
            persist_result=True,
            result_serializer="json",
            cache_result_in_memory=False,  # a record dropped as stale must be gone
            **options,
        )
        functools.update_wrapper(self, function)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the step, or take its recorded result, in the current flow."""
        store = _store.get()
        inputs = self._inputs(*args, **kwargs)
        key = content_key(self.name, self.version, inputs)
        with contextlib.ExitStack() as held:
            reused = _is_reusable(store, key, self._kind)
            if not reused:
                held.enter_context(_alone(store, key))
                reused = _is_reusable(store, key, self._kind)  # another run may have done it just now
                held.enter_context(step_line(self.name))
            result = self._run(store, key, *args, **kwargs)
        outputs = tuple(ref.digest for ref in _references(result))
        note_call(StepCall(step=self.name, key=key, reused=reused, inputs=identities(inputs), outputs=outputs))
        return result

    def map(
        self,
        calls: Sequence[tuple[Any, ...]],
        runner: TaskRunner[Any] | None = None,
        on_done: Callable[[int], None] = lambda _: None,
    ) -> list[R]:
        """Run the step on many inputs in the current flow, or take recorded results.

        Args:
            calls: The arguments of every call, without the store.
            runner: Where they run, side by side; started already. Without one they run here, one after another.
            on_done: Called with the number of calls that are done.

        Returns:
            The results in the order of the calls.

        Raises:
            CharmError: A call failed, after all others have ended: what they did is recorded.
        """
        call: Callable[..., R] = self.__call__  # their number and kinds are only known to the caller
        key_of: Callable[..., str] = self.key
        if runner is None:
            results = []
            # inside of another step Prefect would record them only with that one: not at all, if it fails
            with transaction(commit_mode=CommitMode.EAGER):
                for arguments in calls:
                    results.append(call(*arguments))
                    on_done(len(results))
            return results
        store = _store.get()
        keys = [key_of(*arguments) for arguments in calls]
        with contextlib.ExitStack() as held:
            for key in sorted(set(keys)):  # in one order: two runs never wait for each other
                if not _is_reusable(store, key, self._kind):
                    held.enter_context(_alone(store, key))
            missing = [number for number, key in enumerate(keys) if not _is_reusable(store, key, self._kind)]
            held.enter_context(step_line(self.name))
            futures = {
                number: runner.submit(
                    self._bound(store, keys[number]), get_call_parameters(self._task.fn, (store, *calls[number]), {})
                )
                for number in missing
            }
            for done, _ in enumerate(as_completed(list(futures.values())), start=1):
                on_done(len(calls) - len(missing) + done)
            ran = {number: self._kind.validate_python(future.result()) for number, future in futures.items()}
        return [
            self._noted(keys[number], ran[number], calls[number]) if number in ran else call(*calls[number])
            for number in range(len(calls))
        ]

    def _noted(self, key: str, result: R, arguments: tuple[Any, ...]) -> R:
        """The result of a call that ran just now, once it is in the ledger."""
        outputs = tuple(ref.digest for ref in _references(result))
        inputs_of: Callable[..., dict[str, Any]] = self._inputs
        inputs = identities(inputs_of(*arguments))
        note_call(StepCall(step=self.name, key=key, reused=False, inputs=inputs, outputs=outputs))
        return result

    def _run(self, store: ArtifactStore, key: str, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._kind.validate_python(self._bound(store, key)(store, *args, **kwargs))

    def _bound(self, store: ArtifactStore, key: str) -> Task[..., Any]:
        """The Prefect task of one call."""
        bound = self._task.with_options(cache_policy=ContentPolicy(content_key=key))
        # with_options accepts only blocks that are saved on a server; a worker without that server must work too
        bound.result_storage = StepRecords(store=store, key=key)
        return bound

    def __reduce__(self) -> str:
        """Another process finds a step under its name, in the module that it was made in."""
        return self.name

    def _plain(self, function: Callable[Concatenate[ArtifactStore, P], R]) -> Callable[..., Any]:
        """The function with a result that JSON holds: nothing is unpickled, and a cached result equals a fresh one."""

        @functools.wraps(function)
        def plain(*args: Any, **kwargs: Any) -> Any:
            return self._kind.dump_python(function(*args, **kwargs), mode="json")

        return plain

    def is_recorded(self, *args: P.args, **kwargs: P.kwargs) -> bool:
        """Whether a call with these arguments would take a recorded, sound result."""
        return _is_reusable(_store.get(), self.key(*args, **kwargs), self._kind)

    def key(self, *args: P.args, **kwargs: P.kwargs) -> str:
        """Cache key of a call with these arguments."""
        return content_key(self.name, self.version, self._inputs(*args, **kwargs))

    def named(self, *arguments: Any) -> dict[str, Any]:
        """The first arguments of a call by name, as JSON holds them."""
        bound = self._signature.bind_partial(None, *arguments).arguments
        return {name: TypeAdapter(type(value)).dump_python(value, mode="json") for name, value in [*bound.items()][1:]}

    def _inputs(self, *args: P.args, **kwargs: P.kwargs) -> dict[str, Any]:
        bound = self._signature.bind(None, *args, **kwargs)
        bound.apply_defaults()
        return dict(list(bound.arguments.items())[1:])


def step(*, version: int, **options: Any) -> Callable[[Callable[Concatenate[ArtifactStore, P], R]], Step[P, R]]:
    """Make a function a cached step.

    Args:
        version: Raise it when the step computes something else from the same inputs.
        options: Further options of ``prefect.task`` (retries, run name, tags).
    """
    return lambda function: Step(function, version, **options)
