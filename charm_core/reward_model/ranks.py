"""The processes of one training run, and what they add up together."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Rank:
    """Which of the processes this is."""

    number: int
    world_size: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """Whether this rank writes the files."""
        return self.number == 0

    def barrier(self) -> None:
        """Wait for the other ranks."""
        if self.world_size > 1:
            dist.barrier()

    def total(self, values: Tensor) -> Tensor:
        """Sum over the ranks."""
        if self.world_size > 1:
            values = values.to(self.device, copy=True)  # all_reduce writes into its argument
            dist.all_reduce(values)
        return values.cpu()

    def gather(self, values: list[str]) -> list[str]:
        """The lists of all ranks, joined."""
        if self.world_size == 1:
            return values
        parts: list[Any] = [None] * self.world_size
        dist.all_gather_object(parts, values)
        return [value for part in parts for value in part]


@dataclass(kw_only=True)
class Totals:
    """Sums over pairs, and over tokens, of a step or an evaluation."""

    loss: float = 0.0
    accuracy: float = 0.0
    margin: float = 0.0
    score: float = 0.0
    pairs: float = 0.0
    tokens: float = 0.0
    wins: Tensor | None = None
    """For win_rate_matching, ``WinRateTargets.sums``."""

    def add(self, losses: Tensor, chosen: Tensor, rejected: Tensor, tokens: int) -> None:
        """Count one micro-batch. Equal scores count as half right."""
        losses, chosen, rejected = (part.detach().double().cpu() for part in (losses, chosen, rejected))
        self.loss += losses.sum().item()
        self.accuracy += ((chosen > rejected).double() + 0.5 * (chosen == rejected).double()).sum().item()
        self.margin += (chosen - rejected).sum().item()
        self.score += (0.5 * (chosen + rejected)).sum().item()
        self.pairs += len(losses)
        self.tokens += tokens

    def means(self, rank: Rank) -> dict[str, float]:
        """Over all ranks: means per pair, and the numbers of pairs and tokens."""
        sums = [self.loss, self.accuracy, self.margin, self.score, self.pairs, self.tokens]
        loss, accuracy, margin, score, pairs, tokens = rank.total(torch.tensor(sums, dtype=torch.float64)).tolist()
        return {
            "loss": loss / pairs,
            "accuracy": accuracy / pairs,
            "margin_mean": margin / pairs,
            "score_mean": score / pairs,
            "pairs": int(pairs),
            "tokens": int(tokens),
        }
