"""What a reward model's scores make of each item: credit, a strict win, ties.

One row per item and measure. Everything else (figures, intervals, comparisons of two reward models) is computed from this
table alone.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import polars as pl

from charm_core.benchmarks.items import BenchmarkItem
from charm_core.tables import TableSchema, validate

OUTCOMES = TableSchema(
    name="benchmark outcomes",
    columns={
        "item_id": pl.String(),
        "subset": pl.String(),
        "metric": pl.String(),
        "stratum": pl.String(),
        "unit": pl.String(),
        "credit": pl.Float64(),
        "won": pl.Boolean(),
        "tied": pl.Float64(),
    },
    key=("item_id", "subset", "metric"),
    nullable=frozenset({"tied"}),
)
"""One row per item and measure. ``credit`` is what the official figure averages, in [0, 1] (only the tie-breaking term of
RewardBench 2's Ties can be negative); ``won``: every right response scores strictly above every wrong one that it is
compared with; ``tied``: share of the decisive comparisons with equal scores; ``unit``: what the bootstrap draws, within
``stratum``."""


class Measure(NamedTuple):
    """What a figure is about."""

    subset: str
    metric: str


class Outcome(NamedTuple):
    """One row of OUTCOMES."""

    item_id: str
    subset: str
    metric: str
    stratum: str
    unit: str
    credit: float
    won: bool
    tied: float | None


@dataclass(frozen=True, kw_only=True)
class ScoredItem:
    """An item with the scores of its responses, in their order."""

    item: BenchmarkItem
    chosen: tuple[float, ...]
    rejected: tuple[float, ...]

    @property
    def margin(self) -> float:
        """Lowest right score minus highest wrong one."""
        return min(self.chosen) - max(self.rejected)

    def outcome(
        self, credit: float, *, won: bool, tied: float | None, subset: str | None = None, metric: str | None = None
    ) -> Outcome:
        """A row for this item."""
        item = self.item
        return Outcome(
            item_id=item.item_id,
            subset=subset or item.subset,
            metric=metric or item.metric,
            stratum=item.stratum or item.subset,
            unit=item.unit,
            credit=credit,
            won=won,
            tied=tied,
        )


Judge = Callable[[Sequence[ScoredItem]], Iterable[Outcome]]
"""A benchmark's rule: how scores become credit."""


def strictly_above(scored: Sequence[ScoredItem]) -> Iterable[Outcome]:
    """Credit 1 if every right response scores strictly above every wrong one, otherwise 0: a tie is a loss."""
    for item in scored:
        margin = item.margin
        for subset in (item.item.subset, *item.item.also_in):
            yield item.outcome(float(margin > 0.0), won=margin > 0.0, tied=float(margin == 0.0), subset=subset)


def shared_top(scored: ScoredItem) -> Outcome:
    """Credit 1/k if the one right response is among k responses with the highest score, otherwise 0."""
    (right,) = scored.chosen
    top = max(right, *scored.rejected)
    at_top = 1 + scored.rejected.count(top)
    credit = 1.0 / at_top if right == top else 0.0
    return scored.outcome(credit, won=credit == 1.0, tied=float(0.0 < credit < 1.0))


def outcomes_table(outcomes: Iterable[Outcome]) -> pl.DataFrame:
    """An OUTCOMES frame.

    Raises:
        TableError: An item occurs twice in one measure, or there is none.
    """
    return validate(pl.DataFrame(list(outcomes), schema=dict(OUTCOMES.columns), orient="row"), OUTCOMES)
