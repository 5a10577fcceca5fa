"""How the texts were rendered that a reward model was fine-tuned on, noted in its folder.

The chat template itself is stored with the tokenizer. Settings with their default value are not noted, so that a folder
without this file was trained without any of them, or elsewhere.
"""

from typing import Any

from charm_core.reward_model.spec import RewardModelSpec

RECORD = "charm_rendering.json"
FIELDS = ("system_prompt", "truncation_side")


def recorded(spec: RewardModelSpec) -> dict[str, Any]:
    """What the record of training with this spec holds."""
    return {name: value for name, value in spec.settings().items() if name in FIELDS}
