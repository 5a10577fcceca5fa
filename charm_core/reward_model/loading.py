"""From files to a reward model, or to an error that says what is wrong with the files.

Weights are read from safetensors only; nothing is unpickled, and a head that would have to be made up is an error.
"""

from dataclasses import dataclass
from importlib import import_module
from itertools import chain
from typing import Any

import torch

from charm_core.errors import ModelError
from charm_core.reward_model.network import RewardNetwork
from charm_core.reward_model.pretrained import fit_to_model, load_config, load_tokenizer, pad_token_id
from charm_core.reward_model.spec import RewardModelSpec
from charm_core.reward_model.stored.checks import check_files
from charm_core.reward_model.stored.kinds import ModelFiles, open_files
from charm_core.reward_model.templates import check_can_render

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class RewardModel:
    """A loaded reward model."""

    network: RewardNetwork
    tokenizer: Any
    pad_token_id: int
    spec: RewardModelSpec
    """As asked for, with ``kind`` found out and ``max_length`` lowered to what the model can take."""
    device: torch.device
    packed: bool = False
    """Whether the network takes packed rows, and only those; see ``text_scoring.choose_batching``."""
    row_tokens: int | None = None
    """Where its layers are compiled: tokens of the longest row, of which all are simple parts; None: rows are as long as they come."""


def check_reward_model(spec: RewardModelSpec) -> None:
    """Find out cheaply, without reading weights, whether files are usable as a reward model.

    Raises:
        ModelError: Not a folder, no safetensors, not exactly one label, no head among the weights, no pad token, or no
            way to render a conversation.
    """
    files = open_files(spec, weights=False)
    check_files(files, spec)
    load_config(files.backbone, spec)
    tokenizer = load_tokenizer(files, spec)
    pad_token_id(tokenizer)
    check_can_render(tokenizer)


def load_reward_model(
    spec: RewardModelSpec, *, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> RewardModel:
    """Load a reward model for scoring or training, in evaluation mode.

    Args:
        spec: What to load.
        dtype: Type of the weights, if not the one that ``spec.dtype`` means on this machine.
        device: Where to put it; default: the GPU if there is one.

    Raises:
        ModelError: See ``check_reward_model``; also weights that are missing, NaN or infinite.
        ServiceError: It is on the hub, which does not answer.
    """
    files = open_files(spec)
    check_files(files, spec)
    config = load_config(files.backbone, spec)
    tokenizer = load_tokenizer(files, spec)
    pad = pad_token_id(tokenizer)
    check_can_render(tokenizer)
    device = device or default_device()
    network = _load_network(files, spec, dtype or arithmetic_dtype(spec.dtype, device), tokenizer).to(device).eval()
    _check_finite(network, spec)
    return RewardModel(
        network=network,
        tokenizer=tokenizer,
        pad_token_id=pad,
        spec=fit_to_model(spec, config, tokenizer).model_copy(update={"kind": files.kind}),
        device=device,
    )


def _load_network(files: ModelFiles, spec: RewardModelSpec, dtype: torch.dtype, tokenizer: Any) -> RewardNetwork:
    head = import_module(f"charm_core.reward_model.heads.{files.kind}")
    network: RewardNetwork = head.load(files, spec, dtype, tokenizer)
    return network


def default_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def arithmetic_dtype(name: str, device: torch.device) -> torch.dtype:
    """What a type's name, or ``auto`` (bfloat16 on a GPU, float32 on CPU), means on a device."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[name]


def _check_finite(network: RewardNetwork, spec: RewardModelSpec) -> None:
    for name, tensor in chain(network.named_parameters(), network.named_buffers()):
        if not torch.isfinite(tensor).all():
            raise ModelError(
                f"the reward model {spec.path!r} has NaN or infinite weights, first in {name.removeprefix('classifier.')}; use an "
                "intact copy"
            )
