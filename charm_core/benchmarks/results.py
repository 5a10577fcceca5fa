"""The figures of a benchmark, each with its interval, its items, its ties and what length alone gets."""

from collections.abc import Iterable, Mapping

import polars as pl
from pydantic import Field

from charm_core.benchmarks.benchmark import Benchmark, length_outcomes
from charm_core.benchmarks.figures import credit_replicates, mean_credits, missing_parts, roll_up
from charm_core.benchmarks.outcomes import OUTCOMES, Measure
from charm_core.errors import TableError
from charm_core.records import Estimate, Record
from charm_core.resampling import percentile_estimate
from charm_core.tables import validate


class Figure(Record):
    """One number of a benchmark."""

    subset: str
    metric: str
    value: Estimate = Field(description="With its bootstrap interval.")
    length_only: float = Field(description="What a scorer gets that knows only the number of characters.")
    items: int
    tie_rate: float | None = Field(
        description="Share of the decisive comparisons with equal scores; None where the metric compares none."
    )
    note: str = ""


class BenchmarkResult(Record):
    """All figures of a benchmark, from the whole to the parts."""

    benchmark: str
    figures: tuple[Figure, ...]
    note: str = ""

    def figure(self, subset: str, metric: str = "accuracy") -> Figure:
        """One of the figures.

        Raises:
            TableError: There is no such figure.
        """
        for figure in self.figures:
            if (figure.subset, figure.metric) == (subset, metric):
                return figure
        names = [(figure.subset, figure.metric) for figure in self.figures]
        raise TableError(f"{self.benchmark} has no figure {(subset, metric)}; it has {names}")


def benchmark_result(
    benchmark: Benchmark, outcomes: pl.DataFrame, *, replicates: int = 1000, seed: int = 0, confidence: float = 0.95
) -> BenchmarkResult:
    """Figures with bootstrap intervals, beside what length alone gets.

    Args:
        benchmark: The benchmark.
        outcomes: Its OUTCOMES frame, from ``benchmark_outcomes``.
        replicates: Bootstrap replicates, at least 1.
        seed: Of the resampling.
        confidence: Coverage of the intervals.

    Raises:
        TableError: A bad table.
    """
    table = validate(outcomes, OUTCOMES)
    values = roll_up(mean_credits(table), benchmark.rollups)
    drawn = roll_up(credit_replicates(table, replicates, seed=seed), benchmark.rollups)
    by_length = roll_up(mean_credits(length_outcomes(benchmark)), benchmark.rollups)
    notes = figure_notes(benchmark, table)
    figures = []
    for measure in figure_order(benchmark, values):
        rows = measure_rows(benchmark, table, measure)
        ties = rows.get_column("tied").drop_nulls()
        figures.append(
            Figure(
                subset=measure.subset,
                metric=measure.metric,
                value=percentile_estimate(values[measure], drawn[measure], confidence),
                length_only=by_length[measure],
                items=rows.get_column("item_id").n_unique(),
                tie_rate=float(ties.sum() / ties.len()) if ties.len() else None,
                note=notes.get(measure, ""),
            )
        )
    return BenchmarkResult(benchmark=benchmark.name, figures=tuple(figures), note=_note(benchmark))


def figure_order(benchmark: Benchmark, measures: Iterable[Measure]) -> list[Measure]:
    """Overall figures first, then averages, then single subsets in the official order."""
    averages = [rollup.measure for rollup in benchmark.rollups if rollup.measure not in benchmark.official_items]
    places = {measure: place for place, measure in enumerate([*averages, *benchmark.official_items])}
    return sorted(
        measures,
        key=lambda measure: (not measure.subset.startswith("overall"), places.get(measure, len(places)), measure),
    )


def measure_rows(benchmark: Benchmark, outcomes: pl.DataFrame, measure: Measure) -> pl.DataFrame:
    """The rows of an OUTCOMES frame that a figure is made of."""
    parts = {rollup.measure: rollup.parts for rollup in benchmark.rollups}
    leaves = pl.DataFrame(sorted(_leaves(measure, parts)), schema=["subset", "metric"], orient="row")
    return outcomes.join(leaves, on=["subset", "metric"], how="semi")


def figure_notes(benchmark: Benchmark, outcomes: pl.DataFrame) -> dict[Measure, str]:
    """Why figures cannot be held against published ones, where they cannot."""
    values = roll_up(mean_credits(outcomes), benchmark.rollups)
    reasons = {
        measure: [f"without {' and '.join(names)}"]
        for measure, names in missing_parts(values, benchmark.rollups).items()
    }
    for measure in values:
        official = benchmark.official_items.get(measure)
        items = measure_rows(benchmark, outcomes, measure).get_column("item_id").n_unique()
        if official is not None and items != official:
            reasons.setdefault(measure, []).append(f"{items} of {official} items")
    for rollup in benchmark.rollups:
        if rollup.measure in values and rollup.measure not in reasons and not reasons.keys().isdisjoint(rollup.parts):
            reasons[rollup.measure] = ["parts of it are incomplete"]
    return {measure: f"{', '.join(why)}: not comparable with published figures" for measure, why in reasons.items()}


def _leaves(measure: Measure, parts: Mapping[Measure, Mapping[Measure, float]]) -> set[Measure]:
    if measure not in parts:
        return {measure}
    return {leaf for part in parts[measure] for leaf in _leaves(part, parts)}


def _note(benchmark: Benchmark) -> str:
    hopeless = sum(item.is_unwinnable for item in benchmark.items)
    same = f"{hopeless} items cannot be won: a right and a wrong response are the same text" if hopeless else ""
    return "; ".join(filter(None, (benchmark.note, same)))
