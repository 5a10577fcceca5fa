"""ZeRO-3 for real: two CPU ranks, launched as in production."""

import random
import shutil

import pytest
import torch

from charm_core.errors import WorkerLostError
from charm_core.reward_model.jobs import TrainingJob
from charm_core.reward_model.ranks import Rank
from charm_core.reward_model.spec import RewardModelSpec, TrainingConfig
from charm_core.reward_model.training import train
from charm_core.reward_model.workdir import checkpoint_steps, read_curve
from tasks.training_launch import run_training
from tests.charm_core.reward_model.killing import kill_a_rank_at
from tests.charm_core.reward_model.tiny import pairs_table, save_model

STEPS = 36
KEYS = ("loss", "accuracy", "margin_mean", "score_mean", "gradient_norm", "learning_rate", "pairs", "tokens")


@pytest.fixture(scope="module")
def job_of(tmp_path_factory):
    root = tmp_path_factory.mktemp("zero")
    # 7 training prompts of 3 pairs, 2 prompts a step: the last step of an epoch has one prompt, hence one idle rank.
    pairs_table(prompts=9, held_out=2).write_parquet(root / "pairs.parquet")
    models = {name: save_model(root / name, name) for name in ("qwen3", "bert")}

    def make(name, *, architecture="qwen3", **changes):
        settings = {
            "zero_stage": 3,
            "threads_per_rank": 1,
            "ranks": 2,
            "learning_rate": 1e-3,
            "epochs": 9,
            "pairs_per_step": 6,
            "micro_batch_tokens": 40,
            "checkpoint_every_steps": 5,
        }
        return TrainingJob(
            model=RewardModelSpec(path=str(models[architecture]), max_length=64),
            pairs_path=root / "pairs.parquet",
            output_dir=root / f"{name}-model",
            work_dir=root / f"{name}-work",
            config=TrainingConfig(**(settings | changes)),
        )

    return make


def plain(job):
    settings = {"zero_stage": None, "ranks": "auto"}
    return job.model_copy(
        update={
            "config": job.config.model_copy(update=settings),
            "output_dir": job.output_dir.with_name(f"{job.output_dir.name}-plain"),
            "work_dir": job.work_dir.with_name(f"{job.work_dir.name}-plain"),
        }
    )


def train_here(job):
    train(job, Rank(number=0, world_size=1, device=torch.device("cpu")))
    return read_curve(job.work_dir)


def weights(job):
    return (job.output_dir / "model.safetensors").read_bytes()


def assert_same_curve(found, expected, tolerance):
    assert [record["step"] for record in found] == [record["step"] for record in expected]
    for key in KEYS:
        assert [r.get(key) for r in found[1:]] == pytest.approx(
            [r.get(key) for r in expected[1:]], rel=tolerance, abs=tolerance
        )
    assert found[0] == pytest.approx(expected[0], abs=tolerance)


@pytest.fixture(scope="module")
def uninterrupted(job_of):
    """The ZeRO-3 run that others are compared with."""
    job = job_of("whole")
    outcome = run_training(job)
    assert (outcome.ranks, outcome.steps) == (2, STEPS)
    return job


def test_two_zero_3_ranks_give_the_curve_of_plain_training(uninterrupted):
    assert_same_curve(read_curve(uninterrupted.work_dir), train_here(plain(uninterrupted)), 2e-4)
    first = [record["loss"] for record in read_curve(uninterrupted.work_dir)[1:11]]
    assert first == pytest.approx(
        [record["loss"] for record in read_curve(plain(uninterrupted).work_dir)[1:11]], abs=3e-6
    )


def test_an_encoder_and_margin_regression_too(job_of):
    job = job_of("bert", architecture="bert", objective="margin_regression", anchor=0.1, epochs=2)
    run_training(job)
    assert_same_curve(read_curve(job.work_dir), train_here(plain(job)), 1e-4)


def test_a_killed_run_goes_on_to_the_same_curve_and_weights_on_any_number_of_ranks(job_of, uninterrupted):
    killed_at = random.Random(7).randint(6, 20)
    job = job_of("killed")
    seen = []
    with pytest.raises(WorkerLostError, match="ended by signal 9"):
        run_training(job, kill_a_rank_at(killed_at, rank=1))
    last = checkpoint_steps(job.work_dir)[-1]
    assert 5 <= last < STEPS
    assert len(checkpoint_steps(job.work_dir)) <= 2
    assert not job.output_dir.exists()
    shutil.copytree(job.work_dir, plain(job).work_dir)

    run_training(job, seen.append)
    assert [record["step"] for record in seen] == list(range(STEPS + 1))
    assert read_curve(job.work_dir) == read_curve(uninterrupted.work_dir)
    assert weights(job) == weights(uninterrupted)

    assert_same_curve(train_here(plain(job)), read_curve(uninterrupted.work_dir), 2e-4)


def test_a_run_with_weights_that_ranks_share_unevenly_goes_on_too(job_of):
    """A BERT head's bias is one number, of which one of two ranks has nothing."""
    whole = job_of("uneven", architecture="bert", epochs=3)
    job = job_of("uneven-killed", architecture="bert", epochs=3)
    run_training(whole)
    with pytest.raises(WorkerLostError):
        run_training(job, kill_a_rank_at(8, rank=0))
    assert checkpoint_steps(job.work_dir)
    run_training(job)
    assert read_curve(job.work_dir) == read_curve(whole.work_dir)
    assert weights(job) == weights(whole)


def test_plain_training_killed_with_minus_9_goes_on_to_the_same_weights(job_of):
    whole = job_of("plain-whole", zero_stage=None, ranks="auto", epochs=12)
    job = job_of("plain-killed", zero_stage=None, ranks="auto", epochs=12)
    run_training(whole)
    with pytest.raises(WorkerLostError, match="run again: finished steps are kept"):
        run_training(job, kill_a_rank_at(random.Random(8).randint(6, 15), rank=0))
    assert checkpoint_steps(job.work_dir)
    run_training(job)
    assert read_curve(job.work_dir) == read_curve(whole.work_dir)
    assert weights(job) == weights(whole)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_other_stages_train_and_resume_alike(job_of, uninterrupted, stage):
    job = job_of(f"stage{stage}", zero_stage=stage)
    with pytest.raises(WorkerLostError):
        run_training(job, kill_a_rank_at(9, rank=0))
    run_training(job)
    assert_same_curve(read_curve(job.work_dir), read_curve(uninterrupted.work_dir), 2e-4)


@pytest.mark.slow
def test_state_kept_on_disk_trains_and_resumes_alike(job_of, tmp_path):
    """Without a GPU the optimiser's state alone; smaller models than this DeepSpeed keeps in memory whatever is asked for."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible():
        pytest.skip("libaio-dev is not installed")
    shape = {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 64, "num_attention_heads": 8}
    model = RewardModelSpec(path=str(save_model(tmp_path / "wide", "qwen3", **shape)), max_length=64)
    disk = tmp_path / "disk"
    settings = {"epochs": 2, "learning_rate": 1e-5}
    expected = job_of("in-memory", **settings).model_copy(update={"model": model})
    job = job_of("on-disk", **settings, offload="nvme", nvme_path=str(disk)).model_copy(update={"model": model})
    swapped = []

    def look_and_kill(record):
        swapped.append(sum(file.stat().st_size for file in disk.rglob("*.swp")))
        kill(record)

    kill = kill_a_rank_at(7, rank=1)
    run_training(expected)
    with pytest.raises(WorkerLostError):
        run_training(job, look_and_kill)
    assert swapped[-1] > 10_000_000
    assert checkpoint_steps(job.work_dir)
    run_training(job)
    assert_same_curve(read_curve(job.work_dir), read_curve(expected.work_dir), 2e-5)
    assert list(disk.iterdir()) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_checkpointing": True},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"lora_rank": 4}, marks=pytest.mark.slow),
    ],
)
def test_bfloat16_arithmetic_is_that_of_plain_training(job_of, uninterrupted, changes):
    """As on a GPU: float32 weights under ZeRO-3, layers in bfloat16 by autocast, which DeepSpeed must leave on."""
    job = job_of("-".join(["bfloat16", *changes]), dtype="bfloat16", epochs=2, **changes)
    run_training(job)
    found, expected = read_curve(job.work_dir), train_here(plain(job))
    assert_same_curve(found, expected, 2e-4)
    exact = read_curve(uninterrupted.work_dir)
    assert abs(found[1]["loss"] - exact[1]["loss"]) > 1e-4, "it computes in float32"
