"""Tables wherever they lie: files, folders in the layouts of ``datasets`` and the hub, and a hub on loopback."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import polars as pl
import pytest

from charm_core.errors import CharmError, ConfigError, TableError
from flows.settings import CHECKOUT
from tasks.store import SourceFile
from tasks.user_tables import SourceDataset, identify_source, read_rows
from tests.hub_server import serve_hub

ROWS = [{"prompt": f"question {n}", "messages": [{"role": "user", "content": f"question {n}"}]} for n in range(3)]
ONE, TWO = "1" * 40, "2" * 40
README = b"""---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*
- config_name: answers
  data_files:
  - split: test
    path: answers.parquet
---
"""


def parquet(rows: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    pl.DataFrame(rows).write_parquet(buffer)
    return buffer.getvalue()


def hub_files(rows: list[dict[str, Any]]) -> dict[str, bytes]:
    return {
        "README.md": README,
        "data/train-00000-of-00002.parquet": parquet(rows[:1]),
        "data/train-00001-of-00002.parquet": parquet(rows[1:]),
        "answers.parquet": parquet([{"prompt": "of the other configuration"}]),
    }


def folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def rows(source: str | Path, **where: Any) -> list[Any]:
    return [row for part in read_rows(identify_source(str(source), **where)) for row in part]


@pytest.fixture
def hub_folder(tmp_path: Path) -> Path:
    return folder(tmp_path / "repository", hub_files(ROWS))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.parquet", parquet(ROWS)),
        ("t.jsonl", "\n".join(json.dumps(row) for row in ROWS).encode() + b"\r\n\n"),
        ("t.json", json.dumps(ROWS).encode()),
    ],
)
def test_files(tmp_path: Path, name: str, content: bytes):
    (tmp_path / name).write_bytes(content)
    assert rows(tmp_path / name) == ROWS
    (tmp_path / "t.csv").write_text("prompt,n\na,1\nb,2\n")
    assert rows(tmp_path / "t.csv") == [{"prompt": "a", "n": 1}, {"prompt": "b", "n": 2}]


def test_json_whose_rows_differ_in_their_fields(tmp_path: Path):
    # as in Arena-Hard's answers, where a content is sometimes a text and sometimes a record
    mixed = [{"content": "text"}, {"content": {"answer": "text"}, "more": 1}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, mixed)))
    assert rows(tmp_path / "t.jsonl") == mixed


def test_a_folder_in_the_layout_of_the_hub(hub_folder: Path):
    assert rows(hub_folder) == ROWS
    assert rows(hub_folder, config="answers", split="test") == [{"prompt": "of the other configuration"}]
    assert rows(hub_folder, split="train[:2]") == ROWS[:2]


def test_a_folder_is_its_content_and_not_its_place(hub_folder: Path, tmp_path: Path):
    def identity(path: Path, **where: Any) -> object:
        source = identify_source(str(path), **where)
        assert isinstance(source, SourceDataset)
        return source.identity()

    same = folder(tmp_path / "copy", hub_files(ROWS) | {".cache/x": b"not content"})
    other = folder(tmp_path / "other", hub_files([*ROWS, ROWS[0]]))
    assert identity(same) == identity(hub_folder)
    assert identity(other) != identity(hub_folder)
    assert identity(hub_folder, config="answers") != identity(hub_folder) != identity(hub_folder, split="test")
    # a second time from another content at the same place: nothing of the first may be left in a cache
    assert len(rows(hub_folder)) == 3
    (hub_folder / "data" / "train-00001-of-00002.parquet").write_bytes(parquet([*ROWS, *ROWS]))
    assert len(rows(hub_folder)) == 7


def test_folders_written_by_datasets(tmp_path: Path):
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk(tmp_path / "one")
    assert rows(tmp_path / "one") == ROWS
    datasets.DatasetDict(train=dataset, test=dataset.select([2, 0])).save_to_disk(tmp_path / "several")
    assert rows(tmp_path / "several", split="test") == [ROWS[2], ROWS[0]]
    with pytest.raises(ConfigError, match=r"no split 'validation', only \['test', 'train'\]"):
        rows(tmp_path / "several", split="validation")


def test_large_sources_come_in_slices(tmp_path: Path):
    many = [{"prompt": str(n)} for n in range(12_000)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, many)))
    (tmp_path / "t.parquet").write_bytes(parquet(many))
    datasets.Dataset.from_list(many).save_to_disk(tmp_path / "saved")
    for name in ("t.jsonl", "t.parquet", "saved"):
        parts = list(read_rows(identify_source(str(tmp_path / name))))
        assert [len(part) for part in parts if part] == [5000, 5000, 2000]
        assert [row for part in parts for row in part] == many


def test_loading_scripts_are_never_run(tmp_path: Path):
    repository = folder(tmp_path / "scripted", {"train.parquet": parquet(ROWS)})
    ran = tmp_path / "ran"
    (repository / "scripted.py").write_text(f"open({str(ran)!r}, 'w')")
    with pytest.raises(ConfigError, match="has a loading script, which is never run"):
        rows(repository)
    assert not ran.exists()


@pytest.mark.parametrize(
    ("files", "where", "error", "message"),
    [
        ({}, {}, ConfigError, "has no files"),
        ({"notes": b"x"}, {}, TableError, "cannot be read as a dataset"),
        ({"train.parquet": b"PAR1PAR1"}, {}, TableError, "cannot be read as a dataset"),
        (
            hub_files(ROWS),
            {"config": "wrong"},
            ConfigError,
            r"no configuration 'wrong': .*Available: \['default', 'answers'\]",
        ),
        (hub_files(ROWS), {"split": "test"}, ConfigError, r"no split 'test': .*Should be one of \['train'\]"),
    ],
)
def test_folders_that_are_no_dataset(
    tmp_path: Path, files: dict[str, bytes], where: dict[str, str], error: type[CharmError], message: str
):
    (tmp_path / "repository").mkdir()
    with pytest.raises(error, match=message):
        rows(folder(tmp_path / "repository", files), **where)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.jsonl", '{"a": 1}\n{"a"', r"t.jsonl, line 2 is not JSON"),
        ("t.jsonl", '{"a": 1}\n[1]', r"t.jsonl, line 2 is list, not a record"),
        ("t.json", '{"a": 1}', "holds dict, not a list of records"),
        ("t.json", "[1]", "entry 1 is int, not a record"),
        ("t.json", "", "is not JSON"),
        ("t.parquet", "", "not a readable parquet table"),
    ],
)
def test_files_that_are_no_table(tmp_path: Path, name: str, content: str, message: str):
    (tmp_path / name).write_text(content)
    with pytest.raises(TableError, match=message):
        rows(tmp_path / name)


@pytest.mark.parametrize(
    ("source", "revision", "message"),
    [
        ("nowhere.jsonl", None, "there is no file 'nowhere.jsonl'"),
        ("data/nowhere.parquet", ONE, "there is no file 'data/nowhere.parquet'"),
        ("/nowhere/at/all", ONE, "there is no file"),
        ("owner/name", None, "set revision to the commit hash of the version you mean, not None"),
        ("owner/name", "main", "set revision to the commit hash of the version you mean, not 'main'"),
    ],
)
def test_sources_that_do_not_exist(source: str, revision: str | None, message: str):
    with pytest.raises(ConfigError, match=message):
        identify_source(source, revision=revision)


def test_a_file_that_changed_is_an_error(tmp_path: Path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"a": 1}')
    source = identify_source(str(path))
    assert isinstance(source, SourceFile)
    path.write_text('{"a": 2}')
    with pytest.raises(ConfigError, match="has changed"):
        list(read_rows(source))


def test_a_folder_that_changed_is_an_error(hub_folder: Path):
    source = identify_source(str(hub_folder))
    (hub_folder / "data" / "train-00001-of-00002.parquet").write_bytes(parquet(ROWS))
    with pytest.raises(ConfigError, match="has changed since this run started"):
        list(read_rows(source))


def from_hub(home: Path, endpoint: str, revision: str, *, name: str = "owner/name", offline: bool = False) -> str:
    """What another process reads from a hub, or its error: the libraries read their settings when they are imported."""
    program = (
        "import json, sys\n"
        "from charm_core.errors import CharmError\n"
        "from tasks.user_tables import identify_source, read_rows\n"
        "try:\n"
        "    source = identify_source(sys.argv[1], revision=sys.argv[2])\n"
        "    sys.stdout.write(json.dumps([row['prompt'] for part in read_rows(source) for row in part]))\n"
        "except CharmError as error:\n"
        "    sys.stdout.write(f'{type(error).__name__}: {error}')\n"
    )
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "PYTHONPATH": str(CHECKOUT)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, name, revision],
        env=environment | ({"HF_HUB_OFFLINE": "1"} if offline else {}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_hub_dataset_is_read_at_its_commit_and_at_no_other(tmp_path: Path):
    nowhere = "http://127.0.0.1:9"
    first, second = ['["question 0", "question 1", "question 2"]', '["question 0", "question 1"]']
    with serve_hub({("owner/name", ONE): hub_files(ROWS), ("owner/name", TWO): hub_files(ROWS[:2])}) as hub:
        unreached = from_hub(tmp_path / "empty", hub, ONE, offline=True)
        assert unreached.startswith(f"ServiceError: owner/name@{ONE} cannot be had from the Hugging Face hub")
        assert "download it where there is a connection and give its folder" in unreached
        assert from_hub(tmp_path, hub, ONE) == first
        assert from_hub(tmp_path, nowhere, ONE, offline=True) == first
        # what datasets does here is to serve the other version, which it has
        refused = from_hub(tmp_path, nowhere, TWO, offline=True)
        assert refused.startswith(f"ServiceError: the hub did not give owner/name at the revision {TWO}")
        assert ONE in refused
        assert from_hub(tmp_path, hub, TWO) == second
        assert from_hub(tmp_path / "empty", hub, "3" * 40).startswith("ConfigError: the hub has no owner/name@3333")
        missing = from_hub(tmp_path / "empty", hub, ONE, name="owner/other")
        assert missing.startswith("ConfigError: the hub has no owner/other@1111")
