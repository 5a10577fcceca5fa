"""GRM: a value head on the last hidden state of a causal language model.

Ray2333's GRM-Gemma-2B-sftreg, GRM-Gemma2-2B-sftreg, GRM-llama3-8B-sftreg and GRM-llama3.2-3B-sftreg are stored so:
``model.*`` is the transformer, ``v_head.summary.*`` the head, either one linear layer (``v_head.summary.weight``) or
linear layers with ReLU between them (``v_head.summary.0.weight``, ``v_head.summary.2.weight``, ...). The language model's
own ``lm_head``, which was trained along to keep the hidden states general, plays no part in the score and is not loaded.
A linear ``v_head`` of TRL on a causal model whose weights are named ``model.*`` has the same layout.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from charm_core.errors import ModelError
from charm_core.reward_model.attention import Layout
from charm_core.reward_model.heads.backbone import load_backbone, read_tensors
from charm_core.reward_model.network import Float32Head, TrainableNetwork, at_places, last_hidden
from charm_core.reward_model.spec import RewardModelSpec
from charm_core.reward_model.stored.files import StoredModel
from charm_core.reward_model.stored.kinds import ModelFiles

PREFIX = "v_head.summary."


class ValueHeadModel(nn.Module):
    """Transformer and value head, named as they are stored."""

    def __init__(self, model: Any, summary: nn.Module) -> None:
        super().__init__()
        self.config: Any = model.config
        self.model: Any = model
        self.v_head: Any = nn.Module()
        self.v_head.summary = summary


class ValueHeadNetwork(TrainableNetwork):
    """The score is the value of the last real token."""

    head_name = "v_head"
    classifier: ValueHeadModel

    def __init__(self, model: Any, summary: nn.Module) -> None:
        super().__init__()
        self.classifier = ValueHeadModel(model, summary)

    @property
    def transformer(self) -> Any:
        """The transformer under the head."""
        return self.classifier.model

    @property
    def packable(self) -> Any:
        """The transformer."""
        return self.classifier.model

    def forward(
        self,
        input_ids: Tensor,
        places: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,  # noqa: ARG002 - decoders have no segments
        response_starts: Tensor | None = None,  # noqa: ARG002 - no matter for a value head
        position_ids: Tensor | None = None,
        layout: Layout | None = None,
    ) -> Tensor:
        """Score a batch; see ``RewardNetwork.forward``."""
        with self.lower_precision(input_ids.device):
            hidden = last_hidden(self.classifier.model, input_ids, attention_mask, position_ids, layout)
            value: Tensor = self.classifier.v_head.summary(at_places(hidden, places, layout)[:, 0])
        return value[:, 0]

    def save(self, folder: Path) -> None:
        """Write config and weights under the published names."""
        from huggingface_hub import save_torch_state_dict

        folder.mkdir(parents=True)
        config = self.classifier.config
        # It names Python files, which are not in this folder and not needed to load it.
        if hasattr(config, "auto_map"):
            del config.auto_map
        config.save_pretrained(folder)
        weights = {name: tensor.cpu() for name, tensor in self.classifier.state_dict().items()}
        save_torch_state_dict(weights, folder, metadata={"format": "pt"})


def load(
    files: ModelFiles,
    spec: RewardModelSpec,
    dtype: torch.dtype,
    tokenizer: Any,  # noqa: ARG001 - of no use here
) -> ValueHeadNetwork:
    """Load a GRM.

    Raises:
        ModelError: Weights cannot be read or are missing, or the head gives no single score.
    """
    summary = build_summary(read_tensors(files.model, PREFIX), files.model)
    return ValueHeadNetwork(load_backbone(files.model, spec, dtype), summary)


def build_summary(stored: Mapping[str, Tensor], model: StoredModel) -> nn.Module:
    """The head that stored tensors make.

    Raises:
        ModelError: They make none.
    """
    if "weight" in stored:
        return _linear(stored, "")
    layers = sorted(int(name.split(".")[0]) for name in stored if name.endswith(".weight"))
    if [2 * number for number in range(len(layers))] != layers:
        raise ModelError(
            f"the value head of the reward model {model.name!r} has weights of the layers {layers}, where GRM's are 0, 2, ...: they are "
            "not complete; download the model whole"
        )
    made: list[nn.Module] = []
    for layer in layers:
        made.extend([_linear(stored, f"{layer}."), nn.ReLU()])
    return nn.Sequential(*made[:-1])


def _linear(stored: Mapping[str, Tensor], prefix: str) -> Float32Head:
    weight, bias = stored[f"{prefix}weight"], stored.get(f"{prefix}bias")
    layer = Float32Head(weight.shape[1], weight.shape[0], bias=bias is not None)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer
