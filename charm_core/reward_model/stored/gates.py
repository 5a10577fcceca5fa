"""Where gated reward models read the prompt, as their files say. No torch."""

from typing import Any

from charm_core.errors import ModelError
from charm_core.reward_model.stored.files import StoredModel

ANSWER_HEADERS = {
    "llama": "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "gemma2": "<end_of_turn>\n<start_of_turn>model\n",
}
"""By model type: the end of the user's turn and the header of the answer, where the published gates are read."""


def answer_header(model: StoredModel, tokenizer: Any) -> list[int]:
    """Token ids that mark where the gate is read.

    Raises:
        ModelError: No published gate reads this type of model.
    """
    stated = model.config.get("gating_token_pattern")
    text = ANSWER_HEADERS.get(model.config.get("model_type", ""))
    if stated is None and text is None:
        raise ModelError(
            f"where the gate of the reward model {model.name!r} (model type {model.config.get('model_type')!r}) reads the prompt is "
            "unknown: put the token ids that begin its answers into config.json as gating_token_pattern"
        )
    return list(stated if stated is not None else tokenizer(text, add_special_tokens=False)["input_ids"])
