import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModel

from charm_core.errors import ModelError
from charm_core.reward_model.network import collate
from charm_core.reward_model.text_scoring import score_texts
from tests.charm_core.reward_model.kinds import (
    VOCABULARY,
    change_weights,
    last_hidden_states,
    loaded,
    save_value_head,
    stored_body,
    texts_of,
)

TOLERANCE = 1e-5


def by_hand(folder: Path, texts):
    """Each text alone: last hidden state, then the head's layers as they are stored."""
    body, weights = stored_body(folder), load_file(folder / "model.safetensors")
    layers = sorted({name.rsplit(".", 1)[0] for name in weights if name.startswith("v_head.")})
    values = []
    for text in texts:
        state = last_hidden_states(body, text)[-1]
        for number, layer in enumerate(layers):
            state = weights[f"{layer}.weight"] @ state + weights[f"{layer}.bias"]
            if number < len(layers) - 1:
                state = state.clamp(min=0)
        values.append(state.item())
    return values


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "qwen3"])
@pytest.mark.parametrize("hidden", [(), (24,), (24, 12)], ids=["linear", "one-hidden-layer", "two-hidden-layers"])
def test_scores_are_the_value_of_the_last_token(tmp_path, architecture, hidden):
    folder = save_value_head(tmp_path / "grm", architecture, hidden=hidden)
    model = loaded(folder)
    assert model.spec.kind == "value_head"
    texts = texts_of(model)
    scores = score_texts(model, texts)
    assert scores == pytest.approx(by_hand(folder, texts), abs=TOLERANCE)
    assert torch.tensor(scores).std() > 100 * TOLERANCE


def test_a_score_does_not_depend_on_its_batch_nor_on_the_padding(tmp_path):
    model = loaded(save_value_head(tmp_path / "grm"))
    texts = texts_of(model, count=12)
    alone = [score_texts(model, [text])[0] for text in texts]
    assert score_texts(model, texts) == pytest.approx(alone, abs=TOLERANCE)
    with torch.inference_mode():
        other = model.network(**collate(texts, VOCABULARY["w3"], model.device, model.network)).tolist()
    assert other == pytest.approx(alone, abs=TOLERANCE)


def test_the_head_is_computed_in_float32_under_half_precision(tmp_path):
    folder = save_value_head(tmp_path / "grm")
    exact, half = loaded(folder), loaded(folder, dtype="bfloat16")
    assert {p.dtype for p in half.network.transformer.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in half.network.classifier.v_head.parameters()} == {torch.float32}
    texts = texts_of(exact)
    assert score_texts(half, texts) == pytest.approx(score_texts(exact, texts), abs=0.2)


def test_it_is_saved_under_the_published_names_and_loads_again(tmp_path):
    folder = save_value_head(tmp_path / "grm", auto_map={"AutoModel": "modeling_grm.GRM"})
    model = loaded(folder)
    model.network.save(tmp_path / "saved")
    model.tokenizer.save_pretrained(tmp_path / "saved")
    with safe_open(tmp_path / "saved" / "model.safetensors", framework="pt") as saved:
        names = set(saved.keys())
    with safe_open(folder / "model.safetensors", framework="pt") as original:
        assert names == set(original.keys()) - {"lm_head.weight"}
    again = loaded(tmp_path / "saved")
    texts = texts_of(model)
    assert again.spec.kind == "value_head"
    assert score_texts(again, texts) == score_texts(model, texts)
    # what it names is not there, and nothing needs it
    assert "auto_map" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    _, report = AutoModel.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not report["missing_keys"]


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("v_head.summary.0.weight", r"has weights of the layers \[2\]"),
        ("v_head.summary.2.weight", "none with one output"),
        ("model.norm.weight", r"lacks the weights \['norm.weight'\]"),
    ],
)
def test_missing_weights_are_not_made_up(tmp_path, lost, message):
    folder = save_value_head(tmp_path / "grm")
    change_weights(folder, lambda weights: weights.pop(lost))
    with pytest.raises(ModelError, match=message):
        loaded(folder)


def test_a_head_with_several_outputs_is_refused(tmp_path):
    folder = save_value_head(tmp_path / "grm", hidden=())
    change_weights(folder, lambda weights: weights.update({"v_head.summary.weight": torch.zeros(3, 32)}))
    with pytest.raises(ModelError, match=r"shapes \[\(3, 32\)\], none with one output"):
        loaded(folder)
