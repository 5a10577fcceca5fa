"""What every flow needs around its steps: the store, the servers, and the MLflow run that remembers it."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from uuid import UUID

import httpx
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_KEY, PREFECT_API_URL, PREFECT_UI_URL
from pydantic import BaseModel

from charm_core.errors import ServiceError
from flows.settings import RuntimeSettings, find_secret
from tasks.abandoned_flow_runs import claim_flow_run, crash_abandoned_flow_runs
from tasks.addresses import shown_address
from tasks.caching import use_store
from tasks.device_turns import use_cpu_jobs
from tasks.ledger import Ledger, keep_ledger, last_ledger
from tasks.nodes import use_nodes
from tasks.progress import tell
from tasks.publishing import publish_link
from tasks.scoring_settings import use_scoring
from tasks.scratch import remove_abandoned_folders
from tasks.secrets import use_secrets
from tasks.source_digests import use_digest_memo
from tasks.store import ArtifactStore
from tasks.tracking import TITLE_TAG, TrackedRun, tracked_run
from tasks.tracking_settings import check_tracking


@dataclass(frozen=True, kw_only=True)
class Session:
    """An open store and MLflow run."""

    store: ArtifactStore
    run: TrackedRun
    ledger: Ledger
    """The steps of this run so far."""
    last: Ledger | None
    """Those of the last successful run of the same name."""
    kind: str
    """Of the flow."""
    name: str
    """Of this run, as its settings say."""
    named: bool
    """Whether somebody called it so: otherwise it is the name of every run of its kind."""
    flow_run_url: str
    """Page of the Prefect run."""


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
        ConfigError: The nodes are not as the environment says.
    """
    if flow_run.id is not None:
        claim_flow_run(UUID(str(flow_run.id)))  # first: a run that is killed before that is shown as running for ever
    runtime = RuntimeSettings()
    tags = {"charm.flow": kind, "prefect.flow_run_id": str(flow_run.id), "prefect.flow_run_url": _flow_run_url()}
    title, plain = f"{kind} {name}", settings.model_dump(mode="json")
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(open_workplace(runtime))
        last = last_ledger(store, title)
        stack.enter_context(use_scoring(runtime.scoring()))
        stack.enter_context(use_nodes(runtime.node_settings()))
        run = stack.enter_context(tracked_run(runtime.tracking(), title, tags={**tags, TITLE_TAG: title}))
        ledger = stack.enter_context(keep_ledger(store, title, plain))
        run.log_params(plain)
        publish_link(f"{kind}-mlflow", run.url, "MLflow run", "Parameters, metrics, figures and artifacts of this run")
        yield Session(
            store=store,
            run=run,
            ledger=ledger,
            last=last,
            kind=kind,
            name=name,
            named=is_chosen(name, settings),
            flow_run_url=_flow_run_url(),
        )


@contextlib.contextmanager
def open_workplace(runtime: RuntimeSettings) -> Iterator[ArtifactStore]:
    """What steps need on a machine: a store that can be written, secrets, turns; what killed runs have left is put in order.

    Args:
        runtime: Of this machine.

    Raises:
        ArtifactError: The store cannot be written.
    """
    store = runtime.artifact_store()
    store.check_writable()
    crash_abandoned_flow_runs()
    remove_abandoned_folders()
    with (
        use_store(store),
        use_digest_memo(runtime.digest_memo()),
        use_secrets(find_secret),
        use_cpu_jobs(runtime.cpu_jobs),
    ):
        yield store


def check_services() -> None:
    """Fail at once if a server that the environment names does not answer.

    Raises:
        ServiceError: With its address.
    """
    _check_prefect()
    check_tracking(RuntimeSettings().tracking())  # Prefect may be asked where that is


def server_away(error: Exception) -> ServiceError | None:
    """What to say of an error that a run ended with because the Prefect server has gone; None if that is not why."""
    if not isinstance(error, httpx.TransportError):
        return None
    try:
        _check_prefect()
    except ServiceError as away:
        return ServiceError(f"{away}; finished steps are kept, run the same command again to go on")
    return None


def _check_prefect() -> None:
    url = PREFECT_API_URL.value()
    if not url:
        # Prefect starts one of its own
        tell("no Prefect server is named (PREFECT_API_URL): a temporary one is started, which takes about 20 seconds")
        return
    try:
        httpx.get(f"{url.rstrip('/')}/health", timeout=10).raise_for_status()
        login = (PREFECT_API_AUTH_STRING.value() or "").split(":", 1)
        asked = httpx.get(
            f"{url.rstrip('/')}/admin/version", auth=(login[0], login[-1]) if login[0] else None, timeout=10
        )
    except httpx.HTTPError as error:
        raise ServiceError(
            f"the Prefect server at {shown_address(url)} does not answer ({error}); start it with `prefect server start`, or unset "
            f"PREFECT_API_URL to run without one"
        ) from None
    if asked.status_code == httpx.codes.UNAUTHORIZED and not PREFECT_API_KEY.value():
        raise ServiceError(
            f"the Prefect server at {shown_address(url)} does not accept the login: set PREFECT_API_AUTH_STRING to its "
            f"user:password"
        )


def is_chosen(name: str, settings: BaseModel) -> bool:
    """Whether somebody chose a run's name: otherwise it is the default of its settings."""
    setting = type(settings).model_fields.get("name")
    return setting is None or name != setting.default


def _flow_run_url() -> str:
    base = PREFECT_UI_URL.value() or "http://127.0.0.1:4200"
    return f"{base.rstrip('/')}/runs/flow-run/{flow_run.id}"
