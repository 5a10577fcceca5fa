import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from charm_core.errors import ModelError
from charm_core.reward_model.stored.files import open_model
from tests.charm_core.reward_model.tiny import save_model


@pytest.fixture
def folder(tmp_path):
    return save_model(tmp_path / "rm")


def test_headers_say_what_is_stored_and_where(folder):
    model = open_model(str(folder))
    weights = load_file(folder / "model.safetensors")
    assert {name: tensor.shape for name, tensor in model.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in weights.items()
    }
    entry = model.tensors["score.weight"]
    stored = (folder / entry.file).read_bytes()[entry.start : entry.start + entry.size]
    assert struct.unpack("<32f", stored) == tuple(weights["score.weight"][0].tolist())
    assert (entry.dtype, model.config["model_type"], model.adapter, model.pickles, model.absent) == (
        ("F32", "qwen3", None, (), ())
    )
    assert model.has_tokenizer
    assert model.has("score.", "nothing.")
    assert not model.has("v_head.")


def test_weights_may_be_in_several_files_and_a_lost_one_is_noticed(folder):
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    parts = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for file, members in parts.items():
        save_file({name: weights[name] for name in members}, folder / file)
    index = {"weight_map": {name: file for file, members in parts.items() for name in members}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    assert set(open_model(str(folder)).tensors) == set(names)
    (folder / "model-00002-of-00002.safetensors").unlink()
    model = open_model(str(folder))
    assert model.absent == ("model-00002-of-00002.safetensors",)
    assert set(model.tensors) == set(names[:9])


def cut_short(file):
    file.write_bytes(file.read_bytes()[:-1])


def end_in_the_header(file):
    file.write_bytes(file.read_bytes()[:100])


def be_something_else(file):
    file.write_bytes(b"\x08\0\0\0\0\0\0\0[1, 2,3]")


def be_empty(file):
    file.write_bytes(b"")


@pytest.mark.parametrize("harm", [cut_short, end_in_the_header, be_something_else, be_empty])
def test_damaged_weights_are_named(folder, harm):
    harm(folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"weights file .*model.safetensors cannot be read: .*use an intact copy"):
        open_model(str(folder))


@pytest.mark.parametrize(
    ("text", "message"), [("{", "cannot be read as JSON"), ("[1]", "holds a list where an object belongs")]
)
def test_a_damaged_config_is_named(folder, text, message):
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelError, match=rf"config.json {message}"):
        open_model(str(folder))


def test_pickles_are_listed_but_not_those_of_a_training_script(folder):
    for name in ("pytorch_model.bin", "extra.pt", "training_args.bin", "optimizer.pt"):
        (folder / name).write_bytes(b"")
    assert open_model(str(folder)).pickles == ("extra.pt", "pytorch_model.bin")


def test_the_type_of_every_tensor_is_told(folder):
    mixed = {"a": torch.zeros(2, dtype=torch.bfloat16), "b": torch.zeros(2, dtype=torch.float16)}
    save_file(mixed, folder / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in open_model(str(folder)).tensors.items()} == {"a": "BF16", "b": "F16"}
