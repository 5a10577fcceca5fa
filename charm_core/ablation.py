"""Many recipes, several seeds: what each changes, and whether the difference from the control is more than a draw of the seed."""

from collections.abc import Mapping, Sequence

import numpy as np
import scipy
from pydantic import Field

from charm_core.errors import ConfigError
from charm_core.records import Estimate, Record


class CellMeasures(Record):
    """One recipe with one seed; a measure that does not apply, or could not be taken, is missing."""

    cell: str
    seed: int
    values: Mapping[str, float] = Field(description="Measure to value.")


class CellSummary(Record):
    """One recipe over all seeds."""

    cell: str
    seeds: int
    means: Mapping[str, Estimate] = Field(description="Measure to mean over seeds with a t interval.")
    against: Mapping[str, Estimate] = Field(
        description="Measure to mean difference from the cell compared with, paired by seed, with a t interval."
    )


def summarise_cells(
    cells: Sequence[CellMeasures], *, against: str, confidence: float = 0.95
) -> tuple[CellSummary, ...]:
    """Mean over seeds and paired difference from one cell, in the order in which the cells first come.

    Args:
        cells: One record per recipe and seed.
        against: Name of the cell to compare with, usually the control.
        confidence: Coverage of the t intervals; with one seed there are none.

    Raises:
        ConfigError: A cell that occurs twice with one seed, or the one to compare with is not there.
    """
    by_cell: dict[str, dict[int, Mapping[str, float]]] = {}
    for measured in cells:
        seeds = by_cell.setdefault(measured.cell, {})
        if measured.seed in seeds:
            raise ConfigError(f"the cell {measured.cell!r} occurs twice with seed {measured.seed}; give each seed once")
        seeds[measured.seed] = measured.values
    if against not in by_cell:
        raise ConfigError(f"there is no cell {against!r} to compare with; there are {list(by_cell)}")
    other = by_cell[against]
    return tuple(
        CellSummary(
            cell=cell,
            seeds=len(seeds),
            means=_estimates(list(seeds.values()), confidence),
            against={} if cell == against else _estimates(_differences(seeds, other), confidence),
        )
        for cell, seeds in by_cell.items()
    )


def mean_over_seeds(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Mean with Student's t interval; no interval for fewer than two values."""
    found = np.asarray(values, dtype=np.float64)
    mean = float(found.mean())
    if found.size < 2:
        return Estimate(value=mean)
    half = float(scipy.stats.t.ppf(0.5 + confidence / 2, found.size - 1) * found.std(ddof=1) / np.sqrt(found.size))
    return Estimate(value=mean, low=mean - half, high=mean + half)


def _differences(
    seeds: Mapping[int, Mapping[str, float]], other: Mapping[int, Mapping[str, float]]
) -> list[dict[str, float]]:
    return [
        {name: value - other[seed][name] for name, value in values.items() if name in other[seed]}
        for seed, values in seeds.items()
        if seed in other
    ]


def _estimates(rows: Sequence[Mapping[str, float]], confidence: float) -> dict[str, Estimate]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    # a measure that some seeds lack would be a mean over other seeds than its neighbours
    return {
        name: mean_over_seeds([row[name] for row in rows], confidence)
        for name in names
        if all(name in row for row in rows)
    }
