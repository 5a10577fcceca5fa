"""A sequence classifier as a reward model: tokens in, one float32 score per text out."""

import inspect
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from charm_core.errors import ModelError, TrainingError
from charm_core.reward_model.rendering import Rendered

HEAD_NAMES = ("score", "classifier", "classifier.out_proj")
"""Where Hugging Face classifiers keep the layer whose output is the score."""


class Float32Head(nn.Linear):
    """A linear layer that computes in float32 whatever the type of its input and weights."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Apply the layer; float32 out."""
        bias = None if self.bias is None else self.bias.float()
        with torch.autocast(hidden.device.type, enabled=False):
            return nn.functional.linear(hidden.float(), self.weight.float(), bias)


class RewardNetwork(nn.Module):
    """Wraps a Hugging Face sequence classifier with one label.

    A decoder's classifier (one with a ``score`` layer) reads the hidden state of the last real token, found by its position
    and not by looking for padding ids, so that a pad token that equals the end-of-text token does no harm. Any other
    classifier uses its own head.
    """

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.autocast_dtype: torch.dtype | None = None
        """Lower precision for the backbone over weights that stay as they are; None: the weights' own."""
        self.classifier = classifier
        self.head_name = head_name(classifier)
        replace_head(classifier, self.head_name)
        self.reads_last_token = self.head_name == "score"
        self.takes_token_types = "token_type_ids" in inspect.signature(classifier.forward).parameters

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, last_positions: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """Score a batch.

        Args:
            input_ids: Token ids, texts × tokens, padded on the right.
            attention_mask: 1 for real tokens, 0 for padding; same shape.
            last_positions: Position of each text's last real token.
            token_type_ids: Segment ids, for models that use them; same shape.

        Returns:
            float32 scores, one per text.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if self.takes_token_types and token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids
        lower = self.autocast_dtype
        with torch.autocast(input_ids.device.type, dtype=lower, enabled=lower is not None):
            if not self.reads_last_token:
                return cast(Tensor, self.classifier(**inputs).logits[:, 0].float())
            classifier = cast(Any, self.classifier)
            hidden = getattr(classifier, classifier.base_model_prefix)(**inputs, use_cache=False).last_hidden_state
            rows = torch.arange(hidden.shape[0], device=hidden.device)
            return cast(Tensor, classifier.score(hidden[rows, last_positions])[:, 0])


def head_name(classifier: nn.Module) -> str:
    """The dotted name of the linear layer with one output that gives the score.

    Raises:
        ModelError: No such layer where Hugging Face classifiers have it.
    """
    for name in HEAD_NAMES:
        try:
            layer = classifier.get_submodule(name)
        except AttributeError:
            continue
        if isinstance(layer, nn.Linear) and layer.out_features == 1:
            return name
    raise ModelError(
        f"{type(classifier).__name__} has no scalar head: none of {', '.join(HEAD_NAMES)} is a linear layer with one output; "
        "CHARM scores with sequence classifiers that have one label"
    )


def replace_head(classifier: nn.Module, name: str) -> None:
    """Let the head compute in float32, keeping its parameters."""
    old = cast(nn.Linear, classifier.get_submodule(name))
    head = Float32Head(old.in_features, old.out_features, bias=old.bias is not None, device="meta")
    head.weight, head.bias = old.weight, old.bias
    classifier.set_submodule(name, head)


def freeze(network: RewardNetwork, trainable_layers: int | None) -> None:
    """Leave only the last ``trainable_layers`` transformer layers and the head trainable.

    Raises:
        TrainingError: The network has fewer layers.
    """
    if trainable_layers is None:
        return
    layers = max((module for module in network.modules() if isinstance(module, nn.ModuleList)), key=len)
    if trainable_layers > len(layers):
        raise TrainingError(f"trainable_layers={trainable_layers}, but the model has {len(layers)} layers")
    network.requires_grad_(False)
    for layer in list(layers)[len(layers) - trainable_layers :]:
        layer.requires_grad_(True)
    network.classifier.get_submodule(network.head_name).requires_grad_(True)


def checkpoint_gradients(network: RewardNetwork) -> None:
    """Recompute layers in the backward pass.

    transformers does so only for layers in training mode; their children stay in evaluation mode, without dropout.
    """
    classifier: Any = network.classifier
    classifier.activation_checkpointing_enable()
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
    return {name: tensor.to(device) for name, tensor in batch.items()}
