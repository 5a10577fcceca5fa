"""The store: the same content has the same digest, and what is not whole is not there."""

import hashlib
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest
from pydantic import BaseModel

from charm_core.errors import ArtifactError, ConfigError, TableError
from charm_core.tables import MESSAGES, SCORES
from tasks.store import ArtifactRef, ArtifactStore, SourceFile, read_source, source_file

MANIFEST = ".charm-manifest.json"


class Record(BaseModel):
    number: float
    names: tuple[str, ...] = ()


class OtherRecord(BaseModel):
    title: str


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(url=str(tmp_path / "store"), work_folder=str(tmp_path / "work"))


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[ArtifactStore]:
    import fsspec

    yield ArtifactStore(url=f"memory://{tmp_path.name}", work_folder=str(tmp_path / "work"))
    fsspec.filesystem("memory").store.clear()


def scores(rows: int = 1000) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "prompt_id": [f"p{n % 97:03d}" for n in range(rows)],
            "policy_model": [f"m{n // 97}" for n in range(rows)],
            "score": [n / 7 for n in range(rows)],
        }
    )


def model_folder(folder: Path) -> Path:
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 100)
    (folder / "sub" / "empty").touch()
    return folder


def local(ref: ArtifactRef) -> Path:
    return Path(ref.uri)


def files_below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def everything_matches_its_name(store: ArtifactStore) -> int:
    """Every file under a final name matches the digest in its name; how many there are."""
    final = [path for path in Path(store.url).rglob("*") if path.is_file() and not path.name.endswith(".charm-tmp")]
    for path in final:
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.stem
    return len(final)


class TestDigests:
    def test_the_same_frame_built_differently_has_the_same_digest(self, store: ArtifactStore):
        frame = scores()
        pieces = [frame[start : start + 77] for start in range(0, frame.height, 77)]
        variants = [
            frame,
            pl.concat(pieces, rechunk=False),
            pl.concat([frame, frame])[frame.height :],
            pl.DataFrame({name: frame[name].to_list() for name in frame.columns}),
            pl.from_arrow(frame.to_arrow()),
            frame.with_columns(pl.when(pl.col("score") >= 0).then("score").alias("score")),
        ]
        assert variants[1].n_chunks() > 10
        assert {store.write_frame(variant, "frame").digest for variant in variants} == {  # type: ignore[arg-type]
            store.write_frame(frame, "frame").digest
        }

    def test_a_table_has_one_digest_whatever_the_order_of_its_rows(self, store: ArtifactStore):
        shuffled = scores().sample(fraction=1.0, shuffle=True, seed=3)
        assert store.write_table(shuffled, SCORES).digest == store.write_table(scores(), SCORES).digest

    def test_what_lies_under_a_null_does_not_matter(self, store: ArtifactStore):
        masked = pl.DataFrame({"x": ["a", "hidden"], "keep": [True, False]}).select(
            pl.when("keep").then("x").alias("x")
        )
        assert store.write_frame(masked, "x").digest == store.write_frame(pl.DataFrame({"x": ["a", None]}), "x").digest

    def test_the_digest_is_the_same_in_another_process_with_other_threads_and_hashes(
        self, store: ArtifactStore, tmp_path: Path
    ):
        script = textwrap.dedent("""
            import sys
            import polars as pl
            from tasks.store import ArtifactStore
            store = ArtifactStore(url=sys.argv[1], work_folder=sys.argv[1])
            rows = 70_000
            frame = pl.DataFrame({"t": [str(n % 911) for n in range(rows)], "x": [n / 3 for n in range(rows)]})
            sys.stdout.write(store.write_frame(frame, "frame").digest)
        """)
        digests = {
            subprocess.run(
                [sys.executable, "-c", script, str(tmp_path / threads)],
                env=os.environ
                | {"POLARS_MAX_THREADS": threads, "PYTHONHASHSEED": threads, "PYTHONPATH": str(Path.cwd())},
                check=True,
                capture_output=True,
                text=True,
            ).stdout
            for threads in ("1", "2")
        }
        assert len(digests) == 1
        rows = 70_000
        frame = pl.DataFrame({"t": [str(n % 911) for n in range(rows)], "x": [n / 3 for n in range(rows)]})
        assert digests == {store.write_frame(frame, "frame").digest}

    @pytest.mark.parametrize(
        "other",
        [
            scores().with_columns(pl.col("score") + 1e-12),
            scores().rename({"score": "points"}),
            scores().with_columns(pl.col("score").cast(pl.Float32)),
            scores().reverse(),
            scores()[:-1],
        ],
    )
    def test_other_content_has_another_digest(self, store: ArtifactStore, other: pl.DataFrame):
        assert store.write_frame(other, "frame").digest != store.write_frame(scores(), "frame").digest

    def test_a_folder_is_its_names_and_contents(self, store: ArtifactStore, tmp_path: Path):
        first = store.write_folder(model_folder(tmp_path / "a"), "model")
        assert store.write_folder(model_folder(tmp_path / "b"), "model").digest == first.digest
        (tmp_path / "b" / "config.json").rename(tmp_path / "b" / "Config.json")
        assert store.write_folder(tmp_path / "b", "model").digest != first.digest


class TestReading:
    @pytest.mark.parametrize("name", ["store", "memory"])
    def test_everything_comes_back_as_it_was_written(self, name: str, request: pytest.FixtureRequest, tmp_path: Path):
        store: ArtifactStore = request.getfixturevalue(name)
        table = store.write_table(scores(), SCORES)
        assert (table.kind, table.rows) == ("scores", 1000)
        assert store.read_table(table, SCORES).equals(scores().sort("prompt_id", "policy_model"))
        messages = pl.DataFrame({"m": [[{"role": "user", "content": "ü\0\n"}], []]}, schema={"m": MESSAGES})
        assert store.read_frame(store.write_frame(messages, "messages")).equals(messages)
        record = Record(number=0.1 + 0.2, names=("ä", ""))
        assert store.read_record(store.write_record(record, "record"), Record) == record
        assert store.read_bytes(store.write_bytes(b"", "nothing", ".bin")) == b""
        ref = store.write_folder(model_folder(tmp_path / "model"), "model")
        with store.local_folder(ref) as folder:
            assert files_below(folder) == [MANIFEST, "config.json", "model.safetensors", "sub/empty"]
            assert (folder / "model.safetensors").read_bytes() == bytes(range(256)) * 100
        assert store.is_sound(ref)

    def test_a_table_that_does_not_fit_its_schema_is_refused_before_it_is_written(self, store: ArtifactStore):
        with pytest.raises(TableError, match="NaN"):
            store.write_table(scores().with_columns(score=pl.lit(float("nan"))), SCORES)
        assert not Path(store.url).exists()

    def test_a_record_of_another_form_says_so(self, store: ArtifactStore):
        with pytest.raises(ArtifactError, match=r"(?s)is not a OtherRecord.*another version"):
            store.read_record(store.write_record(Record(number=1), "record"), OtherRecord)

    def test_a_folder_is_not_read_as_a_file(self, store: ArtifactStore, tmp_path: Path):
        with pytest.raises(ArtifactError, match=r"cannot read"):
            store.read_bytes(store.write_folder(model_folder(tmp_path / "model"), "model"))

    def test_an_empty_folder_is_refused(self, store: ArtifactStore, tmp_path: Path):
        (tmp_path / "empty" / "sub").mkdir(parents=True)
        with pytest.raises(ArtifactError, match=r"has no files"):
            store.write_folder(tmp_path / "empty", "model")


DAMAGES = {
    "changed": lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
    "emptied": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


class TestDamage:
    @pytest.mark.parametrize("damage", DAMAGES)
    def test_a_damaged_file_is_an_error_to_read_and_written_again(self, store: ArtifactStore, damage: str):
        ref = store.write_table(scores(), SCORES)
        assert store.is_sound(ref)
        DAMAGES[damage](local(ref))
        assert not store.is_sound(ref)
        with pytest.raises(ArtifactError, match=r"run again"):
            store.read_table(ref, SCORES)
        if damage == "a folder":
            with pytest.raises(ArtifactError, match=r"cannot write"):
                store.write_table(scores(), SCORES)
            return
        assert store.write_table(scores(), SCORES) == ref
        assert store.is_sound(ref)
        assert everything_matches_its_name(store) == 1

    def test_a_sound_file_is_left_alone(self, store: ArtifactStore):
        ref = store.write_table(scores(), SCORES)
        before = local(ref).stat()
        store.write_table(scores(), SCORES)
        after = local(ref).stat()
        assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)

    @pytest.mark.parametrize("damage", ["changed", "truncated", "missing"])
    @pytest.mark.parametrize("name", ["config.json", "model.safetensors", MANIFEST])
    def test_a_damaged_folder_is_an_error_and_written_again(
        self, store: ArtifactStore, tmp_path: Path, name: str, damage: str
    ):
        source = model_folder(tmp_path / "model")
        ref = store.write_folder(source, "model")
        DAMAGES[damage](local(ref) / name)
        assert not store.is_sound(ref)
        with pytest.raises(ArtifactError, match=r"missing or damaged"), store.local_folder(ref):
            pass
        assert store.write_folder(source, "model") == ref
        assert store.is_sound(ref)

    @pytest.mark.parametrize("name", ["store", "memory"])
    def test_a_file_too_many_is_damage(self, name: str, request: pytest.FixtureRequest, tmp_path: Path):
        store: ArtifactStore = request.getfixturevalue(name)
        import fsspec

        source = model_folder(tmp_path / "model")
        ref = store.write_folder(source, "model")
        filesystem, path = fsspec.core.url_to_fs(ref.uri)
        filesystem.pipe_file(f"{path}/model.safetensors.index.json", b"{}")  # would change what a loader loads
        assert not store.is_sound(ref)
        store.write_folder(source, "model")
        assert store.is_sound(ref)
        assert not filesystem.exists(f"{path}/model.safetensors.index.json")

    def test_what_another_process_is_just_writing_is_no_damage(self, store: ArtifactStore, tmp_path: Path):
        source = model_folder(tmp_path / "model")
        ref = store.write_folder(source, "model")
        under_way = local(ref) / ".0123.charm-tmp"
        under_way.write_bytes(b"half")
        assert store.is_sound(ref)
        DAMAGES["missing"](local(ref) / "config.json")
        store.write_folder(source, "model")
        assert under_way.exists()

    def test_a_folder_copied_out_of_a_store_can_be_changed_and_stored(self, store: ArtifactStore, tmp_path: Path):
        ref = store.write_folder(model_folder(tmp_path / "model"), "model")
        with store.local_folder(ref) as folder:
            shutil.copytree(folder, tmp_path / "copy")
        assert store.write_folder(tmp_path / "copy", "model") == ref
        (tmp_path / "copy" / "README.md").write_text("A card.")
        changed = store.write_folder(tmp_path / "copy", "model")
        assert changed.digest != ref.digest
        assert store.is_sound(changed)

    def test_what_a_killed_writer_left_is_no_content(self, store: ArtifactStore, tmp_path: Path):
        source = model_folder(tmp_path / "model")
        ref = store.write_folder(source, "model")
        (source / ".0123.charm-tmp").write_bytes(b"half")
        assert store.write_folder(source, "model") == ref


class TestFailingWrites:
    def test_a_write_that_fails_leaves_nothing(self, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch):
        old = store.write_bytes(b"old", "kept", ".bin")

        def fail(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(ArtifactError, match=r"cannot write .*: No space left on device; free space"):
            store.write_table(scores(), SCORES)
        monkeypatch.undo()
        assert files_below(Path(store.url)) == [local(old).relative_to(store.url).as_posix()]
        assert store.is_sound(store.write_table(scores(), SCORES))

    def test_a_folder_that_fails_half_way_is_not_there(
        self, store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        source = model_folder(tmp_path / "model")
        copied: list[str] = []

        def copy_one(reader: object, writer: object, length: int) -> None:
            if copied:
                raise OSError(5, "Input/output error")
            copied.append("one")

        monkeypatch.setattr(shutil, "copyfileobj", copy_one)
        with pytest.raises(ArtifactError, match=r"Input/output error"):
            store.write_folder(source, "model")
        monkeypatch.undo()
        assert not any(name.endswith(MANIFEST) for name in files_below(Path(store.url)))
        assert store.is_sound(store.write_folder(source, "model"))

    @pytest.mark.parametrize("below", ["", "deeper/"])
    def test_a_store_that_cannot_be_written_fails_at_once(self, tmp_path: Path, below: str):
        (tmp_path / "file").write_text("not a folder")
        store = ArtifactStore(url=str(tmp_path / "file" / below), work_folder=str(tmp_path))
        with pytest.raises(ArtifactError, match=r"cannot write .*Not a directory"):
            store.check_writable()
        with pytest.raises(ArtifactError, match=r"cannot write"):
            store.write_bytes(b"x", "kind", ".bin")
        with pytest.raises(ArtifactError, match=r"cannot write"):
            store.write_step("make-v1-0", b"x")

    def test_the_probe_of_a_writable_store_leaves_no_file(self, store: ArtifactStore):
        store.check_writable()
        assert files_below(Path(store.url)) == []

    def test_a_read_only_folder_fails_at_once(self, tmp_path: Path):
        if os.geteuid() == 0:
            pytest.skip("root writes to read-only folders too")
        (tmp_path / "store").mkdir(mode=0o500)
        with pytest.raises(ArtifactError, match=r"Permission denied"):
            ArtifactStore(url=str(tmp_path / "store"), work_folder=str(tmp_path)).check_writable()

    def test_the_kernel_refusing_the_middle_of_a_file_leaves_nothing(self, store: ArtifactStore):
        context = multiprocessing.get_context("spawn")
        child = context.Process(target=write_beyond_the_limit, args=(store.url,))
        child.start()
        child.join()
        assert child.exitcode == 0
        assert [Path(name).parts[0] for name in files_below(Path(store.url))] == ["kept"]

    def test_a_full_disk(self, tmp_path: Path):
        disk = tmp_path / "disk"
        disk.mkdir()
        mounted = shutil.which("mount") and subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True, check=False
        )
        if not mounted or mounted.returncode:
            pytest.skip(f"cannot mount a small disk: {mounted.stderr.decode().strip() if mounted else 'no mount'}")
        try:
            store = ArtifactStore(url=str(disk / "store"), work_folder=str(tmp_path))
            small = store.write_bytes(b"small", "kept", ".bin")
            with pytest.raises(ArtifactError, match=r"No space left on device"):
                store.write_bytes(random.Random(0).randbytes(200_000), "big", ".bin")
            (tmp_path / "model").mkdir()
            (tmp_path / "model" / "weights").write_bytes(random.Random(0).randbytes(200_000))
            with pytest.raises(ArtifactError, match=r"No space left on device"):
                store.write_folder(tmp_path / "model", "model")
            assert files_below(disk) == [local(small).relative_to(disk).as_posix()]
            assert store.is_sound(small)
        finally:
            subprocess.run(["umount", disk], check=True)


def write_forever(url: str, seed: int) -> None:
    store = ArtifactStore(url=url, work_folder=url)
    source = random.Random(seed)
    while True:
        store.write_bytes(source.randbytes(source.randrange(1, 2_000_000)), "big", ".bin")


def die_while_writing_a_folder(url: str, source: Path, last: str) -> None:
    """Ends just before a file of the folder gets its name."""

    def die(event: str, arguments: tuple[object, ...]) -> None:
        if event == "os.rename" and str(arguments[1]).endswith(f"/{last}"):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(die)
    ArtifactStore(url=url, work_folder=url).write_folder(source, "model")


def write_beyond_the_limit(url: str) -> None:
    store = ArtifactStore(url=url, work_folder=url)
    store.write_bytes(b"small", "kept", ".bin")
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    for write in (
        lambda: store.write_bytes(bytes(300_000), "big", ".bin"),
        lambda: store.write_step("key", bytes(300_000)),
    ):
        with pytest.raises(ArtifactError, match=r"cannot write .*File too large"):
            write()


def write_many(url: str, seed: int, common: int) -> None:
    store = ArtifactStore(url=url, work_folder=url)
    for number in range(common):
        store.write_bytes(f"common {number}".encode() * 1000, "both", ".bin")
        store.write_bytes(f"own {seed} {number}".encode(), "own", ".bin")
        store.write_table(scores(500 + number), SCORES)


class TestProcesses:
    def test_kill_minus_nine_while_writing(self, store: ArtifactStore):
        spawn = multiprocessing.get_context("spawn")
        seen = 0
        for seed in range(4):
            child = spawn.Process(target=write_forever, args=(store.url, seed))
            child.start()
            while everything_matches_its_name(store) <= seen:
                time.sleep(0.001)
            time.sleep(random.Random(seed).random() / 50)
            os.kill(child.pid or 0, signal.SIGKILL)
            child.join()
            seen = everything_matches_its_name(store)
        assert seen >= 4

    @pytest.mark.parametrize("last", ["model.safetensors", "sub/empty", MANIFEST])
    def test_kill_minus_nine_while_writing_a_folder(self, store: ArtifactStore, tmp_path: Path, last: str):
        source = model_folder(tmp_path / "model")
        child = multiprocessing.get_context("spawn").Process(
            target=die_while_writing_a_folder, args=(store.url, source, last)
        )
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        ref = store.write_folder(source, "model")
        # who copies the folder copies what was written, and nothing else
        assert files_below(local(ref)) == sorted([*files_below(source), MANIFEST])

    def test_two_processes_on_one_store(self, store: ArtifactStore):
        context = multiprocessing.get_context("spawn")
        children = [context.Process(target=write_many, args=(store.url, seed, 15)) for seed in range(2)]
        for child in children:
            child.start()
        for child in children:
            child.join()
        assert [child.exitcode for child in children] == [0, 0]
        assert everything_matches_its_name(store) == 15 + 2 * 15 + 15
        assert not list(Path(store.url).rglob("*.charm-tmp"))


class TestStepRecords:
    @pytest.mark.parametrize("name", ["store", "memory"])
    def test_a_record_comes_back_until_it_is_forgotten(self, name: str, request: pytest.FixtureRequest):
        store: ArtifactStore = request.getfixturevalue(name)
        with pytest.raises(ArtifactError, match=r"cannot read"):
            store.read_step("make-v1-0")
        store.write_step("make-v1-0", b"first\nsecond")
        store.write_step("make-v1-0", b'{"a": 1}\n')
        assert store.read_step("make-v1-0") == b'{"a": 1}\n'
        store.forget_step("make-v1-0")
        store.forget_step("make-v1-0")
        with pytest.raises(ArtifactError, match=r"cannot read"):
            store.read_step("make-v1-0")

    @pytest.mark.parametrize("damage", ["changed", "truncated", "longer", "emptied"])
    def test_a_damaged_record_is_an_error(self, store: ArtifactStore, damage: str):
        store.write_step("make-v1-0", b"content")
        DAMAGES[damage](Path(store.step_url("make-v1-0")))
        with pytest.raises(ArtifactError, match=r"damaged"):
            store.read_step("make-v1-0")


class TestSources:
    def source(self, folder: Path, name: str, content: bytes) -> SourceFile:
        path = folder / name
        path.write_bytes(content)
        return source_file(str(path))

    @pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl", "json"])
    def test_every_format_gives_the_same_table(self, tmp_path: Path, suffix: str):
        path = tmp_path / f"table.{suffix}"
        writer = {"jsonl": "write_ndjson"}.get(suffix, f"write_{suffix}")
        getattr(scores(), writer)(path)
        assert read_source(source_file(str(path))).equals(scores())

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("empty.parquet", b""),
            ("text.parquet", b"PAR1 but not really PAR1"),
            ("empty.csv", b""),
            ("latin.csv", "a,b\nü,1\n".encode("latin-1")),
            ("ragged.csv", b"a,b\n1,2,3\n"),
            ("empty.jsonl", b""),
            ("half.jsonl", b'{"a": 1}\n{"a": '),
            ("half.json", b'[{"a": 1}, {'),
            ("number.json", b"3"),
        ],
    )
    def test_malformed_tables_say_which_file(self, tmp_path: Path, name: str, content: bytes):
        with pytest.raises(TableError, match=rf"{name} is not a readable {name.rpartition('.')[2]} table"):
            read_source(self.source(tmp_path, name, content))

    def test_damaged_parquet_is_an_error_of_ours_or_a_table_and_never_a_panic(self, tmp_path: Path):
        scores(5000).write_parquet(tmp_path / "good.parquet")
        good = (tmp_path / "good.parquet").read_bytes()
        chance = random.Random(0)
        refused = 0
        for _ in range(300):
            damaged = bytearray(good)
            for _ in range(3):
                damaged[-chance.randrange(1, 1200)] = chance.randrange(256)
            try:
                read_source(self.source(tmp_path, "damaged.parquet", bytes(damaged)))
            except TableError:
                refused += 1
        assert refused > 100

    @pytest.mark.parametrize("name", ["table.xlsx", "table", "table.PARQUET", "table.pkl"])
    def test_an_unknown_suffix_lists_the_known_ones(self, tmp_path: Path, name: str):
        with pytest.raises(ConfigError, match=r"tables are read from \.parquet, \.csv, \.jsonl, \.json"):
            read_source(self.source(tmp_path, name, b"x"))

    @pytest.mark.parametrize("name", ["missing.csv", "."])
    def test_a_missing_file_says_where_it_was_looked_for(self, tmp_path: Path, name: str):
        with pytest.raises(ConfigError, match=r"there is no file .*working folder"):
            source_file(str(tmp_path / name))

    def test_a_file_that_changes_after_its_key_was_made_is_not_read(self, tmp_path: Path):
        source = self.source(tmp_path, "table.csv", b"a\n1\n")
        (tmp_path / "table.csv").write_bytes(b"a\n2\n")
        with pytest.raises(ConfigError, match=r"table.csv has changed since this run started"):
            read_source(source)
        (tmp_path / "table.csv").unlink()
        with pytest.raises(ConfigError, match=r"cannot read .*table.csv"):
            read_source(source)

    def test_text_that_is_not_utf8_is_refused(self, tmp_path: Path):
        with pytest.raises(ConfigError, match=r"ids.txt is not UTF-8"):
            self.source(tmp_path, "ids.txt", b"\xff").read_text()

    def test_identity_is_content_and_format(self, tmp_path: Path):
        first = self.source(tmp_path, "a.csv", b"a\n1\n")
        assert self.source(tmp_path, "b.csv", b"a\n1\n").identity() == first.identity()
        assert self.source(tmp_path, "a.jsonl", b"a\n1\n").identity() != first.identity()
        assert self.source(tmp_path, "c.csv", b"a\n2\n").identity() != first.identity()
