import polars as pl
import pytest

from charm_core.benchmarks.benchmark import benchmark_texts
from charm_core.benchmarks.catalogue import BENCHMARKS
from tests.charm_core.benchmarks.made_up import best_of_four, pair, result_as_written, scores_as_written

ROWS = {
    "rm_bench": [{"id": 1, "domain": "chat", "prompt": "q", "chosen": ["4", "5", "6"], "rejected": ["1", "2", "3"]}],
    "rewardbench": [pair(1, "hep-go", "1", "0")],
    "rewardbench_2": [best_of_four("1", "Math", "1", "0", "-1", "-2")],
    "judgebench": [
        {"pair_id": "1", "source": "livebench-math", "question": "q", "response_model": "m", "response_A": "1",
         "response_B": "0", "label": "A>B"}
    ],
    "ppe_human_preference": [
        {"question_id": "1", "prompt": "q", "response_1": "1", "response_2": "0", "winner": "model_a", "language": "English"}
    ],
    "rmb": [
        {"pair_uid": "1", "category_path": "Pairwise_set/Harmlessness/S1",
         "conversation_input": [{"role": "user", "content": "q"}], "chosen": {"llm_name": "x", "answer": "1"},
         "reject": {"llm_name": "y", "answer": "0"}}
    ],
}  # fmt: skip


def test_there_is_a_row_of_every_benchmark() -> None:
    assert ROWS.keys() == BENCHMARKS.keys()
    assert all(source.splits for source in BENCHMARKS.values() if source.hub)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_is_treated_alike(name: str) -> None:
    result = result_as_written(BENCHMARKS[name].read(iter(ROWS[name])))
    assert {figure.value.value for figure in result.figures} == {1.0}
    assert result.figures[0].subset == "overall"


@pytest.mark.parametrize("name", BENCHMARKS)
def test_rows_can_come_from_a_frame_as_a_hub_dataset_gives_them(name: str) -> None:
    frame = pl.DataFrame(ROWS[name])
    assert BENCHMARKS[name].read(frame.iter_rows(named=True)).items == BENCHMARKS[name].read(ROWS[name]).items


def test_one_pass_of_scoring_serves_all() -> None:
    suite = [BENCHMARKS[name].read(rows) for name, rows in ROWS.items()]
    _, responses = benchmark_texts(suite)
    # four benchmarks ask "q" and have the responses 1 and 0 in common
    assert responses.height == 6 + 2 + 4 + 1
    assert scores_as_written(*suite).height == responses.height
