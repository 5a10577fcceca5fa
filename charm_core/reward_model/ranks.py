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
    """What is counted of the micro-batches of a step or an evaluation; numbers stay on the GPU until they are asked for."""

    tokens: float = 0.0
    wins: Tensor | None = None
    """For win_rate_matching, ``WinRateTargets.sums``."""
    _scored: list[Tensor] = field(default_factory=list)

    def add(self, losses: Tensor, chosen: Tensor, rejected: Tensor, tokens: int) -> None:
        """Count one micro-batch."""
        self._scored.append(torch.stack([losses.detach(), chosen.detach(), rejected.detach()]))
        self.tokens += tokens

    @property
    def scored(self) -> list[Tensor]:
        """Per micro-batch that was counted: losses, scores of chosen and of rejected, ``(3, pairs)``, float64 on the CPU."""
        self._scored = [part.double().cpu() for part in self._scored]
        return self._scored

    def means(self, rank: Rank) -> dict[str, float]:
        """Over all ranks: means per pair, and the numbers of pairs and tokens. Equal scores count as half right."""
        sums = [0.0] * 5
        for losses, chosen, rejected in self.scored:
            right = (chosen > rejected).double() + 0.5 * (chosen == rejected).double()
            middle, squares = 0.5 * (chosen + rejected), 0.5 * (chosen - rejected) ** 2
            more = (losses, right, chosen - rejected, middle, squares)
            sums = [total + part.sum().item() for total, part in zip(sums, more, strict=True)]
        sums += [float(sum(part.shape[1] for part in self.scored)), self.tokens]
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
