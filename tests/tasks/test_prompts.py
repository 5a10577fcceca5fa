"""Responses steps: read them, split the prompts, take the part that is asked for."""

from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest
from prefect import flow

from charm_core.errors import CharmError, ConfigError, TableError
from charm_core.responses import CALIBRATION, HELD_OUT, ColumnNames, SplitConfig
from charm_core.tables import PROMPTS, RESPONSES
from tasks.caching import use_store
from tasks.prompts import ResponsesConfig, ResponseSet, load_responses, select_responses, split_responses
from tasks.store import ArtifactRef, ArtifactStore, SourceFile, source_file

pytestmark = pytest.mark.usefixtures("prefect_session")

PROMPT_COUNT = 40


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ArtifactStore]:
    with use_store(ArtifactStore(url=str(tmp_path / "store"), work_folder=str(tmp_path))) as store:
        yield store


def table(prompts: int = PROMPT_COUNT) -> pl.DataFrame:
    return pl.DataFrame(
        [
            (f"p {n:02d}", f"question {n}", model, "" if n == 0 else f"answer of {model}")
            for n in range(prompts)
            for model in ("a", "b")
        ],
        schema=["prompt_id", "prompt", "policy_model", "response"],
        orient="row",
    )


def source(folder: Path, name: str, content: str | bytes | pl.DataFrame) -> SourceFile:
    path = folder / name
    if isinstance(content, pl.DataFrame):
        content.write_parquet(path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return source_file(str(path))


def load(store: ArtifactStore, file: SourceFile, trained_on: SourceFile | None = None, **config: object) -> ResponseSet:
    return load_responses.function(store, file, ResponsesConfig.model_validate({"source": "x"} | config), trained_on)


def parts(store: ArtifactStore, split: ArtifactRef) -> dict[str, str]:
    return dict(store.read_frame(split).select("prompt_id", "part").rows())


def test_the_steps_of_a_flow_and_their_records(store: ArtifactStore, tmp_path: Path):
    @flow
    def prepare(file: SourceFile) -> tuple[ResponseSet, ResponseSet]:
        loaded = load_responses(file, ResponsesConfig(source=file.path), None)
        split = split_responses(loaded, SplitConfig(), None)
        return loaded, select_responses(loaded, split, (HELD_OUT,), ("a", "b"))

    everything, held_out = prepare(source(tmp_path, "responses.parquet", table()))
    assert (everything.policy_models, everything.empty_responses, everything.responses.rows) == (("a", "b"), 2, 80)
    assert 0 < (held_out.prompts.rows or 0) < PROMPT_COUNT
    ids = store.read_table(held_out.prompts, PROMPTS).get_column("prompt_id").to_list()
    assert set(store.read_table(held_out.responses, RESPONSES).get_column("prompt_id")) == set(ids)
    records = {path.name for path in Path(store.url, "steps").iterdir()}
    assert prepare(source(tmp_path, "moved.parquet", table())) == (everything, held_out)
    assert {path.name for path in Path(store.url, "steps").iterdir()} == records


def test_selecting_all_parts_is_selecting_everything(store: ArtifactStore, tmp_path: Path):
    loaded = load(store, source(tmp_path, "responses.parquet", table()))
    split = split_responses.function(store, loaded, SplitConfig(), None)
    assert select_responses.function(store, loaded, split, (CALIBRATION, HELD_OUT), ("a", "b")) == loaded


def test_selecting_policy_models_leaves_out_prompts_that_only_others_answered(store: ArtifactStore, tmp_path: Path):
    only_b = table().filter((pl.col("policy_model") == "b") | (pl.col("prompt_id") != "p 00"))
    loaded = load(store, source(tmp_path, "responses.parquet", only_b))
    split = split_responses.function(store, loaded, SplitConfig(), None)
    chosen = select_responses.function(store, loaded, split, (CALIBRATION, HELD_OUT), ("a",))
    assert (chosen.policy_models, chosen.prompts.rows, chosen.responses.rows) == (("a",), 39, 39)
    assert chosen.empty_responses == 0


def test_selecting_a_part_that_does_not_exist_is_an_error(store: ArtifactStore, tmp_path: Path):
    loaded = load(store, source(tmp_path, "responses.parquet", table()))
    split = split_responses.function(store, loaded, SplitConfig(), None)
    with pytest.raises(TableError, match=r"no rows"):
        select_responses.function(store, loaded, split, ("elsewhere",), ("a", "b"))


def test_ids_with_spaces_that_the_model_was_trained_on_are_never_held_out(store: ArtifactStore, tmp_path: Path):
    loaded = load(store, source(tmp_path, "responses.parquet", table()))
    plain = parts(store, split_responses.function(store, loaded, SplitConfig(), None))
    seen = [name for name, part in plain.items() if part == HELD_OUT][:5]
    trained_on = source(tmp_path, "ids.txt", "\r\n".join([*seen, "", " "]))
    found = parts(store, split_responses.function(store, loaded, SplitConfig(), trained_on))
    assert [found[name] for name in seen] == [CALIBRATION] * 5
    assert {name: part for name, part in found.items() if name not in seen} == {
        name: part for name, part in plain.items() if name not in seen
    }


def test_what_the_model_was_trained_on_can_be_left_out_altogether(store: ArtifactStore, tmp_path: Path):
    trained_on = source(tmp_path, "ids.txt", "p 00\np 01\n")
    file = source(tmp_path, "responses.parquet", table())
    kept = load(store, file, trained_on, exclude_trained_on=True)
    assert (kept.prompts.rows, kept.empty_responses) == (PROMPT_COUNT - 2, 0)
    assert load(store, file, trained_on).prompts.rows == PROMPT_COUNT


def test_limits_reach_the_split(store: ArtifactStore, tmp_path: Path):
    loaded = load(store, source(tmp_path, "responses.parquet", table()))
    config = SplitConfig(max_calibration_prompts=3, max_held_out_prompts=2)
    found = parts(store, split_responses.function(store, loaded, config, None))
    assert sorted(found.values()) == [CALIBRATION] * 3 + [HELD_OUT] * 2


@pytest.mark.parametrize(
    ("name", "content", "config", "error", "message"),
    [
        ("r.parquet", b"", {}, TableError, r"r.parquet is not a readable parquet table"),
        ("r.parquet", b"PAR1\0\0\0\0PAR1", {}, TableError, r"r.parquet is not a readable parquet table"),
        ("r.parquet", table().drop("response"), {}, TableError, r"lacks the columns \['response'\]"),
        ("r.parquet", table().clear(), {}, TableError, r"no rows"),
        (
            "r.parquet",
            table().with_columns(response=pl.lit(1.5)),
            {},
            TableError,
            r"'response' must be text, not Float64",
        ),
        ("r.parquet", table().with_columns(response=pl.lit(None, pl.String)), {}, TableError, r"80 empty cells"),
        ("r.parquet", pl.concat([table(), table()[:1]]), {}, TableError, r"more than once"),
        ("r.parquet", table().with_columns(prompt_id=pl.lit("p")), {}, TableError, r"40 different texts"),
        ("r.csv", "prompt_id,prompt\np,q\n", {}, TableError, r"lacks the columns"),
        ("r.txt", "x", {}, ConfigError, r"suffix '.txt'"),
        (
            "r.parquet",
            table(),
            {"policy_models": ("gpt",)},
            ConfigError,
            r"\['gpt'\] not in the data, which has \['a', 'b'\]",
        ),
        ("r.parquet", table(), {"where": {"policy_model": "gpt"}}, TableError, r"no row has policy_model = 'gpt'"),
        ("r.parquet", table(), {"columns": ColumnNames(prompt="text")}, TableError, r"lacks the columns \['text'\]"),
    ],
)
def test_bad_tables(
    store: ArtifactStore,
    tmp_path: Path,
    name: str,
    content: str | bytes | pl.DataFrame,
    config: dict[str, object],
    error: type[CharmError],
    message: str,
):
    file = source(tmp_path, name, content)
    with pytest.raises(error, match=message):
        load(store, file, **config)
    assert not Path(store.url).exists()


def test_a_list_of_trained_prompts_that_matches_nothing_is_an_error(store: ArtifactStore, tmp_path: Path):
    file = source(tmp_path, "responses.parquet", table())
    listed = source(tmp_path, "ids.txt", "other-1\nother-2\n")
    for exclude in (False, True):
        with pytest.raises(ConfigError, match=r"none of the 2 ids in responses\.trained_on"):
            load(store, file, listed, exclude_trained_on=exclude)
    one = source(tmp_path, "one.txt", "p 01\nother-2\n")
    assert load(store, file, one).prompts.rows == PROMPT_COUNT
    assert load(store, file, one, exclude_trained_on=True).prompts.rows == PROMPT_COUNT - 1


def test_a_split_takes_ids_from_a_file_or_from_the_store(store: ArtifactStore, tmp_path: Path):
    loaded = load(store, source(tmp_path, "responses.parquet", table()))
    ids = [f"p {n:02d}" for n in range(12)]
    listed = source(tmp_path, "ids.txt", "\n".join(ids))
    stored = store.write_frame(pl.DataFrame({"prompt_id": ids}), "prompt_ids")
    config = SplitConfig(held_out_fraction=0.7)
    splits = [split_responses.function(store, loaded, config, known) for known in (listed, stored, None)]
    assert splits[0] == splits[1] != splits[2]
