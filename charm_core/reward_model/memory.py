"""How much memory a fine-tuning needs, known from the shapes of the stored tensors before anything is loaded. No torch.

Per rank, with P parameters of which T are trained, N ranks, and everything in float32 (4 bytes) but where it says otherwise:

================= ====================================== ============ ================ ==============================
part              plain PyTorch, ZeRO-0                  ZeRO-1       ZeRO-2           ZeRO-3
================= ====================================== ============ ================ ==============================
weights           4 P                                    4 P          4 P              4 P / N
gradients         4 T                                    4 T + bucket 4 T / N + bucket 4 T / N + bucket
master weights    none: the weights are                  4 T / N      4 T / N          4 T / N
Adam's moments    8 T                                    8 T / N      8 T / N          8 T / N
gathered          none                                   none         none             4 min(P, 10⁹), its weights at work
lower copies      bfloat16: 2 bytes per weight of a linear layer, kept from the forward to the backward pass, on every rank
activations       tokens · layers · (11 width + 4 or 2 inner width) · 4 bytes; in bfloat16 tokens · layers · (36 width + 8 or 4 inner width)
================= ====================================== ============ ================ ==============================

A layer keeps for its backward pass: both norms' input, scaled and output (6 widths), queries, keys and values as attention reads them, its
output and what is projected (5 widths), and of the feed-forward part the inner layer before and after its activation, with a gate also the
gate's product and its other factor (4 inner widths, without a gate 2). In bfloat16 the norms stay float32 and what they give is kept in
both; 36 bytes a width is what PyTorch was seen to save for layers of Llama on a CPU (two shapes; 32.8 kB a token at width 512). With
gradient checkpointing only one layer does, and the others keep their input: 4 bytes · width · tokens. Frozen layers below the trained ones
keep nothing; with LoRA all layers work as if they were trained.

A bucket is twice 50 million parameters at most: gradients that wait to be added up over the ranks, and where they are. Off-loading takes
master weights and moments (ZeRO-2, 3), gradients with them, and the resting weights (ZeRO-3) from the GPU. Before training every rank
holds the whole model, 4 P, on its device.

Measured on CPU with 50 million parameters: 849 MB in one process (estimate 844), 1140 MB on each of two ZeRO-3 ranks (estimate 1143);
``benchmarks/training_memory.py``. Not on GPUs.

Not counted: what the allocator leaves unused, the CUDA context and libraries (about 1 GB), attention other than sdpa or flash (which
keep no tokens × tokens), norms of queries and keys (3 widths more, in Qwen3), a prompt whose texts are more tokens than
``micro_batch_tokens``, and the end, when rank 0 puts the saved model together in main memory (8 bytes per parameter).
"""

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from charm_core.reward_model.stored.files import StoredTensor

BUCKET = 50_000_000
"""Parameters that DeepSpeed reduces at a time; see ``engines.deepspeed_config``."""
MOST_GATHERED = 1_000_000_000
"""Parameters that ZeRO-3 leaves gathered, by DeepSpeed's default."""

_LAYER = re.compile(r"\.(\d+)\.")
_NOT_LOADED = ("lm_head.",)
"""A reward model has no use for the vocabulary's logits."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What counts of a model's shapes, in parameters."""

    parameters: int
    layers: tuple[int, ...]
    """Parameters of each transformer layer, from the first."""
    linear: tuple[tuple[tuple[int, int], ...], ...]
    """Of each layer, the (rows, columns) of its matrices."""
    head: int
    """Parameters of what gives the score."""
    width: int
    """Of the hidden states."""
    inner_width: int
    """Of the feed-forward part."""
    gated: bool
    """Whether the feed-forward part has a gate."""


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What decides how much memory a training needs."""

    zero_stage: int | None
    ranks: int
    bfloat16: bool
    micro_batch_tokens: int
    gradient_checkpointing: bool = False
    trainable_layers: int | None = None
    lora_rank: int | None = None
    offload: Literal["none", "cpu", "nvme"] = "none"


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes on the device of one rank while it trains, by part."""

    weights: int
    gradients: int
    master_weights: int
    moments: int
    gathered: int
    lower_copies: int
    activations: int
    loading: int
    """Before training; not in addition to the others."""

    @property
    def state(self) -> int:
        """What is there the whole time: weights, gradients and the optimiser's."""
        return self.weights + self.gradients + self.master_weights + self.moments

    @property
    def certain(self) -> int:
        """What is needed whatever the texts are."""
        return max(self.loading, self.state)

    @property
    def peak(self) -> int:
        """At the fullest moment."""
        return max(self.loading, self.state + self.gathered + self.lower_copies + self.activations)

    def parts(self) -> dict[str, int]:
        """What there is at once while it trains, the largest first."""
        names = [field.name for field in fields(self) if field.name != "loading"]
        named = {name.replace("_", " "): int(getattr(self, name)) for name in names}
        return {name: size for name, size in sorted(named.items(), key=lambda item: -item[1]) if size}


def model_shape(tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> ModelShape | None:
    """The shape of a model.

    Args:
        tensors: Its stored tensors by name.
        config: The part of its config.json that is about text.

    Returns:
        None where its layers, or how wide they are, are not told by names that transformers uses.
    """
    loaded = {name: tensor.shape for name, tensor in tensors.items() if not name.startswith(_NOT_LOADED)}
    by_layer: dict[int, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for name, shape in loaded.items():
        if found := _LAYER.search(name):
            by_layer[int(found[1])][name] = shape
    width, inner = config.get("hidden_size"), config.get("intermediate_size")
    if not by_layer or width is None or inner is None:
        return None
    ordered = [by_layer[number] for number in sorted(by_layer)]
    heads = [shape for name, shape in loaded.items() if name.startswith(("score.", "classifier.", "v_head."))]
    return ModelShape(
        parameters=sum(math.prod(shape) for shape in loaded.values()),
        layers=tuple(sum(math.prod(shape) for shape in layer.values()) for layer in ordered),
        linear=tuple(tuple((s[0], s[1]) for s in layer.values() if len(s) == 2) for layer in ordered),
        head=sum(math.prod(shape) for shape in heads),
        width=int(width),
        inner_width=int(inner),
        gated=any("gate_proj" in name or "gate_up_proj" in name for name in loaded),
    )


def trained_parameters(shape: ModelShape, plan: MemoryPlan) -> int:
    """How many parameters learn."""
    last = len(shape.layers) if plan.trainable_layers is None else plan.trainable_layers
    first = len(shape.layers) - last
    if plan.lora_rank is not None:
        adapters = sum(rows + columns for layer in shape.linear[first:] for rows, columns in layer)
        return plan.lora_rank * adapters + shape.head
    if plan.trainable_layers is None:
        return shape.parameters
    return sum(shape.layers[first:]) + shape.head


def estimate_memory(shape: ModelShape, plan: MemoryPlan) -> MemoryEstimate:
    """Memory of one rank by the formulas of this module."""
    trained, stage, ranks = trained_parameters(shape, plan), plan.zero_stage or 0, plan.ranks
    off = plan.offload != "none" and stage >= 2
    shared = ranks if stage >= 1 else 1
    bucket = 2 * 4 * min(BUCKET, shape.parameters) if stage >= 1 else 0
    gradients = 4 * trained // (ranks if stage >= 2 else 1)
    return MemoryEstimate(
        weights=0 if off and stage == 3 else 4 * shape.parameters // (ranks if stage == 3 else 1),
        gradients=(0 if off else gradients) + bucket,
        master_weights=0 if off or stage == 0 else 4 * trained // shared,
        moments=0 if off else 8 * trained // shared,
        gathered=4 * min(shape.parameters, MOST_GATHERED) if stage == 3 and (ranks > 1 or off) else 0,
        lower_copies=_lower_copies(shape, plan),
        activations=_activations(shape, plan),
        loading=4 * shape.parameters,
    )


def _working_layers(shape: ModelShape, plan: MemoryPlan) -> int:
    """How many layers gradients go through."""
    return len(shape.layers) if plan.trainable_layers is None else min(plan.trainable_layers, len(shape.layers))


def _lower_copies(shape: ModelShape, plan: MemoryPlan) -> int:
    # autocast keeps copies of weights that learn; of frozen ones only as long as the backward pass needs them
    if not plan.bfloat16 or (plan.lora_rank is not None and plan.gradient_checkpointing):
        return 0
    working = shape.linear[len(shape.layers) - _working_layers(shape, plan) :]
    return 2 * sum(rows * columns for layer in working for rows, columns in layer)


def _activations(shape: ModelShape, plan: MemoryPlan) -> int:
    inner = (4 if shape.gated else 2) * shape.inner_width
    layer = 36 * shape.width + 2 * inner if plan.bfloat16 else 4 * (11 * shape.width + inner)
    layers = _working_layers(shape, plan)
    if plan.gradient_checkpointing:
        return plan.micro_batch_tokens * (4 * shape.width * layers + (layer if layers else 0))
    return plan.micro_batch_tokens * layer * layers
