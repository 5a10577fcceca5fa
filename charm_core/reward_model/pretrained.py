"""Config and tokenizer of a reward model, by transformers: what can be had without its weights."""

import logging
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from charm_core.errors import ModelError
from charm_core.reward_model.spec import RewardModelSpec
from charm_core.reward_model.stored.files import StoredModel, read_json
from charm_core.reward_model.stored.kinds import ModelFiles
from charm_core.reward_model.templates import template_text

logger = logging.getLogger(__name__)


def load_config(model: StoredModel, spec: RewardModelSpec) -> Any:
    """A model's config.

    Raises:
        ModelError: It cannot be read.
    """
    try:
        return AutoConfig.from_pretrained(str(model.folder), trust_remote_code=spec.trust_remote_code)
    except Exception as error:
        raise ModelError(f"the config of the reward model {model.name!r} cannot be read: {error}") from error


def load_tokenizer(files: ModelFiles, spec: RewardModelSpec, *, in_haste: bool = False) -> Any:
    """The tokenizer, with the chat template that the spec gives, if it gives one.

    Args:
        files: Of the reward model.
        spec: Of the reward model.
        in_haste: Where the tokenizer's class is stored, do not import the model's config for it, which takes a second.

    Raises:
        ModelError: It cannot be read, or is not a fast one.
    """
    folder, name = files.tokenizer.folder, files.tokenizer.name
    try:
        hints = {"config": _bare_config(folder)} if in_haste and _states_class(folder) else {}
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=spec.trust_remote_code, **hints)
    except Exception as error:
        raise ModelError(f"the tokenizer of the reward model {name!r} cannot be read: {error}") from error
    if not tokenizer.is_fast:
        raise ModelError(f"the tokenizer of {name!r} is not a fast one; save it with a tokenizer.json")
    if spec.chat_template is not None:
        tokenizer.chat_template = template_text(spec.chat_template)
    return tokenizer


def _states_class(folder: Path) -> bool:
    stored = read_json(folder / "tokenizer_config.json") or {}
    return "tokenizer_class" in stored and "auto_map" not in stored and (folder / "config.json").is_file()


def _bare_config(folder: Path) -> Any:
    return PreTrainedConfig.from_dict(read_json(folder / "config.json") or {})


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


def model_limit(positions: int | None, tokenizer: Any) -> int:
    """Most tokens that a model with so many positions and its tokenizer allow."""
    limit = int(tokenizer.model_max_length)
    return min(limit, positions) if positions and positions > 0 else limit


def fit_to_model(spec: RewardModelSpec, config: Any, tokenizer: Any) -> RewardModelSpec:
    """The spec with ``max_length`` lowered to the model's limit."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    limit = min(spec.max_length, model_limit(positions, tokenizer))
    if limit < spec.max_length:
        logger.info("max_length lowered from %d to %d, the limit of %s", spec.max_length, limit, spec.path)
    return spec.model_copy(update={"max_length": limit})
