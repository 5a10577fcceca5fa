"""Fine-tuning by LoRA adapters, plainly; under ZeRO see test_zero_features.py."""

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from charm_core.errors import ArtifactError, TrainingError
from charm_core.reward_model import training
from charm_core.reward_model.checkpoints import load_checkpoint
from charm_core.reward_model.jobs import TrainingJob
from charm_core.reward_model.loading import load_reward_model
from charm_core.reward_model.ranks import Rank
from charm_core.reward_model.spec import RewardModelSpec, TrainingConfig
from charm_core.reward_model.training import train
from charm_core.reward_model.workdir import checkpoint_steps, read_curve
from tests.charm_core.reward_model.kinds import save_adapter, save_causal, save_value_head
from tests.charm_core.reward_model.tiny import held_out_margin, pairs_table, save_model

HERE = Rank(number=0, world_size=1, device=torch.device("cpu"))
LORA = {
    "zero_stage": None,
    "lora_rank": 4,
    "learning_rate": 3e-3,
    "pairs_per_step": 8,
    "micro_batch_tokens": 150,
    "checkpoint_every_steps": 2,
}
HEADS = {"qwen3": "score.", "bert": "classifier.", "value_head": "v_head.", "lora": "score."}


def full_disk(*_):
    raise ArtifactError("no space left")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        "qwen3": save_model(root / "qwen3"),
        "bert": save_model(root / "bert", "bert"),
        "value_head": save_value_head(root / "grm"),
        "lora": save_adapter(root / "lora", save_causal(root / "base")),
    }


@pytest.fixture
def job_of(folders, tmp_path):
    def make(kind="qwen3", name="run", **changes):
        pairs_table().write_parquet(tmp_path / "pairs.parquet")
        return TrainingJob(
            model=RewardModelSpec(path=str(folders[kind]), max_length=64),
            pairs_path=tmp_path / "pairs.parquet",
            output_dir=tmp_path / f"{name}-model",
            work_dir=tmp_path / f"{name}-work",
            config=TrainingConfig(**(LORA | changes)),
        )

    return make


def losses(job):
    return [record["loss"] for record in read_curve(job.work_dir) if record["step"] > 0]


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def changed(before, after):
    """Names of the weights that differ; a language model's head beside that of a reward model is not saved."""
    assert before.keys() - {"lm_head.weight"} == after.keys()
    return {name for name in after if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("kind", HEADS)
def test_the_saved_model_is_merged_plain_and_scores_as_the_trained_network(job_of, kind):
    job = job_of(kind, epochs=3)
    outcome = train(job, HERE)
    assert outcome.evaluation_before != outcome.evaluation_after
    assert held_out_margin(outcome.model_dir, job) == pytest.approx(outcome.evaluation_after["margin_mean"], abs=1e-5)
    saved = weights(outcome.model_dir)
    assert not [name for name in saved if "lora" in name or "base_layer" in name]
    assert not list(outcome.model_dir.glob("adapter*"))
    expected = {"lora": "classifier", "qwen3": "classifier", "bert": "classifier"}.get(kind, kind)
    assert load_reward_model(job.model.saved_at(str(outcome.model_dir))).spec.kind == expected


@pytest.mark.parametrize("kind", ["qwen3", "bert", "value_head"])
def test_the_linear_layers_and_the_head_are_trained_and_nothing_else(job_of, kind):
    job = job_of(kind)
    outcome = train(job, HERE)
    found = changed(weights(job.model.path), weights(outcome.model_dir))
    head = {name for name in found if name.startswith(HEADS[kind])}
    assert head == {name for name in weights(job.model.path) if name.startswith(HEADS[kind])}
    body = found - head
    assert body
    assert all(name.endswith("weight") and ".layer" in name and "norm" not in name.lower() for name in body)
    linear = {name for name, tensor in weights(job.model.path).items() if ".layer" in name and tensor.ndim == 2}
    assert body == linear


def test_an_adapter_changes_no_score_before_it_is_trained(job_of):
    adapted, full = job_of(name="adapted"), job_of(name="full", lora_rank=None)
    train(adapted, HERE)
    train(full, HERE)
    assert losses(adapted)[0] == pytest.approx(losses(full)[0], abs=1e-6)
    assert losses(adapted)[-1] != pytest.approx(losses(full)[-1], abs=1e-3)


def test_the_trained_difference_has_the_rank_of_the_adapter(job_of):
    job = job_of(lora_rank=2, epochs=3)
    outcome = train(job, HERE)
    name = "model.layers.0.mlp.up_proj.weight"
    difference = weights(outcome.model_dir)[name] - weights(job.model.path)[name]
    singular = torch.linalg.svdvals(difference.double())
    assert singular[1] > 1e-3 * singular[0]
    assert singular[2] < 1e-4 * singular[0]


def test_layers_and_targets_can_be_chosen(job_of):
    job = job_of(lora_targets=("q_proj", "down_proj"), trainable_layers=1)
    outcome = train(job, HERE)
    assert changed(weights(job.model.path), weights(outcome.model_dir)) == {
        "score.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
    }
    with pytest.raises(TrainingError, match=r"lora_targets names 'query', which is no linear layer.*q_proj"):
        train(job_of(name="other", lora_targets=("q_proj", "query")), HERE)


def test_recomputing_activations_does_not_change_the_curve(job_of):
    plain, again = job_of(name="plain"), job_of(name="again", gradient_checkpointing=True)
    train(plain, HERE)
    train(again, HERE)
    assert losses(again) == pytest.approx(losses(plain), abs=1e-5)


def test_checkpoints_hold_what_is_trained_and_lead_to_the_same_model(job_of, monkeypatch):
    whole, job = job_of(name="whole"), job_of(name="cut")
    train(whole, HERE)

    with monkeypatch.context() as patch:
        patch.setattr(training, "save_model", full_disk)
        with pytest.raises(ArtifactError, match="no space"):
            train(job, HERE)
    last = checkpoint_steps(job.work_dir)[-1]
    names = {name for name, _ in load_checkpoint(job.work_dir, last)}
    assert "classifier.score.weight" in names
    assert all("lora_" in name for name in names - {"classifier.score.weight"})
    assert len(names) == 1 + 2 * 7 * 2

    train(job, HERE)
    assert read_curve(job.work_dir) == read_curve(whole.work_dir)
    assert (job.output_dir / "model.safetensors").read_bytes() == (whole.output_dir / "model.safetensors").read_bytes()


def test_the_first_weights_of_an_adapter_depend_on_the_seed_alone(job_of):
    jobs = [job_of(name=name, seed=seed, epochs=0.2) for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    for job in jobs:
        torch.rand(7)
        train(job, HERE)
    first, same, other = ((job.output_dir / "model.safetensors").read_bytes() for job in jobs)
    assert first == same != other


@pytest.mark.parametrize("settings", [{"lora_alpha": 8}, {"lora_targets": ("q_proj",)}])
def test_settings_of_adapters_need_a_rank(settings):
    with pytest.raises(ValidationError, match="need lora_rank"):
        TrainingConfig(**settings)
