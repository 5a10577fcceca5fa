"""Token ids for a model that runs elsewhere are those that scoring on this machine sees."""

from pathlib import Path

import polars as pl
import pytest

from charm_core.errors import ModelError, TableError
from charm_core.reward_model.loading import load_reward_model
from charm_core.reward_model.rendered_texts import render_texts
from charm_core.reward_model.rendering import render
from charm_core.reward_model.spec import RewardModelSpec
from tests.charm_core.reward_model import tiny

TABLES = tiny.prompts_and_responses(6)


def test_the_same_ids_as_scoring_sees_without_the_weights(tmp_path: Path):
    folder = tiny.save_model(tmp_path / "model")
    spec = RewardModelSpec(path=str(folder), max_length=14, min_response_tokens=2)
    model = load_reward_model(spec)
    (folder / "model.safetensors").unlink()
    rendered = render_texts(spec, *TABLES)
    prompts = dict(TABLES[0].select("prompt_id", "messages").iter_rows())
    for prompt_id, policy_model, ids, prompt_cut, response_cut in rendered.frame.iter_rows():
        response = TABLES[1].filter(prompt_id=prompt_id, policy_model=policy_model).get_column("response")[0]
        expected = render(model.tokenizer, prompts[prompt_id], response, model.spec)
        assert (tuple(ids), prompt_cut, response_cut) == (
            expected.input_ids,
            expected.prompt_cut,
            expected.response_cut,
        )
    assert rendered.frame.height == TABLES[1].height
    assert rendered.frame.get_column("response_cut").any()
    assert rendered.max_length == 14
    assert render_texts(spec.model_copy(update={"max_length": 4096}), *TABLES).max_length == 128  # the model's own


def test_texts_that_need_segment_ids_cannot_be_sent(tmp_path: Path):
    folder = tiny.save_model(tmp_path / "bert", "bert")
    with pytest.raises(
        ModelError, match="told apart by segment ids, which a server cannot be sent; use route 'vllm_score'"
    ):
        render_texts(RewardModelSpec(path=str(folder)), *TABLES)


def test_responses_without_their_prompt(tmp_path: Path):
    folder = tiny.save_model(tmp_path / "model")
    fewer = TABLES[0].filter(pl.col("prompt_id") != "p002")
    with pytest.raises(TableError, match="3 responses are to prompts that are not in the prompts table, first 'p002'"):
        render_texts(RewardModelSpec(path=str(folder)), fewer, TABLES[1])
