import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import polars as pl
import psutil
import pytest

from charm_core.errors import ConfigError, ModelError, TableError, TrainingError
from charm_core.reward_model.jobs import ScoringJob, TrainingJob
from charm_core.reward_model.scoring import score_responses
from charm_core.reward_model.spec import RewardModelSpec, TrainingConfig
from charm_core.reward_model.workdir import CURVE, append_curve, curve_line, read_curve
from charm_core.reward_model.worker import identify, is_alive
from tasks import worker_processes
from tasks.scoring_launch import run_scoring
from tasks.training_launch import CurveReader, run_training
from tasks.worker_processes import rank_count, run_worker, worker_environment
from tests.charm_core.reward_model.tiny import pairs_table, prompts_and_responses, save_model

ROOT = Path(__file__).parents[2]
GONE_SECONDS = 20


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "rm")


@pytest.fixture
def job(model, tmp_path):
    pairs_table().write_parquet(tmp_path / "pairs.parquet")
    return TrainingJob(
        model=RewardModelSpec(path=str(model), max_length=64),
        pairs_path=tmp_path / "pairs.parquet",
        output_dir=tmp_path / "model",
        work_dir=tmp_path / "work",
        config=TrainingConfig(zero_stage=None, threads_per_rank=1, learning_rate=1e-3, pairs_per_step=8),
    )


def changed(job, **changes):
    return job.model_copy(update={"config": job.config.model_copy(update=changes)})


def endless(job):
    return changed(job, zero_stage=3, ranks=2, epochs=10_000)


def workers_of(job):
    """Processes, ranks and launcher, that work on a job."""
    launch = str(job.work_dir / "launch.json")
    found = []
    for process in psutil.process_iter():
        try:
            if launch in process.cmdline():
                found.append(process)
        except psutil.Error:
            continue
    return found


def assert_all_end(processes):
    _, alive = psutil.wait_procs(processes, timeout=GONE_SECONDS)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []


class Cancelled(BaseException):
    """As Prefect's TerminationSignal and KeyboardInterrupt, no Exception."""


def test_output_and_curve_are_streamed_and_replayed(job):
    records, lines, again = [], [], []
    outcome = run_training(job, records.append, lines.append)
    assert records == read_curve(job.work_dir)
    assert [record["step"] for record in records] == list(range(outcome.steps + 1))
    assert any("step 1 of 5: loss" in line for line in lines)
    assert (job.work_dir / "training.log").read_text().splitlines() == lines
    assert run_training(job, again.append) == outcome
    assert again == records


def test_cancelling_ends_every_process(job):
    job = endless(job)
    family = []

    def cancel(record):
        if record["step"] == 2:
            family.extend(workers_of(job))
            raise Cancelled

    with pytest.raises(Cancelled):
        run_training(job, cancel)
    assert len(family) == 3
    assert not any(process.is_running() for process in family)
    assert not job.output_dir.exists()


def test_workers_end_when_their_parent_is_killed(job, tmp_path):
    job = endless(job)
    (tmp_path / "job.json").write_text(job.model_dump_json())
    script = (
        "import sys; from pathlib import Path; from tasks.training_launch import run_training, TrainingJob\n"
        "run_training(TrainingJob.model_validate_json(Path(sys.argv[1]).read_text()))"
    )
    parent = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "job.json")], cwd=ROOT)
    try:
        while parent.poll() is None and len(read_curve(job.work_dir)) < 3:
            time.sleep(0.1)
        family = workers_of(job)
        assert len(family) == 3
        os.kill(parent.pid, signal.SIGKILL)
        assert_all_end(family)
    finally:
        parent.kill()
        parent.wait()
        for process in workers_of(job):
            process.kill()


def test_the_second_of_two_identical_runs_waits_and_finds_the_result(job):
    outcomes, lines = [], []
    threads = [threading.Thread(target=lambda: outcomes.append(run_training(job, log=lines.append))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes[0] == outcomes[1]
    assert sum("step 1 of 5: loss" in line for line in lines) == 1


@pytest.mark.parametrize("ranks", [None, 2])
def test_a_workers_error_arrives_as_it_was(job, tmp_path, ranks):
    empty = tmp_path / "empty"
    empty.mkdir()
    job = job.model_copy(update={"model": RewardModelSpec(path=str(empty))})
    job = changed(job, zero_stage=None if ranks is None else 3, ranks=ranks or "auto")
    with pytest.raises(ModelError, match=r"has no config\.json"):
        run_training(job)


def test_damaged_pairs_are_a_table_error(job):
    job.pairs_path.write_bytes(b"not parquet")
    with pytest.raises(TableError, match="cannot be read as Parquet"):
        run_training(job)


def test_an_unexpected_error_brings_its_traceback(job, monkeypatch, tmp_path):
    # A module that the worker imports, broken from outside.
    (tmp_path / "sitecustomize.py").write_text(
        "import charm_core.reward_model.workdir as w\n"
        "def broken(job): raise RuntimeError('out of luck')\n"
        "w.claim = broken\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(TrainingError, match="RuntimeError: out of luck"):
        run_training(job)


def test_scoring_in_a_process_gives_the_same_scores(model, tmp_path):
    prompts, responses = prompts_and_responses(5)
    prompts.write_parquet(tmp_path / "prompts.parquet")
    responses.write_parquet(tmp_path / "responses.parquet")
    spec = RewardModelSpec(path=str(model), max_length=64)
    job = ScoringJob(
        model=spec,
        prompts_path=tmp_path / "prompts.parquet",
        responses_path=tmp_path / "responses.parquet",
        scores_path=tmp_path / "scores.parquet",
    )
    progress = []
    summary = run_scoring(job, lambda *now: progress.append(now))
    here = score_responses(spec, prompts, responses)
    assert summary == here.summary
    there = pl.read_parquet(job.scores_path)
    assert there["score"].to_list() == pytest.approx(here.scores["score"].to_list(), abs=1e-5)
    assert there.drop("score").equals(here.scores.drop("score"))
    assert progress[-1] == (15, 15)
    with pytest.raises(ModelError, match="is not a folder"):
        run_scoring(job.model_copy(update={"model": RewardModelSpec(path=str(tmp_path / "absent"))}))


def test_the_number_of_ranks():
    assert rank_count(TrainingConfig(zero_stage=None)) == 1
    assert rank_count(TrainingConfig(zero_stage=2, ranks=1)) == 1


def test_more_ranks_than_gpus_is_an_error(monkeypatch):
    monkeypatch.setattr("tasks.worker_processes.local_gpu_count", lambda: 2)
    assert rank_count(TrainingConfig()) == 2
    with pytest.raises(ConfigError, match="this machine has 2 GPUs"):
        rank_count(TrainingConfig(ranks=3))


@pytest.mark.parametrize(
    ("listed", "used", "seen"),
    [(None, 1, "0"), (None, 2, "0,1"), ("5,GPU-3f,2", 2, "5,GPU-3f"), ("5,2,7", 3, "5,2,7"), (None, 0, None)],
)
def test_a_worker_sees_no_more_gpus_than_it_uses(monkeypatch, tmp_path, listed, used, seen):
    """A trainer of transformers that sees several takes them all, as one process must not."""
    monkeypatch.setattr(worker_processes, "local_gpu_count", lambda: 3)
    monkeypatch.setattr(worker_processes, "gpu_turn", lambda _: nullcontext())
    environment = {**os.environ, **({} if listed is None else {"CUDA_VISIBLE_DEVICES": listed})}
    said = []
    command = [sys.executable, "-c", "import os; print(os.environ.get('CUDA_VISIBLE_DEVICES'))"]
    run_worker(command, environment, tmp_path, said.append, lambda: None, gpus=used)
    assert said == [str(seen)]


def test_a_process_is_known_by_its_start_too():
    me = identify(os.getpid())
    assert is_alive(me)
    assert not is_alive(me.model_copy(update={"started": me.started - 100}))
    ended = subprocess.Popen([sys.executable, "-c", ""])
    other = identify(ended.pid)
    ended.wait()
    assert not is_alive(other)


def test_launching_and_specs_import_no_torch_and_no_prefect():
    code = (
        "import sys, json, tasks.launching, tasks.training_launch, charm_core.reward_model.spec\n"
        "print(json.dumps([name for name in ('torch', 'transformers', 'deepspeed', 'prefect') if name in sys.modules]))"
    )
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert json.loads(output) == []


class TestCurveReader:
    RECORDS = tuple({"step": step, "loss": 1 / step} for step in range(1, 6))

    def test_every_record_is_passed_on_once_and_in_order(self, tmp_path):
        found = []
        reader = CurveReader(tmp_path / CURVE, found.append)
        reader.poll()  # there is no curve yet
        for record in self.RECORDS[:2]:
            append_curve(tmp_path, record)
            reader.poll()
            reader.poll()
        for record in self.RECORDS[2:]:
            append_curve(tmp_path, record)
        reader.poll()
        assert found == list(self.RECORDS)

    def test_a_line_that_is_half_written_waits_for_its_end(self, tmp_path):
        found = []
        reader = CurveReader(tmp_path / CURVE, found.append)
        written = "".join(map(curve_line, self.RECORDS)).encode()
        for end in range(0, len(written) + 1, 7):
            (tmp_path / CURVE).write_bytes(written[:end])
            reader.poll()
            assert found == list(self.RECORDS[: written[:end].count(b"\n")])
        (tmp_path / CURVE).write_bytes(written)
        reader.poll()
        assert found == list(self.RECORDS)

    def test_what_was_read_is_not_read_again(self, tmp_path):
        """A long training would otherwise cost its square."""
        found = []
        reader = CurveReader(tmp_path / CURVE, found.append)
        append_curve(tmp_path, self.RECORDS[0])
        reader.poll()
        first = (tmp_path / CURVE).read_bytes()
        (tmp_path / CURVE).write_bytes(b"#" * len(first) + curve_line(self.RECORDS[1]).encode())
        reader.poll()
        assert found == list(self.RECORDS[:2])


def test_threads_of_workers_do_not_spin_for_long_unless_the_user_wants_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    assert worker_environment(None)["GOMP_SPINCOUNT"] == "2000"
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    assert worker_environment(None)["GOMP_SPINCOUNT"] == "7"
