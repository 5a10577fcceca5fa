"""What is written down survives; what is torn is dropped and spoils nothing."""

import multiprocessing
import os
import threading
import time
from pathlib import Path

import pytest

from charm_core.errors import ArtifactError
from charm_core.sampling import Answer
from tasks.answering.journal import Journal


def answer(prompt_id: str, response: str = "x") -> Answer:
    return Answer(prompt_id=prompt_id, response=response, status="complete", response_tokens=1)


def written(folder: Path, *prompt_ids: str) -> Path:
    journal = Journal(folder, "shard")
    with journal.held():
        for prompt_id in prompt_ids:
            journal.append(answer(prompt_id))
    return folder / "shard.jsonl"


def test_what_is_appended_is_read_and_the_last_word_counts(tmp_path: Path):
    journal = Journal(tmp_path / "new" / "folder", "shard")
    assert journal.read() == {}
    texts = ["plain", "two\nlines\r\n", "ä \u2028 \0 \U0001f600", '{"a": 1}', ""]
    with journal.held():
        for number, text in enumerate(texts):
            journal.append(answer(f"p{number}", text))
        journal.append(answer("p0", "again"))
    assert {key: value.response for key, value in journal.read().items()} == {
        "p0": "again",
        **{f"p{number}": text for number, text in enumerate(texts) if number},
    }


def test_every_answer_is_the_systems_at_once(tmp_path: Path):
    journal = Journal(tmp_path, "shard")
    with journal.held():
        for number in range(5):
            journal.append(answer(f"p{number}"))
            assert (tmp_path / "shard.jsonl").read_bytes().count(b"\n") == number + 1


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_torn_line_is_dropped_and_the_next_answer_is_not(tmp_path: Path, cut: int):
    path = written(tmp_path, "p0", "p1")
    path.write_bytes(path.read_bytes()[:-cut])
    journal = Journal(tmp_path, "shard")
    assert set(journal.read()) == {"p0"}
    with journal.held():
        journal.append(answer("p2"))
    assert set(journal.read()) == {"p0", "p2"}


@pytest.mark.parametrize("rubbish", [b"\0\0\0\0\n", b"{}\n", b"null\n", b"\xff\xfe\n", b'{"prompt_id": "p9"}\n'])
def test_a_line_of_rubbish_is_dropped_alone(tmp_path: Path, rubbish: bytes, caplog: pytest.LogCaptureFixture):
    path = written(tmp_path, "p0", "p1")
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + rubbish + second)
    assert set(Journal(tmp_path, "shard").read()) == {"p0", "p1"}
    assert "1 lines that cannot be read; their prompts are asked again" in caplog.text


def hold(folder: Path, ready: "multiprocessing.synchronize.Event") -> None:
    with Journal(folder, "shard").held() as journal:
        ready.set()
        time.sleep(1.0)
        journal.append(answer("theirs"))
        os._exit(0)  # without leaving the block: the lock goes with the process


def test_another_process_is_waited_for_and_a_dead_one_is_not(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=hold, args=(tmp_path, ready))
    process.start()
    ready.wait()
    with Journal(tmp_path, "shard").held() as journal:
        assert set(journal.read()) == {"theirs"}
        journal.append(answer("ours"))
    process.join()
    assert "another run is asking for the same answers" in caplog.text
    assert set(Journal(tmp_path, "shard").read()) == {"theirs", "ours"}


def test_two_threads_take_turns(tmp_path: Path):
    inside, most = [0], [0]

    def work() -> None:
        with Journal(tmp_path, "shard").held() as journal:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0.05)
            journal.append(answer(threading.current_thread().name))
            inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]
    assert len(Journal(tmp_path, "shard").read()) == 5


def test_nothing_is_left_of_a_removed_journal(tmp_path: Path):
    with Journal(tmp_path, "shard").held() as journal:
        journal.append(answer("p0"))
        journal.remove()
        journal.remove()
    assert list(tmp_path.iterdir()) == []
    assert journal.read() == {}


def test_a_folder_that_cannot_be_made_is_an_error_that_says_so(tmp_path: Path):
    (tmp_path / "file").write_text("")
    journal = Journal(tmp_path / "file" / "folder", "shard")
    with pytest.raises(ArtifactError, match=r"cannot write .*choose another work folder"), journal.held():
        pass


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_an_error_that_says_so(tmp_path: Path):
    (tmp_path / "shard.jsonl").symlink_to("/dev/full")
    journal = Journal(tmp_path, "shard")
    journal._file = Path("/dev/full").open("wb", buffering=0)  # noqa: SIM115
    with pytest.raises(ArtifactError, match="No space left on device; free space"):
        journal.append(answer("p0"))
    journal._file.close()
    journal._file = None
