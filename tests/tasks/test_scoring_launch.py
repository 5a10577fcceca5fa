"""Scoring with several processes: what one process gives, progress that adds up, and all of them end together."""

import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

import polars as pl
import psutil
import pytest

from charm_core.errors import ConfigError, WorkerLostError
from charm_core.reward_model.jobs import ScoringJob
from charm_core.reward_model.spec import RewardModelSpec
from tasks import scoring_launch
from tasks.scoring_launch import run_scoring
from tasks.scoring_settings import ScoringProcesses, ScoringSettings, use_scoring
from tests.charm_core.reward_model.kinds import save_adapter, save_causal
from tests.charm_core.reward_model.tiny import prompts_and_responses, save_model

SEVERAL = ScoringSettings(processes=ScoringProcesses(number=2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("rm"))


@pytest.fixture
def job(folder: Path, tmp_path: Path) -> ScoringJob:
    prompts, responses = prompts_and_responses(8)
    prompts.write_parquet(tmp_path / "prompts.parquet")
    responses.write_parquet(tmp_path / "responses.parquet")
    return ScoringJob(
        model=RewardModelSpec(path=str(folder), max_length=64),
        prompts_path=tmp_path / "prompts.parquet",
        responses_path=tmp_path / "responses.parquet",
        scores_path=tmp_path / "scores.parquet",
        cuts_path=tmp_path / "cuts.parquet",
    )


@pytest.fixture
def few_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring_launch, "TEXTS_PER_PROCESS", 1)


@pytest.mark.usefixtures("few_are_enough")
def test_two_processes_give_what_one_gives(job: ScoringJob):
    alone = job.model_copy(update={"scores_path": job.scores_path.with_name("alone.parquet")})
    with use_scoring(ScoringSettings(processes=ScoringProcesses(number=1))):
        one = run_scoring(alone)
    cuts = pl.read_parquet(job.cuts_path)
    told: list[tuple[int, int]] = []
    printed: list[str] = []
    with use_scoring(SEVERAL):
        two = run_scoring(job, lambda *now: told.append(now), printed.append)
    assert two.model_dump(exclude={"padding_share"}) == pytest.approx(
        one.model_dump(exclude={"padding_share"}), abs=1e-5
    )
    here, there = pl.read_parquet(alone.scores_path), pl.read_parquet(job.scores_path)
    assert there.drop("score").equals(here.drop("score"))
    assert there["score"].to_list() == pytest.approx(here["score"].to_list(), abs=1e-5)
    assert (
        pl.read_parquet(job.cuts_path).sort("prompt_id", "policy_model").equals(cuts.sort("prompt_id", "policy_model"))
    )
    assert told[-1] == (24, 24)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert sum("scored" in line and "distinct" in line for line in printed) == 2


def scorers() -> list[psutil.Process]:
    """The processes that score shares of the job."""
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            found += [child] if "charm_core.reward_model.worker" in child.cmdline() else []
    return found


@pytest.mark.usefixtures("few_are_enough")
def test_all_end_when_one_is_killed(job: ScoringJob):
    ended: list[psutil.Process] = []

    def kill_one() -> None:
        while len(ended) < 2:  # they need seconds to import torch
            time.sleep(0.02)
            ended[:] = scorers()
        os.kill(ended[0].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    with use_scoring(SEVERAL), pytest.raises(WorkerLostError, match="ended by signal 9"):
        run_scoring(job)
    killer.join()
    assert len(ended) == 2
    assert not any(process.is_running() for process in ended)
    assert not job.scores_path.exists()


def test_as_many_processes_as_are_worth_it(job: ScoringJob, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def count(gpus: int, number: int | None = None, model: RewardModelSpec = job.model, cores: int = 16) -> int:
        with use_scoring(ScoringSettings(processes=ScoringProcesses(number=number))):
            return scoring_launch._process_count(job.model_copy(update={"model": model}), gpus, cores)

    assert count(gpus=4) == 1  # too few texts
    monkeypatch.setattr(scoring_launch, "TEXTS_PER_PROCESS", 8)
    assert count(gpus=0) == 2
    assert count(gpus=0, cores=1) == 1
    assert count(gpus=2) == 2
    assert count(gpus=8) == 3
    assert count(gpus=2, number=1) == 1
    assert count(gpus=0, number=3) == 3
    adapter = save_adapter(tmp_path / "adapter", save_causal(tmp_path / "base"))
    assert count(gpus=0, model=RewardModelSpec(path=str(adapter))) == 1
    assert count(gpus=0, model=RewardModelSpec(path="org/of-unknown-size")) == 1
    monkeypatch.setattr(scoring_launch, "LIGHT_BYTES", 10)
    assert count(gpus=0) == 1
    with pytest.raises(ConfigError, match="3 scoring processes, but this machine has 2 GPUs"):
        count(gpus=2, number=3)


@pytest.mark.usefixtures("few_are_enough")
def test_one_conversation_is_not_shared_out(job: ScoringJob):
    pl.read_parquet(job.responses_path).filter(pl.col("prompt_id") == "p001").write_parquet(job.responses_path)
    with use_scoring(SEVERAL):
        assert run_scoring(job).texts == 3
    assert pl.read_parquet(job.scores_path)["policy_model"].to_list() == ["a", "b", "c"]


def test_every_process_has_a_gpu_or_its_cores_to_itself():
    def named(common: dict[str, str], processes: int, gpus: int) -> list[str]:
        return [one["CUDA_VISIBLE_DEVICES"] for one in scoring_launch._environments(common, processes, gpus, cores=16)]

    assert named({"A": "b"}, 2, gpus=4) == ["0", "1"]
    assert named({"CUDA_VISIBLE_DEVICES": "3,GPU-5f,7"}, 3, gpus=3) == ["3", "GPU-5f", "7"]
    without = scoring_launch._environments({"OMP_NUM_THREADS": "16"}, 3, gpus=0, cores=8)
    assert without == [{"OMP_NUM_THREADS": "2"}] * 3
