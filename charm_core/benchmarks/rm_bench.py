"""RM-Bench: does a reward model see substance through style?

Each item has three chosen and three rejected responses in rising style: concise, detailed, detailed with markdown. In
the 3×3 matrix of ``chosen > rejected`` (rows chosen), the upper triangle is *hard* (a plainer chosen response against a
more styled rejected one), the diagonal *normal*, the lower triangle *easy*. Ties are losses. Source: arXiv 2410.16184,
METHOD.md section 5.

Example: ``score_rm_bench(items, scores)`` with scores of the texts that ``rm_bench_texts(items)`` returns; or
``rm_bench(items)``, to score it together with other benchmarks.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from charm_core.benchmarks.benchmark import Benchmark
from charm_core.benchmarks.figures import Rollup, mean_of
from charm_core.benchmarks.items import BenchmarkItem, conversation
from charm_core.benchmarks.outcomes import Measure, Outcome, ScoredItem
from charm_core.errors import TableError
from charm_core.records import Record
from charm_core.tables import MESSAGES, PROMPTS, RESPONSES, SCORES, validate

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

_SIDES = ("chosen", "rejected")


class RmBenchItem(Record):
    """One prompt with its six responses, in rising style."""

    file: File
    item_id: str
    prompt: str
    chosen: tuple[str, str, str]
    rejected: tuple[str, str, str]

    @property
    def prompt_id(self) -> str:
        """Unique over the five files."""
        return f"rm_bench/{self.file}/{self.item_id}"

    @property
    def domain(self) -> str:
        """One of ``DOMAINS``."""
        return self.file.partition("-")[0]


class DomainAccuracy(Record):
    """Shares of comparisons won."""

    domain: str
    items: int
    hard: float
    normal: float
    easy: float

    @property
    def mean(self) -> float:
        """Mean of hard, normal and easy."""
        return (self.hard + self.normal + self.easy) / 3.0


class RmBenchResult(Record):
    """Overall figures are means over the domains."""

    domains: tuple[DomainAccuracy, ...]
    hard: float
    normal: float
    easy: float
    total: float
    tie_rate: float | None = Field(
        default=None, description="Share of comparisons with equal scores (counted as lost)."
    )
    note: str = ""


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
        if item.prompt_id in seen:
            raise TableError(f"RM-Bench item {item.prompt_id!r} occurs twice; keep one")
        seen.add(item.prompt_id)
    return parsed


def rm_bench(items: Sequence[RmBenchItem]) -> Benchmark:
    """RM-Bench in the form that all benchmarks have; its figures are those of ``score_rm_bench``.

    Raises:
        TableError: No items.
    """
    _require_items(items)
    return Benchmark(
        name="RM-Bench",
        items=tuple(_as_benchmark_item(item) for item in items),
        judge=judge_by_difficulty,
        rollups=ROLLUPS,
        official_items=OFFICIAL_ITEMS,
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


def rm_bench_texts(items: Sequence[RmBenchItem]) -> tuple[pl.DataFrame, pl.DataFrame]:
    """What a reward model has to score.

    Returns:
        A PROMPTS and a RESPONSES frame; the "policy models" are chosen-1 to chosen-3 and rejected-1 to rejected-3.
    """
    prompts = pl.DataFrame(
        {
            "prompt_id": [item.prompt_id for item in items],
            "prompt_set": [f"rm_bench/{item.file}" for item in items],
            "messages": [[{"role": "user", "content": item.prompt}] for item in items],
        },
        schema={"prompt_id": pl.String, "prompt_set": pl.String, "messages": MESSAGES},
    )
    rows = [
        (item.prompt_id, _column(side, style), text)
        for item in items
        for side in _SIDES
        for style, text in enumerate(getattr(item, side))
    ]
    responses = pl.DataFrame(rows, schema=dict(RESPONSES.columns), orient="row")
    return validate(prompts, PROMPTS), validate(responses, RESPONSES)


def rm_bench_wins(items: Sequence[RmBenchItem], scores: pl.DataFrame) -> NDArray[np.bool_]:
    """Whether each chosen response scores strictly higher than each rejected one.

    Args:
        items: Parsed items.
        scores: A SCORES frame of the texts of ``rm_bench_texts``; more rows do no harm.

    Returns:
        Shape ``(items, 3, 3)``: chosen style by rejected style.

    Raises:
        TableError: A bad table, or a text without a score.
    """
    chosen, rejected = _chosen_and_rejected(items, scores)
    return np.asarray(chosen[:, :, None] > rejected[:, None, :])


def score_rm_bench(items: Sequence[RmBenchItem], scores: pl.DataFrame) -> RmBenchResult:
    """RM-Bench figures from scores; see ``rm_bench_wins`` for the arguments and errors."""
    chosen, rejected = _chosen_and_rejected(items, scores)
    return _result(items, chosen, rejected)


def rm_bench_replicates(
    items: Sequence[RmBenchItem], scores: pl.DataFrame, replicates: int, *, seed: int = 0
) -> dict[str, list[float]]:
    """Bootstrap over items, within each domain: hard, normal, easy and total of every replicate.

    Args:
        items: Parsed items.
        scores: As for ``rm_bench_wins``.
        replicates: Number of replicates.
        seed: Of the resampling.
    """
    wins = rm_bench_wins(items, scores)
    domains = np.asarray([item.domain for item in items])
    rng = np.random.default_rng(seed)
    figures: dict[str, list[float]] = {"hard": [], "normal": [], "easy": [], "total": []}
    by_domain = [(domain, wins[domains == domain]) for domain in DOMAINS if (domains == domain).any()]
    for _ in range(replicates):
        drawn = [
            accuracy_by_difficulty(part[rng.integers(0, len(part), len(part))], domain) for domain, part in by_domain
        ]
        result = average_domains(drawn)
        for figure, values in figures.items():
            values.append(getattr(result, figure))
    return figures


def rm_bench_length_baseline(items: Sequence[RmBenchItem]) -> RmBenchResult:
    """What a reward model gets that scores a response by its number of characters."""
    lengths = np.asarray(
        [[[len(text) for text in getattr(item, side)] for side in _SIDES] for item in items], dtype=float
    )
    _require_items(items)
    return _result(items, lengths[:, 0], lengths[:, 1])


def accuracy_by_difficulty(wins: NDArray[np.bool_], domain: str) -> DomainAccuracy:
    """Hard, normal and easy accuracy of one domain, pooled over its items, from wins of shape ``(items, 3, 3)``."""
    share = wins.mean(axis=0)
    return DomainAccuracy(
        domain=domain,
        items=len(wins),
        **{difficulty: float(share[cells].mean()) for difficulty, cells in DIFFICULTIES.items()},
    )


def average_domains(domains: Sequence[DomainAccuracy], tie_rate: float | None = None) -> RmBenchResult:
    """Overall figures: unweighted means over the domains, with a note if some of the four are missing."""
    missing = [domain for domain in DOMAINS if domain not in {accuracy.domain for accuracy in domains}]
    hard, normal, easy = (
        float(np.mean([getattr(accuracy, difficulty) for accuracy in domains]))
        for difficulty in ("hard", "normal", "easy")
    )
    return RmBenchResult(
        domains=tuple(domains),
        hard=hard,
        normal=normal,
        easy=easy,
        total=float(np.mean([accuracy.mean for accuracy in domains])),
        tie_rate=tie_rate,
        note=f"without {' and '.join(missing)}: not comparable with published totals" if missing else "",
    )


def _result(items: Sequence[RmBenchItem], chosen: NDArray[np.float64], rejected: NDArray[np.float64]) -> RmBenchResult:
    wins = chosen[:, :, None] > rejected[:, None, :]
    domains = np.asarray([item.domain for item in items])
    present = [domain for domain in DOMAINS if (domains == domain).any()]
    ties = float((chosen[:, :, None] == rejected[:, None, :]).mean())
    return average_domains([accuracy_by_difficulty(wins[domains == domain], domain) for domain in present], ties)


def _chosen_and_rejected(
    items: Sequence[RmBenchItem], scores: pl.DataFrame
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    _require_items(items)
    columns = [_column(side, style) for side in _SIDES for style in range(3)]
    table = validate(scores, SCORES)
    wanted = pl.DataFrame({"prompt_id": [item.prompt_id for item in items for _ in columns]}).with_columns(
        pl.Series("policy_model", columns * len(items))
    )
    found = wanted.join(table, on=["prompt_id", "policy_model"], how="left", maintain_order="left")
    missing = found.filter(pl.col("score").is_null())
    if not missing.is_empty():
        first = missing.select("prompt_id", "policy_model").row(0, named=True)
        raise TableError(
            f"{missing.height} RM-Bench responses have no score, first {first}; score all texts of the items"
        )
    values = found.get_column("score").to_numpy().reshape(len(items), 2, 3)
    return values[:, 0], values[:, 1]


def _parse(item: Mapping[str, Any], index: int, file: File | None) -> RmBenchItem:
    name = file or item.get("domain")
    if name not in get_args(File):
        raise TableError(f"RM-Bench item {index} has the domain {name!r}; it must be one of {list(get_args(File))}")
    missing = [key for key in ("id", "prompt", *_SIDES) if key not in item]
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
        item_id=f"{item.file}/{item.item_id}",
        subset=item.domain,
        messages=conversation(item.prompt),
        chosen=item.chosen,
        rejected=item.rejected,
    )


def _require_items(items: Sequence[RmBenchItem]) -> None:
    if not items:
        raise TableError("RM-Bench has no items; check the file")


def _column(side: str, style: int) -> str:
    return f"{side}-{style + 1}"
