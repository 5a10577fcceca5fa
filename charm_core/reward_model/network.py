"""What scoring and training need of a reward model: tokens in, one float32 score per text out. One class per kind in heads/."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from charm_core.errors import TrainingError
from charm_core.reward_model.attention import PACKED, Layout
from charm_core.reward_model.devices import sent
from charm_core.reward_model.heads.catalogue import KINDS
from charm_core.reward_model.packing import PrefixGroup, Segment, lay_out
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

    looks_ahead: bool = False
    """Whether hidden states depend on what comes later, so that nothing can be shared."""

    @property
    def packable(self) -> Any:
        """The transformer to which packed rows can be given; None where the kind cannot take them."""
        return None

    def places(self, text: Rendered) -> tuple[int, ...]:
        """Positions in a text whose hidden states the score is read from: the same number for every text."""
        return (len(text.input_ids) - 1,)

    @abstractmethod
    def forward(
        self,
        input_ids: Tensor,
        places: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        response_starts: Tensor | None = None,
        position_ids: Tensor | None = None,
        layout: Layout | None = None,
    ) -> Tensor:
        """Score a batch: texts padded on the right, or one packed row.

        Args:
            input_ids: Token ids, texts × tokens; of a packed row, 1 × tokens.
            places: See ``places``, texts × places; of a packed row, indices into it.
            attention_mask: 1 for real tokens, 0 for padding; same shape as ``input_ids``. None with a packed row.
            token_type_ids: Segment ids, for models that use them; same shape as ``input_ids``.
            response_starts: Position of each response's first token, for kinds that need it.
            position_ids: Of a packed row: each token's position in its text; same shape as ``input_ids``.
            layout: Of a packed row.

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


def last_hidden(
    backbone: Any, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, layout: Layout | None
) -> Tensor:
    """Hidden states after the last layer of a decoder, texts × tokens × width."""
    packed = {} if layout is None else {"position_ids": position_ids, "layout": layout}
    states = backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **packed)
    return cast(Tensor, states.last_hidden_state)


def at_places(hidden: Tensor, places: Tensor, layout: Layout | None) -> Tensor:
    """The hidden states that are read, texts × places × width."""
    if layout is not None:
        return hidden[0, places]
    return hidden[torch.arange(len(places), device=hidden.device)[:, None], places]


def let_pack(network: RewardNetwork) -> bool:
    """Let a network take packed rows, and only those; whether it can."""
    transformer = network.packable
    if transformer is None or not getattr(transformer, "_supports_attention_backend", False):
        return False
    transformer.set_attn_implementation(PACKED)
    return True


def trainable(network: RewardNetwork, path: str) -> TrainableNetwork:
    """The network, if its kind can be fine-tuned.

    Raises:
        TrainingError: It cannot.
    """
    if not isinstance(network, TrainableNetwork):
        kinds = ", ".join(f"{name} ({kind.about})" for name, kind in KINDS.items() if kind.trainable)
        raise TrainingError(f"the reward model {path!r} is of a kind that cannot be fine-tuned; these can: {kinds}")
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


def transformer_layers(network: nn.Module, last: int | None = None) -> list[nn.Module]:
    """The last so many transformer layers of a network, or all.

    Raises:
        TrainingError: It has fewer.
    """
    lists = [list(module) for module in network.modules() if isinstance(module, nn.ModuleList)]
    layers = max(lists, key=len)
    if last is not None and last > len(layers):
        raise TrainingError(f"trainable_layers={last}, but the model has {len(layers)} layers")
    return layers if last is None else layers[len(layers) - last :]


def compile_layers(network: nn.Module) -> None:
    """Compile every layer by itself: layers are alike, so that one is compiled for all of them, and per size of the row."""
    for layer in transformer_layers(network):
        layer.compile(dynamic=False)


def checkpoint_gradients(network: TrainableNetwork) -> None:
    """Recompute layers in the backward pass.

    transformers does so only for layers in training mode; their children stay in evaluation mode, without dropout.
    """
    network.transformer.activation_checkpointing_enable()
    for module in network.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True


Batch = dict[str, Any]
"""The keyword arguments of ``RewardNetwork.forward``."""


def collate(texts: Sequence[Rendered], pad_token_id: int, device: torch.device, network: RewardNetwork) -> Batch:
    """Pad texts on the right to the longest of them."""
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
    batch = {
        "input_ids": ids,
        "attention_mask": mask,
        "places": torch.tensor([network.places(text) for text in texts]),
    }
    if any(text.token_type_ids is not None for text in texts):
        batch["token_type_ids"] = types
    if texts[0].response_start is not None:
        batch["response_starts"] = torch.tensor([text.response_start for text in texts])
    return {name: sent(tensor, device) for name, tensor in batch.items()}


def pack(
    groups: Sequence[PrefixGroup],
    texts: Sequence[Rendered],
    device: torch.device,
    network: RewardNetwork,
    row_tokens: int | None = None,
) -> Batch:
    """Put texts into one packed row; the scores are in the order of the groups' texts.

    Args:
        groups: Which texts, and what they share.
        texts: All texts; the groups hold indices into them.
        device: Where to.
        network: Which will score them.
        row_tokens: Fill the row up to so many tokens, with one more text that nobody asks for.
    """
    row = lay_out(groups, texts)
    places = [
        [row.index(number, place) for place in network.places(texts[text])] for number, text in enumerate(row.texts)
    ]
    size = len(row.input_ids)
    filler = (row_tokens or size) - size
    segments = (*row.segments, Segment(start=size, length=filler)) if filler else row.segments
    per_token = {
        "input_ids": [*row.input_ids, *row.input_ids[:1] * filler],
        "position_ids": [*row.position_ids, *range(filler)],
    }
    if row.token_type_ids is not None:
        per_token["token_type_ids"] = [*row.token_type_ids, *[0] * filler]
    reads = sorted({index for indices in places for index in indices})
    return {
        **{name: sent(torch.tensor([numbers]), device) for name, numbers in per_token.items()},
        "places": sent(torch.tensor(places), device),
        "layout": Layout(segments, device, sent(torch.tensor(reads), device)),
    }
