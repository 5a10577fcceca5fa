"""Two reward models on the same items of a benchmark: which figures changed beyond chance?

Each measured subset has an exact test: McNemar where every unit is one item that is right or wrong, otherwise a sign test
over units (did more of them gain credit than lose it?), of which McNemar is the special case. It does not weigh by how much
credit moved; the paired bootstrap of the difference does, and is the test of averages over subsets. Units are items, except
where items share a prompt and would count the same chance several times.

The exact tests of one benchmark are one family, overlapping subsets included. Holm's correction holds for any dependence
between them, Šidák's for independent or positively dependent ones. Averages are tested once, uncorrected: they are the
question, the subsets are the search.
"""

from typing import Literal

import numpy as np
import polars as pl
import scipy
from numpy.typing import NDArray
from pydantic import Field

from charm_core.agreement import mcnemar
from charm_core.benchmarks.benchmark import Benchmark
from charm_core.benchmarks.figures import credit_replicates, mean_credits, roll_up
from charm_core.benchmarks.outcomes import OUTCOMES, Measure
from charm_core.benchmarks.results import figure_order, measure_rows
from charm_core.errors import TableError
from charm_core.records import Estimate, Record
from charm_core.resampling import holm_adjusted, normal_p_values, percentile_estimate
from charm_core.tables import validate

FloatArray = NDArray[np.float64]


class PairedTest(Record):
    """Of "neither reward model is better", two-sided."""

    name: Literal["McNemar", "sign", "bootstrap"]
    only_before: int | None = Field(default=None, description="Units on which the first does better.")
    only_after: int | None = Field(default=None, description="Units on which the second does better.")
    p_value: float = Field(description="Exact; the bootstrap's is the normal tail beyond its standard error.")
    p_value_sidak: float | None = Field(default=None, description="Corrected for all exact tests of the benchmark.")
    p_value_holm: float | None = Field(default=None, description="Likewise, by Holm's correction.")


class FigureComparison(Record):
    """One figure of two reward models."""

    subset: str
    metric: str
    items: int
    before: float
    after: float
    difference: Estimate = Field(description="After minus before, with its paired bootstrap interval.")
    test: PairedTest


class BenchmarkComparison(Record):
    """All figures of a benchmark for two reward models."""

    benchmark: str
    figures: tuple[FigureComparison, ...]


def compare_outcomes(
    benchmark: Benchmark,
    before: pl.DataFrame,
    after: pl.DataFrame,
    *,
    replicates: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> BenchmarkComparison:
    """Compare two reward models item by item.

    Args:
        benchmark: The benchmark.
        before: OUTCOMES of one reward model.
        after: OUTCOMES of the other, on the same items.
        replicates: Bootstrap replicates, the same resamples for both; at least 2.
        seed: Of the resampling.
        confidence: Coverage of the intervals.

    Raises:
        TableError: A bad table, or not the same items.
    """
    first, second = validate(before, OUTCOMES), validate(after, OUTCOMES)
    _require_same_items(first, second, benchmark.name)
    points = [roll_up(mean_credits(table), benchmark.rollups) for table in (first, second)]
    drawn = [roll_up(credit_replicates(table, replicates, seed=seed), benchmark.rollups) for table in (first, second)]
    tests = _exact_tests(first, second)
    figures = []
    for measure in figure_order(benchmark, points[0]):
        one, other = (values[measure] for values in points)
        differences = drawn[1][measure] - drawn[0][measure]
        figures.append(
            FigureComparison(
                subset=measure.subset,
                metric=measure.metric,
                items=measure_rows(benchmark, first, measure).get_column("item_id").n_unique(),
                before=one,
                after=other,
                difference=percentile_estimate(other - one, differences, confidence),
                test=tests.get(measure) or _bootstrap_test(other - one, differences),
            )
        )
    return BenchmarkComparison(benchmark=benchmark.name, figures=tuple(figures))


def sidak_adjusted(p_values: FloatArray) -> FloatArray:
    """Šidák's adjustment: 1 - (1 - p)^m for m tests; exact where they are independent."""
    with np.errstate(divide="ignore"):
        return np.asarray(-np.expm1(p_values.size * np.log1p(-p_values)))


def _exact_tests(before: pl.DataFrame, after: pl.DataFrame) -> dict[Measure, PairedTest]:
    """A test for every measure that the outcomes hold, corrected for their number."""
    key = ["subset", "metric"]
    paired = before.with_columns(other=after.get_column("credit")).sort([*key, "unit"])
    tests = {
        Measure(*part.select(key).row(0)): _exact_test(part) for part in paired.partition_by(key, maintain_order=True)
    }
    p_values = np.asarray([test.p_value for test in tests.values()])
    corrected = zip(tests.items(), sidak_adjusted(p_values), holm_adjusted(p_values), strict=True)
    return {
        measure: test.model_copy(update={"p_value_sidak": float(sidak), "p_value_holm": float(holm)})
        for (measure, test), sidak, holm in corrected
    }


def _exact_test(rows: pl.DataFrame) -> PairedTest:
    credit = rows.select("credit", "other").to_numpy()
    if rows.get_column("unit").n_unique() == rows.height and np.isin(credit, (0.0, 1.0)).all():
        result = mcnemar(credit[:, 0] == 1.0, credit[:, 1] == 1.0)
        return PairedTest(name="McNemar", only_before=result.only_a, only_after=result.only_b, p_value=result.p_value)
    gains = rows.group_by("unit").agg(gain=pl.col("other").sum() - pl.col("credit").sum()).get_column("gain")
    lost, won = int((gains < 0).sum()), int((gains > 0).sum())
    p_value = float(scipy.stats.binomtest(lost, lost + won, 0.5).pvalue) if lost + won else 1.0
    return PairedTest(name="sign", only_before=lost, only_after=won, p_value=p_value)


def _bootstrap_test(difference: float, differences: FloatArray) -> PairedTest:
    return PairedTest(
        name="bootstrap", p_value=float(normal_p_values(np.asarray([difference]), differences[:, None])[0])
    )


def _require_same_items(before: pl.DataFrame, after: pl.DataFrame, benchmark: str) -> None:
    names = ["item_id", "subset", "metric", "stratum", "unit"]
    if before.select(names).equals(after.select(names)):
        return
    key = list(OUTCOMES.key)
    lonely = pl.concat([before.join(after, on=key, how="anti"), after.join(before, on=key, how="anti")])
    where = f"only one has {lonely.select(key).row(0)}" if lonely.height else "their units differ"
    raise TableError(
        f"the two reward models were not judged on the same items of {benchmark}: {where}; score the same files with both"
    )
