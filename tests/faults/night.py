"""What the tests of a bad night share: servers that can be killed, a job as users start it, and what is left of it.

Everything runs in processes of its own, on loopback, on a copy of the code that nobody edits meanwhile, and everything has a
time limit. The job is stopped at named points, see ``ambush/sitecustomize.py``; nothing here waits for a time to pass.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from mlflow import MlflowClient

from flows.settings import CHECKOUT
from tasks.ledger import Ledger, last_ledger
from tasks.store import ArtifactStore

AMBUSH = Path(__file__).parent / "ambush"
NAME = "tiny"
TITLE = f"calibrate {NAME}"
MODEL = f"charm-{NAME}"
LIMIT = 900.0
"""Seconds for a job, start-up and a busy machine included."""
GONE = 60.0
"""Seconds in which the processes of a dead job must have ended; workers look twice a second, torchrun waits for half a minute."""


def eventually(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """What the condition comes to, once that is true."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    return pytest.fail(f"not within {seconds:.0f} s: {what}")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def kill_tree(pid: int) -> None:
    """``kill -9`` of a process with all its descendants, which are told by their numbers."""
    with suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        family = [*root.children(recursive=True), root]
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=GONE)


@dataclass
class Server:
    """A server on loopback that keeps its database and its port when it is killed and started again."""

    command: list[str]
    health: str
    log: Path
    environment: dict[str, str]
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, env=self.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        eventually(self.is_up, 600, f"{self.health} answers; see {self.log}")

    def is_up(self) -> bool:
        with suppress(httpx.HTTPError):
            return httpx.get(self.health, timeout=2).is_success
        return False

    def kill(self) -> None:
        if self.process is not None:
            kill_tree(self.process.pid)
            self.process.wait()
            self.process = None

    def ensure(self) -> None:
        if self.process is None:
            self.start()


@dataclass(frozen=True)
class Point:
    """Where a job is to be stopped."""

    event: str
    pattern: str
    passed: int = 0
    """How many times it may come by there, in each process."""


def renamed(pattern: str) -> Point:
    """Just before a file gets its final name."""
    return Point("os.rename", pattern)


def opened(pattern: str) -> Point:
    """Just before a file is opened."""
    return Point("open", pattern)


def called(function: str) -> Point:
    """Where a rank begins a function, given by its full name."""
    return Point("call", rf"^{re.escape(function)}$")


def requested(pattern: str) -> Point:
    """Just before the MLflow server is asked for something."""
    return Point("http.client.send", pattern)


@dataclass
class Job:
    """A calibration that was started as users start it."""

    process: subprocess.Popen[bytes]
    log: Path
    home: Path
    flags: list[Path]
    """A file for each point at which it is stopped."""

    def halted(self, at: int = 0) -> int:
        """The number of the process that has come to the point; it waits there."""
        flag = self.flags[at]

        def number() -> str:
            if self.process.poll() is not None and not flag.exists():
                pytest.fail(f"the job ended before it came to the point:\n{self.output()}")
            return flag.read_text() if flag.exists() else ""

        return int(eventually(number, LIMIT, f"the job comes to point {at}; its log is {self.log}"))

    def go_on(self, at: int = 0) -> None:
        """Leave the point; from now on the next one counts."""
        Path(f"{self.flags[at]}.go").touch()

    def kill(self) -> None:
        """``kill -9`` of the flow's own process only."""
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def wait(self) -> int:
        return self.process.wait(timeout=LIMIT)

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def processes(self) -> list[psutil.Process]:
        """All live processes that work for this job's home."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("CHARM_HOME") == str(self.home) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def no_process_is_left(self) -> bool:
        return bool(eventually(lambda: not self.processes(), GONE, f"{self.processes()} ended"))


@dataclass
class Night:
    """The servers, the code and the home of all jobs."""

    folder: Path
    prefect: Server
    mlflow: Server
    experiment: str = "charm"
    jobs: list[Job] = field(default_factory=list)
    ambushes: int = 0

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def code(self) -> Path:
        return self.folder / "code"

    @property
    def temporary(self) -> Path:
        """The system's temporary folder, as the jobs see it."""
        return self.folder / "tmp"

    @property
    def store(self) -> ArtifactStore:
        return ArtifactStore(url=str(self.home / "store"), work_folder=str(self.home / "work"))

    @property
    def api(self) -> str:
        return self.prefect.health.removesuffix("/health")

    def environment(self, **more: str) -> dict[str, str]:
        """What a person would have set, and nothing of this process's own."""
        own = ("CHARM_", "PREFECT_", "MLFLOW_", "NIGHT_")
        return {
            **{name: value for name, value in os.environ.items() if not name.startswith(own)},
            "PREFECT_HOME": str(self.folder / "prefect"),
            "PREFECT_API_URL": self.api,
            "CHARM_HOME": str(self.home),
            "TMPDIR": str(self.temporary),
            "CHARM_TRACKING_URI": self.mlflow.health.removesuffix("/health"),
            "CHARM_EXPERIMENT": self.experiment,
            "PYTHONPATH": os.pathsep.join([str(AMBUSH), str(self.code)]),
            **more,
        }

    def ambush(self, points: Sequence[Point]) -> tuple[list[Path], dict[str, str]]:
        """The points at which a job is stopped, one after the other: their files, and what to set in its environment."""
        folder = self.folder / "flags"
        folder.mkdir(exist_ok=True)
        self.ambushes += 1
        flags = [folder / f"{self.experiment}-{self.ambushes}-{number}" for number in range(len(points))]
        found = [{**asdict(point), "flag": str(flag)} for point, flag in zip(points, flags, strict=True)]
        return flags, {"NIGHT_AMBUSH": json.dumps(found)} if found else {}

    def start(self, *at: Point, flow: str = "calibrate", config: str = "run.toml", **more: str) -> Job:
        """Start the job, to be stopped at points or not."""
        flags, ambush = self.ambush(at)
        log = self.folder / f"{self.experiment}-{len(self.jobs)}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", f"flows.{flow}", "--config", str(self.folder / config)],
                cwd=self.code, env=self.environment(**ambush, **more), stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        self.jobs.append(Job(process, log, self.home, flags))
        return self.jobs[-1]

    def finish(self, **more: Any) -> Job:
        """Run the job to its good end."""
        job = self.start(**more)
        assert job.wait() == 0, job.output()
        return job

    def ledger(self, title: str = TITLE) -> Ledger:
        """What the last successful run did, step by step."""
        ledger = last_ledger(self.store, title)
        assert ledger is not None
        return ledger

    def ran(self) -> list[str]:
        """Steps that the last successful run did not take from the store."""
        return sorted(call.step for call in self.ledger().calls if not call.reused)

    def statuses(self) -> dict[str, str]:
        """Status of every MLflow run of this test, by the Prefect flow run or the name."""
        runs = self.mlflow_runs()
        return {run.data.tags.get("prefect.flow_run_id", run.info.run_name): run.info.status for run in runs}

    def mlflow_runs(self) -> list[Any]:
        client = self.client()
        experiment = client.get_experiment_by_name(self.experiment)
        return list(client.search_runs([experiment.experiment_id])) if experiment else []

    def client(self) -> MlflowClient:
        return MlflowClient(self.mlflow.health.removesuffix("/health"))

    def flow_run_states(self) -> list[str]:
        """State on the Prefect server of every flow run of this test, the oldest first."""
        runs = sorted(self.mlflow_runs(), key=lambda run: run.info.start_time)
        numbers = [run.data.tags["prefect.flow_run_id"] for run in runs if "prefect.flow_run_id" in run.data.tags]
        return [httpx.get(f"{self.api}/flow_runs/{number}", timeout=30).json()["state"]["type"] for number in numbers]

    def running_flow_runs(self) -> list[str]:
        """Names of the flow runs that the Prefect server holds to be under way, whoever's they are."""
        wanted = {"flow_runs": {"state": {"type": {"any_": ["PENDING", "RUNNING", "CANCELLING"]}}}}
        found = httpx.post(f"{self.api}/flow_runs/filter", json=wanted, timeout=30).raise_for_status().json()
        return [run["name"] for run in found]

    def records(self) -> dict[str, tuple[int, int]]:
        """The record of every finished step: the same as long as nobody has done the step again."""
        found = {path.name: path.stat() for path in (self.home / "store" / "steps").glob("*-v*")}
        return {name: (state.st_ino, state.st_mtime_ns) for name, state in found.items()}

    def forget_all(self) -> None:
        """Everything is to be done from the beginning."""
        shutil.rmtree(self.home)
        self.client().delete_registered_model(MODEL)

    def forget(self, *steps: str, name: str | None = None) -> None:
        """Take the results of steps out of the store, as if they had not been run yet."""
        calls = self.ledger().calls
        gone = [call for call in calls if call.step in steps and name in (None, call.inputs.get("name"))]
        assert gone, f"no step {steps} in {sorted({call.step for call in calls})}"
        kept = {digest for call in calls if call not in gone for digest in call.outputs}
        for call in gone:
            self.store.forget_step(call.key)
            for digest in {*call.outputs} - kept:
                for path in (self.home / "store").glob(f"*/*/{digest}*"):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    def clear_up(self) -> None:
        """End what the jobs have left, and have both servers again."""
        for job in self.jobs:
            for process in job.processes():
                kill_tree(process.pid)
            job.process.poll()
        self.jobs.clear()
        self.prefect.ensure()
        self.mlflow.ensure()


def results(ledger: Ledger) -> dict[str, tuple[str, ...]]:
    """Key to digests of everything that a run made or took."""
    return {call.key: call.outputs for call in ledger.calls}


def servers(folder: Path) -> Iterator[tuple[Server, Server]]:
    """A Prefect and an MLflow server of our own; ended when the generator is closed."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
    quiet = {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
    database = f"sqlite+aiosqlite:///{folder / 'prefect.db'}"
    ports, bin_folder = (free_port(), free_port()), Path(sys.executable).parent
    prefect = Server(
        [str(bin_folder / "prefect"), "server", "start", "--host", "127.0.0.1", "--port", str(ports[0])],
        f"http://127.0.0.1:{ports[0]}/api/health",
        folder / "prefect.log",
        {**plain, **quiet, "PREFECT_HOME": str(folder / "prefect"), "PREFECT_SERVER_DATABASE_CONNECTION_URL": database},
    )
    mlflow = Server(
        [
            str(bin_folder / "mlflow"), "server", "--host", "127.0.0.1", "--port", str(ports[1]), "--workers", "1",
            "--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}", "--artifacts-destination", str(folder / "artifacts"),
        ],
        f"http://127.0.0.1:{ports[1]}/health",
        folder / "mlflow.log",
        # its seven processes for jobs of its own take longer to start than itself
        {**plain, **quiet, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
    )  # fmt: skip
    try:
        prefect.start()
        mlflow.start()
        yield prefect, mlflow
    finally:
        prefect.kill()
        mlflow.kill()


def copy_code(target: Path) -> None:
    """The three packages, without the repository: what a run is made with stays the same while others edit."""
    for package in ("charm_core", "tasks", "flows"):
        shutil.copytree(CHECKOUT / package, target / package, ignore=shutil.ignore_patterns("__pycache__"))


def write_settings(path: Path, settings: Mapping[str, Any] | Any) -> None:
    from flows.command_line import settings_toml

    path.write_text(settings_toml(settings))
