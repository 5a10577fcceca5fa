"""What the rules look at."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from charm_core.reward_model.findings import Finding, Severity
from charm_core.reward_model.jobs import automatic_ranks
from charm_core.reward_model.rendering import with_system_prompt
from charm_core.reward_model.spec import RewardModelSpec, TrainingConfig
from charm_core.reward_model.stored.files import StoredModel, read_json
from charm_core.reward_model.stored.kinds import ModelFiles
from charm_core.reward_model.templates import Message, chat_ids, uses_chat_template

QUESTION: Message = {"role": "user", "content": "What is the capital of France?"}
ANSWER: Message = {"role": "assistant", "content": "Paris."}

Text = tuple[Sequence[Message], str]
"""A prompt and a response."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a fine-tuning is to run on."""

    gpus: int
    gpu_bytes: int
    """Memory of the smallest GPU; 0 without one."""
    memory_bytes: int
    cores: int
    machines: int = 1
    """How many such machines there are."""

    def ranks(self, training: TrainingConfig) -> int:
        """How many processes the settings mean here."""
        if training.zero_stage is None:
            return 1
        return automatic_ranks(self.gpus, self.cores) * self.machines if training.ranks == "auto" else training.ranks


@dataclass(frozen=True, kw_only=True)
class Facts:
    """A reward model without its weights, and what is to be done with it."""

    spec: RewardModelSpec
    """As asked for, with the kind found out."""
    files: ModelFiles
    config: Mapping[str, Any]
    """The part of config.json that is about text."""
    tokenizer: Any
    """With the template override, if there is one."""
    limit: int
    """Most tokens that the model takes."""
    texts: tuple[Text, ...] = ()
    texts_in_all: int = 0
    training: TrainingConfig | None = None
    machine: Machine | None = None
    """Where it is to be fine-tuned, if that is known."""

    @property
    def max_length(self) -> int:
        """The limit in force."""
        return min(self.spec.max_length, self.limit)

    @property
    def renders_chats(self) -> bool:
        """Whether texts go through a chat template."""
        return uses_chat_template(self.tokenizer)

    @cached_property
    def example(self) -> list[Message]:
        """A short conversation as it would be scored."""
        return [*with_system_prompt([QUESTION], self.spec), ANSWER]

    @cached_property
    def example_ids(self) -> list[int]:
        """Its tokens.

        Raises:
            ModelError: The chat template refuses it.
        """
        return chat_ids(self.tokenizer, self.example)


def stored_templates(model: StoredModel) -> dict[str, str]:
    """The chat templates that lie in a folder, by the file that holds them."""
    found: dict[str, str] = {}
    jinja = model.folder / "chat_template.jinja"
    if jinja.is_file():
        found[jinja.name] = jinja.read_text(encoding="utf-8")
    for name in ("tokenizer_config.json", "chat_template.json"):
        template = (read_json(model.folder / name) or {}).get("chat_template")
        if isinstance(template, list):
            template = next((entry.get("template") for entry in template if entry.get("name") == "default"), None)
        if isinstance(template, str):
            found[name] = template
    return found


def own_template(model: StoredModel) -> str | None:
    """The chat template of a folder that transformers uses: the first of ``stored_templates``."""
    return next(iter(stored_templates(model).values()), None)


def finding(rule: str, severity: Severity, message: str) -> Finding:
    """A finding, in short."""
    return Finding(rule=rule, severity=severity, message=message)
