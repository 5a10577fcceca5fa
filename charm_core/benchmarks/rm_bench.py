"""RM-Bench: does a reward model see substance through style?

Each item has three chosen and three rejected responses in rising style: concise, detailed, detailed with markdown. In
the 3×3 matrix of ``chosen > rejected`` (rows chosen), the upper triangle is *hard* (a plainer chosen response against a
more styled rejected one), the diagonal *normal*, the lower triangle *easy*. Ties are losses. Source: arXiv 2410.16184,
METHOD.md section 5.

Example: ``rm_bench(parse_rm_bench([{"id": 1, "prompt": "...", "chosen": [...], "rejected": [...]}], "chat"))``
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
from pydantic import ValidationError

from charm_core.benchmarks.benchmark import Benchmark, BenchmarkSource
from charm_core.benchmarks.figures import Rollup, mean_of
from charm_core.benchmarks.items import BenchmarkItem, conversation
from charm_core.benchmarks.outcomes import Measure, Outcome, ScoredItem
from charm_core.errors import TableError
from charm_core.records import Record

File = Literal["chat", "math", "code", "safety-refuse", "safety-response"]
"""The five files; the two safety files are one domain, pooled by item."""

DOMAINS = ("chat", "math", "code", "safety")
DIFFICULTIES = {"hard": np.triu_indices(3, 1), "normal": np.diag_indices(3), "easy": np.tril_indices(3, -1)}
"""Cells of the matrix of comparisons, rows chosen."""

ROLLUPS = (
    *(
        Rollup(measure=Measure(domain, "accuracy"), parts={Measure(domain, name): 1.0 for name in DIFFICULTIES})
        for domain in DOMAINS
    ),
    *(mean_of("overall", DOMAINS, metric) for metric in ("accuracy", *DIFFICULTIES)),
)
OFFICIAL_ITEMS = {
    Measure(domain, metric): items
    for domain, items in {"chat": 129, "math": 529, "code": 228, "safety": 441}.items()
    for metric in ("accuracy", *DIFFICULTIES)
}


class RmBenchItem(Record):
    """One prompt with its six responses, in rising style."""

    file: File
    item_id: str
    prompt: str
    chosen: tuple[str, str, str]
    rejected: tuple[str, str, str]

    @property
    def unique_id(self) -> str:
        """Unique over the five files."""
        return f"{self.file}/{self.item_id}"

    @property
    def domain(self) -> str:
        """One of ``DOMAINS``."""
        return self.file.partition("-")[0]


def parse_rm_bench(items: Sequence[Mapping[str, Any]], file: File | None = None) -> tuple[RmBenchItem, ...]:
    """Read items in RM-Bench's own JSON format.

    Args:
        items: What the JSON file holds.
        file: Which file this is; taken from each item's ``domain`` (as in ``total_dataset.json``) if None.

    Raises:
        TableError: An item that lacks a field, does not have three responses a side, or occurs twice.
    """
    parsed = tuple(_parse(item, index, file) for index, item in enumerate(items))
    seen: set[str] = set()
    for item in parsed:
        if item.unique_id in seen:
            raise TableError(f"RM-Bench item {item.unique_id!r} occurs twice; keep one")
        seen.add(item.unique_id)
    return parsed


def rm_bench(items: Sequence[RmBenchItem]) -> Benchmark:
    """RM-Bench in the form that all benchmarks have.

    Raises:
        TableError: No items.
    """
    if not items:
        raise TableError("RM-Bench has no items; check the file")
    return Benchmark(
        name="RM-Bench",
        items=tuple(_as_benchmark_item(item) for item in items),
        judge=judge_by_difficulty,
        rollups=ROLLUPS,
        official_items=OFFICIAL_ITEMS,
    )


SOURCE = BenchmarkSource(
    about="RM-Bench: substance against style.",
    read=lambda rows: rm_bench(parse_rm_bench(tuple(rows))),
    hub="THU-KEG/RM-Bench",
    splits=("train",),
    local="total_dataset.json, or {domain}_filtered.json with the domain added to each row as 'domain'",
)


def judge_by_difficulty(scored: Sequence[ScoredItem]) -> Iterable[Outcome]:
    """For each difficulty, the share of an item's three comparisons that are won strictly."""
    for item in scored:
        wins, ties = np.greater.outer(item.chosen, item.rejected), np.equal.outer(item.chosen, item.rejected)
        for difficulty, cells in DIFFICULTIES.items():
            yield item.outcome(
                float(wins[cells].mean()),
                won=bool(wins[cells].all()),
                tied=float(ties[cells].mean()),
                metric=difficulty,
            )


def _parse(item: Mapping[str, Any], index: int, file: File | None) -> RmBenchItem:
    name = file or item.get("domain")
    if name not in get_args(File):
        raise TableError(f"RM-Bench item {index} has the domain {name!r}; it must be one of {list(get_args(File))}")
    missing = [key for key in ("id", "prompt", "chosen", "rejected") if key not in item]
    if missing:
        raise TableError(f"RM-Bench item {index} of {name!r} lacks {missing}; it has {sorted(item)}")
    try:
        return RmBenchItem(
            file=name,
            item_id=str(item["id"]),
            prompt=item["prompt"],
            chosen=tuple(item["chosen"]),
            rejected=tuple(item["rejected"]),
        )
    except ValidationError as error:
        raise TableError(
            f"RM-Bench item {item['id']!r} of {name!r} needs a prompt, three chosen and three rejected texts: {error}"
        ) from error


def _as_benchmark_item(item: RmBenchItem) -> BenchmarkItem:
    return BenchmarkItem(
        item_id=item.unique_id,
        subset=item.domain,
        messages=conversation(item.prompt),
        chosen=item.chosen,
        rejected=item.rejected,
    )
