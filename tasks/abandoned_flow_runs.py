"""Prefect flow runs whose process was killed: nobody else would tell their server, which shows them as running for ever.

What the server shows is not worth a run: if it does not answer here, that is a warning.
"""

import contextlib
from collections.abc import Iterator
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
from prefect.client.schemas.objects import StateType
from prefect.exceptions import PrefectException
from prefect.states import Crashed

from tasks.process_identity import has_ended, process_identity
from tasks.publishing import run_logger

_LABEL = "charm.process"
_MESSAGE = "Its process was killed; finished steps are kept, run it again to go on."
_UNDER_WAY = FlowRunFilter(
    state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.RUNNING, StateType.CANCELLING]))
)


def claim_flow_run(flow_run_id: UUID) -> None:
    """Say on the server which process a flow run belongs to: this one."""
    with _warning("does not take which process this is"), get_client(sync_client=True) as client:
        client.update_flow_run_labels(flow_run_id, {_LABEL: process_identity()})


def crash_abandoned_flow_runs() -> None:
    """Set flow runs to crashed whose process has ended on this machine without saying so."""
    with _warning("cannot be asked for runs that were killed"), get_client(sync_client=True) as client:
        for run in client.read_flow_runs(flow_run_filter=_UNDER_WAY):
            if has_ended(str(run.labels.get(_LABEL, ""))):
                client.set_flow_run_state(run.id, Crashed(message=_MESSAGE), force=True)


@contextlib.contextmanager
def _warning(what: str) -> Iterator[None]:
    try:
        yield
    except (httpx.HTTPError, PrefectException) as error:
        run_logger().warning("the Prefect server %s: %s", what, error or type(error).__name__)
