"""What tests of all three packages share: real parts, started once."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.settings import CHECKOUT, prepare_environment
from tasks.worker_processes import WAITING

prepare_environment()  # before Prefect and MLflow read their settings
for name, value in WAITING.items():  # before torch reads it: tests run side by side
    os.environ.setdefault(name, value)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data next to the checkout; tests that use it skip where it is absent."""
    folder = Path(os.environ.get("CHARM_TEST_DATA", CHECKOUT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}")
    return folder


@pytest.fixture(scope="session")
def prefect_session() -> Iterator[None]:
    """A Prefect server with a database of its own, for all tests that run flows."""
    from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, PREFECT_LOGGING_TO_API_ENABLED, temporary_settings
    from prefect.testing.utilities import prefect_test_harness

    # the end of a flow run waits about a second for its first heartbeat, which serves no test
    quick = {PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None, PREFECT_LOGGING_TO_API_ENABLED: False}
    with prefect_test_harness(server_startup_timeout=180), temporary_settings(quick):
        yield
