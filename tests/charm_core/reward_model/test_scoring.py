from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from charm_core.errors import TableError
from charm_core.reward_model.loading import load_reward_model
from charm_core.reward_model.network import collate
from charm_core.reward_model.rendering import render
from charm_core.reward_model.scoring import score_responses
from charm_core.reward_model.spec import RewardModelSpec
from charm_core.reward_model.text_scoring import choose_batching, score_texts
from tests.charm_core.reward_model.kinds import save_adapter, save_causal, save_gated, save_value_head
from tests.charm_core.reward_model.tiny import (
    ARCHITECTURES,
    DECODERS,
    chat_tokenizer,
    messages,
    prompts_and_responses,
    save_model,
    sentence,
)

SHARED = Path(__file__).parents[4] / "shared"
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    paths = {name: save_model(root / name, name) for name in ARCHITECTURES}
    return {name: load_reward_model(RewardModelSpec(path=str(path))) for name, path in paths.items()}


def texts_of(model, seed, count=14):
    rng = np.random.default_rng(seed)
    return [
        render(model.tokenizer, messages(sentence(rng, high=9)), sentence(rng, low=0, high=40), model.spec)
        for _ in range(count)
    ]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scores_are_those_of_the_plain_hugging_face_call(models, name):
    model = models[name]
    plain = AutoModelForSequenceClassification.from_pretrained(model.spec.path).eval()
    texts = texts_of(model, 1)
    for text, score in zip(texts, score_texts(model, texts), strict=True):
        inputs = {"input_ids": torch.tensor([text.input_ids])}
        if text.token_type_ids is not None and name == "bert":
            inputs["token_type_ids"] = torch.tensor([text.token_type_ids])
        with torch.no_grad():
            hidden = plain.base_model(**inputs)[0] if name in DECODERS else None
            # The call itself looks for the last token that is not a pad token, and here pad == eos.
            expected = plain(**inputs).logits[0, 0] if hidden is None else plain.score(hidden[0, -1])[0]
        assert score == pytest.approx(expected.item(), abs=TOLERANCE)


@pytest.mark.parametrize("name", ARCHITECTURES)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), budget=st.integers(1, 600), random=st.randoms())
def test_a_score_does_not_depend_on_its_batch(models, name, seed, budget, random):
    model = models[name]
    texts = texts_of(model, seed)
    alone = [score_texts(model, [text])[0] for text in texts]
    order = random.sample(range(len(texts)), len(texts))
    batched = score_texts(
        type(model)(**(vars(model) | {"spec": model.spec.model_copy(update={"batch_tokens": budget})})),
        [texts[i] for i in order],
    )
    np.testing.assert_allclose(batched, [alone[i] for i in order], atol=TOLERANCE)
    assert np.std(alone) > 100 * TOLERANCE


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_in_the_padding_does_not_matter(models, name):
    model = models[name]
    texts = texts_of(model, 3)
    with torch.inference_mode():
        one, other = (
            model.network(**collate(texts, pad, model.device, model.network)) for pad in (model.pad_token_id, 17)
        )
    torch.testing.assert_close(one, other, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("batching", ["padded", "packed"])
@pytest.mark.parametrize("name", DECODERS)
def test_the_tokenizers_padding_side_does_not_matter(tmp_path, name, batching):
    """Stored as published ones are: it pads on the left, with the token that ends every text."""
    folder = save_model(tmp_path / name, name, tokenizer=chat_tokenizer(padding_side="left"))
    model = load_reward_model(RewardModelSpec(path=str(folder), batching=batching))
    assert model.tokenizer.padding_side == "left"
    assert model.pad_token_id == model.tokenizer.eos_token_id
    texts = texts_of(model, 4)
    assert {text.input_ids[-1] for text in texts} == {model.pad_token_id}
    assert len({len(text.input_ids) for text in texts}) > 5
    plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    # so it reads the last token of all, and not the last that is no padding, which would be the one before
    plain.config.pad_token_id = None
    with torch.no_grad():
        expected = [plain(torch.tensor([text.input_ids])).logits.item() for text in texts]
    chosen, check = choose_batching(model, texts, range(len(texts)))
    assert chosen.packed == (batching == "packed"), check.refusal
    assert score_texts(chosen, texts) == pytest.approx(expected, abs=TOLERANCE)
    assert np.std(expected) > 100 * TOLERANCE


def test_a_table_is_scored_and_summarised(models):
    spec = models["bert"].spec.model_copy(update={"max_length": 16, "min_response_tokens": 4})
    prompts, responses = prompts_and_responses(6)
    responses = responses.with_columns(
        pl.when(pl.col("policy_model") == "a").then(pl.lit("")).otherwise(pl.col("response")).alias("response")
    )
    twin = responses.filter(pl.col("policy_model") == "b").with_columns(policy_model=pl.lit("twin"))
    calls = []
    result = score_responses(
        spec,
        prompts,
        pl.concat([responses, twin]).sample(fraction=1, shuffle=True, seed=1),
        lambda *now: calls.append(now),
    )
    assert result.scores.columns == ["prompt_id", "policy_model", "score"]
    assert result.scores.rows() == sorted(result.scores.rows())
    wide = result.scores.pivot("policy_model", index="prompt_id", values="score")
    assert wide["b"].to_list() == wide["twin"].to_list()
    summary = result.summary
    assert (summary.texts, summary.distinct_texts, summary.empty_responses) == (24, 18, 6)
    assert summary.tie_rate == pytest.approx(1 / 6)
    gaps = [abs(row[i] - row[j]) for row in wide.drop("prompt_id").rows() for i in range(4) for j in range(i)]
    assert summary.smallest_gap == pytest.approx(min(gap for gap in gaps if gap > 0))
    assert summary.responses_cut > 0
    assert summary.max_length == summary.longest_text == 16
    assert calls[-1] == (24, 24)


def test_a_table_is_scored_with_a_model_of_any_kind(tmp_path):
    base = save_causal(tmp_path / "base")
    specs = [
        RewardModelSpec(path=str(save_value_head(tmp_path / "value_head"))),
        RewardModelSpec(path=str(save_gated(tmp_path / "gated"))),
        RewardModelSpec(path=str(save_adapter(tmp_path / "lora", base))),
        RewardModelSpec(path=str(save_causal(tmp_path / "dpo", seed=1)), reference_model=str(base)),
    ]
    prompts, responses = prompts_and_responses(5)
    twin = responses.filter(policy_model="a").with_columns(policy_model=pl.lit("twin"))
    for spec in specs:
        result = score_responses(spec, prompts, pl.concat([responses, twin]))
        model = load_reward_model(spec)
        rows = result.scores.join(responses, on=["prompt_id", "policy_model"]).join(prompts, on="prompt_id")
        for row in rows.iter_rows(named=True):
            (alone,) = score_texts(model, [render(model.tokenizer, row["messages"], row["response"], model.spec)])
            assert row["score"] == pytest.approx(alone, abs=TOLERANCE)
        assert (result.summary.texts, result.summary.distinct_texts) == (20, 15)


def test_a_response_without_prompt_is_an_error(models):
    prompts, responses = prompts_and_responses(3)
    with pytest.raises(TableError, match=r"not in the prompts table, first \['p002'\]"):
        score_responses(models["bert"].spec, prompts.head(2), responses)


@pytest.mark.real
@pytest.mark.skipif(
    not (SHARED / "models/minilm-judge-rm").exists(), reason="needs ../shared/models, which is not here"
)
def test_a_real_model_gets_the_inputs_it_was_trained_with():
    path = SHARED / "models/minilm-judge-rm"
    rows = (
        pl.read_parquet(SHARED / "data/responses.parquet", columns=["prompt_id", "prompt", "model", "response"])
        .unique(["prompt_id", "model"], keep="first", maintain_order=True)
        .sample(40, seed=3)
    )
    prompts = rows.unique("prompt_id").select(
        "prompt_id",
        prompt_set=pl.lit("real"),
        messages=pl.concat_list(pl.struct(role=pl.lit("user"), content="prompt")),
    )
    spec = RewardModelSpec(path=str(path), max_length=256, max_prompt_characters=600, min_response_tokens=1)
    scores = score_responses(spec, prompts, rows.select("prompt_id", policy_model="model", response="response")).scores
    tokenizer = AutoTokenizer.from_pretrained(path)
    classifier = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    for prompt_id, prompt, model, response in rows.rows():
        inputs = tokenizer(prompt[:600], response, truncation="only_second", max_length=256, return_tensors="pt")
        with torch.no_grad():
            expected = classifier(**inputs).logits.item()
        found = scores.filter(prompt_id=prompt_id, policy_model=model)["score"].item()
        assert found == pytest.approx(expected, abs=TOLERANCE)
