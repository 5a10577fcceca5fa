"""What orchestration costs: start-up, a cached run, Prefect and MLflow beside the work, and every step that needs no reward model.

    python -m benchmarks.orchestration [--prompts 1000 20000 100000] [--training 120] [--rows help cached overhead steps]

Starts a Prefect server with a database of its own; MLflow is a SQLite file. Prints one table, each line with its target. On a busy
machine only the CPU seconds say something: they are those of the measured process, without the server's. Rows:

help        python -m flows.audit --help
cached      python -m flows.calibrate on a tiny simulated arena, every step cached, process start included
overhead    a calibration whose training waits, without the waiting and without the bodies of the steps that compute: what Prefect,
            MLflow, first use of its database and the store's bookkeeping take of a run that trains for ten minutes; and the same
            with the start and the end of the process, all imports included
steps       a calibration with precomputed scores (see benchmarks.precomputed_calibration), seven policy models

The overhead is a fixed part and one that grows with the time, from runs without training and one of ``--training`` seconds. Only
what the steps of training took besides waiting is taken to grow, for that is where something happens again and again: the curve, the
log, the progress. All else is the same however long the training is. So its jitter between two runs, seconds on a machine that does
something else too, must not be multiplied by ten minutes over the training's seconds, as the difference of two whole runs would. It
is the median of all runs.
"""

import argparse
import json
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import httpx

from charm_core.mismatch import MismatchConfig
from charm_core.offsets import OffsetConfig
from charm_core.preferences import PreferenceConfig
from charm_core.reward_model.spec import TrainingConfig
from charm_core.simulation import SimulationConfig
from flows.command_line import settings_toml
from flows.runs import CalibrationRun
from flows.settings import CHECKOUT
from tasks.simulation import SimulatedWorld

ROWS = ("help", "cached", "overhead", "steps")
TEN_MINUTES = 600.0
SERVER_SECONDS = 300
WITHOUT_TRAINING = 3
"""Runs."""
QUICK = TrainingConfig(epochs=1, learning_rate=1e-3, pairs_per_step=90, zero_stage=None, threads_per_rank=1)
TINY = CalibrationRun(
    name="tiny",
    simulation=SimulatedWorld(arena=SimulationConfig(prompts=40, label_prompts=30, battles=2000), base_training=QUICK),
    mismatch=MismatchConfig(bootstrap_replicates=100),
    calibration=OffsetConfig(bootstrap_replicates=20),
    preferences=PreferenceConfig(strategy="all_pairs"),
    training=QUICK,
)


@dataclass(frozen=True, kw_only=True)
class Took:
    """What a process took."""

    seconds: float
    cpu: float
    out: str


def measured(arguments: Sequence[str], environment: Mapping[str, str]) -> Took:
    """Run a Python module to its end."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=CHECKOUT,
        env=dict(environment),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return Took(seconds=seconds, cpu=cpu, out=done.stdout)


@contextmanager
def prefect_server(folder: Path) -> Iterator[dict[str, str]]:
    """A server with a database of its own; yields the environment to use it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {name: value for name, value in os.environ.items() if not name.startswith(("CHARM_", "PREFECT_API"))}
    environment = {**own, "PREFECT_HOME": str(folder / "prefect"), "PREFECT_API_URL": f"http://127.0.0.1:{port}/api"}
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with (
        (folder / "server.log").open("w") as log,
        subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT) as server,
    ):
        try:
            wait_for(f"http://127.0.0.1:{port}/api/health", server)
            yield environment
        finally:
            server.terminate()


def wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    """Until the server answers."""
    deadline = time.monotonic() + SERVER_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            if httpx.get(url, timeout=5).is_success:
                return
        except httpx.HTTPError:
            time.sleep(0.5)
    raise SystemExit(f"the Prefect server did not come up at {url}")


def line(what: str, seconds: float | str, cpu: float | str, more: str, target: str) -> str:
    """Of the table."""
    cells = (f"{value:.1f}" if isinstance(value, float) else value for value in (seconds, cpu))
    wall, busy = cells
    return f"{what:38}{wall:>9}{busy:>8}  {more:40}{target}"


def cached_run(folder: Path, environment: Mapping[str, str]) -> Took:
    """A calibration in which every step is cached."""
    settings = folder / "tiny.toml"
    settings.write_text(settings_toml(TINY))
    own = {**environment, "CHARM_HOME": str(folder / "cached")}
    arguments = ("flows.calibrate", "--config", str(settings), "--json")
    measured(arguments, own)
    took = measured(arguments, own)
    if ", 0 ran" not in json.loads(took.out)["outcome"]["summary"]:
        raise SystemExit("not every step was cached")
    return took


def precomputed(folder: Path, environment: Mapping[str, str], prompts: int, training: float = 0.0) -> dict[str, Any]:
    """A calibration with precomputed scores, in a store of its own."""
    with TemporaryDirectory(dir=folder) as home:
        own = {**environment, "CHARM_HOME": home}
        arguments = ("benchmarks.precomputed_calibration", "--prompts", str(prompts), "--training", str(training))
        measured(arguments, own)  # writes the inputs
        took = measured(arguments, own)
    return {**json.loads(took.out), "process": {"seconds": took.seconds, "cpu": took.cpu}}


@dataclass(frozen=True, kw_only=True)
class Overhead:
    """What is none of a run's work, in seconds of a run that trains for ten minutes."""

    flow: float
    process: float
    """With the start and the end of the process."""


def overhead(folder: Path, environment: Mapping[str, str], training: float) -> tuple[Overhead, Overhead]:
    """By the clock, and of the CPU."""
    runs = [precomputed(folder, environment, 500, waiting) for waiting in [0.0] * WITHOUT_TRAINING + [training]]
    return extrapolated(runs, training, "seconds"), extrapolated(runs, training, "cpu")


def extrapolated(runs: Sequence[Mapping[str, Any]], training: float, unit: str) -> Overhead:
    """From some runs without training and, the last one, one of ``training`` seconds."""
    around = [run["training"][unit] for run in runs]
    at_rest = median(around[:-1])
    growing = (around[-1] - at_rest) / training * TEN_MINUTES
    flow, process = (
        median(run[whole][unit] - run["bodies"][unit] - run["training"][unit] - run["waited"][unit] for run in runs)
        for whole in ("flow", "process")
    )
    return Overhead(flow=flow + at_rest + growing, process=process + at_rest + growing)


def help_row(_folder: Path, environment: Mapping[str, str]) -> Iterator[str]:
    """The shortest of three."""
    took = min((measured(("flows.audit", "--help"), environment) for _ in range(3)), key=lambda one: one.seconds)
    yield line("help", took.seconds, took.cpu, "", "under 3 s")


def cached_row(folder: Path, environment: Mapping[str, str]) -> Iterator[str]:
    """The second of two equal calibrations."""
    took = cached_run(folder, environment)
    yield line("cached calibrate", took.seconds, took.cpu, "", "under 10 s")


def overhead_row(folder: Path, environment: Mapping[str, str], training: float) -> Iterator[str]:
    """Of the flow, and with its process."""
    clock, cpu = overhead(folder, environment, training)
    for what, seconds, busy in (
        ("overhead of ten minutes", clock.flow, cpu.flow),
        ("  with start and end of the process", clock.process, cpu.process),
    ):
        share = f"{seconds / TEN_MINUTES:.1%} of ten minutes, CPU {busy / TEN_MINUTES:.1%}"
        yield line(what, seconds, busy, share, "under 2 %")


def step_rows(folder: Path, environment: Mapping[str, str], sizes: Sequence[int]) -> Iterator[str]:
    """A row for each number of prompts, with what each further thousand took."""
    smaller, before = 0, 0.0
    for prompts in sizes:
        found = precomputed(folder, environment, prompts)
        more = (found["flow"]["cpu"] - before) / (prompts - smaller) * 1000
        each = f"{found['peak_bytes'] / 2**30:.1f} GiB, each further {more:.1f} CPU ms"
        smaller, before = prompts, found["flow"]["cpu"]
        target = "under 60 s and 4 GB" if prompts == 20_000 else "linear"
        yield line(f"steps, {prompts:,} × 7", found["flow"]["seconds"], found["flow"]["cpu"], each, target)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[1_000, 20_000, 100_000])
    parser.add_argument("--training", type=float, default=120.0, help="seconds of the longest run of the row overhead")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, help="only these")
    options = parser.parse_args()
    rows: dict[str, Callable[[Path, Mapping[str, str]], Iterator[str]]] = {
        "help": help_row,
        "cached": cached_row,
        "overhead": partial(overhead_row, training=options.training),
        "steps": partial(step_rows, sizes=sorted(options.prompts)),
    }
    with TemporaryDirectory(prefix="charm-orchestration-") as name, prefect_server(Path(name)) as environment:
        print(line("", "seconds", "CPU", "", "target"))
        for row in options.rows:
            for text in rows[row](Path(name), environment):
                print(text, flush=True)


if __name__ == "__main__":
    main()
