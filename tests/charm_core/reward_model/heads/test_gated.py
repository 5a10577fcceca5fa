from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from charm_core.errors import ModelError, TrainingError
from charm_core.reward_model.network import collate, trainable
from charm_core.reward_model.rendering import render
from charm_core.reward_model.text_scoring import score_texts
from tests.charm_core.reward_model.kinds import (
    VOCABULARY,
    change_json,
    change_weights,
    last_hidden_states,
    loaded,
    save_gated,
    stored_body,
    texts_of,
)
from tests.charm_core.reward_model.tiny import messages

TOLERANCE = 1e-5
LAYOUTS = {
    "ArmoRM": {"architecture": "llama", "layout": "armorm", "objectives": 5},
    "QRM-Llama": {"architecture": "llama", "layout": "qrm", "objectives": 4, "quantiles": 3},
    "QRM-Gemma-2": {"architecture": "gemma2", "layout": "qrm-gemma", "objectives": 5, "quantiles": 4},
}
HEADERS = {
    "llama": ["<|eot_id|>", "<|start_header_id|>", "assistant", "<|end_header_id|>", "\n\n"],
    "gemma2": ["<end_of_turn>", "\n", "<start_of_turn>", "model", "\n"],
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def gate_by_hand(weights, state, temperature):
    """The gate as the published code applies it, layer by layer."""
    numbers = sorted({int(name.split(".")[2]) for name in weights if name.startswith("gating.layers.")})
    for number in numbers:
        own = {
            name.removeprefix(f"gating.layers.{number}."): tensor
            for name, tensor in weights.items()
            if name.startswith(f"gating.layers.{number}.")
        }
        if "running_mean" in own:
            state = (state - own["running_mean"]) / (own["running_var"] + 1e-5).sqrt() * own["weight"] + own["bias"]
            continue
        state = own["weight"] @ state + own.get("bias", 0)
        if number != numbers[-1]:
            state = state.clamp(min=0)
    exponentials = (state / temperature - (state / temperature).max()).exp()
    return exponentials / exponentials.sum() * weights["gating.logit_scale"]


def by_hand(folder: Path, texts, *, architecture, layout, objectives, quantiles=1, temperature=10.0):
    body, weights = stored_body(folder), load_file(folder / "model.safetensors")
    header = [VOCABULARY[token] for token in HEADERS[architecture]]
    values = []
    for text in texts:
        states = last_hidden_states(body, text)
        ids = list(text.input_ids)
        (*_, start) = (place for place in range(len(ids)) if ids[place : place + 5] == header)
        rewards = (weights["regression_layer.weight"] @ states[-1]).reshape(objectives, quantiles).mean(dim=1)
        if "reward_transform_matrix" in weights:
            rewards = rewards @ weights["reward_transform_matrix"]
        values.append(float((gate_by_hand(weights, states[start], temperature) * rewards).sum()))
    return values


@every_layout
def test_scores_are_the_gated_sum_of_the_rewards(tmp_path, layout):
    folder = save_gated(tmp_path / "rm", **LAYOUTS[layout])
    model = loaded(folder)
    assert model.spec.kind == "gated"
    texts = texts_of(model)
    scores = score_texts(model, texts)
    assert scores == pytest.approx(by_hand(folder, texts, **LAYOUTS[layout]), abs=TOLERANCE)
    assert torch.tensor(scores).std() > 100 * TOLERANCE


@every_layout
def test_a_score_does_not_depend_on_its_batch_nor_on_the_padding(tmp_path, layout):
    model = loaded(save_gated(tmp_path / "rm", **LAYOUTS[layout]))
    texts = texts_of(model, count=12)
    alone = [score_texts(model, [text])[0] for text in texts]
    assert score_texts(model, texts) == pytest.approx(alone, abs=TOLERANCE)
    with torch.inference_mode():
        other = model.network(**collate(texts, VOCABULARY["w3"], model.device, model.network)).tolist()
    assert other == pytest.approx(alone, abs=TOLERANCE)


def test_the_gate_reads_the_last_turn_of_the_user(tmp_path):
    settings = LAYOUTS["ArmoRM"]
    folder = save_gated(tmp_path / "rm", **settings)
    model = loaded(folder)
    several = render(model.tokenizer, messages("w1", "w2 w3", "w4 w5"), "w6", model.spec)
    assert score_texts(model, [several]) == pytest.approx(by_hand(folder, [several], **settings), abs=TOLERANCE)
    gates = []
    model.network.gate.register_forward_hook(lambda module, given, made: gates.append(made[0]))
    for prompt, response in ((("w1",), "w2"), (("w1",), "w30 w31"), (("w9",), "w2")):
        score_texts(model, [render(model.tokenizer, messages(*prompt), response, model.spec)])
    assert torch.allclose(gates[0], gates[1], atol=1e-6)
    assert not torch.allclose(gates[0], gates[2], atol=1e-3)


@pytest.mark.parametrize(("layout", "temperature"), [("QRM-Llama", 10.0), ("QRM-Gemma-2", 1.0)])
def test_without_a_stated_temperature_that_of_the_published_code_counts(tmp_path, layout, temperature):
    folder = save_gated(tmp_path / "rm", temperature=None, **LAYOUTS[layout])
    model = loaded(folder)
    texts = texts_of(model)
    expected = by_hand(folder, texts, temperature=temperature, **LAYOUTS[layout])
    assert score_texts(model, texts) == pytest.approx(expected, abs=TOLERANCE)


def test_the_place_of_the_gate_may_be_stated_in_the_config(tmp_path):
    folder = save_gated(tmp_path / "rm", "qwen3")
    with pytest.raises(ModelError, match=r"model type 'qwen3'\) reads the prompt is unknown.*gating_token_pattern"):
        loaded(folder)
    header = [VOCABULARY[token] for token in HEADERS["llama"]]
    change_json(folder / "config.json", gating_token_pattern=header)
    model = loaded(folder)
    texts = texts_of(model)
    expected = by_hand(folder, texts, architecture="llama", layout="armorm", objectives=5)
    assert score_texts(model, texts) == pytest.approx(expected, abs=TOLERANCE)


def test_a_text_without_the_header_of_an_answer_is_an_error(tmp_path):
    model = loaded(save_gated(tmp_path / "rm"), chat_template="{{ messages[-1]['content'] }}")
    with pytest.raises(ModelError, match=r"lacks the tokens \[\d+.*use the chat template"):
        score_texts(model, [render(model.tokenizer, messages("w1"), "w2 w3 w4 w5 w6 w7", model.spec)])


def test_missing_parts_of_the_gate_are_not_made_up(tmp_path):
    folder = save_gated(tmp_path / "rm")
    change_weights(folder, lambda weights: weights.pop("gating.layers.1.weight"))
    with pytest.raises(ModelError, match=r"lacks gating.layers.1.weight"):
        loaded(folder)
    change_weights(folder, lambda weights: weights.pop("gating.layers.3.weight"))
    with pytest.raises(ModelError, match="5 rewards but a gate of"):
        loaded(folder)


def test_it_cannot_be_fine_tuned(tmp_path):
    model = loaded(save_gated(tmp_path / "rm"))
    with pytest.raises(TrainingError, match="cannot be fine-tuned"):
        trainable(model.network, model.spec.path)
