"""Whose turn it is on a device: two runs that train on one GPU at once would both run out of its memory."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from pathlib import Path

from tasks.locks import one_held

_cpu_jobs: ContextVar[int | None] = ContextVar("charm_cpu_jobs", default=None)


@contextmanager
def use_cpu_jobs(most: int | None) -> Iterator[None]:
    """Without a GPU, let at most so many model processes of this machine run at a time; None: any number."""
    token = _cpu_jobs.set(most)
    try:
        yield
    finally:
        _cpu_jobs.reset(token)


@contextmanager
def device_turn(gpus: Sequence[str]) -> Iterator[None]:
    """Wait until the devices are free of other runs of the same user on this machine, and hold them.

    Args:
        gpus: Their ids; empty: the processors.

    Raises:
        ArtifactError: The locks cannot be made.
    """
    folder = Path(tempfile.gettempdir(), f"charm-devices-{os.getuid()}")
    most = _cpu_jobs.get()
    with ExitStack() as held:
        for gpu in sorted(gpus):  # in one order: two runs never wait for each other
            held.enter_context(one_held([folder / f"{gpu}.lock"], f"another run uses the GPU {gpu}; waiting for it"))
        if not gpus and most is not None:
            slots = [folder / f"cpu-{number}.lock" for number in range(most)]
            waiting = f"{most} other model processes are running, as many as CHARM_CPU_JOBS allows; waiting"
            held.enter_context(one_held(slots, waiting))
        yield
