"""From a folder to a reward model, or to an error that says what is wrong with the folder.

Weights are read from safetensors only; nothing is unpickled, and a head that would have to be made up is an error.
"""

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from charm_core.errors import ModelError
from charm_core.reward_model.network import RewardNetwork, head_name
from charm_core.reward_model.rendering import check_can_render
from charm_core.reward_model.spec import RewardModelSpec

logger = logging.getLogger(__name__)

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True, kw_only=True)
class RewardModel:
    """A loaded reward model."""

    network: RewardNetwork
    tokenizer: Any
    pad_token_id: int
    spec: RewardModelSpec
    """As asked for, with ``max_length`` lowered to what the model can take."""
    device: torch.device


def check_reward_model(spec: RewardModelSpec) -> None:
    """Find out cheaply, without reading weights, whether a folder is usable as a reward model.

    Raises:
        ModelError: Not a folder, no safetensors, not exactly one label, no head among the weights, no pad token, or no
            way to render a conversation.
    """
    config = _load_config(spec)
    tokenizer = _load_tokenizer(spec)
    pad_token_id(tokenizer)
    check_can_render(tokenizer)
    if is_folder(spec):
        with torch.device("meta"):
            classifier = _from_config(config, spec)
        _check_head_is_stored(head_name(classifier), spec)


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
    """
    config = _load_config(spec)
    tokenizer = _load_tokenizer(spec)
    pad = pad_token_id(tokenizer)
    check_can_render(tokenizer)
    device = device or default_device()
    classifier = _load_classifier(spec, dtype or arithmetic_dtype(spec.dtype, device))
    network = RewardNetwork(classifier).to(device).eval()
    _check_finite(network.classifier.named_parameters(), spec)
    return RewardModel(
        network=network,
        tokenizer=tokenizer,
        pad_token_id=pad,
        spec=fit_to_model(spec, config, tokenizer),
        device=device,
    )


def default_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def arithmetic_dtype(name: str, device: torch.device) -> torch.dtype:
    """What ``float32``, ``bfloat16`` or ``auto`` (bfloat16 on a GPU, float32 on CPU) means on a device."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.float32 if name == "float32" else torch.bfloat16


def is_folder(spec: RewardModelSpec) -> bool:
    """Whether ``spec.path`` is a folder rather than a hub id.

    Raises:
        ModelError: It is neither.
    """
    path = Path(spec.path)
    if path.is_dir():
        return True
    if path.exists() or not HUB_ID.fullmatch(spec.path):
        raise ModelError(
            f"the reward model {spec.path!r} is not a folder; give a Hugging Face model folder or a hub id"
        )
    return False


def fit_to_model(spec: RewardModelSpec, config: Any, tokenizer: Any) -> RewardModelSpec:
    """The spec with ``max_length`` lowered to the limits that the model's config and tokenizer state."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    limit = min(
        spec.max_length, tokenizer.model_max_length, positions if positions and positions > 0 else spec.max_length
    )
    if limit < spec.max_length:
        logger.info("max_length lowered from %d to %d, the limit of %s", spec.max_length, limit, spec.path)
    return spec.model_copy(update={"max_length": limit})


def pad_token_id(tokenizer: Any) -> int:
    """The id that fills up short texts: the pad token's or, without one, the end-of-text token's.

    Padding is masked and the last token is found by position, so which id it is does not change a score. The tokenizer is
    not changed.

    Raises:
        ModelError: The tokenizer has neither.
    """
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    raise ModelError(
        f"the tokenizer of {tokenizer.name_or_path!r} has neither a pad token nor an end-of-text token; set pad_token in its "
        "tokenizer_config.json to a token of its vocabulary"
    )


def _load_config(spec: RewardModelSpec) -> Any:
    if is_folder(spec):
        _check_files(Path(spec.path))
    try:
        config = AutoConfig.from_pretrained(spec.path, revision=spec.revision, trust_remote_code=spec.trust_remote_code)
    except Exception as error:
        raise ModelError(f"the config of the reward model {spec.path!r} cannot be read: {error}") from error
    if config.num_labels != 1:
        raise ModelError(
            f"the reward model {spec.path!r} has {config.num_labels} labels, but a reward model gives one score: it needs "
            "num_labels=1 in config.json"
        )
    return config


def _check_files(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ModelError(f"the reward model folder {folder} has no config.json; is it a Hugging Face model folder?")
    if not any(folder.glob("*.safetensors")):
        pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        raise ModelError(
            f"the reward model folder {folder} has no .safetensors file"
            + (f", only {pickled}, which is never unpickled; convert it to safetensors" if pickled else "")
        )


def _load_tokenizer(spec: RewardModelSpec) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            spec.path, revision=spec.revision, trust_remote_code=spec.trust_remote_code
        )
    except Exception as error:
        raise ModelError(f"the tokenizer of the reward model {spec.path!r} cannot be read: {error}") from error
    if not tokenizer.is_fast:
        raise ModelError(f"the tokenizer of {spec.path!r} is not a fast one; save it with a tokenizer.json")
    return tokenizer


def _load_classifier(spec: RewardModelSpec, dtype: torch.dtype) -> Any:
    try:
        classifier, report = AutoModelForSequenceClassification.from_pretrained(
            spec.path,
            revision=spec.revision,
            dtype=dtype,
            attn_implementation=None if spec.attention == "auto" else spec.attention,
            trust_remote_code=spec.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:
        raise ModelError(f"the weights of the reward model {spec.path!r} cannot be loaded: {error}") from error
    made_up = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if made_up:
        raise ModelError(
            f"the reward model {spec.path!r} lacks the weights {made_up[:5]}; they would be random. A base model without its head "
            "is not a reward model"
        )
    return classifier


def _from_config(config: Any, spec: RewardModelSpec) -> Any:
    try:
        return AutoModelForSequenceClassification.from_config(config, trust_remote_code=spec.trust_remote_code)
    except Exception as error:
        raise ModelError(
            f"the reward model {spec.path!r} is not a sequence classifier that transformers knows: {error}"
        ) from error


def _check_head_is_stored(name: str, spec: RewardModelSpec) -> None:
    stored: set[str] = set()
    for file in sorted(Path(spec.path).glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as weights:
                stored.update(weights.keys())
        except Exception as error:
            raise ModelError(f"the weights file {file} cannot be read: {error}") from error
    if f"{name}.weight" not in stored:
        raise ModelError(
            f"the reward model {spec.path!r} has no head: {name}.weight is not among its weights; a base model without its head "
            "is not a reward model"
        )


def _check_finite(parameters: Iterable[tuple[str, torch.nn.Parameter]], spec: RewardModelSpec) -> None:
    for name, parameter in parameters:
        if not torch.isfinite(parameter).all():
            raise ModelError(
                f"the reward model {spec.path!r} has NaN or infinite weights, first in {name}; use an intact copy"
            )
