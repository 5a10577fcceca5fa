"""Fine-tuning: pairs in, a reward model folder and its training curve out."""

import contextlib
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from charm_core.reward_model.jobs import TrainingJob, TrainingOutcome
from charm_core.reward_model.spec import TrainingConfig
from charm_core.reward_model.workdir import read_curve
from charm_core.tables import PAIRS, RATINGS
from tasks.caching import content_key, step
from tasks.pace import Pace
from tasks.progress import Progress
from tasks.publishing import report_progress, run_logger
from tasks.scoring import RewardModelRef, worker_was_lost
from tasks.store import ArtifactRef, ArtifactStore
from tasks.tracking import TrackedRun, current_run
from tasks.training_launch import run_training

_SECONDS_BETWEEN_STEPS = 1.0
_STEP = re.compile(r"step (\d+) of (\d+): (loss [\d.]+)")
"""How the training tells its steps; see ``charm_core.reward_model.training``."""


class TrainingSummary(BaseModel):
    """What fine-tuning met; the same for every run of the same job, interrupted or not."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int
    ranks: int
    train_pairs: int
    train_prompts: int
    held_out_pairs: int
    texts: int = Field(description="Distinct texts; each is encoded once per step, however many pairs it is in.")
    tokens_trained: int
    tokens_if_pairwise: int
    prompts_cut: int
    responses_cut: int
    margin_scale: float | None
    first_loss: float
    last_loss: float
    evaluation_before: dict[str, float] | None
    evaluation_after: dict[str, float] | None
    saved_step: int | None = Field(default=None, description="Steps after which the saved model was as it is.")
    stopped_early: bool = False
    first_loss_predicted: float | None = Field(default=None, description="First loss if scores were the raw scores.")
    score_difference: float | None = Field(
        default=None,
        description="Largest difference between a score of the untouched model in training and its raw score.",
    )


class Curve(BaseModel):
    """The training curve, one record per optimiser step."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: list[dict[str, Any]]


class TrainedModel(BaseModel):
    """A fine-tuned reward model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: RewardModelRef
    curve: ArtifactRef
    summary: TrainingSummary


@step(version=2, retries=2, retry_delay_seconds=5, retry_condition_fn=worker_was_lost)
def train_reward_model(
    store: ArtifactStore,
    name: str,
    base: RewardModelRef,
    pairs: ArtifactRef,
    ratings: ArtifactRef | None,
    config: TrainingConfig,
) -> TrainedModel:
    """Fine-tune a reward model in processes of its own, from its last checkpoint if there is one.

    Args:
        store: Where the pairs are and the result goes.
        name: Of the nested MLflow run with the live curve.
        base: Where training starts.
        pairs: PAIRS.
        ratings: RATINGS, for an objective that needs them; see ``ratings_for``.
        config: How.
    """
    inputs = {"base": base, "pairs": pairs, "ratings": ratings, "config": config}
    work = Path(store.work_folder, content_key("train", 2, inputs))
    work.mkdir(parents=True, exist_ok=True)
    # tables in the work folder too: of a training over several machines, all see it
    with tempfile.TemporaryDirectory(prefix="tables-", dir=work) as folder, base.local_spec(store) as spec:
        job = TrainingJob(
            model=spec,
            pairs_path=Path(folder, "pairs.parquet"),
            ratings_path=Path(folder, "ratings.parquet") if ratings else None,
            output_dir=work / "model",
            work_dir=work / "progress",
            config=config,
        )
        store.read_table(pairs, PAIRS).write_parquet(job.pairs_path)
        if ratings is not None and job.ratings_path is not None:
            store.read_table(ratings, RATINGS).write_parquet(job.ratings_path)
        with _live_curve(name) as on_step, report_progress(f"training {name}", "steps") as progress:
            outcome = run_training(job, on_step, _shown_steps(progress))
        return _stored(store, base, outcome, work)


def _shown_steps(progress: Progress) -> Callable[[str], None]:
    """What to do with a line of the training's log: keep it in Prefect, and show how far it says that the training is.

    Of steps that follow one another faster than once a second only some are kept there: thousands of lines would be a load on
    Prefect's server, and nobody reads them. The log in the work folder has every line.
    """
    keep = run_logger().info
    due = time.monotonic()

    def line(text: str) -> None:
        nonlocal due
        found = _STEP.search(text)
        if found is not None:
            progress(int(found[1]), int(found[2]), found[3])
            if time.monotonic() < due:
                return
            due = time.monotonic() + _SECONDS_BETWEEN_STEPS
        keep("%s", text)

    return line


def ratings_for(config: TrainingConfig, ratings: ArtifactRef) -> ArtifactRef | None:
    """The ratings if training looks at them; else none, so that new ratings alone do not train again."""
    return ratings if config.objective == "win_rate_matching" else None


def _stored(store: ArtifactStore, base: RewardModelRef, outcome: TrainingOutcome, work: Path) -> TrainedModel:
    folder = store.write_folder(outcome.model_dir, "reward_model")
    curve = store.write_record(Curve(steps=read_curve(work / "progress")), "curve")
    spec = base.spec.saved_at(folder.uri)
    summary = TrainingSummary.model_validate(outcome.model_dump(exclude={"model_dir"}))
    return TrainedModel(
        model=RewardModelRef(spec=spec, digest=folder.digest, folder=folder), curve=curve, summary=summary
    )


def log_training(store: ArtifactStore, run: TrackedRun, models: Mapping[str, TrainedModel]) -> None:
    """Log what training did, from returned values, so that it is there on a cached run too.

    The curve of a model that was trained in this run is in its nested run already.
    """
    for name, trained in models.items():
        numbers = trained.summary.model_dump(exclude={"evaluation_before", "evaluation_after"})
        run.log_metrics({f"training/{name}/{key}": value for key, value in numbers.items()})
        if name not in run.nested_names:
            with run.nested(name, {"charm.cached": "true"}) as nested:
                nested.log_curve(store.read_record(trained.curve, Curve).steps)


@contextlib.contextmanager
def _live_curve(name: str) -> Iterator[Any]:
    """Log the curve while training runs, to a nested run of the flow's MLflow run if there is one."""
    parent = current_run()
    if parent is None:
        yield lambda _record: None
        return
    with parent.nested(name) as run:
        waiting: list[dict[str, Any]] = []
        pace, shown = Pace(), True

        def on_step(record: dict[str, Any]) -> None:
            nonlocal shown
            waiting.append(record)
            if shown and pace.is_due():
                with pace.telling():
                    shown = run.show_curve(waiting)
                waiting.clear()

        yield on_step
        shown = shown and run.show_curve(waiting)
    if not shown:
        parent.nested_names.discard(name)  # it is logged as a whole when the training is done
