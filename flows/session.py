"""What every flow needs around its steps: the store, the servers, and the MLflow run that remembers it."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL, PREFECT_UI_URL
from pydantic import BaseModel

from charm_core.errors import ServiceError
from flows.settings import RuntimeSettings, find_secret
from tasks.caching import use_store
from tasks.ledger import Ledger, keep_ledger, last_ledger
from tasks.publishing import publish_link
from tasks.secrets import use_secrets
from tasks.store import ArtifactStore
from tasks.tracking import TrackedRun, check_tracking, tracked_run


@dataclass(frozen=True, kw_only=True)
class Session:
    """An open store and MLflow run."""

    store: ArtifactStore
    run: TrackedRun
    ledger: Ledger
    """The steps of this run so far."""
    last: Ledger | None
    """Those of the last successful run of the same name."""


@contextlib.contextmanager
def open_session(kind: str, name: str, settings: BaseModel) -> Iterator[Session]:
    """Open the store and the MLflow run of the current flow run, linked with each other.

    Args:
        kind: Of the flow.
        name: Of this run.
        settings: The flow's resolved settings, logged as parameters.

    Raises:
        ArtifactError: The store cannot be written.
        ServiceError: The tracking server does not answer.
    """
    runtime = RuntimeSettings()
    store = runtime.artifact_store()
    store.check_writable()
    tags = {"charm.flow": kind, "prefect.flow_run_id": str(flow_run.id), "prefect.flow_run_url": _flow_run_url()}
    title, plain = f"{kind} {name}", settings.model_dump(mode="json")
    last = last_ledger(store, title)
    with contextlib.ExitStack() as stack:
        stack.enter_context(use_store(store))
        stack.enter_context(use_secrets(find_secret))
        run = stack.enter_context(tracked_run(runtime.tracking(), title, tags=tags))
        ledger = stack.enter_context(keep_ledger(store, title, plain))
        run.log_params(plain)
        publish_link(f"{kind}-mlflow", run.url, "MLflow run", "Parameters, metrics, figures and artifacts of this run")
        yield Session(store=store, run=run, ledger=ledger, last=last)


def check_services() -> None:
    """Fail at once if a server that the environment names does not answer.

    Raises:
        ServiceError: With its address.
    """
    check_tracking(RuntimeSettings().tracking())
    url = PREFECT_API_URL.value()
    if not url:
        return  # Prefect starts a temporary server of its own
    try:
        httpx.get(f"{url.rstrip('/')}/health", timeout=10).raise_for_status()
    except httpx.HTTPError as error:
        raise ServiceError(
            f"the Prefect server at {url} does not answer ({error}); start it with `prefect server start`, or unset "
            f"PREFECT_API_URL to run without one"
        ) from None


def _flow_run_url() -> str:
    base = PREFECT_UI_URL.value() or "http://127.0.0.1:4200"
    return f"{base.rstrip('/')}/runs/flow-run/{flow_run.id}"
