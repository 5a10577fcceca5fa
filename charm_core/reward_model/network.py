"""What scoring and training need of a reward model: tokens in, one float32 score per text out. One class per kind in heads/."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from charm_core.errors import TrainingError
from charm_core.reward_model.rendering import Rendered


class Float32Head(nn.Linear):
    """A linear layer that computes in float32 whatever the type of its input and weights."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Apply the layer; float32 out."""
        bias = None if self.bias is None else self.bias.float()
        with torch.autocast(hidden.device.type, enabled=False):
            return nn.functional.linear(hidden.float(), self.weight.float(), bias)


class RewardNetwork(nn.Module, ABC):
    """What scoring needs of a reward model of any kind."""

    @abstractmethod
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        last_positions: Tensor,
        token_type_ids: Tensor | None = None,
        response_starts: Tensor | None = None,
    ) -> Tensor:
        """Score a batch.

        Args:
            input_ids: Token ids, texts × tokens, padded on the right.
            attention_mask: 1 for real tokens, 0 for padding; same shape.
            last_positions: Position of each text's last real token.
            token_type_ids: Segment ids, for models that use them; same shape.
            response_starts: Position of each response's first token, for kinds that need it.

        Returns:
            float32 scores, one per text.
        """


class TrainableNetwork(RewardNetwork):
    """What training needs besides.

    ``classifier`` holds the whole model; its parameters' names are those in the checkpoints of a training run.
    """

    classifier: nn.Module
    head_name: str
    """Dotted name in ``classifier`` of what gives the score."""
    autocast_dtype: torch.dtype | None = None
    """Lower precision for the backbone over weights that stay as they are; None: the weights' own."""

    @property
    @abstractmethod
    def transformer(self) -> Any:
        """The part that transformers made."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write config and weights so that the folder is loaded as the same kind."""

    def lower_precision(self, device: torch.device) -> torch.autocast:
        """The context in which the backbone computes."""
        lower = self.autocast_dtype
        return torch.autocast(device.type, dtype=lower, enabled=lower is not None)


def last_hidden(backbone: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Hidden states after the last layer of a decoder, texts × tokens × width."""
    states = backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    return cast(Tensor, states.last_hidden_state)


def at_positions(hidden: Tensor, positions: Tensor) -> Tensor:
    """One hidden state per text."""
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), positions]


def trainable(network: RewardNetwork, path: str) -> TrainableNetwork:
    """The network, if its kind can be fine-tuned.

    Raises:
        TrainingError: It cannot.
    """
    if not isinstance(network, TrainableNetwork):
        raise TrainingError(
            f"the reward model {path!r} is of a kind that cannot be fine-tuned; classifiers, GRM value heads and LoRA adapters can"
        )
    return network


def freeze(network: TrainableNetwork, trainable_layers: int | None) -> None:
    """Leave only the last ``trainable_layers`` transformer layers and the head trainable.

    Raises:
        TrainingError: The network has fewer layers.
    """
    if trainable_layers is None:
        return
    layers = transformer_layers(network, trainable_layers)
    network.requires_grad_(False)
    for layer in layers:
        layer.requires_grad_(True)
    network.classifier.get_submodule(network.head_name).requires_grad_(True)


def transformer_layers(network: TrainableNetwork, last: int | None) -> list[nn.Module]:
    """The last so many transformer layers of a network, or all.

    Raises:
        TrainingError: It has fewer.
    """
    layers = max((module for module in network.modules() if isinstance(module, nn.ModuleList)), key=len)
    if last is not None and last > len(layers):
        raise TrainingError(f"trainable_layers={last}, but the model has {len(layers)} layers")
    return list(layers) if last is None else list(layers)[len(layers) - last :]


def checkpoint_gradients(network: TrainableNetwork) -> None:
    """Recompute layers in the backward pass.

    transformers does so only for layers in training mode; their children stay in evaluation mode, without dropout.
    """
    network.transformer.activation_checkpointing_enable()
    for module in network.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True


def collate(texts: Sequence[Rendered], pad_token_id: int, device: torch.device) -> dict[str, Tensor]:
    """Pad texts on the right to the longest of them: the keyword arguments of ``RewardNetwork.forward``."""
    width = max(len(text.input_ids) for text in texts)
    ids = torch.full((len(texts), width), pad_token_id, dtype=torch.long)
    mask = torch.zeros((len(texts), width), dtype=torch.long)
    types = torch.zeros((len(texts), width), dtype=torch.long)
    for row, text in enumerate(texts):
        length = len(text.input_ids)
        ids[row, :length] = torch.tensor(text.input_ids)
        mask[row, :length] = 1
        if text.token_type_ids is not None:
            types[row, :length] = torch.tensor(text.token_type_ids)
    batch = {"input_ids": ids, "attention_mask": mask, "last_positions": mask.sum(dim=1) - 1}
    if any(text.token_type_ids is not None for text in texts):
        batch["token_type_ids"] = types
    if texts[0].response_start is not None:
        batch["response_starts"] = torch.tensor([text.response_start for text in texts])
    return {name: tensor.to(device) for name, tensor in batch.items()}
