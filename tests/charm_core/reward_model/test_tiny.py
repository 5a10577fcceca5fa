import hashlib
from pathlib import Path

import pytest
import torch

from charm_core.errors import ConfigError
from charm_core.reward_model.loading import check_reward_model, load_reward_model
from charm_core.reward_model.rendering import render
from charm_core.reward_model.scoring import score_responses
from charm_core.reward_model.spec import RewardModelSpec
from charm_core.reward_model.tiny import build_tiny_reward_model
from charm_core.simulation import SimulationConfig, simulate_arena

WORDS = (".", "please", "good", "bad")


def test_the_same_arguments_give_the_same_files(tmp_path):
    build_tiny_reward_model(WORDS, tmp_path / "a", seed=3)
    torch.rand(5)
    build_tiny_reward_model(WORDS, tmp_path / "b", seed=3)
    build_tiny_reward_model(WORDS, tmp_path / "c", seed=4)
    assert _digests(tmp_path / "a") == _digests(tmp_path / "b")
    assert _digests(tmp_path / "a") != _digests(tmp_path / "c")


def test_the_global_generator_is_left_alone(tmp_path):
    before = torch.random.get_rng_state()
    build_tiny_reward_model(WORDS, tmp_path / "model")
    assert torch.equal(before, torch.random.get_rng_state())


def test_it_is_a_reward_model_that_reads_every_word(tmp_path):
    build_tiny_reward_model(WORDS, tmp_path)
    spec = RewardModelSpec(path=str(tmp_path), max_length=128)
    check_reward_model(spec)
    tokenizer = load_reward_model(spec).tokenizer
    ids = render(tokenizer, [{"role": "user", "content": "please good."}], "bad nonsense.", spec).input_ids
    words = tokenizer.convert_ids_to_tokens(list(ids))
    assert words == ["<user>", "please", "good", ".", "<assistant>", "bad", "<unknown>", ".", "<end>"]


def test_it_knows_all_words_of_a_simulated_arena(tmp_path):
    arena = simulate_arena(SimulationConfig(prompts=10, label_prompts=10, battles=500))
    build_tiny_reward_model(arena.vocabulary, tmp_path)
    spec = RewardModelSpec(path=str(tmp_path), max_length=128)
    tokenizer = load_reward_model(spec).tokenizer
    rendered = render(tokenizer, arena.prompts["messages"][0], arena.responses["response"][0], spec)
    assert tokenizer.unk_token_id not in rendered.input_ids
    scored = score_responses(spec, arena.prompts, arena.responses)
    assert scored.scores.height == arena.responses.height
    assert scored.summary.responses_cut == scored.summary.prompts_cut == 0
    assert scored.scores.get_column("score").n_unique() > 0.9 * scored.scores.height


@pytest.mark.parametrize("wrong", [{"vocabulary": ("a", "a")}, {"vocabulary": ("a",), "hidden_size": 40}])
def test_bad_arguments_are_refused(tmp_path, wrong):
    with pytest.raises(ConfigError, match="multiple of 16"):
        build_tiny_reward_model(folder=tmp_path / "model", **wrong)
    assert not (tmp_path / "model").exists()


def _digests(folder: Path):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}
