"""Fine-tuning in processes of its own, from its last checkpoint if there is one."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from charm_core import errors
from charm_core.errors import TrainingError
from charm_core.reward_model.jobs import CurveRecord, Launch, TrainingJob, TrainingOutcome
from charm_core.reward_model.workdir import (
    CURVE,
    LOG,
    claim,
    finished_outcome,
    make_folder,
    read_curve,
    rewind,
    write_text,
)
from charm_core.reward_model.worker import identify
from tasks.nodes import machine_count, run_on_nodes
from tasks.worker_processes import LAUNCH, OnLine, rank_count, run_worker, training_command, worker_environment

LOCK = "job.lock"

OnStep = Callable[[CurveRecord], None]


def run_training(job: TrainingJob, on_step: OnStep | None = None, log: OnLine | None = None) -> TrainingOutcome:
    """Train in processes of their own and wait for the result.

    A job whose work folder holds a checkpoint goes on from there; one that has finished is not run again. Two callers with
    the same work folder take turns, and the second finds the first one's result. Callbacks run in the calling thread.

    Args:
        job: What to train. ``job.config.ranks`` processes, over the machines of ``use_nodes``, or one for plain training.
        on_step: Called with every record of the curve in order, also with those of steps done by an earlier run.
        log: Called with every line that the processes print; all of it is also appended to ``training.log``.

    Returns:
        What the training reports.

    Raises:
        WorkerLostError: A process was killed; run again to go on from the last checkpoint.
        ModelError, TableError, ConfigError, ArtifactError: The job cannot be done as it is.
        TrainingError: Anything else; its message ends with the last lines of the log.
    """
    make_folder(job.work_dir)
    with filelock.FileLock(job.work_dir / LOCK):
        claim(job)
        outcome = finished_outcome(job)
        if outcome is None:
            rewind(job.work_dir)
            curve = CurveReader(job.work_dir / CURVE, on_step)
            with _kept(job.work_dir / LOG, log) as keep:
                if job.config.zero_stage is not None and machine_count() > 1:
                    run_on_nodes(job, keep, curve.poll)
                else:
                    _run_here(job, keep, curve.poll)
            curve.poll()
            outcome = finished_outcome(job)
            if outcome is None:
                raise TrainingError(f"the training process ended without an outcome in {job.work_dir}; see {LOG} there")
        else:
            for record in read_curve(job.work_dir) if on_step else []:
                on_step(record)  # type: ignore[misc]
    return outcome


def _run_here(job: TrainingJob, log: OnLine, poll: Callable[[], None]) -> None:
    launch = job.work_dir / LAUNCH
    write_text(launch, Launch(training=job, parent=identify(os.getpid())).model_dump_json())
    command, environment = training_command(launch, job.config), worker_environment(job.config)
    run_worker(command, environment, launch.parent, log, poll, gpus=rank_count(job.config))


@contextmanager
def _kept(path: Path, log: OnLine | None) -> Iterator[OnLine]:
    """Append every line to a file, and pass it on."""

    def keep(line: str) -> None:
        try:
            file.write(f"{line}\n".encode())
        except OSError as error:
            raise _unwritable(path, error) from error
        if log is not None:
            log(line)

    try:
        file = path.open("ab", buffering=0)  # a full disk is met at the line, and not once more when the file is closed
    except OSError as error:
        raise _unwritable(path, error) from error
    with file:
        yield keep


def _unwritable(path: Path, error: OSError) -> errors.ArtifactError:
    return errors.ArtifactError(
        f"{path} cannot be written: {error.strerror or error}; free space, then run again: finished steps are kept, and the "
        f"training goes on from its last checkpoint"
    )


class CurveReader:
    """Passes on the lines that are added to the curve, and reads no line twice: there may be a hundred thousand."""

    def __init__(self, path: Path, on_step: OnStep | None) -> None:
        self._path, self._on_step, self._read = path, on_step, 0

    def poll(self) -> None:
        """Call ``on_step`` with every record that is new."""
        if self._on_step is None or not self._path.exists() or self._path.stat().st_size <= self._read:
            return
        with self._path.open("rb") as file:
            file.seek(self._read)
            lines = file.read().splitlines(keepends=True)
        for line in lines:
            if line.endswith(b"\n"):  # the last one may be half written
                self._read += len(line)
                self._on_step(json.loads(line))
