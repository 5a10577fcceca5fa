import pytest
import torch
from transformers import AutoModelForCausalLM

from charm_core.errors import ModelError
from charm_core.reward_model.heads import dpo
from charm_core.reward_model.network import collate
from charm_core.reward_model.rendering import render
from charm_core.reward_model.text_scoring import score_texts
from tests.charm_core.reward_model.kinds import (
    LLAMA_TEMPLATE,
    VOCABULARY,
    loaded,
    save_causal,
    texts_of,
    tokenizer_of,
)
from tests.charm_core.reward_model.tiny import chat_tokenizer, messages

TOLERANCE = 1e-5


def log_probability(folder, ids, start):
    """Of the tokens from ``start`` on, one after the other, each given all before it."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    total = 0.0
    for place in range(start, len(ids)):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids[:place]])).logits[0, -1]
        total += logits.double().log_softmax(0)[ids[place]].item()
    return total


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def pair(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("dpo")
    policy, reference = (
        save_causal(root / name, request.param, seed=seed) for name, seed in (("policy", 1), ("sft", 2))
    )
    return policy, reference


def of(pair, **settings):
    return loaded(pair[0], reference_model=str(pair[1]), **settings)


def test_the_score_is_beta_times_the_difference_of_log_probabilities_of_the_response(pair):
    model = of(pair, dpo_beta=0.3)
    assert model.spec.kind == "dpo"
    texts = texts_of(model, count=5)
    expected = [
        0.3
        * (
            log_probability(pair[0], text.input_ids, text.response_start)
            - log_probability(pair[1], text.input_ids, text.response_start)
        )
        for text in texts
    ]
    scores = score_texts(model, texts)
    assert scores == pytest.approx(expected, abs=TOLERANCE)
    assert torch.tensor(scores).std() > 100 * TOLERANCE


def test_the_response_begins_after_the_header_of_the_answer_and_ends_with_the_turn(pair):
    model = of(pair)
    text = render(model.tokenizer, messages("w1 w2"), "w3 w4", model.spec)
    tokens = model.tokenizer.convert_ids_to_tokens(list(text.input_ids))
    assert tokens[text.response_start] == "w3"
    assert tokens[text.response_start :][:3] in (["w3", "w4", "<|eot_id|>"], ["w3", "w4", "<end_of_turn>"])
    empty = render(model.tokenizer, messages("w1 w2"), "", model.spec)
    assert score_texts(model, [empty])[0] != 0


def test_a_score_does_not_depend_on_its_batch_nor_on_the_padding(pair, monkeypatch):
    model = of(pair)
    texts = texts_of(model, count=12)
    alone = [score_texts(model, [text])[0] for text in texts]
    assert score_texts(model, texts) == pytest.approx(alone, abs=TOLERANCE)
    with torch.inference_mode():
        other = model.network(**collate(texts, VOCABULARY["w3"], model.device, model.network)).tolist()
    assert other == pytest.approx(alone, abs=TOLERANCE)
    monkeypatch.setattr(dpo, "MOST_LOGITS", 60 * len(VOCABULARY))
    assert score_texts(model, texts) == pytest.approx(alone, abs=TOLERANCE)


def test_a_response_that_was_cut_counts_as_it_is(pair):
    model = of(pair, max_length=24, min_response_tokens=4)
    (text,) = [render(model.tokenizer, messages("w1 w2 w3"), " ".join(["w4"] * 40), model.spec)]
    assert text.response_cut
    assert len(text.input_ids) == 24
    expected = [log_probability(folder, text.input_ids, text.response_start) for folder in pair]
    assert score_texts(model, [text]) == pytest.approx([0.1 * (expected[0] - expected[1])], abs=TOLERANCE)


def test_a_template_that_writes_prompts_otherwise_counts_from_the_first_difference(tmp_path, pair):
    template = LLAMA_TEMPLATE.replace("prompt %}{{ '<|start_header_id|>assistant", "prompt %}{{ 'w9 assistant")
    model = of(pair, chat_template=template)
    text = render(model.tokenizer, messages("w1"), "w2", model.spec)
    tokens = model.tokenizer.convert_ids_to_tokens(list(text.input_ids))
    assert tokens[text.response_start :] == [
        "<|start_header_id|>",
        "assistant",
        "<|end_header_id|>",
        "\n\n",
        "w2",
        "<|eot_id|>",
    ]


def test_another_vocabulary_than_the_references_is_an_error(tmp_path, pair):
    other = save_causal(tmp_path / "other", vocab_size=len(VOCABULARY) + 8)
    with pytest.raises(ModelError, match=r"vocabulary of \d+ tokens and its reference .*other' one of \d+"):
        loaded(pair[0], reference_model=str(other))


def test_a_model_cannot_be_its_own_reference(pair):
    with pytest.raises(ModelError, match="is its own reference, so all scores would be 0"):
        loaded(pair[0], reference_model=str(pair[0]))


def test_a_language_model_alone_is_not_a_reward_model(pair):
    with pytest.raises(ModelError, match=r"no head.*if it was trained with DPO, set reward_model.reference_model"):
        loaded(pair[0])


def test_texts_of_another_kind_are_an_error(pair):
    model = of(pair)
    text = render(chat_tokenizer(), messages("w1"), "w2", model.spec.model_copy(update={"kind": "classifier"}))
    with pytest.raises(ModelError, match="must say where the response begins"):
        score_texts(model, [text])


def test_the_tokenizer_of_the_tiny_models_is_the_same():
    assert tokenizer_of().get_vocab() == VOCABULARY
