"""A Prefect server and workers in processes of their own, on a database of their own: to be killed and started again."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
from prefect.client.orchestration import SyncPrefectClient

from flows.settings import CHECKOUT

BIN = Path(sys.executable).parent
STARTS_WITHIN = 300.0
"""Seconds; about ten on an idle machine."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(what: str, found: Callable[[], Any], seconds: float) -> Any:
    """Ask again and again until there is an answer, at most so long."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        answer = found()
        if answer:
            return answer
        time.sleep(1.0)
    raise AssertionError(f"no {what} within {seconds:.0f} s")


class PrefectServer:
    """One server; its folder also holds what runs on it keep (CHARM_HOME) and the logs of all processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/api"
        self._server: subprocess.Popen[bytes] | None = None
        self._workers: list[subprocess.Popen[bytes]] = []

    @property
    def environment(self) -> dict[str, str]:
        """Of everything that belongs to this server."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "CHARM_"))}
        return kept | {
            "PREFECT_HOME": str(self.folder / "prefect"),
            "PREFECT_API_URL": self.url,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
            "PREFECT_WORKER_QUERY_SECONDS": "2",
            "CHARM_HOME": str(self.folder / "home"),
            "CHARM_CHECKOUT": str(CHECKOUT),
            "OMP_NUM_THREADS": "1",
        }

    def start(self) -> None:
        """Start it, also again on the same database, and wait until it answers."""
        environment = self.environment
        del environment["PREFECT_API_URL"]
        command = [str(BIN / "prefect"), "server", "start", "--host", "127.0.0.1", "--port", str(self.port), "--no-ui"]
        self._server = self._popen(command, "server", environment)
        wait_for("Prefect server", self._answers, STARTS_WITHIN)

    def kill(self) -> None:
        """As a power cut would."""
        assert self._server is not None
        os.killpg(self._server.pid, signal.SIGKILL)
        self._server.wait()
        self._server = None

    def start_worker(self, pool: str, *options: str) -> None:
        """A worker that serves a work pool."""
        command = [str(BIN / "prefect"), "worker", "start", "--pool", pool, "--type", "process", *options]
        self._workers.append(self._popen(command, f"worker-{pool}", self.environment))

    def workers(self) -> list[int]:
        """Process numbers of the workers."""
        return [worker.pid for worker in self._workers]

    def stop_workers(self) -> None:
        for worker in self._workers:
            with suppress(ProcessLookupError):  # a test may have killed it
                os.killpg(worker.pid, signal.SIGTERM)
            try:
                worker.wait(timeout=60)
            except subprocess.TimeoutExpired:
                os.killpg(worker.pid, signal.SIGKILL)
                worker.wait()
        self._workers = []

    def stop(self) -> None:
        """End all processes."""
        self.stop_workers()
        if self._server is not None:
            self.kill()

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """A command in the checkout, as a person would type it."""
        done = subprocess.run(
            [str(BIN / command[0]), *command[1:]],
            cwd=CHECKOUT, env=self.environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=900,
        )  # fmt: skip
        assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done

    def client(self) -> SyncPrefectClient:
        return SyncPrefectClient(self.url, server_type="server")

    def _popen(self, command: list[str], name: str, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                command, cwd=self.folder, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    def _answers(self) -> bool:
        assert self._server is not None
        assert self._server.poll() is None, (self.folder / "server.log").read_text()[-3000:]
        try:
            return httpx.get(f"{self.url}/health", timeout=5).is_success
        except httpx.HTTPError:
            return False
