"""Benchmarks of reward models: all texts scored in one pass, figures with intervals, paired tests, reliability."""

from collections.abc import Mapping, Sequence

import polars as pl
from pydantic import BaseModel, ConfigDict

from charm_core.benchmarks.benchmark import Benchmark, benchmark_outcomes, pair_margins
from charm_core.benchmarks.comparison import BenchmarkComparison, compare_outcomes
from charm_core.benchmarks.outcomes import OUTCOMES, Measure
from charm_core.benchmarks.results import BenchmarkResult, benchmark_result, measure_rows
from charm_core.probability_calibration import (
    ProbabilityCalibration,
    fit_score_temperature,
    pair_probabilities,
    probability_calibration,
)
from charm_core.reward_model.scoring_shares import ties
from charm_core.tables import SCORES
from tasks.benchmark_sources import BenchmarksConfig, Resampling, StoredBenchmark, load_benchmarks
from tasks.caching import current_store, step
from tasks.evidence import BenchmarkRows
from tasks.pages.report_data import BenchmarkRow, BenchmarkTest, ReportReliability, VariantName, VariantValue
from tasks.publishing import run_logger
from tasks.scoring import RewardModelRef
from tasks.scoring_lines import ties_line
from tasks.store import ArtifactRef, ArtifactStore
from tasks.text_scores import ScoredTexts, score_texts

Compared = tuple[tuple[VariantName, VariantName], ...]

COMPARED: Compared = (("untouched", "calibrated"), ("control", "calibrated"))
"""Pairs of variants that are tested against each other, where there are both."""


class JudgedBenchmark(BaseModel):
    """One reward model on one benchmark."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    outcomes: ArtifactRef
    """OUTCOMES: what it got item by item."""
    evidence: ArtifactRef
    """A BenchmarkEvidence."""


class BenchmarkEvidence(BaseModel):
    """All numbers of one reward model on one benchmark."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    result: BenchmarkResult
    truncated: tuple[int, ...] | None
    """Per figure of the result: items with a text that was cut. None: not known."""
    as_scored: ProbabilityCalibration
    score_temperature: float | None
    rescaled: ProbabilityCalibration | None


def run_benchmarks(
    config: BenchmarksConfig, models: Mapping[VariantName, RewardModelRef], compared: Compared = COMPARED
) -> tuple[ArtifactRef, ...]:
    """Put reward models to the benchmarks that are asked for.

    Args:
        config: Which benchmarks.
        models: Reward models by variant.
        compared: Pairs of variants to be tested against each other.

    Returns:
        A BenchmarkRows for each benchmark.

    Raises:
        ConfigError: A file that does not exist, or a hub dataset without its commit.
        TableError: Rows that are not in the official format.
    """
    benchmarks = load_benchmarks(config)
    if not benchmarks:
        return ()
    scored = {name: score_benchmarks(model, benchmarks) for name, model in models.items()}
    return judge_scored(benchmarks, scored, config.resampling, compared)


def score_benchmarks(model: RewardModelRef, benchmarks: Sequence[StoredBenchmark]) -> tuple[ScoredTexts, ...]:
    """Score the texts of all benchmarks in one pass; only those are scored that never were."""
    return score_texts(model, tuple(benchmark.texts for benchmark in benchmarks))


def judge_scored(
    benchmarks: Sequence[StoredBenchmark],
    scored: Mapping[VariantName, Sequence[ScoredTexts]],
    resampling: Resampling,
    compared: Compared = COMPARED,
) -> tuple[ArtifactRef, ...]:
    """Figures, tests and reliability from scores; how many of them tie is logged.

    Args:
        benchmarks: The benchmarks.
        scored: Of every variant the scores of every benchmark, in order.
        resampling: The bootstrap.
        compared: Pairs of variants to be tested against each other.

    Returns:
        A BenchmarkRows for each benchmark.
    """
    tables = []
    for index, benchmark in enumerate(benchmarks):
        _log_ties(benchmark, {name: sets[index] for name, sets in scored.items()})
        judged = {name: judge_benchmark(benchmark, sets[index], resampling) for name, sets in scored.items()}
        comparisons = tuple(
            (
                before,
                after,
                compare_on_benchmark(benchmark, judged[before].outcomes, judged[after].outcomes, resampling),
            )
            for before, after in compared
            if before in judged and after in judged
        )
        tables.append(tabulate_benchmark(tuple(judged.items()), comparisons))
    return tuple(tables)


def _log_ties(benchmark: StoredBenchmark, scored: Mapping[VariantName, ScoredTexts]) -> None:
    """Outside of the cached steps, so that it is said whether or not anything had to be scored."""
    for name, texts in scored.items():
        tie_rate, smallest_gap = ties(current_store().read_table(texts.scores, SCORES))
        run_logger().info("%s, %s: %s", benchmark.name, name, ties_line(tie_rate, smallest_gap))


@step(version=1)
def judge_benchmark(
    store: ArtifactStore, benchmark: StoredBenchmark, scored: ScoredTexts, resampling: Resampling
) -> JudgedBenchmark:
    """What a reward model's scores are worth on one benchmark."""
    read = benchmark.read(store)
    scores = store.read_table(scored.scores, SCORES)
    outcomes = benchmark_outcomes(read, scores)
    result = benchmark_result(
        read,
        outcomes,
        replicates=resampling.replicates,
        seed=resampling.seed,
        confidence=resampling.confidence,
    )
    cut = _cut_items(read, store.read_frame(scored.cut)) if scored.cut else None
    margins = pair_margins(read, scores)
    temperature = fit_score_temperature(margins.get_column("margin"))
    evidence = BenchmarkEvidence(
        result=result,
        truncated=None if cut is None else _cut_per_figure(read, outcomes, result, cut),
        as_scored=_reliability(margins, 1.0, resampling),
        score_temperature=temperature,
        rescaled=_reliability(margins, temperature, resampling) if temperature is not None else None,
    )
    return JudgedBenchmark(
        outcomes=store.write_table(outcomes, OUTCOMES), evidence=store.write_record(evidence, "benchmark_evidence")
    )


@step(version=1)
def compare_on_benchmark(
    store: ArtifactStore, benchmark: StoredBenchmark, before: ArtifactRef, after: ArtifactRef, resampling: Resampling
) -> ArtifactRef:
    """Two reward models item by item: exact tests of subsets, corrected for their number; bootstrap for averages."""
    comparison = compare_outcomes(
        benchmark.read(store),
        store.read_table(before, OUTCOMES),
        store.read_table(after, OUTCOMES),
        replicates=resampling.replicates,
        seed=resampling.seed,
        confidence=resampling.confidence,
    )
    return store.write_record(comparison, "benchmark_comparison")


@step(version=1)
def tabulate_benchmark(
    store: ArtifactStore,
    judged: tuple[tuple[VariantName, JudgedBenchmark], ...],
    comparisons: tuple[tuple[VariantName, VariantName, ArtifactRef], ...],
) -> ArtifactRef:
    """The lines of one benchmark, with a number for each reward model and the tests between them."""
    evidence = {name: store.read_record(one.evidence, BenchmarkEvidence) for name, one in judged}
    compared = [(before, after, store.read_record(ref, BenchmarkComparison)) for before, after, ref in comparisons]
    first = next(iter(evidence.values())).result
    rows = tuple(
        BenchmarkRow(
            benchmark=first.benchmark,
            subset=figure.subset,
            metric=figure.metric,
            items=figure.items,
            values=tuple(_value(name, one, index) for name, one in evidence.items()),
            length_only=figure.length_only,
            tests=tuple(_test(before, after, one, index) for before, after, one in compared),
            note="; ".join(filter(None, (figure.note, first.note if index == 0 else ""))),
        )
        for index, figure in enumerate(first.figures)
    )
    reliability = tuple(
        ReportReliability(benchmark=first.benchmark, variant=name, **one.model_dump(include=set(_RELIABILITY_FIELDS)))
        for name, one in evidence.items()
    )
    return store.write_record(BenchmarkRows(rows=rows, reliability=reliability), "benchmark")


_RELIABILITY_FIELDS = ("as_scored", "score_temperature", "rescaled")


def _value(name: VariantName, evidence: BenchmarkEvidence, index: int) -> VariantValue:
    figure = evidence.result.figures[index]
    return VariantValue(
        variant=name,
        value=figure.value,
        tie_rate=figure.tie_rate,
        truncated=evidence.truncated[index] if evidence.truncated else None,
    )


def _test(before: VariantName, after: VariantName, comparison: BenchmarkComparison, index: int) -> BenchmarkTest:
    figure = comparison.figures[index]
    return BenchmarkTest(before=before, after=after, difference=figure.difference, test=figure.test)


def _cut_items(benchmark: Benchmark, cut: pl.DataFrame) -> list[str]:
    """Ids of the items with a text that was cut."""
    cells = benchmark.cells.join(cut, on=["prompt_id", "policy_model"], how="semi")
    return [benchmark.items[number].item_id for number in cells.get_column("item").unique()]


def _cut_per_figure(
    benchmark: Benchmark, outcomes: pl.DataFrame, result: BenchmarkResult, cut: Sequence[str]
) -> tuple[int, ...]:
    rows = (measure_rows(benchmark, outcomes, Measure(one.subset, one.metric)) for one in result.figures)
    return tuple(one.filter(pl.col("item_id").is_in(cut)).get_column("item_id").n_unique() for one in rows)


def _reliability(margins: pl.DataFrame, temperature: float, resampling: Resampling) -> ProbabilityCalibration:
    return probability_calibration(
        pair_probabilities(margins.get_column("margin"), temperature),
        units=margins.get_column("unit"),
        replicates=resampling.replicates,
        seed=resampling.seed,
        confidence=resampling.confidence,
    )
