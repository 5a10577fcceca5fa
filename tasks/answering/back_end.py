"""What every back end is that answers when asked: its settings, who it is, and how it is asked.

There is one file per back end in this folder; ``tasks/policy_models.py`` lists them.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from charm_core.sampling import Answer, Decoding


class Prompt(BaseModel):
    """One row of PROMPTS, but for its set."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt_id: str
    messages: list[dict[str, str]]


class BackEnd(BaseModel, ABC):
    """Settings of a back end, which tell it from others by a field ``kind``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    side_by_side: ClassVar[bool] = False
    """Whether it is asked while others are; not where they would share the memory of this machine."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What decides the answers beside the decoding, for cache keys."""

    @abstractmethod
    def described(self) -> str:
        """Where the answers come from, for the report."""

    @abstractmethod
    def ask(
        self,
        decoding: Decoding,
        prompts: Iterable[Prompt],
        on_answer: Callable[[Answer], None],
        stop: threading.Event,
        *,
        answered_before: bool = False,
    ) -> None:
        """Have every prompt answered once, until all are or ``stop`` is set.

        Args:
            decoding: How to answer.
            prompts: In the order in which to begin; taken as they are needed.
            on_answer: Called once per prompt as its answer comes, in this thread.
            stop: Nothing more is asked once it is set, and what is under way ends soon.
            answered_before: Whether it has answered anything in an earlier run.

        Raises:
            CharmError: Nobody is answered; what was answered is kept.
        """

    def secret_name(self) -> str | None:
        """The secret that it needs, if any: looked for before anybody is asked."""
        return None

    def cost(self, prompt_tokens: int | None, response_tokens: int | None) -> float | None:  # noqa: ARG002 - no prices
        """What so many tokens cost; None where that is not known."""
        return None
