"""How a machine of a training over several is reached: through a remote shell, or by waiting for it to come.

Either way the flow holds one end of a line. What the machine prints comes in by it, and when the flow hangs up or is gone, the
machine ends what it does.
"""

import logging
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO, cast

from charm_core import errors
from charm_core.errors import ConfigError, WorkerLostError
from tasks.node import GOODBYE, NodeOrder, keep_alive
from tasks.process_trees import process_tree
from tasks.worker_processes import POLL_SECONDS

logger = logging.getLogger(__name__)

CHECKOUT = Path(errors.__file__).parents[1]
JOIN_SECONDS = 600.0
"""In which a machine that comes by itself must have come."""
ANSWER_SECONDS = 120.0
"""In which it must have understood its order."""
GOODBYE_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class NodeLine:
    """A machine that is reached, as over a telephone."""

    name: str
    stream: TextIO
    """What it prints."""
    hang_up: Callable[[], None]
    """Tells it to end."""
    heard: tuple[str, ...] = ()
    """What it has said already."""


@contextmanager
def through_shell(shell: list[str], host: str, order: NodeOrder) -> Iterator[NodeLine]:
    """Start ``tasks.node`` on a machine, or here where there is no shell."""
    words = ["env", f"--chdir={CHECKOUT}", sys.executable, "-m", "tasks.node"]
    command = [*shell, host, *(shlex.quote(word) for word in words)] if shell else words
    with process_tree(command, None, stdin=subprocess.PIPE) as process:
        life_line, output = cast(TextIO, process.stdin), cast(TextIO, process.stdout)

        def hang_up() -> None:
            with suppress(OSError):  # it may have ended
                life_line.close()

        with suppress(OSError):  # it has ended already, and its output says why
            life_line.write(f"{order.model_dump_json()}\n")
            life_line.flush()
        try:
            yield NodeLine(name=host, stream=output, hang_up=hang_up)
        finally:
            hang_up()


@contextmanager
def that_came(listener: socket.socket, order: NodeOrder, poll: Callable[[], None]) -> Iterator[NodeLine]:
    """Give the order to a machine that has come by itself, or comes soon.

    Raises:
        WorkerLostError: None has come in time.
    """
    connection, line = _first_that_answers(listener, order, poll)
    with connection:
        try:
            yield line
        finally:
            with suppress(OSError):  # it may have gone
                connection.shutdown(socket.SHUT_RDWR)


def _first_that_answers(
    listener: socket.socket, order: NodeOrder, poll: Callable[[], None]
) -> tuple[socket.socket, NodeLine]:
    logger.info("waiting for machine %d of %d", order.number + 1, order.machines)
    deadline = time.monotonic() + JOIN_SECONDS
    while time.monotonic() < deadline:
        poll()
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            continue
        try:
            return connection, _give_order(connection, order)
        except OSError as error:  # one that came and went again
            logger.debug("a machine that had come does not answer: %s", error)
            connection.close()
    raise WorkerLostError(
        f"only {order.number} of {order.machines} machines were there within {JOIN_SECONDS:.0f} seconds: see that `python -m tasks.node "
        "HOST:PORT` runs on the others"
    )


def _give_order(connection: socket.socket, order: NodeOrder) -> NodeLine:
    keep_alive(connection)
    connection.settimeout(ANSWER_SECONDS)
    stream = connection.makefile("r", encoding="utf-8", errors="replace")
    name = stream.readline().strip()
    connection.sendall(f"{order.model_dump_json()}\n".encode())
    answer = stream.readline()
    if not name or not answer:
        raise ConnectionError("it has gone")
    connection.settimeout(None)

    def hang_up() -> None:
        with suppress(OSError):  # it may have gone
            connection.shutdown(socket.SHUT_WR)

    return NodeLine(name=name, stream=stream, hang_up=hang_up, heard=(answer.rstrip("\n"),))


def send_home(listener: socket.socket, machines: int) -> None:
    """Tell machines that the flow has ended well; one that does not come for orders just now is not waited for long."""
    with suppress(TimeoutError):
        for _ in range(machines):
            listener.settimeout(GOODBYE_SECONDS)
            connection, _ = listener.accept()
            with connection, suppress(OSError):  # it may have gone
                connection.sendall(f"{GOODBYE}\n".encode())


def listen(host: str, port: int) -> socket.socket:
    """A socket to which machines come, at an address of this machine.

    Raises:
        ConfigError: The address cannot be had.
    """
    try:
        listener = socket.create_server((host, port))
    except OSError as error:
        raise ConfigError(
            f"cannot listen at {host}:{port} ({error.strerror or error}): the first of CHARM_NODES is the machine that the flow runs "
            "on, and CHARM_NODES_PORT a free port of it"
        ) from error
    listener.settimeout(POLL_SECONDS)
    return listener


def free_port(host: str) -> int:
    """A port of this machine that is free just now.

    Raises:
        ConfigError: The name is not this machine's.
    """
    with listen(host, 0) as listener:
        return int(listener.getsockname()[1])
