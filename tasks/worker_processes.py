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
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from charm_core import errors
from charm_core.errors import ConfigError, TrainingError, WorkerLostError
from charm_core.reward_model.post_training_job import PostTrainingConfig
from charm_core.reward_model.spec import TrainingConfig
from charm_core.reward_model.workdir import FAILURE, Failure
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
SIGNALLED = re.compile(r"exitcode\s*:\s*-(\d+)")
"""How torchrun reports a rank that a signal has ended."""

OnLine = Callable[[str], None]


def rank_count(config: TrainingConfig | PostTrainingConfig) -> int:
    """How many processes a configuration means on this machine.

    Raises:
        ConfigError: More than there are GPUs.
    """
    if config.zero_stage is None:
        return 1
    gpus = local_gpu_count()
    if config.ranks == "auto":
        return gpus or min(2, _cores())
    if gpus and config.ranks > gpus:
        raise ConfigError(f"ranks={config.ranks}, but this machine has {gpus} GPUs; use ranks='auto'")
    return config.ranks


def training_command(launch: Path, config: TrainingConfig | PostTrainingConfig) -> list[str]:
    """What starts the ranks of a training on this machine alone."""
    worker = ["-m", WORKER, str(launch)]
    if config.zero_stage is None:
        return [sys.executable, *worker]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(rank_count(config))]
    return [sys.executable, *torchrun, *worker]


def worker_environment(
    config: TrainingConfig | PostTrainingConfig | None, allocator: dict[str, str] | None = None
) -> dict[str, str]:
    """The environment of the workers; the thread count is all cores for scoring and plain training.

    Args:
        config: Of a training, or none.
        allocator: Settings of the memory allocator; default: ``ALLOCATOR`` where there is no GPU, which takes torch to tell.
    """
    if allocator is None:
        allocator = {} if local_gpu_count() else ALLOCATOR
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
        gpus: How many of the first GPUs it uses, where there are GPUs; 0: it computes nothing.

    Raises:
        CharmError: It failed; which one, the worker's own report or the way it ended says.
    """
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    with gpu_turn(gpus), process_tree(command, environment) as process:
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
        raise worker_failure(status, folder, list(tail))


def worker_failure(status: int, folder: Path, tail: list[str]) -> errors.CharmError:
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


def local_gpu_count() -> int:
    """GPUs that the workers would see. Torch is imported late: it takes seconds."""
    from charm_core.reward_model.devices import gpu_count

    return gpu_count()


def gpu_turn(gpus: int) -> AbstractContextManager[None]:
    """Hold what a worker computes on: two runs at once would both run out of its memory."""
    from charm_core.reward_model.devices import gpu_ids

    return device_turn(gpu_ids()[:gpus]) if gpus else nullcontext()
