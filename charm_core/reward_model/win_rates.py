"""The objective ``win_rate_matching``: the reward model's win rates between policy models should be what Elo predicts.

Per pair of policy models, with ``W`` the win rate over the prompts (hard, ties half) and ``P`` the win probability of
their ratings, the loss is the mean over the pairs of ``((W - P) / max(P, 1 - P))²``: the square of the mismatch degree. For
the derivative, and only there, a win is made smooth: ``σ((r_j - r_k) / τ)``. (Matching smooth win rates to P would leave the
hard ones too extreme.)

Why not only regress on calibrated scores: an offset belongs to a policy model, and the reward model can tell only from the
text who wrote it. As far as it cannot, a regression on single responses learns only part of the offset (it is shrunk like
any regression on a noisy predictor), and the win rates stay where they were to that extent. This loss sees win rates and
goes on until they match.

``W`` is a mean over many prompts, so it must be known before any gradient. Given ``W``, each pair has a loss that is linear
in its share of it. There are two ways to know it:

- a first pass over the step without gradients, whose sums are added over micro-batches and ranks. It costs a forward pass,
  and steps must be large.
- memory (``win_rate_memory``): a running mean over about that many of the latest prompts, begun with the untouched reward
  model's own scores. It lags by a step, costs nothing, and lets steps be small.
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

    def wins(self, chosen: Tensor, rejected: Tensor, rows: Sequence[int]) -> Tensor:
        """Every preference pair's share of its policy models' win rate, from the view of the first by name.

        Args:
            chosen: Scores, shape ``(n,)``.
            rejected: Scores, shape ``(n,)``.
            rows: Rows of the pairs table, length n.

        Returns:
            Shape ``(n,)``: 1, 0, or 0.5 for a tie.
        """
        return 0.5 + 0.5 * torch.sign(self._difference(chosen, rejected, rows))

    def smooth_wins(self, chosen: Tensor, rejected: Tensor, rows: Sequence[int], temperature: float) -> Tensor:
        """The same, smooth with a temperature in the scores' unit."""
        return torch.sigmoid(self._difference(chosen, rejected, rows) / temperature)

    def _difference(self, chosen: Tensor, rejected: Tensor, rows: Sequence[int]) -> Tensor:
        forward = torch.as_tensor(self._forward[list(rows)], device=chosen.device)
        return torch.where(forward, chosen - rejected, rejected - chosen)

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

    def counts(self, rows: Sequence[int]) -> Tensor:
        """Number of the given rows per pair of policy models; shape ``(cells,)``."""
        return torch.bincount(torch.as_tensor(self._cell[list(rows)]), minlength=self.cells).double()

    def slopes(self, sums: Tensor, counts: Tensor) -> Tensor:
        """Derivative of ``loss`` with respect to one preference pair's share, per pair of policy models.

        Args:
            sums: Where the win rates are, see ``sums``.
            counts: How many of the step's rows move each of them, see ``counts``.
        """
        degree, known = self._degree(sums)
        moved = known & (counts > 0)
        slopes = torch.zeros(self.cells, dtype=torch.float64)
        slopes[moved] = (2 * degree / self._unit / counts.clamp(min=1))[moved] / moved.sum().clamp(min=1)
        return slopes

    def linear_losses(self, wins: Tensor, rows: Sequence[int], slopes: Tensor) -> Tensor:
        """Losses whose sum over the step has the gradient of ``loss``; shape ``(n,)``."""
        slope = slopes[torch.as_tensor(self._cell[list(rows)])]
        return slope.to(device=wins.device, dtype=wins.dtype) * wins

    def _degree(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        present = sums[1] > 0
        win_rate = sums[0] / sums[1].clamp(min=1)
        return (win_rate - self._probability) / self._unit, present
