"""From outcomes to figures: means over items, weighted averages of them, and bootstrap replicates of both.

A measure that the outcomes hold is the mean credit of its items. A rollup averages measures with fixed weights; the same
code rolls up point estimates and arrays of replicates, and published figures in the tests.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import polars as pl
from numpy.typing import NDArray

from charm_core.benchmarks.outcomes import OUTCOMES, Measure
from charm_core.resampling import bootstrap_weights
from charm_core.tables import validate

FloatArray = NDArray[np.float64]
Value = TypeVar("Value", float, FloatArray)


@dataclass(frozen=True, kw_only=True)
class Rollup:
    """A figure made of others."""

    measure: Measure
    parts: Mapping[Measure, float]
    """The measures and their weights; each is one that the outcomes hold, or that of an earlier rollup."""
    average: bool = True
    """Divide by the sum of the weights of the parts that there are; otherwise a plain weighted sum of all of them."""


def average_of(subset: str, weights: Mapping[str, float], metric: str = "accuracy") -> Rollup:
    """The weighted average of one metric over subsets."""
    return Rollup(
        measure=Measure(subset, metric), parts={Measure(part, metric): weight for part, weight in weights.items()}
    )


def mean_of(subset: str, parts: Iterable[str], metric: str = "accuracy") -> Rollup:
    """The unweighted mean of one metric over subsets."""
    return average_of(subset, dict.fromkeys(parts, 1.0), metric)


def roll_up(values: Mapping[Measure, Value], rollups: Sequence[Rollup]) -> dict[Measure, Value]:
    """Add to the values all rollups that can be had.

    Args:
        values: A number, or an array of replicates, per measure.
        rollups: Parts before wholes.

    Returns:
        The values and the rollups. An average is over the parts that there are, as official code has it, and missing
        where there are none of them; a sum needs all of its parts.
    """
    known = dict(values)
    for rollup in rollups:
        parts = [(known[part], weight) for part, weight in rollup.parts.items() if part in known]
        if not parts or (not rollup.average and len(parts) < len(rollup.parts)):
            continue
        total = sum((weight * value for value, weight in parts[1:]), start=parts[0][1] * parts[0][0])
        known[rollup.measure] = total / sum(weight for _, weight in parts) if rollup.average else total
    return known


def missing_parts(known: Iterable[Measure], rollups: Sequence[Rollup]) -> dict[Measure, tuple[str, ...]]:
    """Which subsets each rollup has to do without, those of its parts included.

    Args:
        known: The measures that there are, rollups among them.
        rollups: Parts before wholes.

    Returns:
        Names of subsets per rollup; nothing for a complete one.
    """
    present, missing = set(known), dict[Measure, tuple[str, ...]]()
    for rollup in rollups:
        if rollup.measure in present:
            gaps = [missing.get(part, ()) if part in present else (_name(part, rollup),) for part in rollup.parts]
            missing[rollup.measure] = tuple(dict.fromkeys(name for names in gaps for name in names))
    return {measure: names for measure, names in missing.items() if names}


def mean_credits(outcomes: pl.DataFrame) -> dict[Measure, float]:
    """Mean credit per measure of an OUTCOMES frame."""
    groups = outcomes.group_by("subset", "metric", maintain_order=True)  # in order, so that sums round alike
    means = groups.agg(pl.col("credit").mean()).sort("subset", "metric")
    return {Measure(subset, metric): credit for subset, metric, credit in means.iter_rows()}


def credit_replicates(outcomes: pl.DataFrame, replicates: int, *, seed: int = 0) -> dict[Measure, FloatArray]:
    """Bootstrap mean credits: units are drawn with replacement within each stratum, all rows of a unit together.

    Args:
        outcomes: An OUTCOMES frame.
        replicates: Number of replicates B.
        seed: Of the resampling. Two reward models on the same items get the same resamples, which pairs them.

    Returns:
        Shape ``(B,)`` per measure; NaN where a resample has none of its items.

    Raises:
        TableError: A bad table.
    """
    table = validate(outcomes, OUTCOMES)
    measures = list(mean_credits(table))
    totals, counts = np.zeros((replicates, len(measures))), np.zeros((replicates, len(measures)))
    strata = table.sort("stratum", "unit", "subset", "metric").partition_by("stratum", maintain_order=True)
    seeds = np.random.SeedSequence(seed).spawn(len(strata))
    for stratum, child in zip(strata, seeds, strict=True):
        credit, rows = _sums_per_unit(stratum, measures)
        start = 0
        for weights in bootstrap_weights(len(rows), replicates, np.random.default_rng(child)):
            block = slice(start, start + len(weights))
            totals[block] += weights @ credit
            counts[block] += weights @ rows
            start += len(weights)
    with np.errstate(invalid="ignore"):
        means = totals / counts
    return {measure: means[:, column] for column, measure in enumerate(measures)}


def _name(part: Measure, whole: Rollup) -> str:
    return part.subset if part.metric == whole.measure.metric else " ".join(part)


def _sums_per_unit(stratum: pl.DataFrame, measures: Sequence[Measure]) -> tuple[FloatArray, FloatArray]:
    """Credit and number of rows, each of shape ``(units, measures)``."""
    units = stratum.get_column("unit").rank("dense").to_numpy() - 1
    places = {measure: column for column, measure in enumerate(measures)}
    columns = np.asarray([places[Measure(*pair)] for pair in stratum.select("subset", "metric").iter_rows()])
    credit, rows = (np.zeros((int(units.max()) + 1, len(measures))) for _ in range(2))
    np.add.at(credit, (units, columns), stratum.get_column("credit").to_numpy())
    np.add.at(rows, (units, columns), 1.0)
    return credit, rows
