"""The memory estimate against processes that train: state (weights, gradients, optimiser) and activations, on CPU.

    python -m benchmarks.training_memory

A Qwen3 classifier with random weights takes three steps, in one PyTorch process and in two ZeRO ranks. What a process holds is
its anonymous memory (``RssAnon``), looked at fifty times a second, less what the same training of a tiny model holds. Two
sizes of micro-batch tell the activations apart from the rest.
"""

import argparse
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import polars as pl
import psutil
import torch
from transformers import AutoModelForSequenceClassification, Qwen3Config

from charm_core.reward_model.jobs import TrainingJob
from charm_core.reward_model.memory import MemoryPlan, estimate_memory, model_shape
from charm_core.reward_model.spec import RewardModelSpec, TrainingConfig
from charm_core.reward_model.stored.files import open_model, read_json
from tasks import worker_processes
from tasks.training_launch import run_training
from tests.charm_core.reward_model.tiny import VOCABULARY, chat_tokenizer, pairs_table

SIZES = {"tiny": (32, 64, 2), "large": (1024, 3072, 6)}
"""Width, inner width, layers."""
TOKENS = 1024
SETTINGS: dict[str, dict[str, object]] = {
    "PyTorch, 1 process": {"zero_stage": None},
    "ZeRO-3, 2 ranks": {"zero_stage": 3, "ranks": 2},
    "ZeRO-2, 2 ranks": {"zero_stage": 2, "ranks": 2},
}


def save_model(folder: Path, size: str) -> Path:
    """A random reward model."""
    width, inner, layers = SIZES[size]
    config = Qwen3Config(
        vocab_size=len(VOCABULARY),
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=width // 16,
        num_key_value_heads=width // 32,
        head_dim=16,
        max_position_embeddings=2048,
        num_labels=1,
        pad_token_id=VOCABULARY["<eos>"],
    )
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
    return folder


def save_pairs(path: Path, tokens: int) -> Path:
    """Pairs whose two texts have together about so many tokens: one micro-batch each for two ranks, in three steps."""
    pairs = pairs_table(prompts=6, models=("a", "b"), held_out=0)
    # as long on both sides, so that nothing is padding
    words = " ".join(["w1"] * (tokens // 2 - 40))

    def longer(side: str) -> pl.Expr:
        message = pl.struct(
            role=pl.lit("assistant"), content=pl.concat_str(pl.col(side).list[0].struct["content"], pl.lit(f" {words}"))
        )
        return pl.concat_list(message).alias(side)

    pairs.with_columns(longer("chosen"), longer("rejected")).write_parquet(path)
    return path


def _is_launcher(process: psutil.Process) -> bool:
    return "torch.distributed.run" in process.cmdline()


@contextmanager
def watched() -> Iterator[list[int]]:
    """The most anonymous memory that any one worker held, in bytes: the one element of the list, at the end."""
    most, stop = [0], threading.Event()

    def look() -> None:
        known: dict[int, Path] = {}
        while not stop.wait(0.02 if known else 1.0):  # to find them takes long
            if not known:
                known = {
                    child.pid: Path(f"/proc/{child.pid}/status")
                    for child in psutil.Process().children(recursive=True)
                    if "charm_core.reward_model.worker" in child.cmdline() and not _is_launcher(child)
                }
            for pid, status in list(known.items()):
                try:
                    lines = status.read_text().splitlines()
                    held = next(line for line in lines if line.startswith("RssAnon"))
                except (OSError, StopIteration):  # it has ended
                    del known[pid]
                    continue
                most[0] = max(most[0], int(held.split()[1]) * 1024)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield most
    finally:
        stop.set()
        thread.join()


def measure(model: Path, pairs: Path, work: Path, settings: dict[str, object]) -> int:
    """The most that one rank held by the end of its last step; what comes then is the saving of the model."""
    config = TrainingConfig(
        **settings, pairs_per_step=2, micro_batch_tokens=TOKENS, threads_per_rank=1, learning_rate=1e-6
    )
    job = TrainingJob(
        model=RewardModelSpec(path=str(model), max_length=2048),
        pairs_path=pairs,
        output_dir=work / "model",
        work_dir=work / "progress",
        config=config,
    )
    by_then: list[int] = []
    with watched() as most:
        run_training(job, lambda _: by_then.append(most[0]))
    # the last record is written when its step is over
    return by_then[-1]


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", choices=SETTINGS, action="append", help="only these (default: all)")
    chosen = parser.parse_args().settings or list(SETTINGS)
    # what is freed goes back to the system, so that what is held is what is used
    worker_processes.ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536"}
    print(f"{'':20} {'part':12} {'estimate':>10} {'measured':>10} {'ratio':>6}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = {size: save_model(folder / size, size) for size in SIZES}
        pairs = {tokens: save_pairs(folder / f"{tokens}.parquet", tokens) for tokens in (100, TOKENS)}
        shape = model_shape(open_model(str(models["large"])).tensors, read_json(models["large"] / "config.json") or {})
        if shape is None:
            raise RuntimeError("the model has a shape")
        for setting in chosen:
            stage, ranks = SETTINGS[setting]["zero_stage"], SETTINGS[setting].get("ranks", 1)
            plan = MemoryPlan(zero_stage=stage, ranks=ranks, bfloat16=False, micro_batch_tokens=TOKENS)  # type: ignore[arg-type]
            estimate = estimate_memory(shape, plan)
            held = {
                (size, tokens): measure(
                    models[size], pairs[tokens], folder / f"{setting}-{size}-{tokens}", SETTINGS[setting]
                )
                for size, tokens in (("tiny", 100), ("large", 100), ("large", TOKENS))
            }
            state = held["large", 100] - held["tiny", 100]
            share = (TOKENS - 100) / TOKENS
            for part, expected, found in (
                ("state", estimate.state + estimate.gathered, state - estimate.activations * (1 - share)),
                ("activations", estimate.activations * share, held["large", TOKENS] - held["large", 100]),
            ):
                print(
                    f"{setting:20} {part:12} {expected / 1e6:7.0f} MB {found / 1e6:7.0f} MB {expected / found:6.2f}",
                    flush=True,
                )
        print(f"{shape.parameters / 1e6:.0f} million parameters; loading one: {4 * shape.parameters / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
