"""Looking, answering and post-training in processes of their own.

``training_launch`` has the fine-tuning, ``scoring_launch`` the scoring.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from charm_core.reward_model.findings import PreflightJob, PreflightReport
from charm_core.reward_model.generation_job import GenerationJob
from charm_core.reward_model.jobs import Launch
from charm_core.reward_model.post_training_job import PostTrainingJob, PostTrainingOutcome, TinyPolicyJob
from charm_core.reward_model.workdir import write_text
from charm_core.reward_model.worker import identify
from tasks.scratch import scratch_folder
from tasks.worker_processes import (
    LAUNCH,
    WORKER,
    OnLine,
    rank_count,
    run_worker,
    training_command,
    worker_environment,
)


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
        run_worker(
            [sys.executable, "-m", WORKER, str(launch)],
            worker_environment(None, allocator={}),
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
        run_worker(
            [sys.executable, "-m", WORKER, str(launch)],
            worker_environment(None),
            launch.parent,
            log,
            poll,
            gpus=job.model.tensor_parallel,
        )


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
        command, environment = training_command(launch, job.config), worker_environment(job.config)
        run_worker(command, environment, launch.parent, log, lambda: None, gpus=rank_count(job.config))
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
        run_worker(
            [sys.executable, "-m", WORKER, str(launch)], worker_environment(None), launch.parent, log, lambda: None
        )
