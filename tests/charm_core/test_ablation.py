"""Means over seeds, and differences that are paired by seed."""

import pytest
from scipy import stats

from charm_core.ablation import CellMeasures, mean_over_seeds, summarise_cells
from charm_core.errors import ConfigError


def cells(**rows: list[float]) -> list[CellMeasures]:
    return [
        CellMeasures(cell=cell, seed=seed, values={"mismatch": value})
        for cell, values in rows.items()
        for seed, value in enumerate(values)
    ]


def test_a_worked_example():
    estimate = mean_over_seeds([1.0, 2.0, 3.0])
    half = stats.t.ppf(0.975, 2) / 3**0.5
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((2.0, 2.0 - half, 2.0 + half))


def test_pairing_by_seed_takes_out_what_the_seeds_have_in_common():
    control, better = summarise_cells(cells(control=[0.2, 0.4, 0.9], better=[0.1, 0.31, 0.79]), against="control")
    assert control.against == {}
    difference = better.against["mismatch"]
    assert difference.value == pytest.approx(-0.1)
    assert difference.high < 0  # though the means' own intervals overlap widely
    assert better.means["mismatch"].high > control.means["mismatch"].low


def test_seeds_that_only_one_has_do_not_enter_the_difference():
    rows = [*cells(control=[0.5, 0.5], better=[0.4]), CellMeasures(cell="better", seed=7, values={"mismatch": 9.0})]
    better = summarise_cells(rows, against="control")[1]
    assert better.against["mismatch"].value == pytest.approx(-0.1)
    assert better.seeds == 2


def test_a_measure_that_a_seed_lacks_is_left_out_rather_than_averaged_over_fewer():
    rows = cells(control=[0.5, 0.6])
    rows[0] = rows[0].model_copy(update={"values": {"mismatch": 0.5, "truth": 0.7}})
    assert set(summarise_cells(rows, against="control")[0].means) == {"mismatch"}


def test_one_seed_has_no_interval():
    only = summarise_cells(cells(control=[0.3], other=[0.2]), against="control")[1]
    assert only.means["mismatch"].low is None
    assert only.against["mismatch"].value == pytest.approx(-0.1)
    assert only.against["mismatch"].high is None


def test_what_cannot_be_meant():
    with pytest.raises(ConfigError, match="occurs twice with seed 0"):
        summarise_cells([*cells(control=[0.1]), *cells(control=[0.2])], against="control")
    with pytest.raises(ConfigError, match=r"no cell 'x' to compare with; there are \['control'\]"):
        summarise_cells(cells(control=[0.1]), against="x")
