"""Temporary folders of processes that were killed are removed, and no others."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks.scratch import remove_abandoned_folders, scratch_folder

SCRIPT = """
from pathlib import Path
from tasks.scratch import scratch_folder
with scratch_folder("post-training") as folder:
    Path(folder, "model").mkdir()
    Path(folder, "model", "weights").write_text("half")
    print(folder, flush=True)
    input()
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def other(temporary: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process that has a scratch folder, and the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "TMPDIR": str(temporary)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        yield process, Path(process.stdout.readline().strip())
        process.kill()


def test_it_is_gone_afterwards(temporary: Path):
    with scratch_folder("scoring") as folder:
        assert folder.is_dir()
        assert folder.parent == temporary
        assert folder.name.startswith(f"charm-scoring-{os.getpid()}@")
    assert not folder.exists()


def test_only_what_a_killed_process_left_is_removed(other: tuple[subprocess.Popen[str], Path], temporary: Path):
    process, folder = other
    with scratch_folder("scoring") as own:
        remove_abandoned_folders()
        assert {own, folder} == set(temporary.iterdir())  # both processes live
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (folder / "model" / "weights").exists()
        elsewhere = temporary / re_hosted(folder.name)
        elsewhere.mkdir()
        foreign = temporary / "charm-scoring-abc@mine"
        foreign.mkdir()
        link = temporary / folder.name.replace("post-training", "release")
        link.symlink_to(foreign)
        remove_abandoned_folders()
        assert {own, elsewhere, foreign, link} == set(temporary.iterdir())
    remove_abandoned_folders()


def re_hosted(name: str) -> str:
    """The name of a folder, as a process on another machine would have given it."""
    *identity, _, random = name.split("@")
    return "@".join([*identity, "another-host", random])
