"""How things stand: the champion of every registered reward model, the age of its ratings, what is due, what was left unfinished.

python -m flows.status
python -m flows.status --model charm-demo
python -m flows.status --json
"""

import sys
from collections.abc import Callable, Iterator

from pydantic import BaseModel, ConfigDict, Field

from flows.command_line import run_from_command_line
from flows.settings import RuntimeSettings
from tasks.model_registry import ModelRegistry
from tasks.standing import Age, Standing, standings
from tasks.tracking import open_registry
from tasks.tracking_settings import is_empty
from tasks.unfinished_runs import UnfinishedRun, unfinished_runs


class StatusRun(BaseModel):
    """Show how things stand; nothing is changed, and nothing is recorded."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str | None = Field(
        default=None, min_length=1, description="Name in the model registry; default: all of them."
    )


PRESETS: dict[str, Callable[[], StatusRun]] = {"all": StatusRun}


class Status(BaseModel):
    """How things stand."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    models: tuple[Standing, ...]
    unfinished: tuple[UnfinishedRun, ...]
    summary: str


def status(run: StatusRun) -> Status:
    """Look at the model registry, the store and the runs.

    Raises:
        ConfigError: There is no such model.
        ServiceError: The tracking server does not answer.
    """
    runtime = RuntimeSettings()
    tracking = runtime.tracking()
    if is_empty(tracking):  # to look at it would make it
        return Status(models=(), unfinished=(), summary="nothing has run yet; start with python -m flows.calibrate")
    with open_registry(tracking) as client:
        registry = ModelRegistry.of(client)
        names = registry.names() if run.model is None else (run.model,)
        models = standings(registry, runtime.artifact_store(), names)
        unfinished = unfinished_runs(client, tracking.experiment)
    return Status(models=models, unfinished=unfinished, summary="\n".join(_lines(models, unfinished)))


def _lines(models: tuple[Standing, ...], unfinished: tuple[UnfinishedRun, ...]) -> Iterator[str]:
    if not models:
        yield "no model is registered; a calibration registers its model"
    for one in models:
        yield from _model_lines(one)
        yield ""
    yield "runs under way or left unfinished" if unfinished else "no run is under way or was left unfinished"
    for run in unfinished:
        yield f"  {run.sentence()}"


def _model_lines(one: Standing) -> Iterator[str]:
    champion = f"version {one.champion} of {one.versions}" if one.champion else f"nobody, of {one.versions} versions"
    since = f" since {one.since:%Y-%m-%d %H:%M} UTC" if one.since else ""
    due = {True: "due", False: "not due", None: "not known"}[one.due]
    yield f"{one.model}"
    yield f"  champion  {champion}{since}"
    if one.evidence:
        yield f"  evidence  {one.evidence}"
    if one.age is not None:
        yield f"  ratings   {_age(one.age)}"
    yield f"  to do     {due}: {one.why}"


def _age(age: Age) -> str:
    newer = f"{age.newer} newer in the store, the last of {age.newest}" if age.newer else "the newest in the store"
    return f"{age.date or 'undated'} ({age.board}, {age.snapshot[:12]}); {newer}"


if __name__ == "__main__":
    sys.exit(run_from_command_line("status", StatusRun, PRESETS, status))
