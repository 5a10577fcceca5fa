"""Training, looking and answering in processes of their own; ``scoring_launch`` has the scoring.

One process tree per job. Whatever ends the caller's wait, an error in a callback, Ctrl-C or a cancelled flow run, ends the
whole tree; and if the caller itself is killed, the workers notice and end.
"""

import json
import logging
import os
import queue
import re
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import filelock

from charm_core import errors
from charm_core.errors import ConfigError, TrainingError, WorkerLostError
from charm_core.reward_model.findings import PreflightJob, PreflightReport
from charm_core.reward_model.generation_job import GenerationJob
from charm_core.reward_model.jobs import CurveRecord, Launch, TrainingJob, TrainingOutcome
from charm_core.reward_model.post_training_job import (
    PostTrainingConfig,
    PostTrainingJob,
    PostTrainingOutcome,
    TinyPolicyJob,
)
from charm_core.reward_model.spec import TrainingConfig
from charm_core.reward_model.workdir import (
    CURVE,
    FAILURE,
    LOG,
    Failure,
    claim,
    finished_outcome,
    make_folder,
    read_curve,
    rewind,
    write_text,
)
from charm_core.reward_model.worker import identify
from tasks.device_turns import device_turn
from tasks.process_trees import lines_of, process_tree
from tasks.scratch import scratch_folder

logger = logging.getLogger(__name__)

WORKER = "charm_core.reward_model.worker"
LAUNCH = "launch.json"
LOCK = "job.lock"
TAIL_LINES = 30
POLL_SECONDS = 0.1

# glibc returns freed tensors to the system and faults them in again, up to half of a training step on CPU.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "MALLOC_TOP_PAD_": "268435456",
}
SIGNALLED = re.compile(r"exitcode\s*:\s*-(\d+)")
"""How torchrun reports a rank that a signal has ended."""

OnStep = Callable[[CurveRecord], None]
OnLine = Callable[[str], None]


def run_training(job: TrainingJob, on_step: OnStep | None = None, log: OnLine | None = None) -> TrainingOutcome:
    """Train in processes of their own and wait for the result.

    A job whose work folder holds a checkpoint goes on from there; one that has finished is not run again. Two callers with
    the same work folder take turns, and the second finds the first one's result. Callbacks run in the calling thread.

    Args:
        job: What to train. ``job.config.ranks`` processes, or one for plain training.
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
            launch = job.work_dir / LAUNCH
            write_text(launch, Launch(training=job, parent=identify(os.getpid())).model_dump_json())
            curve = CurveReader(job.work_dir / CURVE, on_step)
            with _kept(job.work_dir / LOG, log) as keep:
                command, environment = _training_command(launch, job.config), _environment(job.config)
                _run(command, environment, launch.parent, keep, curve.poll, gpus=rank_count(job.config))
            curve.poll()
            outcome = finished_outcome(job)
            if outcome is None:
                raise TrainingError(f"the training process ended without an outcome in {job.work_dir}; see {LOG} there")
        else:
            for record in read_curve(job.work_dir) if on_step else []:
                on_step(record)  # type: ignore[misc]
    return outcome


def run_preflight(job: PreflightJob) -> PreflightReport:
    """Look at a reward model in a process of its own, which imports what this one need not.

    Args:
        job: What to look at; the report is at ``job.report_path`` afterwards.

    Raises:
        ServiceError: The model is on the hub, which does not answer.
        TrainingError: Anything else; its message ends with the last lines that the process printed.
    """
    with scratch_folder("preflight") as folder:
        launch = Path(folder) / LAUNCH
        write_text(launch, Launch(preflight=job, parent=identify(os.getpid())).model_dump_json())
        _run(
            [sys.executable, "-m", WORKER, str(launch)],
            _environment(None, allocator={}),
            launch.parent,
            None,
            lambda: None,
            gpus=0,
        )
    return PreflightReport.model_validate_json(job.report_path.read_text())


def run_generation(job: GenerationJob, poll: Callable[[], None], log: OnLine | None = None) -> None:
    """Answer prompts in a process of its own; the answers are at ``job.answers_path``, line by line as they come.

    Args:
        job: What to answer.
        poll: Called about ten times a second; what it raises ends the process.
        log: Called with every line that the process prints.

    Raises:
        WorkerLostError: The process was killed.
        ModelError, ConfigError: The job cannot be done as it is.
        TrainingError: Anything else; its message ends with the last lines that the process printed.
    """
    with scratch_folder("generation") as folder:
        launch = Path(folder) / LAUNCH
        write_text(launch, Launch(generation=job, parent=identify(os.getpid())).model_dump_json())
        _run([sys.executable, "-m", WORKER, str(launch)], _environment(None), launch.parent, log, poll)


def run_post_training(job: PostTrainingJob, log: OnLine | None = None) -> PostTrainingOutcome:
    """Post-train a policy model in processes of their own; it is at ``job.output_dir`` afterwards.

    Args:
        job: What to train. ``job.config.ranks`` processes under DeepSpeed, else one.
        log: Called with every line that the processes print.

    Raises:
        WorkerLostError: A process was killed.
        ModelError, ConfigError, ArtifactError: The job cannot be done as it is.
        TrainingError: Anything else; its message ends with the last lines that the processes printed.
    """
    with scratch_folder("post-training") as folder:
        launch = Path(folder) / LAUNCH
        write_text(launch, Launch(post_training=job, parent=identify(os.getpid())).model_dump_json())
        command, environment = _training_command(launch, job.config), _environment(job.config)
        _run(command, environment, launch.parent, log, lambda: None, gpus=rank_count(job.config))
    return PostTrainingOutcome.model_validate_json(job.outcome_path.read_text())


def run_tiny_policy(job: TinyPolicyJob, log: OnLine | None = None) -> None:
    """Teach a tiny policy model in a process of its own; it is at ``job.output_dir`` afterwards.

    Raises:
        WorkerLostError: The process was killed.
        ConfigError: The job cannot be done as it is.
    """
    with scratch_folder("tiny-policy") as folder:
        launch = Path(folder) / LAUNCH
        write_text(launch, Launch(tiny_policy=job, parent=identify(os.getpid())).model_dump_json())
        _run([sys.executable, "-m", WORKER, str(launch)], _environment(None), launch.parent, log, lambda: None)


def rank_count(config: TrainingConfig | PostTrainingConfig) -> int:
    """How many processes a configuration means on this machine.

    Raises:
        ConfigError: More than there are GPUs.
    """
    if config.zero_stage is None:
        return 1
    gpus = _gpu_count()
    if config.ranks == "auto":
        return gpus or min(2, _cores())
    if gpus and config.ranks > gpus:
        raise ConfigError(f"ranks={config.ranks}, but this machine has {gpus} GPUs; use ranks='auto'")
    return config.ranks


def _training_command(launch: Path, config: TrainingConfig | PostTrainingConfig) -> list[str]:
    worker = ["-m", WORKER, str(launch)]
    if config.zero_stage is None:
        return [sys.executable, *worker]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(rank_count(config))]
    return [sys.executable, *torchrun, *worker]


def _environment(
    config: TrainingConfig | PostTrainingConfig | None, allocator: dict[str, str] | None = None
) -> dict[str, str]:
    """The environment of the workers; the thread count is all cores for scoring and plain training.

    Args:
        config: Of a training, or none.
        allocator: Settings of the memory allocator; default: ``ALLOCATOR`` where there is no GPU, which takes torch to tell.
    """
    if allocator is None:
        allocator = {} if _gpu_count() else ALLOCATOR
    if config is None or config.threads_per_rank == "auto":
        threads = max(1, _cores() // (rank_count(config) if config else 1))
    else:
        threads = config.threads_per_rank
    checkout = str(Path(errors.__file__).parents[1])
    paths = [checkout, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        **allocator,
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
    }


def _run(
    command: list[str],
    environment: dict[str, str],
    folder: Path,
    log: OnLine | None,
    poll: Callable[[], None],
    *,
    gpus: int = 1,
) -> None:
    """Run a worker to its end, passing on its output and calling ``poll`` now and then; waits for its turn first.

    Args:
        command: What to start.
        environment: With what.
        folder: Where it leaves the reason of a failure.
        log: Called with every line of its output.
        poll: Called about ten times a second.
        gpus: How many of the first GPUs it uses, where there are GPUs; 0: it computes nothing.

    Raises:
        CharmError: It failed; which one, the worker's own report or the way it ended says.
    """
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    with _turn(gpus), process_tree(command, environment) as process:
        lines = lines_of(process)
        while True:
            try:
                line = lines.get(timeout=POLL_SECONDS)
            except queue.Empty:
                poll()
                continue
            if line is None:
                break
            tail.append(line)
            if log is not None:
                log(line)
            poll()
        status = process.wait()
    if status != 0:
        raise _failure(status, folder, list(tail))


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


def _failure(status: int, folder: Path, tail: list[str]) -> errors.CharmError:
    """The error that says why a worker ended with this status."""
    log = "\n".join(tail)
    report = folder / FAILURE
    failure = Failure.model_validate_json(report.read_text()) if report.exists() else None
    known = getattr(errors, failure.kind, None) if failure else None
    if failure and known:
        return known(failure.message)  # type: ignore[no-any-return]
    signals = {-status} if status < 0 else {int(number) for number in SIGNALLED.findall(log)}
    # torchrun terminates the other ranks when one is lost or fails, and those may fail first because their peer is gone.
    lost = signals - {signal.SIGTERM} or (signals if not failure else set())
    if lost:
        return WorkerLostError(
            f"a worker process was ended by signal {min(lost)} (9 is often the system, out of memory); run again: finished "
            f"steps are kept, and a training goes on from its last checkpoint\nThe end of its log:\n{log}"
        )
    if failure:
        return TrainingError(f"the worker failed unexpectedly:\n{failure.message}")
    return TrainingError(f"the worker ended with status {status}\nThe end of its log:\n{log}")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpu_count() -> int:
    """GPUs that the workers would see. Torch is imported late: it takes seconds."""
    from charm_core.reward_model.devices import gpu_count

    return gpu_count()


def _turn(gpus: int) -> AbstractContextManager[None]:
    """Hold what a worker computes on: two runs at once would both run out of its memory."""
    from charm_core.reward_model.devices import gpu_ids

    return device_turn(gpu_ids()[:gpus]) if gpus else nullcontext()
