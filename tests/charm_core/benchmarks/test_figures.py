import numpy as np
import polars as pl
import pytest

from charm_core.benchmarks.figures import (
    Rollup,
    average_of,
    credit_replicates,
    mean_credits,
    mean_of,
    missing_parts,
    roll_up,
)
from charm_core.benchmarks.outcomes import Measure, Outcome, outcomes_table

A, B, C = (Measure(name, "accuracy") for name in "abc")
WHOLE, ALL = Measure("whole", "accuracy"), Measure("all", "accuracy")


def _table(*rows: tuple[str, str, str, str, float]) -> pl.DataFrame:
    """From (item, subset, stratum, unit, credit)."""
    return outcomes_table(
        Outcome(item, subset, "accuracy", stratum, unit, credit, credit == 1.0, 0.0)
        for item, subset, stratum, unit, credit in rows
    )


def test_averages_of_averages() -> None:
    rollups = [average_of("whole", {"a": 1.0, "b": 3.0}), mean_of("all", ["whole", "c"])]
    rolled = roll_up({A: 1.0, B: 0.0, C: 0.75}, rollups)
    assert (rolled[WHOLE], rolled[ALL]) == (0.25, 0.5)


def test_an_average_is_over_the_parts_that_there_are() -> None:
    rollups = [average_of("whole", {"a": 1.0, "b": 3.0}), mean_of("all", ["whole", "c"])]
    rolled = roll_up({A: 1.0}, rollups)
    assert rolled == {A: 1.0, WHOLE: 1.0, ALL: 1.0}
    assert missing_parts(rolled, rollups) == {WHOLE: ("b",), ALL: ("b", "c")}
    assert missing_parts(roll_up({A: 1.0, B: 0.0, C: 0.0}, rollups), rollups) == {}


def test_there_is_no_average_of_nothing() -> None:
    rollups = [mean_of("whole", ["a", "b"]), mean_of("all", ["whole", "c"])]
    rolled = roll_up({C: 0.5}, rollups)
    assert rolled == {C: 0.5, ALL: 0.5}
    assert missing_parts(rolled, rollups) == {ALL: ("whole",)}


def test_a_sum_needs_all_of_its_parts() -> None:
    rollup = Rollup(measure=WHOLE, parts={A: 0.3, B: 0.71}, average=False)
    assert roll_up({A: 1.0, B: 1.0}, [rollup])[WHOLE] == pytest.approx(1.01)
    assert WHOLE not in roll_up({A: 1.0}, [rollup])


def test_arrays_roll_up_like_numbers() -> None:
    rolled = roll_up({A: np.array([0.0, 1.0]), B: np.array([1.0, 1.0])}, [average_of("whole", {"a": 1.0, "b": 3.0})])
    np.testing.assert_array_equal(rolled[WHOLE], [0.75, 1.0])


def test_a_mean_credit_is_over_items() -> None:
    table = _table(("1", "a", "a", "1", 1.0), ("2", "a", "a", "2", 0.5), ("3", "b", "b", "3", 0.25))
    assert mean_credits(table) == {A: 0.75, B: 0.25}


def test_replicates_are_drawn_within_strata() -> None:
    rows = [(str(n), "a", "a", str(n), float(n % 2)) for n in range(50)] + [("x", "b", "b", "x", 1.0)]
    drawn = credit_replicates(_table(*rows), 2000, seed=1)
    assert (drawn[B] == 1.0).all()  # one item in its stratum is drawn every time
    assert drawn[A].mean() == pytest.approx(0.5, abs=0.01)
    assert drawn[A].std() == pytest.approx(np.sqrt(0.25 / 50), rel=0.05)


def test_rows_of_one_unit_are_drawn_together() -> None:
    rows = [(f"{n}-{m}", "a", "a", str(n), float(n % 2)) for n in range(20) for m in range(5)]
    drawn = credit_replicates(_table(*rows), 2000, seed=1)
    # a hundred items, but only twenty independent units
    assert drawn[A].std() == pytest.approx(np.sqrt(0.25 / 20), rel=0.05)


def test_a_pooled_subset_follows_its_parts_in_every_replicate() -> None:
    rows = [
        (str(n), subset, part, str(n), float(n % 3 == 0))
        for n in range(30)
        for part in ("b" if n < 10 else "c",)
        for subset in (part, "a")
    ]
    drawn = credit_replicates(_table(*rows), 100)
    np.testing.assert_allclose(drawn[A], (10 * drawn[B] + 20 * drawn[C]) / 30)


def test_a_measure_that_a_resample_misses_is_unknown() -> None:
    rows = [("1", "a", "s", "1", 1.0), ("2", "b", "s", "2", 1.0)]
    drawn = credit_replicates(_table(*rows), 100)
    assert np.isnan(drawn[A]).any()
    assert set(drawn[A][np.isfinite(drawn[A])]) == {1.0}


def test_replicates_depend_on_seed_and_content_only() -> None:
    rows = [(str(n), "a", "a", str(n), float(n % 2)) for n in range(10)]
    first, again = (credit_replicates(_table(*order), 50, seed=3)[A] for order in (rows, rows[::-1]))
    np.testing.assert_array_equal(first, again)
    assert (first != credit_replicates(_table(*rows), 50, seed=4)[A]).any()
