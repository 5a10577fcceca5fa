"""Benchmarks are run by hand, so a name that moves away from under one would be noticed late, and so would what only GPUs show."""

import importlib
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import pytest

from charm_core.errors import TrainingError, WorkerLostError
from charm_core.reward_model.packing import packed_tokens, prefix_groups
from charm_core.reward_model.spec import RewardModelSpec, TrainingConfig
from flows.settings import CHECKOUT
from tasks import worker_processes
from tasks.worker_processes import WAITING

MODULES = sorted(path.stem for path in (CHECKOUT / "benchmarks").glob("*.py"))
GIB = 2**30

pytestmark = pytest.mark.filterwarnings("ignore")  # they are those of other people's packages


@pytest.fixture(autouse=True)
def _from_checkout(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", [str(CHECKOUT), *sys.path])


@pytest.fixture
def training() -> ModuleType:
    return importlib.import_module("benchmarks.training")


@pytest.fixture
def inputs() -> ModuleType:
    return importlib.import_module("benchmarks.training_inputs")


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch):
    """Of four on the machine."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    for name in ("tasks.worker_processes", "benchmarks.scoring"):
        monkeypatch.setattr(importlib.import_module(name), "local_gpu_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda number=0: ((60 - 10 * number) * GIB, 80 * GIB))


@pytest.mark.parametrize("name", MODULES)
def test_it_finds_what_it_imports(name: str):
    module = importlib.import_module(f"benchmarks.{name}")
    assert Path(module.__file__ or "").name == f"{name}.py"


@pytest.mark.parametrize(("parts", "gpus"), [(1, ["3"]), (2, ["3", "1"])])
def test_scoring_processes_get_the_visible_gpus(parts: int, gpus: list[str], two_gpus: None):
    scoring = importlib.import_module("benchmarks.scoring")
    assert [environment["CUDA_VISIBLE_DEVICES"] for environment in scoring.environments(parts)] == gpus


def test_scoring_processes_wait_as_workers_do(monkeypatch: pytest.MonkeyPatch):
    for name in WAITING:
        monkeypatch.delenv(name, raising=False)
    for environment in importlib.import_module("benchmarks.scoring").environments(2):
        assert WAITING.items() <= environment.items()


def test_scoring_is_beside_what_as_many_gpus_reach(
    inputs: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    scoring = importlib.import_module("benchmarks.scoring")
    work = inputs.Work(parameters=1, attention=0.0, looks_ahead=False)
    monkeypatch.setattr(scoring, "work_of", lambda folder: work)
    monkeypatch.setattr(scoring, "matrix_rate", lambda: 40.0)  # of 2 operations for each of 20 tokens in a second

    def took(*rows: int):
        return scoring.Took(
            start=0.0, end=1.0, peak_bytes=0, computed_tokens=10 * len(rows), rows=list(rows), scores=[0.0] * len(rows)
        )

    runs = {scoring.REFERENCE: [(1.0, [took(0, 1)])], "2 processes": [(1.0, [took(0), took(1)])]}
    scoring.print_table("title", runs, [10, 10], Path(), "float32")
    *_, one, two = capsys.readouterr().out.splitlines()
    assert (one.split()[-1], two.split()[-1]) == ("100%", "50%")


def test_a_peer_sees_one_gpu_and_our_environment(
    training: ModuleType, inputs: ModuleType, two_gpus: None, monkeypatch: pytest.MonkeyPatch
):
    seen: list[dict[str, str]] = []

    def no_process(command: list[str], environment: dict[str, str]):
        seen.append(environment)
        raise TrainingError("not started")

    monkeypatch.setattr(worker_processes, "process_tree", no_process)
    monkeypatch.setattr(worker_processes, "gpu_turn", lambda gpus: nullcontext())
    config = TrainingConfig(zero_stage=None, threads_per_rank=1)
    step = inputs.Step(pairs=[{"chosen_ids": [1], "rejected_ids": [2]}], texts=[1, 1], repeated=[])
    with pytest.raises(TrainingError, match="not started"):
        training.peer(
            "trl",
            RewardModelSpec(path="x"),
            [step],
            config,
            micro_batch_pairs=1,
        )
    assert seen == [worker_processes.worker_environment(config) | {"CUDA_VISIBLE_DEVICES": "3"}]


@pytest.mark.parametrize(("gpus", "held"), [(1, 20 * GIB), (2, 50 * GIB)])
def test_memory_is_that_of_the_gpus_used(gpus: int, held: int, two_gpus: None):
    assert importlib.import_module("benchmarks.process_usage").gpu_bytes(gpus) == held


@pytest.mark.parametrize(
    ("error", "is_reported"),
    [
        (TrainingError("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (TrainingError("RuntimeError: CUDA error: out of memory"), True),
        (WorkerLostError("ended by signal 9 (9 is often the system, out of memory)"), False),
        (TrainingError("ValueError: of another kind"), False),
    ],
)
def test_only_want_of_gpu_memory_lets_the_others_go_on(training: ModuleType, error: Exception, is_reported: bool):
    tries: list[str] = []

    def fail():
        tries.append("bad")
        raise error

    course = training.Course(losses=[1.0, 0.5], ends=[0.0, 1.0], cpu=[0.0, 1.0])
    ways = {"bad": training.Way(train=fail, whose="TRL"), "good": training.Way(train=lambda: course, whose="ours")}
    if not is_reported:
        with pytest.raises(type(error)):
            training.in_turn(ways, 2)
        return
    runs = training.in_turn(ways, 2)
    assert (tries, len(runs["bad"]), len(runs["good"])) == (["bad"], 0, 2)


def table(training: ModuleType, inputs: ModuleType, capsys: pytest.CaptureFixture[str], seconds: dict[str, float]):
    """What is printed of each way; those without seconds ran out of memory."""
    whose = {"TRL 8": "TRL", "TRL 1": "TRL", "script": "script", "ours": "ours", "ZeRO": "ours"}
    ways = {
        name: training.Way(train=lambda: None, whose=one, gpus=2 if name == "ZeRO" else 1)
        for name, one in whose.items()
    }

    def runs(name: str):
        took = seconds.get(name)
        if took is None:
            return []
        course = training.Course(losses=[1.0, 0.5], ends=[0.0, took], cpu=[0.0, took], packed=True)
        return [training.Timed(course=course, peak_bytes=0)]

    step = inputs.Step(pairs=[{"chosen_ids": [1] * 50, "rejected_ids": [1] * 50}], texts=[50, 50], repeated=[20])
    # 100 tokens in 1 s are half of what an H100 is said to do
    work = inputs.Work(parameters=int(989e12 / 2 / 6 / 100), attention=0.0, looks_ahead=False)
    training.print_table("title", ways, {name: runs(name) for name in ways}, [step, step], work)
    lines = capsys.readouterr().out.splitlines()
    return {
        name: next(line for line in lines if line.startswith(name)).removeprefix(name).split() for name in ways
    }, lines[-1]


def test_the_table_is_beside_the_first_trl_that_ran(
    training: ModuleType, inputs: ModuleType, capsys: pytest.CaptureFixture[str], two_gpus: None
):
    rows, last = table(training, inputs, capsys, {"TRL 1": 4.0, "script": 2.0, "ours": 1.0, "ZeRO": 1.0})
    assert rows["TRL 8"] == ["out", "of", "memory"]
    assert {name: rows[name][2:4] for name in ("TRL 1", "script", "ours")} == {
        "TRL 1": ["1.00", "0.50"],
        "script": ["2.00", "1.00"],
        "ours": ["4.00", "2.00"],
    }
    assert last.startswith("TRL 8: out of memory;")
    assert last.endswith("beside TRL 1")


def test_the_table_does_without_peers(
    training: ModuleType, inputs: ModuleType, capsys: pytest.CaptureFixture[str], two_gpus: None
):
    rows, last = table(training, inputs, capsys, {"ZeRO": 1.0})
    assert (rows["ours"], rows["ZeRO"][2:4]) == (["out", "of", "memory"], ["–", "–"])
    assert "every way of TRL" in last
    table(training, inputs, capsys, {})


def test_the_share_of_the_arithmetic_is_that_of_the_gpus_used_and_the_tokens_computed(
    training: ModuleType, inputs: ModuleType, capsys: pytest.CaptureFixture[str], two_gpus: None
):
    rows, _ = table(training, inputs, capsys, {"TRL 8": 1.0, "ours": 1.0, "ZeRO": 1.0})
    # of 100 tokens ours computes 80
    assert {name: rows[name][9] for name in ("TRL 8", "ours", "ZeRO")} == {
        "TRL 8": "50.0%",
        "ours": "40.0%",
        "ZeRO": "20.0%",
    }


def test_what_is_repeated_is_what_packed_rows_leave_out(inputs: ModuleType):
    prompt = [1, 2, 3]
    texts = [[*prompt, 4], [*prompt, 5, 6], [*prompt, 5, 7, 8], [9, 9]]
    lengths = [len(text) for text in texts]
    packed = sum(packed_tokens(group, lengths) for group in prefix_groups(texts, [0] * len(texts)))
    assert inputs.repeated(texts) == [3, 3]
    assert sum(lengths) - sum(inputs.repeated(texts)) == packed


def test_a_shared_prompt_is_looked_at_by_all_who_share_it(inputs: ModuleType):
    work = inputs.Work(parameters=0, attention=2.0, looks_ahead=False)
    # every token looks at itself and those before it, about half of the squares
    looked = sum(place + 0.5 for place in range(3)) + 2 * sum(place + 0.5 for place in range(3, 5))
    assert work.operations([5, 5]) - work.operations([3]) == 2 * 2.0 * looked
