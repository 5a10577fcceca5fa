"""The memory estimate: by hand, against torch's own count, and (slow) against processes that train."""

import json

import pytest
from transformers import AutoModelForSequenceClassification

from charm_core.reward_model.memory import (
    MemoryPlan,
    estimate_memory,
    model_shape,
    trained_parameters,
)
from charm_core.reward_model.stored.files import StoredTensor, open_model
from tests.charm_core.reward_model.tiny import save_model

GB = 10**9


def stored(**shapes):
    return {
        name: StoredTensor(dtype="BF16", shape=shape, file="model.safetensors", start=0, size=0)
        for name, shape in shapes.items()
    }


@pytest.fixture(scope="module")
def llama_8b():
    """Llama-3.1-8B with a score in place of the vocabulary's logits: 7,504,924,672 parameters and a head of 4,096."""
    tensors = stored(
        **{
            "model.embed_tokens.weight": (128256, 4096),
            "model.norm.weight": (4096,),
            "score.weight": (1, 4096),
            "lm_head.weight": (128256, 4096),
        }
    )
    for layer in range(32):
        of_layer = {
            "self_attn.q_proj": (4096, 4096),
            "self_attn.k_proj": (1024, 4096),
            "self_attn.v_proj": (1024, 4096),
            "self_attn.o_proj": (4096, 4096),
            "mlp.gate_proj": (14336, 4096),
            "mlp.up_proj": (14336, 4096),
            "mlp.down_proj": (4096, 14336),
            "input_layernorm": (4096,),
            "post_attention_layernorm": (4096,),
        }
        tensors |= stored(**{f"model.layers.{layer}.{name}.weight": shape for name, shape in of_layer.items()})
    shape = model_shape(tensors, {"hidden_size": 4096, "intermediate_size": 14336})
    assert shape is not None
    return shape


def plan(**changes):
    settings = {"zero_stage": 3, "ranks": 8, "bfloat16": True, "micro_batch_tokens": 8192}
    return MemoryPlan(**(settings | changes))


def test_an_8b_model_has_the_parameters_that_are_published(llama_8b):
    assert llama_8b.parameters == 7_504_924_672 + 4096
    assert (len(llama_8b.layers), llama_8b.head, llama_8b.gated) == (32, 4096, True)
    assert set(llama_8b.layers) == {218_112_000}


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "bert", "deberta"])
def test_the_parameters_are_those_that_torch_counts(tmp_path, architecture):
    folder = save_model(tmp_path / "rm", architecture)
    shape = model_shape(open_model(str(folder)).tensors, json.loads((folder / "config.json").read_text()))
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    counted = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert shape.parameters == sum(counted.values())
    assert len(shape.layers) == 2
    last = sum(size for name, size in counted.items() if ".layers.1." in name or ".layer.1." in name)
    assert shape.layers[1] == last
    head = sum(size for name, size in counted.items() if name.startswith(("score.", "classifier.")))
    assert trained_parameters(shape, plan(trainable_layers=1)) == last + head


def test_the_state_of_each_stage_by_hand(llama_8b):
    p, bucket = llama_8b.parameters, 2 * 4 * 50_000_000
    assert estimate_memory(llama_8b, plan(zero_stage=None, ranks=1)).state == 16 * p
    assert estimate_memory(llama_8b, plan(zero_stage=0)).state == 16 * p
    assert estimate_memory(llama_8b, plan(zero_stage=1)).state == 4 * p + 4 * p + bucket + 12 * p // 8
    assert estimate_memory(llama_8b, plan(zero_stage=2)).state == 4 * p + 16 * p // 8 + bucket
    assert estimate_memory(llama_8b, plan(zero_stage=3)).state == 20 * p // 8 + bucket


def test_lora_trains_an_adapter_of_each_matrix_and_the_head(llama_8b):
    # rows + columns of q, k, v, o, gate, up, down
    matrices = 8192 + 5120 + 5120 + 8192 + 3 * 18432
    found = estimate_memory(llama_8b, plan(lora_rank=16, gradient_checkpointing=True, zero_stage=None, ranks=1))
    trained = 16 * 32 * matrices + 4096
    assert trained_parameters(llama_8b, plan(lora_rank=16)) == trained
    assert found.state == 4 * llama_8b.parameters + 12 * trained
    assert found.lower_copies == 0
    assert 36 * GB < found.peak < 40 * GB


def test_trainable_layers_leave_the_lower_ones_without_gradients_and_activations(llama_8b):
    two = estimate_memory(llama_8b, plan(trainable_layers=2, zero_stage=None, ranks=1))
    all_of_them = estimate_memory(llama_8b, plan(zero_stage=None, ranks=1))
    assert two.gradients == 4 * (2 * 218_112_000 + 4096)
    assert two.activations * 16 == all_of_them.activations
    assert two.weights == all_of_them.weights
    assert estimate_memory(llama_8b, plan(trainable_layers=0)).activations == 0


def test_checkpointing_keeps_the_inputs_of_layers_and_one_layer(llama_8b):
    layer = 8192 * (36 * 4096 + 8 * 14336)
    assert estimate_memory(llama_8b, plan()).activations == 32 * layer
    kept = 8192 * 32 * 4 * 4096
    assert estimate_memory(llama_8b, plan(gradient_checkpointing=True)).activations == kept + layer


def test_offloading_takes_the_state_from_the_gpu(llama_8b):
    assert estimate_memory(llama_8b, plan(offload="cpu")).state == 2 * 4 * 50_000_000
    assert estimate_memory(llama_8b, plan(offload="cpu", zero_stage=2)).weights == 4 * llama_8b.parameters
    # before that, every rank has the whole model
    assert estimate_memory(llama_8b, plan(offload="cpu", micro_batch_tokens=1)).peak >= 4 * llama_8b.parameters


def test_the_parts_are_told_largest_first_and_without_those_that_are_nothing(llama_8b):
    parts = estimate_memory(llama_8b, plan(zero_stage=None, ranks=1, bfloat16=False)).parts()
    assert list(parts) == ["activations", "moments", "weights", "gradients"]


def test_a_layout_without_known_names_has_no_shape():
    assert model_shape(stored(weights=(3, 4)), {"hidden_size": 4, "intermediate_size": 8}) is None
    assert model_shape(stored(**{"layers.0.weight": (3, 4)}), {}) is None
