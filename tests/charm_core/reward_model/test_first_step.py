"""Whether training finds the scores that scoring gave."""

import logging
import math

import polars as pl
import pytest
import torch

from charm_core.errors import TrainingError
from charm_core.reward_model.jobs import TrainingJob
from charm_core.reward_model.ranks import Rank
from charm_core.reward_model.scoring import score_responses
from charm_core.reward_model.spec import RewardModelSpec, TrainingConfig
from charm_core.reward_model.training import train
from charm_core.reward_model.workdir import read_curve
from tests.charm_core.reward_model.tiny import CHAT_TEMPLATE, pairs_table, save_model

HERE = Rank(number=0, world_size=1, device=torch.device("cpu"))
NOTED = "arithmetic explains a difference"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {seed: save_model(root / str(seed), seed=seed) for seed in (0, 1)} | {"bert": save_model(root / "b", "bert")}


def scored(pairs, spec, offset=0.0):
    """The same pairs with raw scores by a reward model, in the order of the calibrated ones as before."""
    sides = [
        pairs.select(
            "prompt_id", policy_model=f"{side}_model", response=pl.col(side).list.first().struct.field("content")
        )
        for side in ("chosen", "rejected")
    ]
    prompts = pairs.unique("prompt_id").select("prompt_id", prompt_set=pl.lit("x"), messages="prompt")
    scores = score_responses(spec, prompts, pl.concat(sides).unique()).scores
    for side in ("chosen", "rejected"):
        renamed = scores.select("prompt_id", pl.col("policy_model").alias(f"{side}_model"), s=pl.col("score") + offset)
        pairs = pairs.join(renamed, on=["prompt_id", f"{side}_model"]).with_columns(s=pl.col("s").cast(pl.Float64))
        pairs = pairs.drop(f"{side}_score").rename({"s": f"{side}_score"})
    return pairs.select(pairs_table(1).columns)


@pytest.fixture
def job_of(models, tmp_path):
    def make(pairs, model=0, spec=(), **changes):
        pairs.write_parquet(tmp_path / "pairs.parquet")
        settings = {"zero_stage": None, "epochs": 0.5, "pairs_per_step": 8, "micro_batch_tokens": 60} | changes
        return TrainingJob(
            model=RewardModelSpec(path=str(models[model]), max_length=64, **dict(spec)),
            pairs_path=tmp_path / "pairs.parquet",
            output_dir=tmp_path / "model",
            work_dir=tmp_path / "work",
            config=TrainingConfig(**settings),
        )

    return make


@pytest.mark.parametrize("model", [0, "bert"])
@pytest.mark.parametrize("objective", ["bradley_terry", "margin_regression"])
def test_the_models_own_scores_are_found_and_predict_the_first_loss(job_of, models, caplog, model, objective):
    pairs = scored(pairs_table(), RewardModelSpec(path=str(models[model]), max_length=64))
    with caplog.at_level(logging.WARNING):
        outcome = train(job_of(pairs, model, raw_scores_of="this_model", objective=objective), HERE)
    assert outcome.score_difference < 1e-5
    assert outcome.first_loss_predicted == pytest.approx(outcome.first_loss, rel=1e-5)
    assert abs(outcome.first_loss - math.log(2)) > 1e-3
    first, second = read_curve(job_of(pairs, model).work_dir)[1:3]
    assert first["score_difference"] == outcome.score_difference
    assert "score_difference" not in second
    assert not [record for record in caplog.records if NOTED in record.message]


@pytest.mark.parametrize(
    ("model", "spec"),
    [
        (1, {}),
        (0, {"chat_template": "{{ '<bos>' }}" + CHAT_TEMPLATE}),
        (0, {"system_prompt": "w1"}),
        (0, {"max_length": 9}),
    ],
    ids=["another model", "doubled BOS", "system prompt", "cut texts"],
)
def test_what_scoring_did_otherwise_is_an_error_where_the_scores_are_said_to_be_this_models(
    job_of, models, model, spec
):
    pairs = scored(pairs_table(), RewardModelSpec(path=str(models[0]), max_length=64))
    job = job_of(pairs, model, raw_scores_of="this_model")
    job = job.model_copy(update={"model": job.model.model_copy(update=spec)})
    with pytest.raises(TrainingError, match=r"before training the reward model gives .* where the pairs table has"):
        train(job, HERE)
    assert not job.output_dir.exists()


def test_it_is_a_warning_and_a_number_where_nothing_is_said(job_of, models, caplog):
    pairs = scored(pairs_table(), RewardModelSpec(path=str(models[0]), max_length=64), offset=0.5)
    with caplog.at_level(logging.WARNING):
        outcome = train(job_of(pairs), HERE)
    assert outcome.score_difference == pytest.approx(0.5, abs=1e-5)
    # only differences matter to Bradley-Terry
    assert outcome.first_loss_predicted == pytest.approx(outcome.first_loss, rel=1e-5)
    assert len([record for record in caplog.records if NOTED in record.message]) == 1


def test_scores_said_to_be_another_models_are_only_a_number(job_of, caplog):
    with caplog.at_level(logging.WARNING):
        outcome = train(job_of(pairs_table(), raw_scores_of="another_model"), HERE)
    assert outcome.score_difference > 0.1
    assert not [record for record in caplog.records if NOTED in record.message]


def test_lower_precision_is_no_disagreement(job_of, models, caplog):
    pairs = scored(pairs_table(), RewardModelSpec(path=str(models[0]), max_length=64))
    with caplog.at_level(logging.WARNING):
        outcome = train(job_of(pairs, dtype="bfloat16", raw_scores_of="this_model"), HERE)
    assert outcome.score_difference > 1e-4
    assert not [record for record in caplog.records if NOTED in record.message]


def test_adapters_change_nothing_before_they_are_trained(job_of, models):
    pairs = scored(pairs_table(), RewardModelSpec(path=str(models[0]), max_length=64))
    assert train(job_of(pairs, lora_rank=4, raw_scores_of="this_model"), HERE).score_difference < 1e-5
