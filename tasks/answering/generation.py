"""Prompts to answers with a model that runs on this machine, in a process of its own."""

import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import polars as pl

from charm_core.errors import SamplingError, TrainingError
from charm_core.reward_model.generation_job import GenerationJob, PolicyModelSpec
from charm_core.sampling import Answer, Decoding
from charm_core.tables import PROMPTS
from tasks.answering.chat import Prompt
from tasks.launching import run_generation
from tasks.policy_models import TransformersBackend, VllmBackend
from tasks.scratch import scratch_folder


class _StoppedError(Exception):
    """Nobody waits for the rest any more."""


def ask_in_process(
    backend: TransformersBackend | VllmBackend,
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
            model=PolicyModelSpec(engine=backend.kind, **backend.model_dump(exclude={"kind"})),
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
