import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from charm_core.errors import ModelError
from charm_core.reward_model.loading import check_reward_model, load_reward_model
from charm_core.reward_model.spec import RewardModelSpec
from tests.charm_core.reward_model.tiny import chat_tokenizer, save_model


@pytest.fixture
def folder(tmp_path):
    return save_model(tmp_path / "rm", "qwen3")


def both_refuse(folder, message):
    """The cheap check and the real loading give the same error."""
    spec = RewardModelSpec(path=str(folder))
    with pytest.raises(ModelError, match=message):
        check_reward_model(spec)
    with pytest.raises(ModelError, match=message):
        load_reward_model(spec)


def change_weights(folder, change):
    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


@pytest.mark.parametrize("architecture", ["qwen3", "bert", "deberta"])
def test_a_good_folder_is_accepted_and_its_limit_respected(tmp_path, architecture):
    spec = RewardModelSpec(path=str(save_model(tmp_path / "rm", architecture)), max_length=4096)
    check_reward_model(spec)
    model = load_reward_model(spec)
    assert model.spec.max_length == 128
    assert not model.network.training


def test_half_precision_weights_are_float32_on_cpu(folder):
    change_weights(folder, lambda weights: weights.update({name: value.half() for name, value in weights.items()}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    model = load_reward_model(RewardModelSpec(path=str(folder)), device=torch.device("cpu"))
    assert {parameter.dtype for parameter in model.network.parameters()} == {torch.float32}


def test_not_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "absent"):
        both_refuse(path, "is not a folder")


def test_a_folder_without_config(tmp_path):
    both_refuse(tmp_path, "no config.json")


def test_pickled_weights_are_never_read(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    bomb = tmp_path / "unpickled"
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch " + str(bomb).encode() + b"'\ntR.")
    both_refuse(folder, r"only \['pytorch_model.bin'\], which is never unpickled")
    assert not bomb.exists()


def test_a_base_model_without_head_is_not_given_a_random_one(folder):
    change_weights(folder, lambda weights: weights.pop("score.weight"))
    both_refuse(folder, r"score\.weight")


def test_missing_body_weights(folder):
    change_weights(folder, lambda weights: weights.pop("model.norm.weight"))
    with pytest.raises(ModelError, match=r"lacks the weights \['model.norm.weight'\]"):
        load_reward_model(RewardModelSpec(path=str(folder)))


def test_several_labels(tmp_path):
    both_refuse(save_model(tmp_path / "rm", "qwen3", num_labels=3), "has 3 labels")


def test_nan_weights_are_named(folder):
    change_weights(folder, lambda weights: weights["model.layers.1.mlp.up_proj.weight"].fill_(float("nan")))
    with pytest.raises(ModelError, match=r"NaN or infinite weights, first in model.layers.1.mlp.up_proj.weight"):
        load_reward_model(RewardModelSpec(path=str(folder)))


def test_damaged_weights(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    both_refuse(folder, "cannot be (read|loaded)")


def test_the_end_of_text_token_pads_where_there_is_no_pad_token(tmp_path):
    model = load_reward_model(
        RewardModelSpec(path=str(save_model(tmp_path / "rm", tokenizer=chat_tokenizer(pad_token=None))))
    )
    assert model.tokenizer.pad_token is None
    assert model.pad_token_id == model.tokenizer.eos_token_id


def test_neither_pad_nor_end_of_text_token(tmp_path):
    tokenizer = chat_tokenizer(pad_token=None, eos_token=None)
    both_refuse(save_model(tmp_path / "rm", tokenizer=tokenizer), "neither a pad token nor an end-of-text token")


def test_no_tokenizer(folder):
    for file in folder.glob("token*"):
        file.unlink()
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    both_refuse(folder, "tokenizer")


def test_a_folder_is_not_changed_by_loading(folder, tmp_path):
    before = shutil.copytree(folder, tmp_path / "before")
    load_reward_model(RewardModelSpec(path=str(folder)))
    for file in before.iterdir():
        assert (folder / file.name).read_bytes() == file.read_bytes()
