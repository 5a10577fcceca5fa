"""Scoring responses with a reward model, beside the ways that others do it.

    python -m benchmarks.scoring [--model encoder decoder] [--texts 300] [--policy-models 1 4 7] [--repeat 3]

Ways, each with the same texts and weights, in processes of their own in the environment of CHARM's workers; one process sees one GPU:

one at a time     as the public CHARM scripts do: tokenise, score, next
32 as they come   padded batches in the order of the table
pipeline, 32      transformers' text-classification pipeline, which is what most scripts call
sorted            ours, padded, with ``batching="padded"``
packed            ours, without padding; every text by itself
shared            ours, as it is by default: what responses to a prompt share is computed once
n processes       the same, shared out to as many processes as there are GPUs or cores

Responses are those of ``--shared``/data, one prompt's to ``--policy-models`` policy models, prompts with ``--long-prompts`` only from the
longer half; without that folder, words without sense, as many as real texts have tokens. The time is that of tokenising and scoring, not
of loading. Tokens per second count every text without padding, for all alike. Scores must agree with those of one at a time, or nothing
is printed; ``apart`` is the largest difference. Ways take turns ``--repeat`` times; the table has the median and, as the spread, the
largest ratio of two times of one way. Memory is the largest resident memory of a process, on a GPU what PyTorch held there. The
arithmetic is that of the tokens computed, as if in every layer; on GPUs it is given as a share of what a product of two large bfloat16
matrices reaches on as many of them.

On a GPU: ``--model 8b --max-length 4096``.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import polars as pl
import torch
from pydantic import BaseModel

from benchmarks.training_inputs import (
    RESPONSES,
    SHORTER_RESPONSES,
    build_model,
    made_up_responses,
    real_responses,
    shorter_responses,
    work_of,
)
from charm_core.reward_model.loading import RewardModel, load_reward_model
from charm_core.reward_model.pretrained import fit_to_model, load_config, load_tokenizer
from charm_core.reward_model.rendering import Rendered, render
from charm_core.reward_model.spec import RewardModelSpec
from charm_core.reward_model.stored.kinds import open_files
from charm_core.reward_model.text_scoring import choose_batching, run_texts
from charm_core.reward_model.worker import cores
from flows.settings import CHECKOUT
from tasks.worker_processes import first_gpus, local_gpu_count, worker_environment

AGREE = {"float32": 1e-4, "bfloat16": 0.25}
WAIT = 0.02
MATRIX = 8192


class Part(BaseModel):
    """What one process scores."""

    way: str
    spec: RewardModelSpec
    table: Path
    """prompt_id, prompt, model, response."""
    part: int
    parts: int
    folder: Path
    """Where processes tell each other that they are ready."""


class Took(BaseModel):
    """What it took."""

    start: float
    end: float
    peak_bytes: int
    computed_tokens: int
    rows: list[int]
    scores: list[float]


def peers_batches(model: RewardModel, rows: Sequence[tuple[str, str]], size: int) -> tuple[list[float], int]:
    """Padded batches in the given order, as scripts write them."""
    scores: list[float] = []
    computed = 0
    for start in range(0, len(rows), size):
        texts = [rendered(model, row) for row in rows[start : start + size]]
        padded = [{"input_ids": list(text.input_ids)} for text in texts]
        if texts[0].token_type_ids is not None:
            for inputs, text in zip(padded, texts, strict=True):
                inputs["token_type_ids"] = list(text.token_type_ids or ())
        batch = model.tokenizer.pad(padded, return_tensors="pt").to(model.device)
        computed += batch["input_ids"].numel()
        with torch.inference_mode():
            scores.extend(classifier_of(model)(**batch).logits[:, 0].float().tolist())
    return scores, computed


def pipelined(model: RewardModel, rows: Sequence[tuple[str, str]]) -> tuple[list[float], int]:
    """The pipeline of transformers, which pads and batches by itself; only its tokenising is ours, so that all score the same tokens."""
    from transformers import TextClassificationPipeline

    lengths: list[int] = []

    class Pipeline(TextClassificationPipeline):
        def preprocess(self, inputs: dict[str, str], **_: Any) -> Any:
            text = rendered(model, (inputs["text"], inputs["text_pair"]))
            lengths.append(len(text.input_ids))
            types = {} if text.token_type_ids is None else {"token_type_ids": torch.tensor([text.token_type_ids])}
            ids = torch.tensor([text.input_ids])
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **types}

    classify = Pipeline(model=classifier_of(model), tokenizer=model.tokenizer, device=model.device, batch_size=32)
    inputs = [{"text": prompt, "text_pair": response} for prompt, response in rows]
    found = classify((one for one in inputs), function_to_apply="none")
    scores = [float((one[0] if isinstance(one, list) else one)["score"]) for one in found]
    computed = sum(
        len(lengths[start : start + 32]) * max(lengths[start : start + 32]) for start in range(0, len(lengths), 32)
    )
    return scores, computed


def ours(model: RewardModel, rows: Sequence[tuple[str, str]], *, share: bool) -> tuple[list[float], int]:
    """As the pipeline does."""
    texts = [rendered(model, row) for row in rows]
    result = run_texts(model, texts, [prompt for prompt, _ in rows] if share else None)
    return result.values, result.computed_tokens


def rendered(model: RewardModel, row: tuple[str, str]) -> Rendered:
    """Prompt and response as tokens: the same ones for every way."""
    return render(model.tokenizer, [{"role": "user", "content": row[0]}], row[1], model.spec)


def classifier_of(model: RewardModel) -> Any:
    """What transformers loaded."""
    return model.network.classifier


WAYS: dict[str, Callable[[RewardModel, Sequence[tuple[str, str]]], tuple[list[float], int]]] = {
    "one at a time": lambda model, rows: peers_batches(model, rows, 1),
    "32 as they come": lambda model, rows: peers_batches(model, rows, 32),
    "pipeline, 32": pipelined,
    "sorted": lambda model, rows: ours(model, rows, share=False),
    "packed": lambda model, rows: ours(model, rows, share=False),
    "shared": lambda model, rows: ours(model, rows, share=True),
}
REFERENCE = "one at a time"
OURS = ("packed", "shared")


def worker(file: Path) -> None:
    """Score one part, when all parts are ready."""
    part = Part.model_validate_json(file.read_text())
    table = pl.read_parquet(part.table).with_row_index("row")
    mine = table.filter(pl.col("prompt_id").rank("dense") % part.parts == part.part)
    rows = list(zip(mine["prompt"].to_list(), mine["response"].to_list(), strict=True))
    model = load_reward_model(part.spec)
    if part.way in OURS:
        some = [rendered(model, row) for row in rows[:8]]
        model, check = choose_batching(model, some, [prompt for prompt, _ in rows[:8]])
        if check.refusal is not None:
            raise SystemExit(f"rows are not packed: {check.refusal}")
    WAYS[part.way](model, rows[:4])  # what is done once is done
    (part.folder / f"ready-{part.part}").touch()
    while len(list(part.folder.glob("ready-*"))) < part.parts:
        time.sleep(WAIT)
    start = time.time()
    scores, computed = WAYS[part.way](model, rows)
    end = time.time()
    held = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    peak = held or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    took = Took(
        start=start, end=end, peak_bytes=peak, computed_tokens=computed, rows=mine["row"].to_list(), scores=scores
    )
    file.with_suffix(".took.json").write_text(took.model_dump_json())


def environments(parts: int) -> list[dict[str, str]]:
    """Of so many processes side by side: that of our workers, where each sees one GPU and has its share of the cores."""
    common = worker_environment(None) | {"OMP_NUM_THREADS": str(max(1, cores() // parts))}
    if not local_gpu_count():
        return [common] * parts
    return [{**common, "CUDA_VISIBLE_DEVICES": gpu} for gpu in first_gpus(common, parts)]


def run(way: str, spec: RewardModelSpec, table: Path, parts: int) -> tuple[float, list[Took]]:
    """Seconds from the first beginning to the last end, and what each process took."""
    padded = {"batching": "padded"} if way == "sorted" else {}
    with TemporaryDirectory(prefix="charm-scoring-benchmark-") as name:
        folder = Path(name)
        files = []
        processes = []
        for number, environment in enumerate(environments(parts)):
            part = Part(
                way=way, spec=spec.model_copy(update=padded), table=table, part=number, parts=parts, folder=folder
            )
            files.append(folder / f"part-{number}.json")
            files[-1].write_text(part.model_dump_json())
            command = [sys.executable, "-m", "benchmarks.scoring", "--worker", str(files[-1])]
            processes.append(
                subprocess.Popen(
                    command, cwd=CHECKOUT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
                )
            )
        for process in processes:
            out, _ = process.communicate()
            if process.returncode:
                raise SystemExit(f"{way} failed:\n{out.decode()[-3000:]}")
        took = [Took.model_validate_json(file.with_suffix(".took.json").read_text()) for file in files]
    return max(one.end for one in took) - min(one.start for one in took), took


def drawn_texts(
    responses: pl.DataFrame, *, prompts: int, policy_models: int, long_prompts: bool, seed: int
) -> pl.DataFrame:
    """Responses of some policy models, drawn anew for each prompt, in the order of the policy models."""
    if long_prompts:
        length = pl.col("prompt").str.len_chars()
        responses = responses.filter(length >= length.median())
    rng = np.random.default_rng(seed)
    by_prompt = responses.group_by("prompt_id", "prompt", maintain_order=True).agg("model", "response")
    enough = by_prompt.filter(pl.col("model").list.n_unique() >= policy_models)
    if enough.height < prompts:
        raise SystemExit(f"{enough.height} prompts have {policy_models} responses, {prompts} are asked for")
    rows = [
        (place, prompt_id, prompt, models[index], texts[index])
        for prompt_id, prompt, models, texts in enough.sample(prompts, seed=seed, shuffle=True).iter_rows()
        for place, index in enumerate(rng.choice(len(models), size=policy_models, replace=False))
    ]
    columns = ["place", "prompt_id", "prompt", "model", "response"]
    # as tables usually come: one policy model after the other
    return pl.DataFrame(rows, schema=columns, orient="row").sort("place", maintain_order=True).drop("place")


def matrix_rate() -> float | None:
    """Operations per second of a product of two large bfloat16 matrices on the GPU."""
    if not torch.cuda.is_available():
        return None
    one, other = (torch.randn(MATRIX, MATRIX, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(20):
        torch.cuda.synchronize()
        start = time.perf_counter()
        one @ other
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2.0 * MATRIX**3 / best


def print_table(
    title: str, runs: dict[str, list[tuple[float, list[Took]]]], lengths: Sequence[int], folder: Path, dtype: str
) -> None:
    """One line per way."""
    tokens = sum(lengths)
    work, rate = work_of(folder), matrix_rate()
    expected = np.empty(len(lengths))
    for one in runs[REFERENCE][0][1]:
        expected[one.rows] = one.scores
    reference = statistics.median(seconds for seconds, _ in runs[REFERENCE])
    print(f"\n{title}: {len(lengths):,} texts, {tokens / len(lengths):.0f} tokens on average, {max(lengths)} at most")
    print(
        f"{'':18}{'s':>8}{'spread':>8}{'texts/s':>9}{'tokens/s':>10}{'ratio':>7}{'padding':>9}{'computed':>10}{'apart':>10}{'GiB':>6}{'arithmetic':>14}"
    )
    for way, taken in runs.items():
        seconds = statistics.median(each for each, _ in taken)
        spread = max(each for each, _ in taken) / min(each for each, _ in taken)
        parts = taken[0][1]
        scores = np.empty(len(lengths))
        for one in parts:
            scores[one.rows] = one.scores
        apart = float(np.abs(scores - expected).max())
        if not apart <= AGREE[dtype] * max(1.0, float(np.abs(expected).max())):
            raise SystemExit(
                f"{way}: scores differ by {apart:.3g} from those of {REFERENCE}, so these are not the same scores"
            )
        computed = sum(one.computed_tokens for one in parts)
        operations = work.per_token(lengths) / 3 * computed / seconds
        arithmetic = f"{operations / 1e9:.0f} Gflop/s" if rate is None else f"{operations / (rate * len(parts)):.0%}"
        memory = sum(one.peak_bytes for one in parts) / 2**30
        print(
            f"{way:18}{seconds:8.1f}{spread:8.2f}{len(lengths) / seconds:9.1f}{tokens / seconds:10.0f}{reference / seconds:6.2f}x"
            f"{max(0.0, 1 - tokens / computed):9.1%}{computed / tokens:10.2f}{apart:10.1g}{memory:6.1f}{arithmetic:>14}",
            flush=True,
        )


def measure(options: argparse.Namespace, name: str, policy_models: int, folder: Path) -> None:
    """One table."""
    shared = Path(options.shared)
    file, read = (SHORTER_RESPONSES, shorter_responses) if options.shorter else (RESPONSES, real_responses)
    real = (shared / file).is_file()
    prompts = max(1, options.texts // policy_models)
    responses = read(shared) if real else made_up_responses(prompts * 2, policy_models, options.seed)
    drawn = drawn_texts(
        responses, prompts=prompts, policy_models=policy_models, long_prompts=options.long_prompts, seed=options.seed
    )
    table = folder / "texts.parquet"
    drawn.write_parquet(table)
    model_folder = folder / name
    if not model_folder.is_dir():
        build_model(name, model_folder, shared, layers=options.layers, max_length=options.max_length)
    dtype = "bfloat16" if name == "8b" else "float32"
    spec = RewardModelSpec(path=str(model_folder), max_length=options.max_length, dtype=dtype)
    rows = list(zip(drawn["prompt"].to_list(), drawn["response"].to_list(), strict=True))
    files = open_files(spec)
    tokenizer = load_tokenizer(files, spec)
    fitted = fit_to_model(spec, load_config(files.backbone, spec), tokenizer)
    lengths = [len(render(tokenizer, [{"role": "user", "content": p}], r, fitted).input_ids) for p, r in rows]
    several = local_gpu_count() or cores()
    ways = {way: (way, 1) for way in WAYS if way in (REFERENCE, *options.ways)}
    if several > 1:
        ways[f"{several} processes"] = ("shared", several)
    runs: dict[str, list[tuple[float, list[Took]]]] = {name: [] for name in ways}
    for turn in range(options.repeat):
        for label, (way, parts) in ways.items():
            runs[label].append(run(way, spec, table, parts))
            print(f"  {turn + 1} of {options.repeat}: {label} {runs[label][-1][0]:.1f} s", file=sys.stderr, flush=True)
    source = "real texts" if real else "made-up texts"
    halves = ", prompts of the longer half" if options.long_prompts else ""
    print_table(f"{name}, {policy_models} policy models, {source}{halves}", runs, lengths, model_folder, dtype)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["encoder", "decoder"], choices=["encoder", "decoder", "8b"])
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--policy-models", type=int, nargs="+", default=[1, 4, 7])
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--layers", type=int, default=None)
    parser.add_argument("--long-prompts", action="store_true")
    parser.add_argument("--shorter", action="store_true", help="responses of small policy models, half as long")
    parser.add_argument("--ways", nargs="+", default=tuple(WAYS), choices=WAYS, help="beside one at a time")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shared", default=str(CHECKOUT.parent / "shared"))
    parser.add_argument("--worker", type=Path, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        worker(options.worker)
        return
    with TemporaryDirectory(prefix="charm-scoring-benchmark-") as name:
        for model in options.model:
            for policy_models in options.policy_models:
                measure(options, model, policy_models, Path(name))


if __name__ == "__main__":
    main()
