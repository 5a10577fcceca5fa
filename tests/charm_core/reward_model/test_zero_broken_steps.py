"""A gradient that is NaN or infinite under ZeRO: the step is refused, what it belongs to is kept, and no weight is touched."""

import math
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from unittest.mock import patch

import polars as pl
import pytest
import torch

from charm_core.errors import TrainingError
from charm_core.reward_model.jobs import TrainingJob
from charm_core.reward_model.loading import load_reward_model
from charm_core.reward_model.plan import plan_steps, prepare
from charm_core.reward_model.ranks import Rank
from charm_core.reward_model.spec import RewardModelSpec, TrainingConfig
from charm_core.reward_model.workdir import broken_file, read_curve
from tests.charm_core.reward_model.tiny import pairs_table, save_model

HERE = Rank(number=0, world_size=1, device=torch.device("cpu"))
BROKEN_STEP = 2
PARAMETER = "norm.weight"
"""A vector: what AdamW's groups of matrices and of the head get stays finite."""
STAGES = [
    pytest.param(stage, offload, id=f"{stage}-{offload}")
    for stage, offload in ((0, "none"), (1, "none"), (2, "none"), (3, "none"), (2, "cpu"), (3, "cpu"))
]


@dataclass(frozen=True)
class Ended:
    """How a training ended, and by how much the weights in memory were changed in its last step."""

    message: str | None
    moved: dict[str, float]


def join_group(folder: str) -> None:
    """Make the process that calls this the only rank of a group, as the worker does it."""
    from charm_core.reward_model.worker import _join_group

    os.environ |= {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=0, world_size=1)
    _join_group("gloo")


def train_with_a_broken_gradient(job: TrainingJob, factor: float) -> Ended:
    """Train until the gradient of one parameter is multiplied by something, in one step alone."""
    from charm_core.reward_model import training
    from charm_core.reward_model.engines import ZeroEngine

    class Breaking(ZeroEngine):
        steps = 0
        before: dict[str, torch.Tensor]

        def __init__(self, network, config, world_size):
            network.transformer.get_parameter(f"model.{PARAMETER}").register_hook(self.broken)
            super().__init__(network, config, world_size)
            engines.append(self)

        def broken(self, gradient):
            return gradient * factor if self.steps == BROKEN_STEP - 1 else gradient

        def step(self, rate_factor):
            self.before = self.weights()
            norm = super().step(rate_factor)
            self.steps += 1
            return norm

        def weights(self):
            return {name: tensor.clone() for name, _, tensor in self.state(moments=False)}

    engines: list[Breaking] = []
    message = None
    with patch.object(training, "ZeroEngine", Breaking):
        try:
            training.train(job, HERE)
        except TrainingError as error:
            message = str(error)
    (engine,) = engines
    after = engine.weights()
    return Ended(message, {name: float((after[name] - old).abs().max()) for name, old in engine.before.items()})


@pytest.fixture(scope="module")
def zero_process(tmp_path_factory):
    """One process for all: DeepSpeed leaves traces in the one that it runs in."""
    spawn = multiprocessing.get_context("spawn")
    folder = str(tmp_path_factory.mktemp("group"))
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=join_group, initargs=(folder,)) as pool:
        yield pool


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "qwen3")


@pytest.fixture
def ended(zero_process, model, tmp_path):
    def run(stage: int, offload: str, factor: float) -> tuple[TrainingJob, Ended]:
        pairs_table(prompts=9, held_out=2).write_parquet(tmp_path / "pairs.parquet")
        job = TrainingJob(
            model=RewardModelSpec(path=str(model), max_length=64),
            pairs_path=tmp_path / "pairs.parquet",
            output_dir=tmp_path / "model",
            work_dir=tmp_path / "work",
            config=TrainingConfig(
                zero_stage=stage,
                offload=offload,
                ranks=1,
                learning_rate=1e-3,
                pairs_per_step=6,
                micro_batch_tokens=40,
            ),
        )
        return job, zero_process.submit(train_with_a_broken_gradient, job, factor).result(timeout=300)

    return run


def made_of(job, number):
    """Prompts and pairs, by their rows in the table, of a training's step."""
    model = load_reward_model(job.model)
    data = prepare(pl.read_parquet(job.pairs_path), model.tokenizer, model.spec)
    groups = plan_steps(data.train, job.config, data.lengths)[number - 1]
    return sorted(group.prompt_id for group in groups), sorted(row for group in groups for row in group.rows)


@pytest.mark.parametrize("factor", [math.nan, math.inf])
@pytest.mark.parametrize(("stage", "offload"), STAGES)
def test_a_gradient_that_is_not_finite_is_refused(ended, stage, offload, factor):
    job, end = ended(stage, offload, factor)
    assert end.message is not None, "training went on"
    prompts, pairs = made_of(job, BROKEN_STEP)
    file = broken_file(job.work_dir, BROKEN_STEP)
    told = f"the gradient of step {BROKEN_STEP} is NaN or infinite; its 1 prompts are {', '.join(prompts)}. Token ids,"
    assert end.message.startswith(told)
    assert f" are in {file}: look at them" in end.message
    kept = pl.read_parquet(file)
    assert sorted(kept["pair"]) == pairs
    assert set(kept["prompt_id"]) == set(prompts)
    assert kept["loss"].is_finite().all()
    assert set(end.moved.values()) == {0.0}
    assert [record["step"] for record in read_curve(job.work_dir)] == [0, 1]
    assert not job.output_dir.exists()


@pytest.mark.parametrize(("stage", "offload"), STAGES)
def test_a_step_without_it_moves_every_weight(ended, stage, offload):
    """Otherwise the other test would find untouched weights whatever the engine did."""
    job, end = ended(stage, offload, 1.0)
    assert end.message is None
    assert len(end.moved) == len(list(load_reward_model(job.model).network.named_parameters()))
    assert min(end.moved.values()) > 0
