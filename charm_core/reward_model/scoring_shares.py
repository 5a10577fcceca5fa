"""Which responses are scored by whom: shards by content, shares of equal work, and what all of them add up to. No torch.

All responses to one conversation stay together: the engine computes a prompt that they share once, ties are counted among
them, and texts that are equal to the last token are among them too.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from math import comb

import polars as pl

from charm_core.errors import TableError
from charm_core.reward_model.batching import deal_out
from charm_core.reward_model.jobs import ScoringSummary
from charm_core.sampling import shard_numbers

_GROUP, _WORK, _SHARD = "group", "work", "shard"
_CHARACTERS_PER_TOKEN = 4
"""In English, about. Longer texts are cut, so what is beyond the limit is no work."""


@dataclass(frozen=True, kw_only=True)
class ScoringShare:
    """Some of the prompts with all responses to them."""

    prompts: pl.DataFrame
    """PROMPTS."""
    responses: pl.DataFrame
    """RESPONSES."""


def cut_into_shards(prompts: pl.DataFrame, responses: pl.DataFrame, shard_texts: int) -> list[ScoringShare]:
    """Cut responses into shards of about equally many, by the content of their prompts alone.

    Nothing else decides: not who scores them, nor how many do. Another prompt more or less changes one shard.

    Args:
        prompts: PROMPTS.
        responses: RESPONSES.
        shard_texts: Most responses per shard, on average.

    Returns:
        Every response exactly once; prompts without response are left out.

    Raises:
        TableError: A response's prompt is missing.
    """
    grouped = _with_groups(prompts, responses)
    numbers = shard_numbers(grouped.get_column(_GROUP).to_list(), shard_texts)
    parts = grouped.with_columns(pl.Series(_SHARD, numbers)).partition_by(_SHARD, include_key=False, as_dict=True)
    return [_share(prompts, responses, part) for _, part in sorted(parts.items())]


def share_responses(
    prompts: pl.DataFrame, responses: pl.DataFrame, shares: int, max_length: int | None = None
) -> list[ScoringShare]:
    """Deal responses out in shares of about equal work, by characters, most first.

    Args:
        prompts: PROMPTS.
        responses: RESPONSES.
        shares: How many; there are fewer where there are not as many conversations.
        max_length: Most tokens per text that are scored.

    Returns:
        Every response exactly once; the order of the rows plays no part.

    Raises:
        TableError: A response's prompt is missing.
    """
    contents = prompts.select("prompt_id", asked=pl.col("messages").list.eval(_characters()).list.sum())
    texts = _with_groups(prompts, responses).join(contents, on="prompt_id", how="left")
    characters = pl.col("asked") + pl.col("response").str.len_chars()
    most = None if max_length is None else max_length * _CHARACTERS_PER_TOKEN
    work = texts.with_columns(characters.clip(upper_bound=most).alias(_WORK) + 1)
    groups = work.group_by(_GROUP).agg(pl.col(_WORK).sum()).sort(_GROUP)
    dealt = deal_out(groups.get_column(_WORK).to_list(), min(shares, groups.height))
    return [_share(prompts, responses, texts.join(groups[share], on=_GROUP, how="semi")) for share in dealt]


def merge_summaries(parts: Sequence[ScoringSummary], scores: pl.DataFrame) -> ScoringSummary:
    """What scoring met in all shards or shares together.

    Args:
        parts: Their summaries.
        scores: SCORES of all of them.
    """
    tokens = sum(part.tokens for part in parts)
    each = [part.computed_tokens for part in parts if part.computed_tokens is not None]
    computed = sum(each) if len(each) == len(parts) else None
    drifts = [part.batch_drift for part in parts if part.batch_drift is not None]
    tie_rate, smallest_gap = ties(scores)
    return ScoringSummary(
        texts=sum(part.texts for part in parts),
        distinct_texts=sum(part.distinct_texts for part in parts),
        tokens=tokens,
        computed_tokens=computed,
        padding_share=max(0.0, 1 - tokens / computed) if computed else 0.0,
        batching="packed" if all(part.batching == "packed" for part in parts) else "padded",
        batch_drift=max(drifts, default=None),
        max_length=max(part.max_length for part in parts),
        longest_text=max(part.longest_text for part in parts),
        prompts_cut=sum(part.prompts_cut for part in parts),
        responses_cut=sum(part.responses_cut for part in parts),
        empty_responses=sum(part.empty_responses for part in parts),
        tie_rate=tie_rate,
        smallest_gap=smallest_gap,
    )


def ties(scores: pl.DataFrame) -> tuple[float | None, float | None]:
    """Share of equal scores among all pairs of responses to one prompt, and the smallest gap that is not 0."""
    equal = pairs = 0
    smallest: float | None = None
    for values in scores.group_by("prompt_id", maintain_order=True).agg(pl.col("score").sort())["score"].to_list():
        pairs += comb(len(values), 2)
        equal += sum(comb(len(list(same)), 2) for _, same in groupby(values))
        gaps = [high - low for low, high in pairwise(values) if high > low]
        smallest = min([gap for gap in (smallest, *gaps) if gap is not None], default=None)
    return (equal / pairs if pairs else None), smallest


def conversation_digest(messages: Sequence[dict[str, str]]) -> str:
    """What identifies a conversation: its roles and contents, to the last character."""
    content = json.dumps([[message["role"], message["content"]] for message in messages])
    return hashlib.sha256(content.encode()).hexdigest()


def _characters() -> pl.Expr:
    return pl.element().struct.field("content").str.len_chars()


def _with_groups(prompts: pl.DataFrame, responses: pl.DataFrame) -> pl.DataFrame:
    """The responses, each with the digest of its conversation."""
    digests = [conversation_digest(messages) for messages in prompts.get_column("messages").to_list()]
    groups = prompts.select("prompt_id", pl.Series(_GROUP, digests, dtype=pl.String))
    grouped = responses.join(groups, on="prompt_id", how="left", maintain_order="left")
    unknown = grouped.filter(pl.col(_GROUP).is_null()).get_column("prompt_id").unique(maintain_order=True).to_list()
    if unknown:
        raise TableError(
            f"{len(unknown)} prompt ids of the responses table are not in the prompts table, first {unknown[:3]}; "
            "give the prompts that were answered"
        )
    return grouped


def _share(prompts: pl.DataFrame, responses: pl.DataFrame, part: pl.DataFrame) -> ScoringShare:
    """What belongs to some of the responses."""
    cells = part.select("prompt_id", "policy_model")
    return ScoringShare(
        prompts=prompts.join(part, on="prompt_id", how="semi", maintain_order="left"),
        responses=responses.join(cells, on=("prompt_id", "policy_model"), how="semi", maintain_order="left"),
    )
