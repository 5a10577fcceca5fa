"""Which policy model answers which prompts in a process of its own, as data: importable without torch."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from charm_core.sampling import Decoding


class PolicyModelSpec(BaseModel):
    """A policy model that runs on this machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    engine: Literal["transformers", "vllm"] = Field(default="transformers", description="What runs it.")
    path: str = Field(description="Folder (Hugging Face format, safetensors), or a hub id.")
    revision: str | None = Field(default=None, description="Hub revision.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(default="auto", description="Arithmetic.")
    batch_size: int = Field(default=16, ge=1, description="transformers only: prompts answered together.")
    tensor_parallel: int = Field(default=1, ge=1, description="vLLM only: GPUs per model.")
    max_model_length: int | None = Field(default=None, ge=1, description="vLLM only: most tokens, prompt and response.")
    trust_remote_code: bool = Field(default=False, description="Run Python code that comes with this model.")


class GenerationJob(BaseModel):
    """Prompts to be answered by a process of its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: PolicyModelSpec
    decoding: Decoding
    prompts_path: Path = Field(description="Parquet with prompt_id and messages, in the order in which to begin.")
    answers_path: Path = Field(description="Where answers go as they come, one JSON line each.")
