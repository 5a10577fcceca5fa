"""Whether training sees the scores that scoring gave: checked in the first step, before any weight has changed.

A doubled BOS, another chat template, a head that was made up or another revision all show as scores that differ from the raw
scores in the pairs table. So the first loss is ln 2 only where the reward model really cannot tell the pairs apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl
import torch
from torch import Tensor

from charm_core.errors import TrainingError
from charm_core.reward_model.jobs import TrainingJob
from charm_core.reward_model.loading import arithmetic_dtype
from charm_core.reward_model.losses import PairTargets, pair_losses
from charm_core.reward_model.spec import TrainingConfig

TOLERANCES = {torch.float32: 1e-3, torch.float16: 0.01, torch.bfloat16: 0.03}
"""What arithmetic explains of a difference, as a share of the largest raw score."""


@dataclass(frozen=True, kw_only=True, order=True)
class ScoreDifference:
    """The largest difference between a score in training and the raw score of the same text."""

    size: float
    prompt_id: str
    found: float
    stored: float


def raw_scores(pairs: pl.DataFrame, rows: Sequence[int]) -> Tensor:
    """Raw scores of rows of the pairs table, ``(2, rows)`` in float64: chosen, rejected."""
    return pairs.select("chosen_score", "rejected_score")[list(rows)].to_torch(dtype=pl.Float64).T


def largest_difference(pairs: pl.DataFrame, rows: Sequence[int], scores: Tensor) -> ScoreDifference | None:
    """Compare with the raw scores.

    Args:
        pairs: PAIRS.
        rows: Rows of it.
        scores: Of these rows, ``(2, rows)`` in float64: chosen, rejected.

    Returns:
        None for no rows.
    """
    if not rows:
        return None
    stored = raw_scores(pairs, rows)
    sizes = (scores - stored).abs()
    side, number = divmod(int(sizes.argmax()), len(rows))
    return ScoreDifference(
        size=sizes[side, number].item(),
        prompt_id=pairs["prompt_id"][rows[number]],
        found=scores[side, number].item(),
        stored=stored[side, number].item(),
    )


def predicted_losses(pairs: pl.DataFrame, rows: Sequence[int], config: TrainingConfig, scale: float) -> Tensor:
    """The pair losses that the raw scores make, without what win rates add; float64."""
    chosen, rejected = raw_scores(pairs, rows)
    calibrated = pairs.select("chosen_calibrated", "rejected_calibrated")[list(rows)].to_torch(dtype=pl.Float64)
    targets = PairTargets(margin=calibrated[:, 0] - calibrated[:, 1], level=calibrated.mean(dim=1))
    return pair_losses(chosen, rejected, targets, config, scale)


def tolerance(job: TrainingJob, device: torch.device, largest: float) -> float:
    """The difference up to which the arithmetic of scoring and of training may explain it.

    Args:
        job: Its model's dtype is that of scoring, its config's that of training.
        device: Where it is trained.
        largest: The largest raw score, without sign.
    """
    dtypes = (arithmetic_dtype(name, device) for name in (job.model.dtype, job.config.dtype))
    return max(TOLERANCES[dtype] for dtype in dtypes) * largest


def disagreement(difference: ScoreDifference, allowed: float, config: TrainingConfig) -> str | None:
    """What there is to say about scores that differ; None if they do not.

    Raises:
        TrainingError: They differ, though ``raw_scores_of`` says that they are this reward model's.
    """
    if difference.size <= allowed:
        return None
    message = (
        f"before training the reward model gives a response to prompt {difference.prompt_id!r} the score {difference.found:.6g}, where "
        f"the pairs table has {difference.stored:.6g}; arithmetic explains a difference of {allowed:.2g}. Look for what differs "
        "from the scoring: the weights or their revision, the head, the chat template (BOS twice?), system_prompt, max_length, "
        "truncation_side, dtype"
    )
    if config.raw_scores_of == "this_model":
        raise TrainingError(message)
    return f"{message}. If the raw scores are another model's, nothing is wrong"
