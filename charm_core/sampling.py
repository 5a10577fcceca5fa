"""What it means to sample a response: decoding parameters, how an answer ended, and what was counted.

A missing answer is never silent: every (prompt, policy model) that was asked for is a row with a status.
"""

import re
from collections.abc import Sequence
from typing import Literal

import polars as pl
from pydantic import BaseModel, ConfigDict, Field

from charm_core.records import Record

Status = Literal["complete", "truncated", "empty", "refused", "failed"]
STATUSES: tuple[Status, ...] = ("complete", "truncated", "empty", "refused", "failed")
"""``truncated``: the token limit ended it. ``empty``: no visible character. ``refused``: a content filter, or a short answer
that only declines. ``failed``: the endpoint would not answer, whatever was tried; there is no text to score."""

_REFUSAL_LENGTH = 400
_REFUSAL = re.compile(
    r"^\W*(?:i'?m (?:really |very |so )?sorry\b|sorry\b|i apologi[sz]e\b|unfortunately\b|as an ai\b)?[^.!?]{0,80}?"
    r"\b(?:i (?:can(?:no|')?t|can not|am (?:unable|not able)|'m (?:unable|not able)|won'?t|will not|must decline)|i'm unable)\b",
    re.IGNORECASE,
)


class Decoding(BaseModel):
    """How responses are sampled. The same for all policy models unless one is given its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sampling_temperature: float = Field(default=0.7, ge=0, le=2, description="0 is greedy decoding.")
    top_p: float = Field(default=1.0, gt=0, le=1, description="Nucleus sampling: share of the probability mass kept.")
    max_tokens: int = Field(default=2048, ge=1, description="Most tokens of a response.")
    seed: int | None = Field(default=0, description="Seed, sent where the back end takes one; none: left to it.")
    system_prompt: str | None = Field(default=None, description="System message put before every prompt that has none.")
    stop: tuple[str, ...] = Field(default=(), description="Texts that end a response.")


class SampleCounts(Record):
    """How the answers of one policy model ended."""

    prompts: int = Field(description="Prompts asked.")
    complete: int = 0
    truncated: int = 0
    empty: int = 0
    refused: int = 0
    failed: int = 0
    prompt_tokens: int | None = Field(default=None, description="Tokens sent, where the back end counts them.")
    response_tokens: int | None = Field(default=None, description="Tokens received, likewise.")


def status_of(response: str, finish_reason: str | None) -> Status:
    """How an answer ended.

    Args:
        response: Its text.
        finish_reason: As the OpenAI protocol names it (``stop``, ``length``, ``content_filter``), or None.

    Returns:
        ``refused`` for a filtered answer and for a short one that opens with declining; then ``empty``, ``truncated`` or
        ``complete``. Refusals are recognised by English phrases only; the text is kept either way.
    """
    if finish_reason == "content_filter":
        return "refused"
    if not response.strip():
        return "empty"
    if finish_reason == "length":
        return "truncated"
    short = len(response) <= _REFUSAL_LENGTH
    return "refused" if short and _REFUSAL.match(response.replace("’", "'")) else "complete"


def count_samples(samples: pl.DataFrame) -> SampleCounts:
    """Count the answers of one policy model, or of several together.

    Args:
        samples: SAMPLES.
    """
    by_status = dict(samples.group_by("status").len().iter_rows())
    tokens = {
        name: None if samples.get_column(name).null_count() == samples.height else int(samples.get_column(name).sum())
        for name in ("prompt_tokens", "response_tokens")
    }
    return SampleCounts(prompts=samples.height, **{name: by_status.get(name, 0) for name in STATUSES}, **tokens)


def decoding_differences(decodings: Sequence[tuple[str, Decoding | None]]) -> tuple[str, ...]:
    """Which decoding parameters are not the same for all policy models: a confound of every comparison among them.

    Args:
        decodings: Policy model and how it was sampled; None where that is not known (replayed responses).

    Returns:
        One sentence per parameter that differs, and one that names the policy models whose decoding is not known.
    """
    known = [(model, decoding) for model, decoding in decodings if decoding is not None]
    sentences = []
    for name in Decoding.model_fields:
        values: dict[str, list[str]] = {}
        for model, decoding in known:
            values.setdefault(repr(getattr(decoding, name)), []).append(model)
        if len(values) > 1:
            shown = "; ".join(f"{value} for {', '.join(models)}" for value, models in values.items())
            sentences.append(f"Policy models were sampled with different {name}: {shown}.")
    unknown = [model for model, decoding in decodings if decoding is None]
    if unknown and known:
        sentences.append(
            f"The decoding of {len(unknown)} replayed policy models is not known ({', '.join(unknown)}), while "
            f"{', '.join(model for model, _ in known)} were sampled in this run."
        )
    return tuple(sentences)
