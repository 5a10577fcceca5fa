"""How far a run is, for somebody who looks at a terminal: a line per stage, with its rate and the time that is left.

Everything is written to standard error, and nothing where that is no terminal: a log does not want a thousand states of a bar.
"""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any, Protocol

_USUAL_COLUMNS, _USUAL_ROWS = 100, 24
_steps: list[Any] = []
"""Lines of the steps that are being done."""


class Progress(Protocol):
    """Tells how far a stage is."""

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """So many of so many are done; the note is shown behind the rate."""


def somebody_looks() -> bool:
    """Whether standard error is a terminal."""
    return sys.stderr.isatty()


@contextlib.contextmanager
def stage_line(stage: str, unit: str) -> Iterator[Progress]:
    """A line for a stage while a ``with`` block lasts; its last state stays on the terminal.

    Args:
        stage: What is being done.
        unit: Of what is counted, in the plural.
    """
    if not somebody_looks():
        yield _nobody
        return
    for step in _steps:  # lines that stay and lines that go get in each other's way
        step.close()
    with _line(desc=stage, unit=f" {unit}", mininterval=0.2) as bar:

        def update(done: int, total: int, note: str = "") -> None:
            bar.total = total
            bar.set_postfix_str(note, refresh=False)
            bar.update(done - bar.n)

        yield update
        if bar.total is not None:  # the last report may have come before the end
            bar.update(bar.total - bar.n)


@contextlib.contextmanager
def step_line(step: str) -> Iterator[None]:
    """Name the step that is being done, until it is done or has a stage that says more."""
    if not somebody_looks():
        yield
        return
    with _line(desc=step.replace("_", " "), total=0, bar_format="{desc} …", leave=False) as line:
        _steps.append(line)
        try:
            yield
        finally:
            _steps.remove(line)


def tell(text: str) -> None:
    """Say something to whoever looks at the terminal, above the lines that move."""
    if somebody_looks():
        write_above(text)


def write_above(text: str) -> None:
    """Write a line to standard error without breaking the lines that move."""
    from tqdm import tqdm

    tqdm.write(text, file=sys.stderr)


class TerminalHandler(logging.Handler):
    """Log records as plain lines on standard error, above the lines that move."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one."""
        try:
            write_above(self.format(record))
        except Exception:  # what logging asks of a handler: it must not end the program
            self.handleError(record)


def _line(**options: Any) -> Any:
    from tqdm import tqdm

    width = {"dynamic_ncols": True} if _columns() else {"ncols": _USUAL_COLUMNS, "nrows": _USUAL_ROWS}
    return tqdm(file=sys.stderr, **width, **options)


def _columns() -> int:
    """Of the terminal; some say that they have none."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns
    except OSError:
        return 0


def _nobody(done: int, total: int, note: str = "") -> None:
    """Where nobody looks."""
    del done, total, note
