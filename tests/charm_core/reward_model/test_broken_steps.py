"""A loss or gradient that is NaN or infinite: what it belongs to is kept, and no weight is touched."""

import math

import polars as pl
import pytest
import torch

from charm_core.errors import TrainingError
from charm_core.reward_model.engines import PlainEngine
from charm_core.reward_model.jobs import TrainingJob
from charm_core.reward_model.loading import load_reward_model
from charm_core.reward_model.network import collate
from charm_core.reward_model.plan import prepare
from charm_core.reward_model.ranks import Rank
from charm_core.reward_model.spec import RewardModelSpec, TrainingConfig
from charm_core.reward_model.training import train
from charm_core.reward_model.workdir import broken_file, read_curve
from tests.charm_core.reward_model.tiny import pairs_table, save_model

HERE = Rank(number=0, world_size=1, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "qwen3")


@pytest.fixture
def job_of(model, tmp_path):
    def make(pairs, **changes):
        pairs.write_parquet(tmp_path / "pairs.parquet")
        settings = {"zero_stage": None, "pairs_per_step": 9, "micro_batch_tokens": 60, "learning_rate": 1e-3}
        return TrainingJob(
            model=RewardModelSpec(path=str(model), max_length=64),
            pairs_path=tmp_path / "pairs.parquet",
            output_dir=tmp_path / "model",
            work_dir=tmp_path / "work",
            config=TrainingConfig(**(settings | changes)),
        )

    return make


def with_infinite_margin(prompt_id):
    """float32 cannot hold it."""
    infinite = pl.when(prompt_id=prompt_id).then(1e200).otherwise(pl.col("chosen_calibrated"))
    return pairs_table().with_columns(chosen_calibrated=infinite)


REGRESSION = {"objective": "margin_regression", "margin_scale": 1.0}


def test_the_micro_batch_is_kept_with_its_tokens_scores_and_losses(job_of):
    job = job_of(with_infinite_margin("p007"), **REGRESSION, pairs_per_step=10**6, micro_batch_tokens=1)
    file = broken_file(job.work_dir, 1)
    with pytest.raises(TrainingError, match=rf"the loss of step 1 is NaN or infinite; its 1 prompts are p007.*{file}"):
        train(job, HERE)
    kept = pl.read_parquet(file)
    reward_model = load_reward_model(job.model)
    pairs = pl.read_parquet(job.pairs_path).filter(prompt_id="p007").sort("chosen_model", "rejected_model")
    assert kept.height == pairs.height == 3
    assert kept["loss"].to_list() == [math.inf] * 3
    data = prepare(pairs.with_columns(split=pl.lit("train")), reward_model.tokenizer, reward_model.spec)
    (group,) = data.train
    with torch.no_grad():
        scores = reward_model.network(
            **collate(data.texts, reward_model.pad_token_id, HERE.device, reward_model.network)
        )
    for row, (chosen, rejected) in zip(kept.rows(named=True), group.pairs, strict=True):
        assert row["chosen_token_ids"] == list(data.texts[group.texts[chosen]].input_ids)
        assert row["rejected_token_ids"] == list(data.texts[group.texts[rejected]].input_ids)
        assert row["chosen_score"] == pytest.approx(scores[chosen].item(), abs=1e-5)
        assert row["rejected_score"] == pytest.approx(scores[rejected].item(), abs=1e-5)


def test_the_other_micro_batches_of_the_step_are_not_kept(job_of):
    job = job_of(with_infinite_margin("p007"), **REGRESSION, pairs_per_step=10**6, micro_batch_tokens=80)
    with pytest.raises(TrainingError):
        train(job, HERE)
    prompts = set(pl.read_parquet(broken_file(job.work_dir, 1))["prompt_id"])
    assert "p007" in prompts
    assert len(prompts) < 9


def test_a_loss_on_held_out_pairs_stops_too(job_of):
    job = job_of(with_infinite_margin("p001"), **REGRESSION)
    with pytest.raises(TrainingError, match=r"the loss on held-out pairs after step 0 is NaN .* prompts are p00"):
        train(job, HERE)
    assert read_curve(job.work_dir) == []


def test_a_gradient_stops_with_all_pairs_of_its_step(job_of, monkeypatch):
    job = job_of(pairs_table())
    monkeypatch.setattr(PlainEngine, "step", lambda *_: math.nan)
    with pytest.raises(TrainingError, match=r"the gradient of step 1 is NaN or infinite; its 3 prompts"):
        train(job, HERE)
    kept = pl.read_parquet(broken_file(job.work_dir, 1))
    assert kept.height == 9
    assert kept["loss"].is_finite().all()


def test_a_gradient_that_is_not_finite_touches_no_weight(model):
    network = load_reward_model(RewardModelSpec(path=str(model), max_length=64)).network
    engine = PlainEngine(network, TrainingConfig(learning_rate=1.0))
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    loss = sum(parameter.sum() for parameter in network.parameters()) * math.inf
    engine.backward(loss, last=True)
    assert not math.isfinite(engine.step(1.0))
    assert all(torch.equal(parameter, before[name]) for name, parameter in network.named_parameters())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_what_was_kept_of_an_earlier_try_goes_when_training_begins_again(job_of):
    job = job_of(with_infinite_margin("p007"), **REGRESSION)
    with pytest.raises(TrainingError):
        train(job, HERE)
    (file,) = job.work_dir.glob("broken-step-*.parquet")
    pairs_table().write_parquet(job.pairs_path)
    (job.work_dir / "identity.json").unlink()
    train(job, HERE)
    assert not file.exists()
