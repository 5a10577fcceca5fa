"""Runs that are under way, and runs that were left unfinished and that nobody has finished since."""

import datetime
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from tasks.process_identity import has_ended
from tasks.tracking import PROCESS_TAG, TITLE_TAG

_LOOKED_AT = 1000

State = Literal["running", "failed", "ended early"]


class UnfinishedRun(BaseModel):
    """The last run of its flow and name, if it did not finish."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str = Field(description="Flow and name.")
    state: State = Field(description="ended early: interrupted or killed; what it finished is kept.")
    started: datetime.datetime
    run_id: str = Field(description="Of the MLflow run.")

    def sentence(self) -> str:
        """For people."""
        what = {
            "running": "is running",
            "failed": "failed; correct what its error says and run it again",
            "ended early": "ended early; run it again: finished steps are kept",
        }[self.state]
        return f"{self.title} {what} (started {self.started:%Y-%m-%d %H:%M} UTC)"


def unfinished_runs(client: Any, experiment: str) -> tuple[UnfinishedRun, ...]:
    """Of every flow and name the last run, where that is not done.

    Args:
        client: What ``open_registry`` yields.
        experiment: Name of the MLflow experiment.

    Returns:
        The latest first, of the last thousand runs.
    """
    known = client.get_experiment_by_name(experiment)
    if known is None:
        return ()
    found = client.search_runs([known.experiment_id], order_by=["attributes.start_time DESC"], max_results=_LOOKED_AT)
    return tuple(_unfinished(found))


def _unfinished(runs: Any) -> Iterator[UnfinishedRun]:
    seen: set[str] = set()
    for run in runs:
        title = run.data.tags.get(TITLE_TAG)
        if title is None or title in seen:  # a part of a run has none
            continue
        seen.add(title)
        if run.info.status != "FINISHED":
            yield UnfinishedRun(
                title=title,
                state=_state(run),
                started=datetime.datetime.fromtimestamp(run.info.start_time / 1000, datetime.UTC),
                run_id=run.info.run_id,
            )


def _state(run: Any) -> State:
    if run.info.status == "RUNNING":
        return "ended early" if has_ended(run.data.tags.get(PROCESS_TAG, "")) else "running"
    # the next run closes the run of a process that was killed as failed, and says so
    return "ended early" if run.info.status == "KILLED" or "charm.closed" in run.data.tags else "failed"
