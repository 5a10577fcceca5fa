"""Fine-tuning a reward model, beside TRL's RewardTrainer and beside a script on transformers' Trainer.

    python -m benchmarks.training [--model encoder decoder] [--pairs disjoint all] [--repeat 2]

Same model, pairs in the same steps, precision, optimiser (AdamW at a constant rate, clipped), threads and allocator settings; one process
(``2 ranks``: two under ZeRO-3, of half the threads each) after the other. The loss of step 1 must be the same to 1e-4 in float32, else
nothing is printed; ``apart`` is the largest difference from TRL's loss in any step.

``disjoint``: two policy models per prompt, one pair. ``all``: each of ``--policy-models`` with each. Responses are those of
``--shared``/data, drawn with a seed, cut to ``--max-length`` tokens; without that folder, words without sense, as many as real texts have
tokens. Tokens per second count both texts of every pair, without padding, for all alike; step 1 warms up and is not timed. ``× TRL`` is the
speed beside TRL with the first of ``--trl-pairs``, which is what it does by default: 8 pairs a pass; ``× best`` that beside the fastest of
those that are not ours. On a busy machine only CPU seconds say something, and best those of one thread (``--threads 1``). Memory is the
largest sum of resident memory over all processes of a training, on a GPU what it holds there. MFU: arithmetic that the model needs for the
tokens that went through it, without padding and recomputation, beside what the GPU is said to do in bfloat16; on CPU it is given in
Gflop/s.

On a GPU: ``--model 8b --layers 8 --dtype bfloat16 --max-length 2048 --pairs-per-step 48`` (float32 master weights and Adam moments of all
32 layers do not fit on one).
"""

import argparse
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import polars as pl
import psutil
import torch

from benchmarks.training_inputs import (
    RESPONSES,
    Pair,
    Work,
    build_model,
    drawn_pairs,
    made_up_responses,
    pair_lengths,
    planned_batches,
    real_responses,
    work_of,
)
from benchmarks.training_peers import Course, PeerJob
from charm_core.reward_model.jobs import CurveRecord, TrainingJob
from charm_core.reward_model.spec import RewardModelSpec, TrainingConfig
from flows.settings import CHECKOUT
from tasks.training_launch import run_training
from tasks.worker_processes import ALLOCATOR

SAME_LOSS = 1e-4
SAMPLE_SECONDS = 0.05
BFLOAT16_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}
"""Dense, as their maker says."""


@dataclass(frozen=True, kw_only=True)
class Timed:
    """One training."""

    course: Course
    peak_bytes: int

    @property
    def seconds(self) -> list[float]:
        """Of every step but the first."""
        return [after - before for before, after in pairwise(self.course.ends)]

    @property
    def cpu_seconds(self) -> float:
        """Of all steps but the first."""
        return self.course.cpu[-1] - self.course.cpu[0]


class PeakMemory:
    """The most memory that the processes below this one hold together while it is open."""

    def __init__(self) -> None:
        self.most = 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._before = _gpu_bytes()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._closed.wait(SAMPLE_SECONDS):
            now = _gpu_bytes() - self._before if torch.cuda.is_available() else _resident_bytes()
            self.most = max(self.most, now)


def _gpu_bytes() -> int:
    if not torch.cuda.is_available():
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free


def _resident_bytes() -> int:
    return sum(_of_children(lambda process: process.memory_info().rss))


def _cpu_seconds() -> float:
    times = _of_children(psutil.Process.cpu_times)
    return sum(each.user + each.system for each in times)


def _of_children(ask: Callable[[psutil.Process], Any]) -> Iterator[Any]:
    """What the processes below this one answer, those that end meanwhile left out."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            yield ask(process)


def ours(model: RewardModelSpec, pairs: Path, config: TrainingConfig) -> Course:
    """Train as the pipeline does."""
    course = Course(losses=[], ends=[], cpu=[], tokens=[])

    def note(record: CurveRecord) -> None:
        course.losses.append(record["loss"])
        course.ends.append(time.perf_counter())
        course.cpu.append(_cpu_seconds())
        course.tokens.append(record["tokens"])

    with TemporaryDirectory() as folder:
        work, output = Path(folder, "work"), Path(folder, "model")
        run_training(TrainingJob(model=model, pairs_path=pairs, output_dir=output, work_dir=work, config=config), note)
    return course


def peer(
    name: str,
    model: RewardModelSpec,
    steps: Sequence[Sequence[Pair]],
    config: TrainingConfig,
    *,
    micro_batch_pairs: int,
    threads: int,
) -> Course:
    """Train as others do, in the environment that our workers get."""
    with TemporaryDirectory() as folder:
        file = Path(folder, "job.json")
        job = PeerJob(
            peer=name,
            model_dir=Path(model.path),
            work_dir=Path(folder, "work"),
            steps=steps,
            micro_batch_pairs=micro_batch_pairs,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            bfloat16=config.dtype == "bfloat16",
            gradient_checkpointing=config.gradient_checkpointing,
        )
        file.write_text(job.model_dump_json())
        environment = {
            **os.environ,
            **({} if torch.cuda.is_available() else ALLOCATOR),
            "OMP_NUM_THREADS": str(threads),
            "TOKENIZERS_PARALLELISM": "false",
        }
        command = [sys.executable, "-m", "benchmarks.training_peers", str(file)]
        done = subprocess.run(command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
        return Course.model_validate_json(file.with_suffix(".course.json").read_text())


def timed(train: Callable[[], Course]) -> Timed:
    """Run a training and watch its memory."""
    with PeakMemory() as memory:
        course = train()
    return Timed(course=course, peak_bytes=memory.most)


def check_same_loss(runs: dict[str, list[Timed]], *, exact: bool) -> None:
    """End the benchmark unless all began with the same loss: what is not the same training is not compared."""
    first = {name: timings[0].course.losses[0] for name, timings in runs.items()}
    if exact and max(first.values()) - min(first.values()) > SAME_LOSS:
        raise SystemExit(f"the losses of step 1 differ, so these are not the same training: {first}")


def print_table(
    title: str, runs: dict[str, list[Timed]], steps: Sequence[Sequence[Pair]], work: Work, ours_at: int
) -> None:
    """One line per way to train.

    Args:
        title: What is trained.
        runs: The repetitions of each way; the first is TRL's as it comes, those from ``ours_at`` on are ours.
        steps: What all were fed.
        work: Of the model.
        ours_at: How many ways are not ours.
    """
    lengths = [pair_lengths(step) for step in steps]
    tokens = sum(sum(step) for step in lengths[1:])
    speeds = {name: sorted(tokens / sum(run.seconds) for run in timings) for name, timings in runs.items()}
    others = list(runs)[:ours_at]
    as_it_comes, best_other = others[0], max(others, key=lambda name: speeds[name][-1])
    reference = runs[as_it_comes][0].course.losses
    cpu = min(run.cpu_seconds for run in runs[as_it_comes])
    per_token = work.per_token([length for step in lengths for length in step])
    texts = sum(len(step) for step in lengths[1:])
    print(f"\n{title}: {tokens:,} tokens in {len(lengths) - 1} timed steps, {tokens / texts:.0f} a text")
    columns = [
        "tokens/s",
        "slowest",
        "× TRL",
        "× best",
        "s/step",
        "from-to",
        "CPU s/step",
        "CPU × TRL",
        "peak, MB",
        _arithmetic_name(),
    ]
    print(_row("", [*columns, "loss 1", "loss n", "apart"]))
    for name, timings in runs.items():
        best = min(timings, key=lambda run: sum(run.seconds))
        seconds, count, losses = sum(best.seconds), len(best.seconds), best.course.losses
        cells = [
            f"{speeds[name][-1]:,.0f}",
            f"{speeds[name][0]:,.0f}",
            f"{speeds[name][-1] / speeds[as_it_comes][-1]:.2f}",
            f"{speeds[name][-1] / speeds[best_other][-1]:.2f}",
            f"{seconds / count:.2f}",
            f"{min(best.seconds):.2f}-{max(best.seconds):.2f}",
            f"{best.cpu_seconds / count:.2f}",
            f"{cpu / best.cpu_seconds:.2f}",
            f"{max(run.peak_bytes for run in timings) / 2**20:,.0f}",
            _arithmetic(sum(best.course.tokens[1:]) * per_token / seconds),
            f"{losses[0]:.5f}",
            f"{losses[-1]:.5f}",
            f"{max(abs(one - other) for one, other in zip(losses, reference, strict=True)):.1e}",
        ]
        print(_row(name, cells))


def _row(name: str, cells: Sequence[str]) -> str:
    widths = (9, 9, 7, 8, 8, 13, 11, 11, 10, 9, 9, 9, 9)
    return f"{name:34}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))


def _peak_flops() -> float | None:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((1e12 * rate for key, rate in BFLOAT16_TFLOPS.items() if key in name), None)


def _arithmetic_name() -> str:
    return "MFU" if _peak_flops() else "Gflop/s"


def _arithmetic(flops: float) -> str:
    peak = _peak_flops()
    return f"{flops / peak:.1%}" if peak else f"{flops / 1e9:.0f}"


def machine() -> str:
    """What this runs on."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    names = [row.split(":")[1].strip() for row in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in row]
    return f"{len(os.sched_getaffinity(0))} cores of {names[0] if names else 'a CPU'}, torch {torch.__version__}"


def compare(name: str, kind: str, arguments: argparse.Namespace, folder: Path) -> None:
    """All ways on one model and one kind of pairs."""
    model_dir, pairs_file = folder / name, folder / f"{kind}.parquet"
    if not model_dir.exists():
        build_model(name, model_dir, arguments.shared, layers=arguments.layers, max_length=arguments.max_length)
    models = 2 if kind == "disjoint" else arguments.policy_models
    pairs_per_prompt = models * (models - 1) // 2
    if arguments.pairs_per_step % pairs_per_prompt:
        raise SystemExit(
            f"--pairs-per-step must be a multiple of {pairs_per_prompt}, the pairs of {models} policy models"
        )
    prompts = arguments.steps * arguments.pairs_per_step // pairs_per_prompt
    responses = _responses(arguments, prompts, models)
    pairs = drawn_pairs(responses, prompts=prompts, models=models, seed=arguments.seed)
    pairs.write_parquet(pairs_file)
    spec = RewardModelSpec(path=str(model_dir), max_length=arguments.max_length)
    plain = TrainingConfig(
        learning_rate=1e-5,
        schedule="constant",
        warmup_ratio=0.0,
        pairs_per_step=arguments.pairs_per_step,
        micro_batch_tokens=arguments.micro_batch_tokens,
        dtype=arguments.dtype,
        gradient_checkpointing=arguments.gradient_checkpointing,
        zero_stage=None,
        threads_per_rank=arguments.threads,
        checkpoint_every_steps=10**6,
    )
    zero = plain.model_copy(update={"zero_stage": 3, "threads_per_rank": max(1, arguments.threads // 2)})
    steps = planned_batches(pairs, spec, plain)
    ways: dict[str, Callable[[], Course]] = {}
    for peer_name, label, counts in (
        ("trl", "TRL", arguments.trl_pairs),
        ("script", "Trainer script", arguments.script_pairs),
    ):
        fed = partial(peer, peer_name, spec, steps, plain, threads=arguments.threads)
        ways |= {f"{label}, {count} pairs a pass": partial(fed, micro_batch_pairs=count) for count in counts}
    ours_at = len(ways)
    ways["ours"] = partial(ours, spec, pairs_file, plain)
    ways["ours, ZeRO-3, all GPUs or 2 ranks"] = partial(ours, spec, pairs_file, zero)
    runs: dict[str, list[Timed]] = {way: [] for way in ways}
    for _ in range(arguments.repeat):
        for way, train in ways.items():
            runs[way].append(timed(train))
            print(
                f"  {way}: steps of {', '.join(f'{seconds:.2f}' for seconds in runs[way][-1].seconds)} s",
                file=sys.stderr,
            )
    check_same_loss(runs, exact=arguments.dtype == "float32")
    print_table(f"{name}, {kind} pairs of {models} policy models", runs, steps, work_of(model_dir), ours_at)


def _responses(arguments: argparse.Namespace, prompts: int, models: int) -> pl.DataFrame:
    if (arguments.shared / RESPONSES).exists():
        return real_responses(arguments.shared)
    return made_up_responses(prompts, models, arguments.seed)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=["encoder", "decoder", "8b"], default=["encoder", "decoder"])
    parser.add_argument("--pairs", nargs="+", choices=["disjoint", "all"], default=["disjoint", "all"])
    parser.add_argument("--policy-models", type=int, default=4, help="per prompt, for --pairs all")
    parser.add_argument("--layers", type=int, help="of the model, if not as many as it has")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--pairs-per-step", type=int, default=24)
    parser.add_argument(
        "--trl-pairs", type=int, nargs="+", default=[8, 1], help="pairs a pass; ratios are to the first"
    )
    parser.add_argument("--script-pairs", type=int, nargs="+", default=[1], help="pairs a pass")
    parser.add_argument("--micro-batch-tokens", type=int, default=TrainingConfig().micro_batch_tokens, help="ours")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="of the only rank; of two, half each"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--shared", type=Path, default=CHECKOUT.parent / "shared", help="folder of the real responses")
    arguments = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)
    real = (arguments.shared / RESPONSES).exists()
    print(f"{machine()}; {arguments.dtype}; best of {arguments.repeat}; {arguments.pairs_per_step} pairs a step")
    print(
        "real responses" if real else f"no {arguments.shared / RESPONSES}: made-up texts with the lengths of real ones"
    )
    with TemporaryDirectory() as folder:
        for name in arguments.model:
            for kind in arguments.pairs:
                compare(name, kind, arguments, Path(folder))


if __name__ == "__main__":
    main()
