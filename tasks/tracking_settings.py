"""Where MLflow remembers runs: the address of its server or its SQLite file, and whether that can be used. No MLflow."""

import contextlib
import sqlite3
from pathlib import Path
from typing import Any

import httpx
from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Field

from charm_core.errors import ServiceError
from tasks.addresses import shown_address

SQLITE = "sqlite:///"
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
    return settings.uri.startswith(SQLITE) and not Path(settings.uri.removeprefix(SQLITE)).exists()


def check_tracking(settings: TrackingSettings) -> None:
    """Fail at once, and clearly, if the tracking server does not answer or the SQLite file cannot be written.

    Raises:
        ServiceError: With the address.
    """
    if settings.uri.startswith(SQLITE):
        _check_sqlite(settings.uri)
    if not settings.uri.startswith("http"):
        return
    try:
        httpx.get(f"{settings.uri.rstrip('/')}/health", timeout=10).raise_for_status()
    except httpx.HTTPError as error:
        raise ServiceError(
            f"the MLflow server at {settings.shown_uri} does not answer ({error}); start it or unset CHARM_TRACKING_URI"
        ) from None


def creation_lock(settings: TrackingSettings) -> contextlib.AbstractContextManager[Any]:
    """Two processes that use a new SQLite file at once would both create its tables, and one would fail."""
    if not settings.uri.startswith(SQLITE):
        return contextlib.nullcontext()
    return FileLock(f"{settings.uri.removeprefix(SQLITE)}.lock")


def _check_sqlite(uri: str) -> None:
    # MLflow would try a file that it cannot open again and again, for minutes
    path = Path(uri.removeprefix(SQLITE))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(sqlite3.connect(path, timeout=60)) as database:
            database.execute("BEGIN IMMEDIATE")
            database.rollback()
    except (OSError, sqlite3.Error) as error:
        raise unwritable(path, error) from None


def unwritable(path: Path, error: Exception) -> ServiceError:
    """The error that a SQLite file cannot be written."""
    return ServiceError(
        f"the MLflow database {path} cannot be written ({error}); correct CHARM_TRACKING_URI or CHARM_HOME"
    )
