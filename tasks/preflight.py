"""Pre-flight of a reward model: what is wrong with it, known before anything is scored with it."""

import contextlib
from pathlib import Path

import polars as pl

from charm_core.reward_model.findings import Finding, PreflightJob, PreflightReport, Severity
from charm_core.reward_model.spec import RewardModelSpec, TrainingConfig
from charm_core.tables import PROMPTS, RESPONSES
from tasks.launching import run_preflight
from tasks.nodes import machine_count
from tasks.prompts import ResponseSet
from tasks.scoring import RewardModelRef
from tasks.scratch import scratch_folder
from tasks.store import ArtifactStore

__all__ = ["Finding", "PreflightReport", "Severity", "check_before_run"]

MOST_TEXTS = 200
MOST_CHARACTERS = 600_000
"""Of the sample; tokenising that takes about a second."""


def check_before_run(
    store: ArtifactStore,
    model: RewardModelRef | RewardModelSpec,
    responses: ResponseSet | None = None,
    training: TrainingConfig | None = None,
) -> PreflightReport:
    """Look at a reward model, in a process of its own and without loading its weights; takes a few seconds.

    Not a cached step: it looks at this machine too, and at settings that change no score.

    Args:
        store: Where the responses are, and the model if it is one of ours.
        model: The reward model.
        responses: What it is to score; a sample is looked at.
        training: How it is to be fine-tuned, if it is.

    Returns:
        The findings. ``raise_on_errors()`` stops where there is an error; warnings and infos never stop a run.

    Raises:
        ServiceError: The model is on the hub, which does not answer.
    """
    with scratch_folder("preflight") as folder, contextlib.ExitStack() as stack:
        spec = stack.enter_context(model.local_spec(store)) if isinstance(model, RewardModelRef) else model
        job = PreflightJob(
            model=spec, training=training, machines=machine_count(), report_path=Path(folder, "report.json")
        )
        if responses is not None:
            texts = sample_texts(store, responses)
            path = Path(folder, "texts.parquet")
            texts.write_parquet(path)
            job = job.model_copy(update={"texts_path": path, "texts_in_all": responses.responses.rows})
        return run_preflight(job)


def sample_texts(store: ArtifactStore, responses: ResponseSet) -> pl.DataFrame:
    """Some prompts with their responses, the same ones every time: columns ``messages`` and ``response``."""
    answered = store.read_table(responses.responses, RESPONSES)
    drawn = answered.sample(min(MOST_TEXTS, answered.height), seed=0, shuffle=True)
    prompts = store.read_table(responses.prompts, PROMPTS).select("prompt_id", "messages")
    texts = drawn.join(prompts, on="prompt_id", how="inner", maintain_order="left").select("messages", "response")
    contents = pl.col("messages").list.eval(pl.element().struct.field("content").str.len_chars()).list.sum()
    characters = (contents + pl.col("response").str.len_chars()).cum_sum()
    # At least one text, however long it is.
    return texts.filter((characters <= MOST_CHARACTERS) | (pl.int_range(pl.len()) == 0))
