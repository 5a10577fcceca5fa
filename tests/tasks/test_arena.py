"""Ratings steps: a board in, ratings under the names of the responses out."""

import datetime
import io
import json
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest
from prefect import flow
from pydantic import ValidationError

from charm_core.errors import CharmError, ConfigError, RatingsError, TableError
from charm_core.raw_battles import BattleTable
from charm_core.tables import BATTLES, RATINGS
from tasks import arena
from tasks.arena import (
    ArenaConfig,
    Board,
    Boards,
    collect_ratings,
    fit_arena_ratings,
    match_ratings,
    obtain_board,
    obtain_history,
    read_aliases,
)
from tasks.caching import use_store
from tasks.ratings.fetching import FetchConfig
from tasks.ratings.snapshots import list_snapshots
from tasks.ratings.sources import OFFICIAL_DATASET
from tasks.store import ArtifactStore, SourceFile, source_file
from tests.leaderboard_server import COMMIT, Answer, hub, serve, with_etag

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
def obtained(config: ArenaConfig) -> Board:
    return obtain_board(config)


@flow
def history(config: ArenaConfig) -> Boards:
    return obtain_history(config)


def official(*dates: str, **changes: object) -> bytes:
    rows = [
        {
            "model_name": name, "organization": "o", "license": "l", "rating": rating, "rating_lower": rating - 5,
            "rating_upper": rating + 5, "variance": 6.5, "vote_count": 100.0, "rank": 1.0, "category": "overall",
            "leaderboard_publish_date": date,
        } | changes
        for date in dates
        for name, rating in (("a", 1200.5), ("b", 1100.5))
    ]  # fmt: skip
    buffer = io.BytesIO()
    pl.DataFrame(rows).write_parquet(buffer, row_group_size=100)
    return buffer.getvalue()


QUICK = FetchConfig(allow_http=True, backoff_seconds=0.01, max_tries=1)
HUB_FILES = {
    "text/latest-00000-of-00001.parquet": official("2025-02-27"),
    "text/full-00000-of-00002.parquet": official("2023-12-20", "2025-02-20"),
    "text/full-00001-of-00002.parquet": official("2025-02-27"),
    "text_style_control/latest-00000-of-00001.parquet": official("2025-02-27", rating=1000.5, rating_lower=None),
}


@flow
def matched(
    file: SourceFile, models: tuple[str, ...], aliases: SourceFile | None = None, accept: tuple[str, ...] = ()
) -> Board:
    return match_ratings(collect_ratings(file, ArenaConfig(source="x")), models, aliases, accept)


class TestBoards:
    def test_a_catalog_document(self, store: ArtifactStore, tmp_path: Path):
        file = write(tmp_path, "board.json", catalog(b=1200, a=1000))
        board = board_of(file, ArenaConfig(source="board.json", date=datetime.date(2025, 2, 28)))
        assert (board.ratings.rows, board.date) == (2, datetime.date(2025, 2, 28))
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
        assert board.publisher == "y"

    @pytest.mark.parametrize(
        ("name", "content", "error", "message"),
        [
            ("board.json", "{", RatingsError, r"board.json is not JSON"),
            ("board.json", "3", TableError, r"board.json is not a readable json table"),
            ("board.json", '{"meta": {}, "models": []}', RatingsError, r"meta block needs last_updated"),
            ("board.json", '{"coding": {}}', RatingsError, r"no category 'full'; it has coding"),
            ("board.json", b"\xff\xfe", ConfigError, r"not UTF-8"),
            ("board.parquet", b"", TableError, r"not a readable parquet"),
            ("board.csv", "model,elo\na,1\n", RatingsError, r"lacks the columns"),
            ("board.parquet", b"PAR1 damaged PAR1", TableError, r"not a readable parquet"),
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


class TestObtaining:
    def test_a_file_is_kept_as_a_snapshot_with_where_it_came_from(self, store: ArtifactStore, tmp_path: Path):
        file = write(tmp_path, "board.json", catalog(b=1200, a=1000))
        config = ArenaConfig(
            source=file.path, date=datetime.date(2025, 2, 28), licence="CC BY 4.0", attribution="Arena"
        )
        board = obtained(config)
        assert (board.source, board.publisher, board.url) == ("board.json", "board.json", file.path)
        assert (board.document_digest, board.licence, board.attribution) == (file.digest, "CC BY 4.0", "Arena")
        (kept,) = list_snapshots(store)
        assert board.snapshot == kept.digest
        assert board.notes == (f"kept as snapshot {kept.short}",)
        assert kept.snapshot.ratings == board.ratings
        assert (kept.snapshot.url, kept.snapshot.licence) == (file.path, "CC BY 4.0")

    def test_a_cached_board_says_where_it_comes_from_this_time(self, store: ArtifactStore, tmp_path: Path):
        first = write(tmp_path, "first.json", catalog(a=1000, b=1100))
        other = write(tmp_path, "other.json", catalog(a=1000, b=1100))
        config = ArenaConfig(source=first.path, publisher="p", licence="old")
        board = obtained(config)
        again = obtained(config.model_copy(update={"source": other.path, "licence": "new"}))
        assert (again.source, again.url, again.licence) == ("other.json (p)", other.path, "new")
        assert (again.ratings, again.snapshot) == (board.ratings, board.snapshot)
        assert list_snapshots(store)[0].snapshot.url == first.path  # a snapshot stays as it was first collected

    def test_where_a_file_lies_is_no_reason_to_read_it_again(self, tmp_path: Path):
        first, other = (write(tmp_path, name, catalog(a=1)) for name in ("first.json", "other.json"))
        near = ArenaConfig(source="x", accept_near=("m",), aliases="a.toml", licence="l", fetching=QUICK)
        assert collect_ratings.key(first, ArenaConfig(source="x")) == collect_ratings.key(other, near)
        styled = ArenaConfig(source="x", style_control=True)
        assert collect_ratings.key(first, styled) != collect_ratings.key(first, near)

    @pytest.mark.parametrize(
        ("publisher", "note"),
        [
            ("lmarena/arena-catalog", "that of a commit"),
            ("oolong-tea-2026/arena-ai-leaderboards", "the mirror was filled"),
            ("me", None),
        ],
    )
    def test_a_date_that_is_not_of_publication_is_said(
        self, store: ArtifactStore, tmp_path: Path, publisher: str, note: str | None
    ):
        table = "date,model,category,style_control,rating,ci_low,ci_high,votes,source\n"
        file = write(tmp_path, "many.csv", f"{table}2025-02-28,a,overall,false,1000.5,990,1010,,{publisher}\n")
        board = obtained(ArenaConfig(source=file.path, date=datetime.date(2025, 2, 28)))
        assert any(note in said for said in board.notes) if note else len(board.notes) == 1

    def test_a_page_instead_of_the_file(self, store: ArtifactStore, tmp_path: Path):
        config = ArenaConfig(source="https://example.org/elo_results_20240409.pkl")
        with pytest.raises(ConfigError, match=r"is a pickle"):
            obtained(config)

    def test_from_an_address(self, store: ArtifactStore):
        with serve(with_etag(catalog(a=1000, b=1100).encode())) as server:
            config = ArenaConfig(source=f"{server.url}/{COMMIT}/board.json", fetching=QUICK)
            first, second = obtained(config), obtained(config)
        assert (first.revision, first.url) == (COMMIT, config.source)
        assert second == first
        assert [asked.headers.get("if-none-match") for asked in server.asked] == [None, '"v1"']

    def test_a_changed_schema_shows_what_was_expected_and_found(self, store: ArtifactStore):
        body = b"rank,model,elo,95_pct_ci,votes\n1,m,1200,+5/-5,10\n"
        with (
            serve(lambda _: Answer(body=body)) as server,
            pytest.raises(RatingsError, match=r"'elo'.*lacks the columns \['arena_score'\]"),
        ):
            obtained(ArenaConfig(source=f"{server.url}/board.csv", fetching=QUICK))

    def test_votes_with_and_without_style_control(self, store: ArtifactStore, tmp_path: Path):
        rows = [{"left": "x", "right": "y", "vote": ("L", "R", "tie")[n * n % 7 % 3], "q": n % 5} for n in range(60)]
        answers = [
            {"prompt": n, "name": name, "text": "long answer " * (n + 2) if name == "x" else "short " * (6 - n)}
            for n in range(5)
            for name in "xy"
        ]
        votes = write(tmp_path, "votes.jsonl", "\n".join(map(json.dumps, rows)))
        responses = write(tmp_path, "answers.json", json.dumps(answers))
        table = BattleTable(
            model_a="left", model_b="right", winner="vote", outcomes={"L": "model_a", "R": "model_b"}, prompt_id="q",
            responses=responses.path, responses_prompt_id="prompt", responses_policy_model="name", responses_text="text",
        )  # fmt: skip
        config = ArenaConfig(source=votes.path, battles=table)
        plain, styled = obtained(config), obtained(config.model_copy(update={"style_control": True}))
        assert plain.notes[0] == styled.notes[0] == "Bradley-Terry fit of 60 votes"
        assert styled.notes[1].startswith("style: length: ")
        assert plain.ratings.digest != styled.ratings.digest
        with pytest.raises(RatingsError, match=r"need the style of the responses"):
            obtained(
                config.model_copy(
                    update={"style_control": True, "battles": table.model_copy(update={"responses": None})}
                )
            )

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({}, r"give a source or a snapshot"),
            ({"source": "x", "snapshot": "y"}, r"only one of them"),
            ({"snapshot": "2025-02-28", "date": "2025-02-28"}, r"leave date out"),
        ],
    )
    def test_settings_that_contradict_each_other(self, settings: dict[str, str], message: str):
        with pytest.raises(ValidationError, match=message):
            ArenaConfig.model_validate(settings)


class TestOfficialDataset:
    def test_the_latest_board_a_date_and_style_control(self, store: ArtifactStore):
        with serve(hub(OFFICIAL_DATASET, HUB_FILES)) as server:
            config = ArenaConfig(source=OFFICIAL_DATASET, hub_endpoint=server.url, fetching=QUICK)
            latest = obtained(config)
            early = obtained(config.model_copy(update={"date": datetime.date(2025, 2, 20)}))
            styled = obtained(config.model_copy(update={"style_control": True}))
            with pytest.raises(RatingsError, match=r"online Elo"):
                obtained(config.model_copy(update={"date": datetime.date(2023, 12, 20)}))
        assert (latest.date, latest.date_kind, latest.revision) == (datetime.date(2025, 2, 27), "published", COMMIT)
        assert (latest.publisher, latest.licence, latest.source) == (
            OFFICIAL_DATASET,
            "cc-by-4.0",
            f"{OFFICIAL_DATASET} text/latest",
        )
        assert latest.attribution
        assert early.date == datetime.date(2025, 2, 20)
        assert early.source.endswith("text/full")
        assert styled.ratings.digest != latest.ratings.digest
        assert len(list_snapshots(store)) == 3

    def test_all_dates(self, store: ArtifactStore):
        with serve(hub(OFFICIAL_DATASET, HUB_FILES)) as server:
            found = history(ArenaConfig(source=OFFICIAL_DATASET, hub_endpoint=server.url, fetching=QUICK))
        assert [str(board.date) for board in found.boards] == ["2025-02-20", "2025-02-27"]
        assert found.notes == ("1 dates before 2024-01-09 hold online Elo and are left out",)
        assert {board.snapshot for board in found.boards} == {kept.digest for kept in list_snapshots(store)}

    def test_a_board_in_the_history_and_the_latest_one_are_one_snapshot(self, store: ArtifactStore):
        with serve(hub(OFFICIAL_DATASET, HUB_FILES)) as server:
            config = ArenaConfig(source=OFFICIAL_DATASET, hub_endpoint=server.url, fetching=QUICK)
            assert obtained(config).snapshot == history(config).boards[-1].snapshot

    def test_a_changed_schema(self, store: ArtifactStore):
        table = pl.read_parquet(HUB_FILES["text/latest-00000-of-00001.parquet"]).rename({"rating_lower": "ci_low"})
        buffer = io.BytesIO()
        table.write_parquet(buffer)
        files = {"text/latest-00000-of-00001.parquet": buffer.getvalue()}
        with (
            serve(hub(OFFICIAL_DATASET, files)) as server,
            pytest.raises(RatingsError, match=r"'ci_low'.*'official'.*lacks the columns \['rating_lower'\]"),
        ):
            obtained(ArenaConfig(source=OFFICIAL_DATASET, hub_endpoint=server.url, fetching=QUICK))


class TestPins:
    def test_a_run_is_pinned_to_what_was_collected(self, store: ArtifactStore, tmp_path: Path):
        day = datetime.date(2025, 2, 28)
        early = write(tmp_path, "early.json", catalog(a=1000, b=1100))
        late = write(tmp_path, "late.json", catalog(a=1050, b=1100))
        first = obtained(ArenaConfig(source=early.path, publisher="p", date=day, licence="CC BY 4.0"))
        obtained(ArenaConfig(source=late.path, publisher="p", date=day + datetime.timedelta(7)))
        Path(early.path).unlink()
        pinned = obtained(ArenaConfig(snapshot="2025-02-28"))
        assert (pinned.ratings, pinned.date, pinned.snapshot) == (first.ratings, day, first.snapshot)
        assert (pinned.licence, pinned.publisher, pinned.category) == ("CC BY 4.0", "p", "overall")
        assert pinned.source == f"snapshot {(first.snapshot or '')[:12]} of p"
        assert obtained(ArenaConfig(snapshot=(first.snapshot or "")[:8])) == pinned

    def test_a_date_means_the_usual_board_unless_told_otherwise(self, store: ArtifactStore, tmp_path: Path):
        day = datetime.date(2025, 2, 28)
        file = write(tmp_path, "board.csv", "policy_model,rating\na,1\nb,2\n")
        styled = obtained(ArenaConfig(source=file.path, date=day, style_control=True))
        with pytest.raises(RatingsError, match=r"no snapshot .* matches '2025-02-28' with"):
            obtained(ArenaConfig(snapshot="2025-02-28"))
        assert obtained(ArenaConfig(snapshot="2025-02-28", style_control=True)).snapshot == styled.snapshot
        assert obtained(ArenaConfig(snapshot=styled.snapshot)).style_control is True
        with pytest.raises(RatingsError, match=r"with style_control False"):
            obtained(ArenaConfig(snapshot=styled.snapshot, style_control=False))

    def test_there_is_no_history_of_a_pin(self, store: ArtifactStore):
        with pytest.raises(ConfigError, match=r"a snapshot is of one date"):
            history(ArenaConfig(snapshot="2025-02-28"))


@pytest.mark.real
class TestRealSources:
    @pytest.mark.parametrize(
        ("name", "config", "rows", "date"),
        [
            ("arena-catalog_leaderboard-text.json", {"date": "2025-12-11"}, 282, "2025-12-11"),
            ("arena-catalog_leaderboard-text-style-control.json", {"style_control": True}, 283, None),
            ("llm-leaderboard-csv_lmarena_text.csv", {"date": "2025-08-04"}, 265, "2025-08-04"),
            ("arena-ai-leaderboards_2026-03-29_text.json", {"style_control": True}, 71, "2026-03-26"),
        ],
    )
    def test_raw_leaderboard_files(
        self, store: ArtifactStore, shared_data: Path, name: str, config: dict[str, object], rows: int, date: str | None
    ):
        board = obtained(ArenaConfig.model_validate({"source": str(shared_data / "leaderboards" / name)} | config))
        assert (board.ratings.rows, str(board.date) if board.date else None) == (rows, date)
        assert list_snapshots(store)[0].snapshot.ratings == board.ratings

    def test_the_reviewed_aliases_give_the_papers_ratings(self, store: ArtifactStore, shared_data: Path):
        # the arena_score of the reference repository's configs/pm_config.json
        reference = {
            "GPT-4o-mini-2024-07-18": 1273, "Qwen2.5-72B-Instruct": 1258, "Llama-3.1-70B-Instruct": 1248, "gemma-2-27b-it": 1220,
            "gemma-2-9b-it-SimPO": 1216, "gemma-2-9b-it": 1191, "Llama-3.1-8B-Instruct": 1176,
        }  # fmt: skip
        aliases = source_file(str(Path(arena.__file__).parent.parent / "benchmarks" / "real" / "aliases.toml"))

        @flow
        def rated(config: ArenaConfig) -> Board:
            return match_ratings(obtain_board(config), tuple(reference), aliases, ())

        snapshots = {"source": str(shared_data / "elo_snapshots.parquet"), "date": "2024-12-31"}
        board = rated(ArenaConfig.model_validate(snapshots))
        ratings = dict(store.read_table(board.ratings, RATINGS).select("policy_model", "rating").rows())
        assert ratings == reference
        # a mirror with display names needs the other names of the same table
        mirror = shared_data / "leaderboards" / "llm-leaderboard-csv_lmarena_text.csv"
        mirrored = rated(ArenaConfig(source=str(mirror)))
        assert any("has the rating of Meta-Llama-3.1-70B-Instruct (exact" in note for note in mirrored.notes)

    def test_every_reviewed_alias_is_what_it_says(self, shared_data: Path):
        aliases = read_aliases(
            source_file(str(Path(arena.__file__).parent.parent / "benchmarks" / "real" / "aliases.toml"))
        )
        boards = pl.read_parquet(shared_data / "elo_snapshots.parquet", columns=["model", "display_name"])
        names = {*boards["model"], *boards["display_name"].drop_nulls()}
        assert {alias.match for alias in aliases} == {"exact", "near", "unknown"}
        for alias in aliases:
            if alias.match == "unknown":
                assert alias.policy_model not in names
            else:
                assert alias.arena_name in names
                assert set(alias.other_names) <= names
