"""The gigabytes that the pages about GPUs state are those of the estimate, for the settings that they show."""

import re
import tomllib
from typing import Any

import pytest

from charm_core.reward_model.memory import ModelShape, estimate_memory
from charm_core.reward_model.preflight.facts import Machine
from charm_core.reward_model.preflight.room import plan_of
from charm_core.reward_model.spec import TrainingConfig
from tests.docs.pages import DOCS, blocks

ONE, EIGHT = "calibrate/one-gpu.md", "calibrate/eight-gpus.md"
CARD = 80 * 10**9


def llama(width: int, inner: int, layers: int, keys: int) -> ModelShape:
    """A Llama 3 with a score in place of the vocabulary's logits."""
    square, narrow = (width, width), (keys, width)
    layer = (square, narrow, narrow, square, (inner, width), (inner, width), (width, inner))
    each = sum(rows * columns for rows, columns in layer) + 2 * width
    return ModelShape(
        parameters=layers * each + 128_256 * width + 2 * width, layers=(each,) * layers, linear=(layer,) * layers, head=width,
        width=width, inner_width=inner, gated=True,
    )  # fmt: skip


LLAMAS = {
    "1B": llama(2048, 8192, 16, 512),
    "3B": llama(3072, 8192, 28, 1024),
    "8B": llama(4096, 14336, 32, 1024),
}


def needed(page: str, size: str, gpus: int, **changes: Any) -> int:
    """Gigabytes of one GPU with the settings file of a page."""
    (shown,) = [block for block in blocks(page, "toml") if block.title.startswith("calibrate")]
    training = TrainingConfig(**(tomllib.loads(shown.text)["training"] | changes))
    machine = Machine(gpus=gpus, gpu_bytes=CARD, memory_bytes=CARD, cores=8)
    return round(estimate_memory(LLAMAS[size], plan_of(training, machine)).peak / 1e9)


def row(page: str, start: str) -> list[int]:
    """The gigabytes in the row of a table that begins like this."""
    (found,) = [
        line for line in (DOCS / page).read_text(encoding="utf-8").splitlines() if line.startswith(f"| {start}")
    ]
    return [int(number) for number in re.findall(r"(\d+) GB(?= \|| without it \|)", found)]


@pytest.mark.parametrize(
    ("start", "changes"),
    [
        ("as above: `gradient_checkpointing`", {}),
        ("`gradient_checkpointing`, 32,768", {"micro_batch_tokens": 32768}),
        ("without `gradient_checkpointing`, 16,384", {"gradient_checkpointing": False}),
        ("without `gradient_checkpointing`, 4,096", {"gradient_checkpointing": False, "micro_batch_tokens": 4096}),
    ],
)
def test_on_several_gpus(start: str, changes: dict[str, Any]):
    assert row(EIGHT, start) == [needed(EIGHT, "8B", gpus, **changes) for gpus in (8, 4)]


@pytest.mark.parametrize(
    ("start", "changes"),
    [
        ("`training.lora_rank = 16`", {"lora_rank": 16}),
        ("`training.trainable_layers = 8`", {"trainable_layers": 8}),
        ("a LoRA adapter", {}),
        ('`training.offload = "cpu"`', {"offload": "cpu"}),
        ("`training.gradient_checkpointing = true`", {"gradient_checkpointing": False}),
        ("`training.micro_batch_tokens = 4096`", {"micro_batch_tokens": 4096}),
    ],
)
def test_on_one_gpu(start: str, changes: dict[str, Any]):
    assert row(ONE, start) == [needed(ONE, "8B", 1, **changes)]


def test_what_is_stated_in_sentences():
    text = " ".join((DOCS / ONE).read_text(encoding="utf-8").split())
    small, middle, large = (needed(ONE, size, 1) for size in LLAMAS)
    plain = needed(ONE, "3B", 1, zero_stage=None)
    assert (
        f"the estimate is {small} GB for Llama-3.2-1B, {middle} GB for Llama-3.2-3B ({plain} GB without DeepSpeed), and {large} GB for "
        "Llama-3.1-8B (7.5 B parameters)" in text
    )
    assert f"an 8 B model needs {needed(EIGHT, '8B', 8, gradient_checkpointing=False)} GB a GPU" in (
        DOCS / EIGHT
    ).read_text(encoding="utf-8")


def test_what_the_page_shows_for_eight_gpus_fits_80_gb():
    room = round((0.9 * CARD - 1e9) / 1e9)
    assert needed(EIGHT, "8B", 8) <= room
    assert all(f"counts on {room} GB" in (DOCS / page).read_text(encoding="utf-8") for page in (ONE, EIGHT))
