"""The rule about memory: whether the fine-tuning fits where it is to run, and where it would."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from charm_core.reward_model.findings import Finding
from charm_core.reward_model.heads.catalogue import KINDS
from charm_core.reward_model.memory import MemoryEstimate, MemoryPlan, ModelShape, estimate_memory, model_shape
from charm_core.reward_model.preflight.facts import Facts, Machine, finding
from charm_core.reward_model.spec import TrainingConfig

PROCESS_BYTES = 10**9
"""What a process has besides the model: libraries, on a GPU its context."""
RESERVE = 0.9
"""Share of the memory that can be counted on."""
LORA_RANK = 16
MOST_RANKS = 512
FEWEST_TOKENS = 512
"""Of a micro-batch that is worth having."""


def training_fits(facts: Facts) -> Iterator[Finding]:
    """Every rank has room for its share of the training."""
    training, machine = facts.training, facts.machine
    if training is None or machine is None or not KINDS[facts.files.kind].trainable:
        return
    shape = model_shape(facts.files.backbone.tensors, facts.config)
    if shape is None:
        yield finding("memory", "info", f"the memory of a fine-tuning cannot be estimated: {_unknown(facts.config)}")
        return
    plan = plan_of(training, machine)
    estimate = estimate_memory(shape, plan)
    needs = _needs(estimate, plan, machine)
    if estimate.certain > _memory(machine, plan.ranks):
        yield finding("memory", "error", f"{needs}: that cannot fit. {advice(shape, plan, machine)}")
    elif estimate.peak > _room(machine, plan.ranks):
        yield finding("memory", "warning", f"{needs}: that may not fit. {advice(shape, plan, machine)}")
    else:
        yield finding("memory", "info", f"{needs}: that fits")


def _unknown(config: Mapping[str, Any]) -> str:
    """Why ``model_shape`` finds no shape."""
    absent = [name for name in ("hidden_size", "intermediate_size") if config.get(name) is None]
    if absent:
        return f"config.json has no {' and no '.join(absent)}"
    return "the names of its tensors do not tell which layer they are of"


def plan_of(training: TrainingConfig, machine: Machine) -> MemoryPlan:
    """What the settings mean for memory on such machines."""
    lower = training.dtype == "bfloat16" or (training.dtype == "auto" and machine.gpus > 0)
    return MemoryPlan(
        zero_stage=training.zero_stage,
        ranks=machine.ranks(training),
        bfloat16=lower,
        micro_batch_tokens=training.micro_batch_tokens,
        gradient_checkpointing=training.gradient_checkpointing,
        trainable_layers=training.trainable_layers,
        lora_rank=training.lora_rank,
        offload=training.offload,
    )


def _memory(machine: Machine, ranks: int) -> float:
    """Bytes for one of so many ranks; without GPUs they share the memory of their machine."""
    return machine.gpu_bytes if machine.gpus else machine.memory_bytes / -(-ranks // machine.machines)


def _room(machine: Machine, ranks: int) -> float:
    """What of it can be counted on."""
    return RESERVE * _memory(machine, ranks) - PROCESS_BYTES


def _needs(estimate: MemoryEstimate, plan: MemoryPlan, machine: Machine) -> str:
    where = "GPU" if machine.gpus else "process"
    ranks = f"one {where}" if plan.ranks == 1 else f"each of {plan.ranks} {'GPUs' if machine.gpus else 'processes'}"
    have = (
        f"a GPU here has {_gb(machine.gpu_bytes)}" if machine.gpus else f"this machine has {_gb(machine.memory_bytes)}"
    )
    parts = ", ".join(f"{name} {_gb(size)}" for name, size in estimate.parts().items())
    return (
        f"fine-tuning needs about {_gb(estimate.peak)} for {ranks}, and {have} (in training: {parts}; before it, to load the model: "
        f"{_gb(estimate.loading)})"
    )


def advice(shape: ModelShape, plan: MemoryPlan, machine: Machine) -> str:
    """How many of the devices it would take, with which settings; ways that save none are left out."""
    checkpointed = replace(plan, gradient_checkpointing=True, zero_stage=3)
    ways = {
        "training.zero_stage = 3": replace(plan, zero_stage=3),
        "training.zero_stage = 3 and training.gradient_checkpointing": checkpointed,
        "LoRA (training.lora_rank) and training.gradient_checkpointing": replace(checkpointed, lora_rank=LORA_RANK),
    }
    found: list[str] = []
    fewest = MOST_RANKS + 1
    for way, changed in ways.items():
        ranks = _fewest_ranks(shape, changed, machine)
        # a way that costs more changes and saves nothing is none
        if ranks is not None and ranks < fewest:
            found.append(f"{_machines(ranks, machine)} with {way}")
            fewest = ranks
    tokens = _most_tokens(shape, plan, machine)
    if tokens is not None:
        found.append(f"training.micro_batch_tokens of at most {tokens:,}")
    if found:
        return f"What would do: {', or '.join(found)}"
    return (
        f"No number of such {'GPUs' if machine.gpus else 'machines'} is enough: every rank first loads the whole model, "
        f"{_gb(4 * shape.parameters)} in float32. Take larger ones, or a smaller reward model"
    )


def _most_tokens(shape: ModelShape, plan: MemoryPlan, machine: Machine) -> int | None:
    """The largest micro-batch for which there is room with otherwise the same settings; none if it would be useless."""
    without = estimate_memory(shape, replace(plan, micro_batch_tokens=0)).peak
    per_token = estimate_memory(shape, replace(plan, micro_batch_tokens=1)).activations
    tokens = int(_room(machine, plan.ranks) - without) // max(1, per_token)
    return tokens if tokens >= FEWEST_TOKENS else None


def _fewest_ranks(shape: ModelShape, plan: MemoryPlan, machine: Machine) -> int | None:
    """The smallest power of two of ranks, one on each device, that has room."""
    ranks = 1
    while ranks <= MOST_RANKS:
        spread = machine if machine.gpus else replace(machine, machines=ranks)
        if estimate_memory(shape, replace(plan, ranks=ranks)).peak <= _room(spread, ranks):
            return ranks
        ranks *= 2
    return None


def _machines(ranks: int, machine: Machine) -> str:
    return f"{ranks} x {_gb(machine.gpu_bytes if machine.gpus else machine.memory_bytes)}"


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size < 10e9 else f"{size / 1e9:.0f} GB"
