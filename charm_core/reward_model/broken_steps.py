"""What a step that cannot go on was made of, kept in the work folder for somebody to look at."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import Tensor

from charm_core.errors import ArtifactError, TrainingError
from charm_core.reward_model.batching import PairGroup
from charm_core.reward_model.plan import TrainingData
from charm_core.reward_model.ranks import Rank, Totals

SCHEMA: dict[str, Any] = {
    "rank": pl.Int64,
    "micro_batch": pl.Int64,
    "prompt_id": pl.String,
    "pair": pl.Int64,
    "chosen_token_ids": pl.List(pl.Int64),
    "rejected_token_ids": pl.List(pl.Int64),
    "margin": pl.Float64,
    "chosen_score": pl.Float64,
    "rejected_score": pl.Float64,
    "loss": pl.Float64,
}
"""One row per pair; ``pair`` is its row of the pairs table, scores and losses may be NaN or infinite."""


def stop_if_broken(
    what: str,
    batches: Sequence[Sequence[PairGroup]],
    totals: Totals,
    data: TrainingData,
    rank: Rank,
    file: Path,
    *,
    everything: bool,
) -> None:
    """Stop every rank, if a loss or score of one of them is NaN or infinite; what it belongs to is kept in a file.

    Args:
        what: What is broken, for the message.
        batches: This rank's micro-batches.
        totals: What was counted of them.
        data: Where their texts are.
        rank: Which process this is; all take part.
        file: Where the broken micro-batches go.
        everything: Something is broken in any case, and all micro-batches belong to it.

    Raises:
        TrainingError: Something is broken.
        ArtifactError: The file cannot be written.
    """
    counted = [(number, batch) for number, batch in enumerate(batches) if batch]
    mine = [
        row
        for (number, batch), scored in zip(counted, totals.scored, strict=True)
        if everything or not torch.isfinite(scored).all()
        for row in _described(batch, scored, data, rank=rank.number, number=number)
    ]
    rows = rank.gather(mine)
    if not rows:
        return
    if rank.leads:
        _keep(rows, file)
    rank.barrier()
    prompt_ids = sorted({row["prompt_id"] for row in rows})
    raise TrainingError(
        f"{what} is NaN or infinite; its {len(prompt_ids)} prompts are {', '.join(prompt_ids[:10])}"
        f"{', ...' if len(prompt_ids) > 10 else ''}. Token ids, scores and losses of their pairs are in {file}: look at them, lower "
        "the learning rate, or use dtype='float32'"
    )


def _described(
    batch: Sequence[PairGroup], scored: Tensor, data: TrainingData, *, rank: int, number: int
) -> list[dict[str, Any]]:
    """The pairs of a micro-batch, as rows of ``SCHEMA``.

    Args:
        batch: Its prompts.
        scored: Losses, scores of chosen and scores of rejected, ``(3, pairs)``.
        data: Where its texts are.
        rank: Which process it was dealt to.
        number: Its place among that process's micro-batches of the step.
    """
    pairs = [(group, pair, row) for group in batch for pair, row in zip(group.pairs, group.rows, strict=True)]
    return [
        {
            "rank": rank,
            "micro_batch": number,
            "prompt_id": group.prompt_id,
            "pair": row,
            "chosen_token_ids": list(data.texts[group.texts[pair[0]]].input_ids),
            "rejected_token_ids": list(data.texts[group.texts[pair[1]]].input_ids),
            "margin": float(data.margins[row]),
            "chosen_score": chosen,
            "rejected_score": rejected,
            "loss": loss,
        }
        for (group, pair, row), (loss, chosen, rejected) in zip(pairs, scored.T.tolist(), strict=True)
    ]


def _keep(rows: Sequence[dict[str, Any]], file: Path) -> None:
    try:
        pl.DataFrame(rows, schema=SCHEMA).write_parquet(file)
    except OSError as error:
        raise ArtifactError(f"the pairs of the broken step cannot be written to {file}: {error}") from error
