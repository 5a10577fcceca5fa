"""Every text is scored once, whatever it comes up in; what is damaged is scored again, and nothing stale is served."""

import logging
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from charm_core.errors import ArtifactError, ModelError
from charm_core.reward_model.jobs import ScoringJob, ScoringSummary
from charm_core.reward_model.scoring import score_responses
from charm_core.reward_model.spec import RewardModelSpec
from charm_core.tables import PROMPTS, RESPONSES, SCORES
from tasks import text_scores
from tasks.prompts import ResponseSet
from tasks.scoring import RewardModelRef, identify_reward_model
from tasks.store import ArtifactRef, ArtifactStore
from tasks.text_scores import ScoredTexts, score_texts, text_digest
from tasks.worker_processes import OnLine
from tests.charm_core.reward_model import tiny
from tests.tasks.tiny_scoring import WARNED, reward_model, scoring_here


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(url=str(tmp_path / "store"), work_folder=str(tmp_path))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("rm"))


@pytest.fixture
def model(folder: Path) -> RewardModelRef:
    return reward_model(folder)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Texts of every pass; what the process does is done in this one, for starting it takes seconds."""
    counts: list[int] = []
    monkeypatch.setattr(text_scores, "run_scoring", scoring_here(counts))
    return counts


Text = tuple[str, str, str, str]
"""Prompt id, policy model, question, response."""


def text_set(store: ArtifactStore, *texts: Text) -> ResponseSet:
    asked = {prompt_id: tiny.messages(question) for prompt_id, _, question, _ in texts}
    prompts = pl.DataFrame(
        [(prompt_id, "x", messages) for prompt_id, messages in asked.items()],
        schema=dict(PROMPTS.columns),
        orient="row",
    )
    responses = pl.DataFrame(
        [(prompt_id, model, response) for prompt_id, model, _, response in texts],
        schema=dict(RESPONSES.columns),
        orient="row",
    )
    return ResponseSet(
        prompts=store.write_table(prompts, PROMPTS),
        responses=store.write_table(responses, RESPONSES),
        policy_models=(),
    )


def scored(store: ArtifactStore, model: RewardModelRef, *sets: ResponseSet) -> tuple[ScoredTexts, ...]:
    return score_texts.function(store, model, sets)


def values(store: ArtifactStore, one: ScoredTexts) -> dict[tuple[str, str], float]:
    return {(prompt, name): score for prompt, name, score in store.read_table(one.scores, SCORES).iter_rows()}


FIRST = (("p1", "a", "w1 w2", "w3"), ("p1", "b", "w1 w2", "w4 w5"), ("p2", "a", "w6", "w3"))
SECOND = (("q1", "c", "w1 w2", "w3"), ("q1", "d", "w1 w2", "w7 w8 w9"))


def test_several_sets_are_one_pass_in_which_a_text_is_scored_once(
    store: ArtifactStore, model: RewardModelRef, passes: list[int]
):
    sets = text_set(store, *FIRST), text_set(store, *SECOND)
    first, second = scored(store, model, *sets)
    assert passes == [4]  # of five responses two are the same text
    assert values(store, first)["p1", "a"] == values(store, second)["q1", "c"]
    assert (first.texts, second.texts) == (3, 2)


def test_scores_are_those_of_the_scoring_engine(store: ArtifactStore, model: RewardModelRef):
    prompts, responses = tiny.prompts_and_responses(20)
    texts = ResponseSet(
        prompts=store.write_table(prompts, PROMPTS),
        responses=store.write_table(responses, RESPONSES),
        policy_models=("a", "b", "c"),
    )
    (found,) = scored(store, model, texts)
    expected = score_responses(model.spec, prompts, responses)
    table = store.read_table(found.scores, SCORES)
    assert table.drop("score").equals(expected.scores.drop("score"))
    assert table["score"].to_list() == pytest.approx(expected.scores["score"].to_list(), abs=1e-5)


def test_an_item_more_costs_one_text_and_leaves_the_others_as_they_were(
    store: ArtifactStore, model: RewardModelRef, passes: list[int]
):
    (before,) = scored(store, model, text_set(store, *FIRST))
    more = text_set(store, *FIRST, ("p3", "a", "w9", "w9"))
    (after,) = scored(store, model, more)
    assert passes == [3, 1]
    assert values(store, before).items() <= values(store, after).items()
    (again,) = scored(store, model, more)
    assert passes == [3, 1]
    assert again == after


def test_one_id_for_two_prompts_of_two_sets_does_no_harm(
    store: ArtifactStore, model: RewardModelRef, passes: list[int]
):
    one, other = scored(
        store, model, text_set(store, ("p", "a", "w1", "w5")), text_set(store, ("p", "a", "w2 w3", "w5"))
    )
    assert passes == [2]
    assert values(store, one) != values(store, other)


@pytest.mark.parametrize("settings", [{"max_length": 32}, {"system_prompt": "w9"}, {"dtype": "bfloat16"}])
def test_other_settings_are_another_reward_model(
    store: ArtifactStore, model: RewardModelRef, passes: list[int], settings: dict[str, object]
):
    texts = text_set(store, *FIRST)
    scored(store, model, texts)
    other = identify_reward_model(model.spec.model_copy(update=settings))
    scored(store, other, texts)
    assert passes == [3, 3]


def test_where_the_reward_model_lies_does_not_matter(
    store: ArtifactStore, model: RewardModelRef, folder: Path, tmp_path: Path, passes: list[int]
):
    texts = text_set(store, *FIRST)
    (known,) = scored(store, model, texts)
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (found,) = scored(
        store, identify_reward_model(RewardModelSpec(path=str(copy), max_length=64, min_response_tokens=8)), texts
    )
    assert (passes, found) == ([3], known)


def kept(store: ArtifactStore) -> list[Path]:
    return sorted(Path(store.url, "text_scores").rglob("*.parquet"))


@pytest.mark.parametrize("harm", [lambda file: file.unlink(), lambda file: file.write_bytes(file.read_bytes()[:-9])])
def test_what_is_gone_or_damaged_is_scored_again(
    store: ArtifactStore, model: RewardModelRef, passes: list[int], harm: Callable[[Path], None]
):
    (before,) = scored(store, model, text_set(store, *FIRST))
    (file,) = kept(store)
    harm(file)
    (after,) = scored(store, model, text_set(store, *FIRST))
    assert passes == [3, 3]
    assert after == before


def test_a_damaged_note_costs_time_only(store: ArtifactStore, model: RewardModelRef, passes: list[int]):
    scored(store, model, text_set(store, *FIRST))
    for note in Path(store.url, "notes").iterdir():
        note.write_bytes(note.read_bytes() + b" ")
    scored(store, model, text_set(store, *FIRST))
    assert passes == [3, 3]


@pytest.mark.usefixtures("passes")
def test_texts_that_were_cut_are_named_however_they_were_had(store: ArtifactStore, model: RewardModelRef):
    long = " ".join(f"w{number % 40}" for number in range(200))
    texts = text_set(store, ("p1", "a", "w1", long), ("p1", "b", "w1", "w2"), ("p2", "a", long, f"w3 {long}"))
    (first,) = scored(store, model, texts)
    (known,) = scored(store, model, text_set(store, ("p9", "z", "w1", long)))
    cut = store.read_frame(first.cut)
    assert cut.select("prompt_id", "policy_model").rows() == [("p1", "a"), ("p2", "a")]
    assert (first.prompts_cut, first.responses_cut) == (1, 2)
    assert (known.texts, known.prompts_cut, known.responses_cut) == (1, 0, 1)


def test_an_interrupted_pass_keeps_what_it_had(
    store: ArtifactStore, model: RewardModelRef, monkeypatch: pytest.MonkeyPatch, passes: list[int]
):
    monkeypatch.setattr(text_scores, "TEXTS_PER_PROCESS", 2)
    broken = text_scores.run_scoring

    def fails_second(job: ScoringJob, progress: Callable[[int, int], None], log: OnLine) -> ScoringSummary:
        if passes:
            raise ModelError("out of memory")
        return broken(job, progress, log)

    monkeypatch.setattr(text_scores, "run_scoring", fails_second)
    with pytest.raises(ModelError, match="out of memory"):
        scored(store, model, text_set(store, *FIRST))
    monkeypatch.setattr(text_scores, "run_scoring", broken)
    scored(store, model, text_set(store, *FIRST))
    assert passes == [2, 1]


def test_one_line_says_what_all_processes_met(
    store: ArtifactStore,
    model: RewardModelRef,
    monkeypatch: pytest.MonkeyPatch,
    passes: list[int],
    caplog: pytest.LogCaptureFixture,
):
    monkeypatch.setattr(text_scores, "TEXTS_PER_PROCESS", 2)  # so that one prompt's responses are in two processes
    with caplog.at_level(logging.INFO, "charm"):
        scored(store, model, text_set(store, *FIRST), text_set(store, *SECOND))
        scored(store, model, text_set(store, *FIRST))
    assert passes == [2, 2]
    said = [record.getMessage() for record in caplog.records if record.name == "charm"]
    warned, met = said
    assert warned == WARNED.removeprefix("WARNING ")
    assert met.startswith("scored 4 texts, 4 of them different, of ")
    assert "packed, in a batch a score moves by" in met
    assert "tie rate 0.00%, smallest gap " in met


def test_texts_are_told_apart_to_the_last_character():
    question = tiny.messages("a")
    texts = [
        (question, "b"),
        (question, "b "),
        (question, "B"),
        ([*question, *tiny.messages("a")], "b"),
        ([{"role": "system", "content": "a"}], "b"),
        (question, "b\u2028"),
    ]
    assert len({text_digest(messages, response) for messages, response in texts}) == len(texts)


def test_a_reference_to_nothing_is_an_error(store: ArtifactStore, model: RewardModelRef):
    missing = ArtifactRef(kind="prompts", digest="0" * 64, uri=str(Path(store.url, "none")), size=1)
    with pytest.raises(ArtifactError, match="cannot read"):
        scored(store, model, ResponseSet(prompts=missing, responses=missing, policy_models=()))
