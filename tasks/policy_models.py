"""Which policy models answer, and through what: settings only, shared by sampling and replay."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from charm_core.responses import ColumnNames
from charm_core.sampling import Decoding


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Endpoint(_Settings):
    """A server that speaks the OpenAI protocol: vLLM, SGLang, a hosted one."""

    base_url: str = Field(description="Address up to and including /v1, for example http://127.0.0.1:8000/v1.")
    model: str = Field(description="Name of the model at that server.")
    api_key: str | None = Field(
        default=None,
        description="Name of the secret that holds the key (environment variable or Prefect block); not the key.",
    )
    deployment: str | None = Field(
        default=None,
        description="What stands behind the address, for example a hub revision. With it, a change of the address alone does "
        "not sample again.",
    )
    concurrency: int = Field(default=64, ge=1, le=4096, description="Most requests in flight.")
    timeout_seconds: float = Field(default=600.0, gt=0, description="Longest wait for one answer.")
    max_tries: int = Field(default=6, ge=1, description="Tries per request; only what can pass is tried again.")

    def identity(self) -> dict[str, Any]:
        """What decides the answers: the model, and the deployment or else the address."""
        return {"model": self.model, "deployment": self.deployment or self.base_url.rstrip("/")}


class OpenAIBackend(Endpoint):
    """Sample through an OpenAI-compatible endpoint."""

    kind: Literal["openai"] = "openai"
    cost_per_million_prompt_tokens: float | None = Field(default=None, ge=0, description="For the cost estimate.")
    cost_per_million_response_tokens: float | None = Field(default=None, ge=0, description="For the cost estimate.")


class TransformersBackend(_Settings):
    """Sample in a process of its own with transformers' ``generate``."""

    kind: Literal["transformers"] = "transformers"
    path: str = Field(description="Folder of the policy model (Hugging Face format, safetensors), or a hub id.")
    revision: str | None = Field(default=None, description="Hub revision: a commit hash. Not for a folder.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(default="auto", description="Arithmetic.")
    batch_size: int = Field(default=16, ge=1, description="Prompts answered together.")
    trust_remote_code: bool = Field(default=False, description="Run Python code that comes with this model.")


class VllmBackend(_Settings):
    """Sample in a process of its own with vLLM (optional extra ``vllm``)."""

    kind: Literal["vllm"] = "vllm"
    path: str = Field(description="Folder of the policy model, or a hub id.")
    revision: str | None = Field(default=None, description="Hub revision: a commit hash. Not for a folder.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(default="auto", description="Arithmetic.")
    tensor_parallel: int = Field(default=1, ge=1, description="GPUs per model.")
    max_model_length: int | None = Field(default=None, ge=1, description="Most tokens of prompt and response.")
    trust_remote_code: bool = Field(default=False, description="Run Python code that comes with this model.")


class ReplayBackend(_Settings):
    """Take responses that exist already, matched to the prompts by content."""

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
    allow_missing: bool = Field(
        default=True, description="Accept prompts without a response (they are counted); else that is an error."
    )


Backend = Annotated[OpenAIBackend | TransformersBackend | VllmBackend | ReplayBackend, Field(discriminator="kind")]


class PolicyModel(_Settings):
    """A policy model, by the name that the ratings or the alias table know."""

    name: str = Field(min_length=1, description="Policy model.")
    backend: Backend = Field(description="Where its responses come from.")
    decoding: Decoding | None = Field(default=None, description="Its own decoding; default: that of all.")
