"""The processes of one training run, and what they add up together."""

import math
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


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

    def told(self, values: list[float]) -> list[float]:
        """The leading rank's numbers, on every rank: what it decides, all do."""
        mine = values if self.leads else [0.0] * len(values)
        return list(self.total(torch.tensor(mine, dtype=torch.float64)).tolist())

    def gather(self, values: list[T]) -> list[T]:
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
    squares: float = 0.0
    pairs: float = 0.0
    tokens: float = 0.0
    wins: Tensor | None = None
    """For win_rate_matching, ``WinRateTargets.sums``."""
    scored: list[Tensor] = field(default_factory=list)
    """Per micro-batch that was counted: losses, scores of chosen and of rejected, ``(3, pairs)``."""

    def add(self, losses: Tensor, chosen: Tensor, rejected: Tensor, tokens: int) -> None:
        """Count one micro-batch. Equal scores count as half right."""
        losses, chosen, rejected = (part.detach().double().cpu() for part in (losses, chosen, rejected))
        self.loss += losses.sum().item()
        self.accuracy += ((chosen > rejected).double() + 0.5 * (chosen == rejected).double()).sum().item()
        self.margin += (chosen - rejected).sum().item()
        self.score += (0.5 * (chosen + rejected)).sum().item()
        self.squares += (0.5 * (chosen - rejected) ** 2).sum().item()
        self.scored.append(torch.stack([losses, chosen, rejected]))
        self.pairs += len(losses)
        self.tokens += tokens

    def means(self, rank: Rank) -> dict[str, float]:
        """Over all ranks: means per pair, and the numbers of pairs and tokens."""
        sums = [self.loss, self.accuracy, self.margin, self.score, self.squares, self.pairs, self.tokens]
        totals = rank.total(torch.tensor(sums, dtype=torch.float64)).tolist()
        loss, accuracy, margin, score, squares, pairs, tokens = totals
        return {
            "loss": loss / pairs,
            "accuracy": accuracy / pairs,
            "margin_mean": margin / pairs,
            "score_mean": score / pairs,
            # the standard deviation of two scores is their difference / √2; what differs between prompts ranks nothing
            "score_spread": math.sqrt(squares / pairs),
            "pairs": int(pairs),
            "tokens": int(tokens),
        }
