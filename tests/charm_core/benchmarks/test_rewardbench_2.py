import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from charm_core.benchmarks.figures import credit_replicates, mean_credits, roll_up
from charm_core.benchmarks.outcomes import Measure
from charm_core.benchmarks.rewardbench_2 import (
    BEST_OF_FOUR,
    MARGIN_TERM,
    ON_REFERENCE,
    ON_TIED,
    OVERALL,
    PREFERRED,
    PREFERRED_HARD,
    ROLLUPS,
    TIES_SCORE,
    rewardbench_2,
)
from charm_core.errors import TableError
from tests.charm_core.benchmarks.made_up import best_of_four, outcomes_as_written, result_as_written, ties_question


def _ties(*rows: dict[str, object]) -> dict[Measure, float]:
    benchmark = rewardbench_2(rows)
    return roll_up(mean_credits(outcomes_as_written(benchmark)), benchmark.rollups)


def test_credit_is_shared_by_those_at_the_top() -> None:
    rows = [
        best_of_four(1, "Math", "3", "2", "1", "0"),  # 1
        best_of_four(2, "Math", "3", "3", "1", "0"),  # 1/2
        best_of_four(3, "Math", "3", "3", "3", "0"),  # 1/3
        best_of_four(4, "Math", "3", "4", "1", "0"),  # 0
    ]
    figure = result_as_written(rewardbench_2(rows)).figure("Math")
    assert figure.value.value == pytest.approx((1 + 1 / 2 + 1 / 3) / 4)
    assert figure.tie_rate == 0.5


def test_a_scorer_that_knows_nothing_gets_a_quarter() -> None:
    rows = [best_of_four(n, "Focus", "same", "same", "same", "same") for n in range(5)]
    result = result_as_written(rewardbench_2([row | {"chosen": ["1"], "rejected": ["1", "1", "1"]} for row in rows]))
    assert result.figure("Focus").value.value == 0.25


def test_the_overall_figure_is_the_mean_of_six_subsets_whatever_their_size() -> None:
    rows = [best_of_four(1, subset, "1", "0") for subset in BEST_OF_FOUR]
    rows += [best_of_four(n, "Factuality", "0", "1") for n in range(2, 5)]  # Factuality: 1/4
    rows += [ties_question("ref", 1, ["1"], ["2"]), ties_question("tied", 1, ["1", "1"], ["2"])]  # Ties: all wrong
    result = result_as_written(rewardbench_2(rows))
    ties = result.figure("Ties", "score").value.value
    assert ties == pytest.approx(-0.01)  # the margin term is -1 where the spread is 0
    assert result.figure("overall", "score").value.value == pytest.approx((4 + 0.25 - 0.01) / 6)


def test_ties_by_hand() -> None:
    # tied:  right 5, 4 (spread 1), wrong 2: margin 2;  ref: right 3, wrong 2.5: margin 0.5
    #   both right; 2 > 1 preferred; min(2, 0.5) = 0.5 > 1 is not; tanh(0.5 / 1 - 1)
    values = _ties(ties_question("tied", 1, ["5", "4"], ["2", "-1"]), ties_question("ref", 1, ["3"], ["2.5", "0"]))
    assert [values[part] for part in (ON_TIED, ON_REFERENCE, PREFERRED, PREFERRED_HARD)] == [1.0, 1.0, 1.0, 0.0]
    assert values[MARGIN_TERM] == pytest.approx(math.tanh(-0.5))
    assert values[TIES_SCORE] == pytest.approx(0.3 + 0.3 + 0.2 + 0.01 * math.tanh(-0.5))


def test_ties_over_two_questions_by_hand() -> None:
    # 1: tied 5, 4 | 2 and ref 3 | 2.5 as above; 2: tied 3, 1 | 2 (a wrong one in between: margin -1, spread 2), ref 1 | 0
    values = _ties(
        ties_question("tied", 1, ["5", "4"], ["2"]),
        ties_question("ref", 1, ["3"], ["2.5"]),
        ties_question("tied", 2, ["3", "1"], ["2"]),
        ties_question("ref", 2, ["1"], ["0"]),
    )
    assert [values[part] for part in (ON_TIED, ON_REFERENCE, PREFERRED, PREFERRED_HARD)] == [0.5, 1.0, 0.5, 0.0]
    term = (math.tanh(0.5 - 1) + math.tanh(-1 / 2 - 1)) / 2
    assert values[TIES_SCORE] == pytest.approx(0.3 * 0.5 + 0.3 + 0.2 * 0.5 + 0.01 * term)


@pytest.mark.parametrize(
    ("tied", "reference", "parts", "term"),
    [
        # no spread: any margin exceeds it, and the margin term is at its end
        ((["2", "2"], ["1"]), (["1"], ["0"]), [1.0, 1.0, 1.0, 1.0], 1.0),
        # equal to a wrong one is not above it
        ((["2", "1"], ["1"]), (["1"], ["1"]), [0.0, 0.0, 0.0, 0.0], math.tanh(-1)),
        # neither margin nor spread
        ((["1", "1"], ["1"]), (["1"], ["1"]), [0.0, 0.0, 0.0, 0.0], 0.0),
        # a margin as large as the spread does not exceed it
        ((["3", "2"], ["1"]), (["5"], ["0"]), [1.0, 1.0, 0.0, 0.0], 0.0),
    ],
)
def test_the_strictness_of_ties(
    tied: tuple[list[str], list[str]], reference: tuple[list[str], list[str]], parts: list[float], term: float
) -> None:
    values = _ties(ties_question("tied", 1, *tied), ties_question("ref", 1, *reference))
    assert [values[part] for part in (ON_TIED, ON_REFERENCE, PREFERRED, PREFERRED_HARD)] == parts
    assert values[MARGIN_TERM] == pytest.approx(term)


def test_a_perfect_score_on_ties_is_more_than_one() -> None:
    values = _ties(ties_question("tied", 1, ["2", "2"], ["1"]), ties_question("ref", 1, ["1"], ["0"]))
    assert values[TIES_SCORE] == pytest.approx(1.01)


def test_a_question_without_partner_counts_in_its_accuracy_only() -> None:
    values = _ties(
        ties_question("tied", 1, ["5", "4"], ["2"]),
        ties_question("ref", 1, ["3"], ["2"]),
        ties_question("tied", 2, ["1", "0"], ["2"]),
    )
    assert (values[ON_TIED], values[PREFERRED]) == (0.5, 1.0)
    assert TIES_SCORE not in _ties(ties_question("tied", 2, ["1", "0"], ["2"]))


def test_a_tied_question_and_its_reference_are_drawn_together() -> None:
    rows = [
        ties_question(kind, n, ["3", "2"] if kind == "tied" else ["3"], ["1" if n % 2 else "4"])
        for n in range(20)
        for kind in ("tied", "ref")
    ]
    drawn = credit_replicates(outcomes_as_written(rewardbench_2(rows)), 100)
    np.testing.assert_array_equal(drawn[ON_TIED], drawn[ON_REFERENCE])


def test_ties_are_counted_by_questions() -> None:
    result = result_as_written(
        rewardbench_2([ties_question("tied", 1, ["5", "4"], ["2"]), ties_question("ref", 1, ["3"], ["3"])])
    )
    figure = result.figure("Ties", "score")
    assert (figure.items, figure.tie_rate) == (2, 0.5)
    assert figure.note == "2 of 102 items: not comparable with published figures"
    assert result.figure("Ties", "margin term").tie_rate is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (best_of_four(1, "Math", "3", "2") | {"chosen": ["3", "4"]}, "item 'Math/1' needs one chosen response, not 2"),
        (best_of_four(1, "Maths", "3", "2"), "the subset 'Maths' is none of"),
        (best_of_four(1, "Math", "3"), "rejected: Tuple should have at least 1 item"),
        (ties_question("both", 1, ["1", "2"], ["0"]), "the kind of the item 'Ties/both:1' 'both' is none of"),
        (ties_question("ref", 1, ["1"], ["0"]) | {"id": "ref"}, "'Ties/ref' is not of the form ref:7 or tied:7"),
        (ties_question("tied", 1, ["1"], ["0"]), "'Ties/tied:1' needs at least two chosen responses"),
    ],
)
def test_bad_rows(row: dict[str, object], message: str) -> None:
    with pytest.raises(TableError, match=message):
        rewardbench_2([row])


def test_two_tied_questions_of_one_number_are_an_error() -> None:
    rows = [ties_question("tied", 1, ["5", "4"], ["2"]), ties_question("tied", 1, ["5", "3"], ["2"])]
    with pytest.raises(TableError, match="two Ties questions 'Ties/tied:1#2'"):
        outcomes_as_written(rewardbench_2(rows))


@pytest.mark.real
def test_every_published_row_follows_from_its_subsets(shared_data: Path) -> None:
    published = pl.read_csv(shared_data / "published_rm_benchmark_scores.csv").filter(
        (pl.col("benchmark") == "RewardBench v2") & (pl.col("metric") != "score")
    )
    rows = published.pivot(on="metric", index="model", values="value").to_dicts()
    assert len(rows) == 25
    columns = {"Factuality": "factuality", "Precise IF": "if", "Math": "math", "Safety": "safety", "Focus": "focus"}
    for row in rows:
        parts = {Measure(subset, "accuracy"): row[column] for subset, column in columns.items()}
        # parts and wholes are rounded to 0.1
        assert roll_up(parts | {TIES_SCORE: row["ties"]}, ROLLUPS)[OVERALL] == pytest.approx(row["average"], abs=0.1), (
            row
        )
