"""What a GPU is handed: the rows of a batch in one call of PyTorch's variable-length flash attention.

There is no GPU here, so the kernel is a stand-in: it computes by the text of PyTorch's documentation and demands what the real one
demands. All that is around it is real.
"""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import varlen

from charm_core.reward_model import attention
from charm_core.reward_model.loading import load_reward_model
from charm_core.reward_model.network import pack
from charm_core.reward_model.spec import RewardModelSpec
from charm_core.reward_model.text_scoring import choose_batching, groups_of, inputs_of, run_texts
from tests.charm_core.reward_model import kinds
from tests.charm_core.reward_model.tiny import config_of, save_model, some_texts

LAYERS = config_of("qwen3").num_hidden_layers
WITHOUT_SOFTCAP = ("qwen3", "llama", "mistral", "gemma3", "bert")


class Kernel:
    """Stands for ``torch.nn.attention.varlen.varlen_attn``."""

    def __init__(self, demanded):
        self.demanded, self.calls = demanded, 0

    def __call__(
        self,
        query,
        key,
        value,
        query_ends,
        key_ends,
        most_queries,
        most_keys,
        *,
        scale,
        window_size,
        enable_gqa,
        **more,
    ):
        self.calls += 1
        assert more == {"num_splits": 1}
        assert {query.dtype, key.dtype, value.dtype} == {self.demanded}
        assert all(part.is_contiguous() for part in (query, key, value))
        assert {query_ends.dtype, key_ends.dtype} == {torch.int32}
        assert (query_ends[-1], key_ends[-1]) == (len(query), len(key))
        assert key.shape == value.shape
        assert (query_ends.diff().max(), key_ends.diff().max()) == (most_queries, most_keys)
        assert enable_gqa == (query.shape[1] != key.shape[1])
        times = query.shape[1] // key.shape[1]
        key, value = (part.float().repeat_interleave(times, dim=1) for part in (key, value))
        left, right = window_size
        parts = []
        for number in range(len(query_ends) - 1):
            own = query[query_ends[number] : query_ends[number + 1]].float()
            seen, read = (part[key_ends[number] : key_ends[number + 1]] for part in (key, value))
            # aligned at the ends: the last query is where the last key is
            place = torch.arange(len(own))[:, None] + len(seen) - len(own)
            others = torch.arange(len(seen))[None, :]
            hidden = torch.zeros(len(own), len(seen), dtype=torch.bool)
            if left >= 0:
                hidden |= others < place - left
            if right >= 0:
                hidden |= others > place + right
            factor = own.shape[-1] ** -0.5 if scale is None else scale
            products = torch.einsum("qhd,khd->hqk", own, seen) * factor
            parts.append(torch.einsum("hqk,khd->qhd", products.masked_fill(hidden, -torch.inf).softmax(-1), read))
        return torch.cat(parts).to(query.dtype)


@pytest.fixture
def kernel(monkeypatch):
    """The stand-in, for tensors here. Call it with the type that the kernel is to be given."""

    def install(demanded):
        made = Kernel(demanded)
        monkeypatch.setattr(varlen, "varlen_attn", made)
        monkeypatch.setattr(attention, "_has_flash", lambda _: True)
        return made

    return install


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    made = {name: save_model(root / name, name) for name in (*WITHOUT_SOFTCAP, "gemma2")}
    return made | {"gated": kinds.save_gated(root / "gated")}


@pytest.mark.parametrize("name", WITHOUT_SOFTCAP)
def test_one_call_per_layer_gives_what_a_call_per_text_gives(folders, name, kernel, monkeypatch):
    model = load_reward_model(RewardModelSpec(path=str(folders[name]), batch_tokens=10_000))
    texts, owners = some_texts(model, 8)
    model, _ = choose_batching(model, texts, owners)
    expected = run_texts(model, texts, owners)
    flash = kernel(torch.float32)
    # in float32, so that the two are the same but for the order of sums
    monkeypatch.setattr(attention, "_takes_flash", lambda *_: True)
    found = run_texts(model, texts, owners)
    assert flash.calls == LAYERS
    assert found.computed_tokens == expected.computed_tokens
    torch.testing.assert_close(torch.tensor(found.values), torch.tensor(expected.values), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", WITHOUT_SOFTCAP)
def test_gradients_through_it_are_those_of_a_call_per_text(folders, name, kernel, monkeypatch):
    model, texts, groups = for_training(folders[name])
    expected = gradients(model, texts, groups)
    flash = kernel(torch.float32)
    monkeypatch.setattr(attention, "_takes_flash", lambda *_: True)
    found = gradients(model, texts, groups)
    assert flash.calls == LAYERS
    for key, gradient in expected.items():
        scale = max(1.0, gradient.abs().max().item())
        torch.testing.assert_close(found[key] / scale, gradient / scale, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", WITHOUT_SOFTCAP)
def test_training_in_lower_precision_hands_it_half_precision(folders, name, kernel):
    """Master weights are float32, so what autocast leaves in float32, as rotary embeddings do, must not reach the kernel."""
    model, texts, groups = for_training(folders[name])
    model.network.autocast_dtype = torch.bfloat16
    expected = gradients(model, texts, groups)
    flash = kernel(torch.bfloat16)
    found = gradients(model, texts, groups)
    assert flash.calls == LAYERS
    one, other = (torch.cat([part.flatten() for part in each.values()]) for each in (found, expected))
    assert torch.cosine_similarity(one, other, dim=0) > 0.99


def for_training(folder):
    model = load_reward_model(RewardModelSpec(path=str(folder)))
    texts, owners = some_texts(model, 9)
    model, _ = choose_batching(model, texts, owners, trimmed=False)
    return model, texts, groups_of(model, texts, owners)


def gradients(model, texts, groups):
    model.network.zero_grad()
    scores = model.network(**pack(groups, texts, model.device, model.network))
    (scores * torch.linspace(-1, 1, len(texts))).sum().backward()
    return {name: part.grad.clone() for name, part in model.network.named_parameters() if part.grad is not None}


def test_half_precision_weights_take_it_too(folders, kernel):
    model = load_reward_model(RewardModelSpec(path=str(folders["llama"]), dtype="bfloat16", batch_tokens=10_000))
    texts, owners = some_texts(model, 10)
    model, _ = choose_batching(model, texts, owners)
    expected = run_texts(model, texts, owners).values
    flash = kernel(torch.bfloat16)
    found = run_texts(model, texts, owners).values
    assert flash.calls == LAYERS
    assert max(abs(one - other) for one, other in zip(found, expected, strict=True)) < 0.2


@pytest.mark.parametrize("name", [*WITHOUT_SOFTCAP, "gated"])
def test_the_real_operator_takes_what_it_is_handed(folders, name, monkeypatch):
    """On PyTorch's device for shapes alone, which knows the operator and does not mix with the CPU; autocast does not know it."""
    model = load_reward_model(RewardModelSpec(path=str(folders[name]), dtype="bfloat16"))
    texts, owners = some_texts(model, 13)
    model, _ = choose_batching(model, texts, owners, trimmed=False)
    assert model.packed
    monkeypatch.setattr(attention, "_has_flash", lambda device: device.type == "meta")
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)
    calls = []
    operator = varlen.varlen_attn
    monkeypatch.setattr(varlen, "varlen_attn", lambda *args, **more: calls.append(1) or operator(*args, **more))
    device = torch.device("meta")
    shapes = replace(model, network=model.network.to(device), device=device)
    scores = shapes.network(**inputs_of(shapes, groups_of(shapes, texts, owners), texts))
    scores.sum().backward()
    assert len(calls) == LAYERS
    assert (scores.shape, scores.dtype, scores.device) == ((len(texts),), torch.float32, device)


@pytest.mark.parametrize("why", ["softcap", "float32", "width"])
def test_what_the_kernel_cannot_do_goes_text_by_text(folders, why, kernel, tmp_path):
    folder = {
        "softcap": folders["gemma2"],
        "float32": folders["llama"],
        "width": lambda: save_model(tmp_path / "narrow", "llama", head_dim=6),
    }[why]
    dtype = "float32" if why == "float32" else "bfloat16"
    model = load_reward_model(RewardModelSpec(path=str(folder() if callable(folder) else folder), dtype=dtype))
    texts, owners = some_texts(model, 11)
    model, _ = choose_batching(model, texts, owners)
    assert model.packed
    flash = kernel(torch.bfloat16)
    alone = run_texts(replace(model, spec=model.spec.model_copy(update={"batch_tokens": 1})), texts, owners).values
    together = run_texts(model, texts, owners).values
    assert flash.calls == 0
    assert max(abs(one - other) for one, other in zip(together, alone, strict=True)) < 0.2


def test_a_kernel_that_fails_costs_packing_not_the_scoring(folders, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer")

    model = load_reward_model(RewardModelSpec(path=str(folders["llama"]), dtype="bfloat16"))
    texts, owners = some_texts(model, 12)
    monkeypatch.setattr(varlen, "varlen_attn", broken)
    monkeypatch.setattr(attention, "_has_flash", lambda _: True)
    model, check = choose_batching(model, texts, owners)
    assert not model.packed
    assert "Ampere" in check.refusal
    assert len(run_texts(model, texts, owners).values) == len(texts)
