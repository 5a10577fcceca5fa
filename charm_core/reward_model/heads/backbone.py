"""The transformer of a model whose head transformers does not know: the body by transformers, the head read by us."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModel

from charm_core.errors import ModelError
from charm_core.reward_model.spec import RewardModelSpec
from charm_core.reward_model.stored.files import StoredModel


def load_backbone(model: StoredModel, spec: RewardModelSpec, dtype: torch.dtype) -> Any:
    """A decoder without any head.

    Raises:
        ModelError: Its weights cannot be read or are missing.
    """
    try:
        backbone, report = AutoModel.from_pretrained(
            str(model.folder),
            dtype=dtype,
            attn_implementation=attention_of(spec),
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:
        raise ModelError(f"the weights of the reward model {model.name!r} cannot be loaded: {error}") from error
    check_nothing_is_made_up(report, model)
    return backbone


def check_nothing_is_made_up(report: dict[str, Any], model: StoredModel, allowed: Iterable[str] = ()) -> None:
    """Raise ModelError if transformers had to fill in weights at random.

    Args:
        report: Its loading report.
        model: The model.
        allowed: Names of weights that come from elsewhere.
    """
    absent = set(report["missing_keys"]) - set(allowed)
    made_up = sorted(absent) + sorted(str(key) for key in report["mismatched_keys"])
    if made_up:
        raise ModelError(
            f"the reward model {model.name!r} lacks the weights {made_up[:5]}; they would be random. A base model without its head "
            "is not a reward model"
        )


def read_tensors(model: StoredModel, prefix: str) -> dict[str, Tensor]:
    """The stored tensors whose names begin with a prefix, in float32, named without it.

    Raises:
        ModelError: A file cannot be read.
    """
    found: dict[str, Tensor] = {}
    names = sorted(name for name in model.tensors if name.startswith(prefix))
    for file in sorted({model.tensors[name].file for name in names}):
        try:
            with safe_open(Path(model.folder, file), framework="pt") as weights:
                for name in names:
                    if model.tensors[name].file == file:
                        found[name.removeprefix(prefix)] = weights.get_tensor(name).float()
        except Exception as error:
            raise ModelError(f"the weights file {model.folder / file} cannot be read: {error}") from error
    return found


def attention_of(spec: RewardModelSpec) -> str | None:
    """The attention kernel as transformers wants it named."""
    return None if spec.attention == "auto" else spec.attention
