"""Runs in MLflow: the only module that imports it, and late, because the import alone takes seconds.

One MLflow run per flow run, opened and closed by ``tracked_run``, so that its status is right after success, failure
and Ctrl-C. Every call names its run: no process-wide "active run" that a thread or a child process could inherit.
Metrics are logged by flows from returned values, so that they are there on a fully cached run too.
"""

import contextlib
import logging
import numbers
import re
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, cast

import polars as pl

from charm_core.errors import ServiceError
from tasks.interrupts import WholeCalls, signals_wait
from tasks.origin import git_revision, package_versions
from tasks.process_identity import has_ended, process_identity
from tasks.store import ArtifactRef
from tasks.tracking_settings import SQLITE, TrackingSettings, check_tracking, creation_lock, unwritable

logger = logging.getLogger(__name__)

_PARAM_BATCH = 100
_METRIC_BATCH = 1000
_PARAM_LENGTH = 6000
_NAME_LENGTH = 250
_LOG_TRIES = 3
PROCESS_TAG = "charm.process"
"""Which process a run belongs to."""
TITLE_TAG = "charm.title"
"""What runs of the same flow and name have in common; their names in MLflow also say what they found."""


_current: ContextVar["TrackedRun | None"] = ContextVar("charm_tracked_run", default=None)


class TrackedRun:
    """One MLflow run that is open."""

    def __init__(self, client: Any, run_id: str, experiment_id: str, settings: TrackingSettings) -> None:
        self._client = client
        self.run_id = run_id
        self.experiment_id = experiment_id
        self._settings = settings
        self.nested_names: set[str] = set()
        self.unclosed: dict[str, str] = {}
        """Nested runs that the server was not there to close, and the status that they deserve."""

    @property
    def url(self) -> str:
        """Page of this run."""
        return f"{self._settings.pages}/#/experiments/{self.experiment_id}/runs/{self.run_id}"

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log a nested configuration, flattened to dotted names."""
        from mlflow.entities import Param

        flat = [Param(_allowed(name), str(value)[:_PARAM_LENGTH]) for name, value in _flatten(params)]
        for start in range(0, len(flat), _PARAM_BATCH):
            self._client.log_batch(self.run_id, params=flat[start : start + _PARAM_BATCH])

    def log_metrics(self, metrics: Mapping[str, float | None], *, step: int = 0) -> None:
        """Log metrics in one request; ``None`` (not defined for this run) is left out."""
        self.log_curve([{"step": step, **metrics}])

    def log_curve(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log many steps at once; each row has ``step`` and metrics by name."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        points = [
            Metric(_allowed(name), float(value), now, int(row["step"]))
            for row in rows
            for name, value in row.items()
            if name != "step" and isinstance(value, numbers.Real) and not isinstance(value, bool)
        ]
        for start in range(0, len(points), _METRIC_BATCH):
            self._client.log_batch(self.run_id, metrics=points[start : start + _METRIC_BATCH])

    def show_curve(self, rows: Sequence[Mapping[str, Any]]) -> bool:
        """As ``log_curve``, for what is only watched: a server that is away is no reason to end a training.

        Returns:
            Whether it was logged.
        """
        try:
            self.log_curve(rows)
        except _mlflow_error() as error:
            logger.warning(
                "MLflow at %s does not take the curve; training goes on without: %s", self._settings.shown_uri, error
            )
            return False
        return True

    def show(self, name: str, description: str) -> None:
        """Name the run and describe it in Markdown, for people: a server that does not take it is no reason to fail."""
        try:
            self._client.update_run(self.run_id, name=name)
            self._client.set_tag(self.run_id, "mlflow.note.content", description)
        except _mlflow_error() as error:
            logger.warning("MLflow at %s does not take the name of this run: %s", self._settings.shown_uri, error)

    def log_text(self, text: str, name: str) -> None:
        """Log a text file as an artifact of the run."""
        self._client.log_text(self.run_id, text, name)

    def log_table(self, frame: pl.DataFrame, name: str) -> None:
        """Log a small table as JSON that MLflow's pages show as a table."""
        self._client.log_table(self.run_id, frame.to_dict(as_series=False), name)

    def log_folder(self, folder: Path, name: str) -> str:
        """Log a folder (a model) and return its URI."""
        self._client.log_artifacts(self.run_id, str(folder), name)
        return f"runs:/{self.run_id}/{name}"

    def log_datasets(self, refs: Mapping[str, ArtifactRef], context: str) -> None:
        """Record stored artifacts by digest, as inputs or outputs of the run."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = [
            DatasetInput(
                Dataset(name=name, digest=ref.digest[:36], source_type="charm_store", source=ref.uri),
                tags=[InputTag("mlflow.data.context", context), InputTag("charm.digest", ref.digest)],
            )
            for name, ref in refs.items()
        ]
        for left in reversed(range(_LOG_TRIES)):
            try:
                self._client.log_inputs(self.run_id, datasets=inputs)
            except _mlflow_error() as error:
                # another run told of the same artifacts at the same moment; MLflow finds those there the next time
                if not left or "unique" not in str(error).lower():
                    raise
            else:
                return

    def tag(self, tags: Mapping[str, str]) -> None:
        """Set tags."""
        for name, value in tags.items():
            self._client.set_tag(self.run_id, name, value)

    def registry(self) -> contextlib.AbstractContextManager[Any]:
        """The model registry of the same server; see ``open_registry``. A run that is under way waits for that a while."""
        return _registry(self._settings)

    @contextlib.contextmanager
    def nested(self, name: str, tags: Mapping[str, str] | None = None) -> Iterator["TrackedRun"]:
        """A child run, shown below this one."""
        self.nested_names.add(name)
        with _open_run(self._settings, self._client, self.experiment_id, name, tags or {}, parent=self) as run:
            yield run


@contextlib.contextmanager
def tracked_run(settings: TrackingSettings, name: str, *, tags: Mapping[str, str]) -> Iterator[TrackedRun]:
    """Open an MLflow run for the current flow run and close it with the status that it deserves.

    Args:
        settings: Where.
        name: Shown in MLflow.
        tags: Further tags, such as the Prefect flow-run id.

    Raises:
        ServiceError: The tracking server does not answer, or will not do it.
    """
    check_tracking(settings)
    try:
        with creation_lock(settings):
            client = _client(settings)
            experiment_id = _experiment(client, settings)
        _close_abandoned_runs(client, experiment_id)
    except _mlflow_error() as error:
        raise ServiceError(f"MLflow at {settings.shown_uri} cannot be used: {error}") from error
    try:
        with _open_run(settings, client, experiment_id, name, {**_origin(), **tags}) as run:
            token = _current.set(run)
            try:
                yield run
            finally:
                _current.reset(token)
    except _mlflow_error() as error:
        raise ServiceError(
            f"MLflow at {settings.shown_uri} did not take what this run had to say ({error}); finished steps are kept: see that it "
            f"answers and run again"
        ) from error


def current_run() -> TrackedRun | None:
    """The run that ``tracked_run`` has open, if any: for the live training curve and nothing else."""
    return _current.get()


def registered_version(run: TrackedRun, model_name: str, digest: str) -> str | None:
    """The version of a registered model that has this content already, if there is one."""
    return min(_versions_of(run._client, model_name, digest), key=int, default=None)


def register_version(run: TrackedRun, model_name: str, source: str, tags: Mapping[str, str]) -> str:
    """Register a logged model folder as a new version; the same weights are registered once.

    Args:
        run: The run that logged the folder.
        model_name: Name in the registry.
        source: What ``TrackedRun.log_folder`` returned.
        tags: Evidence; must hold ``digest``.

    Returns:
        The version, new or the one that has the same digest already.
    """
    client = run._client
    known = _versions_of(client, model_name, tags["digest"])
    if known:
        return min(known, key=int)
    with contextlib.suppress(_mlflow_error()):  # it exists already
        client.create_registered_model(model_name)
    location = client.get_run(run.run_id).info.artifact_uri + "/" + source.removeprefix(f"runs:/{run.run_id}/")
    created = str(client.create_model_version(model_name, location, run_id=run.run_id, tags=dict(tags)).version)
    # another run may have done the same in the meantime: both then see both, and the first one stays
    first = min(int(version) for version in _versions_of(client, model_name, tags["digest"]))
    if int(created) != first:
        client.delete_model_version(model_name, created)
    return str(first)


@contextlib.contextmanager
def open_registry(settings: TrackingSettings) -> Iterator[Any]:
    """MLflow's client for the model registry; where that is a SQLite file, for one process at a time.

    Raises:
        ServiceError: The registry does not answer, or will not do it.
    """
    check_tracking(settings)
    with _registry(settings) as client:
        yield client


@contextlib.contextmanager
def _registry(settings: TrackingSettings) -> Iterator[Any]:
    try:
        with creation_lock(settings):
            yield _client(settings)
    except _mlflow_error() as error:
        raise ServiceError(f"the MLflow model registry at {settings.shown_uri} cannot be used: {error}") from error


@contextlib.contextmanager
def _open_run(
    settings: TrackingSettings,
    client: Any,
    experiment_id: str,
    name: str,
    tags: Mapping[str, str],
    parent: TrackedRun | None = None,
) -> Iterator[TrackedRun]:
    own_tags = {**tags, PROCESS_TAG: process_identity(), **({"mlflow.parentRunId": parent.run_id} if parent else {})}
    run: TrackedRun | None = None
    status = "FINISHED"
    try:
        with signals_wait():  # a run that was made and that nobody knows would stay open
            run_id = client.create_run(experiment_id, run_name=name, tags=own_tags).info.run_id
            run = TrackedRun(client, run_id, experiment_id, settings)
        yield run
    except BaseException as error:
        # what is no Exception: Ctrl-C, cancelled by Prefect, told to exit
        status = "FAILED" if isinstance(error, Exception) else "KILLED"
        raise
    finally:
        if run is not None:
            _close(run, status, parent)


def _close(run: TrackedRun, status: str, parent: TrackedRun | None) -> None:
    closing = {run.run_id: status, **run.unclosed}
    try:
        if parent is None and status == "FINISHED":
            run._client.set_terminated(run.run_id, closing.pop(run.run_id))  # which waits for a server that is away
        left = _close_if_possible(run._settings, run._client, closing)
    except BaseException as error:
        if not isinstance(error, Exception):  # told to end just now: the request may not have come through
            _close_if_possible(run._settings, run._client, {run.run_id: "KILLED", **run.unclosed})
        raise
    if parent is not None:  # this shows a part of a run, which goes on and closes later what cannot be closed now
        parent.unclosed |= left


def _close_if_possible(settings: TrackingSettings, client: Any, closing: Mapping[str, str]) -> dict[str, str]:
    """Close runs with a status each; if that fails it must not hide the error that ended them, and the next run closes them.

    Returns:
        Those that could not be closed.
    """
    left = dict(closing)
    if not closing:
        return left
    try:
        check_tracking(settings)  # the client would try a server that is gone again and again, for minutes
        for run_id, status in closing.items():
            client.set_terminated(run_id, status)
            del left[run_id]
    except (ServiceError, _mlflow_error()) as error:
        logger.warning("MLflow runs %s could not be closed; that is done later: %s", left, error)
    return left


def _versions_of(client: Any, model_name: str, digest: str) -> list[str]:
    return [
        str(version.version)
        for version in client.search_model_versions(f"name = '{model_name}'")
        if version.tags.get("digest") == digest
    ]


def _client(settings: TrackingSettings) -> Any:
    """MLflow's client, with tables in a SQLite file that has none yet; under ``creation_lock``."""
    from mlflow import MlflowClient

    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if settings.uri.startswith(SQLITE):
        _make_tables(Path(settings.uri.removeprefix(SQLITE)))
    client = MlflowClient(tracking_uri=settings.uri, registry_uri=settings.uri)
    # an interrupted call would leave the SQLite file locked by this very process, which could then not close its runs
    return WholeCalls(client) if settings.uri.startswith(SQLITE) else client


def _experiment(client: Any, settings: TrackingSettings) -> str:
    """Id of the experiment, which is made if it is not there.

    Raises:
        ServiceError: It was deleted.
    """
    known = client.get_experiment_by_name(settings.experiment)
    if known is not None and known.lifecycle_stage == "deleted":
        raise ServiceError(
            f"the MLflow experiment {settings.experiment!r} was deleted; restore it, or set CHARM_EXPERIMENT to another name"
        )
    if known is not None:
        return str(known.experiment_id)
    try:
        return str(client.create_experiment(settings.experiment, artifact_location=settings.artifact_location))
    except _mlflow_error():
        known = client.get_experiment_by_name(settings.experiment)
        if known is None:
            raise
        return str(known.experiment_id)  # another run made it in between


def _make_tables(path: Path) -> None:
    """Make MLflow's tables in a SQLite file that is empty, in memory first.

    MLflow makes them by all of its migrations one after the other, and would wait for the disk some 130 times.
    """
    if path.stat().st_size:
        return
    from mlflow.store.db.utils import _initialize_tables
    from sqlalchemy import create_engine
    from sqlalchemy.pool import StaticPool

    engine = create_engine("sqlite://", poolclass=StaticPool)  # one connection: each would be a database of its own
    try:
        _initialize_tables(engine)
        made = cast(sqlite3.Connection, engine.raw_connection().driver_connection)
        with contextlib.closing(sqlite3.connect(path)) as database:
            made.backup(database)  # one transaction: the file has all tables or none
    except sqlite3.Error as error:
        raise unwritable(path, error) from None
    finally:
        engine.dispose()


def _mlflow_error() -> type[Exception]:
    """What MLflow raises, imported when it is needed."""
    from mlflow.exceptions import MlflowException

    exception: type[Exception] = MlflowException
    return exception


def _close_abandoned_runs(client: Any, experiment_id: str) -> None:
    """Close runs whose process was killed on this machine: nobody else ever will."""
    for run in client.search_runs([experiment_id], filter_string="attributes.status = 'RUNNING'"):
        if has_ended(run.data.tags.get(PROCESS_TAG, "")):
            client.set_tag(run.info.run_id, "charm.closed", "its process ended without closing it")
            client.set_terminated(run.info.run_id, "FAILED")


def _origin() -> dict[str, str]:
    versions = {f"version.{name}": version for name, version in package_versions().items()}
    return {"git.revision": git_revision(), **versions}


def _allowed(name: str) -> str:
    """A parameter or metric name with what MLflow refuses replaced by ``_``."""
    return re.sub(r"[^\w.:\- ]", "_", name)[:_NAME_LENGTH]


def _flatten(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in params.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
