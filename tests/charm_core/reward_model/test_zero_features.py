"""What training can do besides, under ZeRO on two CPU ranks, launched as in production."""

import random
from pathlib import Path

import polars as pl
import pytest
import torch
from safetensors.torch import load_file

from charm_core.errors import TrainingError, WorkerLostError
from charm_core.reward_model.checkpoints import load_checkpoint
from charm_core.reward_model.jobs import TrainingJob
from charm_core.reward_model.ranks import Rank
from charm_core.reward_model.spec import RewardModelSpec, TrainingConfig
from charm_core.reward_model.training import train
from charm_core.reward_model.workdir import broken_file, checkpoint_steps, read_curve
from tasks.training_launch import run_training
from tests.charm_core.reward_model.killing import kill_a_rank_at
from tests.charm_core.reward_model.tiny import held_out_margin, pairs_table, save_model

HERE = Rank(number=0, world_size=1, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def job_of(tmp_path_factory):
    root = tmp_path_factory.mktemp("features")
    model = save_model(root / "qwen3")

    def make(name, *, pairs=None, **changes):
        table = pairs_table(prompts=9, held_out=2) if pairs is None else pairs
        table.write_parquet(root / f"{name}.parquet")
        settings = {
            "zero_stage": 3,
            "threads_per_rank": 1,
            "ranks": 2,
            "learning_rate": 1e-3,
            "epochs": 3,
            "pairs_per_step": 6,
            "micro_batch_tokens": 40,
            "checkpoint_every_steps": 5,
        }
        return TrainingJob(
            model=RewardModelSpec(path=str(model), max_length=64),
            pairs_path=root / f"{name}.parquet",
            output_dir=root / f"{name}-model",
            work_dir=root / f"{name}-work",
            config=TrainingConfig(**(settings | changes)),
        )

    return make


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def model_bytes(job):
    return (job.output_dir / "model.safetensors").read_bytes()


def losses(job):
    return [record["loss"] for record in read_curve(job.work_dir) if record["step"] > 0]


def assert_trained_as_plainly(job, plain, tolerance=1e-3):
    """The head is changed, saved and the same as after plain training; the saved model is the trained network."""
    outcome = run_training(job)
    train(plain, HERE)
    assert losses(job) == pytest.approx(losses(plain), abs=2e-4)
    before, after, expected = (weights(folder) for folder in (job.model.path, job.output_dir, plain.output_dir))
    assert before.keys() == after.keys() == expected.keys()
    assert (after["score.weight"] - before["score.weight"]).abs().max() > 10 * tolerance
    assert max(float((after[name] - expected[name]).abs().max()) for name in after) < tolerance
    assert held_out_margin(job.output_dir, job) == pytest.approx(outcome.evaluation_after["margin_mean"], abs=1e-5)


@pytest.mark.parametrize(
    ("stage", "rank"),
    [
        (3, 4),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((0, 4), (2, 4), (0, None), (2, None), (3, None))),
    ],
)
def test_the_head_is_trained_and_saved(job_of, stage, rank):
    kind = "full" if rank is None else "lora"
    settings = {"lora_rank": rank, "head_learning_rate": 5e-3}
    job = job_of(f"{kind}{stage}", zero_stage=stage, **settings)
    plain = job_of(f"{kind}{stage}-plain", zero_stage=None, ranks=1, **settings)
    assert_trained_as_plainly(job, plain)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "rank"), [(2, None), (3, None), (3, 4)])
def test_state_kept_in_main_memory_trains_and_resumes_alike(job_of, stage, rank):
    settings = {"zero_stage": stage, "lora_rank": rank, "epochs": 9, "learning_rate": 1e-4}
    expected = job_of(f"on-device-{stage}-{rank}", **settings)
    job = job_of(f"offloaded-{stage}-{rank}", **settings, offload="cpu")
    run_training(expected)
    with pytest.raises(WorkerLostError):
        run_training(job, kill_a_rank_at(11, rank=1))
    assert checkpoint_steps(job.work_dir)
    run_training(job)
    assert losses(job) == pytest.approx(losses(expected), abs=1e-5)
    ours, theirs = weights(job.output_dir), weights(expected.output_dir)
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 1e-4


@pytest.mark.parametrize("stage", [3, *(pytest.param(each, marks=pytest.mark.slow) for each in (0, 2))])
def test_training_stops_early_on_all_ranks_and_keeps_the_best(job_of, stage):
    """Few training pairs and a high learning rate: the held-out loss falls, then rises."""
    settings = {"epochs": 12, "evaluate_every_steps": 2, "early_stopping_patience": 3, "learning_rate": 3e-3}
    job = job_of(f"patient{stage}", zero_stage=stage, keep="best", **settings)
    plain = job_of(f"patient{stage}-plain", zero_stage=None, ranks=1, keep="best", **settings)
    outcome, expected = run_training(job), train(plain, HERE)
    assert outcome.stopped_early
    assert 0 < outcome.saved_step < outcome.steps
    assert (outcome.steps, outcome.saved_step) == (expected.steps, expected.saved_step)
    ours, theirs = weights(job.output_dir), weights(plain.output_dir)
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 1e-3


KEEP_BEST = {
    "lora_rank": 4,
    "epochs": 20,
    "evaluate_every_steps": 7,
    "keep": "best",
    "best_metric": "eval_accuracy",
    "early_stopping_patience": 13,
}


@pytest.mark.slow
def test_a_run_killed_three_times_gives_the_bytes_of_an_uninterrupted_one(job_of):
    whole, job = job_of("whole", **KEEP_BEST), job_of("killed", **KEEP_BEST)
    outcome = run_training(whole)
    draw = random.Random(6)
    for kill in range(3):
        with pytest.raises(WorkerLostError, match="ended by signal 9"):
            run_training(job, kill_a_rank_at(draw.randint(8, 14) + 16 * kill, rank=draw.randint(0, 1)))
        last = checkpoint_steps(job.work_dir)[-1]
        assert 0 < last < outcome.steps
    names = {name for name, _ in load_checkpoint(job.work_dir, last)}
    assert {name for name in names if "lora_" not in name} == {"classifier.score.weight"}
    assert run_training(job) == outcome.model_copy(update={"model_dir": job.output_dir})
    assert read_curve(job.work_dir) == read_curve(whole.work_dir)
    assert model_bytes(job) == model_bytes(whole)
    margin = {record["step"]: record for record in read_curve(job.work_dir)}[outcome.saved_step]["eval_margin_mean"]
    assert held_out_margin(job.output_dir, job) == pytest.approx(margin, abs=1e-5)


@pytest.mark.slow
def test_plain_training_killed_three_times_gives_the_bytes_of_an_uninterrupted_one(job_of):
    settings = {"zero_stage": None, "ranks": 1, "epochs": 40}
    whole, job = job_of("plain-whole", **settings), job_of("plain-killed", **settings)
    run_training(whole)
    draw = random.Random(5)
    for kill in range(3):
        with pytest.raises(WorkerLostError, match="signal 9"):
            run_training(job, kill_a_rank_at(draw.randint(8, 18) + 30 * kill, rank=0))
        assert checkpoint_steps(job.work_dir)
    run_training(job)
    assert read_curve(job.work_dir) == read_curve(whole.work_dir)
    assert model_bytes(job) == model_bytes(whole)


@pytest.mark.slow
def test_a_run_that_goes_on_from_one_rank_to_two_and_back_gives_the_same_within_a_millionth(job_of):
    settings = {"epochs": 12, "learning_rate": 3e-5}
    whole = job_of("one-rank", **settings, ranks=1)
    run_training(whole)
    moving = {ranks: job_of("moving", **settings, ranks=ranks) for ranks in (1, 2)}
    for ranks, step in ((1, 12), (2, 27)):
        with pytest.raises(WorkerLostError):
            run_training(moving[ranks], kill_a_rank_at(step, rank=0))
        assert checkpoint_steps(moving[ranks].work_dir)
    outcome = run_training(moving[1])
    assert (outcome.ranks, outcome.steps) == (1, 48)
    assert losses(moving[1]) == pytest.approx(losses(whole), abs=1e-6)
    ours, theirs = weights(moving[1].output_dir), weights(whole.output_dir)
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 1e-6


def test_a_broken_micro_batch_of_any_rank_stops_all_and_is_kept(job_of):
    infinite = pl.when(prompt_id="p005").then(1e200).otherwise(pl.col("chosen_calibrated"))
    pairs = pairs_table(prompts=9, held_out=2).with_columns(chosen_calibrated=infinite)
    job = job_of("broken", pairs=pairs, objective="margin_regression", margin_scale=1.0)
    with pytest.raises(TrainingError, match=r"is NaN or infinite; its 1 prompts are p005\. Token ids, .* are in "):
        run_training(job)
    (step,) = [len(losses(job)) + 1]
    kept = pl.read_parquet(broken_file(job.work_dir, step))
    assert kept["prompt_id"].to_list() == ["p005"] * 3
    assert not job.output_dir.exists()
