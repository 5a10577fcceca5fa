"""DPO by TRL on a policy model of a few thousand weights, in this process; the flow runs it in one of its own."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from charm_core.errors import ConfigError, ModelError, TrainingError
from charm_core.preferences import PreferenceConfig, build_preference_pairs
from charm_core.reward_model.generation_job import PolicyModelSpec
from charm_core.reward_model.post_training_job import PostTrainingConfig, PostTrainingJob, PostTrainingOutcome
from charm_core.reward_model.ranks import Rank
from charm_core.reward_model.templates import chat_ids
from tests.tiny_policy_model import CHAT_TEMPLATE, WORDS, save_policy_model

# TRL 1.16 asks transformers 5.23 for some things by their old names
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

HERE = Rank(number=0, world_size=1, device=torch.device("cpu"))
CONFIG = PostTrainingConfig(
    learning_rate=1e-2, pairs_per_step=8, pairs_per_pass=8, epochs=3, max_length=64, lora_rank=4, threads_per_rank=1
)
LIKED, DISLIKED = WORDS[:10], WORDS[10:20]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_policy_model(tmp_path_factory.mktemp("policy") / "model")


def pairs_table(count: int = 40) -> pl.DataFrame:
    """Pairs that prefer some words to others, whatever the prompt."""
    rng = np.random.default_rng(0)
    prompts, responses, scores = [], [], []
    for number in range(count):
        prompts.append((f"p{number}", "words", [{"role": "user", "content": " ".join(rng.choice(WORDS, 3))}]))
        for name, words, score in (("good", LIKED, 1.0), ("bad", DISLIKED, 0.0)):
            responses.append((f"p{number}", name, " ".join(rng.choice(words, 6))))
            scores.append((f"p{number}", name, score))
    frame = pl.DataFrame(prompts, schema=["prompt_id", "prompt_set", "messages"], orient="row")
    texts = pl.DataFrame(responses, schema=["prompt_id", "policy_model", "response"], orient="row")
    scored = pl.DataFrame(scores, schema=["prompt_id", "policy_model", "score"], orient="row")
    config = PreferenceConfig(strategy="all_pairs", held_out_fraction=0.2)
    return build_preference_pairs(frame, texts, scored, {"good": 0.0, "bad": 0.0}, config).frame


def make_job(folder: Path, tmp_path: Path, pairs: pl.DataFrame | None = None, **changes: object) -> PostTrainingJob:
    (pairs_table() if pairs is None else pairs).write_parquet(tmp_path / "pairs.parquet")
    return PostTrainingJob(
        model=PolicyModelSpec(path=str(folder), dtype="float32"),
        pairs_path=tmp_path / "pairs.parquet",
        output_dir=tmp_path / "trained",
        config=CONFIG.model_copy(update=changes),
    )


def run(job: PostTrainingJob) -> PostTrainingOutcome:
    from charm_core.reward_model.post_training import post_train

    return post_train(job, HERE)


def preference(folder: Path) -> float:
    """Mean log-probability of liked minus that of disliked words as the first of an answer."""
    tokenizer, network = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = [chat_ids(tokenizer, [{"role": "user", "content": word}], answer_begins=True) for word in WORDS[20:30]]
    with torch.inference_mode():
        logits = network(torch.tensor(ids)).logits[:, -1].log_softmax(-1)
    liked, disliked = (logits[:, tokenizer.convert_tokens_to_ids(list(words))].mean() for words in (LIKED, DISLIKED))
    return float(liked - disliked)


@pytest.mark.parametrize("lora_rank", [4, None], ids=["LoRA", "all weights"])
def test_the_policy_model_learns_to_prefer_what_the_pairs_prefer(folder: Path, tmp_path: Path, lora_rank: int | None):
    job = make_job(folder, tmp_path, lora_rank=lora_rank, learning_rate=1e-2 if lora_rank else 2e-3)
    outcome = run(job)
    pairs = pairs_table()
    assert outcome.train_pairs == pairs.filter(split="train").height < pairs.height
    assert outcome.held_out_pairs == pairs.height - outcome.train_pairs > 0
    assert outcome.steps == len(outcome.curve) == 3 * -(-outcome.train_pairs // 8)
    # it starts as its own reference: what is chosen is not yet more likely
    assert outcome.first_loss == pytest.approx(np.log(2), abs=1e-5)
    assert outcome.last_loss < 0.6
    assert outcome.accuracy_after == 1.0
    assert preference(job.output_dir) > preference(folder) + 0.3
    assert PostTrainingOutcome.model_validate_json(job.outcome_path.read_text()) == outcome


def test_what_comes_out_is_a_plain_folder_like_the_original(folder: Path, tmp_path: Path):
    original = tmp_path / "original"
    save_policy_model(original)
    GenerationConfig(eos_token_id=[2, 5], pad_token_id=0).save_pretrained(original)
    half = AutoModelForCausalLM.from_pretrained(original, dtype=torch.bfloat16)
    half.generation_config = GenerationConfig(eos_token_id=[2, 5], pad_token_id=0)
    half.save_pretrained(original)
    job = make_job(original, tmp_path, epochs=1)
    run(job)
    assert {path.name for path in tmp_path.iterdir()} == {"original", "pairs.parquet", "trained", "trained.json"}
    before, after = (load_file(place / "model.safetensors") for place in (original, job.output_dir))
    assert {name: tensor.dtype for name, tensor in before.items()} == {
        name: tensor.dtype for name, tensor in after.items()
    }
    # the adapter is merged into the linear layers, and nothing else has moved
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all("proj" in name for name in moved)
    # a policy model may end its answers with more than one token
    assert json.loads((job.output_dir / "generation_config.json").read_text())["eos_token_id"] == [2, 5]
    tokenizers = [AutoTokenizer.from_pretrained(place) for place in (original, job.output_dir)]
    assert tokenizers[0].get_chat_template() == tokenizers[1].get_chat_template()


def test_the_same_job_gives_the_same_weights_and_another_seed_others(folder: Path, tmp_path: Path):
    weights = []
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        place = tmp_path / name
        place.mkdir()
        job = make_job(folder, place, epochs=1, seed=seed)
        run(job)
        weights.append((job.output_dir / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]


@pytest.mark.parametrize(
    "template", [CHAT_TEMPLATE, "{{ strftime_now('%d %B %Y') }} " + CHAT_TEMPLATE], ids=["plain", "with a date"]
)
def test_training_sees_the_tokens_that_sampling_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str):
    from trl import DPOTrainer

    folder = save_policy_model(tmp_path / "policy", chat_template=template)
    seen: list[dict[str, list[int]]] = []

    def train(trainer: DPOTrainer) -> None:
        seen.extend(trainer.train_dataset.to_list())
        raise TrainingError("seen enough")

    monkeypatch.setattr(DPOTrainer, "train", train)
    with pytest.raises(TrainingError, match="seen enough"):
        run(make_job(folder, tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = pairs_table().filter(split="train").to_dicts()
    assert len(seen) == len(rows)
    for ids, row in zip(seen, rows, strict=True):
        assert ids["prompt_ids"] == chat_ids(tokenizer, row["prompt"], answer_begins=True)
        for side in ("chosen", "rejected"):
            assert ids["prompt_ids"] + ids[f"{side}_ids"] == chat_ids(tokenizer, [*row["prompt"], *row[side]])


def test_texts_that_lose_their_end_are_counted(folder: Path, tmp_path: Path):
    longest = run(make_job(folder, tmp_path, epochs=1))
    assert longest.cut == 0
    pairs = pairs_table()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    train = pairs.filter(split="train")
    texts = {
        json.dumps([*row["prompt"], *row[side]]): len(chat_ids(tokenizer, [*row["prompt"], *row[side]]))
        for row in train.to_dicts()
        for side in ("chosen", "rejected")
    }
    limit = max(texts.values()) - 1
    cut = run(make_job(folder, tmp_path, epochs=1, max_length=limit)).cut
    assert cut == sum(length > limit for length in texts.values()) > 0


@pytest.mark.slow
def test_under_deepspeed_two_ranks_share_the_work(folder: Path, tmp_path: Path):
    from tasks.launching import run_post_training

    trained = []
    for stage in (2, 3):
        place = tmp_path / f"zero-{stage}"
        place.mkdir()
        job = make_job(folder, place, zero_stage=stage, ranks=2, pairs_per_pass=4)
        outcome = run_post_training(job)
        assert outcome.ranks == 2
        assert outcome.first_loss == pytest.approx(np.log(2), abs=1e-5)
        assert outcome.accuracy_after == 1.0
        assert preference(job.output_dir) > preference(folder) + 0.3
        trained.append(load_file(job.output_dir / "model.safetensors"))
    # how the weights are shared out changes nothing of what is learnt
    for name, tensor in trained[0].items():
        assert torch.allclose(tensor, trained[1][name], atol=1e-5), name


def test_what_cannot_be_trained_says_why(folder: Path, tmp_path: Path):
    held_out = pairs_table().with_columns(split=pl.lit("held_out"))
    with pytest.raises(TrainingError, match=r"none of the 40 pairs is in the training split"):
        run(make_job(folder, tmp_path, held_out))
    with pytest.raises(ConfigError, match="pairs_per_step=8 is not a multiple of pairs_per_pass=3 times 1 ranks"):
        run(make_job(folder, tmp_path, pairs_per_pass=3))
    with pytest.raises(ModelError, match=r"the policy model .*nowhere' cannot be loaded"):
        run(make_job(tmp_path / "nowhere", tmp_path))
    silent = save_policy_model(tmp_path / "silent")
    (silent / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="has no chat template"):
        run(make_job(silent, tmp_path))
    assert not (tmp_path / "trained").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_smoothing": 0.1}, "label_smoothing belongs to loss 'robust'"),
        ({"lora_rank": None, "lora_alpha": 8}, "lora_alpha and lora_targets need lora_rank"),
        ({"ranks": 2}, "ranks=2 needs DeepSpeed"),
        ({"threads_per_rank": 0}, "greater than or equal to 1"),
    ],
)
def test_settings_that_do_not_fit_each_other_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        PostTrainingConfig(**settings)
