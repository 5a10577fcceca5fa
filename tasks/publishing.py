"""What a person sees while a flow runs and after it: progress, tables and links in the Prefect UI, and a line on a terminal."""

import contextlib
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast
from uuid import UUID

import httpx
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext, TaskRunContext
from prefect.exceptions import MissingContextError, PrefectException
from prefect.logging import get_run_logger

from tasks.pace import Pace
from tasks.progress import Progress, stage_line


def run_logger() -> logging.Logger | logging.LoggerAdapter[Any]:
    """The logger of the current Prefect run, or an ordinary one outside of runs."""
    try:
        return get_run_logger()
    except MissingContextError:
        return logging.getLogger("charm")


@contextlib.contextmanager
def report_progress(stage: str, unit: str) -> Iterator[Progress]:
    """Show how far a stage of the current run is: on a terminal, and as a progress artifact in Prefect.

    Args:
        stage: What is being done.
        unit: Of what is counted, in the plural.
    """
    with stage_line(stage, unit) as line:
        if not (FlowRunContext.get() or TaskRunContext.get()):
            yield line
            return
        with _artifact(stage, unit) as artifact:

            def update(done: int, total: int, note: str = "") -> None:
                line(done, total, note)
                artifact(done, total, note)

            yield update


@contextlib.contextmanager
def _artifact(stage: str, unit: str) -> Iterator[Progress]:
    artifact: UUID | None = None
    with _shown_if_possible():
        artifact = cast(UUID, create_progress_artifact(progress=0.0, key=_key(stage), description=stage))
    pace = Pace()

    def update(done: int, total: int, note: str = "") -> None:
        if not pace.is_due():
            return
        with pace.telling():
            _show_progress(artifact, 100.0 * done / max(total, 1))
            run_logger().info("%s: %d of %d %s%s", stage, done, total, unit, f", {note}" if note else "")

    yield update
    _show_progress(artifact, 100.0)


def _show_progress(artifact: UUID | None, percent: float) -> None:
    if artifact is not None:
        with _shown_if_possible():
            update_progress_artifact(artifact, progress=percent)


@contextlib.contextmanager
def _shown_if_possible() -> Iterator[None]:
    """What people can look at on the way is not worth a run: a server that does not take it is a warning."""
    try:
        yield
    except (httpx.HTTPError, PrefectException) as error:
        run_logger().warning("the Prefect server does not show this: %s", error or type(error).__name__)


def rename_flow_run(name: str) -> None:
    """Give the current flow run the name that it deserves, now that it is known."""
    context = FlowRunContext.get()
    if context is not None and context.flow_run is not None:
        with _shown_if_possible(), get_client(sync_client=True) as client:
            client.update_flow_run(context.flow_run.id, name=name)


def publish_markdown(key: str, markdown: str, description: str) -> None:
    """A Markdown artifact of the current run."""
    with _shown_if_possible():
        create_markdown_artifact(markdown, key=_key(key), description=description)


def publish_table(key: str, rows: Sequence[Mapping[str, Any]], description: str) -> None:
    """A table artifact of the current run."""
    with _shown_if_possible():
        create_table_artifact([dict(row) for row in rows], key=_key(key), description=description)


def publish_link(key: str, url: str, text: str, description: str) -> None:
    """A link artifact of the current run."""
    with _shown_if_possible():
        create_link_artifact(url, link_text=text, key=_key(key), description=description)


def _key(text: str) -> str:
    # Prefect allows lower-case letters, digits and dashes
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
