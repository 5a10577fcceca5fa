"""Ratings steps: a board in, ratings under the names of the responses out."""

import datetime
import json
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest
from prefect import flow

from charm_core.errors import CharmError, ConfigError, RatingsError, TableError
from charm_core.tables import BATTLES, RATINGS
from tasks.arena import ArenaConfig, Board, collect_ratings, fit_arena_ratings, match_ratings, read_aliases
from tasks.caching import use_store
from tasks.store import ArtifactStore, SourceFile, source_file

pytestmark = pytest.mark.usefixtures("prefect_session")

ALIASES = """
[[alias]]
policy_model = "mine"
arena_name = "a"
match = "near"
reason = "an older version"
"""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ArtifactStore]:
    with use_store(ArtifactStore(url=str(tmp_path / "store"), work_folder=str(tmp_path))) as store:
        yield store


def write(folder: Path, name: str, content: str | bytes | pl.DataFrame) -> SourceFile:
    path = folder / name
    if isinstance(content, pl.DataFrame):
        content.write_parquet(path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content)
    return source_file(str(path))


def catalog(**ratings: float) -> str:
    entries = {
        model: {"rating": rating, "rating_q025": rating - 5, "rating_q975": rating + 5}
        for model, rating in ratings.items()
    }
    return json.dumps({"full": entries})


@flow
def board_of(file: SourceFile, config: ArenaConfig) -> Board:
    return collect_ratings(file, config)


@flow
def matched(
    file: SourceFile, models: tuple[str, ...], aliases: SourceFile | None = None, accept: tuple[str, ...] = ()
) -> Board:
    return match_ratings(collect_ratings(file, ArenaConfig(source="x")), models, aliases, accept)


class TestBoards:
    def test_a_catalog_document(self, store: ArtifactStore, tmp_path: Path):
        file = write(tmp_path, "board.json", catalog(b=1200, a=1000))
        board = board_of(file, ArenaConfig(source="board.json", date=datetime.date(2025, 2, 28)))
        assert (board.ratings.rows, board.source, board.date) == (2, "board.json", datetime.date(2025, 2, 28))
        assert store.read_table(board.ratings, RATINGS).rows()[0] == ("a", 1000.0, 995.0, 1005.0, None)

    @pytest.mark.parametrize("suffix", ["csv", "jsonl", "json"])
    def test_a_plain_table_in_any_format(self, store: ArtifactStore, tmp_path: Path, suffix: str):
        rows = [{"policy_model": "a", "rating": 1000.5}, {"policy_model": "b", "rating": 1200}]
        texts = {
            "csv": "policy_model,rating\na,1000.5\nb,1200\n",
            "jsonl": "\n".join(map(json.dumps, rows)),
            "json": json.dumps(rows),
        }
        board = board_of(write(tmp_path, f"board.{suffix}", texts[suffix]), ArenaConfig(source="x"))
        assert store.read_table(board.ratings, RATINGS).get_column("rating").to_list() == [1000.5, 1200.0]

    def test_one_snapshot_of_many_with_its_publisher(self, store: ArtifactStore, tmp_path: Path):
        header = "date,model,category,style_control,rating,ci_low,ci_high,votes,source\n"
        lines = "".join(
            f"2025-02-28,a,overall,false,{rating},990,1310,,{name}\n" for rating, name in ((1000, "x"), (1300, "y"))
        )
        config = ArenaConfig(source="x", date=datetime.date(2025, 2, 28), publisher="y")
        board = board_of(write(tmp_path, "many.csv", header + lines), config)
        assert store.read_table(board.ratings, RATINGS).get_column("rating").to_list() == [1300.0]
        assert board.source == "many.csv (y)"

    @pytest.mark.parametrize(
        ("name", "content", "error", "message"),
        [
            ("board.json", "{", RatingsError, r"board.json is not JSON"),
            ("board.json", "3", TableError, r"board.json is not a readable json table"),
            ("board.json", '{"meta": {}, "models": []}', RatingsError, r"no category 'full'; it has meta, models"),
            ("board.json", b"\xff\xfe", ConfigError, r"not UTF-8"),
            ("board.parquet", b"", TableError, r"not a readable parquet"),
            ("board.csv", "model,elo\na,1\n", RatingsError, r"lacks the columns"),
            ("board.csv", "policy_model,rating\na,high\n", TableError, r"'rating'.*must be Float64"),
            ("board.csv", "policy_model,rating\na,1\na,2\n", TableError, r"more than once"),
            ("board.csv", "policy_model,rating\n", TableError, r"no rows"),
            ("board.xlsx", "x", ConfigError, r"suffix '.xlsx'"),
        ],
    )
    def test_bad_boards(
        self,
        store: ArtifactStore,
        tmp_path: Path,
        name: str,
        content: str | bytes,
        error: type[CharmError],
        message: str,
    ):
        file = write(tmp_path, name, content)
        with pytest.raises(error, match=message):
            collect_ratings.function(store, file, ArenaConfig(source=name))
        assert not Path(store.url).exists()

    def test_ratings_from_votes(self, store: ArtifactStore):
        rows = [(n, "a", "b", "model_a" if n % 4 else "model_b") for n in range(400)]
        battles = store.write_table(pl.DataFrame(rows, schema=dict(BATTLES.columns), orient="row"), BATTLES)
        board = fit_arena_ratings.function(store, battles, "made up")
        ratings = dict(store.read_table(board.ratings, RATINGS).select("policy_model", "rating").rows())
        assert ratings["a"] - ratings["b"] == pytest.approx(400 * 0.47712125, abs=0.5)  # odds of 3 to 1
        assert board.notes == ("Bradley-Terry fit of 400 votes",)


class TestMatching:
    def test_names_that_are_on_the_board(self, store: ArtifactStore, tmp_path: Path):
        board = matched(write(tmp_path, "b.json", catalog(a=1000, b=1100, c=1200)), ("c", "a"))
        assert store.read_table(board.ratings, RATINGS).get_column("policy_model").to_list() == ["a", "c"]
        assert board.notes == ()

    def test_a_near_match_is_written_down(self, store: ArtifactStore, tmp_path: Path):
        board = matched(
            write(tmp_path, "b.json", catalog(a=1000, b=1100)),
            ("mine", "b"),
            write(tmp_path, "a.toml", ALIASES),
            ("mine",),
        )
        assert dict(store.read_table(board.ratings, RATINGS).select("policy_model", "rating").rows()) == {
            "mine": 1000,
            "b": 1100,
        }
        assert board.notes == ("mine has the rating of a (near: an older version)",)

    def test_a_near_match_without_consent_is_an_error(self, store: ArtifactStore, tmp_path: Path):
        file, aliases = write(tmp_path, "b.json", catalog(a=1000)), write(tmp_path, "a.toml", ALIASES)
        with pytest.raises(RatingsError, match=r"only nearly 'a'.*arena.accept_near"):
            matched(file, ("mine",), aliases)

    def test_an_unknown_name_lists_the_nearest(self, store: ArtifactStore, tmp_path: Path):
        with pytest.raises(RatingsError, match=r"'gpt-4o' has no rating.*gpt-4"):
            matched(write(tmp_path, "b.json", catalog(**{"gpt-4": 1})), ("gpt-4o",))


class TestAliases:
    def test_entries_are_read(self, tmp_path: Path):
        (alias,) = read_aliases(write(tmp_path, "a.toml", ALIASES))
        assert (alias.policy_model, alias.arena_name, alias.match) == ("mine", "a", "near")

    @pytest.mark.parametrize(
        "content",
        [
            "[[alias]\n",
            ALIASES.replace("[[alias]]", "[[aliases]]"),
            ALIASES.replace('"near"', '"close"'),
            ALIASES.replace("reason", "because"),
            ALIASES + "extra = 1\n",
            "alias = 3",
            "",
        ],
    )
    def test_anything_else_is_an_error_that_names_the_file(self, tmp_path: Path, content: str):
        with pytest.raises(ConfigError, match=r"alias file .*a.toml is wrong"):
            read_aliases(write(tmp_path, "a.toml", content))
