"""Locks that a second process, or a second thread, waits for, and that die with their process."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from charm_core.errors import ArtifactError
from tasks.device_turns import device_turn, use_cpu_jobs
from tasks.locks import held_alone, one_held

HOLDER = """
import sys
from pathlib import Path
from tasks.locks import held_alone
with held_alone(Path(sys.argv[1]), "waiting"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_it_is_given_back_when_its_process_is_killed(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path, order = tmp_path / "locks" / "a.lock", []
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
    )  # fmt: skip
    assert holder.stdout
    assert holder.stdout.readline() == "held\n"

    def wait() -> None:
        with held_alone(path, "somebody else is at it"):
            order.append("second")

    waiter = threading.Thread(target=wait)
    waiter.start()
    while "somebody else is at it" not in caplog.text:
        assert waiter.is_alive()
    order.append("killed")
    holder.kill()
    waiter.join(60)
    holder.communicate()
    assert order == ["killed", "second"]
    assert not path.exists()


def test_threads_take_turns(tmp_path: Path):
    inside, most = [0], [0]

    def work() -> None:
        for _ in range(20):
            with held_alone(tmp_path / "a.lock", "waiting"):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]


def test_a_lock_that_cannot_be_made_is_an_error_that_says_so(tmp_path: Path):
    (tmp_path / "file").write_text("not a folder")
    with (
        pytest.raises(ArtifactError, match=r"cannot make the lock .*a\.lock"),
        held_alone(tmp_path / "file" / "a.lock", ""),
    ):
        pytest.fail("it was held")


def test_one_of_several_is_free(tmp_path: Path):
    paths = [tmp_path / "0.lock", tmp_path / "1.lock"]
    with one_held(paths, ""), one_held(paths, ""):
        assert all(path.exists() for path in paths)


@pytest.mark.parametrize(
    ("one", "other", "jobs", "waits"),
    [
        (["GPU-a"], ["GPU-a"], None, True),
        (["GPU-a"], ["GPU-b"], None, False),
        (["GPU-b", "GPU-a"], ["GPU-a", "GPU-b"], None, True),
        ([], [], 1, True),
        ([], [], 2, False),
        ([], [], None, False),
        ([], ["GPU-a"], 1, False),
    ],
)
def test_turns_on_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one: list[str], other: list[str], jobs: int | None, waits: bool
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    entered, leave, second = threading.Event(), threading.Event(), threading.Event()

    def first() -> None:
        with use_cpu_jobs(jobs), device_turn(one):
            entered.set()
            leave.wait(60)

    def then() -> None:
        with use_cpu_jobs(jobs), device_turn(other):
            second.set()

    threads = [threading.Thread(target=work) for work in (first, then)]
    threads[0].start()
    assert entered.wait(60)
    threads[1].start()
    assert second.wait(1.0 if waits else 60) is not waits
    leave.set()
    assert second.wait(60)
    for thread in threads:
        thread.join()
