"""Two ways to do an optimiser step, with one face: plain PyTorch in one process, and DeepSpeed ZeRO over several.

Both use ``torch.optim.AdamW`` over float32 weights, clip to a global norm, and give and take their whole state by parameter
name, so that a checkpoint of either can be read by either, and by any number of ranks.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from charm_core.reward_model.network import TrainableNetwork
from charm_core.reward_model.spec import TrainingConfig

MOMENTS = ("exp_avg", "exp_avg_sq")
WEIGHT = "weight"


class Engine(Protocol):
    """What the trainer needs."""

    world_size: int

    def score(self, batch: Mapping[str, Any]) -> Tensor:
        """Scores of a batch; with more than one rank all must call this equally often."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of this rank's share of the step's loss; ``last`` marks the step's last micro-batch."""

    def step(self, rate_factor: float) -> float:
        """Update the weights with this share of the peak learning rates; returns the gradients' norm before clipping."""

    def state(self, *, moments: bool = True) -> Iterator[tuple[str, str, Tensor]]:
        """(parameter name, ``weight`` or moment, full float32 tensor) of all trained parameters; all ranks take part."""

    def load_moments(self, moments: Mapping[tuple[str, str], Tensor], step: int) -> None:
        """Set Adam's moments and step count; weights are set in the network before the engine is made."""


def parameter_groups(network: TrainableNetwork, config: TrainingConfig) -> list[dict[str, Any]]:
    """AdamW's groups: the body's matrices and vectors, then the head's; empty ones are left out.

    Group by group, ``peak`` is its peak learning rate.
    """
    head_rate = config.learning_rate if config.head_learning_rate is None else config.head_learning_rate
    groups = []
    for in_head, rate in ((False, config.learning_rate), (True, head_rate)):
        for matrix, decay in ((True, config.weight_decay), (False, 0.0)):
            parameters = [
                parameter
                for name, parameter in network.named_parameters()
                if parameter.requires_grad
                and name.startswith(f"classifier.{network.head_name}.") == in_head
                and (parameter.ndim >= 2) == matrix
            ]
            if parameters:
                groups.append({"params": parameters, "weight_decay": decay, "lr": rate, "peak": rate})
    return groups


class PlainEngine:
    """One process, PyTorch alone."""

    world_size = 1

    def __init__(self, network: TrainableNetwork, config: TrainingConfig) -> None:
        self._network = network
        self._optimizer = torch.optim.AdamW(parameter_groups(network, config), betas=config.adam_betas, fused=True)
        self._max_grad_norm = config.max_grad_norm

    def score(self, batch: Mapping[str, Any]) -> Tensor:
        """Scores of a batch."""
        return cast(Tensor, self._network(**batch))

    def backward(self, loss: Tensor, *, last: bool) -> None:  # noqa: ARG002 - nothing to communicate
        """Add gradients."""
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self, rate_factor: float) -> float:
        """Clip, then update the weights."""
        parameters = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, self._max_grad_norm).item()
        _set_learning_rates(self._optimizer, rate_factor)
        # A weight that is not finite would end up in the next checkpoint.
        if math.isfinite(norm):
            self._optimizer.step()
        self._optimizer.zero_grad()
        return norm

    def state(self, *, moments: bool = True) -> Iterator[tuple[str, str, Tensor]]:
        """Weights and moments by name."""
        for name, parameter in _trained(self._network):
            yield name, WEIGHT, parameter.detach()
            for moment in MOMENTS if moments else ():
                yield name, moment, self._optimizer.state[parameter][moment]

    def load_moments(self, moments: Mapping[tuple[str, str], Tensor], step: int) -> None:
        """Set Adam's moments and step count."""
        for name, parameter in _trained(self._network):
            state = {moment: moments[name, moment].to(parameter.device) for moment in MOMENTS}
            self._optimizer.state[parameter] = {"step": torch.tensor(float(step), device=parameter.device), **state}


class ZeroEngine:
    """One process per rank, DeepSpeed ZeRO."""

    def __init__(self, network: TrainableNetwork, config: TrainingConfig, world_size: int) -> None:
        import deepspeed

        self.world_size = world_size
        groups = parameter_groups(network, config)
        optimizer = torch.optim.AdamW(groups, betas=config.adam_betas, fused=True)
        self._engine, *_ = deepspeed.initialize(
            model=network,
            optimizer=optimizer,
            model_parameters=[parameter for group in groups for parameter in group["params"]],
            config=deepspeed_config(network, config, world_size),
            dist_init_required=False,
        )
        self._base = optimizer
        self._stage = config.zero_stage
        self._make_moments()

    def score(self, batch: Mapping[str, Any]) -> Tensor:
        """Scores of a batch."""
        return cast(Tensor, self._engine(**batch))

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add gradients."""
        self._engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed averages over the ranks; the step's loss is the sum of their shares.
        self._engine.backward(loss * self.world_size, scale_wrt_gas=False)

    def step(self, rate_factor: float) -> float:
        """Clip, then update the weights."""
        _set_learning_rates(self._engine.optimizer, rate_factor)
        if self._stage == 0:
            # Here DeepSpeed clips without keeping the norm.
            gradients = [parameter.grad for _, parameter in _trained(self._engine.module) if parameter.grad is not None]
            norm = nn.utils.get_total_norm(gradients).item()
            # The other stages leave the weights alone by themselves where it is not finite.
            if math.isfinite(norm):
                self._engine.step()
            return norm
        self._engine.step()
        return float(self._engine.get_global_grad_norm())

    def state(self, *, moments: bool = True) -> Iterator[tuple[str, str, Tensor]]:
        """Weights and moments by name."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        kinds = MOMENTS if moments else ()
        for name, parameter in _trained(self._engine.module):
            if self._stage == 0:
                yield name, WEIGHT, parameter.detach()
                for moment in kinds:
                    yield name, moment, self._base.state[parameter][moment]
            else:
                yield name, WEIGHT, safe_get_full_fp32_param(parameter)
                for moment in kinds:
                    yield name, moment, safe_get_full_optimizer_state(parameter, moment)

    def load_moments(self, moments: Mapping[tuple[str, str], Tensor], step: int) -> None:
        """Set Adam's moments and step count."""
        from deepspeed.utils import safe_set_full_optimizer_state

        for weights in self._partitions():
            self._base.state[weights]["step"].fill_(float(step))
        for name, parameter in _trained(self._engine.module):
            for moment in MOMENTS:
                value = moments[name, moment].to(parameter.device)
                if self._stage == 0:
                    self._base.state[parameter][moment].copy_(value)
                elif self._stage == 3:
                    self._set_share(parameter, value, moment)
                else:
                    safe_set_full_optimizer_state(parameter, value, moment)

    def _set_share(self, parameter: nn.Parameter, value: Tensor, moment: str) -> None:
        """What DeepSpeed does itself, but also where the ranks' shares are not even: the last ones are filled up with zeros."""
        zero = self._engine.optimizer
        share, group = zero._get_fp32_opt_state_partition(parameter, release_swap_buffers=False, optim_state_key=moment)
        start = share.numel() * zero._get_param_partition_rank(parameter)
        mine = value.flatten()[start : start + share.numel()]
        share.data.zero_()[: mine.numel()].copy_(mine)
        if zero._swappable_optimizer_subgroup(group):
            zero._optimizer_states_and_gradient_swap_out(group)

    def _make_moments(self) -> None:
        """Made here because stages 1 and 2 otherwise lose sight of the moments of all parameter groups but the first."""
        zero = self._engine.optimizer
        for number, weights in enumerate(self._partitions()):
            on_disk = self._stage == 3 and zero._swappable_optimizer_subgroup(number)
            if on_disk:
                zero._optimizer_states_and_gradient_swap_in(number)
            zeros = {moment: torch.zeros_like(weights.data) for moment in MOMENTS}
            self._base.state[weights] = {"step": torch.tensor(0.0, device=weights.device), **zeros}
            if on_disk:
                zero._optimizer_states_and_gradient_swap_out(number)
        if self._stage in (1, 2):
            zero._lazy_init_hp_params_optimizer_state()

    def _partitions(self) -> list[Tensor]:
        """The tensors that AdamW itself updates: with ZeRO, this rank's flat shares."""
        if self._stage == 3:
            return list(self._engine.optimizer.fp32_partitioned_groups_flat)
        if self._stage == 0:
            return [parameter for group in self._base.param_groups for parameter in group["params"]]
        return list(self._engine.optimizer.single_partition_of_fp32_groups)


def deepspeed_config(network: TrainableNetwork, config: TrainingConfig, world_size: int) -> dict[str, Any]:
    """DeepSpeed's JSON as a dict. The trainer itself decides where a step ends, so one micro-batch is declared."""
    hidden = cast(Any, network.classifier).config.get_text_config().hidden_size
    bucket = min(50_000_000, sum(parameter.numel() for parameter in network.parameters()))
    return {
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.max_grad_norm,
        "zero_optimization": {
            "stage": config.zero_stage,
            # gradients are then added up over the ranks while the next ones are computed
            "overlap_comm": config.zero_stage == 3 and torch.cuda.is_available(),
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "stage3_prefetch_bucket_size": bucket,
            # As transformers chooses it: vectors stay whole on every rank, matrices are shared out.
            "stage3_param_persistence_threshold": 10 * hidden,
            **_offloading(network, config, world_size),
        },
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        # DeepSpeed's own Adam on the CPU is compiled on first use; torch's gives the same bytes as without offloading.
        "zero_force_ds_cpu_optimizer": False,
    }


def _offloading(network: TrainableNetwork, config: TrainingConfig, world_size: int) -> dict[str, Any]:
    """Where the optimiser's state goes, and under ZeRO-3 the weights."""
    if config.offload == "none":
        return {}
    cuda = torch.cuda.is_available()
    place: dict[str, Any] = {"device": config.offload, "pin_memory": cuda}
    if config.offload == "nvme":
        place["nvme_path"] = config.nvme_path
    weights = place
    if config.offload == "nvme" and not cuda:
        # DeepSpeed would keep them on disk in bfloat16, because a CPU knows no float16; and they are in main memory anyway
        weights = {"device": "cpu", "pin_memory": False}
    elif config.offload == "nvme":
        # its own size of a buffer is less than one rank's share of an embedding
        share = -(-max(parameter.numel() for parameter in network.parameters()) // world_size)
        weights = {**place, "buffer_size": share}
    return {"offload_optimizer": place} | ({"offload_param": weights} if config.zero_stage == 3 else {})


def _set_learning_rates(optimizer: Any, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor


def _trained(network: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad)
