"""Flow runs whose process was killed are shown as crashed, and no others."""

import subprocess
import sys
from uuid import UUID

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL, temporary_settings

from tasks.abandoned_flow_runs import claim_flow_run, crash_abandoned_flow_runs
from tasks.process_identity import has_ended, process_identity

pytestmark = pytest.mark.usefixtures("prefect_session")


def running(process: str | None) -> UUID:
    """A flow run that its server takes for running, claimed by a process."""
    from prefect.states import Running

    @flow(name="victim")
    def victim() -> None: ...

    with get_client(sync_client=True) as client:
        run = client.create_flow_run(victim, state=Running())
        if process is not None:
            client.update_flow_run_labels(run.id, {"charm.process": process})
    return UUID(str(run.id))


def state(run: UUID) -> str:
    with get_client(sync_client=True) as client:
        found = client.read_flow_run(run).state
    assert found is not None
    return str(found.type.value)


@pytest.fixture(scope="module")
def dead() -> str:
    script = "from tasks.process_identity import process_identity as p; print(p())"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()


def test_only_what_was_killed_here_is_crashed(dead: str):
    elsewhere = dead.replace(dead.partition("/")[0], "another-host", 1)
    killed, living, foreign, unclaimed = (running(name) for name in (dead, process_identity(), elsewhere, None))

    @flow(name="next")
    def following() -> None:
        claim_flow_run(UUID(str(flow_run.id)))
        crash_abandoned_flow_runs()

    following()
    assert [state(run) for run in (killed, living, foreign, unclaimed)] == ["CRASHED", "RUNNING", "RUNNING", "RUNNING"]


def test_a_server_that_does_not_answer_is_a_warning(caplog: pytest.LogCaptureFixture):
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        crash_abandoned_flow_runs()
    assert "cannot be asked for runs that were killed" in caplog.text


def test_a_process_of_an_earlier_boot_has_ended():
    host, _, rest = process_identity().partition("/")
    assert not has_ended(f"{host}/{rest}")
    assert has_ended(f"{host}/another-boot/{rest.partition('/')[2]}")


@pytest.mark.parametrize("text", ["", "nonsense", "host/1:1.0", "host/boot/x:y"])
def test_what_is_no_identity_is_left_alone(text: str):
    assert not has_ended(text)
