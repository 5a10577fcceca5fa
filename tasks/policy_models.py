"""Which policy models answer, and through what: settings only, shared by sampling and replay."""

import ipaddress
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from charm_core.responses import ColumnNames
from charm_core.sampling import Decoding
from tasks.addresses import SECRETLESS_SCHEMA
from tasks.secrets import SECRET_NAME_SCHEMA, check_secret_name


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Endpoint(_Settings):
    """A server that speaks the OpenAI protocol: vLLM, SGLang, a hosted one."""

    base_url: str = Field(
        description="Address up to and including /v1, for example http://127.0.0.1:8000/v1.",
        json_schema_extra=SECRETLESS_SCHEMA,
    )
    model: str = Field(description="Name of the model at that server.")
    api_key: str | None = Field(
        default=None,
        description="Name of the secret that holds the key (environment variable or Prefect block); not the key.",
        json_schema_extra=SECRET_NAME_SCHEMA,
    )
    deployment: str | None = Field(
        default=None,
        description="What stands behind the address, for example a hub revision. With it, a change of the address alone does "
        "not sample again.",
    )
    concurrency: int = Field(default=64, ge=1, le=4096, description="Most requests in flight.")
    timeout_seconds: float = Field(default=600.0, gt=0, description="Longest wait for one answer.")
    max_tries: int = Field(default=6, ge=1, description="Tries per request; only what can pass is tried again.")
    insecure: bool = Field(
        default=False, description="Send the key over plain http to a host that is not in your network."
    )

    @model_validator(mode="after")
    def _key_is_named(self) -> Self:
        if self.api_key is not None:
            check_secret_name(self.api_key, "api_key")
        return self

    @model_validator(mode="after")
    def _address_is_safe(self) -> Self:
        try:
            address = urlsplit(self.base_url)
            host, _ = address.hostname, address.port
        except ValueError as error:
            raise ValueError(f"base_url is not an address ({error}): correct it") from None
        if address.scheme not in ("http", "https") or not host:
            raise ValueError(f"base_url {self.base_url!r} must begin with http:// or https:// and name a host")
        if address.username or address.password or address.query or address.fragment:
            # not shown: there is a password or a key in it
            raise ValueError(
                f"base_url (host {host}) must be a plain address: put the key into a secret, named by api_key"
            )
        if address.scheme == "http" and self.api_key and not (self.insecure or _in_own_network(host)):
            raise ValueError(
                f"base_url {self.base_url!r} would send the key {self.api_key!r} unencrypted over a public network: use https, "
                f"or set insecure if you mean it"
            )
        return self

    def identity(self) -> dict[str, Any]:
        """What decides the answers: the model, and the deployment or else the address."""
        return {"model": self.model, "deployment": self.deployment or self.base_url.rstrip("/")}


def is_loopback(base_url: str) -> bool:
    """Whether an address is of this machine."""
    host = urlsplit(base_url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _in_own_network(host: str) -> bool:
    """Whether a host is, by its name or number, this machine or one of a private network. Names are not looked up."""
    try:
        return ipaddress.ip_address(host).is_private
    except ValueError:
        return "." not in host or host.endswith((".localhost", ".local", ".internal", ".lan", ".home.arpa"))


class OpenAIBackend(Endpoint):
    """Sample through an OpenAI-compatible endpoint."""

    kind: Literal["openai"] = "openai"
    token_limit: Literal["max_tokens", "max_completion_tokens"] = Field(
        default="max_tokens", description="What the server calls the limit; OpenAI's reasoning models want the second."
    )
    leave_out: tuple[Literal["temperature", "top_p", "seed", "stop"], ...] = Field(
        default=(), description="Decoding parameters that this server refuses; they are not sent."
    )
    extra_body: dict[str, JsonValue] = Field(
        default={},
        description="Further fields of every request, for example {chat_template_kwargs = {enable_thinking = false}}.",
    )
    cost_per_million_prompt_tokens: float | None = Field(default=None, ge=0, description="For the cost estimate.")
    cost_per_million_response_tokens: float | None = Field(default=None, ge=0, description="For the cost estimate.")

    def cost(self, prompt_tokens: int | None, response_tokens: int | None) -> float | None:
        """What so many tokens cost, in the unit of the prices; None where a price or a number is not known."""
        parts = (
            (prompt_tokens, self.cost_per_million_prompt_tokens),
            (response_tokens, self.cost_per_million_response_tokens),
        )
        known = [tokens * price / 1e6 for tokens, price in parts if tokens is not None and price is not None]
        return sum(known) if len(known) == len(parts) else None

    def identity(self) -> dict[str, Any]:
        """What decides the answers beside the decoding."""
        return {"kind": self.kind, **super().identity(), "leave_out": sorted(self.leave_out), "extra": self.extra_body}


class TransformersBackend(_Settings):
    """Sample in a process of its own with transformers' ``generate``, on one GPU or on the CPU: for small models."""

    kind: Literal["transformers"] = "transformers"
    path: str = Field(description="Folder of the policy model (Hugging Face format, safetensors), or a hub id.")
    revision: str | None = Field(default=None, description="Hub revision: a commit hash. Not for a folder.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(default="auto", description="Arithmetic.")
    batch_size: int = Field(
        default=16,
        ge=1,
        description="Prompts answered together. In float32 the answers do not depend on it; in bfloat16 rounding does.",
    )
    trust_remote_code: bool = Field(default=False, description="Run Python code that comes with this model.")

    def identity(self) -> dict[str, Any]:
        """What decides the answers beside the weights and the decoding."""
        return {"kind": self.kind, "dtype": self.dtype}


class VllmBackend(_Settings):
    """Sample in a process of its own with vLLM (optional extra ``vllm``)."""

    kind: Literal["vllm"] = "vllm"
    path: str = Field(description="Folder of the policy model, or a hub id.")
    revision: str | None = Field(default=None, description="Hub revision: a commit hash. Not for a folder.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(default="auto", description="Arithmetic.")
    tensor_parallel: int = Field(default=1, ge=1, description="GPUs per model.")
    max_model_length: int | None = Field(default=None, ge=1, description="Most tokens of prompt and response.")
    trust_remote_code: bool = Field(default=False, description="Run Python code that comes with this model.")

    def identity(self) -> dict[str, Any]:
        """What decides the answers beside the weights and the decoding."""
        return {"kind": self.kind, "dtype": self.dtype, "max_model_length": self.max_model_length}


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
    repeated: Literal["error", "first"] = Field(
        default="error", description="A prompt with several different responses: an error, or take the first."
    )
    allow_missing: bool = Field(
        default=True, description="Accept prompts without a response (they are counted); else that is an error."
    )


LiveBackend = OpenAIBackend | TransformersBackend | VllmBackend
Backend = Annotated[LiveBackend | ReplayBackend, Field(discriminator="kind")]


class PolicyModel(_Settings):
    """A policy model, by the name that the ratings or the alias table know."""

    name: str = Field(min_length=1, description="Policy model.")
    backend: Backend = Field(description="Where its responses come from.")
    decoding: Decoding | None = Field(default=None, description="Its own decoding; default: that of all.")
