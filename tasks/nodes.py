"""Several machines for one training: which, how they are reached, and how their ranks are watched to their end.

Every machine runs ``tasks.node``, the flow's own too. The flow gives each its order and reads what its ranks print; if one
fails or is lost, the others end, and whatever ends the flow ends all of them.
"""

import logging
import queue
import secrets
import shlex
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from pydantic import BaseModel, ConfigDict, Field

from charm_core import errors
from charm_core.errors import ConfigError, ServiceError, WorkerLostError
from charm_core.reward_model.jobs import TrainingJob
from tasks.node import ENDED, READY, NodeOrder
from tasks.node_lines import free_port, listen, send_home, that_came, through_shell
from tasks.worker_processes import POLL_SECONDS, TAIL_LINES, OnLine, gpu_turn, rank_count, worker_failure

logger = logging.getLogger(__name__)

GRACE_SECONDS = 15.0
"""Between the first machine's failure and the end of the others: theirs may say why, or they may wait for it for ever."""
HANG_UP_SECONDS = 20.0
"""In which machines that were told to end must have done so."""


class NodeSettings(BaseModel):
    """Over which machines a training is spread."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    hosts: tuple[str, ...] = Field(
        min_length=2, description="The machines; this one first, by the name under which the others reach it."
    )
    remote_shell: str = Field(
        default="ssh -o BatchMode=yes -o ServerAliveInterval=15",
        description="Starts a command on a machine, whose name it is given first.",
    )
    port: int | None = Field(
        default=None, description="Where machines come for orders by themselves; none: through the remote shell."
    )
    environment: dict[str, str] = Field(default={}, description="Variables that ranks on the other machines get too.")


def read_hosts(nodes: str) -> tuple[str, ...]:
    """Names of machines from a list with commas, or from a hostfile such as DeepSpeed's.

    Of a line of a hostfile the first word counts; how many ranks a machine gets, ``training.ranks`` decides.

    Raises:
        ConfigError: The file cannot be read, or names a machine twice.
    """
    if "/" in nodes:
        try:
            lines = Path(nodes).expanduser().read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise ConfigError(
                f"the hostfile {nodes} of CHARM_NODES cannot be read: {error.strerror or error}"
            ) from error
        hosts = [words[0] for line in lines if (words := line.partition("#")[0].split())]
    else:
        hosts = [name.strip() for name in nodes.split(",") if name.strip()]
    twice = sorted({name for name in hosts if hosts.count(name) > 1})
    if twice:
        raise ConfigError(
            f"CHARM_NODES names the machine {twice[0]} twice; name each once, ranks are given by training.ranks"
        )
    return tuple(hosts)


_nodes: ContextVar["_Nodes | None"] = ContextVar("charm_nodes", default=None)


@dataclass(frozen=True, kw_only=True)
class _Nodes:
    settings: NodeSettings
    listener: socket.socket | None


@contextmanager
def use_nodes(settings: NodeSettings | None) -> Iterator[None]:
    """Spread trainings over these machines; None: they stay on this one.

    Machines that come by themselves are sent home when the block has ended well. After an error they wait for the next run.

    Raises:
        ConfigError: The first of the machines is not this one.
    """
    if settings is None or _nodes.get() is not None:
        yield
        return
    listener = None if settings.port is None else listen(settings.hosts[0], settings.port)
    token = _nodes.set(_Nodes(settings=settings, listener=listener))
    try:
        yield
        if listener is not None:
            send_home(listener, len(settings.hosts) - 1)
    finally:
        _nodes.reset(token)
        if listener is not None:
            listener.close()


def machine_count() -> int:
    """Over how many machines a training is spread."""
    nodes = _nodes.get()
    return 1 if nodes is None else len(nodes.settings.hosts)


def run_on_nodes(job: TrainingJob, log: OnLine | None, poll: Callable[[], None]) -> None:
    """Run the ranks of a training on all machines to their end.

    Args:
        job: Its folders are seen by every machine.
        log: Called with every line that ranks print, after the name of a machine that is not this one.
        poll: Called about ten times a second.

    Raises:
        WorkerLostError: A process or a machine was lost; run again to go on from the last checkpoint.
        ServiceError: A machine did not take its order.
        CharmError: The training failed; which error, the rank's own report says.
    """
    nodes = _nodes.get()
    if nodes is None:
        raise ConfigError("no machines are named to spread a training over; set CHARM_NODES")
    hosts = nodes.settings.hosts
    order = NodeOrder(
        training=job,
        number=0,
        machines=len(hosts),
        ranks=rank_count(job.config, len(hosts)),
        rendezvous=f"{hosts[0]}:{free_port(hosts[0])}",
        folder=Path.cwd(),
        token=secrets.token_hex(4),
        environment=nodes.settings.environment,
    )
    with gpu_turn(order.ranks), ExitStack() as stack:
        stack.callback(_forget_launch_files, job.work_dir)
        lines: _Lines = queue.Queue()
        machines = [
            stack.enter_context(_machine(nodes, order.model_copy(update={"number": number}), lines, poll))
            for number in range(len(hosts))
        ]
        failed = _watch(machines, lines, log, poll)
    if failed:
        raise _failure(failed, machines, job.work_dir)


_Lines = queue.Queue[tuple[int, str | None]]
"""What machines print, by their number; None at the end."""


@dataclass(kw_only=True)
class _Machine:
    """One of the machines while it works."""

    order: NodeOrder
    name: str
    hang_up: Callable[[], None]
    ready: bool = False
    listening: bool = True
    """Whether more may come from it."""
    status: int | None = None
    """Of its launcher, once that has ended."""
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=TAIL_LINES))

    @property
    def failed(self) -> bool:
        """Whether it has ended, and not well."""
        return not self.listening and self.status != 0

    def take(self, line: str | None, log: OnLine | None) -> None:
        """Take in a line of its output.

        Raises:
            ConfigError: It does not see the work folder.
        """
        if line is None:
            self.listening = False
        elif line == READY:
            self.ready = True
            if not self.order.launch_file.exists():
                raise ConfigError(
                    f"what the machine {self.name} writes to {self.order.training.work_dir} is not seen here: put CHARM_HOME on a file "
                    "system that every machine shares"
                )
        elif line.startswith(ENDED):
            self.status = int(line.removeprefix(ENDED))
        else:
            shown = f"[{self.name}] {line}" if self.order.number else line
            self.tail.append(shown)
            if log is not None:
                log(shown)


def _watch(machines: Sequence[_Machine], lines: _Lines, log: OnLine | None, poll: Callable[[], None]) -> list[_Machine]:
    """Pass on what the machines print until all have ended, or one has failed; then end the others. Those that failed."""
    deadline: float | None = None
    try:
        while any(machine.listening for machine in machines) and (deadline is None or time.monotonic() < deadline):
            with suppress(queue.Empty):
                number, line = lines.get(timeout=POLL_SECONDS)
                machines[number].take(line, log)
            poll()
            if deadline is None and any(machine.failed for machine in machines):
                deadline = time.monotonic() + GRACE_SECONDS
        return [machine for machine in machines if machine.failed]
    finally:
        for machine in machines:
            machine.hang_up()
        _await_silence(machines, lines)


def _await_silence(machines: Sequence[_Machine], lines: _Lines) -> None:
    """Wait until no machine works any more: another try must not meet ranks of this one."""
    working = {number for number, machine in enumerate(machines) if machine.listening}
    deadline = time.monotonic() + HANG_UP_SECONDS
    while working and time.monotonic() < deadline:
        with suppress(queue.Empty):
            number, line = lines.get(timeout=POLL_SECONDS)
            if line is None:
                working.discard(number)
    for number in sorted(working):
        logger.warning("the machine %s does not say that its processes have ended", machines[number].name)


def _failure(failed: Sequence[_Machine], machines: Sequence[_Machine], folder: Path) -> errors.CharmError:
    tail = [line for machine in machines for line in machine.tail]
    absent = [machine for machine in failed if not machine.ready]
    if absent:
        return ServiceError(
            f"the machine {absent[0].name} did not take its part in the training: see that `python -m tasks.node` starts there\n"
            + "\n".join(absent[0].tail)
        )
    lost = [machine.name for machine in failed if machine.status is None]
    if lost:
        return WorkerLostError(
            f"the machine {', '.join(lost)} was lost; run again: finished steps are kept, and a training goes on from its last "
            "checkpoint\nThe end of its log:\n" + "\n".join(tail)
        )
    return worker_failure([machine.status for machine in failed if machine.status], folder, tail)


@contextmanager
def _machine(nodes: _Nodes, order: NodeOrder, lines: _Lines, poll: Callable[[], None]) -> Iterator[_Machine]:
    """A machine that has its order; its processes have ended when the block is left, or it is lost."""
    host = nodes.settings.hosts[order.number]
    if order.number and nodes.listener is not None:
        reached = that_came(nodes.listener, order, poll)
    else:
        reached = through_shell(shlex.split(nodes.settings.remote_shell) if order.number else [], host, order)
    with reached as line:
        for said in line.heard:
            lines.put((order.number, said))
        reader = threading.Thread(target=_read, args=(line.stream, order.number, lines), name=f"read-{line.name}")
        reader.daemon = True
        reader.start()
        yield _Machine(order=order, name=line.name, hang_up=line.hang_up)


def _read(stream: TextIO, number: int, lines: _Lines) -> None:
    try:
        for line in stream:
            lines.put((number, line.rstrip("\n")))
    except (OSError, ValueError) as error:  # it broke, or was closed meanwhile
        logger.debug("the output of machine %d ended: %s", number, error)
    finally:
        lines.put((number, None))


def _forget_launch_files(work_dir: Path) -> None:
    for file in work_dir.glob("launch-*-*.json"):
        file.unlink(missing_ok=True)
