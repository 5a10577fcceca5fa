"""Which policy models answer, and through what: settings only, shared by sampling and replay."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from charm_core.responses import ColumnNames
from charm_core.sampling import Decoding
from tasks.answering.chat import OpenAIBackend
from tasks.answering.generation import TransformersBackend, VllmBackend


class ReplayBackend(BaseModel):
    """Take responses that exist already, matched to the prompts by content."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["replay"] = "replay"
    source: str = Field(
        description="File, folder or hub dataset: Parquet, JSONL, AlpacaEval outputs, Arena-Hard answers."
    )
    format: Literal["auto", "table", "alpaca_eval", "arena_hard"] = Field(
        default="auto", description="Format; auto recognises AlpacaEval and Arena-Hard files by their fields."
    )
    columns: ColumnNames = Field(default=ColumnNames(), description="Tables only: what the columns are called.")
    where: dict[str, str] = Field(default={}, description="Keep rows whose column equals the value.")
    split: str = Field(default="train", description="Hub datasets only: the split.")
    config: str | None = Field(default=None, description="Hub datasets only: the configuration.")
    revision: str | None = Field(default=None, description="Hub datasets only: a commit hash.")
    repeated: Literal["error", "first"] = Field(
        default="error", description="A prompt with several different responses: an error, or take the first."
    )
    allow_missing: bool = Field(
        default=True, description="Accept prompts without a response (they are counted); else that is an error."
    )

    def described(self) -> str:
        """Where the answers come from, for the report."""
        return f"replayed from {Path(self.source).name}"


LiveBackend = OpenAIBackend | TransformersBackend | VllmBackend
"""What answers when asked: each a ``BackEnd`` with a file of its own in ``tasks/answering/``."""
Backend = Annotated[LiveBackend | ReplayBackend, Field(discriminator="kind")]


class PolicyModel(BaseModel):
    """A policy model, by the name that the ratings or the alias table know."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, description="Policy model.")
    backend: Backend = Field(description="Where its responses come from.")
    decoding: Decoding | None = Field(default=None, description="Its own decoding; default: that of all.")
