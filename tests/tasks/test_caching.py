"""The cache policy: same content, no work; anything missing or damaged, that step again and no other."""

import enum
import hashlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.states import State
from pydantic import BaseModel, ConfigDict

from charm_core.errors import ArtifactError, ConfigError
from tasks.arena import ArenaConfig, collect_ratings
from tasks.caching import content_key, step, use_store
from tasks.store import ArtifactRef, ArtifactStore, SourceFile

pytestmark = pytest.mark.usefixtures("prefect_session")

REF = ArtifactRef(kind="scores", digest="ab" * 32, uri="/a/b", rows=3, size=9)


class Colour(enum.Enum):
    RED = "red"


class Inner(BaseModel):
    model_config = ConfigDict(frozen=True)

    rate: float = 0.5
    names: tuple[str, ...] = ()


class Outer(BaseModel):
    model_config = ConfigDict(frozen=True)

    inner: Inner = Inner()
    table: ArtifactRef | None = None


class TestKeys:
    def test_the_key_is_golden(self):
        # a change of it makes everybody's finished work unreachable
        inputs = {
            "config": Outer(inner=Inner(names=("ä",)), table=REF),
            "file": SourceFile(path="/anywhere/x.csv", digest="cd" * 32),
            "plain": [1, 2.5, None, True, "x", {"k": (1,)}],
            "day": date(2025, 2, 28),
            "colour": Colour.RED,
        }
        assert (
            content_key("fit", 2, inputs) == "fit-v2-72b521926277fcf7daa7dc1494879d308aaa51f68d01f1220762d5f353a40777"
        )

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            (1, 2),
            (1, 1.0),
            (1, True),
            (1, "1"),
            (None, "None"),
            ("ab", ["a", "b"]),
            ((1, 2), (2, 1)),
            ({"a": 1}, {"a": 2}),
            (Inner(rate=0.5), Inner(rate=0.5000001)),
            (Outer(table=REF), Outer(table=None)),
            (REF, REF.model_copy(update={"digest": "ac" * 32})),
            (REF, REF.model_copy(update={"kind": "ratings"})),
            (SourceFile(path="a.csv", digest="x"), SourceFile(path="a.csv", digest="y")),
            (SourceFile(path="a.csv", digest="x"), SourceFile(path="a.json", digest="x")),
        ],
    )
    def test_other_content_is_another_key(self, one: object, other: object):
        assert content_key("s", 1, {"x": one}) != content_key("s", 1, {"x": other})

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            (SourceFile(path="/home/a/x.csv", digest="x"), SourceFile(path="/b.csv", digest="x")),
            (REF, REF.model_copy(update={"uri": "s3://elsewhere", "rows": None, "size": 0})),
            (Outer(table=REF), Outer(table=REF.model_copy(update={"uri": "memory://"}))),
            ((1, 2), [1, 2]),
            ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
            (
                ArenaConfig(source="/a/board.json", aliases="x", accept_near=("m",)),
                ArenaConfig(source="/b/board.json"),
            ),
        ],
    )
    def test_where_something_lies_is_no_content(self, one: object, other: object):
        assert content_key("s", 1, {"x": one}) == content_key("s", 1, {"x": other})

    def test_the_name_the_version_and_the_parameter_count(self):
        keys = {
            content_key("s", 1, {"x": 1}),
            content_key("t", 1, {"x": 1}),
            content_key("s", 2, {"x": 1}),
            content_key("s", 1, {"y": 1}),
        }
        assert len(keys) == 4

    @pytest.mark.parametrize(
        "value",
        [Path("/x"), pl.DataFrame({"a": [1]}), np.array([1.0]), {1, 2}, b"x", object(), lambda: None, np.float32(1)],
    )
    @pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"deep": [x]}])
    def test_what_has_no_stable_content_is_an_error(self, value: object, wrap: Callable[[object], object]):
        with pytest.raises(ConfigError, match=rf"input 'x' of a step is a {type(value).__name__}.*pass an ArtifactRef"):
            content_key("s", 1, {"x": wrap(value)})

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_numbers_that_equal_nothing_are_an_error(self, value: float):
        with pytest.raises(ConfigError, match=r"step 's' is NaN or infinite"):
            content_key("s", 1, {"x": Inner(rate=value)})

    def test_defaults_and_ways_of_passing_do_not_matter(self):
        @step(version=1)
        def made(store: ArtifactStore, a: int, b: int = 2) -> int:
            return a + b

        assert made.key(1) == made.key(a=1) == made.key(1, b=2) == content_key("made", 1, {"a": 1, "b": 2})


class Made(BaseModel):
    """What the steps of these tests return."""

    model_config = ConfigDict(frozen=True)

    table: ArtifactRef
    note: str
    day: date | None = None


RUNS: list[str] = []


@step(version=1)
def make(store: ArtifactStore, number: int, config: Inner) -> Made:
    RUNS.append("make")
    frame = pl.DataFrame({"x": [number * config.rate]})
    return Made(table=store.write_frame(frame, "made"), note="n", day=date(2025, 2, 28))


@step(version=1)
def double(store: ArtifactStore, made: Made) -> tuple[ArtifactRef, ...]:
    RUNS.append("double")
    frame = store.read_frame(made.table)
    return (store.write_frame(pl.concat([frame, frame]), "doubled"),)


@step(version=1)
def summarise(store: ArtifactStore, doubled: ArtifactRef, other: Made) -> float:
    RUNS.append("summarise")
    return float(store.read_frame(doubled)["x"].sum() + store.read_frame(other.table)["x"].sum())


@step(version=1)
def fail(store: ArtifactStore, number: int) -> int:
    RUNS.append("fail")
    raise ArtifactError(f"cannot do {number}")


@flow
def chain(number: int = 3, rate: float = 0.5) -> float:
    made = make(number, Inner(rate=rate))
    (doubled,) = double(made)
    return summarise(doubled, made)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ArtifactStore]:
    with use_store(ArtifactStore(url=str(tmp_path / "store"), work_folder=str(tmp_path))) as store:
        RUNS.clear()
        yield store


def ran(function: Callable[[], Any]) -> list[str]:
    """Which bodies a call runs."""
    RUNS.clear()
    function()
    return list(RUNS)


def task_states(state: State[Any]) -> dict[str, str]:
    """Names of the tasks' last states, as the server knows them, once it knows them."""
    this_run = FlowRunFilter(id=FlowRunFilterId(any_=[state.state_details.flow_run_id]))
    with get_client(sync_client=True) as client:
        while True:
            runs = client.read_task_runs(flow_run_filter=this_run)
            if len(runs) == 3 and all(run.state is not None and run.state.is_final() for run in runs):
                return {run.name.rpartition("-")[0]: run.state_name or "" for run in runs}
            time.sleep(0.05)


def record(store: ArtifactStore, name: str) -> Path:
    (found,) = Path(store.url, "steps").glob(f"{name}-v1-*")
    return found


class TestReuse:
    def test_the_second_run_does_nothing_and_says_cached(self, store: ArtifactStore):
        first = chain(return_state=True)
        assert list(RUNS) == ["make", "double", "summarise"]
        assert ran(lambda: None) == []
        second = chain(return_state=True)
        assert RUNS == []
        assert first.result() == second.result() == 4.5
        assert task_states(second) == {"make": "Cached", "double": "Cached", "summarise": "Cached"}

    def test_a_result_from_the_cache_is_what_the_step_returned(self, store: ArtifactStore):
        @flow
        def returned() -> Made:
            return make(3, Inner())

        fresh, cached = returned(), returned()
        assert list(RUNS) == ["make"]
        assert cached == fresh
        assert isinstance(cached, Made)

    def test_a_setting_changes_its_descendants_only(self, store: ArtifactStore):
        @flow
        def fork(rate: float) -> float:
            fixed = make(1, Inner())
            (doubled,) = double(make(3, Inner(rate=rate)))
            return summarise(doubled, fixed)

        assert ran(lambda: fork(0.25)) == ["make", "make", "double", "summarise"]
        assert ran(lambda: fork(0.75)) == ["make", "double", "summarise"]
        assert ran(lambda: fork(0.25)) == []

    def test_a_changed_step_with_an_unchanged_result_stops_there(self, store: ArtifactStore):
        chain(number=4, rate=0.5)
        assert ran(lambda: chain(number=2, rate=1.0)) == ["make"]  # 4 × 0.5 = 2 × 1.0

    def test_another_version_runs_again(self, store: ArtifactStore):
        def body(store: ArtifactStore, number: int) -> int:
            RUNS.append("body")
            return number

        @flow
        def call(version: int) -> int:
            return step(version=version)(body)(5)

        assert ran(lambda: call(1)) == ["body"]
        assert ran(lambda: call(1)) == []
        assert ran(lambda: call(2)) == ["body"]
        assert ran(lambda: call(1)) == []

    def test_another_store_knows_nothing(self, store: ArtifactStore, tmp_path: Path):
        chain()
        with use_store(ArtifactStore(url=str(tmp_path / "other"), work_folder=str(tmp_path))):
            assert ran(chain) == ["make", "double", "summarise"]

    def test_a_store_at_a_url(self, tmp_path: Path):
        with use_store(ArtifactStore(url=f"memory://{tmp_path.name}", work_folder=str(tmp_path))) as store:
            assert ran(chain) == ["make", "double", "summarise"]
            assert ran(chain) == []
            import fsspec

            files = fsspec.filesystem("memory")
            files.rm_file(next(name for name in files.find(f"/{tmp_path.name}") if "/doubled/" in name))
            assert ran(chain) == ["double"]
            assert ran(chain) == []
            assert store.url.startswith("memory://")

    def test_a_step_that_raises_leaves_no_record_and_keeps_its_error(self, store: ArtifactStore):
        @flow
        def failing() -> None:
            make(3, Inner())
            fail(7)

        for expected in (["make", "fail"], ["fail"]):
            RUNS.clear()
            with pytest.raises(ArtifactError, match=r"cannot do 7"):
                failing()
            assert expected == RUNS
        assert [path.name.partition("-")[0] for path in Path(store.url, "steps").iterdir()] == ["make"]

    @pytest.mark.parametrize("value", [Path("/x"), pl.DataFrame({"a": [1]}), math.nan])
    def test_an_input_without_stable_content_stops_the_flow(self, store: ArtifactStore, value: object):
        @flow
        def bad() -> object:
            return make(value, Inner())  # type: ignore[arg-type]

        with pytest.raises(ConfigError):
            bad()
        assert RUNS == []

    def test_records_are_text_that_needs_no_unpickling(self, store: ArtifactStore):
        chain()
        for path in Path(store.url, "steps").iterdir():
            digest, _, content = path.read_bytes().partition(b"\n")
            assert digest.decode() == hashlib.sha256(content).hexdigest()
            assert json.loads(content)["metadata"]["serializer"]["type"] == "json"


DAMAGES: dict[str, Callable[[Path], object]] = {
    "deleted": lambda path: path.unlink(),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "corrupted": lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 255]) + path.read_bytes()[1:]),
    "emptied": lambda path: path.write_bytes(b""),
}


class TestDamage:
    @pytest.mark.parametrize(("kind", "maker"), [("made", "make"), ("doubled", "double")])
    def test_a_damaged_file_is_made_again_by_its_step_and_no_other(self, store: ArtifactStore, kind: str, maker: str):
        result = chain()
        (path,) = (file for file in Path(store.url, kind).rglob("*") if file.is_file())
        before = path.read_bytes()
        for name, damage in DAMAGES.items():
            damage(path)
            RUNS.clear()
            assert chain() == result, name
            assert list(RUNS) == [maker], name
            assert path.read_bytes() == before, name

    @pytest.mark.parametrize("step_name", ["make", "double", "summarise"])
    def test_a_damaged_record_is_made_again_by_its_step_and_no_other(self, store: ArtifactStore, step_name: str):
        result = chain()
        for name, damage in DAMAGES.items():
            damage(record(store, step_name))
            RUNS.clear()
            assert chain() == result, name
            assert list(RUNS) == [step_name], name
        assert ran(chain) == []

    def test_one_changed_number_in_a_record_is_damage(self, store: ArtifactStore):
        assert chain() == 4.5
        path = record(store, "summarise")
        content = path.read_bytes()
        assert content.count(b"4.5") == 1
        path.write_bytes(content.replace(b"4.5", b"4.6"))
        assert chain() == 4.5

    def test_a_record_of_an_older_form_is_made_again(self, store: ArtifactStore):
        chain()
        content = store.read_step(record(store, "make").name).replace(b"note", b"memo")
        store.write_step(record(store, "make").name, content)
        assert ran(chain) == ["make"]
        store.write_step(record(store, "make").name, content.replace(b"Made", b"Gone"))
        assert ran(chain) == ["make"]

    def test_all_damage_at_once_is_mended_in_one_run(self, store: ArtifactStore):
        result = chain()
        for path in Path(store.url).rglob("*"):
            if path.is_file():
                path.write_bytes(b"junk")
        assert chain() == result
        assert ran(chain) == []


SCRIPT = """
import sys
from tasks.caching import use_store
from tasks.store import ArtifactStore
from tests.tasks.test_caching import chain

with use_store(ArtifactStore(url=sys.argv[1], work_folder=sys.argv[1])):
    sys.stdout.write(f"result {[chain(number=number) for number in (1, 2)]}")
"""


def test_two_processes_at_once_on_one_store(store: ArtifactStore):
    # the damaged files are found by both, and mended by either
    chain(number=1)
    for path in [*Path(store.url, "made").rglob("*.parquet"), *Path(store.url, "steps").iterdir()]:
        path.write_bytes(b"junk")
    environment = os.environ | {"PYTHONPATH": str(Path.cwd())} | prefect_api()
    children = [
        subprocess.Popen([sys.executable, "-c", SCRIPT, store.url], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [child.communicate()[0] for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert all("result [1.5, 3.0]" in output for output in outputs)
    assert ran(lambda: [chain(number=number) for number in (1, 2)]) == []


def prefect_api() -> dict[str, str]:
    """How a child process finds the server of these tests."""
    from prefect.settings import PREFECT_API_URL

    return {"PREFECT_API_URL": PREFECT_API_URL.value()}


def test_a_source_file_that_moves_is_not_read_again(store: ArtifactStore, tmp_path: Path):
    from tasks.store import source_file

    @flow
    def ratings(name: str) -> int | None:
        return collect_ratings(source_file(str(tmp_path / name)), ArenaConfig(source=name)).ratings.rows

    (tmp_path / "a.csv").write_text("policy_model,rating\nm,1200\n")
    assert ratings("a.csv") == 1
    (tmp_path / "a.csv").rename(tmp_path / "b.csv")
    before = {path.name for path in Path(store.url, "steps").iterdir()}
    assert ratings("b.csv") == 1
    assert {path.name for path in Path(store.url, "steps").iterdir()} == before
    (tmp_path / "b.csv").write_text("policy_model,rating\nm,1200\nn,1000\n")
    assert ratings("b.csv") == 2
