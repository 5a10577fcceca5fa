"""Which process a run belongs to, so that a later one can tell whether it still runs."""

import os
import socket
from pathlib import Path

from charm_core.reward_model.jobs import ProcessIdentity
from charm_core.reward_model.worker import identify, is_alive

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def process_identity() -> str:
    """Host, boot, number and start of this process: none of them changes with the clock, and no other process has all."""
    me = identify(os.getpid())
    return f"{socket.gethostname()}/{_boot_id()}/{me.pid}:{me.started:.2f}"


def has_ended(identity: str) -> bool:
    """Whether it was a process of this machine and has ended; of another machine's process nothing is known here."""
    host, _, process = identity.partition("/")
    boot, _, started_process = process.partition("/")
    pid, _, started = started_process.partition(":")
    try:
        mine = ProcessIdentity(pid=int(pid), started=float(started))
    except ValueError:  # not written by this module
        return False
    return host == socket.gethostname() and (boot != _boot_id() or not is_alive(mine))


def _boot_id() -> str:
    return _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""
