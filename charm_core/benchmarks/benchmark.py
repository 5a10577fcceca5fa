"""What all benchmarks share: texts to score, and outcomes from scores.

A benchmark is its items, a rule that turns scores into credit, and weighted averages. The texts of several benchmarks are
one table, in which a text occurs once however many items of however many benchmarks have it.

Example::

    suite = [rewardbench(rows), judgebench(other_rows)]
    prompts, responses = benchmark_texts(suite)
    scores = ...  # one pass of the scoring engine
    results = [benchmark_result(each, benchmark_outcomes(each, scores)) for each in suite]
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import polars as pl

from charm_core.benchmarks.figures import Rollup
from charm_core.benchmarks.items import BenchmarkItem, Row, response_id
from charm_core.benchmarks.outcomes import Judge, Measure, ScoredItem, outcomes_table
from charm_core.errors import TableError
from charm_core.tables import MESSAGES, PROMPTS, RESPONSES, SCORES, validate

PROMPT_SET = "benchmarks"
"""The prompt set of all texts: a prompt that two benchmarks have belongs to both."""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A benchmark with its items."""

    name: str
    items: tuple[BenchmarkItem, ...]
    judge: Judge
    rollups: tuple[Rollup, ...] = ()
    """Parts before wholes."""
    official_items: Mapping[Measure, int] = field(default_factory=dict)
    """How many items a measure has in the official data, in the order in which figures are shown."""
    note: str = ""

    @cached_property
    def cells(self) -> pl.DataFrame:
        """Of every response, the chosen first: item (its position in ``items``), prompt_id and policy_model."""
        rows = [
            (number, prompt_id, response_id(response))
            for number, item in enumerate(self.items)
            for prompt_id in (item.prompt_id,)
            for response in item.responses
        ]
        schema = {"item": pl.Int64, "prompt_id": pl.String, "policy_model": pl.String}
        return pl.DataFrame(rows, schema=schema, orient="row")


@dataclass(frozen=True, kw_only=True)
class BenchmarkSource:
    """A benchmark as the catalogue lists it: what it is, and where its official data is."""

    about: str
    """What it is, for the help of its settings."""
    read: Callable[[Iterable[Row]], Benchmark]
    """From the rows of the hub's dataset, or of local files in the official format, to the benchmark."""
    hub: str | None
    """Dataset on the hub; None where the official data is not there."""
    splits: tuple[str, ...] = ()
    """Splits of the hub's dataset that belong to the benchmark, in the order in which their rows are read."""
    local: str
    """What local files in the official format are."""


def benchmark_texts(benchmarks: Sequence[Benchmark]) -> tuple[pl.DataFrame, pl.DataFrame]:
    """What a reward model has to score, each text once.

    Ids are digests of content, so they do not depend on which other benchmarks there are.

    Returns:
        A PROMPTS and a RESPONSES frame; where policy models would be named stand digests of the responses.

    Raises:
        TableError: No benchmarks.
    """
    prompts: dict[str, list[dict[str, str]]] = {}
    responses: dict[tuple[str, str], str] = {}
    for benchmark in benchmarks:
        texts = (response for item in benchmark.items for response in item.responses)
        for (number, prompt_id, model), response in zip(benchmark.cells.iter_rows(), texts, strict=True):
            responses[prompt_id, model] = response
            if prompt_id not in prompts:
                prompts[prompt_id] = [message.model_dump() for message in benchmark.items[number].messages]
    asked = pl.DataFrame(
        {"prompt_id": list(prompts), "prompt_set": [PROMPT_SET] * len(prompts), "messages": list(prompts.values())},
        schema={"prompt_id": pl.String, "prompt_set": pl.String, "messages": MESSAGES},
    )
    answered = pl.DataFrame(
        [(*cell, response) for cell, response in responses.items()], schema=dict(RESPONSES.columns), orient="row"
    )
    return validate(asked, PROMPTS), validate(answered, RESPONSES)


def score_items(benchmark: Benchmark, scores: pl.DataFrame) -> list[ScoredItem]:
    """Give each item its scores.

    Args:
        benchmark: The benchmark.
        scores: A SCORES frame of the texts of ``benchmark_texts``; more rows do no harm.

    Raises:
        TableError: A bad table, or a text without a score.
    """
    found = benchmark.cells.join(
        validate(scores, SCORES), on=["prompt_id", "policy_model"], how="left", maintain_order="left"
    )
    missing = found.filter(pl.col("score").is_null())
    if not missing.is_empty():
        item = benchmark.items[missing.get_column("item")[0]]
        raise TableError(
            f"{missing.height} responses of {benchmark.name} have no score, first one of the item {item.item_id!r}; "
            f"score all texts of benchmark_texts"
        )
    return _scored(benchmark.items, iter(found.get_column("score").to_list()))


def benchmark_outcomes(benchmark: Benchmark, scores: pl.DataFrame) -> pl.DataFrame:
    """An OUTCOMES frame: what the benchmark's rule makes of the scores; see ``score_items`` for arguments and errors."""
    return outcomes_table(benchmark.judge(score_items(benchmark, scores)))


def length_outcomes(benchmark: Benchmark) -> pl.DataFrame:
    """An OUTCOMES frame of a scorer that knows only the number of characters of a response."""
    lengths = (float(len(text)) for item in benchmark.items for text in item.responses)
    return outcomes_table(benchmark.judge(_scored(benchmark.items, lengths)))


def pair_margins(benchmark: Benchmark, scores: pl.DataFrame) -> pl.DataFrame:
    """Score of the right response minus score of the wrong one, for every pair of them; errors as of ``score_items``.

    Returns:
        Columns unit (what the bootstrap should draw) and margin.
    """
    rows = [
        (scored.item.unit, right - wrong)
        for scored in score_items(benchmark, scores)
        for right in scored.chosen
        for wrong in scored.rejected
    ]
    return pl.DataFrame(rows, schema={"unit": pl.String, "margin": pl.Float64}, orient="row")


def items_with(benchmark: Benchmark, cells: pl.DataFrame) -> int:
    """How many items have one of these responses, for example one that was cut to be scored.

    Args:
        benchmark: The benchmark.
        cells: Columns prompt_id and policy_model, as in the SCORES frame.
    """
    return benchmark.cells.join(cells, on=["prompt_id", "policy_model"], how="semi").get_column("item").n_unique()


def _scored(items: Sequence[BenchmarkItem], values: Iterator[float]) -> list[ScoredItem]:
    return [
        ScoredItem(
            item=item,
            chosen=tuple(next(values) for _ in item.chosen),
            rejected=tuple(next(values) for _ in item.rejected),
        )
        for item in items
    ]
