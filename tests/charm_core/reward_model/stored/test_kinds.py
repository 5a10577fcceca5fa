import subprocess
import sys

import pytest
from pydantic import ValidationError

from charm_core.errors import ModelError
from charm_core.reward_model.heads.catalogue import KINDS
from charm_core.reward_model.network import TrainableNetwork
from charm_core.reward_model.spec import RewardModelSpec
from charm_core.reward_model.stored.kinds import open_files
from charm_core.reward_model.text_scoring import score_texts
from tests.charm_core.reward_model.kinds import (
    loaded,
    save_adapter,
    save_causal,
    save_classifier,
    save_gated,
    save_value_head,
    texts_of,
)
from tests.charm_core.reward_model.tiny import save_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("kinds")
    base = save_causal(root / "base")
    return {
        "classifier": save_classifier(root / "classifier"),
        "encoder": save_model(root / "encoder", "bert"),
        "value_head": save_value_head(root / "value_head"),
        "gated": save_gated(root / "gated"),
        "lora": save_adapter(root / "lora", base),
        "dpo": save_causal(root / "dpo", seed=1),
        "base": base,
    }


def spec_of(folders, name, **settings):
    if name == "dpo":
        settings["reference_model"] = str(folders["base"])
    return RewardModelSpec(path=str(folders[name]), **settings)


def test_the_settings_offer_every_kind_and_say_what_it_is():
    field = RewardModelSpec.model_json_schema()["properties"]["kind"]
    assert field["enum"] == ["auto", "classifier", "value_head", "gated", "lora", "dpo"]
    assert "value_head (GRM), gated (ArmoRM, QRM)" in field["description"]


def test_kinds_are_told_without_torch():
    program = "import sys; import charm_core.reward_model.stored.checks; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_catalogue_says_of_training_is_so(folders, kind):
    model = loaded(folders[kind], **({"reference_model": str(folders["base"])} if kind == "dpo" else {}))
    assert isinstance(model.network, TrainableNetwork) == KINDS[kind].trainable


@pytest.mark.parametrize("name", ["classifier", "encoder", "value_head", "gated", "lora", "dpo"])
def test_the_files_tell_the_kind_whatever_the_folder_is_called(folders, name, tmp_path):
    kind = {"encoder": "classifier"}.get(name, name)
    assert open_files(spec_of(folders, name)).kind == kind
    misleading = folders[name].rename(folders[name].with_name("ArmoRM-GRM-dpo-lora"))
    try:
        moved = spec_of({**folders, name: misleading}, name)
        assert open_files(moved).kind == kind
        assert open_files(moved.model_copy(update={"kind": kind})).kind == kind
    finally:
        misleading.rename(folders[name])


@pytest.mark.parametrize("name", ["classifier", "value_head", "gated", "lora"])
def test_a_kind_that_the_files_contradict_is_an_error(folders, name):
    wrong = "gated" if name != "gated" else "value_head"
    with pytest.raises(ModelError, match=f"are those of kind '{name}', not '{wrong}': set reward_model.kind to 'auto'"):
        loaded(folders[name], kind=wrong)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "dpo"}, "needs reference_model"),
        ({"kind": "gated", "reference_model": "x"}, "reference_model belongs to kind 'dpo', not to 'gated'"),
        ({"kind": "dpo", "reference_model": "x", "base_model": "y"}, "base_model belongs to kind 'lora'"),
        ({"reference_model": "x", "base_model": "y"}, "give one of them"),
        ({"dpo_beta": 0}, "greater than 0"),
    ],
)
def test_settings_that_contradict_each_other(settings, message):
    with pytest.raises(ValidationError, match=message):
        RewardModelSpec(path="rm", **settings)


def test_a_base_model_for_something_that_is_no_adapter(folders):
    with pytest.raises(ModelError, match=r"has no adapter_config.json, so it is not a LoRA adapter"):
        loaded(folders["classifier"], base_model=str(folders["base"]))


def test_a_dpo_adapter_must_be_merged_first(folders):
    with pytest.raises(ModelError, match="is a LoRA adapter: merge it"):
        loaded(folders["lora"], reference_model=str(folders["base"]))


def test_settings_that_came_later_are_left_out_of_identities_where_they_have_their_default():
    assert RewardModelSpec(path="rm").settings() == {
        "path": "rm",
        "revision": None,
        "max_length": 4096,
        "max_prompt_characters": None,
        "min_response_tokens": 64,
        "dtype": "auto",
        "batch_tokens": "auto",
        "attention": "auto",
        "trust_remote_code": False,
    }
    given = {
        "kind": "gated",
        "truncation_side": "left",
        "system_prompt": "s",
        "chat_template": "{{ x }}",
        "dpo_beta": 0.2,
        "batching": "padded",
        "strict": True,
    }
    settings = RewardModelSpec(path="rm", **given).settings(exclude={"path"})
    assert given.items() <= settings.items()
    assert "path" not in settings
    assert RewardModelSpec(path="rm", compile=True).settings()["compile"]


def test_a_template_may_be_a_file_or_the_text(folders, tmp_path):
    text = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}<eos>"
    (tmp_path / "template.jinja").write_text(text)
    from_file = loaded(folders["classifier"], chat_template=str(tmp_path / "template.jinja"))
    from_text = loaded(folders["classifier"], chat_template=text)
    texts = texts_of(from_file)
    assert texts == texts_of(from_text)
    assert texts != texts_of(loaded(folders["classifier"]))
    assert score_texts(from_file, texts) == score_texts(from_text, texts)
    with pytest.raises(ModelError, match=r"is neither Jinja text, .* nor a file that can be read"):
        loaded(folders["classifier"], chat_template=str(tmp_path / "absent.jinja"))


def test_what_fine_tuning_makes_needs_no_base_model():
    spec = RewardModelSpec(path="a", kind="lora", base_model="b", base_revision="c", system_prompt="s", revision="r")
    assert spec.saved_at("new") == RewardModelSpec(path="new", system_prompt="s")
    assert RewardModelSpec(path="a", kind="value_head").saved_at("new").kind == "value_head"
