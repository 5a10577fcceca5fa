"""Where MLflow remembers runs: its address, its client, the experiment, the SQLite file behind it where there is no server."""

import contextlib
import logging
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import httpx
from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Field

from charm_core.errors import ServiceError
from tasks.addresses import shown_address
from tasks.interrupts import WholeCalls

_SQLITE = "sqlite:///"
_LOCAL_PAGES = "http://127.0.0.1:5000"


class TrackingSettings(BaseModel):
    """Where runs are remembered."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    uri: str = Field(
        description="MLflow tracking URI, for example 'sqlite:////data/charm/mlflow.db' or a server's URL."
    )
    artifact_location: str | None = Field(
        default=None, description="Folder or URL for artifacts of a new experiment; the server's choice if not given."
    )
    experiment: str = Field(default="charm", description="MLflow experiment.")
    ui_url: str | None = Field(
        default=None,
        description="Where people open the MLflow pages; default: the server's URL, http://127.0.0.1:5000 if there is none.",
    )

    @property
    def shown_uri(self) -> str:
        """The URI without a login, for messages."""
        return shown_address(self.uri)

    @property
    def pages(self) -> str:
        """Where the MLflow pages are opened."""
        server = self.shown_uri if self.uri.startswith("http") else None
        return (self.ui_url or server or _LOCAL_PAGES).rstrip("/")


def is_empty(settings: TrackingSettings) -> bool:
    """Whether no run has ever been remembered there; known without asking only of a SQLite file."""
    return settings.uri.startswith(_SQLITE) and not Path(settings.uri.removeprefix(_SQLITE)).exists()


def check_tracking(settings: TrackingSettings) -> None:
    """Fail at once, and clearly, if the tracking server does not answer or the SQLite file cannot be written.

    Raises:
        ServiceError: With the address.
    """
    if settings.uri.startswith(_SQLITE):
        _check_sqlite(settings.uri)
    if not settings.uri.startswith("http"):
        return
    try:
        httpx.get(f"{settings.uri.rstrip('/')}/health", timeout=10).raise_for_status()
    except httpx.HTTPError as error:
        raise ServiceError(
            f"the MLflow server at {settings.shown_uri} does not answer ({error}); start it or unset CHARM_TRACKING_URI"
        ) from None


@contextlib.contextmanager
def open_registry(settings: TrackingSettings) -> Iterator[Any]:
    """MLflow's client for the model registry; where that is a SQLite file, for one process at a time.

    Raises:
        ServiceError: The registry does not answer, or will not do it.
    """
    check_tracking(settings)
    with registry_client(settings) as client:
        yield client


@contextlib.contextmanager
def registry_client(settings: TrackingSettings) -> Iterator[Any]:
    """As ``open_registry``, for a run that is under way: a server that is away is waited for."""
    try:
        with creation_lock(settings):
            yield open_client(settings)
    except mlflow_error() as error:
        raise ServiceError(f"the MLflow model registry at {settings.shown_uri} cannot be used: {error}") from error


def open_client(settings: TrackingSettings) -> Any:
    """MLflow's client, with tables in a SQLite file that has none yet; under ``creation_lock``."""
    from mlflow import MlflowClient

    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if settings.uri.startswith(_SQLITE):
        _make_tables(Path(settings.uri.removeprefix(_SQLITE)))
    client = MlflowClient(tracking_uri=settings.uri, registry_uri=settings.uri)
    # an interrupted call would leave the SQLite file locked by this very process, which could then not close its runs
    return WholeCalls(client) if settings.uri.startswith(_SQLITE) else client


def experiment_id_of(client: Any, settings: TrackingSettings) -> str:
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
    except mlflow_error():
        known = client.get_experiment_by_name(settings.experiment)
        if known is None:
            raise
        return str(known.experiment_id)  # another run made it in between


def creation_lock(settings: TrackingSettings) -> contextlib.AbstractContextManager[Any]:
    """Two processes that use a new SQLite file at once would both create its tables, and one would fail."""
    if not settings.uri.startswith(_SQLITE):
        return contextlib.nullcontext()
    return FileLock(f"{settings.uri.removeprefix(_SQLITE)}.lock")


def _check_sqlite(uri: str) -> None:
    # MLflow would try a file that it cannot open again and again, for minutes
    path = Path(uri.removeprefix(_SQLITE))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(sqlite3.connect(path, timeout=60)) as database:
            database.execute("BEGIN IMMEDIATE")
            database.rollback()
    except (OSError, sqlite3.Error) as error:
        raise _unwritable(path, error) from None


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
        raise _unwritable(path, error) from None
    finally:
        engine.dispose()


def _unwritable(path: Path, error: Exception) -> ServiceError:
    return ServiceError(
        f"the MLflow database {path} cannot be written ({error}); correct CHARM_TRACKING_URI or CHARM_HOME"
    )


def mlflow_error() -> type[Exception]:
    """What MLflow raises, imported when it is needed."""
    from mlflow.exceptions import MlflowException

    exception: type[Exception] = MlflowException
    return exception
