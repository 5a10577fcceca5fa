"""The disk fills up, the store becomes read-only, files in it are half written."""

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tasks.ledger import Ledger
from tests.faults.night import Night, requested
from tests.faults.test_killed import STAGES, assert_as_undisturbed, prepare

MiB = 1 << 20


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


@pytest.fixture
def mounted(night: Night) -> Iterator[Callable[[str], None]]:
    """The home on a small file system of its own in memory; a function that mounts it again with other options."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a file system")
    kept = night.folder / "kept"
    night.home.rename(kept)
    night.home.mkdir()
    try:
        mount("-t", "tmpfs", "-o", "size=64m", "charm-night", str(night.home))
    except subprocess.CalledProcessError as error:
        night.home.rmdir()
        kept.rename(night.home)
        pytest.skip(f"no file system can be mounted here: {error.stderr.decode()}")
    try:
        subprocess.run(["cp", "-a", f"{kept}/.", str(night.home)], check=True)
        yield lambda options: mount("-o", f"remount,{options}", str(night.home))
    finally:
        night.clear_up()
        subprocess.run(["umount", str(night.home)], check=True)
        subprocess.run(["rm", "-rf", str(kept)], check=True)


@contextmanager
def full(folder: Path) -> Iterator[None]:
    """Not a byte is left while the block lasts."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"\0" * MiB)
    with filler.open("ab", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"\0")
    try:
        yield
    finally:
        filler.unlink()


@pytest.mark.parametrize("stage", ["training", "evaluating", "packaging"])
def test_the_disk_is_full(night: Night, mounted: Callable[[str], None], undisturbed: Ledger, stage: str):
    again = prepare(night, stage)
    job = night.start(STAGES[stage].point)
    job.halted()
    with full(night.home):
        job.go_on()
        assert job.wait() == 1, job.output()
        assert "cannot be written" in job.output() or "cannot write" in job.output()
        assert "No space left on device" in job.output()
        assert job.no_process_is_left()
        assert not list((night.home / "store").rglob("*.charm-tmp"))
    assert set(night.statuses().values()) <= {"FAILED", "FINISHED"}
    night.finish()
    assert set(night.ran()) <= set(again)
    assert_as_undisturbed(night, undisturbed)
    if stage == "training":
        (log,) = (night.home / "work").glob("train-*/progress/training.log")
        assert log.read_text().count("step 1 of ") == 1  # from the checkpoint that there was room for


def test_the_store_is_read_only_from_the_start(night: Night, mounted: Callable[[str], None], undisturbed: Ledger):
    mounted("ro")
    job = night.start()
    assert job.wait() == 1
    assert "Read-only file system" in job.output()
    assert "make the store writable" in job.output()
    assert night.mlflow_runs() == []  # nothing was begun
    mounted("rw")
    night.finish()
    assert night.ran() == []
    assert_as_undisturbed(night, undisturbed)


def test_the_store_becomes_read_only_in_the_middle(night: Night, mounted: Callable[[str], None], undisturbed: Ledger):
    again = prepare(night, "evaluating")
    job = night.start(requested(r"POST /api/2\.0/mlflow/runs/log-batch"))
    job.halted()
    mounted("ro")
    job.go_on()
    assert job.wait() == 1
    assert "Read-only file system" in job.output()
    assert job.no_process_is_left()
    assert set(night.statuses().values()) == {"FAILED"}
    mounted("rw")
    night.finish()
    assert night.ran() == again
    assert_as_undisturbed(night, undisturbed)


def test_half_written_files_are_put_into_the_store(night: Night, undisturbed: Ledger):
    store = night.home / "store"
    damaged = {}
    for kind, suffix in (("split", ".parquet"), ("offsets", ".json"), ("report", ".html")):
        path = next((store / kind).rglob(f"*{suffix}"))
        damaged[path] = path.read_bytes()
    damaged |= {path: path.read_bytes() for path in [*store.glob("released_model/*/*/model.safetensors")]}
    record = next((store / "steps").glob("compare_styles-*"))
    for path in [*damaged, record, *(store / "notes").iterdir()]:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
    (store / "offsets" / ".half.charm-tmp").write_bytes(b"half")
    night.finish()
    assert night.ran() == sorted(
        ["compare_styles", "compose_report", "fit_model_offsets", "package_model", "split_responses"]
    )
    assert {path: path.read_bytes() for path in damaged} == damaged
    assert_as_undisturbed(night, undisturbed)
