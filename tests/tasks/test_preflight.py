import polars as pl
import pytest

from charm_core.errors import ModelError
from charm_core.reward_model.spec import RewardModelSpec, TrainingConfig
from charm_core.tables import PROMPTS, RESPONSES
from tasks.preflight import MOST_CHARACTERS, MOST_TEXTS, check_before_run, sample_texts
from tasks.prompts import ResponseSet
from tasks.scoring import RewardModelRef, identify_reward_model
from tasks.store import ArtifactStore
from tests.charm_core.reward_model.kinds import save_classifier, save_gated, save_value_head
from tests.charm_core.reward_model.tiny import messages, prompts_and_responses


@pytest.fixture
def store(tmp_path):
    return ArtifactStore(url=str(tmp_path / "store"), work_folder=str(tmp_path))


def response_set(store, prompts, responses):
    return ResponseSet(
        prompts=store.write_table(prompts, PROMPTS),
        responses=store.write_table(responses, RESPONSES),
        policy_models=tuple(responses["policy_model"].unique().sort()),
    )


def test_a_sound_model_and_what_it_is_to_score(store, tmp_path):
    responses = response_set(store, *prompts_and_responses(100))
    model = identify_reward_model(RewardModelSpec(path=str(save_value_head(tmp_path / "rm"))))
    report = check_before_run(store, model, responses, TrainingConfig())
    # a tiny model fits anywhere
    assert [(one.rule, one.severity) for one in report.findings] == [("memory", "info")]
    assert (report.kind, report.texts, report.texts_in_all) == ("value_head", MOST_TEXTS, 300)
    report.raise_on_errors()


def test_a_faulty_model_and_texts_that_are_too_long(store, tmp_path):
    prompts, responses = prompts_and_responses(20)
    long = responses.with_columns(response=pl.col("response") + " w1" * 60)
    spec = RewardModelSpec(path=str(save_gated(tmp_path / "rm")), max_length=40)
    report = check_before_run(store, spec, response_set(store, prompts, long), TrainingConfig())
    assert [(one.rule, one.severity) for one in report.findings] == [("training", "error"), ("length", "warning")]
    assert report.warnings[0].message.startswith("60 of 60 texts are longer than 40 tokens")
    with pytest.raises(ModelError, match="cannot fine-tune"):
        report.raise_on_errors()


def test_one_of_our_own_models_is_taken_from_the_store(store, tmp_path):
    folder = store.write_folder(save_classifier(tmp_path / "rm"), "reward_model")
    spec = RewardModelSpec(path="where it was made")
    report = check_before_run(store, RewardModelRef(spec=spec, digest=folder.digest, folder=folder))
    assert (report.kind, report.texts, report.findings) == ("classifier", 0, ())


def test_code_that_a_model_brings_is_not_run_unless_trusted(store, tmp_path):
    import json

    folder = save_classifier(tmp_path / "rm")
    (folder / "modeling_mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    code = {"AutoConfig": "modeling_mine.C", "AutoModelForSequenceClassification": "modeling_mine.M"}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": code, "model_type": "mine"}))
    report = check_before_run(store, RewardModelSpec(path=str(folder)))
    assert [one.rule for one in report.errors] == ["remote-code"]
    assert not (tmp_path / "ran").exists()


def test_the_sample_is_the_same_every_time_and_bounded(store):
    prompts, responses = prompts_and_responses(200)
    sets = response_set(store, prompts, responses)
    texts = sample_texts(store, sets)
    assert texts.height == MOST_TEXTS < responses.height
    assert texts.equals(sample_texts(store, sets))
    assert texts["response"].n_unique() > MOST_TEXTS / 2
    huge = responses.with_columns(response=pl.lit("w1 " * (MOST_CHARACTERS // 6)))
    assert sample_texts(store, response_set(store, prompts, huge)).height == 1
    answered = responses.head(1).with_columns(response=pl.lit("w1 " * MOST_CHARACTERS))
    one = sample_texts(store, response_set(store, prompts, answered))
    assert one.height == 1
    assert one["messages"].to_list()[0] == prompts.filter(prompt_id=answered["prompt_id"][0])["messages"].to_list()[0]


def test_several_turns_are_kept(store):
    prompts = pl.DataFrame({"prompt_id": ["p"], "prompt_set": ["s"], "messages": [messages("w1", "w2", "w3")]})
    responses = pl.DataFrame({"prompt_id": ["p"], "policy_model": ["m"], "response": [""]})
    texts = sample_texts(store, response_set(store, prompts, responses))
    assert texts.rows() == [(messages("w1", "w2", "w3"), "")]
