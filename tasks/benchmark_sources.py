"""Where benchmarks come from: the official datasets on the hub, or local files in the official format."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, create_model, field_validator, model_validator

from charm_core.benchmarks.benchmark import Benchmark, benchmark_texts
from charm_core.benchmarks.catalogue import BENCHMARKS
from charm_core.errors import ConfigError
from charm_core.tables import PROMPTS, RESPONSES
from tasks.caching import step
from tasks.prompts import ResponseSet
from tasks.store import ArtifactRef, ArtifactStore
from tasks.user_tables import Source, identify_source, read_rows

_JSON = (".json", ".jsonl")


class BenchmarkData(BaseModel):
    """Where one benchmark's items are. Without source: the official dataset on the hub, at the revision given."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    source: str | tuple[str, ...] = Field(
        default=(),
        description="Local files or a folder in the official format, or a hub id; default: the official dataset on the hub.",
    )
    revision: str | None = Field(default=None, description="Hub datasets: commit hash of the version that is meant.")
    splits: tuple[str, ...] = Field(default=(), description="Datasets: splits to read; default: the official ones.")

    def sources(self) -> tuple[str, ...]:
        """What was named, if anything."""
        return (self.source,) if isinstance(self.source, str) else self.source


class RmBenchData(BenchmarkData):
    """Where RM-Bench's items are: as of any benchmark, or file by file of its repository."""

    chat: str | None = Field(default=None, description="chat_filtered.json.")
    math: str | None = Field(default=None, description="math_filtered.json.")
    code: str | None = Field(default=None, description="code_filtered.json.")
    safety_refuse: str | None = Field(
        default=None,
        validation_alias=AliasChoices("safety-refuse", "safety_refuse"),
        description="safety-refuse_filtered.json.",
    )
    safety_response: str | None = Field(
        default=None,
        validation_alias=AliasChoices("safety-response", "safety_response"),
        description="safety-response_filtered.json.",
    )

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.files() and (self.source or self.revision or self.splits):
            raise ValueError(f"give RM-Bench by source or by the files {sorted(self.files())}, not both")
        return self

    def files(self) -> dict[str, str]:
        """Files that were named, by RM-Bench's name of the file."""
        names = ("chat", "math", "code", "safety_refuse", "safety_response")
        given = {name.replace("_", "-"): getattr(self, name) for name in names}
        return {name: path for name, path in given.items() if path is not None}


class Resampling(BaseModel):
    """The bootstrap behind the intervals."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    replicates: int = Field(default=1000, ge=2, description="Bootstrap replicates.")
    seed: int = Field(default=0, ge=0, description="Seed of the resampling; all reward models get the same resamples.")
    confidence: float = Field(default=0.95, gt=0, lt=1, description="Coverage of the intervals.")


_SETTINGS = {"rm_bench": RmBenchData}
"""Of benchmarks that can be given in more ways than all can."""

_FIELDS: dict[str, Any] = {
    name: (_SETTINGS.get(name, BenchmarkData) | None, Field(default=None, description=source.about))
    for name, source in BENCHMARKS.items()
}
_EachBenchmark: Any = create_model("_EachBenchmark", **_FIELDS)


class BenchmarksConfig(_EachBenchmark):
    """Which benchmarks reward models are put to, each by where its items are."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    resampling: Resampling = Field(default=Resampling(), description="How intervals are made.")

    @field_validator("rm_bench", mode="before")
    @classmethod
    def _nothing_named(cls, value: Any) -> Any:
        # an empty table, as settings files of earlier versions have it, names nothing
        return None if value == {} else value

    def chosen(self) -> dict[str, BenchmarkData]:
        """The benchmarks that are asked for, in the order of the catalogue."""
        given = {name: getattr(self, name) for name in BENCHMARKS}
        return {name: data for name, data in given.items() if data is not None}


class BenchmarkPart(BaseModel):
    """One file or split of a benchmark."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Source
    domain: str | None = Field(default=None, description="RM-Bench: which of its files this is.")


class StoredBenchmark(BaseModel):
    """A benchmark that was read: its rows as they are in the official format, and its texts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(description="In the catalogue.")
    rows: ArtifactRef
    texts: ResponseSet
    items: int

    def identity(self) -> dict[str, str]:
        """What goes into cache keys: all else follows from the rows."""
        return {"name": self.name, "rows": self.rows.digest}

    def read(self, store: ArtifactStore) -> Benchmark:
        """The benchmark."""
        return BENCHMARKS[self.name].read(_rows(store.read_bytes(self.rows)))


def identify_benchmark(name: str, data: BenchmarkData) -> tuple[BenchmarkPart, ...]:
    """Identify a benchmark's files by content, or its dataset by commit.

    Args:
        name: In the catalogue.
        data: Where its items are.

    Raises:
        ConfigError: There is no such file, no commit for a hub id, or nothing official to fall back on.
    """
    if isinstance(data, RmBenchData) and data.files():
        return tuple(
            BenchmarkPart(source=identify_source(path), domain=domain) for domain, path in sorted(data.files().items())
        )
    official = BENCHMARKS[name]
    named = data.sources() or ((official.hub,) if official.hub else ())
    if not named:
        raise ConfigError(
            f"the official data of {name} is not on the hub: set benchmarks.{name}.source to {official.local}"
        )
    splits = data.splits or official.splits or ("train",)
    return tuple(
        BenchmarkPart(source=source) for one in named for source in _sources(one, splits, data.revision, official.hub)
    )


@step(version=1)
def load_benchmark(store: ArtifactStore, name: str, parts: tuple[BenchmarkPart, ...]) -> StoredBenchmark:
    """Read a benchmark and list the texts that a reward model has to score for it.

    Raises:
        TableError: Rows that are not in the official format.
        ConfigError: A split that a dataset does not have.
        ServiceError: The hub does not answer.
    """
    rows = [_with_domain(row, part.domain) for part in parts for some in read_rows(part.source) for row in some]
    content = "".join(f"{json.dumps(row, default=str)}\n" for row in rows).encode()
    benchmark = BENCHMARKS[name].read(_rows(content))
    prompts, responses = benchmark_texts([benchmark])
    return StoredBenchmark(
        name=name,
        rows=store.write_bytes(content, "benchmark_rows", ".jsonl", rows=len(rows)),
        texts=ResponseSet(
            prompts=store.write_table(prompts, PROMPTS),
            responses=store.write_table(responses, RESPONSES),
            policy_models=(),  # digests of responses stand for them
            empty_responses=responses.get_column("response").str.strip_chars().eq("").sum(),
        ),
        items=len(benchmark.items),
    )


def load_benchmarks(config: BenchmarksConfig) -> tuple[StoredBenchmark, ...]:
    """All benchmarks that are asked for. A file that is missing is found before any is read."""
    parts = {name: identify_benchmark(name, data) for name, data in config.chosen().items()}
    return tuple(load_benchmark(name, found) for name, found in parts.items())


def _sources(named: str, splits: tuple[str, ...], revision: str | None, hub: str | None) -> Iterator[Source]:
    folder = Path(named).expanduser()
    if folder.is_dir() and hub is None:
        files = sorted(path for path in folder.rglob("*") if path.suffix in _JSON and path.is_file())
        if not files:
            raise ConfigError(f"the folder {named!r} has no {' or '.join(_JSON)} files; correct the path")
        yield from (identify_source(str(path)) for path in files)
    elif folder.is_file():
        yield identify_source(named)
    else:
        yield from (identify_source(named, split=split, revision=revision) for split in splits)


def _with_domain(row: Any, domain: str | None) -> dict[str, Any]:
    return dict(row) if domain is None else {**row, "domain": domain}


def _rows(content: bytes) -> Iterator[dict[str, Any]]:
    return (json.loads(line) for line in content.splitlines())
