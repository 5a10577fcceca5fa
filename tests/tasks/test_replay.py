"""Replay of responses in the files that people have, as a step of a flow."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from prefect import flow

from charm_core.errors import ConfigError, TableError
from charm_core.sampling import Decoding
from charm_core.tables import SAMPLES
from tasks.caching import use_store
from tasks.policy_models import OpenAIBackend, PolicyModel, ReplayBackend
from tasks.prompt_sets import PromptSet, PromptSetConfig, load_prompt_set
from tasks.replay import ReplayedModel, replay_responses
from tasks.store import ArtifactStore

pytestmark = pytest.mark.usefixtures("prefect_session")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ArtifactStore]:
    with use_store(ArtifactStore(url=str(tmp_path / "store"), work_folder=str(tmp_path))) as store:
        yield store


@flow
def replay(prompts: PromptSetConfig, models: list[PolicyModel]) -> list[ReplayedModel]:
    asked: PromptSet = load_prompt_set(prompts)
    return [replay_responses(asked.prompts, model) for model in models]


def replayed(name: str, source: Path, **settings: Any) -> PolicyModel:
    return PolicyModel(name=name, backend=ReplayBackend.model_validate({"source": str(source), **settings}))


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    as_lines = path.suffix == ".jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) if as_lines else json.dumps(rows))
    return path


def alpaca(model: str, instructions: list[str]) -> list[dict[str, Any]]:
    return [
        {"instruction": text, "output": f"{model} on {text}", "generator": model, "dataset": "koala"}
        for text in instructions
    ]


def responses(store: ArtifactStore, model: ReplayedModel) -> dict[str, str]:
    return dict(store.read_table(model.samples, SAMPLES).select("prompt_id", "response").iter_rows())


def test_alpaca_eval_from_questions_to_samples(store: ArtifactStore, tmp_path: Path):
    questions = write(tmp_path / "alpaca_eval.json", alpaca("text_davinci_003", ["one", "two", "three"]))
    outputs = write(tmp_path / "results" / "gpt4" / "model_outputs.json", alpaca("gpt4", ["two", "three", "four"]))
    prompts = PromptSetConfig(source=str(questions))
    decoding = Decoding(sampling_temperature=0.3)
    known = replayed("gpt-4", outputs.parent).model_copy(update={"decoding": decoding})
    (model,) = replay(prompts, [known])
    assert sorted(responses(store, model).values()) == ["gpt4 on three", "gpt4 on two"]
    assert (model.name, model.counts.prompts, model.counts.complete, model.decoding) == ("gpt-4", 2, 2, decoding)
    assert (model.replay.missing, model.replay.without_prompt, model.replay.called) == (1, 1, "gpt4")
    assert model.warnings == model.replay.sentences("gpt-4") != ()
    again = replay(prompts, [known.model_copy(update={"backend": ReplayBackend(source=str(outputs))})])
    assert again == [model]
    assert len([path for path in Path(store.url, "steps").iterdir() if path.name.startswith("replay_answers")]) == 1


@pytest.mark.parametrize("version", [1, 2])
def test_arena_hard_from_questions_to_samples(store: ArtifactStore, tmp_path: Path, version: int):
    def question(number: int) -> dict[str, Any]:
        if version == 1:
            return {"question_id": f"q{number}", "category": "arena-hard-v0.1", "turns": [{"content": f"ask {number}"}]}
        return {"uid": f"q{number}", "category": "coding", "prompt": f"ask {number}"}

    def answer(number: int, model: str) -> dict[str, Any]:
        content: Any = f"{model} on {number}" if number % 2 else {"answer": f"{model} on {number}"}
        if version == 1:
            return {"question_id": f"q{number}", "model_id": model, "choices": [{"turns": [{"content": content}]}]}
        said = [{"role": "user", "content": f"ask {number}"}, {"role": "assistant", "content": content}]
        return {"uid": f"q{number}", "model": model, "messages": said}

    questions = write(tmp_path / "question.jsonl", [question(number) for number in range(3)])
    folder = tmp_path / "model_answer"
    for name in ("one", "two"):
        write(folder / f"{name}.jsonl", [answer(number, name) for number in range(3)])
    models = replay(PromptSetConfig(source=str(questions)), [replayed(name, folder) for name in ("one", "two")])
    assert [responses(store, model) for model in models] == [
        {f"q{number}": f"{name} on {number}" for number in range(3)} for name in ("one", "two")
    ]
    assert [model.warnings for model in models] == [(), ()]
    with pytest.raises(ConfigError, match=r"has no three.jsonl and no model_outputs.json, only one.jsonl, two.jsonl"):
        replay(PromptSetConfig(source=str(questions)), [replayed("three", folder, format="arena_hard")])


def test_tables_of_several_policy_models_and_folders_of_datasets(store: ArtifactStore, tmp_path: Path):
    table = pl.DataFrame(
        [(f"ask {number}", name, f"{name} on {number}", name == "a") for number in range(4) for name in ("a", "b")],
        schema=["question", "model", "text", "checked"],
        orient="row",
    )
    table.write_parquet(tmp_path / "answers.parquet")
    (tmp_path / "dataset" / "data").mkdir(parents=True)
    table.filter(pl.col("model") == "b").select("question", "text").write_parquet(
        tmp_path / "dataset" / "data" / "train.parquet"
    )
    prompts = PromptSetConfig.model_validate(
        {"source": str(tmp_path / "answers.parquet"), "columns": {"prompt": "question"}, "where": {"model": "a"}}
    )
    columns = {"prompt": "question", "policy_model": "model", "response": "text"}
    first, second = replay(
        prompts,
        [
            replayed("a", tmp_path / "answers.parquet", columns=columns),
            replayed("b", tmp_path / "dataset", columns={"prompt": "question", "response": "text"}),
        ],
    )
    assert sorted(responses(store, first).values()) == [f"a on {number}" for number in range(4)]
    assert sorted(responses(store, second).values()) == [f"b on {number}" for number in range(4)]
    assert (first.replay.other_policy_models, second.replay.called) == (4, None)
    with pytest.raises(ConfigError, match="none is called 'c'; choose one with where: a, b"):
        replay(prompts, [replayed("c", tmp_path / "answers.parquet", columns=columns)])


def test_a_prompt_answered_twice_and_a_prompt_not_answered(store: ArtifactStore, tmp_path: Path):
    prompts = PromptSetConfig(source=str(write(tmp_path / "prompts.jsonl", [{"prompt": "one"}, {"prompt": "two"}])))
    twice = write(tmp_path / "answers.jsonl", [{"prompt": "one", "response": text} for text in ("a", "b")])
    with pytest.raises(TableError, match="1 prompts have several responses of 'm'"):
        replay(prompts, [replayed("m", twice)])
    once = write(tmp_path / "once.jsonl", [{"prompt": "one", "response": "a"}])
    with pytest.raises(TableError, match="1 of 2 prompts have no response of 'm'"):
        replay(prompts, [replayed("m", once, allow_missing=False)])
    (model,) = replay(prompts, [replayed("m", once)])
    assert (model.counts.prompts, model.replay.missing) == (1, 1)


def test_only_replay_is_replayed(store: ArtifactStore, tmp_path: Path):
    prompts = PromptSetConfig(source=str(write(tmp_path / "prompts.jsonl", [{"prompt": "one"}])))
    live = PolicyModel(name="live", backend=OpenAIBackend(base_url="http://127.0.0.1:9/v1", model="m"))
    with pytest.raises(ConfigError, match="'live' is not replayed but has the back end 'openai'"):
        replay(prompts, [live])
    with pytest.raises(ConfigError, match="there is no file"):
        replay(prompts, [replayed("m", tmp_path / "nowhere.jsonl")])


@pytest.mark.real
def test_real_answers_all_find_their_prompts(store: ArtifactStore, tmp_path: Path, shared_data: Path):
    table = pl.read_parquet(shared_data / "responses.parquet")
    models = ["gpt-4-1106-preview", "gemma-2-9b-it-simpo"]
    alpaca_eval = table.filter(pl.col("benchmark") == "alpaca_eval")
    questions = alpaca_eval.unique("prompt_id", maintain_order=True).select(
        pl.col("prompt").alias("instruction"), pl.lit("koala").alias("dataset")
    )
    prompts = PromptSetConfig(source=str(write(tmp_path / "alpaca_eval.json", questions.to_dicts())))
    for name in models:
        outputs = alpaca_eval.filter(pl.col("model") == name).select(
            pl.col("prompt").alias("instruction"),
            pl.col("response").alias("output"),
            pl.col("source_model_name").alias("generator"),
        )
        write(tmp_path / name / "model_outputs.json", outputs.to_dicts())
    found = replay(prompts, [replayed(name, tmp_path / name) for name in models])
    for name, model in zip(models, found, strict=True):
        expected = alpaca_eval.filter(pl.col("model") == name)
        assert model.counts.prompts == expected.height
        assert (model.replay.without_prompt, model.replay.missing) == (0, 805 - expected.height)
