"""What it means to sample a response: decoding parameters, how an answer ended, and what was counted.

A missing answer is never silent: every (prompt, policy model) that was asked for is a row with a status.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import polars as pl
from pydantic import BaseModel, ConfigDict, Field

from charm_core.records import Record
from charm_core.refusals import is_refusal
from charm_core.tables import SAMPLES, validate

Status = Literal["complete", "truncated", "empty", "refused", "failed"]
STATUSES: tuple[Status, ...] = ("complete", "truncated", "empty", "refused", "failed")
"""``truncated``: the token limit ended it. ``empty``: no visible character. ``refused``: a content filter, or a short answer
that only declines. ``failed``: the endpoint would not answer, whatever was tried; there is no text to score."""


class Decoding(BaseModel):
    """How responses are sampled. The same for all policy models unless one is given its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sampling_temperature: float = Field(default=0.7, ge=0, le=2, description="0 is greedy decoding.")
    top_p: float = Field(default=1.0, gt=0, le=1, description="Nucleus sampling: share of the probability mass kept.")
    max_tokens: int = Field(default=2048, ge=1, description="Most tokens of a response.")
    seed: int | None = Field(default=0, ge=0, description="Seed, sent where the back end takes one; none: left to it.")
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


class Answer(Record):
    """What came of one request: a row of SAMPLES but for the policy model, and what else is worth knowing."""

    prompt_id: str
    response: str
    status: Status
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    response_tokens: int | None = None
    served_as: str | None = Field(default=None, description="What the server calls the model that answered.")
    reason: str | None = Field(default=None, description="Why the request failed.")


def status_of(response: str, finish_reason: str | None) -> Status:
    """How an answer ended.

    Args:
        response: Its text.
        finish_reason: As the OpenAI protocol names it (``stop``, ``length``, ``content_filter``), or None.

    Returns:
        ``refused`` for a filtered answer; else ``empty``, ``truncated``, ``refused`` for one that only declines (see
        ``refusals``) or ``complete``. The text is kept either way.
    """
    if finish_reason == "content_filter":
        return "refused"
    if not response.strip():
        return "empty"
    if finish_reason == "length":
        return "truncated"
    return "refused" if is_refusal(response) else "complete"


def samples_table(policy_model: str, answers: Iterable[Answer]) -> pl.DataFrame:
    """The answers of one policy model as SAMPLES.

    Raises:
        TableError: No answers, or two to one prompt.
    """
    rows = [{"policy_model": policy_model, **answer.model_dump()} for answer in answers]
    return validate(pl.DataFrame(rows, schema=dict(SAMPLES.columns)), SAMPLES)


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


def conversation(messages: Sequence[Mapping[str, str]], system_prompt: str | None) -> list[dict[str, str]]:
    """What a policy model is sent: the prompt, after the system prompt if it has no system message of its own."""
    sent = [{"role": message["role"], "content": message["content"]} for message in messages]
    if system_prompt is None or any(message["role"] == "system" for message in sent):
        return sent
    return [{"role": "system", "content": system_prompt}, *sent]


def request_seed(seed: int | None, prompt_id: str) -> int | None:
    """The seed of one request: its own, so that an answer does not depend on which prompts are asked with it.

    Returns:
        A number from 0 to 2³¹ − 1, or None where there is no seed.
    """
    return None if seed is None else _number(f"{seed}:{prompt_id}") >> 33


def shard_numbers(prompt_ids: Sequence[str], shard_prompts: int) -> list[int]:
    """Cut prompts into shards, by their ids alone.

    The number of shards is the smallest power of two that brings their mean size to ``shard_prompts`` or below, and a
    prompt's shard is given by the first bits of its id's SHA-256. So another prompt more or less changes one shard, and
    where the number of shards doubles, each falls into two.

    Args:
        prompt_ids: Distinct ids, in any order.
        shard_prompts: Most prompts per shard, on average.

    Returns:
        The shard of each prompt, from 0; a small shard may be empty.
    """
    bits = 0
    while len(prompt_ids) > shard_prompts << bits:
        bits += 1
    return [_number(prompt_id) >> (64 - bits) for prompt_id in prompt_ids]


def _number(text: str) -> int:
    """64 bits that are as good as drawn."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
