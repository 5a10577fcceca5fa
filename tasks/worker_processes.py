"""Worker processes: with what they are started, how one is watched to its end, and what its end means.

One process tree per job. Whatever ends the caller's wait, an error in a callback, Ctrl-C or a cancelled flow run, ends the
whole tree; and if the caller itself is killed, the workers notice and end.
"""

import os
import queue
import re
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from charm_core import errors
from charm_core.errors import ConfigError, TrainingError, WorkerLostError
from charm_core.reward_model.jobs import automatic_ranks
from charm_core.reward_model.post_training_job import PostTrainingConfig
from charm_core.reward_model.spec import TrainingConfig
from charm_core.reward_model.workdir import FAILURE, Failure
from charm_core.reward_model.worker import cores
from tasks.device_turns import device_turn
from tasks.process_trees import lines_of, process_tree

WORKER = "charm_core.reward_model.worker"
LAUNCH = "launch.json"
TAIL_LINES = 30
POLL_SECONDS = 0.1

# glibc returns freed tensors to the system and faults them in again, up to half of a training step on CPU.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "MALLOC_TOP_PAD_": "268435456",
}
WAITING = {"GOMP_SPINCOUNT": "2000"}
"""Threads that wait for others soon sleep. By themselves they spin for milliseconds, and jobs side by side take each other's
time; see ``benchmarks.side_by_side``."""
SIGNALLED = re.compile(r"exitcode\s*:\s*-(\d+)")
"""How torchrun reports a rank that a signal has ended."""

OnLine = Callable[[str], None]


def rank_count(config: TrainingConfig | PostTrainingConfig, machines: int = 1) -> int:
    """How many processes a configuration means on each of so many machines that are like this one.

    Raises:
        ConfigError: More than there are GPUs, or not the same number everywhere.
    """
    if config.zero_stage is None:
        return 1
    gpus = local_gpu_count()
    if config.ranks == "auto":
        return automatic_ranks(gpus, cores())
    here, left = divmod(config.ranks, machines)
    if left:
        raise ConfigError(
            f"ranks={config.ranks} cannot be shared out evenly over {machines} machines; use ranks='auto'"
        )
    if gpus and here > gpus:
        raise ConfigError(
            f"ranks={config.ranks}, but {'this machine has' if machines == 1 else f'each of {machines} machines has'} {gpus} GPUs; "
            f"use ranks='auto'"
        )
    return here


def training_command(launch: Path, config: TrainingConfig | PostTrainingConfig) -> list[str]:
    """What starts the ranks of a training on this machine alone."""
    if config.zero_stage is None:
        return [sys.executable, "-m", WORKER, str(launch)]
    return worker_command(launch, ["--standalone", f"--nproc_per_node={rank_count(config)}"])


def worker_command(launch: Path, torchrun: Sequence[str]) -> list[str]:
    """What starts ranks with these options of torchrun."""
    return [sys.executable, "-m", "torch.distributed.run", *torchrun, "-m", WORKER, str(launch)]


def worker_environment(
    config: TrainingConfig | PostTrainingConfig | None, allocator: dict[str, str] | None = None, *, machines: int = 1
) -> dict[str, str]:
    """The environment of the workers; the thread count is all cores for scoring and plain training.

    Args:
        config: Of a training, or none.
        allocator: Settings of the memory allocator; default: ``ALLOCATOR`` where there is no GPU, which takes torch to tell.
        machines: Over how many the training is spread.
    """
    if allocator is None:
        allocator = {} if local_gpu_count() else ALLOCATOR
    if config is None or config.threads_per_rank == "auto":
        threads = max(1, cores() // (rank_count(config, machines) if config else 1))
    else:
        threads = config.threads_per_rank
    checkout = str(Path(errors.__file__).parents[1])
    paths = [checkout, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **WAITING,
        **os.environ,
        **allocator,
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
    }


def run_worker(
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
        gpus: How many of the first GPUs it uses, where there are GPUs, and sees no others; 0: it computes nothing.

    Raises:
        CharmError: It failed; which one, the worker's own report or the way it ended says.
    """
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    with gpu_turn(gpus), process_tree(command, with_first_gpus(environment, gpus)) as process:
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
        raise worker_failure([status], folder, tail)


def worker_failure(statuses: Sequence[int], folder: Path, tail: Iterable[str]) -> errors.CharmError:
    """The error that says why workers ended with these statuses.

    Args:
        statuses: Those that are not 0.
        folder: Where a worker leaves its reason.
        tail: The last lines that they printed.
    """
    log = "\n".join(tail)
    report = folder / FAILURE
    failure = Failure.model_validate_json(report.read_text()) if report.exists() else None
    known = getattr(errors, failure.kind, None) if failure else None
    if failure and known:
        return known(failure.message)  # type: ignore[no-any-return]
    signals = {-status for status in statuses if status < 0} or {int(number) for number in SIGNALLED.findall(log)}
    # torchrun terminates the other ranks when one is lost or fails, and those may fail first because their peer is gone.
    lost = signals - {signal.SIGTERM} or (signals if not failure else set())
    if lost:
        return WorkerLostError(
            f"a worker process was ended by signal {min(lost)} (9 is often the system, out of memory); run again: finished "
            f"steps are kept, and a training goes on from its last checkpoint\nThe end of its log:\n{log}"
        )
    if failure:
        return TrainingError(f"the worker failed unexpectedly:\n{failure.message}")
    return TrainingError(f"the worker ended with status {statuses[0]}\nThe end of its log:\n{log}")


def local_gpu_count() -> int:
    """GPUs that the workers would see. Torch is imported late: it takes seconds."""
    from charm_core.reward_model.devices import gpu_count

    return gpu_count()


def first_gpus(environment: Mapping[str, str], number: int) -> list[str]:
    """The first so many of the GPUs that are visible, as CUDA_VISIBLE_DEVICES names them."""
    listed = environment.get("CUDA_VISIBLE_DEVICES")
    return listed.split(",")[:number] if listed else [str(gpu) for gpu in range(number)]


def with_first_gpus(environment: dict[str, str], gpus: int) -> dict[str, str]:
    """With no more GPUs visible than are used: transformers' trainers take every one that they see."""
    if not 0 < gpus < local_gpu_count():
        return environment
    return {**environment, "CUDA_VISIBLE_DEVICES": ",".join(first_gpus(environment, gpus))}


def gpu_turn(gpus: int) -> AbstractContextManager[None]:
    """Hold what a worker computes on: two runs at once would both run out of its memory."""
    from charm_core.reward_model.devices import gpu_ids

    return device_turn(gpu_ids()[:gpus]) if gpus else nullcontext()
