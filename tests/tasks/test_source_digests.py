"""A remembered digest is the digest: whatever happens to the file, to the memo or at the same time, never an earlier one."""

import contextlib
import hashlib
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from charm_core.reward_model.spec import RewardModelSpec
from tasks import source_digests
from tasks.answering.policy_model_refs import identify_policy_model
from tasks.policy_models import PolicyModel, TransformersBackend
from tasks.scoring import identify_reward_model
from tasks.source_digests import source_digest, use_digest_memo
from tests.charm_core.reward_model.kinds import save_classifier

REAL_TIME, REAL_DIGEST = time.time_ns, hashlib.file_digest
LATER_NS = 3_000_000_000


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every file whose content is read, in order."""
    files: list[Path] = []

    def digest(file, name):
        files.append(Path(file.name))
        return REAL_DIGEST(file, name)

    monkeypatch.setattr(source_digests.hashlib, "file_digest", digest)
    return files


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a while since the test's files were made."""
    monkeypatch.setattr(source_digests.time, "time_ns", lambda: REAL_TIME() + LATER_NS)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"a" * 1000)
    return file


def true_digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def memos(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.usefixtures("later")
class TestAFileThatHasNotChanged:
    def test_is_not_read_again(self, weights: Path, tmp_path: Path, hashed: list[Path]):
        for _ in range(3):
            with use_digest_memo(tmp_path / "memo"):
                assert source_digest(weights) == true_digest(weights)
        assert hashed == [weights]

    def test_is_read_again_where_nothing_is_remembered(self, weights: Path, hashed: list[Path]):
        assert source_digest(weights) == source_digest(weights) == true_digest(weights)
        assert hashed == [weights, weights]

    def test_is_known_by_a_link_too(self, weights: Path, tmp_path: Path, hashed: list[Path]):
        """A folder of the hub's cache holds links to its files."""
        link = tmp_path / "link"
        link.symlink_to(weights)
        with use_digest_memo(tmp_path / "memo"):
            assert source_digest(link) == source_digest(weights)
            other = tmp_path / "other"
            other.write_bytes(b"b" * 1000)
            link.unlink()
            link.symlink_to(other)
            assert source_digest(link) == true_digest(other)
        assert hashed == [weights, other]


@pytest.mark.usefixtures("later")
class TestAFileThatHasChanged:
    @pytest.fixture(params=["written in place", "replaced", "replaced by an older file"])
    def changed(self, request: pytest.FixtureRequest, weights: Path, tmp_path: Path) -> Path:
        """Other content of the same size, with the date that the file had before, after its digest is remembered."""
        other = tmp_path / "other"
        other.write_bytes(b"c" * 1000)
        with use_digest_memo(tmp_path / "memo"):
            source_digest(weights)
        dates = weights.stat()
        time.sleep(0.02)  # longer than a tick of any clock here; within one, a file is not remembered: see below
        if request.param == "written in place":
            weights.write_bytes(b"b" * 1000)
        elif request.param == "replaced":
            (tmp_path / "new").write_bytes(b"b" * 1000)
            (tmp_path / "new").replace(weights)
        else:
            other.replace(weights)
        os.utime(weights, ns=(dates.st_atime_ns, dates.st_mtime_ns))
        assert (weights.stat().st_size, weights.stat().st_mtime_ns) == (dates.st_size, dates.st_mtime_ns)
        return weights

    def test_is_read_again_though_its_size_and_date_are_those_of_before(self, changed: Path, tmp_path: Path):
        with use_digest_memo(tmp_path / "memo"):
            assert source_digest(changed) == true_digest(changed) != hashlib.sha256(b"a" * 1000).hexdigest()

    @pytest.mark.parametrize("field", ["path", "size", "modified_ns", "changed_ns", "inode", "device"])
    def test_everything_that_the_file_system_says_counts(
        self, weights: Path, tmp_path: Path, hashed: list[Path], monkeypatch: pytest.MonkeyPatch, field: str
    ):
        state = source_digests._state
        with use_digest_memo(tmp_path / "memo"):
            source_digest(weights)
            monkeypatch.setattr(
                source_digests,
                "_state",
                lambda *of: state(*of).model_copy(update={field: "/other" if field == "path" else 7}),
            )
            assert source_digest(weights) == true_digest(weights)
        assert len(hashed) == 2


def test_a_file_that_was_changed_just_now_is_not_remembered(weights: Path, tmp_path: Path, hashed: list[Path]):
    with use_digest_memo(tmp_path / "memo"):
        assert source_digest(weights) == source_digest(weights) == true_digest(weights)
    assert hashed == [weights, weights]


def test_a_file_from_the_future_is_not_remembered(
    weights: Path, tmp_path: Path, hashed: list[Path], monkeypatch: pytest.MonkeyPatch
):
    """The clock was set back: the file's times come once more."""
    monkeypatch.setattr(source_digests.time, "time_ns", lambda: REAL_TIME() - 3600 * LATER_NS)
    with use_digest_memo(tmp_path / "memo"):
        assert source_digest(weights) == source_digest(weights)
    assert hashed == [weights, weights]


@pytest.mark.usefixtures("later")
def test_a_file_that_changes_while_it_is_read_is_not_remembered(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def digest_and_change(file, name):
        found = REAL_DIGEST(file, name)
        weights.write_bytes(b"b" * 1001)
        return found

    with use_digest_memo(tmp_path / "memo"):
        with monkeypatch.context() as meanwhile:
            meanwhile.setattr(source_digests.hashlib, "file_digest", digest_and_change)
            source_digest(weights)
        assert memos(tmp_path / "memo") == []
        assert source_digest(weights) == true_digest(weights)


@pytest.mark.usefixtures("later")
class TestAMemo:
    @pytest.mark.parametrize(
        "damage",
        [
            lambda content: b"",
            lambda content: content[: len(content) // 2],
            lambda content: content.replace(hashlib.sha256(b"a" * 1000).hexdigest().encode(), b"0" * 64),
            lambda content: bytes([content[0] ^ 1]) + content[1:],
            lambda content: b"\xff" * len(content),
            lambda content: hashlib.sha256(b"{}").hexdigest().encode() + b"\n{}",
        ],
        ids=["empty", "cut", "another digest", "a flipped bit", "no text", "of another version"],
    )
    def test_that_is_damaged_is_not_believed_and_is_made_again(
        self, weights: Path, tmp_path: Path, hashed: list[Path], damage
    ):
        with use_digest_memo(tmp_path / "memo"):
            source_digest(weights)
            (memo,) = memos(tmp_path / "memo")
            whole = memo.read_bytes()
            memo.write_bytes(damage(whole))
            assert memo.read_bytes() != whole
            assert source_digest(weights) == true_digest(weights)
            assert memo.read_bytes() == whole
            source_digest(weights)
        assert hashed == [weights, weights]

    def test_that_cannot_be_written_costs_time_and_nothing_else(
        self, weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ):
        (tmp_path / "file").write_text("no folder can be made here, whoever tries")
        with caplog.at_level(logging.WARNING), use_digest_memo(tmp_path / "file" / "memo"):
            assert source_digest(weights) == source_digest(weights) == true_digest(weights)
        assert f"the next run reads all of {weights} again" in caplog.text

    def test_in_a_folder_that_may_not_be_written_is_still_read(
        self, weights: Path, tmp_path: Path, hashed: list[Path], monkeypatch: pytest.MonkeyPatch
    ):
        with use_digest_memo(tmp_path / "memo"):
            source_digest(weights)
            with monkeypatch.context() as read_only:
                read_only.setattr(Path, "open", _refuse_to_write(Path.open))
                assert source_digest(weights) == true_digest(weights)
        assert hashed == [weights]


def _refuse_to_write(real):
    def open_(path, mode="r", *args, **options):
        if set(mode) & set("wax+"):
            raise OSError(30, "Read-only file system")
        return real(path, mode, *args, **options)

    return open_


@pytest.mark.usefixtures("later")
def test_a_models_identity_is_the_same_with_and_without_a_memo(tmp_path: Path, hashed: list[Path]):
    folder = save_classifier(tmp_path / "rm")
    spec = RewardModelSpec(path=str(folder))
    policy = PolicyModel(name="p", backend=TransformersBackend(path=str(folder)))
    plain = identify_reward_model(spec), identify_policy_model(policy)
    with use_digest_memo(tmp_path / "memo"):
        assert (identify_reward_model(spec), identify_policy_model(policy)) == plain
        hashed.clear()
        assert (identify_reward_model(spec), identify_policy_model(policy)) == plain
    assert hashed == []
    assert plain[0].digest == plain[1].weights


READER = """
import hashlib, sys, time
from pathlib import Path
from tasks import source_digests

source_digests._SETTLED_NS = 100_000_000  # still many ticks of the clock, and something is remembered in this short time
file, memo, seconds = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
recalled, recall = 0, source_digests._recall
def counted(*of):
    global recalled
    found = recall(*of)
    recalled += found is not None
    return found
source_digests._recall = counted
print("ready", flush=True)
sys.stdin.readline()
end = time.monotonic() + seconds
with source_digests.use_digest_memo(memo):
    while time.monotonic() < end:
        first = int(file.read_bytes())
        digest = source_digests.source_digest(file)
        last = int(file.read_bytes())
        possible = {hashlib.sha256(b"%012d" % number).hexdigest() for number in range(first, last + 1)}
        assert digest in possible, f"a digest of neither {first} nor {last} nor of what came between"
print(recalled)
"""


def test_processes_at_once_never_get_the_digest_of_an_earlier_content(tmp_path: Path):
    """One memo, several readers, and a file that is replaced all the time, with the same size and date."""
    file = tmp_path / "model.safetensors"

    def replace(number: int) -> None:
        new = tmp_path / "new"
        new.write_bytes(b"%012d" % number)
        os.utime(new, ns=(0, 0))
        new.replace(file)

    replace(0)
    command = [sys.executable, "-c", READER, str(file), str(tmp_path / "memo"), "2"]
    with contextlib.ExitStack() as ends:
        readers = [ends.enter_context(ended(command)) for _ in range(3)]
        for reader in readers:
            assert reader.stdout.readline() == "ready\n"
        for reader in readers:
            reader.stdin.write("\n")
            reader.stdin.flush()
        number = 0
        while any(reader.poll() is None for reader in readers):
            number += 1
            replace(number)
            time.sleep(0.4 if number % 10 == 0 else 0.002)  # now and then long enough to be remembered
        for reader in readers:
            out, err = reader.communicate()
            assert reader.returncode == 0, err
            assert int(out) > 0, "nothing was ever remembered, so this shows nothing"


@contextlib.contextmanager
def ended(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A process that is gone afterwards."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.kill()
