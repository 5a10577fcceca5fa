"""Fine-tuning a reward model, beside TRL's RewardTrainer and beside a script on transformers' Trainer.

    python -m benchmarks.training [--model encoder decoder] [--pairs disjoint all] [--repeat 2]

Same model, pairs in the same steps, precision, optimiser (AdamW at a constant rate, clipped), threads and environment; one process after
the other, on one GPU where there are GPUs (``ranks``: as many under ZeRO-3 as there are GPUs, or two, which share out the threads). TRL's
own default is to checkpoint gradients (``RewardConfig``: on, and bfloat16); here no way does, or with ``--gradient-checkpointing`` every
way. The loss of step 1 must be the same to 1e-4 in float32, else nothing is printed; ``apart`` is the largest difference from TRL's loss
in any step.

``disjoint``: two policy models per prompt, one pair. ``all``: each of ``--policy-models`` with each. Responses are those of
``--shared``/data, drawn with a seed, cut to ``--max-length`` tokens; without that folder, words without sense, as many as real texts have
tokens. Tokens per second count both texts of every pair, without padding, for all alike; step 1 warms up and is not timed. ``× TRL`` is
the speed beside TRL with the first of ``--trl-pairs``, which is what it does by default: 8 pairs a pass; ``× best`` that beside the
fastest of those that are not ours. A way that runs out of GPU memory is given as such, and where that is TRL with the first of
``--trl-pairs``, the next that fits takes its place, as is then said. On a busy machine only CPU seconds say something, and best those of
one thread (``--threads 1``). Memory is the largest sum of resident memory over all processes of a training, on GPUs what it holds on all
that it uses. MFU: arithmetic that the model needs for the tokens that went through it, without padding and recomputation, beside what the
GPUs that it uses are said to do in bfloat16; on CPU it is given in Gflop/s. Others compute both texts of every pair; ours computes a
response once, however many pairs it is in, and in packed rows of a decoder what responses to a prompt begin with once.

On a GPU: ``--model 8b --layers 8 --dtype bfloat16 --max-length 2048 --pairs-per-step 48 --trl-pairs 8 4 1``. By the formulas of
``charm_core.reward_model.memory``, weights in float32, gradients, Adam's moments and bfloat16 copies of 8 layers are 40 GB (of all 32, 134
GB, which fit on no one GPU of 80 GB), and a token of a pass 2.1 MB. Of 80 GB that leaves room for about 18,000 tokens a pass, padding
included: 4 pairs of 2048 tokens or 8 of 1024, and ours with its 8192 (under ZeRO-3 on one GPU 66 GB). 8 pairs of 2048 tokens would take
109 GB, or 53 GB with ``--gradient-checkpointing``.
"""

import argparse
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import polars as pl
import torch

from benchmarks.process_usage import PeakMemory, cpu_seconds
from benchmarks.training_inputs import (
    RESPONSES,
    Step,
    Work,
    build_model,
    drawn_pairs,
    made_up_responses,
    pair_lengths,
    planned_steps,
    real_responses,
    work_of,
)
from benchmarks.training_peers import Course, PeerJob
from charm_core.errors import TrainingError
from charm_core.reward_model.jobs import CurveRecord, TrainingJob
from charm_core.reward_model.spec import RewardModelSpec, TrainingConfig
from flows.settings import CHECKOUT
from tasks.training_launch import run_training
from tasks.worker_processes import rank_count, run_worker, worker_environment

SAME_LOSS = 1e-4
BFLOAT16_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}
"""Dense, as their maker says."""
OUT_OF_MEMORY = re.compile(
    r"OutOfMemoryError|CUDA (error: )?out of memory|Cuda failure.*out of memory|CUBLAS_STATUS_ALLOC_FAILED",
    re.IGNORECASE,
)
"""How PyTorch, NCCL and cuBLAS say that it is the GPU's; a process that the system ends for want of memory says nothing."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to train."""

    train: Callable[[], Course]
    whose: Literal["TRL", "script", "ours"]
    gpus: int = 1
    """How many of the first ones it uses, where there are GPUs."""


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
    def total(self) -> float:
        """Seconds of all of them."""
        return sum(self.seconds)

    @property
    def cpu_seconds(self) -> float:
        """Of all steps but the first."""
        return self.course.cpu[-1] - self.course.cpu[0]


def ours(model: RewardModelSpec, pairs: Path, config: TrainingConfig) -> Course:
    """Train as the pipeline does."""
    course = Course(losses=[], ends=[], cpu=[])
    lines: list[str] = []

    def note(record: CurveRecord) -> None:
        course.losses.append(record["loss"])
        course.ends.append(time.perf_counter())
        course.cpu.append(cpu_seconds())

    with TemporaryDirectory() as folder:
        work, output = Path(folder, "work"), Path(folder, "model")
        job = TrainingJob(model=model, pairs_path=pairs, output_dir=output, work_dir=work, config=config)
        run_training(job, note, lines.append)
    return course.model_copy(update={"packed": is_packed(lines)})


def is_packed(lines: Sequence[str]) -> bool:
    """Whether a training's log says that texts go through the model in packed rows."""
    said = next((line for line in lines if "texts are packed" in line or "texts are padded" in line), None)
    if said is None:
        raise SystemExit("the log of our training does not say whether texts are packed or padded")
    return "texts are packed" in said


def peer(
    name: str,
    model: RewardModelSpec,
    steps: Sequence[Step],
    config: TrainingConfig,
    *,
    micro_batch_pairs: int,
) -> Course:
    """Train as others do, started as our workers are: in their environment, and on one GPU if there are several."""
    with TemporaryDirectory() as folder:
        file = Path(folder, "job.json")
        job = PeerJob(
            peer=name,
            model_dir=Path(model.path),
            work_dir=Path(folder, "work"),
            steps=[step.pairs for step in steps],
            micro_batch_pairs=micro_batch_pairs,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            bfloat16=config.dtype == "bfloat16",
            gradient_checkpointing=config.gradient_checkpointing,
        )
        file.write_text(job.model_dump_json())
        command = [sys.executable, "-m", "benchmarks.training_peers", str(file)]
        run_worker(command, worker_environment(config), Path(folder), None, lambda: None, gpus=1)
        return Course.model_validate_json(file.with_suffix(".course.json").read_text())


def timed(way: Way) -> Timed | None:
    """Run a training and watch its memory; None: it ran out of GPU memory."""
    try:
        with PeakMemory(way.gpus) as memory:
            course = way.train()
    except TrainingError as error:
        if OUT_OF_MEMORY.search(str(error)):
            return None
        raise
    return Timed(course=course, peak_bytes=memory.most)


def in_turn(ways: dict[str, Way], repeat: int) -> dict[str, list[Timed]]:
    """Each way so often; one that runs out of GPU memory has no timings and is not tried again."""
    runs: dict[str, list[Timed]] = {name: [] for name in ways}
    left = dict(ways)
    for _ in range(repeat):
        for name, way in list(left.items()):
            found = timed(way)
            if found is None:
                del left[name]
                runs[name].clear()
                print(f"  {name}: out of memory", file=sys.stderr)
                continue
            runs[name].append(found)
            print(f"  {name}: steps of {', '.join(f'{seconds:.2f}' for seconds in found.seconds)} s", file=sys.stderr)
    return runs


def check_same_loss(runs: dict[str, list[Timed]], *, exact: bool) -> None:
    """End the benchmark unless all began with the same loss: what is not the same training is not compared."""
    first = {name: timings[0].course.losses[0] for name, timings in runs.items() if timings}
    if exact and first and max(first.values()) - min(first.values()) > SAME_LOSS:
        raise SystemExit(f"the losses of step 1 differ, so these are not the same training: {first}")


def operations(way: Way, course: Course, steps: Sequence[Step], work: Work) -> float:
    """Arithmetic that the model needs for what goes through it in these steps, without padding and recomputation."""
    if way.whose != "ours":
        return sum(work.operations(pair_lengths(step.pairs)) for step in steps)
    whole = sum(work.operations(step.texts) for step in steps)
    if work.looks_ahead or not course.packed:
        return whole
    return whole - sum(work.operations(step.repeated) for step in steps)


def print_table(
    title: str, ways: dict[str, Way], runs: dict[str, list[Timed]], steps: Sequence[Step], work: Work
) -> None:
    """One line per way to train.

    Args:
        title: What is trained.
        ways: The first is TRL's as it comes.
        runs: The repetitions of each way; none: it ran out of memory.
        steps: What all were fed.
        work: Of the model.
    """
    lengths = [pair_lengths(step.pairs) for step in steps[1:]]
    tokens, texts = sum(map(sum, lengths)), sum(map(len, lengths))
    print(f"\n{title}: {tokens:,} tokens in {len(lengths)} timed steps, {tokens / texts:.0f} a text")
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
    fastest = {name: min(timings, key=lambda run: run.total) for name, timings in runs.items() if timings}
    others = [name for name in fastest if ways[name].whose != "ours"]
    trl = next((name for name in others if ways[name].whose == "TRL"), None)
    best_other = min((fastest[name].total for name in others), default=None)
    for name, way in ways.items():
        if name not in fastest:
            print(f"{name:34}  out of memory")
            continue
        best, timings = fastest[name], runs[name]
        count, losses = len(best.seconds), best.course.losses
        # of the first that ran: TRL's, if any did
        reference = next(each for each in runs.values() if each)[0].course.losses
        cells = [
            f"{tokens / best.total:,.0f}",
            f"{tokens / max(run.total for run in timings):,.0f}",
            _times(None if trl is None else fastest[trl].total, best.total),
            _times(best_other, best.total),
            f"{best.total / count:.2f}",
            f"{min(best.seconds):.2f}-{max(best.seconds):.2f}",
            f"{best.cpu_seconds / count:.2f}",
            _times(None if trl is None else min(run.cpu_seconds for run in runs[trl]), best.cpu_seconds),
            f"{max(run.peak_bytes for run in timings) / 2**20:,.0f}",
            _arithmetic(operations(way, best.course, steps[1:], work) / best.total, way.gpus),
            f"{losses[0]:.5f}",
            f"{losses[-1]:.5f}",
            f"{max(abs(one - other) for one, other in zip(losses, reference, strict=True)):.1e}",
        ]
        print(_row(name, cells))
    _say_beside_what(next(iter(ways)), trl)


def _say_beside_what(as_it_comes: str, trl: str | None) -> None:
    if trl is None:
        print(f"{as_it_comes}: out of memory, as is every way of TRL; apart: from the first way that is not")
    elif trl != as_it_comes:
        print(f"{as_it_comes}: out of memory; × TRL, CPU × TRL and apart are beside {trl}")


def _times(reference: float | None, seconds: float) -> str:
    return "–" if reference is None else f"{reference / seconds:.2f}"


def _row(name: str, cells: Sequence[str]) -> str:
    widths = (9, 9, 7, 8, 8, 13, 11, 11, 10, 9, 9, 9, 9)
    return f"{name:34}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))


def _peak_flops() -> float | None:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((1e12 * rate for key, rate in BFLOAT16_TFLOPS.items() if key in name), None)


def _arithmetic_name() -> str:
    return "MFU" if _peak_flops() else "Gflop/s"


def _arithmetic(flops: float, gpus: int) -> str:
    peak = _peak_flops()
    return f"{flops / (peak * gpus):.1%}" if peak else f"{flops / 1e9:.0f}"


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
    for count in (*arguments.trl_pairs, *arguments.script_pairs):
        if arguments.pairs_per_step % count:
            raise SystemExit(f"--pairs-per-step must be a multiple of the pairs a pass, {count}")
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
    steps = planned_steps(pairs, spec, plain)
    ways = planned_ways(spec, pairs_file, steps, plain, arguments)
    runs = in_turn(ways, arguments.repeat)
    check_same_loss(runs, exact=arguments.dtype == "float32")
    print_table(f"{name}, {kind} pairs of {models} policy models", ways, runs, steps, work_of(model_dir))


def planned_ways(
    spec: RewardModelSpec, pairs: Path, steps: Sequence[Step], plain: TrainingConfig, arguments: argparse.Namespace
) -> dict[str, Way]:
    """What is compared: TRL as it comes first, then the other ways of others, then ours."""
    trl, script = (partial(peer, name, spec, steps, plain) for name in ("trl", "script"))
    ways = {
        f"TRL, {count} pairs a pass": Way(train=partial(trl, micro_batch_pairs=count), whose="TRL")
        for count in arguments.trl_pairs
    }
    ways |= {
        f"Trainer script, {count} pairs a pass": Way(train=partial(script, micro_batch_pairs=count), whose="script")
        for count in arguments.script_pairs
    }
    ways["ours"] = Way(train=partial(ours, spec, pairs, plain), whose="ours")
    zero = plain.model_copy(update={"zero_stage": 3})
    ranks = rank_count(zero)
    zero = zero.model_copy(update={"threads_per_rank": max(1, arguments.threads // ranks)})
    label = f"ours, ZeRO-3, {ranks} {'rank' if ranks == 1 else 'ranks'}"
    return ways | {label: Way(train=partial(ours, spec, pairs, zero), whose="ours", gpus=ranks)}


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
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="of the only rank; several share them out"
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
