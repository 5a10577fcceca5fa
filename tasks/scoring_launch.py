"""Scoring in processes of its own: one per GPU, or some on the processors, each with its share of the prompts.

Every process loads the reward model, and gives its memory back when it ends. All of them end together: whatever ends the
caller's wait, or any of them, ends the others.
"""

import os
import queue
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import Popen

import polars as pl

from charm_core.errors import CharmError, ConfigError
from charm_core.reward_model.jobs import Launch, ScoringJob, ScoringSummary
from charm_core.reward_model.scoring_shares import merge_summaries, share_responses
from charm_core.reward_model.spec import RewardModelSpec
from charm_core.reward_model.workdir import write_text
from charm_core.reward_model.worker import PROGRESS, identify
from charm_core.tables import SCORES, validate
from tasks.process_trees import lines_of, process_tree
from tasks.scoring_settings import scoring_settings
from tasks.scratch import scratch_folder
from tasks.worker_processes import (
    LAUNCH,
    POLL_SECONDS,
    TAIL_LINES,
    WORKER,
    OnLine,
    first_gpus,
    gpu_turn,
    local_gpu_count,
    worker_environment,
    worker_failure,
)

OnProgress = Callable[[int, int], None]

TEXTS_PER_PROCESS = 1000
"""Fewer are not worth another process, which takes seconds to load the reward model."""
LIGHT_BYTES = 1e9
"""Weights that a processor's memory holds twice without a second thought."""


def run_scoring(job: ScoringJob, on_progress: OnProgress | None = None, log: OnLine | None = None) -> ScoringSummary:
    """Score in processes of their own, which return their memory when they end.

    Args:
        job: What to score; the scores are at ``job.scores_path`` afterwards.
        on_progress: Called with (texts scored, texts to score).
        log: Called with every other line that the processes print.

    Returns:
        What scoring met, over all processes.

    Raises:
        WorkerLostError: A process was killed.
        ModelError, TableError: The job cannot be done as it is.
        ConfigError: There are not as many GPUs as processes.
    """
    gpus, environment = local_gpu_count(), worker_environment(None)
    cores = scoring_settings().processes.cores or int(environment["OMP_NUM_THREADS"])
    processes = _process_count(job, gpus, cores)
    with scratch_folder("scoring") as folder:
        shares = _share_out(job, processes, folder)
        environments = _environments(environment, len(shares), gpus, cores)
        with gpu_turn(len(shares)):
            _run_together(shares, environments, folder, _Progress(shares, on_progress), log)
        if shares != [job]:
            _merge(job, shares)
    return _summary(job)


def _process_count(job: ScoringJob, gpus: int, cores: int) -> int:
    """How many processes are worth it, at most as many as the settings say."""
    wanted = scoring_settings().processes.number
    if wanted is None:
        # measured on two cores: see benchmarks/scoring.py
        wanted = gpus or (min(2, cores) if _is_light(job.model) else 1)
    if gpus and wanted > gpus:
        raise ConfigError(
            f"{wanted} scoring processes, but this machine has {gpus} GPUs; leave CHARM_SCORING_PROCESSES out for one per GPU"
        )
    return max(1, min(wanted, _text_count(job) // TEXTS_PER_PROCESS))


def _is_light(model: RewardModelSpec) -> bool:
    """Whether a reward model is small for certain: a folder that has all of its weights."""
    folder = Path(model.path)
    if model.base_model or model.reference_model or (folder / "adapter_config.json").exists():
        return False
    return 0 < sum(file.stat().st_size for file in folder.glob("*.safetensors")) <= LIGHT_BYTES


def _text_count(job: ScoringJob) -> int:
    return int(pl.scan_parquet(job.responses_path).select(pl.len()).collect().item())


def _share_out(job: ScoringJob, processes: int, folder: Path) -> list[ScoringJob]:
    """A job per process, in a folder of its own."""
    if processes == 1:
        return [job]
    prompts, responses = pl.read_parquet(job.prompts_path), pl.read_parquet(job.responses_path)
    jobs = []
    for number, share in enumerate(share_responses(prompts, responses, processes, job.model.max_length)):
        own = folder / f"share-{number}"
        own.mkdir()
        part = ScoringJob(
            model=job.model,
            prompts_path=own / "prompts.parquet",
            responses_path=own / "responses.parquet",
            scores_path=own / "scores.parquet",
            cuts_path=None if job.cuts_path is None else own / "cuts.parquet",
        )
        share.prompts.write_parquet(part.prompts_path)
        share.responses.write_parquet(part.responses_path)
        jobs.append(part)
    return jobs


def _environments(common: dict[str, str], processes: int, gpus: int, cores: int) -> list[dict[str, str]]:
    """Every process sees one GPU, or has its share of the cores."""
    if gpus:
        return [{**common, "CUDA_VISIBLE_DEVICES": gpu} for gpu in first_gpus(common, processes)]
    return [{**common, "OMP_NUM_THREADS": str(max(1, cores // processes))}] * processes


@dataclass(kw_only=True)
class _Scorer:
    """A process that scores a share."""

    number: int
    folder: Path
    """Where it leaves the reason of a failure."""
    process: Popen[str]
    lines: "queue.Queue[str | None]"
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=TAIL_LINES))

    def new_lines(self) -> Iterator[str]:
        """What it has printed since."""
        while not self.lines.empty():
            line = self.lines.get()
            if line is None:
                self.process.wait()
                return
            self.tail.append(line)
            yield line

    def has_ended(self) -> bool:
        """Whether it has, and all it printed was passed on.

        Raises:
            CharmError: It failed.
        """
        if self.process.returncode is None:
            return False
        if self.process.returncode != 0:
            raise self.failure()
        return True

    def failure(self) -> CharmError:
        """Why it failed."""
        return worker_failure([self.process.returncode], self.folder, self.tail)


class _Progress:
    """Adds up how far the processes are."""

    def __init__(self, shares: Sequence[ScoringJob], on_progress: OnProgress | None) -> None:
        self._on_progress = on_progress
        self._done = [0] * len(shares)
        # until a process has said how many different texts it has
        self._total = [_text_count(share) for share in shares]

    def take(self, number: int, line: str) -> bool:
        """Whether a line of a process says how far it is; tells it then."""
        if self._on_progress is None or not line.startswith(PROGRESS):
            return False
        done, total = line.removeprefix(PROGRESS).split()
        self._done[number], self._total[number] = int(done), int(total)
        self._on_progress(sum(self._done), sum(self._total))
        return True


def _run_together(
    shares: Sequence[ScoringJob],
    environments: Sequence[dict[str, str]],
    folder: Path,
    progress: _Progress,
    log: OnLine | None,
) -> None:
    """Run a process per share, all to their end or none."""
    with ExitStack() as trees:
        running = [
            _start(number, share, environment, folder, trees)
            for number, (share, environment) in enumerate(zip(shares, environments, strict=True))
        ]
        while running:
            time.sleep(POLL_SECONDS)
            for scorer in running:
                for line in scorer.new_lines():
                    if not progress.take(scorer.number, line) and log is not None:
                        log(line)
            running = [scorer for scorer in running if not scorer.has_ended()]


def _start(number: int, share: ScoringJob, environment: dict[str, str], folder: Path, trees: ExitStack) -> _Scorer:
    own = folder / f"launch-{number}"
    own.mkdir()
    launch = own / LAUNCH
    write_text(launch, Launch(scoring=share, parent=identify(os.getpid())).model_dump_json())
    process = trees.enter_context(process_tree([sys.executable, "-m", WORKER, str(launch)], environment))
    return _Scorer(number=number, folder=own, process=process, lines=lines_of(process))


def _merge(job: ScoringJob, shares: Sequence[ScoringJob]) -> None:
    """Put the results of all shares where those of the job belong."""
    scores = validate(pl.concat([pl.read_parquet(share.scores_path) for share in shares]), SCORES)
    if job.cuts_path is not None:
        cuts = [pl.read_parquet(share.cuts_path) for share in shares if share.cuts_path is not None]
        pl.concat(cuts).sort("prompt_id", "policy_model").write_parquet(job.cuts_path)
    summary = merge_summaries([_summary(share) for share in shares], scores)
    write_text(_summary_path(job), summary.model_dump_json(indent=1))
    scores.write_parquet(job.scores_path)


def _summary(job: ScoringJob) -> ScoringSummary:
    return ScoringSummary.model_validate_json(_summary_path(job).read_text())


def _summary_path(job: ScoringJob) -> Path:
    return job.scores_path.with_suffix(".json")
