"""The objective ``win_rate_matching``: the reward model's win rates between policy models should be what Elo predicts.

Per pair of policy models, with ``W`` the mean over the step's prompts of ``σ((r_j - r_k) / τ)`` and ``P`` the win
probability of their ratings, the loss is the mean over the pairs of ``((W - P) / max(P, 1 - P))²``: the square of what the
mismatch degree measures, made smooth.

Why not only regress on calibrated scores: an offset belongs to a policy model, and the reward model can tell only from the
text who wrote it. As far as it cannot, a regression on single responses learns only part of the offset (it is shrunk like
any regression on a noisy predictor), and the win rates stay where they were to that extent. This loss sees win rates and
goes on until they match.

``W`` is a mean over the whole step, so it must be known before any gradient: a first pass without gradients gives every
pair's share of it, the sums are added over micro-batches and ranks, and in the second pass each pair has a loss that is
linear in its share. Its gradient is exactly that of the loss above.
"""

from collections.abc import Sequence

import numpy as np
import polars as pl
import torch
from torch import Tensor

from charm_core.elo import select_ratings, win_probability


class WinRateTargets:
    """Which pair of policy models each preference pair belongs to, and what their win rate should be."""

    def __init__(self, pairs: pl.DataFrame, ratings: pl.DataFrame) -> None:
        """Read the targets off the tables.

        Args:
            pairs: PAIRS, in the order in which rows are counted.
            ratings: RATINGS of one board.

        Raises:
            RatingsError: A policy model of the pairs has no rating.
        """
        chosen, rejected = (pairs.get_column(side).to_list() for side in ("chosen_model", "rejected_model"))
        models = sorted({*chosen, *rejected})
        elo = dict(zip(models, select_ratings(ratings, models).get_column("rating").to_list(), strict=True))
        names = sorted({(min(pair), max(pair)) for pair in zip(chosen, rejected, strict=True)})
        index = {pair: number for number, pair in enumerate(names)}
        self._cell = np.array([index[min(p), max(p)] for p in zip(chosen, rejected, strict=True)], dtype=np.int64)
        self._forward = np.array([c < r for c, r in zip(chosen, rejected, strict=True)])
        first, second = ([elo[pair[side]] for pair in names] for side in (0, 1))
        self._probability = torch.tensor(win_probability(first, second))
        self._unit = torch.maximum(self._probability, 1 - self._probability)

    @property
    def cells(self) -> int:
        """Number of pairs of policy models."""
        return len(self._probability)

    def wins(self, chosen: Tensor, rejected: Tensor, rows: Sequence[int], temperature: float) -> Tensor:
        """Every preference pair's share of its policy models' win rate, from the view of the first by name.

        Args:
            chosen: Scores, shape ``(n,)``.
            rejected: Scores, shape ``(n,)``.
            rows: Rows of the pairs table, length n.
            temperature: τ, in the scores' unit.

        Returns:
            Shape ``(n,)``, in [0, 1].
        """
        forward = torch.as_tensor(self._forward[list(rows)], device=chosen.device)
        sign = torch.where(forward, 1.0, -1.0)
        return torch.sigmoid(sign * (chosen - rejected) / temperature)

    def sums(self, wins: Tensor, rows: Sequence[int]) -> Tensor:
        """Sum of the shares, and their number, per pair of policy models; shape ``(2, cells)``, float64, on the CPU.

        Sums of micro-batches and ranks may be added.
        """
        cell = torch.as_tensor(self._cell[list(rows)])
        sums = torch.zeros((2, self.cells), dtype=torch.float64)
        sums[0].index_add_(0, cell, wins.detach().double().cpu())
        sums[1].index_add_(0, cell, torch.ones(len(cell), dtype=torch.float64))
        return sums

    def loss(self, sums: Tensor) -> float:
        """Mean over the pairs of policy models that occur of ``((W - P) / max(P, 1 - P))²``."""
        degree, present = self._degree(sums)
        return float((degree[present] ** 2).mean())

    def slopes(self, sums: Tensor) -> Tensor:
        """Derivative of ``loss`` with respect to one preference pair's share, per pair of policy models."""
        degree, present = self._degree(sums)
        slopes = torch.zeros(self.cells, dtype=torch.float64)
        slopes[present] = (2 * degree / self._unit / sums[1])[present] / present.sum()
        return slopes

    def linear_losses(self, wins: Tensor, rows: Sequence[int], slopes: Tensor) -> Tensor:
        """Losses whose sum over the step has the gradient of ``loss``; shape ``(n,)``."""
        slope = slopes[torch.as_tensor(self._cell[list(rows)])]
        return slope.to(device=wins.device, dtype=wins.dtype) * wins

    def _degree(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        present = sums[1] > 0
        win_rate = sums[0] / sums[1].clamp(min=1)
        return (win_rate - self._probability) / self._unit, present
