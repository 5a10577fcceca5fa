"""What a run logs on the way: on the console only what somebody must know. Prefect's server gets all of it."""

import contextlib
import logging
from collections.abc import Iterator

from tasks.progress import TerminalHandler

_OF_RUNS = ("prefect.flow_runs", "prefect.task_runs")


@contextlib.contextmanager
def quiet_console() -> Iterator[None]:
    """Let only warnings and errors through to the console, one line each, while a ``with`` block lasts."""
    handler = TerminalHandler(logging.WARNING)
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    handler.addFilter(_told_otherwise)
    with contextlib.ExitStack() as undo:
        for logger, console in _consoles():
            logger.removeHandler(console)
            logger.addHandler(handler)
            undo.callback(logger.addHandler, console)
            undo.callback(logger.removeHandler, handler)
        yield


def _told_otherwise(record: logging.LogRecord) -> bool:
    """Whether to show a record: that a run failed, and why, is said once, at the end, and not by each of its layers."""
    return not (record.name.startswith(_OF_RUNS) and (record.exc_info or "Finished in state" in record.getMessage()))


def _consoles() -> list[tuple[logging.Logger, logging.Handler]]:
    """Prefect's console handlers, each with its logger."""
    known = [logging.getLogger(name) for name in list(logging.Logger.manager.loggerDict)]
    return [
        (logger, handler)
        for logger in [logging.getLogger(), *known]
        for handler in list(logger.handlers)
        if type(handler).__name__ == "PrefectConsoleHandler"
    ]
