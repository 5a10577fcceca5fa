"""What a run says on the way: only what somebody must know, once."""

import logging
from collections.abc import Iterator

import pytest
from prefect import flow, get_run_logger, task

from charm_core.errors import TableError
from flows.console import quiet_console


@task
def failing() -> None:
    logger = get_run_logger()
    logger.info("a detail")
    logger.warning("mind the gap")
    raise TableError("no rows; check the file")


@flow
def watched() -> None:
    failing()


@pytest.fixture
def on_console(prefect_session: None, capsys: pytest.CaptureFixture[str]) -> Iterator[pytest.CaptureFixture[str]]:
    """Prefect's console handlers write to the standard error of the moment when they were made."""
    from prefect.logging.configuration import setup_logging

    setup_logging(incremental=False)
    yield capsys
    setup_logging(incremental=False)


def test_only_warnings_and_no_error_twice(on_console: pytest.CaptureFixture[str]):
    with quiet_console(), pytest.raises(TableError):
        watched()
    said = on_console.readouterr()
    assert said.out == ""
    assert said.err == "WARNING: mind the gap\n"


def test_afterwards_everything_is_as_it_was(on_console: pytest.CaptureFixture[str]):
    before = {logger: list(logger.handlers) for logger in (logging.getLogger(), logging.getLogger("prefect"))}
    with quiet_console():
        assert any(logger.handlers != handlers for logger, handlers in before.items())
    assert all(set(logger.handlers) == set(handlers) for logger, handlers in before.items())
    with pytest.raises(TableError):
        watched()
    assert "a detail" in on_console.readouterr().err
