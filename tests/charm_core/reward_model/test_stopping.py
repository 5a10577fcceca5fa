"""Early stopping, the best evaluation and collapsing scores, plainly; under ZeRO see test_zero_features.py."""

import logging

import polars as pl
import pytest
import torch
from pydantic import ValidationError

from charm_core.errors import ArtifactError, ConfigError, TrainingError
from charm_core.reward_model import training
from charm_core.reward_model.jobs import TrainingJob
from charm_core.reward_model.ranks import Rank
from charm_core.reward_model.spec import RewardModelSpec, TrainingConfig
from charm_core.reward_model.stopping import (
    best_evaluation,
    bests_to_return_to,
    collapse,
    is_out_of_patience,
    spread_left,
)
from charm_core.reward_model.training import train
from charm_core.reward_model.workdir import best_steps, checkpoint_steps, read_curve
from tests.charm_core.reward_model.tiny import held_out_margin, pairs_table, save_model

HERE = Rank(number=0, world_size=1, device=torch.device("cpu"))
PLAIN = {
    "zero_stage": None,
    "learning_rate": 3e-3,
    "pairs_per_step": 8,
    "micro_batch_tokens": 150,
    "checkpoint_every_steps": 3,
}


def curve_of(*evaluated, every=2, **others):
    """Evaluations every so many steps, from before the first, with steps between."""
    curve = [{"step": step, "loss": 1.0} for step in range(every * (len(evaluated) - 1) + 1)]
    for number, loss in enumerate(evaluated):
        curve[every * number] |= {"eval_loss": loss, "eval_accuracy": loss, "eval_score_spread": loss}
    return curve


def test_the_best_evaluation_is_the_first_of_equal_ones():
    curve = curve_of(0.9, 0.7, 0.7, 0.8)
    assert best_evaluation(curve, "eval_loss")["step"] == 2
    assert best_evaluation(curve, "eval_accuracy")["step"] == 0


def test_patience_counts_evaluations_without_a_new_best():
    config = TrainingConfig(early_stopping_patience=2, evaluate_every_steps=2)
    assert not is_out_of_patience(curve_of(0.9, 0.7, 0.8), config)
    assert is_out_of_patience(curve_of(0.9, 0.7, 0.8, 0.7), config)
    assert not is_out_of_patience(curve_of(0.9, 0.7, 0.8, 0.6), config)
    assert is_out_of_patience(curve_of(0.9, 1.0, 1.0), config)
    assert not is_out_of_patience(curve_of(0.9, 1.0, 1.0), TrainingConfig())


def test_a_checkpoint_leads_back_to_what_was_best_up_to_it():
    curve = curve_of(0.9, 0.7, 0.8, 0.6)
    assert bests_to_return_to(curve, [1, 5], "eval_loss") == {0, 2}
    assert bests_to_return_to(curve, [6], "eval_loss") == {6}
    assert bests_to_return_to(curve[1:], [1], "eval_loss") == set()


def test_a_collapse_is_a_spread_below_a_share_of_that_before_training():
    config = TrainingConfig(score_spread_floor=0.2)
    assert spread_left(curve_of(2.0, 0.1, 0.5)) == 0.25
    assert collapse(0.25, 4, config) is None
    assert "is 0.190 of that before training" in collapse(0.19, 4, config)
    assert collapse(0.0, 4, config.model_copy(update={"score_spread_floor": 0.0})) is None
    # nothing to lose, and a curve begun by an earlier version
    assert spread_left(curve_of(0.0, 0.1)) == 1
    assert spread_left([{"step": 0, "eval_loss": 1.0}]) == 1


def full_disk(*_):
    raise ArtifactError("no space left")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "qwen3")


@pytest.fixture
def job_of(model, tmp_path):
    def make(name="run", *, pairs=None, **changes):
        (pairs_table() if pairs is None else pairs).write_parquet(tmp_path / f"{name}.parquet")
        return TrainingJob(
            model=RewardModelSpec(path=str(model), max_length=64),
            pairs_path=tmp_path / f"{name}.parquet",
            output_dir=tmp_path / f"{name}-model",
            work_dir=tmp_path / f"{name}-work",
            config=TrainingConfig(**(PLAIN | changes)),
        )

    return make


def evaluated(job):
    return {record["step"]: record for record in read_curve(job.work_dir) if "eval_loss" in record}


def model_bytes(job):
    return (job.output_dir / "model.safetensors").read_bytes()


def test_training_stops_when_patience_is_over_and_keeps_the_best(job_of):
    """Few training pairs and a high learning rate: the held-out loss falls, then rises."""
    settings = {"epochs": 8, "evaluate_every_steps": 2, "learning_rate": 1e-3, "best_metric": "eval_accuracy"}
    job = job_of(**settings, early_stopping_patience=3, keep="best")
    outcome = train(job, HERE)
    found = evaluated(job)
    best = min(found, key=lambda step: (-found[step]["eval_accuracy"], step))
    assert 0 < best < outcome.steps < 40
    assert outcome.steps == max(found) == best + 3 * 2
    assert (outcome.stopped_early, outcome.saved_step) == (True, best)
    assert outcome.evaluation_after["accuracy"] == found[best]["eval_accuracy"]
    assert outcome.tokens_trained == sum(record["tokens"] for record in read_curve(job.work_dir)[1:])

    # the saved model is the one that was evaluated: the same training without an end, saved at that step
    last = job_of("last", **settings)
    assert not train(last, HERE).stopped_early
    assert read_curve(last.work_dir)[: outcome.steps + 1] == read_curve(job.work_dir)
    again = job_of("again", **settings, keep="best")
    assert train(again, HERE).saved_step in (best, *range(outcome.steps + 1, 41))
    assert model_bytes(last) != model_bytes(job)


def test_the_saved_model_scores_as_the_best_evaluation_did(job_of):
    for keep in ("last", "best"):
        job = job_of(keep, epochs=4, evaluate_every_steps=2, learning_rate=1e-3, keep=keep, best_metric="eval_accuracy")
        outcome = train(job, HERE)
        expected = evaluated(job)[outcome.saved_step]["eval_margin_mean"]
        assert held_out_margin(outcome.model_dir, job) == pytest.approx(expected, abs=1e-5)
        assert (outcome.saved_step == outcome.steps) == (keep == "last")


def test_an_untouched_model_that_is_best_is_saved_untouched(job_of):
    pairs = pairs_table(held_out=0)
    sides = {"chosen": "rejected", "chosen_model": "rejected_model"}
    opposite = pairs.rename(sides | {new: old for old, new in sides.items()}).select(pairs.columns)
    opposite = opposite.with_columns(split=pl.lit("held_out"), prompt_id="opposite of " + pl.col("prompt_id"))
    job = job_of(pairs=pl.concat([pairs, opposite]), epochs=2, keep="best")
    outcome = train(job, HERE)
    assert outcome.saved_step == 0
    assert outcome.evaluation_after == outcome.evaluation_before
    untouched = job_of("untouched", learning_rate=0.0, weight_decay=0.0)
    train(untouched, HERE)
    assert model_bytes(job) == model_bytes(untouched)


def test_a_run_that_goes_on_from_a_checkpoint_stops_and_saves_alike(job_of, monkeypatch):
    settings = {
        "epochs": 8,
        "evaluate_every_steps": 2,
        "learning_rate": 1e-3,
        "best_metric": "eval_accuracy",
        "early_stopping_patience": 3,
        "keep": "best",
    }
    whole, job = job_of("whole", **settings), job_of("cut", **settings)
    outcome = train(whole, HERE)

    with monkeypatch.context() as patch:
        patch.setattr(training, "save_model", full_disk)
        with pytest.raises(ArtifactError, match="no space"):
            train(job, HERE)
    assert checkpoint_steps(job.work_dir)[-1] < outcome.steps
    assert set(best_steps(job.work_dir)) >= {outcome.saved_step}
    again = train(job, HERE)
    assert again == outcome.model_copy(update={"model_dir": job.output_dir})
    assert read_curve(job.work_dir) == read_curve(whole.work_dir)
    assert model_bytes(job) == model_bytes(whole)
    assert not (job.work_dir / "checkpoints").exists()


CLOSE = {"objective": "margin_regression", "margin_scale": 0.3, "learning_rate": 1e-2, "epochs": 20}


def close_pairs():
    """Calibrated scores that are all but equal: learning them makes the scores so."""
    return pairs_table().with_columns(chosen_calibrated=pl.lit(0.001), rejected_calibrated=pl.lit(0.0))


def test_scores_that_collapse_are_told(job_of, caplog):
    with caplog.at_level(logging.WARNING):
        outcome = train(job_of(pairs=close_pairs(), **CLOSE, score_spread_floor=0.5), HERE)
    assert outcome.evaluation_after["score_spread"] < 0.5 * outcome.evaluation_before["score_spread"]
    assert [r.message for r in caplog.records if "score_spread_floor=0.5" in r.message]


def test_scores_that_collapse_stop_training_if_asked(job_of):
    job = job_of(
        pairs=close_pairs(), **CLOSE, score_spread_floor=0.5, below_spread_floor="stop", evaluate_every_steps=5
    )
    with pytest.raises(TrainingError, match=r"score spread on held-out pairs at step \d+ is 0\.\d+ of that before"):
        train(job, HERE)
    assert not job.output_dir.exists()
    assert len(read_curve(job.work_dir)) < 101


def test_the_spread_is_that_within_prompts(job_of):
    job = job_of(epochs=0.2)
    outcome = train(job, HERE)
    assert held_out_margin(job.model.path, job) == pytest.approx(outcome.evaluation_before["margin_mean"], abs=1e-5)
    assert outcome.evaluation_before["score_spread"] > abs(outcome.evaluation_before["margin_mean"]) / 2**0.5


@pytest.mark.parametrize(
    "settings",
    [
        {"keep": "best"},
        {"early_stopping_patience": 1, "evaluate_every_steps": 1},
        {"below_spread_floor": "stop"},
    ],
)
def test_what_looks_at_evaluations_needs_held_out_pairs(job_of, settings):
    with pytest.raises(ConfigError, match="needs held-out pairs"):
        train(job_of(pairs=pairs_table(held_out=0), **settings), HERE)


def test_patience_needs_evaluations():
    with pytest.raises(ValidationError, match="set evaluate_every_steps too"):
        TrainingConfig(early_stopping_patience=2)
