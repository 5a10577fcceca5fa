"""What a step that cannot go on was made of, kept in the work folder for somebody to look at."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
from torch import Tensor

from charm_core.errors import ArtifactError
from charm_core.reward_model.batching import PairGroup
from charm_core.reward_model.plan import TrainingData

SCHEMA = pl.Schema(
    {
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
)
"""One row per pair; ``pair`` is its row of the pairs table, scores and losses may be NaN or infinite."""


def described(
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
    pairs = [
        (group.prompt_id, row, *(data.texts[group.texts[side]].input_ids for side in pair))
        for group in batch
        for pair, row in zip(group.pairs, group.rows, strict=True)
    ]
    numbers = zip(*scored.tolist(), strict=True)
    return [
        {
            "rank": rank,
            "micro_batch": number,
            "prompt_id": prompt_id,
            "pair": row,
            "chosen_token_ids": list(chosen_ids),
            "rejected_token_ids": list(rejected_ids),
            "margin": float(data.margins[row]),
            "chosen_score": chosen,
            "rejected_score": rejected,
            "loss": loss,
        }
        for (prompt_id, row, chosen_ids, rejected_ids), (loss, chosen, rejected) in zip(pairs, numbers, strict=True)
    ]


def keep_broken(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Write them as Parquet.

    Raises:
        ArtifactError: The file cannot be written.
    """
    try:
        pl.DataFrame(rows, schema=SCHEMA).write_parquet(file)
    except OSError as error:
        raise ArtifactError(f"the pairs of the broken step cannot be written to {file}: {error}") from error
