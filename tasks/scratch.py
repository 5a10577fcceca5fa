"""Temporary folders that say in their names whose they are: what a killed process leaves is removed by the next run here."""

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tasks.process_identity import has_ended, process_identity

_NAME = re.compile(r"charm-[a-z-]+-(?P<pid>\d+)@(?P<started>[\d.]+)@(?P<boot>[^@]*)@(?P<host>[^@]+)@[^@]+")


@contextlib.contextmanager
def scratch_folder(purpose: str) -> Iterator[Path]:
    """A new folder below the system's temporary folder, which is gone afterwards.

    Args:
        purpose: What for, in small letters and dashes; its name begins with that.
    """
    host, boot, process = process_identity().split("/")
    pid, started = process.split(":")
    with tempfile.TemporaryDirectory(prefix=f"charm-{purpose}-{pid}@{started}@{boot}@{host}@") as name:
        yield Path(name)


def remove_abandoned_folders() -> None:
    """Remove the folders of this user's processes that have ended on this machine without doing so."""
    for folder in Path(tempfile.gettempdir()).glob("charm-*@*"):
        found = _NAME.fullmatch(folder.name)
        if found is None or not has_ended("{host}/{boot}/{pid}:{started}".format(**found.groupdict())):
            continue
        with contextlib.suppress(FileNotFoundError):  # another run removes it too
            if not folder.is_symlink() and folder.stat().st_uid == os.geteuid():
                # a worker that has just lost its parent may still write; then the next run removes the rest
                shutil.rmtree(folder, ignore_errors=True)
