"""Whether training sees the scores that scoring gave: checked in the first step, before any weight has changed.

A doubled BOS, another chat template, a head that was made up or another revision all show as scores that differ from the raw
scores in the pairs table. So the first loss is ln 2 only where the reward model really cannot tell the pairs apart.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl
import torch
from torch import Tensor

from charm_core.errors import TrainingError
from charm_core.reward_model.batching import PairGroup
from charm_core.reward_model.jobs import TrainingJob
from charm_core.reward_model.loading import arithmetic_dtype
from charm_core.reward_model.losses import PairTargets, pair_losses
from charm_core.reward_model.ranks import Rank, Totals
from charm_core.reward_model.spec import TrainingConfig
from charm_core.reward_model.win_rates import WinRateTargets

logger = logging.getLogger(__name__)

TOLERANCES = {torch.float32: 1e-3, torch.float16: 0.01, torch.bfloat16: 0.03}
"""What arithmetic explains of a difference, as a share of the largest raw score."""


@dataclass(frozen=True, kw_only=True, order=True)
class ScoreDifference:
    """A score in training and the raw score of the same text; the largest sorts last."""

    size: float
    prompt_id: str
    found: float
    stored: float


def compare_with_raw_scores(
    job: TrainingJob, pairs: pl.DataFrame, batches: Sequence[Sequence[PairGroup]], totals: Totals, rank: Rank
) -> float:
    """Compare the scores of the first step with the raw scores in the pairs table; log a warning if they differ.

    Args:
        job: What is trained, and on what word about the raw scores.
        pairs: Its PAIRS.
        batches: This rank's micro-batches of the step.
        totals: What was counted of them.
        rank: Which process this is; all take part.

    Returns:
        The largest difference, on all ranks.

    Raises:
        TrainingError: They differ by more than arithmetic explains, though ``raw_scores_of`` says that they are this reward
            model's.
    """
    mine = [row for batch in batches for group in batch for row in group.rows]
    scores = torch.cat([scored[1:] for scored in totals.scored], dim=1).T if mine else torch.zeros((0, 2))
    difference = max(rank.gather(largest_difference(pairs, mine, scores)))
    largest = _two_columns(pairs, range(pairs.height), "score").abs().max().item()
    allowed = tolerance(job, rank.device) * largest
    if difference.size > allowed and job.config.raw_scores_of != "another_model":
        message = _disagreement(difference, allowed)
        if job.config.raw_scores_of == "this_model":
            raise TrainingError(message)
        if rank.leads:
            logger.warning("%s. If the raw scores are another model's, set training.raw_scores_of to say so", message)
    return difference.size


def largest_difference(pairs: pl.DataFrame, rows: Sequence[int], scores: Tensor) -> list[ScoreDifference]:
    """Compare scores of rows of the pairs table, ``(rows, 2)``, with its raw scores; of no rows there is none."""
    if not rows:
        return []
    stored = _two_columns(pairs, rows, "score")
    sizes = (scores - stored).abs()
    number, side = divmod(int(sizes.argmax()), 2)
    return [
        ScoreDifference(
            size=sizes[number, side].item(),
            prompt_id=pairs["prompt_id"][rows[number]],
            found=scores[number, side].item(),
            stored=stored[number, side].item(),
        )
    ]


def tolerance(job: TrainingJob, device: torch.device) -> float:
    """The difference that the arithmetic of scoring and of training may explain, as a share of the largest raw score.

    Args:
        job: Its model's dtype is that of scoring, its config's that of training.
        device: Where it is trained, and is taken to have been scored.
    """
    return max(TOLERANCES[arithmetic_dtype(name, device)] for name in (job.model.dtype, job.config.dtype))


def predicted_loss(
    pairs: pl.DataFrame,
    groups: Sequence[PairGroup],
    config: TrainingConfig,
    scale: float,
    win_rates: WinRateTargets | None,
) -> float:
    """The loss of a step if the scores were the raw scores.

    Args:
        pairs: PAIRS.
        groups: All groups of the step.
        config: The objective.
        scale: Unit of the margins.
        win_rates: For win_rate_matching.
    """
    rows = [row for group in groups for row in group.rows]
    chosen, rejected = _two_columns(pairs, rows, "score").T
    calibrated = _two_columns(pairs, rows, "calibrated")
    targets = PairTargets(margin=calibrated[:, 0] - calibrated[:, 1], level=calibrated.mean(dim=1))
    loss = pair_losses(chosen, rejected, targets, config, scale).mean().item()
    if win_rates is None:
        return loss
    return loss + win_rates.loss(win_rates.sums(win_rates.wins(chosen, rejected, rows), rows))


def _two_columns(pairs: pl.DataFrame, rows: Sequence[int], kind: str) -> Tensor:
    """Of chosen and of rejected, ``(rows, 2)`` in float64."""
    return pairs.select(f"chosen_{kind}", f"rejected_{kind}")[list(rows)].to_torch(dtype=pl.Float64)


def _disagreement(difference: ScoreDifference, allowed: float) -> str:
    return (
        f"before training the reward model gives a response to prompt {difference.prompt_id!r} the score {difference.found:.6g}, where "
        f"the pairs table has {difference.stored:.6g}; arithmetic explains a difference of {allowed:.2g}. Look for what differs "
        "from the scoring: the weights or their revision, the head, the chat template (BOS twice?), system_prompt, max_length, "
        "truncation_side, dtype"
    )
