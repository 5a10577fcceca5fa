import copy
import re
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from charm_core.errors import ModelError
from charm_core.reward_model import text_scoring
from charm_core.reward_model.attention import READS_ONLY
from charm_core.reward_model.loading import load_reward_model
from charm_core.reward_model.network import pack, transformer_layers
from charm_core.reward_model.spec import RewardModelSpec
from charm_core.reward_model.text_scoring import (
    budget_in,
    bytes_per_token,
    choose_batching,
    groups_of,
    run_texts,
    score_texts,
)
from tests.charm_core.reward_model import kinds
from tests.charm_core.reward_model.tiny import ARCHITECTURES, DECODERS, save_model, some_texts

TOLERANCE = 1e-5
PACKABLE = (*DECODERS, "bert")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    made = {name: save_model(root / name, name) for name in ARCHITECTURES}
    made["value_head"] = kinds.save_value_head(root / "value_head", "gemma2")
    made["gated"] = kinds.save_gated(root / "gated")
    return made


@pytest.fixture(scope="module")
def pairs(folders):
    """Every model twice: as loaded, and packed."""
    made = {}
    for name, folder in folders.items():
        plain, other = (load_reward_model(RewardModelSpec(path=str(folder))) for _ in range(2))
        texts, owners = some_texts(plain, 0)
        made[name] = plain, choose_batching(other, texts, owners)[0]
    return made


@pytest.mark.parametrize("name", [*PACKABLE, "value_head", "gated"])
def test_rows_are_packed_where_that_gives_the_same_scores(pairs, name):
    _, packed = pairs[name]
    assert packed.packed


def test_a_model_with_attention_of_its_own_gets_padded_batches(folders):
    model = load_reward_model(RewardModelSpec(path=str(folders["deberta"])))
    texts, owners = some_texts(model, 0)
    model, check = choose_batching(model, texts, owners)
    assert not model.packed
    assert check.refusal == "this kind of reward model takes no packed rows"
    assert check.drift <= TOLERANCE


@pytest.mark.parametrize("name", [*ARCHITECTURES, "value_head", "gated"])
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6), budget=st.integers(1, 600), order=st.permutations(range(12)))
def test_a_score_is_the_same_alone_and_in_any_packed_batch(pairs, name, seed, budget, order):
    plain, packed = pairs[name]
    texts, owners = some_texts(plain, seed, prompts=3, responses=4)
    alone = np.array([score_texts(plain, [text])[0] for text in texts])
    other = replace(packed, spec=packed.spec.model_copy(update={"batch_tokens": budget}))
    batched = np.empty(len(texts))
    batched[order] = score_texts(other, [texts[index] for index in order], [owners[index] for index in order])
    # float32 rounds by a share of what it adds up: heads whose scores are larger err by more
    allowed = TOLERANCE * max(1.0, np.abs(alone).max())
    np.testing.assert_allclose(batched, alone, atol=allowed, rtol=0)
    for one, two in combinations(range(len(texts)), 2):
        if texts[one] == texts[two]:
            assert abs(batched[one] - batched[two]) < allowed
        elif abs(alone[one] - alone[two]) > allowed:
            assert (batched[one] > batched[two]) == (alone[one] > alone[two]), "a pair has flipped"


def last_layer(model):
    return transformer_layers(model.network.packable)[-1]


def rows_computed(model, texts, owners):
    """Per linear layer of the last transformer layer, how many rows its product has."""
    names = {id(part.weight): name for name, part in last_layer(model).named_modules() if isinstance(part, nn.Linear)}
    linear, found = nn.functional.linear, {}

    def note(states, weight, bias=None):
        if id(weight) in names:
            found[names[id(weight)]] = states.shape[-2]
        return linear(states, weight, bias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "linear", note)
        run_texts(model, texts, owners)
    assert found.keys() == set(names.values())
    return found


@pytest.mark.parametrize("name", [*PACKABLE, "value_head", "gated"])
def test_the_last_layer_is_computed_only_where_it_is_read(pairs, name):
    _, packed = pairs[name]
    texts, owners = some_texts(packed, 2)
    tokens = run_texts(packed, texts, owners).computed_tokens
    rows = rows_computed(packed, texts, owners)
    everywhere = {part for part, count in rows.items() if count == tokens}
    assert {part.split(".")[-1] for part in everywhere} in ({"k_proj", "v_proj"}, {"key", "value"})
    places = {len(packed.network.places(text)) for text in texts}
    assert set(rows.values()) - {tokens} <= set(range(1, max(places) * len(texts) + 1))
    assert len(rows) > len(everywhere)


@pytest.mark.parametrize("name", [*PACKABLE, "gated"])
def test_a_layer_that_is_trimmed_wrongly_is_left_whole(folders, name, monkeypatch):
    monkeypatch.setattr("charm_core.reward_model.last_layer._KEYS_AND_VALUES", re.compile("nothing"))
    plain, other = (load_reward_model(RewardModelSpec(path=str(folders[name]))) for _ in range(2))
    texts, owners = some_texts(plain, 1)
    packed, check = choose_batching(other, texts, owners)
    assert packed.packed
    assert check.drift <= TOLERANCE
    assert set(rows_computed(packed, texts, owners).values()) == {run_texts(packed, texts, owners).computed_tokens}
    assert not any(hasattr(part, READS_ONLY) for part in last_layer(packed).modules())
    np.testing.assert_allclose(score_texts(packed, texts, owners), score_texts(plain, texts), atol=TOLERANCE, rtol=0)


def test_training_computes_the_last_layer_everywhere(folders):
    model = load_reward_model(RewardModelSpec(path=str(folders["qwen3"])))
    texts, owners = some_texts(model, 1)
    model, _ = choose_batching(model, texts, owners, trimmed=False)
    assert not any(hasattr(part, READS_ONLY) for part in last_layer(model).modules())


@pytest.mark.parametrize("name", DECODERS)
def test_what_is_shared_is_computed_once(pairs, name):
    plain, packed = pairs[name]
    texts, owners = some_texts(plain, 2)
    shared, each = run_texts(packed, texts, owners), run_texts(packed, texts)
    tokens = sum(len(text.input_ids) for text in texts)
    assert each.computed_tokens == tokens > shared.computed_tokens
    np.testing.assert_allclose(shared.values, each.values, atol=TOLERANCE, rtol=0)


def test_nothing_is_shared_where_a_model_looks_ahead(pairs):
    plain, packed = pairs["bert"]
    texts, owners = some_texts(plain, 2)
    assert run_texts(packed, texts, owners).computed_tokens == sum(len(text.input_ids) for text in texts)


@pytest.mark.parametrize("name", [*PACKABLE, "value_head"])
def test_gradients_are_those_of_each_text_alone(pairs, name):
    plain, packed = pairs[name]
    texts, owners = some_texts(plain, 4)
    weights = torch.linspace(-1, 1, len(texts))

    def gradients(model, scores):
        model.network.zero_grad()
        (scores * weights).sum().backward()
        return {
            key: parameter.grad.clone()
            for key, parameter in model.network.named_parameters()
            if parameter.grad is not None
        }

    groups = groups_of(packed, texts, owners)
    order = [text for group in groups for text in group.texts]
    together = packed.network(**pack(groups, texts, packed.device, packed.network))
    ours = gradients(packed, together[torch.tensor(order).argsort()])
    alone = torch.cat(
        [plain.network(**text_scoring.inputs_of(plain, [text_scoring._single(0)], [text])) for text in texts]
    )
    theirs = gradients(plain, alone)
    assert ours.keys() == theirs.keys()
    for key, gradient in theirs.items():
        scale = max(1.0, gradient.abs().max().item())
        torch.testing.assert_close(ours[key] / scale, gradient / scale, atol=TOLERANCE, rtol=0)


def test_a_packed_row_that_gives_other_scores_is_not_used(folders, monkeypatch):
    right = text_scoring.pack

    def wrong(*arguments):
        batch = right(*arguments)
        return batch | {"position_ids": batch["position_ids"] * 2}

    monkeypatch.setattr(text_scoring, "pack", wrong)
    model = load_reward_model(RewardModelSpec(path=str(folders["qwen3"])))
    texts, owners = some_texts(model, 0)
    before = score_texts(model, texts)
    chosen, check = choose_batching(model, texts, owners)
    assert not chosen.packed
    assert "is off by" in check.refusal
    assert score_texts(chosen, texts, owners) == before
    asked = replace(model, spec=model.spec.model_copy(update={"batching": "packed"}))
    with pytest.raises(
        ModelError, match=r"cannot take packed rows: a score in a packed row is off by .*set batching='auto'"
    ):
        choose_batching(asked, texts, owners)


class Altered(nn.Module):
    """Stands for a network with a fault: what it gives for more than one text is altered."""

    def __init__(self, network, change, *, packed_only):
        super().__init__()
        self.inner, self.change, self.packed_only = network, change, packed_only
        self.packable, self.looks_ahead, self.places = network.packable, network.looks_ahead, network.places

    def forward(self, **batch):
        scores = self.inner(**batch)
        altered = "layout" in batch or (not self.packed_only and len(scores) > 1)
        return scores + self.change if altered else scores


@pytest.mark.parametrize("times", [2, 10])
def test_a_fault_of_a_few_hundred_thousandths_is_noticed(folders, times):
    model = load_reward_model(RewardModelSpec(path=str(folders["llama"])))
    texts, owners = some_texts(model, 0)
    largest = max(1.0, *map(abs, score_texts(model, texts)))
    faulty = replace(model, network=Altered(model.network, times * TOLERANCE * largest, packed_only=True))
    chosen, check = choose_batching(faulty, texts, owners)
    assert not chosen.packed
    assert "is off by" in check.refusal


def test_where_batches_move_scores_in_any_case_rows_are_packed_all_the_same(folders):
    model = load_reward_model(RewardModelSpec(path=str(folders["llama"])))
    texts, owners = some_texts(model, 0)
    noisy = replace(model, network=Altered(model.network, 1e-3, packed_only=False))
    chosen, check = choose_batching(noisy, texts, owners)
    assert chosen.packed
    assert check.drift == pytest.approx(1e-3, rel=0.1)


@pytest.mark.parametrize(
    "changes", [{"strict": True}, {"batching": "padded"}, {"attention": "eager"}, {"attention": "sdpa"}]
)
def test_what_cannot_be_compiled_is_not_asked_for(changes):
    with pytest.raises(ValidationError, match=f"compile needs packed rows, .*{next(iter(changes))}="):
        RewardModelSpec(path="rm", compile=True, **changes)


@pytest.mark.parametrize("changes", [{"batching": "padded"}, {"attention": "eager"}, {"strict": True}])
def test_what_is_set_is_done(folders, changes):
    model = load_reward_model(RewardModelSpec(path=str(folders["llama"]), **changes))
    texts, owners = some_texts(model, 0)
    chosen, check = choose_batching(model, texts, owners)
    assert not chosen.packed
    assert next(iter(changes)) in check.refusal


@pytest.mark.parametrize("name", ["qwen3", "bert"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_strict_scores_do_not_move_by_a_bit(folders, name, dtype):
    model = load_reward_model(RewardModelSpec(path=str(folders[name]), strict=True, dtype=dtype))
    texts, owners = some_texts(model, 5)
    model, _ = choose_batching(model, texts, owners)
    alone = [score_texts(model, [text])[0] for text in texts]
    assert score_texts(model, texts, owners) == alone
    assert score_texts(model, texts[::-1], owners[::-1])[::-1] == alone


def test_the_drift_of_bfloat16_is_measured(folders):
    model = load_reward_model(RewardModelSpec(path=str(folders["qwen3"]), dtype="bfloat16"))
    texts, owners = some_texts(model, 0, prompts=8)
    model, check = choose_batching(model, texts, owners)
    assert model.packed
    assert TOLERANCE < check.drift < 0.2


class OutOfMemoryAbove(nn.Module):
    """Stands for a GPU that holds so many tokens."""

    def __init__(self, network, most):
        super().__init__()
        self.inner, self.most, self.sizes = network, most, []
        self.packable, self.looks_ahead, self.places = network.packable, network.looks_ahead, network.places

    def forward(self, **batch):
        self.sizes.append(batch["input_ids"].numel())
        if batch["input_ids"].numel() > self.most:
            raise torch.OutOfMemoryError("too much")
        return self.inner(**batch)


@pytest.mark.parametrize("which", [0, 1])
def test_a_batch_that_does_not_fit_into_memory_is_halved(pairs, which):
    plain, model = pairs["llama"][0], pairs["llama"][which]
    texts, owners = some_texts(plain, 6, prompts=12)
    small = OutOfMemoryAbove(model.network, 150)
    result = run_texts(replace(model, network=small), texts, owners)
    np.testing.assert_allclose(result.values, [score_texts(plain, [text])[0] for text in texts], atol=TOLERANCE)
    too_large = [size for size in small.sizes if size > 150]
    assert too_large == sorted(too_large, reverse=True)
    assert 0 < len(too_large) <= 5, "it learns how much fits"


def test_a_text_that_does_not_fit_alone_is_an_error(pairs):
    _, model = pairs["llama"]
    texts, owners = some_texts(model, 6)
    with pytest.raises(ModelError, match=r"a text of \d+ tokens does not fit into the GPU's memory.*lower max_length"):
        run_texts(replace(model, network=OutOfMemoryAbove(model.network, 3)), texts, owners)


@pytest.mark.parametrize("batching", ["auto", "padded"])
def test_the_trial_takes_no_more_than_a_batch(folders, batching):
    model = load_reward_model(RewardModelSpec(path=str(folders["llama"]), batch_tokens=80, batching=batching))
    texts, owners = some_texts(model, 6)
    small = OutOfMemoryAbove(model.network, 80)
    chosen, check = choose_batching(replace(model, network=small), texts, owners)
    assert max(small.sizes) <= 80
    assert chosen.packed == (batching == "auto")
    assert check.texts > 1


def test_a_trial_that_does_not_fit_is_given_up(folders):
    model = load_reward_model(RewardModelSpec(path=str(folders["llama"]), batch_tokens=1000))
    texts, owners = some_texts(model, 6)
    most = max(len(text.input_ids) for text in texts)
    small = OutOfMemoryAbove(model.network, most)
    chosen, check = choose_batching(replace(model, network=small), texts, owners)
    assert not chosen.packed
    assert "too much" in check.refusal
    scores = run_texts(chosen, texts, owners).values
    np.testing.assert_allclose(scores, [score_texts(model, [text])[0] for text in texts], atol=TOLERANCE)
    with pytest.raises(ModelError, match=rf"a text of {most} tokens does not fit"):
        choose_batching(replace(model, network=OutOfMemoryAbove(model.network, most - 1)), texts, owners)


def test_half_of_the_free_memory_is_planned_with():
    assert budget_in(2 * 10**9, 100_000) == 10_000
    assert budget_in(10**12, 100_000) == text_scoring.MOST_BATCH_TOKENS
    assert budget_in(10, 100_000) == 1


@pytest.mark.parametrize("name", ["llama", "gated"])
def test_what_a_token_takes_is_told_by_the_transformer(pairs, name):
    """Of a gated model the first matrix is that of the rewards, in float32 whatever the transformer's type is."""
    _, model = pairs[name]
    config = model.network.packable.config
    expected = (3 * config.intermediate_size + 12 * config.hidden_size) * 4
    assert bytes_per_token(model) == expected
    assert bytes_per_token(replace(model, network=copy.deepcopy(model.network).bfloat16())) == expected // 2


# Inductor imports what PyTorch itself calls deprecated.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3", "gemma2", "bert"])
def test_compiled_layers_give_the_same_scores_and_are_compiled_once_per_size(folders, name):
    torch._dynamo.reset()
    spec = RewardModelSpec(path=str(folders[name]), batch_tokens=256)
    plain, model = load_reward_model(spec), load_reward_model(spec)
    texts, owners = some_texts(plain, 7, prompts=24)
    model, check = choose_batching(model, texts, owners, compiled=True)
    assert check.drift <= TOLERANCE
    for tokens in (256, 120, 60, 30):  # a row of every size
        one = replace(model, spec=model.spec.model_copy(update={"batch_tokens": 256}))
        filling, room = [], tokens
        for text in texts:
            if len(text.input_ids) <= room:
                filling.append(text)
                room -= len(text.input_ids)
        run_texts(one, filling)
    run_texts(model, texts, owners)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    more, whose = some_texts(plain, 8, prompts=24)
    found = run_texts(model, more, whose)
    assert found.computed_tokens % 32 == 0, "what rows are filled up with is computed too"
    values = found.values
    np.testing.assert_allclose(values, [score_texts(plain, [text])[0] for text in more], atol=TOLERANCE, rtol=0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
