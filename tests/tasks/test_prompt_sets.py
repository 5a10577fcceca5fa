"""Prompt sets from the files that people have, as steps of a flow."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from prefect import flow
from pydantic import ValidationError

from charm_core.errors import ConfigError, TableError
from charm_core.tables import PROMPTS
from tasks.caching import use_store
from tasks.prompt_sets import PromptSet, PromptSetConfig, PromptSource, load_prompt_set
from tasks.store import ArtifactStore

pytestmark = pytest.mark.usefixtures("prefect_session")

ITEM = "Name the seven wonders of the ancient world and say in one sentence each what became of them"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ArtifactStore]:
    with use_store(ArtifactStore(url=str(tmp_path / "store"), work_folder=str(tmp_path))) as store:
        yield store


@flow
def load(config: PromptSetConfig) -> PromptSet:
    return load_prompt_set(config)


def lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def alpaca_eval(path: Path, instructions: list[str]) -> str:
    rows = [
        {"dataset": "koala", "instruction": text, "output": "An answer.", "generator": "text_davinci_003"}
        for text in instructions
    ]
    path.write_text(json.dumps(rows))
    return str(path)


def steps(store: ArtifactStore) -> list[str]:
    return sorted(path.name.rsplit("-", 2)[0] for path in Path(store.url, "steps").iterdir())


def asked(store: ArtifactStore, found: PromptSet) -> set[str]:
    return {row[-1]["content"] for row in store.read_table(found.prompts, PROMPTS).get_column("messages").to_list()}


def test_from_an_alpaca_eval_file_to_prompts(store: ArtifactStore, tmp_path: Path):
    source = alpaca_eval(tmp_path / "alpaca_eval.json", ["one", "two", "Two ", "learnt", ITEM, "three"])
    rm_bench = [{"id": 1, "prompt": f"{ITEM}.", "chosen": ["a", "b", "c"], "rejected": ["d", "e", "f"]}]
    (tmp_path / "chat_filtered.json").write_text(json.dumps(rm_bench))
    reward_bench = pl.DataFrame({"prompt": ["three", "Tell me"], "chosen": ["a", "b"], "rejected": ["c", "d"]})
    reward_bench.write_parquet(tmp_path / "reward_bench.parquet")
    trained_on = lines(tmp_path / "trained.jsonl", [{"prompt": "Learnt"}, {"prompt": "something else"}])
    found = load(
        PromptSetConfig(
            source=source,
            trained_on=trained_on,
            avoid_benchmarks=(
                PromptSource(source=str(tmp_path / "chat_filtered.json"), name="RM-Bench chat"),
                PromptSource(source=str(tmp_path / "reward_bench.parquet")),
            ),
        )
    )
    assert asked(store, found) == {"one", "two", "learnt"}
    assert found.trained_on is not None
    known = store.read_frame(found.trained_on).get_column("prompt_id").to_list()
    prompts = store.read_table(found.prompts, PROMPTS)
    assert prompts.filter(pl.col("prompt_id").is_in(known)).get_column("messages")[0][0]["content"] == "learnt"
    assert prompts.get_column("prompt_set").unique().to_list() == ["koala"]
    assert store.read_frame(found.removed).select("row", "reason").rows() == [
        (3, "repeated but for case and white space"),
        (5, "overlap with a benchmark"),
        (6, "overlap with a benchmark"),
    ]
    summary, *overlaps, trained = found.sentences()
    assert summary.startswith("Prompts: 3 of 6 rows are used")
    assert [sentence.partition(":")[0] for sentence in overlaps] == [
        "1 prompts overlap with RM-Bench chat (1 texts)",
        "1 prompts overlap with reward_bench (2 texts)",
    ]
    assert trained.startswith("1 different prompts are known to the reward model from its training")


def test_another_sample_does_not_read_the_source_again(store: ArtifactStore, tmp_path: Path):
    source = lines(tmp_path / "prompts.jsonl", [{"prompt": f"question {n}"} for n in range(50)])
    small = load(PromptSetConfig(source=source, limit=10))
    assert steps(store) == ["choose_prompts", "read_prompt_source"]
    large = load(PromptSetConfig(source=source, limit=20))
    assert steps(store) == ["choose_prompts", "choose_prompts", "read_prompt_source"]
    assert asked(store, small) < asked(store, large)
    moved = lines(tmp_path / "moved.jsonl", [{"prompt": f"question {n}"} for n in range(50)])
    assert load(PromptSetConfig(source=moved, limit=10)) == small
    assert len(steps(store)) == 3
    lines(tmp_path / "moved.jsonl", [{"prompt": f"question {n}"} for n in range(51)])
    assert load(PromptSetConfig(source=moved, limit=60)).counts.prompts == 51
    assert len(steps(store)) == 5


def test_a_list_of_ids_and_a_folder_of_the_datasets_library(store: ArtifactStore, tmp_path: Path):
    folder = tmp_path / "preferences"
    folder.mkdir()
    pairs = [
        {
            "chosen": [{"content": f"question {n}", "role": "user"}, {"content": "yes", "role": "assistant"}],
            "rejected": [{"content": f"question {n}", "role": "user"}, {"content": "no", "role": "assistant"}],
        }
        for n in range(6)
    ]
    pl.DataFrame(pairs).write_parquet(folder / "train.parquet")
    everything = load(PromptSetConfig(source=str(folder)))
    assert asked(store, everything) == {f"question {n}" for n in range(6)}
    assert everything.trained_on is None
    ids = store.read_table(everything.prompts, PROMPTS).get_column("prompt_id").to_list()
    (tmp_path / "seen.txt").write_text(f"{ids[0]}\n\nnever seen\r\n{ids[3]} \n")
    config = {"source": str(folder), "trained_on": str(tmp_path / "seen.txt")}
    marked = load(PromptSetConfig.model_validate(config))
    assert marked.trained_on is not None
    assert store.read_frame(marked.trained_on).get_column("prompt_id").to_list() == [ids[0], ids[3]]
    fewer = load(PromptSetConfig.model_validate(config | {"exclude_trained_on": True}))
    assert (fewer.counts.prompts, fewer.counts.trained_on_left_out) == (4, 2)
    assert not [sentence for sentence in fewer.sentences() if "known to the reward model" in sentence]
    (tmp_path / "seen.txt").write_text("another list\n")
    with pytest.raises(ConfigError, match="none of the 6 prompts is among the 1 ids of trained_on"):
        load(PromptSetConfig.model_validate(config))


def test_what_a_reward_model_was_trained_on_may_need_settings_of_its_own(store: ArtifactStore, tmp_path: Path):
    source = lines(tmp_path / "prompts.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    trained_on = lines(
        tmp_path / "trained.jsonl", [{"question": "a", "part": "train"}, {"question": "b", "part": "test"}]
    )
    settings = {"source": trained_on, "columns": {"prompt": "question"}, "where": {"part": "train"}}
    found = load(PromptSetConfig.model_validate({"source": source, "trained_on": settings}))
    assert found.counts.trained_on == 1


def test_settings_that_cannot_be_meant(store: ArtifactStore, tmp_path: Path):
    source = lines(tmp_path / "prompts.jsonl", [{"prompt": "a"}])
    with pytest.raises(ValidationError, match="exclude_trained_on needs trained_on"):
        PromptSetConfig(source=source, exclude_trained_on=True)
    with pytest.raises(ConfigError, match=r"avoid_benchmarks has \['prompts'\] more than once"):
        load(PromptSetConfig(source=source, avoid_benchmarks=(PromptSource(source=source),) * 2))
    with pytest.raises(ConfigError, match="set revision to the commit hash"):
        load(PromptSetConfig(source="shawnxzhu/CHARM-preference20K"))
    with pytest.raises(TableError, match="1 of 2 rows cannot be asked"):
        load(PromptSetConfig(source=lines(tmp_path / "empty.jsonl", [{"prompt": "a"}, {"prompt": ""}])))
    assert not list(Path(store.url).glob("prompts/*"))


@pytest.mark.real
def test_alpaca_eval_overlaps_with_the_chat_part_of_rm_bench(store: ArtifactStore, tmp_path: Path, shared_data: Path):
    """RM-Bench took its chat prompts from AlpacaEval, and its other files from elsewhere."""
    answers = pl.read_parquet(shared_data / "responses.parquet").filter(pl.col("benchmark") == "alpaca_eval")
    instructions = answers.get_column("prompt").unique(maintain_order=True).to_list()
    files = sorted(Path(shared_data, "rm_bench").glob("*.json"))
    found = load(
        PromptSetConfig(
            source=alpaca_eval(tmp_path / "alpaca_eval.json", instructions),
            avoid_benchmarks=tuple(PromptSource(source=str(path)) for path in files),
        )
    )
    overlapping = {overlap.benchmark: overlap.prompts for overlap in found.counts.overlaps}
    assert found.counts.rows == 805
    assert 100 <= overlapping.pop("chat_filtered") <= 140
    assert sum(overlapping.values()) == 0
    assert found.counts.prompts + found.counts.overlapping + found.counts.repeated_but_for_layout == 805
