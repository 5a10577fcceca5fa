"""A child process with all its descendants: none of them outlives the block that started it."""

import logging
import queue
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import psutil

logger = logging.getLogger(__name__)

TERMINATE_SECONDS = 5.0
"""Between asking processes to end and killing them."""


@contextmanager
def process_tree(
    command: list[str], environment: dict[str, str] | None, *, stdin: int = subprocess.DEVNULL
) -> Iterator[subprocess.Popen[str]]:
    """A process in a group of its own; it and all its descendants have ended when the block is left.

    Args:
        command: What to start.
        environment: With what; none: this process's own.
        stdin: As ``subprocess`` has it.
    """
    process = subprocess.Popen(  # noqa: S603 - our own module, no shell
        command,
        env=environment,
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    family = _Family(process.pid)
    try:
        yield process
    finally:
        family.end()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


class _Family:
    """A process and its descendants. torchrun gives every rank a session of its own, so its group is not enough."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._known: dict[int, psutil.Process] = {pid: self._root}
        self._stopped = threading.Event()
        # Ranks must be known before torchrun dies: orphans have no parent by which to find them.
        self._watch = threading.Thread(target=self._look, name="watch-family", daemon=True)
        self._watch.start()

    def end(self) -> None:
        """Ask all of them to end, then kill those that have not."""
        self._stopped.set()
        self._watch.join()
        self._collect()
        members = [member for member in self._known.values() if member.is_running()]
        for member in members:
            _send(member.terminate)
        _, stubborn = psutil.wait_procs(members, timeout=TERMINATE_SECONDS)
        self._collect()
        for member in {*stubborn, *(member for member in self._known.values() if member.is_running())}:
            _send(member.kill)
        psutil.wait_procs(list(self._known.values()), timeout=TERMINATE_SECONDS)

    def _look(self) -> None:
        while not self._stopped.wait(0.2):
            self._collect()

    def _collect(self) -> None:
        for member in list(self._known.values()):
            try:
                children = member.children(recursive=True)
            except psutil.NoSuchProcess:
                continue
            self._known.update({child.pid: child for child in children})


def _send(signal_to: Callable[[], None]) -> None:
    with suppress(psutil.NoSuchProcess):
        signal_to()


def lines_of(process: subprocess.Popen[str]) -> "queue.Queue[str | None]":
    """The process's output, line by line as it comes; None when it has ended."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        try:
            for line in process.stdout or []:
                lines.put(line.rstrip("\n"))
        except ValueError:
            logger.debug("the output of process %d was closed while it was read", process.pid)
        finally:
            lines.put(None)

    threading.Thread(target=read, name="read-worker-output", daemon=True).start()
    return lines
