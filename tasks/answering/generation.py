"""Prompts to answers with a model that runs on this machine, in a process of its own."""

import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import polars as pl
from pydantic import Field

from charm_core.errors import SamplingError, TrainingError
from charm_core.reward_model.generation_job import GenerationJob, PolicyModelSpec
from charm_core.sampling import Answer, Decoding
from charm_core.tables import PROMPTS
from tasks.answering.back_end import BackEnd, Prompt
from tasks.launching import run_generation
from tasks.scratch import scratch_folder


class LocalBackEnd(BackEnd):
    """Sample in a process of its own, with weights that are identified by their content or their commit."""

    kind: str
    path: str = Field(description="Folder of the policy model (Hugging Face format, safetensors), or a hub id.")
    revision: str | None = Field(default=None, description="Hub revision: a commit hash. Not for a folder.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(default="auto", description="Arithmetic.")

    def spec(self) -> PolicyModelSpec:
        """The policy model as that process knows it."""
        return PolicyModelSpec.model_validate({"engine": self.kind, **self.model_dump(exclude={"kind"})})

    def described(self) -> str:
        """Where the answers come from, for the report."""
        return f"sampled from {Path(self.path).name} with {self.kind}"

    def ask(
        self,
        decoding: Decoding,
        prompts: Iterable[Prompt],
        on_answer: Callable[[Answer], None],
        stop: threading.Event,
        *,
        answered_before: bool = False,  # noqa: ARG002 - nobody is asked who could be down
    ) -> None:
        """See ``ask_in_process``."""
        ask_in_process(self, decoding, prompts, on_answer, stop)


class TransformersBackend(LocalBackEnd):
    """Sample in a process of its own with transformers' ``generate``, on one GPU or on the CPU: for small models."""

    kind: Literal["transformers"] = "transformers"
    batch_size: int = Field(
        default=16,
        ge=1,
        description="Prompts answered together. In float32 the answers do not depend on it; in bfloat16 rounding does.",
    )
    trust_remote_code: bool = Field(default=False, description="Run Python code that comes with this model.")

    def identity(self) -> dict[str, Any]:
        """What decides the answers beside the weights and the decoding."""
        return {"kind": self.kind, "dtype": self.dtype}


class VllmBackend(LocalBackEnd):
    """Sample in a process of its own with vLLM (optional extra ``vllm``)."""

    kind: Literal["vllm"] = "vllm"
    tensor_parallel: int = Field(default=1, ge=1, description="GPUs per model.")
    max_model_length: int | None = Field(default=None, ge=1, description="Most tokens of prompt and response.")
    trust_remote_code: bool = Field(default=False, description="Run Python code that comes with this model.")

    def identity(self) -> dict[str, Any]:
        """What decides the answers beside the weights and the decoding."""
        return {"kind": self.kind, "dtype": self.dtype, "max_model_length": self.max_model_length}


class _StoppedError(Exception):
    """Nobody waits for the rest any more."""


def ask_in_process(
    backend: LocalBackEnd,
    decoding: Decoding,
    prompts: Iterable[Prompt],
    on_answer: Callable[[Answer], None],
    stop: threading.Event,
) -> None:
    """Have every prompt answered once, until all are or ``stop`` is set.

    Args:
        backend: The policy model.
        decoding: How to answer.
        prompts: In the order in which to begin.
        on_answer: Called once per prompt as its answer comes, in this thread. An interruption loses at most the batch that
            is being answered.
        stop: The process is ended soon after it is set.

    Raises:
        ModelError, ConfigError: The model cannot be used.
        SamplingError: The process failed or was killed.
    """
    with scratch_folder("sampling") as folder:
        job = GenerationJob(
            model=backend.spec(),
            decoding=decoding,
            prompts_path=Path(folder, "prompts.parquet"),
            answers_path=Path(folder, "answers.jsonl"),
        )
        rows = [prompt.model_dump() for prompt in prompts]
        columns = {name: kind for name, kind in PROMPTS.columns.items() if name != "prompt_set"}
        pl.DataFrame(rows, schema=columns).write_parquet(job.prompts_path)
        lines = _NewLines(job.answers_path)

        def hand_on() -> None:
            for line in lines.read():
                on_answer(Answer.model_validate_json(line))

        def poll() -> None:
            hand_on()
            if stop.is_set():
                raise _StoppedError

        try:
            run_generation(job, poll)
        except _StoppedError:
            return
        except TrainingError as error:
            raise SamplingError(
                f"answering with {backend.path!r} failed, what was answered is kept: {error}"
            ) from error
        finally:
            hand_on()


class _NewLines:
    """The whole lines of a growing file, each once."""

    def __init__(self, path: Path) -> None:
        self._path, self._read = path, 0

    def read(self) -> list[bytes]:
        """Those that are new."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._read)
            content = file.read()
        whole = content.rfind(b"\n") + 1
        self._read += whole
        return content[:whole].splitlines()
