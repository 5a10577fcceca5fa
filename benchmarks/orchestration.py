"""What orchestration costs: start-up, a cached run, Prefect and MLflow beside the work, and every step that needs no reward model.

    python -m benchmarks.orchestration [--prompts 1000 20000 100000] [--training 60]

Starts a Prefect server with a database of its own; MLflow is a SQLite file. Prints one table, each line with its target. On a busy
machine only the CPU seconds say something: they are those of the measured process, without the server's. Rows:

help        python -m flows.audit --help
cached      python -m flows.calibrate on a tiny simulated arena, every step cached, process start included
overhead    a calibration whose training waits, without the waiting and without the bodies of the steps that compute: what Prefect,
            MLflow and the store's bookkeeping take of a run of ten minutes, from a run without training and one of ``--training``
            seconds, whose difference grows with the time
steps       a calibration with precomputed scores (see benchmarks.precomputed_calibration), seven policy models
"""

import argparse
import json
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
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

TEN_MINUTES = 600.0
SERVER_SECONDS = 300
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
    return f"{what:34}{wall:>9}{busy:>8}  {more:32}{target}"


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
    own = {**environment, "CHARM_HOME": str(folder / f"precomputed-{prompts}-{training:.0f}")}
    arguments = ("benchmarks.precomputed_calibration", "--prompts", str(prompts), "--training", str(training))
    measured(arguments, own)  # writes the inputs
    found: dict[str, Any] = json.loads(measured(arguments, own).out)
    return found


def overhead(folder: Path, environment: Mapping[str, str], training: float) -> tuple[float, float]:
    """Seconds and CPU seconds of a ten-minute run that are none of its work."""
    short, long = (precomputed(folder, environment, 500, waited) for waited in (0.0, training))
    extra = []
    for total, bodies, waited in (("seconds", "bodies", training), ("cpu", "body_cpu", 0.0)):
        at_start, at_end = short[total] - short[bodies], long[total] - long[bodies] - waited
        extra.append(at_start + max(0.0, at_end - at_start) / training * TEN_MINUTES)
    return extra[0], extra[1]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[1_000, 20_000, 100_000])
    parser.add_argument("--training", type=float, default=60.0, help="seconds of the longer run of the row overhead")
    options = parser.parse_args()
    with TemporaryDirectory(prefix="charm-orchestration-") as name, prefect_server(Path(name)) as environment:
        folder = Path(name)
        print(line("", "seconds", "CPU", "", "target"))
        took = min((measured(("flows.audit", "--help"), environment) for _ in range(3)), key=lambda one: one.seconds)
        print(line("help", took.seconds, took.cpu, "", "under 3 s"), flush=True)
        took = cached_run(folder, environment)
        print(line("cached calibrate", took.seconds, took.cpu, "", "under 10 s"), flush=True)
        seconds, cpu = overhead(folder, environment, options.training)
        share = f"{seconds / TEN_MINUTES:.1%} of ten minutes, CPU {cpu / TEN_MINUTES:.1%}"
        print(line("overhead of ten minutes", seconds, cpu, share, "under 2 %"), flush=True)
        smaller, before = 0, 0.0
        for prompts in sorted(options.prompts):
            found = precomputed(folder, environment, prompts)
            more = (found["cpu"] - before) / (prompts - smaller) * 1000
            each = f"{found['peak_bytes'] / 2**30:.1f} GiB, each further {more:.1f} CPU ms"
            smaller, before = prompts, found["cpu"]
            target = "under 60 s and 4 GB" if prompts == 20_000 else "linear"
            print(line(f"steps, {prompts:,} × 7", found["seconds"], found["cpu"], each, target), flush=True)


if __name__ == "__main__":
    main()
