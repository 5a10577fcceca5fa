"""What identifies a reward model: all that decides its scores, and nothing else."""

import json
import shutil

import pytest

from charm_core.errors import ConfigError, ModelError
from charm_core.reward_model.spec import RewardModelSpec
from tasks.caching import content_key
from tasks.scoring import RewardModelRef, identify_reward_model
from tests.charm_core.reward_model.kinds import (
    GEMMA_TEMPLATE,
    LLAMA_TEMPLATE,
    change_json,
    change_weights,
    save_adapter,
    save_causal,
    save_classifier,
    tokenizer_of,
)

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def key(spec: RewardModelSpec) -> str:
    return content_key("score", 1, {"model": identify_reward_model(spec)})


def test_a_classifiers_identity_is_what_it_was_before_there_were_other_kinds(tmp_path):
    reference = identify_reward_model(RewardModelSpec(path=str(save_classifier(tmp_path / "rm")), max_length=64))
    assert reference.identity() == {
        "digest": reference.digest,
        "spec": {
            "max_length": 64,
            "max_prompt_characters": None,
            "min_response_tokens": 64,
            "dtype": "auto",
            "batch_tokens": "auto",
            "attention": "auto",
            "trust_remote_code": False,
        },
    }
    hub = identify_reward_model(RewardModelSpec(path="org/rm", revision=COMMIT))
    assert hub.digest == f"hub:org/rm@{COMMIT}"
    assert content_key("score", 1, {"model": hub}) == (
        "score-v1-9519e6c9fe2a39d7ba9bd460110d9164d85b243cfab024bf5f326ca07e005e52"
    )


def test_a_reference_of_an_earlier_version_is_still_read(tmp_path):
    stored = {"spec": {"path": "rm", "max_length": 64}, "digest": "d", "folder": None}
    assert RewardModelRef.model_validate_json(json.dumps(stored)).spec == RewardModelSpec(path="rm", max_length=64)


def test_the_place_does_not_matter_and_the_content_does(tmp_path):
    first = save_classifier(tmp_path / "first")
    second = shutil.copytree(first, tmp_path / "second")
    assert key(RewardModelSpec(path=str(first))) == key(RewardModelSpec(path=str(second)))
    change_weights(second, lambda weights: weights["score.weight"].add_(1))
    assert key(RewardModelSpec(path=str(first))) != key(RewardModelSpec(path=str(second)))


@pytest.mark.parametrize(
    "settings",
    [
        {"truncation_side": "left"},
        {"system_prompt": "be kind"},
        {"chat_template": GEMMA_TEMPLATE},
        {"dtype": "float16"},
        {"max_length": 99},
    ],
)
def test_settings_that_change_scores_change_the_identity(tmp_path, settings):
    folder = str(save_classifier(tmp_path / "rm"))
    assert key(RewardModelSpec(path=folder)) != key(RewardModelSpec(path=folder, **settings))


def test_a_template_is_identified_by_its_text(tmp_path):
    folder = str(save_classifier(tmp_path / "rm"))
    file, copy = tmp_path / "a.jinja", tmp_path / "b.jinja"
    for path in (file, copy):
        path.write_text(LLAMA_TEMPLATE)
    expected = key(RewardModelSpec(path=folder, chat_template=LLAMA_TEMPLATE))
    assert {key(RewardModelSpec(path=folder, chat_template=str(path))) for path in (file, copy)} == {expected}
    reference = identify_reward_model(RewardModelSpec(path=folder, chat_template=str(file)))
    assert reference.spec.chat_template == LLAMA_TEMPLATE  # another machine needs no file
    file.write_text(GEMMA_TEMPLATE)
    assert key(RewardModelSpec(path=folder, chat_template=str(file))) != expected
    with pytest.raises(ModelError, match="neither Jinja text"):
        identify_reward_model(RewardModelSpec(path=folder, chat_template=str(tmp_path / "absent.jinja")))


def test_an_adapter_is_identified_with_its_base_model(tmp_path):
    base = save_causal(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base)
    spec = RewardModelSpec(path=str(adapter))
    before = key(spec)
    reference = identify_reward_model(spec)
    assert (reference.spec.base_model, reference.spec.base_revision) == (str(base.resolve()), None)

    elsewhere = shutil.copytree(base, tmp_path / "elsewhere")
    assert key(spec.model_copy(update={"base_model": str(elsewhere)})) == before
    change_weights(elsewhere, lambda weights: weights["model.norm.weight"].add_(1))
    assert key(spec.model_copy(update={"base_model": str(elsewhere)})) != before
    change_weights(adapter, lambda weights: weights["base_model.model.score.weight"].add_(1))
    assert key(spec) != before


def test_a_base_model_on_the_hub_must_be_pinned(tmp_path):
    adapter = save_adapter(tmp_path / "adapter", save_causal(tmp_path / "base"))
    spec = RewardModelSpec(path=str(adapter), base_model="org/base")
    with pytest.raises(ModelError, match=r"set reward_model.base_revision to the commit hash"):
        identify_reward_model(spec)
    pinned, other = (spec.model_copy(update={"base_revision": revision}) for revision in (COMMIT, COMMIT[::-1]))
    assert key(pinned) != key(other)
    change_json(adapter / "adapter_config.json", base_model_name_or_path="org/base", revision=COMMIT)
    assert identify_reward_model(RewardModelSpec(path=str(adapter))).spec.base_revision == COMMIT


def test_a_dpo_model_is_identified_with_its_reference(tmp_path):
    policy, reference = save_causal(tmp_path / "policy", seed=1), save_causal(tmp_path / "reference")
    spec = RewardModelSpec(path=str(policy), reference_model=str(reference))
    before = key(spec)
    assert key(RewardModelSpec(path=str(policy))) != before
    assert key(spec.model_copy(update={"dpo_beta": 0.2})) != before
    moved = shutil.copytree(reference, tmp_path / "moved")
    assert key(spec.model_copy(update={"reference_model": str(moved)})) == before
    tokenizer_of(pad_token=None).save_pretrained(moved)
    assert key(spec.model_copy(update={"reference_model": str(moved)})) != before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "org/rm"}, "set reward_model.revision to the commit hash"),
        ({"path": "org/rm", "revision": "main"}, "not 'main'"),
        (
            {"path": "org/rm", "revision": COMMIT, "reference_model": "org/sft"},
            "set reward_model.reference_revision to the commit hash",
        ),
    ],
)
def test_hub_ids_need_a_commit_hash(settings, message):
    with pytest.raises(ConfigError, match=message):
        identify_reward_model(RewardModelSpec(**settings))


@pytest.mark.parametrize(
    ("settings", "setting"),
    [({"path": "./absent"}, "reward_model.path"), ({"reference_model": "./absent"}, "reward_model.reference_model")],
)
def test_folders_that_are_not_there_are_named(tmp_path, settings, setting):
    spec = {"path": str(save_causal(tmp_path / "rm"))} | settings
    with pytest.raises(ModelError, match=rf"no reward model folder './absent'; correct {setting}"):
        identify_reward_model(RewardModelSpec(**spec))
