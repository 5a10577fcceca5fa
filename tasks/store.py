"""Content-addressed files: what a step makes is written once, named by its digest, and verified whenever it is read.

Big data never passes through Prefect: steps hand on an ``ArtifactRef``. The same content has the same digest, a file is
visible under its final name only when it is complete, and a damaged file is an error or a reason to make it again,
never a result.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import polars as pl
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from charm_core.errors import ArtifactError
from charm_core.tables import TableSchema, validate

_MANIFEST = "manifest.json"
_BLOCK = 1 << 20
_ROW_GROUP = 1 << 16

Record = TypeVar("Record", bound=BaseModel)


class ArtifactRef(BaseModel):
    """A stored result: what it is, and the digest of its content."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str = Field(description="What it is, for example 'scores'.")
    digest: str = Field(description="SHA-256 of its bytes; of its manifest for a folder.")
    uri: str = Field(description="Where it lies. Not part of its identity.")
    rows: int | None = Field(default=None, description="Rows of a table.")
    size: int = Field(description="Bytes.")


class ArtifactStore(BaseModel):
    """A folder of content-addressed files, local or at any fsspec URL."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str = Field(description="Folder path or fsspec URL, for example 's3://bucket/charm'.")

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
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        if not files:
            raise ArtifactError(f"the folder {folder} to be stored as {kind!r} has no files")
        entries = {
            path.relative_to(folder).as_posix(): {"sha256": file_digest(path), "size": path.stat().st_size}
            for path in files
        }
        manifest = json.dumps(entries, sort_keys=True, indent=1).encode()
        digest = hashlib.sha256(manifest).hexdigest()
        uri = self._uri(kind, digest)
        size = sum(int(entry["size"]) for entry in entries.values())
        ref = ArtifactRef(kind=kind, digest=digest, uri=uri, size=size)
        if not self.is_sound(ref):
            with _explained_errors(uri):
                for name in entries:
                    self._put_file(f"{uri}/{name}", folder / name)
                # the manifest last: a folder without it is not there yet
                self._put(f"{uri}/{_MANIFEST}", manifest)
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
            raise ArtifactError(f"{ref.uri} is not a {record.__name__}: {error}; it was made by another version") from None

    def read_bytes(self, ref: ArtifactRef) -> bytes:
        """Read the bytes of a single-file artifact.

        Raises:
            ArtifactError: The file is missing or its content does not match the digest.
        """
        filesystem, path = fsspec.core.url_to_fs(ref.uri)
        try:
            content: bytes = filesystem.cat_file(path)
        except OSError as error:
            raise ArtifactError(f"cannot read {ref.uri}: {error}; run again, the step that makes it will be redone") from None
        if hashlib.sha256(content).hexdigest() != ref.digest:
            raise ArtifactError(f"{ref.uri} does not match its digest; run again, the step that makes it will be redone")
        return content

    @contextlib.contextmanager
    def local_folder(self, ref: ArtifactRef) -> Iterator[Path]:
        """A verified local copy of a folder artifact; the folder itself where the store is local."""
        if not self.is_sound(ref):
            raise ArtifactError(f"{ref.uri} is missing or damaged; run again, the step that makes it will be redone")
        filesystem, path = fsspec.core.url_to_fs(ref.uri)
        if _is_local(filesystem):
            yield Path(path)
            return
        with tempfile.TemporaryDirectory(prefix="charm-") as folder:
            filesystem.get(f"{path.rstrip('/')}/", f"{folder}/", recursive=True)
            yield Path(folder)

    def is_sound(self, ref: ArtifactRef) -> bool:
        """Whether the artifact is there and every byte of it matches its digest."""
        filesystem, path = fsspec.core.url_to_fs(ref.uri)
        try:
            if not filesystem.isdir(path):
                return _stream_digest(filesystem, path) == ref.digest
            manifest = filesystem.cat_file(f"{path}/{_MANIFEST}")
            if hashlib.sha256(manifest).hexdigest() != ref.digest:
                return False
            entries: dict[str, Any] = json.loads(manifest)
            return all(_stream_digest(filesystem, f"{path}/{name}") == entry["sha256"] for name, entry in entries.items())
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

    def records_url(self) -> str:
        """Where the record of every finished step lies."""
        return f"{self.url.rstrip('/')}/steps"

    def _uri(self, kind: str, name: str) -> str:
        return f"{self.url.rstrip('/')}/{kind}/{name[:2]}/{name}"

    def _put(self, uri: str, content: bytes) -> None:
        filesystem, path = fsspec.core.url_to_fs(uri)
        if not _is_local(filesystem):
            filesystem.pipe_file(path, content)  # an object store shows an object when it is complete
            return
        with _atomic_file(Path(path)) as file:
            file.write(content)

    def _put_file(self, uri: str, source: Path) -> None:
        filesystem, path = fsspec.core.url_to_fs(uri)
        if not _is_local(filesystem):
            filesystem.put_file(str(source), path)
            return
        with source.open("rb") as reader, _atomic_file(Path(path)) as file:
            shutil.copyfileobj(reader, file, _BLOCK)


def file_digest(path: Path) -> str:
    """SHA-256 of a local file's bytes, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _atomic_file(target: Path) -> Iterator[io.BufferedWriter]:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
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
