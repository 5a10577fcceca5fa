"""Answers that a policy model gave in earlier runs, under another cut of the prompts: asked once, taken wherever they fit.

A shard is cached as a whole, so another prompt in it makes it another shard. What its other prompts were answered is
looked up here: by prompt id and exact messages, among all shards that this policy model has answered with this decoding
and that are still in the store. So a larger prompt set, or another size of shards, asks for the new prompts only.
"""

from collections.abc import Iterator, Mapping

import polars as pl
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from charm_core.errors import ArtifactError
from charm_core.sampling import Answer
from charm_core.tables import PROMPTS, SAMPLES
from tasks.store import ArtifactRef, ArtifactStore

Messages = list[dict[str, str]]


class AnsweredShard(BaseModel):
    """Prompts, and what one policy model answered."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompts: ArtifactRef
    samples: ArtifactRef
    served_as: tuple[str, ...] = Field(default=(), description="What the server called the model that answered.")


_SHARDS = TypeAdapter(tuple[AnsweredShard, ...])


def remember_shard(store: ArtifactStore, asked: str, shard: AnsweredShard) -> None:
    """Note that these prompts are answered.

    Args:
        store: Where.
        asked: Who was asked, and how: whatever decides the answers, as a key.
        shard: The prompts and the answers. Of two that are noted at the same moment one may be forgotten.
    """
    known = _known(store, asked)
    if shard.prompts.digest not in {other.prompts.digest for other in known}:
        store.write_note(_name(asked), _SHARDS.dump_json((*known, shard)))


def earlier_answers(store: ArtifactStore, asked: str, wanted: Mapping[str, Messages]) -> Iterator[Answer]:
    """Answers to the wanted prompts, at most one each.

    Args:
        store: Where.
        asked: As in ``remember_shard``.
        wanted: Prompt ids and messages.
    """
    left = dict(wanted)
    for shard in reversed(_known(store, asked)):
        if not left:
            return
        for answer in _taken(store, shard, left):
            del left[answer.prompt_id]
            yield answer


def _taken(store: ArtifactStore, shard: AnsweredShard, wanted: Mapping[str, Messages]) -> Iterator[Answer]:
    try:
        prompts = store.read_table(shard.prompts, PROMPTS)
        same = [
            prompt_id
            for prompt_id, messages in prompts.select("prompt_id", "messages").iter_rows()
            if wanted.get(prompt_id) == messages
        ]
        samples = store.read_table(shard.samples, SAMPLES) if same else pl.DataFrame(schema=dict(SAMPLES.columns))
    except ArtifactError:  # cleared away since
        return
    for row in samples.filter(pl.col("prompt_id").is_in(same)).drop("policy_model").iter_rows(named=True):
        yield Answer(**row, served_as=" or ".join(shard.served_as) or None)


def _known(store: ArtifactStore, asked: str) -> tuple[AnsweredShard, ...]:
    try:
        return _SHARDS.validate_json(store.read_note(_name(asked)))
    except (ArtifactError, ValidationError):  # none yet, or of another form
        return ()


def _name(asked: str) -> str:
    return f"answered {asked}"
