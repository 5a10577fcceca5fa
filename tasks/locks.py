"""One at a time: locks on files, which the system gives back when a process ends, however it ends.

No clock decides who holds a lock, so none that is put back can break one.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock

from charm_core.errors import ArtifactError

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.2


@contextmanager
def held_alone(path: Path, waiting: str) -> Iterator[None]:
    """Hold the lock of a file, which is gone afterwards; waits while somebody else holds it.

    Args:
        path: The lock file.
        waiting: What to say where that takes a while.

    Raises:
        ArtifactError: It cannot be made.
    """
    lock = _first_free([path], waiting)
    try:
        yield
    finally:
        with suppress(OSError):  # the folder may have become read-only
            path.unlink()  # one who waits for it finds that it has no name any more, and makes another
        lock.release()


@contextmanager
def one_held(paths: Sequence[Path], waiting: str) -> Iterator[None]:
    """Hold one of several locks, whichever is free first.

    Args:
        paths: The lock files; they stay.
        waiting: What to say where that takes a while.

    Raises:
        ArtifactError: They cannot be made.
    """
    lock = _first_free(paths, waiting)
    try:
        yield
    finally:
        lock.release()


def _first_free(paths: Sequence[Path], waiting: str) -> filelock.BaseFileLock:
    told = False
    while True:
        for path in paths:
            if (lock := _taken(path)) is not None:
                return lock
        if not told:
            logger.warning("%s", waiting)
            told = True
        time.sleep(_POLL_SECONDS)


def _taken(path: Path) -> filelock.BaseFileLock | None:
    lock = filelock.FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except filelock.Timeout:
        return None
    except OSError as error:
        raise ArtifactError(
            f"cannot make the lock {path}: {error.strerror or error}; free space or make the folder writable, then run "
            f"again: finished steps are kept"
        ) from error
    return lock
