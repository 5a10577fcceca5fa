"""Content-addressed files: what a step makes is written once, named by its digest, and verified whenever it is read.

Big data never passes through Prefect: steps hand on an ``ArtifactRef``. The same content has the same digest, a file is
visible under its final name only when it is complete, and a damaged file is an error or a reason to make it again,
never a result.
"""

import contextlib
import functools
import hashlib
import io
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import polars as pl
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from charm_core.errors import ArtifactError, ConfigError, TableError
from charm_core.tables import TableSchema, validate

MANIFEST = ".charm-manifest.json"
_BLOCK = 1 << 20
_ROW_GROUP = 1 << 16
_TEMPORARY = ".charm-tmp"

Record = TypeVar("Record", bound=BaseModel)


class ArtifactRef(BaseModel):
    """A stored result: what it is, and the digest of its content."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str = Field(description="What it is, for example 'scores'.")
    digest: str = Field(description="SHA-256 of its bytes; of its manifest for a folder.")
    uri: str = Field(description="Where it lies. Not part of its identity.")
    rows: int | None = Field(default=None, description="Rows of a table.")
    size: int = Field(description="Bytes.")


class SourceFile(BaseModel):
    """A file of the user's. Its identity is its content and its format, not its path."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str = Field(description="Local path.")
    digest: str = Field(description="SHA-256 of its bytes.")

    def identity(self) -> dict[str, str]:
        """What goes into cache keys."""
        return {"digest": self.digest, "format": Path(self.path).suffix}

    def read_bytes(self) -> bytes:
        """Its content, which must still be what the cache keys say.

        Raises:
            ConfigError: The file is gone or has changed since it was identified.
        """
        try:
            content = Path(self.path).read_bytes()
        except OSError as error:
            raise ConfigError(f"cannot read {self.path}: {error.strerror}; put the file back and run again") from None
        if hashlib.sha256(content).hexdigest() != self.digest:
            raise ConfigError(f"{self.path} has changed since this run started; run again")
        return content

    def read_text(self) -> str:
        """Its content as UTF-8 text.

        Raises:
            ConfigError: As ``read_bytes``, or it is not UTF-8.
        """
        try:
            return self.read_bytes().decode()
        except UnicodeDecodeError as error:
            raise ConfigError(f"{self.path} is not UTF-8 text: {error}; convert it") from None


class ArtifactStore(BaseModel):
    """A folder of content-addressed files, local or at any fsspec URL."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str = Field(description="Folder path or fsspec URL, for example 's3://bucket/charm'.")
    work_folder: str = Field(description="Local folder for work in progress, such as training checkpoints.")

    def write_table(self, frame: pl.DataFrame, schema: TableSchema) -> ArtifactRef:
        """Validate a table and store it as Parquet."""
        return self.write_frame(validate(frame, schema), schema.name.replace(" ", "_"))

    def write_frame(self, frame: pl.DataFrame, kind: str) -> ArtifactRef:
        """Store a frame of any columns as Parquet, the same bytes for the same content."""
        buffer = io.BytesIO()
        frame.write_parquet(buffer, compression="zstd", compression_level=3, statistics=True, row_group_size=_ROW_GROUP)
        return self.write_bytes(buffer.getvalue(), kind, ".parquet", rows=frame.height)

    def write_record(self, record: BaseModel, kind: str) -> ArtifactRef:
        """Store a pydantic record as JSON."""
        return self.write_bytes(record.model_dump_json(indent=1).encode(), kind, ".json")

    def write_bytes(self, content: bytes, kind: str, suffix: str, *, rows: int | None = None) -> ArtifactRef:
        """Store bytes under their digest; a sound file that is there already is left alone.

        Raises:
            ArtifactError: The store cannot be written (read-only, disk full, ...). Nothing half-written is left.
        """
        digest = hashlib.sha256(content).hexdigest()
        uri = self._uri(kind, digest + suffix)
        ref = ArtifactRef(kind=kind, digest=digest, uri=uri, rows=rows, size=len(content))
        if not self.is_sound(ref):
            with _explained_errors(uri):
                self._put(uri, content)
        return ref

    def write_folder(self, folder: Path, kind: str) -> ArtifactRef:
        """Store a folder of files (a model). Its digest is that of a manifest of names, sizes and file digests."""
        # a folder that was copied out of a store brings that store's manifest along, and what a killed writer left there
        files = sorted(
            path
            for path in folder.rglob("*")
            if path.is_file() and path != folder / MANIFEST and not path.name.endswith(_TEMPORARY)
        )
        if not files:
            raise ArtifactError(f"the folder {folder} to be stored as {kind!r} has no files")
        entries: dict[str, dict[str, Any]] = {
            path.relative_to(folder).as_posix(): {"sha256": file_digest(path), "size": path.stat().st_size}
            for path in files
        }
        manifest = json.dumps(entries, sort_keys=True, indent=1).encode()
        digest = hashlib.sha256(manifest).hexdigest()
        uri = self._uri(kind, digest)
        size = sum(entry["size"] for entry in entries.values())
        ref = ArtifactRef(kind=kind, digest=digest, uri=uri, size=size)
        if not self.is_sound(ref):
            with _explained_errors(uri):
                filesystem, path = fsspec.core.url_to_fs(uri)
                for name in _file_names(filesystem, path) - entries.keys():
                    filesystem.rm_file(f"{path}/{name}")
                for name in entries:
                    self._put_file(f"{uri}/{name}", folder / name, part_of=path)
                # the manifest last: a folder without it is not there yet
                self._put(f"{uri}/{MANIFEST}", manifest, part_of=path)
        return ref

    def read_table(self, ref: ArtifactRef, schema: TableSchema) -> pl.DataFrame:
        """Read a table back, verified against its digest and its schema."""
        return validate(self.read_frame(ref), schema)

    def read_frame(self, ref: ArtifactRef) -> pl.DataFrame:
        """Read a frame back, verified against its digest."""
        return pl.read_parquet(io.BytesIO(self.read_bytes(ref)))

    def read_record(self, ref: ArtifactRef, record: type[Record]) -> Record:
        """Read a pydantic record back, verified against its digest."""
        try:
            return record.model_validate_json(self.read_bytes(ref))
        except ValidationError as error:
            raise ArtifactError(
                f"{ref.uri} is not a {record.__name__}: {error}; it was made by another version"
            ) from None

    def read_bytes(self, ref: ArtifactRef) -> bytes:
        """Read the bytes of a single-file artifact.

        Raises:
            ArtifactError: The file is missing or its content does not match the digest.
        """
        filesystem, path = fsspec.core.url_to_fs(ref.uri)
        try:
            content: bytes = filesystem.cat_file(path)
        except OSError as error:
            raise ArtifactError(
                f"cannot read {ref.uri}: {error}; run again, the step that makes it will be redone"
            ) from None
        if hashlib.sha256(content).hexdigest() != ref.digest:
            raise ArtifactError(
                f"{ref.uri} does not match its digest; run again, the step that makes it will be redone"
            )
        return content

    @contextlib.contextmanager
    def local_folder(self, ref: ArtifactRef) -> Iterator[Path]:
        """A verified local copy of a folder artifact; the folder itself where the store is local.

        A copy of a remote folder stays in the work folder under its digest, so that its path is the same in the next run.
        """
        if not self.is_sound(ref):
            raise ArtifactError(f"{ref.uri} is missing or damaged; run again, the step that makes it will be redone")
        filesystem, path = fsspec.core.url_to_fs(ref.uri)
        if _is_local(filesystem):
            yield Path(path)
            return
        copy = Path(self.work_folder, "copies", ref.digest)
        if not self.is_sound(ref.model_copy(update={"uri": str(copy)})):
            with tempfile.TemporaryDirectory(prefix="charm-", dir=_made(copy.parent)) as folder:
                filesystem.get(f"{path.rstrip('/')}/", f"{folder}/copy/", recursive=True)
                shutil.rmtree(copy, ignore_errors=True)
                Path(folder, "copy").replace(copy)
        yield copy

    def is_sound(self, ref: ArtifactRef) -> bool:
        """Whether the artifact is there and every byte of it matches its digest."""
        filesystem, path = fsspec.core.url_to_fs(ref.uri)
        try:
            if not filesystem.isdir(path):
                return _stream_digest(filesystem, path) == ref.digest
            manifest = filesystem.cat_file(f"{path}/{MANIFEST}")
            if hashlib.sha256(manifest).hexdigest() != ref.digest:
                return False
            entries: dict[str, Any] = json.loads(manifest)
            return _file_names(filesystem, path) == {*entries, MANIFEST} and all(
                _stream_digest(filesystem, f"{path}/{name}") == entry["sha256"] for name, entry in entries.items()
            )
        except OSError:
            return False

    def check_writable(self) -> None:
        """Fail at once if the store cannot be written, rather than after hours.

        Raises:
            ArtifactError: With the reason.
        """
        uri = self._uri("probe", f"{uuid.uuid4().hex}.txt")
        with _explained_errors(uri):
            self._put(uri, b"probe")
            filesystem, path = fsspec.core.url_to_fs(uri)
            filesystem.rm_file(path)

    def step_url(self, key: str) -> str:
        """Where the record of a finished step lies."""
        return f"{self.url.rstrip('/')}/steps/{key}"

    def write_step(self, key: str, content: bytes) -> None:
        """Record a finished step.

        Raises:
            ArtifactError: The store cannot be written.
        """
        self._write_checked(self.step_url(key), content)

    def read_step(self, key: str) -> bytes:
        """The record of a finished step.

        Raises:
            ArtifactError: There is none, or it is damaged.
        """
        return self._read_checked(self.step_url(key))

    def forget_step(self, key: str) -> None:
        """Remove the record of a step, so that it runs again."""
        filesystem, path = fsspec.core.url_to_fs(self.step_url(key))
        with contextlib.suppress(FileNotFoundError):  # another run on this store found it stale at the same time
            filesystem.rm_file(path)

    def write_note(self, name: str, content: bytes) -> None:
        """Keep something under a name, in place of what had that name before.

        Raises:
            ArtifactError: The store cannot be written.
        """
        self._write_checked(self._note_url(name), content)

    def read_note(self, name: str) -> bytes:
        """What was kept under that name.

        Raises:
            ArtifactError: There is nothing, or it is damaged.
        """
        return self._read_checked(self._note_url(name))

    def _note_url(self, name: str) -> str:
        # any name makes a file name
        return f"{self.url.rstrip('/')}/notes/{hashlib.sha256(name.encode()).hexdigest()[:32]}"

    def _write_checked(self, uri: str, content: bytes) -> None:
        """Write a file whose first line is the digest of the rest: its name does not say what is in it."""
        with _explained_errors(uri):
            self._put(uri, hashlib.sha256(content).hexdigest().encode() + b"\n" + content)

    def _read_checked(self, uri: str) -> bytes:
        filesystem, path = fsspec.core.url_to_fs(uri)
        try:
            digest, _, content = filesystem.cat_file(path).partition(b"\n")
        except OSError as error:
            raise ArtifactError(f"cannot read {uri}: {error}; run again") from None
        if hashlib.sha256(content).hexdigest().encode() != digest:
            raise ArtifactError(f"{uri} is damaged; run again, its step will be redone")
        return bytes(content)

    def _uri(self, kind: str, name: str) -> str:
        return f"{self.url.rstrip('/')}/{kind}/{name[:2]}/{name}"

    def _put(self, uri: str, content: bytes, *, part_of: str | None = None) -> None:
        filesystem, path = fsspec.core.url_to_fs(uri)
        if not _is_local(filesystem):
            filesystem.pipe_file(path, content)  # an object store shows an object when it is complete
            return
        with _atomic_file(Path(path), part_of) as file:
            file.write(content)

    def _put_file(self, uri: str, source: Path, *, part_of: str) -> None:
        filesystem, path = fsspec.core.url_to_fs(uri)
        if not _is_local(filesystem):
            filesystem.put_file(str(source), path)
            return
        with source.open("rb") as reader, _atomic_file(Path(path), part_of) as file:
            shutil.copyfileobj(reader, file, _BLOCK)


def source_file(path: str) -> SourceFile:
    """Identify a user's file by its content.

    Raises:
        ConfigError: There is no such file.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(f"there is no file {path!r} (working folder {Path.cwd()}); correct the path")
    return SourceFile(path=str(file.resolve()), digest=file_digest(file))


def read_source(source: SourceFile) -> pl.DataFrame:
    """Read a user's table: Parquet, CSV, JSON lines or a JSON list of records, by its suffix.

    Raises:
        TableError: Not readable as what its suffix says.
        ConfigError: A suffix of no known format, or the file has changed since it was identified.
    """
    path = Path(source.path)
    readers: dict[str, Callable[[io.BytesIO], pl.DataFrame]] = {
        ".parquet": pl.read_parquet,
        ".csv": functools.partial(pl.read_csv, infer_schema_length=None),
        ".jsonl": functools.partial(pl.read_ndjson, infer_schema_length=None),
        ".json": functools.partial(pl.read_json, infer_schema_length=None),
    }
    if path.suffix not in readers:
        raise ConfigError(f"{path} has the suffix {path.suffix!r}; tables are read from {', '.join(readers)}")
    content = io.BytesIO(source.read_bytes())
    try:
        return readers[path.suffix](content)
    # some damaged Parquet files make Polars panic, which is not an Exception
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError, UnicodeDecodeError) as error:
        raise TableError(f"{path} is not a readable {path.suffix[1:]} table: {error}") from None


def file_digest(path: Path) -> str:
    """SHA-256 of a local file's bytes, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def _atomic_file(target: Path, part_of: str | None = None) -> Iterator[io.BufferedWriter]:
    """A file that gets its name when it is complete.

    Args:
        target: Its name.
        part_of: The folder of files that it belongs to. Until it is complete it lies beside that: what a killed writer leaves
            inside, whoever copies the folder would take for a part of it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(part_of or target).with_name(f".{uuid.uuid4().hex}{_TEMPORARY}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    # the rename itself must survive a power cut
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _file_names(filesystem: fsspec.AbstractFileSystem, folder: str) -> set[str]:
    """Files below a folder, without those that are being written."""
    prefix = f"{folder.rstrip('/')}/"
    names = {str(path).removeprefix(prefix) for path in filesystem.find(folder)}
    return {name for name in names if not name.endswith(_TEMPORARY)}


def _stream_digest(filesystem: fsspec.AbstractFileSystem, path: str) -> str:
    digest = hashlib.sha256()
    with filesystem.open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _is_local(filesystem: fsspec.AbstractFileSystem) -> bool:
    return "file" in ((filesystem.protocol,) if isinstance(filesystem.protocol, str) else filesystem.protocol)


@contextlib.contextmanager
def _explained_errors(uri: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ArtifactError(
            f"cannot write {uri}: {error.strerror or error}; free space or make the store writable, then run again: "
            f"finished steps are kept"
        ) from error
