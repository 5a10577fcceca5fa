import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from charm_core.errors import ModelError
from charm_core.reward_model.text_scoring import score_texts
from tests.charm_core.reward_model.kinds import (
    LLAMA_TEMPLATE,
    change_json,
    change_weights,
    config_of,
    last_hidden_states,
    loaded,
    save_adapter,
    save_causal,
    save_classifier,
    stored_body,
    texts_of,
    tokenizer_of,
)

TOLERANCE = 1e-5


def merged_by_hand(adapter: Path, base: Path):
    """The base model's body with every ``alpha / r · B A`` added."""
    lora, settings = (
        load_file(adapter / "adapter_model.safetensors"),
        json.loads((adapter / "adapter_config.json").read_text()),
    )
    body = stored_body(base)
    with torch.no_grad():
        for name, parameter in body.named_parameters():
            prefix = f"base_model.model.model.{name.removesuffix('.weight')}"
            if f"{prefix}.lora_A.weight" in lora:
                delta = lora[f"{prefix}.lora_B.weight"] @ lora[f"{prefix}.lora_A.weight"]
                parameter += settings["lora_alpha"] / settings["r"] * delta
    return body, lora


def by_hand(adapter: Path, base: Path, texts, head=None):
    body, lora = merged_by_hand(adapter, base)
    head = lora["base_model.model.score.weight"] if head is None else head
    return [float(head[0] @ last_hidden_states(body, text)[-1]) for text in texts]


def test_the_adapter_is_merged_and_its_head_used(tmp_path):
    base = save_causal(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base, seed=3)
    model = loaded(adapter)
    assert model.spec.kind == "lora"
    texts = texts_of(model)
    scores = score_texts(model, texts)
    assert scores == pytest.approx(by_hand(adapter, base, texts), abs=TOLERANCE)
    assert torch.tensor(scores).std() > 100 * TOLERANCE
    alone = [score_texts(model, [text])[0] for text in texts]
    assert scores == pytest.approx(alone, abs=TOLERANCE)


def test_an_adapter_on_a_reward_model_may_leave_the_head_as_it_is(tmp_path):
    base = save_classifier(tmp_path / "base", seed=1)
    adapter = save_adapter(tmp_path / "adapter", base, seed=3, task=None)
    model = loaded(adapter)
    texts = texts_of(model)
    head = load_file(base / "model.safetensors")["score.weight"]
    assert score_texts(model, texts) == pytest.approx(by_hand(adapter, base, texts, head), abs=TOLERANCE)


def test_an_adapter_without_any_head_is_an_error(tmp_path):
    adapter = save_adapter(tmp_path / "adapter", save_causal(tmp_path / "base"), task=None)
    with pytest.raises(ModelError, match=r"holds no head, nor does its base model.*modules_to_save=\['score'\]"):
        loaded(adapter)


def test_a_head_that_was_lost_is_not_replaced_by_the_base_models(tmp_path):
    adapter = save_adapter(tmp_path / "adapter", save_classifier(tmp_path / "base"))
    change_weights(adapter, lambda weights: weights.pop("base_model.model.score.weight"))
    with pytest.raises(
        ModelError, match=r"modules_to_save has \['classifier', 'score'\].*lost when the adapter was saved"
    ):
        loaded(adapter)


def test_the_base_model_may_be_given(tmp_path):
    base = save_causal(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base)
    expected = score_texts(loaded(adapter), texts_of(loaded(adapter)))
    moved = base.rename(tmp_path / "moved")
    with pytest.raises(
        ModelError, match=r"base' of the LoRA adapter .* is not on this machine: set reward_model.base_model"
    ):
        loaded(adapter)
    model = loaded(adapter, base_model=str(moved))
    assert score_texts(model, texts_of(model)) == expected


def test_an_adapter_for_another_model_is_an_error(tmp_path):
    adapter = save_adapter(tmp_path / "adapter", save_causal(tmp_path / "base"))
    other = save_causal(tmp_path / "other", hidden_size=48, num_attention_heads=4)
    with pytest.raises(ModelError, match=r"(?s)cannot be merged into .*other.*set reward_model.base_model"):
        loaded(adapter, base_model=str(other))


def test_an_adapter_that_names_no_base_model(tmp_path):
    adapter = save_adapter(tmp_path / "adapter", save_causal(tmp_path / "base"))
    change_json(adapter / "adapter_config.json", base_model_name_or_path=None)
    with pytest.raises(ModelError, match="does not say what its base model is"):
        loaded(adapter)


def test_a_base_model_on_the_hub_needs_a_commit_hash(tmp_path):
    adapter = save_adapter(tmp_path / "adapter", save_causal(tmp_path / "base"))
    change_json(adapter / "adapter_config.json", base_model_name_or_path="org/base")
    with pytest.raises(ModelError, match=r"set reward_model.base_revision to the commit hash"):
        loaded(adapter)


def test_the_adapters_tokenizer_counts_if_it_has_one(tmp_path):
    base = save_causal(tmp_path / "base")
    own = tokenizer_of()
    own.chat_template = LLAMA_TEMPLATE.replace("{{ bos_token }}", "")
    assert loaded(save_adapter(tmp_path / "plain", base)).tokenizer.chat_template == LLAMA_TEMPLATE
    with_own = loaded(save_adapter(tmp_path / "own", base, tokenizer=own))
    assert with_own.tokenizer.chat_template == own.chat_template


def test_pickled_adapters_are_never_read(tmp_path):
    adapter = save_adapter(tmp_path / "adapter", save_causal(tmp_path / "base"))
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "bomb").encode() + b"'\ntR.")
    with pytest.raises(ModelError, match=r"only \['adapter_model.bin'\], which is never unpickled"):
        loaded(adapter)
    assert not (tmp_path / "bomb").exists()


def test_what_is_saved_is_a_plain_classifier(tmp_path):
    adapter = save_adapter(tmp_path / "adapter", save_causal(tmp_path / "base"))
    model = loaded(adapter)
    model.network.save(tmp_path / "saved")
    model.tokenizer.save_pretrained(tmp_path / "saved")
    plain = loaded(tmp_path / "saved")
    assert plain.spec.kind == "classifier"
    texts = texts_of(model)
    assert score_texts(plain, texts) == score_texts(model, texts)
    _, report = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
    }  # fmt: skip


def test_nan_in_an_adapter_is_named(tmp_path):
    adapter = save_adapter(tmp_path / "adapter", save_causal(tmp_path / "base"))
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    change_weights(adapter, lambda weights: weights[name].fill_(float("nan")))
    with pytest.raises(ModelError, match=r"NaN or infinite weights, first in model.layers.0.mlp.up_proj.weight"):
        loaded(adapter)


def test_the_shape_of_the_tiny_base_is_as_assumed():
    assert config_of("llama").num_labels == 2  # so that one label comes from loading it as a reward model
