"""What a person sees in the Prefect UI while a flow runs and after it: progress, tables, links."""

import contextlib
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast
from uuid import UUID

from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.context import FlowRunContext, TaskRunContext
from prefect.exceptions import MissingContextError
from prefect.logging import get_run_logger

_SECONDS_BETWEEN_UPDATES = 2.0


def run_logger() -> logging.Logger | logging.LoggerAdapter[Any]:
    """The logger of the current Prefect run, or an ordinary one outside of runs."""
    try:
        return get_run_logger()
    except MissingContextError:
        return logging.getLogger("charm")


@contextlib.contextmanager
def report_progress(stage: str) -> Iterator[Callable[[int, int], None]]:
    """A progress artifact for the current run; yields a function of (done, total)."""
    if not (FlowRunContext.get() or TaskRunContext.get()):
        yield lambda _done, _total: None
        return
    artifact = cast(UUID, create_progress_artifact(progress=0.0, key=_key(stage), description=stage))
    last = time.monotonic()

    def update(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < _SECONDS_BETWEEN_UPDATES:
            return
        last = now
        update_progress_artifact(artifact, progress=100.0 * done / max(total, 1))
        run_logger().info("%s: %d of %d", stage, done, total)

    yield update
    update_progress_artifact(artifact, progress=100.0)


def publish_markdown(key: str, markdown: str, description: str) -> None:
    """A Markdown artifact of the current run."""
    create_markdown_artifact(markdown, key=_key(key), description=description)


def publish_table(key: str, rows: Sequence[Mapping[str, Any]], description: str) -> None:
    """A table artifact of the current run."""
    create_table_artifact([dict(row) for row in rows], key=_key(key), description=description)


def publish_link(key: str, url: str, text: str, description: str) -> None:
    """A link artifact of the current run."""
    create_link_artifact(url, link_text=text, key=_key(key), description=description)


def _key(text: str) -> str:
    # Prefect allows lower-case letters, digits and dashes
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
