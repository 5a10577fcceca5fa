"""Answers as they come, one line each, so that an interrupted run goes on with the missing prompts only.

A journal is a file of the work folder that belongs to one shard of one policy model. It is written by one process at a
time, which holds its lock. Every answer is handed to the system at once and brought to disk about once a second, so that a
killed process loses nothing that it had, and a power failure little. A line that was not written to its end is dropped.
"""

import errno
import io
import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import filelock
from pydantic import ValidationError

from charm_core.errors import ArtifactError
from charm_core.sampling import Answer

logger = logging.getLogger(__name__)

SYNC_SECONDS = 1.0


class Journal:
    """The answers of one shard so far. Append only while ``held`` lasts."""

    def __init__(self, folder: Path, key: str) -> None:
        self._path = folder / f"{key}.jsonl"
        self._lock = folder / f"{key}.lock"
        self._file: io.FileIO | None = None
        self._synced = 0.0

    @contextmanager
    def held(self) -> Iterator[Self]:
        """Be the one who writes it; waits while another process is.

        Raises:
            ArtifactError: The work folder cannot be written.
        """
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(self._lock)
            try:
                lock.acquire(timeout=0)
            except filelock.Timeout:
                logger.warning("another run is asking for the same answers (%s); waiting for it", self._path)
                lock.acquire()
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            yield self
        finally:
            self.close()
            if not self._path.exists():
                self._lock.unlink(missing_ok=True)
            lock.release()

    def read(self) -> dict[str, Answer]:
        """The last answer to each prompt, by its id; none where there is no journal."""
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return {}
        *lines, torn = content.split(b"\n")
        answers = [answer for line in lines if (answer := _answer(line)) is not None]
        unreadable = len(lines) - len(answers) + bool(torn)
        if unreadable:
            logger.warning("%s has %d lines that cannot be read; their prompts are asked again", self._path, unreadable)
        return {answer.prompt_id: answer for answer in answers}

    def append(self, answer: Answer) -> None:
        """Write an answer down.

        Raises:
            ArtifactError: It cannot be written: disk full, ...
        """
        try:
            file = self._file or self._open()
            _write(file, json.dumps(answer.model_dump(exclude_none=True)).encode() + b"\n")
            if time.monotonic() - self._synced > SYNC_SECONDS:
                self._sync(file)
        except OSError as error:
            raise self._unwritable(error) from error

    def close(self) -> None:
        """Bring everything to disk and close the file; it is opened again by the next ``append``."""
        if self._file is None:
            return
        file, self._file = self._file, None
        with file:
            try:
                self._sync(file)
            except OSError as error:
                raise self._unwritable(error) from error

    def remove(self) -> None:
        """Delete it: its answers are stored elsewhere. Only while held."""
        self.close()
        self._path.unlink(missing_ok=True)

    def _open(self) -> io.FileIO:
        whole = _whole_lines(self._path)
        # unbuffered: what is written is the system's, and a full disk is met here and not later
        self._file = io.FileIO(self._path, "a")
        # what follows half a line would be lost with it
        self._file.truncate(whole)
        self._synced = time.monotonic()
        return self._file

    def _sync(self, file: io.FileIO) -> None:
        os.fsync(file.fileno())
        self._synced = time.monotonic()

    def _unwritable(self, error: OSError) -> ArtifactError:
        return ArtifactError(
            f"cannot write {self._path}: {error.strerror or error}; free space or choose another work folder, then run again: "
            f"answers are kept"
        )


def _whole_lines(path: Path) -> int:
    """Bytes up to the end of the last whole line."""
    return path.read_bytes().rfind(b"\n") + 1 if path.exists() else 0


def _write(file: io.FileIO, line: bytes) -> None:
    if file.write(line) < len(line):  # a disk that fills up takes what it has room for
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _answer(line: bytes) -> Answer | None:
    try:
        return Answer.model_validate_json(line)
    except ValidationError:
        return None
