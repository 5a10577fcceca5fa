"""One machine's part in a training that is spread over several: ``python -m tasks.node [HOST:PORT]``.

Without an address it takes one order from its standard input, which is how a remote shell starts it. With one it waits there
for orders until the flow that gives them has ended well, which is how a scheduler starts it.

Where an order comes from is its life line: when that ends, whatever ended the flow, the machine's ranks end too.
"""

import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from pydantic import BaseModel, ConfigDict, Field

from charm_core.errors import CharmError, ConfigError
from charm_core.reward_model.jobs import Launch, TrainingJob
from charm_core.reward_model.workdir import write_text
from charm_core.reward_model.worker import identify
from tasks.process_trees import lines_of, process_tree
from tasks.worker_processes import rank_count, worker_command, worker_environment

logger = logging.getLogger("tasks.node")

READY = "charm-node ready"
"""The line that says that the order is understood and its launch file written."""
ENDED = "charm-node ended "
"""How the last line begins; the status of the launcher follows. A stream that ends without it has lost its machine."""
GOODBYE = "goodbye"
"""What comes in place of an order when the flow has ended well."""
PATIENCE_SECONDS = 1800
"""How long the machines wait for each other at the beginning."""
_POLL_SECONDS = 0.1
_RETRY_SECONDS = 1.0
_FAILED = 1


class NodeOrder(BaseModel):
    """What a machine is to do."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    training: TrainingJob
    number: int = Field(description="Of this machine; 0 is the flow's own.")
    machines: int
    ranks: int = Field(description="On each of them.")
    rendezvous: str = Field(description="HOST:PORT on machine 0.")
    folder: Path = Field(description="Where the flow runs, for relative paths.")
    token: str = Field(description="Makes names of files that no machine has asked for before.")
    environment: dict[str, str] = Field(default={}, description="Variables of the flow that the ranks need too.")

    @property
    def launch_file(self) -> Path:
        """Where this machine's ranks find their job: the flow looks whether it sees it."""
        return self.training.work_dir / f"launch-{self.token}-{self.number}.json"

    @property
    def torchrun(self) -> tuple[str, ...]:
        """Options of the launcher. Numbers are given, not drawn, so that rank 0 is where the flow is."""
        return (
            f"--nnodes={self.machines}",
            f"--node_rank={self.number}",
            f"--nproc_per_node={self.ranks}",
            "--rdzv_backend=static",
            f"--rdzv_endpoint={self.rendezvous}",
            f"--rdzv_conf=timeout={PATIENCE_SECONDS}",
            f"--rdzv_id={self.token}",
            "--max_restarts=0",
        )


def main(arguments: list[str]) -> int:
    """Obey one order from the standard input, or all that come from an address; returns the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    if arguments:
        _wait_for_orders(arguments[0])
        return 0
    return obey(sys.stdin.buffer.readline(), sys.stdin.buffer, _writer(sys.stdout.buffer))


def obey(line: bytes, life_line: BinaryIO, say: Callable[[str], None]) -> int:
    """Do what an order says, to its end or to the end of its life line.

    Args:
        line: A ``NodeOrder`` as JSON.
        life_line: Nothing comes from it but its end.
        say: Sends a line back: ``READY``, what the ranks print, ``ENDED``.

    Returns:
        The status of the launcher.
    """
    status = _FAILED
    try:
        order = NodeOrder.model_validate_json(line)
        status = _run(order, life_line, say)
    except (CharmError, OSError, ValueError) as error:
        say(f"{socket.gethostname()}: {error}")
    say(f"{ENDED}{status}")
    return status


def _run(order: NodeOrder, life_line: BinaryIO, say: Callable[[str], None]) -> int:
    over = threading.Event()
    threading.Thread(target=_watch, args=(life_line, over), name="watch-flow", daemon=True).start()
    command, environment = _prepare(order)
    say(READY)
    with process_tree(command, environment) as process:
        lines = lines_of(process)

        def pass_on() -> None:
            try:
                while (line := lines.get()) is not None:
                    say(line)
            except OSError:  # nobody listens any more
                over.set()

        # apart from the watch: nobody may be reading, and then it would wait for ever
        passing = threading.Thread(target=pass_on, name="pass-on", daemon=True)
        passing.start()
        while process.poll() is None and not over.is_set():
            over.wait(_POLL_SECONDS)
    passing.join(timeout=5)
    return int(process.returncode)


def _prepare(order: NodeOrder) -> tuple[list[str], dict[str, str]]:
    """Command and environment of the launcher, whose launch file is written."""
    if not order.training.work_dir.is_dir():
        raise ConfigError(
            f"the work folder {order.training.work_dir} is not here: put CHARM_HOME where every machine sees it under the same path"
        )
    os.chdir(order.folder)
    here = rank_count(order.training.config, order.machines)
    if here != order.ranks:
        raise ConfigError(
            f"{here} ranks belong on this machine, but {order.ranks} on the flow's: take machines that are alike, or set training.ranks"
        )
    # Of another machine's process nothing is known here, so the ranks have this one for a parent.
    launch = Launch(training=order.training, parent=identify(os.getpid()))
    write_text(order.launch_file, launch.model_dump_json())
    environment = worker_environment(order.training.config, machines=order.machines) | order.environment
    return worker_command(order.launch_file, order.torchrun), environment


def _watch(life_line: BinaryIO, over: threading.Event) -> None:
    try:
        while life_line.read(1):
            pass
    except OSError as error:  # a connection that breaks is no life line either
        logger.warning("the connection to the flow broke: %s", error)
    over.set()


def _wait_for_orders(address: str) -> None:
    """Obey orders from an address until it says goodbye. A flow that is gone may come back: it is waited for."""
    told = False
    while True:
        try:
            with socket.create_connection(split_address(address), timeout=30) as connection:
                told = False
                if _serve(connection):
                    return
        except OSError as error:
            if not told:
                logger.info("no flow at %s yet (%s); waiting", address, error)
                told = True
        time.sleep(_RETRY_SECONDS)


def _serve(connection: socket.socket) -> bool:
    """Obey the order that comes through a connection; whether it was a goodbye."""
    keep_alive(connection)
    connection.settimeout(None)
    say, receive = _writer(connection.makefile("wb")), connection.makefile("rb")
    try:
        say(socket.gethostname())
        line = receive.readline()
        if line.decode().strip() == GOODBYE:
            return True
        if line:
            obey(line, receive, say)
    finally:
        with suppress(OSError):  # closing alone waits for those who read
            connection.shutdown(socket.SHUT_RDWR)
    return False


def _writer(stream: BinaryIO) -> Callable[[str], None]:
    def say(line: str) -> None:
        stream.write(f"{line}\n".encode())
        stream.flush()

    return say


def keep_alive(connection: socket.socket) -> None:
    """Let a connection whose other machine is gone end within about half a minute."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 30_000)):
        if hasattr(socket, option):  # not everywhere
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def split_address(address: str) -> tuple[str, int]:
    """Host and port of HOST:PORT.

    Raises:
        ConfigError: It is something else.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"{address!r} is no HOST:PORT, such as first-machine:29400")
    return host, int(port)


if __name__ == "__main__":
    finished = main(sys.argv[1:])
    sys.stdout.flush()
    # Not through the interpreter's end: a thread may still read what will never come.
    os._exit(finished)
