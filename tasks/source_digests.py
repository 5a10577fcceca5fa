"""Digests of the user's model files, remembered: a file that has not changed since it was hashed is not read again.

Weights are tens of gigabytes, and a run whose every step is cached would read all of them only to find that out. So the digest of
a file is kept with all that its file system says about the file: size, times, inode, device. If any of it differs the file is
hashed again, as it is if the memo is missing or damaged. The times include that of the last change of the inode, which nobody
can set: a file that was changed and had its date put back is hashed again.

As in git's index, a file that was changed only just now is not remembered: another change within the same tick of its file system's
clock would not show. What a memo cannot notice is a disk that damages a file by itself, and, on a file system that keeps no time of
the last change (FAT), a change in place whose date was put back.

Nothing in the store goes through here: whatever CHARM made is verified byte by byte whenever it is read.
"""

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import BinaryIO

from pydantic import BaseModel, ConfigDict

from charm_core.errors import ArtifactError
from tasks.store import ArtifactStore

logger = logging.getLogger(__name__)

_NOT_WEIGHTS = {"README.md", ".gitattributes"}
_SETTLED_NS = 2_000_000_000
"""No file system's clock ticks more coarsely."""

_memo: ContextVar[ArtifactStore | None] = ContextVar("charm_source_digests", default=None)


class _FileState(BaseModel):
    """What a file system says about a file; it changes with the content."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    size: int
    modified_ns: int
    changed_ns: int
    inode: int
    device: int


class _Remembered(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    state: _FileState
    digest: str


@contextlib.contextmanager
def use_digest_memo(folder: Path) -> Iterator[None]:
    """Remember digests in a folder of this machine while a ``with`` block lasts; without one every file is hashed."""
    token = _memo.set(ArtifactStore(url=str(folder), work_folder=str(folder)))
    try:
        yield
    finally:
        _memo.reset(token)


def weights_digest(folder: Path) -> str:
    """What identifies a model folder of the user's: the names and the content of its files, without what only people read."""
    files = {
        file.name: source_digest(file)
        for file in sorted(folder.iterdir())
        if file.is_file() and file.name not in _NOT_WEIGHTS
    }
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def source_digest(path: Path) -> str:
    """SHA-256 of a user's file, as hexadecimal digits; remembered if the file is settled and ``use_digest_memo`` says where."""
    memo, real = _memo.get(), path.resolve()
    with real.open("rb") as file:
        before, now = _state(file, real), time.time_ns()
        known = _recall(memo, before) if memo else None
        if known is not None:
            return known
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if memo and _is_settled(before, now) and _state(file, real) == before:
            _remember(memo, _Remembered(state=before, digest=digest))
    return digest


def _state(file: BinaryIO, path: Path) -> _FileState:
    """Of the file that is open, whatever has its name by now."""
    found = os.fstat(file.fileno())
    return _FileState(
        path=str(path),
        size=found.st_size,
        modified_ns=found.st_mtime_ns,
        changed_ns=found.st_ctime_ns,
        inode=found.st_ino,
        device=found.st_dev,
    )


def _is_settled(state: _FileState, now_ns: int) -> bool:
    """Whether any change from now on would show in the file's times; times that are yet to come could come again."""
    return max(state.modified_ns, state.changed_ns) < now_ns - _SETTLED_NS


def _recall(memo: ArtifactStore, state: _FileState) -> str | None:
    """The digest of a file in exactly this state, if it is remembered."""
    try:
        known = _Remembered.model_validate_json(memo.read_note(state.path))
    # there is none, or it is damaged or of another version: the file is hashed again
    except (ArtifactError, ValueError):
        return None
    return known.digest if known.state == state else None


def _remember(memo: ArtifactStore, known: _Remembered) -> None:
    """Keep a digest, whole or not at all. That saves time and nothing else: where it is impossible the run goes on."""
    try:
        memo.write_note(known.state.path, known.model_dump_json().encode())
    except ArtifactError as error:
        logger.warning("the next run reads all of %s again: %s", known.state.path, error)
