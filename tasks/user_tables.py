"""The user's tables wherever they lie: a file, a folder of the ``datasets`` library, or a dataset on the Hugging Face hub.

Each is identified by its content, or on the hub by its commit, and read some rows at a time. No code that comes with a
dataset is ever run: ``datasets`` has given up loading scripts, and nothing here asks for them.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from charm_core.errors import CharmError, ConfigError, ServiceError, TableError
from charm_core.prompt_formats import Row
from tasks.scratch import scratch_folder
from tasks.store import SourceFile, file_digest, read_source, source_file

if TYPE_CHECKING:
    import datasets  # type: ignore[import-untyped]

_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_TABLES = (".parquet", ".csv", ".json", ".jsonl")
_SAVED = ("state.json", "dataset_dict.json")
"""What tells a folder written by ``save_to_disk`` from a folder of data files."""
_SLICE = 5_000
_MESSAGE_LENGTH = 400


class SourceDataset(BaseModel):
    """A split of a dataset. Its identity is its content, or its commit, and which part of it is meant; not where it lies."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str = Field(description="Local folder, or a hub id.")
    revision: str | None = Field(default=None, description="Commit, for a hub id.")
    digest: str = Field(description="Of the names and contents of a folder's files; of a hub dataset, id and commit.")
    config: str | None = None
    split: str = "train"

    def identity(self) -> dict[str, str | None]:
        """What goes into cache keys."""
        return {"digest": self.digest, "config": self.config, "split": self.split}


Source = SourceFile | SourceDataset


def identify_source(
    source: str, *, split: str = "train", config: str | None = None, revision: str | None = None
) -> Source:
    """Identify a user's table.

    Args:
        source: A file, a folder, or a hub id.
        split: Datasets only: which split.
        config: Datasets only: which configuration, if there are several.
        revision: Hub ids only: the commit that is meant.

    Raises:
        ConfigError: There is no such file or folder, or a hub id has no commit: what it stands for could change.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return SourceDataset(path=str(path.resolve()), digest=_folder_digest(path), config=config, split=split)
    if path.exists() or path.suffix in _TABLES or not _HUB_ID.fullmatch(source):
        return source_file(source)
    if not _COMMIT.fullmatch(revision or ""):
        raise ConfigError(
            f"there is no file or folder {source!r}; if it is a dataset on the Hugging Face hub, set revision to the commit hash "
            f"of the version you mean, not {revision!r}"
        )
    return SourceDataset(path=source, revision=revision, digest=f"hub:{source}@{revision}", config=config, split=split)


def read_rows(source: Source) -> Iterator[Sequence[Row]]:
    """The rows of a table, some at a time.

    Raises:
        TableError: It cannot be read as what it is.
        ConfigError: A split or configuration that it does not have, or it has changed since it was identified.
        ServiceError: The hub does not answer.
    """
    if isinstance(source, SourceDataset):
        with _opened(source) as dataset:
            for batch in dataset.with_format("arrow").iter(batch_size=_SLICE):
                yield batch.to_pylist()
    elif Path(source.path).suffix == ".jsonl":
        yield from _json_lines(source)
    elif Path(source.path).suffix == ".json":
        yield _json_records(source)
    else:
        for part in read_source(source).iter_slices(_SLICE):
            yield part.to_dicts()


def _json_lines(source: SourceFile) -> Iterator[list[Row]]:
    rows: list[Row] = []
    for number, line in enumerate(source.read_text().split("\n"), start=1):
        if not line.strip():
            continue
        rows.append(_record(_parsed(line, f"{source.path}, line {number}"), f"{source.path}, line {number}"))
        if len(rows) == _SLICE:
            yield rows
            rows = []
    yield rows


def _json_records(source: SourceFile) -> list[Row]:
    document = _parsed(source.read_text(), source.path)
    if not isinstance(document, list):
        raise TableError(f"{source.path} holds {type(document).__name__}, not a list of records")
    return [_record(value, f"{source.path}, entry {number}") for number, value in enumerate(document, start=1)]


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise TableError(f"{where} is not JSON: {error}") from None


def _record(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise TableError(f"{where} is {type(value).__name__}, not a record with named fields")
    return value


def _folder_digest(folder: Path) -> str:
    files = {
        path.relative_to(folder).as_posix(): file_digest(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }
    if not files:
        raise ConfigError(f"the folder {folder} has no files; correct the path")
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


@contextmanager
def _opened(source: SourceDataset) -> Iterator["datasets.Dataset"]:
    """A dataset that is ready to be read."""
    import datasets  # takes two seconds to import

    if source.revision is None and _folder_digest(Path(source.path)) != source.digest:
        raise ConfigError(f"the folder {source.path} has changed since this run started; run again")
    with scratch_folder("datasets") as cache:
        try:
            if source.revision is not None:
                dataset = datasets.load_dataset(
                    source.path, source.config, split=source.split, revision=source.revision, keep_in_memory=False
                )
                _check_revision(dataset, source)
            elif any(Path(source.path, name).is_file() for name in _SAVED):
                dataset = _of_split(datasets.load_from_disk(source.path), source)
            else:
                # in a cache of its own: that of the user knows a folder by its path and times, not by its content
                dataset = datasets.load_dataset(source.path, source.config, split=source.split, cache_dir=cache)
        except CharmError:
            raise
        except Exception as error:
            raise _explained(source, error) from error
        yield dataset


def _check_revision(dataset: "datasets.Dataset", source: SourceDataset) -> None:
    """Hold what was loaded against what was asked for.

    Where the hub does not answer, ``datasets`` takes the latest version of the dataset that it has ever prepared on this
    machine, whatever revision is asked for, and says so in its log only.

    Raises:
        ServiceError: It is another version.
    """
    versions = sorted({Path(file["filename"]).parent.name for file in dataset.cache_files})
    if versions != [source.revision]:
        raise ServiceError(
            f"the hub did not give {source.path} at the revision {source.revision}, and on this machine there is only "
            f"{', '.join(versions) or 'no copy'}; check the revision and the connection"
        )


def _of_split(saved: "datasets.Dataset | datasets.DatasetDict", source: SourceDataset) -> "datasets.Dataset":
    """What ``save_to_disk`` has written: one split, or several by name."""
    if not isinstance(saved, dict):
        return saved
    if source.split not in saved:
        raise ConfigError(f"{source.path} has no split {source.split!r}, only {sorted(saved)}; set split")
    return saved[source.split]


def _explained(source: SourceDataset, error: Exception) -> CharmError:
    """The error that says what was wrong with a dataset, from what ``datasets`` raised."""
    from datasets.exceptions import DatasetNotFoundError  # type: ignore[import-untyped]
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    what = f"{source.path}@{source.revision}" if source.revision else source.path
    said = " ".join(str(error).split())[:_MESSAGE_LENGTH]
    if isinstance(error, (DatasetNotFoundError, RepositoryNotFoundError, RevisionNotFoundError)):
        return ConfigError(f"the hub has no {what}, or not for you: {said}; correct source and revision, or log in")
    if isinstance(error, RuntimeError) and "scripts" in said:
        return ConfigError(f"{what} has a loading script, which is never run: {said}; give its data files instead")
    if "BuilderConfig" in said or "Config name is missing" in said:
        return ConfigError(f"{what} has no configuration {source.config!r}: {said}; set config")
    if "Unknown split" in said or "Bad split" in said:
        return ConfigError(f"{what} has no split {source.split!r}: {said}; set split")
    if source.revision is not None and isinstance(error, OSError):  # connection errors are
        return ServiceError(
            f"{what} cannot be had from the Hugging Face hub: {said}; connect, or download it where there is a connection and "
            "give its folder as source"
        )
    return TableError(f"{what} cannot be read as a dataset ({type(error).__name__}): {said}")
