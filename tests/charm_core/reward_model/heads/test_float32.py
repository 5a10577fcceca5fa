"""The head of every kind computes in float32, whatever the backbone computes in."""

import copy

import pytest
import torch
from torch import nn

from charm_core.reward_model.network import Float32Head, at_places, collate, let_pack, pack
from charm_core.reward_model.packing import prefix_groups
from tests.charm_core.reward_model.kinds import loaded, save_gated, save_value_head, texts_of
from tests.charm_core.reward_model.tiny import save_model

TOLERANCE = 1e-5
FOLDERS = {
    "qwen3": lambda folder: save_model(folder, "qwen3"),
    "bert": lambda folder: save_model(folder, "bert"),
    "linear value head": lambda folder: save_value_head(folder, hidden=()),
    "deep value head": lambda folder: save_value_head(folder, hidden=(24, 12)),
    "gate": save_gated,
    "gate with batch norms": lambda folder: save_gated(folder, layout="qrm", objectives=4, quantiles=3),
}
TRAINABLE = [name for name in FOLDERS if not name.startswith("gate")]


def applied(module, states, dtype):
    """What a part of a head makes of hidden states, step by step in one type."""
    if isinstance(module, nn.Sequential):
        for part in module:
            states = applied(part, states, dtype)
        return states
    if isinstance(module, nn.Linear):
        bias = None if module.bias is None else module.bias.to(dtype)
        return nn.functional.linear(states.to(dtype), module.weight.to(dtype), bias)
    return copy.deepcopy(module).to(dtype)(states.to(dtype))


def by_hand(network, states, dtype):
    """Scores from the hidden states that are read, texts × places × width."""
    if hasattr(network, "gate"):
        gate = network.gate
        shares = (applied(gate.layers, states[:, 0], dtype) / gate.temperature).softmax(dim=1) * gate.scale.to(dtype)
        return (shares * nn.functional.linear(states[:, 1].to(dtype), network.rewards.to(dtype))).sum(dim=1)
    named = network.classifier.get_submodule(network.head_name)
    return applied(getattr(named, "summary", named), states[:, 0], dtype)[:, 0]


def scores_and_states(network, batch):
    """A network's scores of a batch, and the hidden states that its backbone gave for it where they are read."""
    pooler = getattr(network.packable, "pooler", None)
    given = []
    hook = (pooler or network.packable).register_forward_hook(lambda module, taken, made: given.append(made))
    with torch.no_grad():
        scores = network(**batch)
    hook.remove()
    if pooler is not None:
        return scores, given[-1][:, None]
    return scores, at_places(given[-1].last_hidden_state, batch["places"], batch.get("layout"))


def batch_of(model, texts, *, packed):
    if not packed:
        return collate(texts, model.pad_token_id, model.device, model.network)
    assert let_pack(model.network)
    groups = prefix_groups([text.input_ids for text in texts], range(len(texts)))
    return pack(groups, texts, model.device, model.network)


def assert_float32_head(model, *, packed):
    network = model.network
    scores, states = scores_and_states(network, batch_of(model, texts_of(model), packed=packed))
    assert scores.dtype == torch.float32
    exact = by_hand(network, states, torch.float64)
    torch.testing.assert_close(scores.double(), exact, atol=TOLERANCE, rtol=0)
    # the texts must be such that another arithmetic would have been noticed
    assert (by_hand(network, states, torch.bfloat16) - exact).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", FOLDERS)
def test_under_weights_in_bfloat16(tmp_path, name, packed):
    model = loaded(FOLDERS[name](tmp_path / "rm"), dtype="bfloat16")
    assert {parameter.dtype for parameter in model.network.packable.parameters()} == {torch.bfloat16}
    assert_float32_head(model, packed=packed)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", TRAINABLE)
def test_under_autocast_as_training_uses_it(tmp_path, name, packed):
    model = loaded(FOLDERS[name](tmp_path / "rm"))
    matrices = [module for module in model.network.packable.modules() if type(module) is nn.Linear]
    computed = []
    matrices[0].register_forward_hook(lambda module, taken, made: computed.append(made.dtype))
    model.network.autocast_dtype = torch.bfloat16
    assert_float32_head(model, packed=packed)
    assert set(computed) == {torch.bfloat16}


def test_the_layer_does_it_with_numbers_that_bfloat16_has_not():
    """1 + 2⁻¹⁰ is 1 in bfloat16, which has 8 bits; the sum of 257 ones would be 256."""
    layer = Float32Head(257, 1)
    nn.init.ones_(layer.weight)
    nn.init.constant_(layer.bias, 2**-10)
    hidden = torch.ones(1, 257, dtype=torch.bfloat16)
    for weights in (torch.float32, torch.bfloat16):
        for autocast in (False, True):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                found = layer.to(weights)(hidden)
            assert found.dtype == torch.float32
            assert found.item() == 257 + 2**-10
