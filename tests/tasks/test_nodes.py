"""One training over two "machines" on loopback: two launchers, one rank each, that share nothing but a folder and a network.

The remote shell is a fake: it runs the command on this machine, under a daemon of its own. Machines that come by themselves
are real processes.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from charm_core.errors import ConfigError, ModelError, ServiceError, WorkerLostError
from charm_core.reward_model.jobs import TrainingJob
from charm_core.reward_model.spec import RewardModelSpec, TrainingConfig
from charm_core.reward_model.workdir import checkpoint_steps, read_curve
from tasks.node import split_address
from tasks.nodes import NodeSettings, use_nodes
from tasks.training_launch import run_training
from tests.charm_core.reward_model.tiny import pairs_table, save_model

ROOT = Path(__file__).parents[2]
SHELL = ROOT / "tests" / "fake_remote_shell.py"
HERE = "127.0.0.1"
GONE_SECONDS = 30
NODE, LAUNCHER, WORKER = "tasks.node", "torch.distributed.run", "charm_core.reward_model.worker"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nodes")
    save_model(folder / "rm")
    pairs_table(prompts=9, held_out=2).write_parquet(folder / "pairs.parquet")
    return folder


@pytest.fixture
def job_of(root, tmp_path):
    def make(name, **changes):
        settings = {"zero_stage": 3, "ranks": 2, "threads_per_rank": 1, "learning_rate": 1e-3, "epochs": 4}
        steps = {"pairs_per_step": 6, "micro_batch_tokens": 40, "checkpoint_every_steps": 3}
        return TrainingJob(
            model=RewardModelSpec(path=str(root / "rm"), max_length=64),
            pairs_path=root / "pairs.parquet",
            output_dir=tmp_path / f"{name}-model",
            work_dir=tmp_path / f"{name}-work",
            config=TrainingConfig(**(settings | steps | changes)),
        )

    return make


@pytest.fixture(scope="module")
def standalone(root):
    """The weights that two ranks on one machine give."""
    folder = root / "standalone"
    settings = {"zero_stage": 3, "ranks": 2, "threads_per_rank": 1, "learning_rate": 1e-3, "epochs": 4}
    job = TrainingJob(
        model=RewardModelSpec(path=str(root / "rm"), max_length=64),
        pairs_path=root / "pairs.parquet",
        output_dir=folder / "model",
        work_dir=folder / "work",
        config=TrainingConfig(**settings, pairs_per_step=6, micro_batch_tokens=40),
    )
    run_training(job)
    return weights(job)


def weights(job):
    return (job.output_dir / "model.safetensors").read_bytes()


@pytest.fixture
def shell(tmp_path):
    """Settings for a second machine behind the fake remote shell, whose daemon runs."""
    address = str(tmp_path / "sshd")
    daemon = subprocess.Popen([sys.executable, str(SHELL), "serve", address])
    try:
        while not Path(address).exists():
            assert daemon.poll() is None
            time.sleep(0.05)
        yield NodeSettings(hosts=(HERE, "second"), remote_shell=f"{sys.executable} {SHELL} {address}")
    finally:
        stop(psutil.Process(daemon.pid))
        daemon.wait()


def stop(root):
    for process in [*root.children(recursive=True), root]:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def free_port():
    with socket.create_server((HERE, 0)) as listener:
        return listener.getsockname()[1]


@contextmanager
def waiting_machine(port):
    """A machine that comes for orders by itself, as a scheduler starts it."""
    process = subprocess.Popen([sys.executable, "-m", NODE, f"{HERE}:{port}"], cwd=ROOT)
    try:
        yield process
    finally:
        if process.poll() is None:
            stop(psutil.Process(process.pid))
        process.wait()


def processes_of(job):
    """Launchers and ranks that work on a job, wherever."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if str(job.work_dir) in (process.cmdline() or [""])[-1]:
                found.append(process)
    return found


def part(job, number, what):
    """One process of a machine: its node, its launcher or its rank."""
    of_machine = [p for p in processes_of(job) if f"-{number}.json" in p.cmdline()[-1]]
    (launcher,) = [p for p in of_machine if LAUNCHER in p.cmdline()]
    if what == NODE:
        return launcher.parent()
    return launcher if what == LAUNCHER else next(p for p in of_machine if p != launcher)


def assert_nothing_is_left(job):
    _, alive = psutil.wait_procs(processes_of(job), timeout=GONE_SECONDS)
    assert alive == []


def endless(job_of, name="endless"):
    return job_of(name, epochs=10_000)


class Cancelled(BaseException):
    """As Prefect's TerminationSignal and KeyboardInterrupt, no Exception."""


def at_step(step, do):
    def on_step(record):
        if record["step"] == step:
            do()

    return on_step


def test_machines_behind_a_remote_shell_give_the_weights_of_one_machine(job_of, shell, standalone):
    job, lines = job_of("shell"), []
    with use_nodes(shell):
        outcome = run_training(job, log=lines.append)
    assert (outcome.ranks, outcome.steps) == (2, 16)
    assert weights(job) == standalone
    # rank 0, which tells the steps, is on the flow's own machine
    assert [line.startswith("[second] ") for line in lines if "step 1 of 16: loss" in line] == [False]
    assert not list(job.work_dir.glob("launch-*"))
    assert_nothing_is_left(job)


@pytest.mark.slow
def test_machines_that_come_by_themselves_do_so_for_every_training_of_a_flow(job_of, standalone):
    settings = NodeSettings(hosts=(HERE, "second"), port=free_port())
    first, second = job_of("first"), job_of("second")
    with waiting_machine(settings.port) as machine:
        with use_nodes(settings):
            run_training(first)
            with use_nodes(settings):  # a flow within a flow has the same machines
                run_training(second)
            assert machine.poll() is None
        assert machine.wait(GONE_SECONDS) == 0
    assert weights(first) == weights(second) == standalone


@pytest.mark.parametrize(
    ("number", "what"),
    [
        pytest.param(1, WORKER, id="rank there"),
        pytest.param(0, WORKER, id="rank here", marks=pytest.mark.slow),
        pytest.param(1, LAUNCHER, id="launcher there", marks=pytest.mark.slow),
        pytest.param(0, LAUNCHER, id="launcher here", marks=pytest.mark.slow),
        pytest.param(1, NODE, id="node there", marks=pytest.mark.slow),
        pytest.param(0, NODE, id="node here", marks=pytest.mark.slow),
    ],
)
def test_what_is_killed_on_one_machine_ends_the_other_and_the_step_is_tried_again(
    job_of, shell, standalone, number, what
):
    job = job_of("killed")
    with use_nodes(shell):
        with pytest.raises(WorkerLostError, match="run again: finished steps are kept"):
            run_training(job, at_step(5, lambda: part(job, number, what).kill()))
        assert_nothing_is_left(job)
        # ranks whose node was killed take steps until they are told
        assert checkpoint_steps(job.work_dir)[0] in ((3, 6) if what == NODE else (3,))
        run_training(job)
    assert (job.work_dir / "training.log").read_text().count("step 1 of ") == 1
    assert weights(job) == standalone


@pytest.mark.slow
def test_a_machine_that_was_lost_is_replaced_by_another_that_comes(job_of, standalone):
    settings = NodeSettings(hosts=(HERE, "second"), port=free_port())
    job = job_of("replaced")
    with use_nodes(settings):
        with waiting_machine(settings.port) as lost, pytest.raises(WorkerLostError, match="was lost"):
            run_training(job, at_step(5, lambda: os.kill(lost.pid, signal.SIGKILL)))
        assert_nothing_is_left(job)
        with waiting_machine(settings.port) as stale:
            time.sleep(2)  # it has come, and waits; then it is gone before it gets its order
        assert stale.poll() is not None
        with waiting_machine(settings.port):
            run_training(job)
    assert weights(job) == standalone


@pytest.mark.parametrize("way", ["shell", pytest.param("port", marks=pytest.mark.slow)])
def test_cancelling_ends_every_process_on_every_machine(job_of, shell, way):
    job = endless(job_of)
    settings = shell if way == "shell" else NodeSettings(hosts=(HERE, "second"), port=free_port())
    family = []

    def cancel():
        family.extend(processes_of(job))
        raise Cancelled

    with waiting_machine(settings.port or 1) as machine:
        with pytest.raises(Cancelled), use_nodes(settings):
            run_training(job, at_step(2, cancel))
        assert len(family) == 4
        assert not any(process.is_running() for process in family)
        # what came by itself waits for the next flow
        assert machine.poll() is None


@pytest.mark.parametrize("way", [pytest.param("shell", marks=pytest.mark.slow), "port"])
def test_all_machines_notice_that_the_flow_was_killed(job_of, shell, tmp_path, way):
    job = endless(job_of)
    settings = shell if way == "shell" else NodeSettings(hosts=(HERE, "second"), port=free_port())
    (tmp_path / "job.json").write_text(job.model_dump_json())
    (tmp_path / "settings.json").write_text(settings.model_dump_json())
    script = (
        "import sys; from pathlib import Path\n"
        "from tasks.nodes import NodeSettings, use_nodes\n"
        "from tasks.training_launch import run_training, TrainingJob\n"
        "job, settings = (Path(name).read_text() for name in sys.argv[1:])\n"
        "with use_nodes(NodeSettings.model_validate_json(settings)):\n"
        "    run_training(TrainingJob.model_validate_json(job))"
    )
    arguments = [str(tmp_path / "job.json"), str(tmp_path / "settings.json")]
    with waiting_machine(settings.port or 1) as machine:
        flow = subprocess.Popen([sys.executable, "-c", script, *arguments], cwd=ROOT)
        try:
            while flow.poll() is None and len(read_curve(job.work_dir)) < 3:
                time.sleep(0.1)
            assert len(processes_of(job)) == 4
        finally:
            flow.kill()
            flow.wait()
        assert_nothing_is_left(job)
        assert machine.poll() is None


def test_a_ranks_error_arrives_as_it_was(job_of, shell, tmp_path):
    job = job_of("empty")
    (tmp_path / "empty").mkdir()
    job = job.model_copy(update={"model": RewardModelSpec(path=str(tmp_path / "empty"))})
    with use_nodes(shell), pytest.raises(ModelError, match=r"has no config\.json"):
        run_training(job)


def test_a_machine_that_cannot_be_reached_is_an_error_that_says_why(job_of, shell):
    settings = shell.model_copy(update={"hosts": (HERE, "unreachable")})
    with use_nodes(settings), pytest.raises(ServiceError, match=r"machine unreachable did not(.|\n)*could not resolve"):
        run_training(job_of("unreachable"))


def test_ranks_that_cannot_be_shared_out_evenly_are_an_error(job_of, shell):
    with use_nodes(shell), pytest.raises(ConfigError, match="ranks=3 cannot be shared out evenly over 2 machines"):
        run_training(job_of("odd", ranks=3))


def test_plain_training_stays_on_the_flows_machine(job_of, shell):
    settings = shell.model_copy(update={"hosts": (HERE, "unreachable")})
    with use_nodes(settings):
        assert run_training(job_of("plain", zero_stage=None, ranks="auto", epochs=1)).ranks == 1


def test_the_first_machine_must_be_the_flows():
    with (
        pytest.raises(ConfigError, match="the first of CHARM_NODES"),
        use_nodes(NodeSettings(hosts=("203.0.113.7", "second"), port=29400)),
    ):
        pass


@pytest.mark.parametrize("address", ["first", "first:", ":29400", "first:port"])
def test_an_address_has_host_and_port(address):
    with pytest.raises(ConfigError, match="is no HOST:PORT"):
        split_address(address)
