"""ArmoRM and QRM: several objectives, each with a reward, weighed by a gate that reads the prompt.

Stored names: ``model.*`` the transformer, ``regression_layer.weight`` the rewards (objectives × quantiles rows),
``reward_transform_matrix`` (absent from QRM-Gemma-2: the identity), ``gating.layers.N.*`` and ``gating.logit_scale``.

- RLHFlow/ArmoRM-Llama3-8B-v0.1: 19 objectives, one reward each; gate of linear layers with ReLU between.
- nicolinho/QRM-Llama3-8B, QRM-Llama3.1-8B(-v2), QRM-Gemma-2-27B: quantiles of every reward, of which the mean counts; in
  the gate each hidden linear layer is followed by ReLU and a batch norm, which uses its stored mean and variance.

The rewards are read at the last real token. The gate is read at the end of the user's last turn, where the header of the
answer begins: at the first token of the last place where the tokens of that header occur. Which layers the gate has is told
by the stored tensors; only its temperature is in config.json (``gating_temperature``).
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from charm_core.errors import ModelError
from charm_core.reward_model.attention import Layout
from charm_core.reward_model.heads.backbone import load_backbone, read_tensors
from charm_core.reward_model.network import RewardNetwork, at_places, last_hidden
from charm_core.reward_model.rendering import Rendered
from charm_core.reward_model.spec import RewardModelSpec
from charm_core.reward_model.stored.files import StoredModel
from charm_core.reward_model.stored.gates import answer_header
from charm_core.reward_model.stored.kinds import ModelFiles

DEFAULT_TEMPERATURES = {"llama": 10.0, "gemma2": 1.0}
"""Of the published code, where config.json states none."""


class GatedNetwork(RewardNetwork):
    """Several rewards and the gate that weighs them."""

    def __init__(
        self, model: Any, regression: Tensor, transform: Tensor, gate: "Gate", answer_header: Sequence[int]
    ) -> None:
        """Put the parts together.

        Args:
            model: The transformer.
            regression: Rows of all objectives' quantiles, (objectives · quantiles) × width.
            transform: Objectives × objectives.
            gate: The gate.
            answer_header: Token ids that mark where the gate is read.
        """
        super().__init__()
        self.model = model
        self.gate = gate
        objectives = transform.shape[0]
        # The mean over quantiles and the transform are linear, so one matrix does both.
        mean_rows = regression.reshape(objectives, -1, regression.shape[1]).mean(dim=1)
        self.rewards = nn.Parameter(transform.T @ mean_rows, requires_grad=False)
        self.answer_header = tuple(answer_header)

    @property
    def packable(self) -> Any:
        """The transformer."""
        return self.model

    def places(self, text: Rendered) -> tuple[int, ...]:
        """Where the gate is read, and the last token.

        Raises:
            ModelError: The text lacks the header of an answer.
        """
        return last_occurrence(text.input_ids, self.answer_header), len(text.input_ids) - 1

    def forward(
        self,
        input_ids: Tensor,
        places: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,  # noqa: ARG002 - decoders have no segments
        response_starts: Tensor | None = None,  # noqa: ARG002 - the gate has its own place
        position_ids: Tensor | None = None,
        layout: Layout | None = None,
    ) -> Tensor:
        """Score a batch; see ``RewardNetwork.forward``."""
        hidden = last_hidden(self.model, input_ids, attention_mask, position_ids, layout)
        read = at_places(hidden, places, layout).float()
        rewards = nn.functional.linear(read[:, 1], self.rewards)
        return cast(Tensor, (self.gate(read[:, 0]) * rewards).sum(dim=1))


class Gate(nn.Module):
    """Weights of the objectives, from the prompt's hidden state."""

    def __init__(self, layers: Sequence[nn.Module], scale: Tensor, temperature: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.temperature = temperature
        self.register_buffer("scale", scale)
        self.scale: Tensor

    def forward(self, hidden: Tensor) -> Tensor:
        """Texts × objectives."""
        return torch.softmax(self.layers(hidden) / self.temperature, dim=1) * self.scale


def last_occurrence(token_ids: Sequence[int], pattern: Sequence[int]) -> int:
    """Where the pattern begins for the last time in a text.

    Raises:
        ModelError: The text lacks it.
    """
    wanted = tuple(pattern)
    for place in range(len(token_ids) - len(wanted), -1, -1):
        if tuple(token_ids[place : place + len(wanted)]) == wanted:
            return place
    raise ModelError(
        f"a text lacks the tokens {list(wanted)}, which begin the answer and tell the gate where to read: use the chat "
        "template that the reward model was trained with"
    )


def load(files: ModelFiles, spec: RewardModelSpec, dtype: torch.dtype, tokenizer: Any) -> GatedNetwork:
    """Load an ArmoRM or QRM.

    Raises:
        ModelError: Weights cannot be read or are missing, or where the gate is read is unknown.
    """
    model = files.model
    gate = build_gate(read_tensors(model, "gating."), model)
    regression = read_tensors(model, "regression_layer.")["weight"]
    objectives = [layer for layer in gate.layers if isinstance(layer, nn.Linear)][-1].out_features
    transform = read_tensors(model, "reward_transform_matrix").get("", torch.eye(objectives))
    header = answer_header(model, tokenizer)
    return GatedNetwork(load_backbone(model, spec, dtype), regression, transform, gate, header)


def build_gate(stored: Mapping[str, Tensor], model: StoredModel) -> Gate:
    """The gate that stored tensors make: linear layers, ReLU after each but the last, batch norms where they are stored.

    Raises:
        ModelError: A layer's weights are missing.
    """
    numbers = sorted({int(name.split(".")[1]) for name in stored if name.startswith("layers.")})
    layers: list[nn.Module] = []
    for number in numbers:
        own = {
            name.removeprefix(f"layers.{number}."): tensor
            for name, tensor in stored.items()
            if name.startswith(f"layers.{number}.")
        }
        if "weight" not in own:
            raise ModelError(
                f"the gate of the reward model {model.name!r} lacks gating.layers.{number}.weight; download the model whole"
            )
        layers.append(_batch_norm(own) if "running_mean" in own else _linear(own))
        if "running_mean" not in own and number != numbers[-1]:
            layers.append(nn.ReLU())
    model_type = model.config.get("model_type", "")
    temperature = model.config.get("gating_temperature", DEFAULT_TEMPERATURES.get(model_type, 1.0))
    return Gate(layers, stored.get("logit_scale", torch.ones(1)), temperature)


def _linear(own: Mapping[str, Tensor]) -> nn.Linear:
    layer = nn.Linear(own["weight"].shape[1], own["weight"].shape[0], bias="bias" in own)
    layer.load_state_dict(dict(own))
    return layer


def _batch_norm(own: Mapping[str, Tensor]) -> nn.BatchNorm1d:
    layer = nn.BatchNorm1d(own["running_mean"].shape[0])
    layer.load_state_dict(dict(own), strict=False)
    return layer
