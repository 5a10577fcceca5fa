import polars as pl
import pytest

from charm_core.benchmarks.benchmark import (
    PROMPT_SET,
    benchmark_outcomes,
    benchmark_texts,
    items_with,
    length_outcomes,
    pair_margins,
    score_items,
)
from charm_core.benchmarks.judgebench import judgebench
from charm_core.benchmarks.rewardbench import rewardbench
from charm_core.benchmarks.rewardbench_2 import rewardbench_2
from charm_core.errors import TableError
from charm_core.tables import PROMPTS, RESPONSES, validate
from tests.charm_core.benchmarks.made_up import best_of_four, pair, scores_as_written


def _same_prompt(row: dict[str, object]) -> dict[str, object]:
    return row | {"prompt": "the same question"}


def test_a_text_that_two_benchmarks_have_is_scored_once() -> None:
    one = rewardbench([_same_prompt(pair(1, "hep-go", "1", "0")), _same_prompt(pair(2, "math-prm", "1", "-1"))])
    two = rewardbench_2([_same_prompt(best_of_four(9, "Math", "1", "0", "5", "0"))])
    prompts, responses = benchmark_texts([one, two])
    assert validate(prompts, PROMPTS).equals(prompts)
    assert validate(responses, RESPONSES).equals(responses)
    assert prompts.get_column("messages").to_list() == [[{"role": "user", "content": "the same question"}]]
    assert prompts.get_column("prompt_set").to_list() == [PROMPT_SET]
    assert sorted(responses.get_column("response")) == ["-1", "0", "1", "5"]


def test_ids_do_not_depend_on_which_other_benchmarks_there_are() -> None:
    one = rewardbench([pair(1, "hep-go", "1", "0")])
    two = rewardbench_2([best_of_four(9, "Math", "1", "0", "5", "0")])
    alone, together, swapped = (benchmark_texts(suite)[1] for suite in ([one], [one, two], [two, one]))
    assert alone.join(together, on=alone.columns, how="anti").is_empty()
    assert together.equals(swapped)


def test_one_table_of_scores_serves_all_benchmarks() -> None:
    one = rewardbench([pair(1, "hep-go", "3", "1"), pair(2, "hep-go", "1", "2")])
    two = rewardbench_2([best_of_four(9, "Math", "4", "0", "4", "1")])
    scores = scores_as_written(one, two)
    assert [(scored.chosen, scored.rejected) for scored in score_items(two, scores)] == [((4.0,), (0.0, 4.0, 1.0))]
    assert benchmark_outcomes(one, scores).get_column("credit").to_list() == [1.0, 0.0]
    assert benchmark_outcomes(two, scores).get_column("credit").to_list() == [0.5]


def test_a_text_without_a_score_is_an_error() -> None:
    benchmark = rewardbench([pair(1, "hep-go", "3", "1"), pair(2, "hep-go", "1", "2")])
    scores = scores_as_written(benchmark).filter(pl.col("score") != 3.0)
    with pytest.raises(TableError, match="1 responses of RewardBench have no score, first one of the item 'hep-go/1'"):
        benchmark_outcomes(benchmark, scores)


def test_length_is_a_scorer_like_any_other() -> None:
    rows = [pair(1, "hep-go", "longer", "short"), pair(2, "hep-go", "ab", "abc"), pair(3, "hep-go", "abc", "xyz")]
    outcomes = length_outcomes(rewardbench(rows))
    assert outcomes.get_column("credit").to_list() == [1.0, 0.0, 0.0]
    assert outcomes.get_column("tied").to_list() == [0.0, 0.0, 1.0]


def test_margins_are_of_every_right_with_every_wrong_response() -> None:
    benchmark = rewardbench_2([best_of_four(9, "Math", "4", "0", "4", "1")])
    margins = pair_margins(benchmark, scores_as_written(benchmark))
    assert margins.rows() == [("Math/9", 4.0), ("Math/9", 0.0), ("Math/9", 3.0)]


def test_items_that_have_some_response_are_counted() -> None:
    rows = [pair(1, "hep-go", "3", "1"), pair(2, "hep-go", "3", "3"), pair(3, "hep-go", "4", "2")]
    benchmark = rewardbench(rows)
    cells = scores_as_written(benchmark).filter(pl.col("score") == 3.0).select("prompt_id", "policy_model")
    assert items_with(benchmark, cells) == 2
    assert items_with(benchmark, cells.clear()) == 0


def test_the_same_text_scores_the_same_whoever_wrote_it() -> None:
    row = {"source": "livebench-math", "response_model": "m", "question": "q", "label": "B>A"}
    benchmark = judgebench([row | {"pair_id": "1", "response_A": "7", "response_B": "7"}])
    (outcome,) = benchmark_outcomes(benchmark, scores_as_written(benchmark)).filter(subset="math").to_dicts()
    assert (outcome["credit"], outcome["tied"]) == (0.0, 1.0)
