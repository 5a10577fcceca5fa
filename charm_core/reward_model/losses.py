"""What fine-tuning minimises: one loss per preference pair, of the two scores that the reward model gives.

Scores ``chosen`` and ``rejected`` are float32 tensors of one element per pair. Nothing is averaged here: the trainer
divides by the number of pairs of the whole step, so that the step's loss is their mean whatever micro-batch or rank they
were computed on.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from charm_core.reward_model.spec import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class PairTargets:
    """What the calibrated scores say about each pair, in the scores' own unit."""

    margin: Tensor
    """Calibrated score of chosen minus that of rejected."""
    level: Tensor
    """Mean of the two calibrated scores."""


def bradley_terry(
    chosen: Tensor, rejected: Tensor, *, margin: Tensor | float = 0.0, label_smoothing: float = 0.0
) -> Tensor:
    """``-log σ(d)`` with ``d = chosen - rejected - margin``; equal scores without margin give ln 2.

    With label smoothing ε the pair counts as mislabelled with probability ε: ``-(1-ε) log σ(d) - ε log σ(-d)``.
    """
    difference = chosen - rejected - margin
    return (1 - label_smoothing) * softplus(-difference) + label_smoothing * softplus(difference)


def margin_regression(chosen: Tensor, rejected: Tensor, *, margin: Tensor, scale: float) -> Tensor:
    """``((chosen - rejected - margin) / scale)²``.

    With ``scale`` the root mean square of the training margins, a model that gives every response the same score has a
    mean loss of 1 whatever the unit of its scores.
    """
    return ((chosen - rejected - margin) / scale) ** 2


def centering(chosen: Tensor, rejected: Tensor) -> Tensor:
    """``(chosen + rejected)²``, which pulls the mean score to 0 (Eisenstein et al. 2023, arXiv 2312.09244)."""
    return (chosen + rejected) ** 2


def anchor(chosen: Tensor, rejected: Tensor, *, level: Tensor, scale: float) -> Tensor:
    """``(((chosen + rejected) / 2 - level) / scale)²``.

    Pairs determine only differences; this holds the level where the calibrated scores are. Together with
    ``margin_regression`` both scores are pulled to exactly their calibrated values.
    """
    return (((chosen + rejected) / 2 - level) / scale) ** 2


def pair_losses(chosen: Tensor, rejected: Tensor, targets: PairTargets, config: TrainingConfig, scale: float) -> Tensor:
    """The loss of every pair under a configuration; ``scale`` is the unit of margins (see ``margin_scale``)."""
    if config.objective == "bradley_terry":
        margin = targets.margin if config.use_margin else 0.0
        losses = bradley_terry(chosen, rejected, margin=margin, label_smoothing=config.label_smoothing)
    else:
        losses = margin_regression(chosen, rejected, margin=targets.margin, scale=scale)
    if config.objective == "win_rate_matching":  # the rest of it is not a sum over pairs, see win_rates.py
        losses = config.regression_weight * losses
    if config.centering:
        losses = losses + config.centering * centering(chosen, rejected)
    if config.anchor:
        losses = losses + config.anchor * anchor(chosen, rejected, level=targets.level, scale=scale)
    return losses


def root_mean_square(margins: Tensor) -> float:
    """The default unit of margins; 1 for margins that are all 0."""
    value = torch.sqrt(torch.mean(margins.double() ** 2)).item()
    return value if value > 0 else 1.0
