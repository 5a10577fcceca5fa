"""All benchmarks from local files and the hub: what the steps make of them is what the pure functions say."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from prefect import flow
from pydantic import ValidationError

from charm_core.benchmarks.benchmark import benchmark_outcomes, pair_margins
from charm_core.benchmarks.catalogue import BENCHMARKS
from charm_core.benchmarks.comparison import compare_outcomes
from charm_core.benchmarks.results import benchmark_result
from charm_core.errors import ConfigError, TableError
from charm_core.probability_calibration import fit_score_temperature, pair_probabilities, probability_calibration
from charm_core.reward_model.scoring_shares import ties
from charm_core.reward_model.spec import RewardModelSpec
from charm_core.tables import RESPONSES, SCORES
from flows.settings import CHECKOUT
from tasks.benchmark_sources import (
    BenchmarkData,
    BenchmarksConfig,
    Resampling,
    RmBenchData,
    StoredBenchmark,
    identify_benchmark,
    load_benchmark,
    load_benchmarks,
)
from tasks.benchmarking import judge_scored, run_benchmarks
from tasks.caching import use_store
from tasks.evidence import BenchmarkRows
from tasks.pages.report_data import VariantName
from tasks.scoring import identify_reward_model
from tasks.scoring_lines import ties_line
from tasks.store import ArtifactStore
from tasks.text_scores import ScoredTexts
from tests.charm_core.benchmarks.made_up import best_of_four, pair, ties_question
from tests.charm_core.benchmarks.test_catalogue import ROWS
from tests.charm_core.reward_model import tiny
from tests.hub_server import serve_hub

FEW = Resampling(replicates=50)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ArtifactStore]:
    with use_store(ArtifactStore(url=str(tmp_path / "store"), work_folder=str(tmp_path))) as store:
        yield store


def write(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(list(rows)) if path.suffix == ".json" else "\n".join(map(json.dumps, rows)))
    return str(path)


def read(store: ArtifactStore, name: str, **where: Any) -> StoredBenchmark:
    kind = RmBenchData if name == "rm_bench" else BenchmarkData
    return load_benchmark.function(store, name, identify_benchmark(name, kind(**where)))


def scored_as_written(store: ArtifactStore, benchmark: StoredBenchmark, sign: float = 1.0, *cut: int) -> ScoredTexts:
    """The response "2.5" scores 2.5 times the sign; of ``cut`` the texts' numbers in the table."""
    responses = store.read_table(benchmark.texts.responses, RESPONSES)
    scores = responses.select("prompt_id", "policy_model", score=sign * pl.col("response").cast(pl.Float64))
    cells = responses.select("prompt_id", "policy_model", prompt_cut=False, response_cut=True)[list(cut)]
    return ScoredTexts(
        scores=store.write_table(scores, SCORES),
        cut=store.write_frame(cells, "cut_texts"),
        texts=scores.height,
        prompts_cut=0,
        responses_cut=len(cut),
    )


def test_the_settings_know_every_benchmark():
    fields = set(BenchmarksConfig.model_fields) - {"resampling"}
    assert fields == set(BENCHMARKS)
    every = {name: {"source": "x"} for name in fields}
    assert list(BenchmarksConfig.model_validate(every).chosen()) == list(BENCHMARKS)


def test_settings_files_of_earlier_versions_mean_what_they_meant():
    config = BenchmarksConfig.model_validate({"rm_bench": {"chat": "a.json", "safety-refuse": "b.json"}})
    assert config.rm_bench.files() == {"chat": "a.json", "safety-refuse": "b.json"}
    assert BenchmarksConfig.model_validate({"rm_bench": {}}) == BenchmarksConfig()
    assert BenchmarksConfig.model_validate(config.model_dump()) == config
    with pytest.raises(ValidationError, match=r"by source or by the files \['chat'\], not both"):
        RmBenchData(chat="a.json", source="b.json")


@pytest.mark.parametrize("name", BENCHMARKS)
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_local_files_in_the_official_format(store: ArtifactStore, tmp_path: Path, name: str, suffix: str):
    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        pl.DataFrame(ROWS[name]).write_parquet(path)
    else:
        write(path, ROWS[name])
    found = read(store, name, source=str(path))
    assert found.read(store).items == BENCHMARKS[name].read(ROWS[name]).items
    assert found.texts.responses.rows == sum(len(item.responses) for item in found.read(store).items)


def test_rm_bench_file_by_file_is_rm_bench_at_once(store: ArtifactStore, tmp_path: Path):
    item = {"prompt": "q", "chosen": ["4", "5", "6"], "rejected": ["1", "2", "3"]}
    chat = write(tmp_path / "chat_filtered.json", [item | {"id": 1}])
    refuse = write(tmp_path / "safety-refuse_filtered.json", [item | {"id": 1}])
    apart = read(store, "rm_bench", chat=chat, safety_refuse=refuse).read(store)
    total = write(
        tmp_path / "total.json", [item | {"id": 1, "domain": "chat"}, item | {"id": 1, "domain": "safety-refuse"}]
    )
    assert apart.items == read(store, "rm_bench", source=total).read(store).items
    assert [one.item_id for one in apart.items] == ["chat/1", "safety-refuse/1"]


def test_a_folder_of_rmb_holds_pairs_and_lists(store: ArtifactStore, tmp_path: Path):
    question = [{"role": "user", "content": "q"}]
    lists = {
        "bon_uid": "1", "category_path": "BoN_set/Helpfulness/Code/Data", "conversation_input": question,
        "bon_best": {"llm_name": "x", "answer": "2"}, "loser_list": [{"llm_name": "y", "answer": "1"}, {"llm_name": "z", "answer": "0"}],
    }  # fmt: skip
    write(tmp_path / "RMB_dataset" / "Pairwise_set" / "Harmlessness" / "S1.json", ROWS["rmb"])
    write(tmp_path / "RMB_dataset" / "BoN_set" / "Helpfulness" / "Code" / "Data.json", [lists])
    found = read(store, "rmb", source=str(tmp_path / "RMB_dataset"))
    assert {item.metric for item in found.read(store).items} == {"pairwise accuracy", "best-of-n accuracy"}
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"has no \.json or \.jsonl files"):
        identify_benchmark("rmb", BenchmarkData(source=str(tmp_path / "empty")))


def test_several_files_are_one_benchmark(store: ArtifactStore, tmp_path: Path):
    first, second = (write(tmp_path / f"{n}.jsonl", [pair(n, "hep-go", "1", "0")]) for n in (1, 2))
    assert read(store, "rewardbench", source=(first, second)).items == 2
    with pytest.raises(TableError, match="occurs twice"):
        read(store, "rewardbench", source=(first, first))


def parquet(rows: Sequence[dict[str, Any]]) -> bytes:
    buffer = BytesIO()
    pl.DataFrame(rows).write_parquet(buffer)
    return buffer.getvalue()


def test_a_copy_of_the_hub_dataset_is_read_split_by_split(store: ArtifactStore, tmp_path: Path):
    folder = tmp_path / "reward-bench" / "data"
    folder.mkdir(parents=True)
    (folder / "raw-00000-of-00001.parquet").write_bytes(parquet([pair(9, "hep-go", "0", "1")]))
    (folder / "filtered-00000-of-00001.parquet").write_bytes(parquet(ROWS["rewardbench"]))
    found = read(store, "rewardbench", source=str(tmp_path / "reward-bench"))
    assert found.read(store).items == BENCHMARKS["rewardbench"].read(ROWS["rewardbench"]).items


COMMIT = "4" * 40


def test_without_source_it_is_the_official_dataset_at_the_commit(tmp_path: Path):
    files = {"data/gpt-00000-of-00001.parquet": parquet(ROWS["judgebench"])}
    program = (
        "import sys\n"
        "from tasks.benchmark_sources import BenchmarkData, identify_benchmark, load_benchmark\n"
        "from tasks.store import ArtifactStore\n"
        "store = ArtifactStore(url=sys.argv[1], work_folder=sys.argv[1])\n"
        "parts = identify_benchmark('judgebench', BenchmarkData(revision=sys.argv[2]))\n"
        "found = load_benchmark.function(store, 'judgebench', parts)\n"
        "sys.stdout.write(found.read(store).items[0].item_id)\n"
    )
    with serve_hub({("ScalerLab/JudgeBench", COMMIT): files}) as hub:
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / "store"), COMMIT],
            env=os.environ | {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(CHECKOUT)},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == BENCHMARKS["judgebench"].read(ROWS["judgebench"]).items[0].item_id


def test_what_is_not_named_fully_is_said():
    with pytest.raises(ConfigError, match="set revision to the commit hash"):
        identify_benchmark("rewardbench_2", BenchmarkData())
    with pytest.raises(ConfigError, match=r"set benchmarks\.rmb\.source to the JSON files under RMB_dataset"):
        identify_benchmark("rmb", BenchmarkData())
    with pytest.raises(ConfigError, match="there is no file"):
        identify_benchmark("rewardbench", BenchmarkData(source="nowhere.jsonl"))


MANY = {
    **ROWS,
    "rewardbench": [
        pair(n, subset, chosen, "1")
        for subset in ("hep-go", "hep-cpp", "xstest-should-refuse")
        for n, chosen in enumerate(("2", "1", "0", "3", "4", "1.5"))
    ],
    "rewardbench_2": [
        *(best_of_four(str(n), "Math", chosen, "1", "0", "-1") for n, chosen in enumerate(("2", "1", "0.5"))),
        ties_question("ref", 1, ["3"], ["1", "0"]),
        ties_question("tied", 1, ["3", "2.5"], ["1", "-1"]),
    ],
}


def judged(
    store: ArtifactStore, benchmarks: Sequence[StoredBenchmark], scored: dict[VariantName, tuple[ScoredTexts, ...]]
) -> list[BenchmarkRows]:
    judge = flow(lambda: judge_scored(benchmarks, scored, FEW), name="judge")
    return [store.read_record(ref, BenchmarkRows) for ref in judge()]


@pytest.mark.usefixtures("prefect_session")
def test_the_table_holds_what_the_pure_functions_say(store: ArtifactStore, tmp_path: Path):
    benchmarks = [read(store, name, source=write(tmp_path / f"{name}.jsonl", rows)) for name, rows in MANY.items()]
    scored: dict[VariantName, tuple[ScoredTexts, ...]] = {
        "untouched": tuple(scored_as_written(store, one, -1.0) for one in benchmarks),
        "calibrated": tuple(scored_as_written(store, one, 0.5) for one in benchmarks),
    }
    tables = judged(store, benchmarks, scored)
    for index, (benchmark, table) in enumerate(zip(benchmarks, tables, strict=True)):
        known = benchmark.read(store)
        scores = {name: store.read_table(sets[index].scores, SCORES) for name, sets in scored.items()}
        outcomes = {name: benchmark_outcomes(known, one) for name, one in scores.items()}
        results = {name: benchmark_result(known, one, replicates=50) for name, one in outcomes.items()}
        compared = compare_outcomes(known, outcomes["untouched"], outcomes["calibrated"], replicates=50)
        assert [(row.subset, row.metric) for row in table.rows] == [
            (figure.subset, figure.metric) for figure in results["untouched"].figures
        ]
        for place, row in enumerate(table.rows):
            figures = {name: result.figures[place] for name, result in results.items()}
            assert {one.variant: (one.value, one.tie_rate) for one in row.values} == {
                name: (figure.value, figure.tie_rate) for name, figure in figures.items()
            }
            assert (row.items, row.length_only) == (figures["untouched"].items, figures["untouched"].length_only)
            (test,) = row.tests
            assert (test.difference, test.test) == (compared.figures[place].difference, compared.figures[place].test)
        margins = pair_margins(known, scores["calibrated"])
        reliability = next(one for one in table.reliability if one.variant == "calibrated")
        assert reliability.score_temperature == fit_score_temperature(margins["margin"])
        expected = probability_calibration(pair_probabilities(margins["margin"]), units=margins["unit"], replicates=50)
        assert reliability.as_scored == expected


@pytest.mark.usefixtures("prefect_session")
def test_ties_and_the_smallest_gap_are_logged_whether_or_not_the_scores_are_new(
    store: ArtifactStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    benchmark = read(store, "rewardbench", source=write(tmp_path / "rows.jsonl", MANY["rewardbench"]))
    scored = scored_as_written(store, benchmark, 0.5)
    tie_rate, gap = ties(store.read_table(scored.scores, SCORES))
    assert gap is not None
    line = f"rewardbench, untouched: {ties_line(tie_rate, gap)}"
    for _ in range(2):  # the second time all steps are cached
        caplog.clear()
        judged(store, [benchmark], {"untouched": (scored,)})
        assert caplog.messages.count(line) == 1


@pytest.mark.usefixtures("prefect_session")
def test_items_with_a_text_that_was_cut_are_counted_where_they_count(store: ArtifactStore, tmp_path: Path):
    source = write(tmp_path / "rows.jsonl", MANY["rewardbench"])
    benchmark = read(store, "rewardbench", source=source)
    known = benchmark.read(store)
    wanted = next(item for item in known.items if item.subset == "hep-cpp")
    responses = store.read_table(benchmark.texts.responses, RESPONSES)
    numbers = [n for n, row in enumerate(responses.rows()) if row[0] == wanted.prompt_id]
    (table,) = judged(store, [benchmark], {"untouched": (scored_as_written(store, benchmark, 1.0, *numbers),)})
    cut = {row.subset: row.values[0].truncated for row in table.rows}
    assert (cut["overall"], cut["Reasoning"], cut["hep-cpp"], cut["hep-go"], cut["Safety"]) == (1, 1, 1, 0, 0)


@pytest.mark.usefixtures("prefect_session")
def test_a_real_reward_model_through_all_of_it(store: ArtifactStore, tmp_path: Path):
    rows = [pair(n, "hep-go", f"w{n} w{n + 1}", f"w{n + 2}") for n in range(12)]
    config = BenchmarksConfig(
        rewardbench=BenchmarkData(source=write(tmp_path / "one.jsonl", rows)),
        rewardbench_2=BenchmarkData(
            source=write(tmp_path / "two.jsonl", [best_of_four("1", "Math", "w1", "w2", "w3", "w4")])
        ),
        resampling=FEW,
    )
    folder = tiny.save_model(tmp_path / "rm")
    model = identify_reward_model(RewardModelSpec(path=str(folder), max_length=64))
    run = flow(lambda: run_benchmarks(config, {"untouched": model, "control": model, "calibrated": model}), name="run")
    tables = [store.read_record(ref, BenchmarkRows) for ref in run()]
    assert [table.rows[0].benchmark for table in tables] == ["RewardBench", "RewardBench 2"]
    for row in tables[0].rows:
        assert [(test.before, test.after) for test in row.tests] == [
            ("untouched", "calibrated"),
            ("control", "calibrated"),
        ]
        assert {test.difference.value for test in row.tests} == {0.0}
        assert len({value.value for value in row.values}) == 1
    assert run_benchmarks(BenchmarksConfig(), {"untouched": model}) == ()
    with pytest.raises(ConfigError, match="there is no file"):
        load_benchmarks(config.model_copy(update={"rmb": BenchmarkData(source="nowhere.json")}))


@pytest.mark.real
def test_the_real_files(store: ArtifactStore, shared_data: Path):
    files = {
        name.replace("-", "_"): str(shared_data / "rm_bench" / f"{name}_filtered.json")
        for name in ("chat", "code", "safety-refuse", "safety-response")
    }
    found = read(store, "rm_bench", **files)
    assert found.items == 129 + 228 + 284 + 157
    assert found.texts.responses.rows <= 6 * found.items
    # the same text again is the same row
    assert found.texts.responses.rows > 5.9 * found.items
