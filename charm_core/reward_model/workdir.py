"""The files of one training job that outlive a process: live curve, log, failure, checkpoints, finished marker.

No torch here: the process that launches and watches the workers reads them too.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

from pydantic import BaseModel

from charm_core.errors import ArtifactError, TrainingError
from charm_core.reward_model.jobs import CurveRecord, TrainingJob, TrainingOutcome

CURVE = "curve.jsonl"
LOG = "training.log"
FAILURE = "failure.json"
FINISHED = "finished.json"
IDENTITY = "identity.json"
CHECKPOINTS = "checkpoints"

# These decide how fast, or when to give up, not what is learnt: a job may go on with other values.
NOT_IDENTITY = {
    "ranks",
    "threads_per_rank",
    "zero_stage",
    "micro_batch_tokens",
    "gradient_checkpointing",
    "checkpoint_every_steps",
    "checkpoints_kept",
    "offload",
    "nvme_path",
    "raw_scores_of",
    "score_spread_floor",
    "below_spread_floor",
}


class Failure(BaseModel):
    """Why a worker stopped, left for the process that launched it."""

    kind: str
    """Name of the exception's class."""
    message: str


def identity(job: TrainingJob) -> dict[str, object]:
    """What a training job learns from what, as JSON-able data; two jobs with the same identity may share checkpoints."""
    return {
        "model": job.model.settings(exclude={"batch_tokens"}),
        "config": job.config.settings(exclude=NOT_IDENTITY),
        "pairs_sha256": _digest(job.pairs_path),
        "ratings_sha256": _digest(job.ratings_path) if job.ratings_path else None,
    }


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def claim(job: TrainingJob) -> None:
    """Make the work folder this job's, or find that it is already.

    Raises:
        TrainingError: It holds the work of another job.
        ArtifactError: It cannot be written.
    """
    make_folder(job.work_dir)
    mine = identity(job)
    file = job.work_dir / IDENTITY
    if not file.exists():
        write_text(file, json.dumps(mine, indent=1))
    theirs = json.loads(file.read_text())
    differing = [part for part in mine if mine[part] != theirs.get(part)]
    if differing:
        raise TrainingError(
            f"the work folder {job.work_dir} holds another training job, which differs in {', '.join(differing)}; use another folder"
        )


def make_folder(work_dir: Path) -> None:
    """Make a work folder where there is none.

    Raises:
        ArtifactError: It cannot be made.
    """
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(f"the work folder {work_dir} cannot be made: {error}; choose another place") from error


def finished_outcome(job: TrainingJob) -> TrainingOutcome | None:
    """The outcome of a job that has finished and whose model folder is still there."""
    marker = job.work_dir / FINISHED
    if not marker.exists() or not (job.output_dir / "config.json").exists():
        return None
    outcome = TrainingOutcome.model_validate_json(marker.read_text())
    return outcome if outcome.model_dir == job.output_dir else None


def mark_finished(job: TrainingJob, outcome: TrainingOutcome) -> None:
    """Write the marker, last of all, and drop the checkpoints."""
    write_text(job.work_dir / FINISHED, outcome.model_dump_json(indent=1))
    shutil.rmtree(job.work_dir / CHECKPOINTS, ignore_errors=True)


def checkpoint_steps(work_dir: Path) -> list[int]:
    """Steps of the complete checkpoints, oldest first. A checkpoint's folder has its name only once it is complete."""
    return sorted(
        int(path.name.removeprefix("step-")) for path in (work_dir / CHECKPOINTS).glob("step-*") if path.is_dir()
    )


def checkpoint_folder(work_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return work_dir / CHECKPOINTS / f"step-{step:08d}"


def best_steps(work_dir: Path) -> list[int]:
    """Steps of the evaluations whose weights are kept because they were the best of their time, oldest first."""
    return sorted(int(path.name.removeprefix("best-")) for path in (work_dir / CHECKPOINTS).glob("best-*"))


def best_folder(work_dir: Path, step: int) -> Path:
    """Where the weights of the best evaluation lie."""
    return work_dir / CHECKPOINTS / f"best-{step:08d}"


def broken_file(work_dir: Path, step: int) -> Path:
    """Where the pairs of a step that could not go on are kept."""
    return work_dir / f"broken-step-{step:08d}.parquet"


def rewind(work_dir: Path) -> int:
    """Cut the curve back to the last checkpoint and clear what a dead process left; returns the checkpoint's step or 0."""
    steps = checkpoint_steps(work_dir)
    step = steps[-1] if steps else 0
    kept = [record for record in read_curve(work_dir) if record["step"] <= step] if steps else []
    write_text(work_dir / CURVE, "".join(curve_line(record) for record in kept))
    (work_dir / FAILURE).unlink(missing_ok=True)
    (work_dir / FINISHED).unlink(missing_ok=True)
    for leftover in (work_dir / CHECKPOINTS).glob("partial-*"):
        shutil.rmtree(leftover)
    for broken in work_dir.glob("broken-step-*.parquet"):
        broken.unlink()
    return step


def append_curve(work_dir: Path, record: CurveRecord) -> None:
    """Add a record to the curve.

    Raises:
        ArtifactError: It cannot be written.
    """
    file = work_dir / CURVE
    try:
        with file.open("a", encoding="utf-8") as curve:
            curve.write(curve_line(record))
    except OSError as error:
        raise ArtifactError(f"the curve {file} cannot be written: {error}") from error


def curve_line(record: CurveRecord) -> str:
    """One record as one line of JSON."""
    return json.dumps(record) + "\n"


def read_curve(work_dir: Path) -> list[CurveRecord]:
    """All complete lines of the curve."""
    file = work_dir / CURVE
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]


def write_text(path: Path, text: str) -> None:
    """Write a small file so that it is there whole or not at all, even after a power failure.

    Raises:
        ArtifactError: It cannot be written.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ArtifactError(f"the file {path} cannot be written: {error}") from error


def sync_folder(folder: Path) -> None:
    """Bring a folder's files and their names to disk."""
    for path in [*folder.iterdir(), folder, folder.parent]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
