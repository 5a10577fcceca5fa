"""The process that trains or scores: ``python -m charm_core.reward_model.worker LAUNCH.json``.

Under ``torchrun`` (RANK in the environment) it is one rank of several. It ends when the process that launched it has ended,
and leaves the reason of a failure in the job's work folder.
"""

import logging
import os
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from charm_core.errors import CharmError
from charm_core.reward_model.findings import PreflightJob
from charm_core.reward_model.generation_job import GenerationJob
from charm_core.reward_model.jobs import Launch, ProcessIdentity, ScoringJob, TrainingJob
from charm_core.reward_model.post_training_job import PostTrainingJob, TinyPolicyJob
from charm_core.reward_model.workdir import FAILURE, Failure, write_text

if TYPE_CHECKING:
    from charm_core.reward_model.preflight.facts import Machine
    from charm_core.reward_model.ranks import Rank

logger = logging.getLogger("charm_core.reward_model.worker")

POLL_SECONDS = 0.5
PEERS_WAIT = timedelta(hours=2)
"""So long ranks wait for the first, which writes checkpoints of a hundred gigabytes; a rank that is lost is noticed otherwise."""
ORPHANED = 86
FAILED = 1


def main(arguments: list[str]) -> int:
    """Do the job described in the file that is the one argument; returns the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    launch_file = Path(arguments[0])
    launch = Launch.model_validate_json(launch_file.read_text())
    watch_parents(launch.parent)
    # DeepSpeed calls what torch.distributed has since renamed, several times a step.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    try:
        if launch.training is not None:
            _train(launch.training)
        if launch.scoring is not None:
            _score(launch.scoring)
        if launch.preflight is not None:
            _look(launch.preflight)
        if launch.generation is not None:
            _generate(launch.generation)
        if launch.post_training is not None:
            _post_train(launch.post_training)
        if launch.tiny_policy is not None:
            _teach(launch.tiny_policy)
    except Exception as error:
        traceback.print_exc()
        kind = type(error).__name__ if isinstance(error, CharmError) else "unexpected"
        # The rank that fails first has the reason; the others fail because it is gone.
        if not (launch_file.parent / FAILURE).exists():
            failure = Failure(kind=kind, message=str(error) if kind != "unexpected" else traceback.format_exc())
            write_text(launch_file.parent / FAILURE, failure.model_dump_json())
        sys.stderr.flush()
        # Not through the interpreter's exit handlers: peers may be gone, and tearing down the group would wait for them.
        os._exit(FAILED)
    return 0


def watch_parents(parent: ProcessIdentity | None) -> None:
    """End this process soon after its parent, or the process named, has ended."""
    direct = os.getppid()

    def watch() -> None:
        while os.getppid() == direct and (parent is None or is_alive(parent)):
            time.sleep(POLL_SECONDS)
        os._exit(ORPHANED)

    threading.Thread(target=watch, name="watch-parents", daemon=True).start()


def identify(pid: int) -> ProcessIdentity:
    """Number and start of a running process."""
    return ProcessIdentity(pid=pid, started=_started(psutil.Process(pid)))


def is_alive(process: ProcessIdentity) -> bool:
    """Whether it still runs; a zombie does not, nor does a later process with the same number."""
    try:
        found = psutil.Process(process.pid)
        return bool(abs(_started(found) - process.started) < 2 and found.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _started(process: psutil.Process) -> float:
    """Seconds after the machine was started: a clock that is put right or wrong changes when, but not that."""
    return float(process.create_time() - psutil.boot_time())


def _train(job: TrainingJob) -> None:
    from charm_core.reward_model.training import train

    with _rank(in_group=job.config.zero_stage is not None) as rank:
        train(job, rank)


def _post_train(job: PostTrainingJob) -> None:
    from charm_core.reward_model.post_training import post_train

    with _rank(in_group=job.config.zero_stage is not None) as rank:
        post_train(job, rank)


@contextmanager
def _rank(*, in_group: bool) -> Iterator["Rank"]:
    """Which of the processes this is; under DeepSpeed a member of their group."""
    import torch
    import torch.distributed as dist
    from transformers.utils import logging as transformers_logging

    from charm_core.reward_model.ranks import Rank

    transformers_logging.disable_progress_bar()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    cuda = torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    number, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if number:
        logging.getLogger().setLevel(logging.WARNING)
    if in_group:
        _join_group("nccl" if cuda else "gloo")
    yield Rank(number=number, world_size=world_size, device=device)
    if in_group:
        dist.destroy_process_group()


def _join_group(backend: str) -> None:
    import deepspeed
    from deepspeed.utils import logger as deepspeed_logger

    deepspeed_logger.setLevel(logging.WARNING)
    # Otherwise it compiles a shared-memory reduction on first use, over a minute, that training never calls.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, timeout=PEERS_WAIT)


def _score(job: ScoringJob) -> None:
    import polars as pl
    from transformers.utils import logging as transformers_logging

    from charm_core.reward_model.scoring import score_responses

    transformers_logging.disable_progress_bar()

    def report(done: int, total: int) -> None:
        sys.stdout.write(f"{PROGRESS}{done} {total}\n")
        sys.stdout.flush()

    result = score_responses(job.model, pl.read_parquet(job.prompts_path), pl.read_parquet(job.responses_path), report)
    partial = job.scores_path.with_name(f"{job.scores_path.name}.partial")
    result.scores.write_parquet(partial)
    if job.cuts_path is not None:
        result.cuts.write_parquet(job.cuts_path)
    write_text(job.scores_path.with_suffix(".json"), result.summary.model_dump_json(indent=1))
    partial.replace(job.scores_path)


def _look(job: PreflightJob) -> None:
    import polars as pl
    from transformers.utils import logging as transformers_logging

    from charm_core.reward_model.preflight.run import preflight

    transformers_logging.set_verbosity_error()
    texts = [] if job.texts_path is None else pl.read_parquet(job.texts_path).select("messages", "response").rows()
    machine = None if job.training is None else _machine(job.machines)
    report = preflight(job.model, texts, texts_in_all=job.texts_in_all, training=job.training, machine=machine)
    write_text(job.report_path, report.model_dump_json(indent=1))


def _machine(machines: int) -> "Machine":
    from charm_core.reward_model.devices import gpu_bytes
    from charm_core.reward_model.preflight.facts import Machine

    each = gpu_bytes()
    return Machine(
        gpus=len(each),
        gpu_bytes=min(each, default=0),
        memory_bytes=psutil.virtual_memory().total,
        cores=cores(),
        machines=machines,
    )


def _generate(job: GenerationJob) -> None:
    import polars as pl
    from transformers.utils import logging as transformers_logging

    from charm_core.reward_model import generation, vllm_generation

    transformers_logging.disable_progress_bar()
    engine = vllm_generation if job.model.engine == "vllm" else generation
    with job.answers_path.open("a", encoding="utf-8") as file:
        for answers in engine.generate_answers(job.model, job.decoding, pl.read_parquet(job.prompts_path)):
            file.writelines(f"{answer.model_dump_json()}\n" for answer in answers)
            file.flush()


def _teach(job: TinyPolicyJob) -> None:
    import polars as pl
    import torch
    from transformers.utils import logging as transformers_logging

    from charm_core.reward_model.tiny_policy import teach_tiny_policy_model

    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)  # its matrices are too small for two
    teach_tiny_policy_model(job, pl.read_parquet(job.prompts_path), pl.read_parquet(job.responses_path))


PROGRESS = "scored "
"""How a line of a scoring process's output begins that says how far it is: texts scored, texts to score."""

if __name__ == "__main__":
    finished = main(sys.argv[1:])
    logging.shutdown()
    sys.stdout.flush()
    # Not through the interpreter's end: there a thread that the process group left behind now and then aborts a rank whose work is done.
    os._exit(finished)
