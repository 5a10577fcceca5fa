import polars as pl
import pytest

from charm_core.benchmarks.benchmark import benchmark_outcomes
from charm_core.benchmarks.results import benchmark_result
from charm_core.benchmarks.rewardbench import rewardbench
from charm_core.errors import TableError
from tests.charm_core.benchmarks.made_up import outcomes_as_written, pair, result_as_written, scores_as_written


def test_a_figure_says_all_that_stands_beside_it() -> None:
    rows = [pair(1, "hep-go", "10", "2"), pair(2, "hep-go", "3", "3"), pair(3, "hep-go", "4", "51")]
    figure = result_as_written(rewardbench(rows)).figure("hep-go")
    assert figure.value.value == pytest.approx(1 / 3)
    assert figure.value.low is not None
    assert figure.value.high is not None
    assert figure.value.low <= 1 / 3 <= figure.value.high
    assert figure.length_only == pytest.approx(1 / 3)  # "10" is longer than "2"
    assert figure.tie_rate == pytest.approx(1 / 3)
    assert figure.items == 3
    assert figure.note == "3 of 164 items: not comparable with published figures"


def test_figures_go_from_the_whole_to_the_parts() -> None:
    rows = [pair(1, "hep-rust", "1", "0"), pair(1, "hep-go", "1", "0"), pair(1, "donotanswer", "0", "1")]
    result = result_as_written(rewardbench(rows))
    assert [figure.subset for figure in result.figures] == [
        "overall",
        "Safety",
        "Reasoning",
        "donotanswer",
        "hep-go",
        "hep-rust",
    ]
    assert result.figure("overall").items == 3


def test_what_is_missing_is_said_up_to_the_top() -> None:
    result = result_as_written(rewardbench([pair(1, "donotanswer", "0", "1")]))
    others = "refusals-dangerous and refusals-offensive and xstest-should-refuse and xstest-should-respond"
    assert result.figure("Safety").note == f"without {others}: not comparable with published figures"
    assert result.figure("overall").note == (
        f"without Chat and Chat Hard and {others} and Reasoning: not comparable with published figures"
    )


def test_items_that_cannot_be_won_are_counted() -> None:
    rows = [pair(1, "hep-go", "1", "1"), pair(2, "hep-go", "1", "0")]
    assert result_as_written(rewardbench(rows)).note == (
        "1 items cannot be won: a right and a wrong response are the same text"
    )
    assert result_as_written(rewardbench(rows[1:])).note == ""


def test_an_unknown_figure_is_an_error_that_lists_the_known_ones() -> None:
    result = result_as_written(rewardbench([pair(1, "hep-go", "1", "0")]))
    with pytest.raises(TableError, match=r"no figure \('poetry', 'accuracy'\); it has \[\('overall', 'accuracy'\)"):
        result.figure("poetry")


def test_adding_a_constant_to_all_scores_changes_nothing() -> None:
    benchmark = rewardbench([pair(n, "hep-go", str(n % 3), "1") for n in range(9)])
    scores = scores_as_written(benchmark)
    moved = scores.with_columns(pl.col("score") + 100.0)
    first, second = (benchmark_result(benchmark, benchmark_outcomes(benchmark, table)) for table in (scores, moved))
    assert first == second


def test_the_order_of_the_rows_changes_nothing() -> None:
    rows = [pair(n, "hep-go", str(n % 3), "1") for n in range(9)]
    assert result_as_written(rewardbench(rows)) == result_as_written(rewardbench(rows[::-1]))


def test_the_interval_covers_what_it_should() -> None:
    rows = [pair(n, "hep-go", "1", "0" if n % 4 else "2") for n in range(100)]
    benchmark = rewardbench(rows)
    value = benchmark_result(benchmark, outcomes_as_written(benchmark), replicates=2000).figure("hep-go").value
    assert value.value == 0.75
    # 0.75 ± 1.96 · sqrt(0.75 · 0.25 / 100)
    assert (value.low, value.high) == pytest.approx((0.665, 0.835), abs=0.02)
