"""Leaderboard documents: parsed as they are, and nothing guessed."""

import datetime
import io
import json
from pathlib import Path

import polars as pl
import pytest

from charm_core.errors import RatingsError, TableError
from charm_core.leaderboard_history import ratings_from_snapshots
from charm_core.leaderboards import (
    BoardQuery,
    board_from_document,
    board_from_mirror,
    ratings_from_catalog,
    ratings_from_table,
    style_by_name,
)

DAY = datetime.date(2025, 2, 28)


def snapshots(**changes: object) -> pl.DataFrame:
    row = {
        "date": DAY, "model": "m", "category": "overall", "style_control": False, "rating": 1200.0, "ci_low": 1190.0,
        "ci_high": 1210.0, "votes": 100, "source": "here", "relabelled": False, "rating_system": "bradley_terry",
    }  # fmt: skip
    return pl.DataFrame([row | changes])


def read(table: pl.DataFrame, **changes: object) -> pl.DataFrame:
    wanted = {"date": DAY, "category": "overall", "style_control": False, "publisher": None} | changes
    return ratings_from_snapshots(table, **wanted)  # type: ignore[arg-type]


def catalog(**entry: object) -> dict[str, object]:
    return {"full": {"m": {"rating": 1200.5, "rating_q025": 1190, "rating_q975": 1210.0} | entry}, "chinese": {}}


def test_a_plain_table_needs_only_names_and_ratings():
    table = ratings_from_table(pl.DataFrame({"rating": [1, 2], "policy_model": ["b", "a"], "organization": ["x", "y"]}))
    assert table.rows() == [("a", 2.0, None, None, None), ("b", 1.0, None, None, None)]


def test_a_plain_table_without_ratings_says_what_it_has():
    with pytest.raises(RatingsError, match=r"needs the columns policy_model and rating.*\['policy_model', 'elo'\]"):
        ratings_from_table(pl.DataFrame({"policy_model": ["a"], "elo": [1]}))


@pytest.mark.parametrize("rating", ["1200", float("nan"), None])
def test_a_plain_table_with_bad_ratings_is_refused(rating: object):
    with pytest.raises(TableError, match=r"'rating'"):
        ratings_from_table(pl.DataFrame({"policy_model": ["a"], "rating": [rating]}))


def test_a_snapshot_is_chosen_by_date_category_and_style_control():
    table = pl.concat(
        [
            snapshots(),
            snapshots(date=DAY - datetime.timedelta(days=1), rating=1.0, ci_low=1.0, ci_high=1.0),
            snapshots(category="math", rating=2.0),
            snapshots(style_control=True, rating=3.0),
        ]
    )
    assert read(table).rows() == [("m", 1200.0, 1190.0, 1210.0, 100)]
    assert read(table, category="math").get_column("rating").to_list() == [2.0]
    assert read(table, style_control=True).get_column("rating").to_list() == [3.0]


def test_rows_known_to_be_wrong_are_left_out():
    table = pl.concat(
        [snapshots(), snapshots(model="x", relabelled=True), snapshots(model="y", rating_system="online_elo")]
    )
    assert read(table).get_column("policy_model").to_list() == ["m"]
    unmarked = snapshots().with_columns(relabelled=pl.lit(None, pl.Boolean), rating_system=pl.lit(None, pl.String))
    assert read(unmarked).height == 1


def test_a_missing_date_lists_the_nearest_dates():
    table = pl.concat([snapshots(date=DAY + datetime.timedelta(days=days)) for days in (-300, -2, 1, 40, 50, 60)])
    with pytest.raises(RatingsError, match=r"no snapshot of 2025-02-28.*nearest dates: 2025-03-01, 2025-02-26"):
        read(table)


def test_an_unknown_category_has_no_dates_at_all():
    with pytest.raises(RatingsError, match=r"'cooking'.*nearest dates: none"):
        read(snapshots(), category="cooking")


def test_two_publishers_on_one_date_need_a_choice():
    table = pl.concat([snapshots(), snapshots(source="there", rating=1205.0)])
    with pytest.raises(RatingsError, match=r"2 publishers.*\['here', 'there'\]; set arena.publisher"):
        read(table)
    assert read(table, publisher="there").get_column("rating").to_list() == [1205.0]
    with pytest.raises(RatingsError, match=r"publisher 'nobody'"):
        read(table, publisher="nobody")


def test_a_table_of_many_needs_a_date():
    with pytest.raises(RatingsError, match=r"needs arena.date"):
        read(snapshots(), date=None)


def test_missing_columns_are_named():
    with pytest.raises(RatingsError, match=r"lacks the columns \['votes'\]"):
        read(snapshots().drop("votes"))


def test_the_same_snapshots_from_a_csv_file_give_the_same_ratings():
    table = pl.concat(
        [snapshots(), snapshots(model="n", votes=None, relabelled=None), snapshots(model="x", relabelled=True)]
    )
    text = table.write_csv()
    assert read(pl.read_csv(io.StringIO(text))).equals(read(table))
    assert read(pl.read_csv(io.StringIO(text.replace("false", "False").replace("true", "True")))).equals(read(table))


def test_dates_and_flags_that_are_none_are_refused():
    with pytest.raises(RatingsError, match=r"'date'.*28.02.2025"):
        read(snapshots(date="28.02.2025"))
    with pytest.raises(RatingsError, match=r"'style_control'"):
        read(snapshots(style_control="raw"))
    with pytest.raises(RatingsError, match=r"'relabelled'"):
        read(snapshots(relabelled="perhaps"))


def test_intervals_in_the_form_of_text_are_refused():
    with pytest.raises(TableError, match=r"'rating_low'"):
        read(snapshots(ci_low="+5/-5"))


def test_fractions_of_votes_are_refused_and_not_cut_off():
    with pytest.raises(TableError, match=r"'votes'"):
        read(snapshots(votes=10.5))


def test_the_catalog_calls_the_overall_board_full():
    assert ratings_from_catalog(catalog(), category="overall").rows() == [("m", 1200.5, 1190.0, 1210.0, None)]
    assert ratings_from_catalog({"full": {}, "math": catalog()["full"]}, category="math").height == 1


def test_a_missing_category_lists_what_there_is():
    with pytest.raises(RatingsError, match=r"no category 'overal'; it has chinese, full"):
        ratings_from_catalog(catalog(), category="overal")


@pytest.mark.parametrize("entry", [{"rating_q025": None}, {"rating": "1200"}, {"rating_q975": [1]}])
def test_an_entry_without_its_numbers_names_the_model(entry: dict[str, object]):
    with pytest.raises(RatingsError, match=r"entry of 'm' needs the numbers"):
        ratings_from_catalog(catalog(**entry), category="overall")


@pytest.mark.parametrize("document", [{"full": {"m": 1200}}, {"full": {"m": {"rating": 1}}}])
def test_an_entry_of_another_shape_names_the_model(document: dict[str, object]):
    with pytest.raises(RatingsError, match=r"entry of 'm' needs the numbers"):
        ratings_from_catalog(document, category="overall")


@pytest.mark.parametrize("board", [[], {}, [{"model": "m", "score": 1}], "text", None])
def test_a_category_of_another_shape_is_refused(board: object):
    with pytest.raises(RatingsError, match=r"category 'full'.*must map models to ratings"):
        ratings_from_catalog({"full": board}, category="overall")


def test_nan_ratings_of_the_catalog_are_refused():
    document = json.loads('{"full": {"m": {"rating": NaN, "rating_q025": 1, "rating_q975": 2}}}')
    with pytest.raises(TableError, match=r"NaN"):
        ratings_from_catalog(document, category="overall")


@pytest.mark.real
def test_the_real_snapshots(shared_data: Path):
    table = pl.read_parquet(shared_data / "elo_snapshots.parquet")
    ratings = read(table, publisher="lmarena/arena-catalog")
    known = dict(ratings.select("policy_model", "rating").rows())
    assert len(known) > 150
    assert known["gpt-4-1106-preview"] - known["gemma-2-9b-it-simpo"] == pytest.approx(34, abs=3)
    assert (ratings.get_column("rating_low") <= ratings.get_column("rating")).all()


@pytest.mark.real
def test_the_real_catalog_has_every_category_it_names(shared_data: Path):
    document = json.loads((shared_data / "leaderboards" / "arena-catalog_leaderboard-text.json").read_text())
    for category in document:
        board = ratings_from_catalog(document, category=category)
        assert (board.get_column("rating_high") >= board.get_column("rating_low")).all()
    assert ratings_from_catalog(document, category="overall").equals(ratings_from_catalog(document, category="full"))


STYLED = BoardQuery(style_control=True)


def site(*models: dict[str, object], **meta: object) -> dict[str, object]:
    entries = list(models) or [{"rank": 1, "model": "m", "score": 1500, "ci": 6, "votes": 10}]
    return {"meta": {"leaderboard": "text", "last_updated": "Mar 26, 2026", **meta}, "models": entries}


def mirror(**changes: object) -> pl.DataFrame:
    return pl.DataFrame([{"model": "M-1", "arena_score": 1400, "95_pct_ci": "+5/-4", "votes": 9} | changes])


def test_a_copy_of_the_arenas_page():
    board = board_from_document(site(model_count=1), STYLED)
    assert board.ratings.rows() == [("m", 1500.0, 1494.0, 1506.0, 10)]
    assert (board.date, board.date_kind) == (datetime.date(2026, 3, 26), "published")
    assert board.notes == ("the source lists its top 1 models only: one that is missing may be rated lower",)


def test_the_page_before_style_control_was_the_default():
    assert board_from_document(site(last_updated="2025-05-15"), BoardQuery()).date == datetime.date(2025, 5, 15)
    with pytest.raises(
        RatingsError, match=r"shows style-controlled ratings.*since 2025-05-16; set arena.style_control"
    ):
        board_from_document(site(last_updated="2025-05-16"), BoardQuery())
    assert board_from_document(site(leaderboard="webdev"), BoardQuery()).ratings.height == 1


@pytest.mark.parametrize(
    ("document", "query", "message"),
    [
        (site(model_count=71), STYLED, r"says that it lists 71 models but has 1; it was cut off"),
        (site(last_updated="26.3.2026"), STYLED, r"last_updated must be a date such as"),
        (site(last_updated=None), STYLED, r"needs last_updated"),
        (site({"model": "m", "score": "1500", "ci": 6}), STYLED, r"an entry needs \['model', 'score', 'ci'\]"),
        (site({"model": "m", "score": 1500}), STYLED, r"an entry needs"),
        ({"meta": {"last_updated": "Mar 26, 2026"}, "models": []}, STYLED, r"models must be a list"),
        (site(), BoardQuery(style_control=True, category="math"), r"holds the overall board only, not 'math'"),
        (site(), BoardQuery(style_control=True, date=DAY), r"is of 2026-03-26 .*, not of 2025-02-28"),
    ],
)  # fmt: skip
def test_pages_of_another_form(document: dict[str, object], query: BoardQuery, message: str):
    with pytest.raises(RatingsError, match=message):
        board_from_document(document, query)


def test_a_csv_mirror():
    board = board_from_mirror(
        pl.concat([mirror(), mirror(model="M-2", **{"95_pct_ci": "+12.5/-3"})]), BoardQuery(date=DAY)
    )
    assert board.ratings.rows() == [("M-1", 1400.0, 1396.0, 1405.0, 9), ("M-2", 1400.0, 1397.0, 1412.5, 9)]
    assert (board.date, board.date_kind, board.publisher) == (DAY, "stated", None)


def test_a_csv_mirror_without_an_interval_keeps_it_open():
    table = mirror().with_columns(pl.lit(None, pl.String).alias("95_pct_ci"))
    assert board_from_mirror(table, BoardQuery()).ratings.row(0) == ("M-1", 1400.0, None, None, 9)


@pytest.mark.parametrize("interval", ["5", "+5", "±5", "+5/+4", "1395-1405", "+a/-b"])
def test_intervals_of_another_form_name_the_model(interval: str):
    with pytest.raises(RatingsError, match=r"interval of 'M-1' must look like \+5/-5, not"):
        board_from_mirror(mirror(**{"95_pct_ci": interval}), BoardQuery())


def test_a_csv_mirror_has_no_categories():
    with pytest.raises(RatingsError, match=r"overall board only, not 'math'"):
        board_from_mirror(mirror(), BoardQuery(category="math"))


@pytest.mark.parametrize(
    ("name", "style"),
    [
        ("arena-catalog_leaderboard-text-style-control.json", True), ("data/leaderboard-text.json", False),
        ("text_style_control/latest-00000-of-00001.parquet", True), ("board.csv", None), ("rank_stylectrl.csv", True),
    ],
)  # fmt: skip
def test_names_that_say_whether_style_is_controlled(name: str, style: bool | None):
    assert style_by_name(name) is style


@pytest.mark.real
def test_the_real_copies_of_the_arenas_page(shared_data: Path):
    for name, day, models in (("2026-03-29", 26, 71), ("2026-04-12", 10, 30)):
        document = json.loads((shared_data / "leaderboards" / f"arena-ai-leaderboards_{name}_text.json").read_text())
        board = board_from_document(document, STYLED)
        assert (board.date, board.ratings.height) == (datetime.date(2026, 3 if day == 26 else 4, day), models)
        assert (board.ratings["rating_high"] > board.ratings["rating"]).all()
        with pytest.raises(RatingsError, match=r"shows style-controlled ratings"):
            board_from_document(document, BoardQuery())


@pytest.mark.real
def test_the_real_csv_mirror_agrees_with_the_table_made_from_it(shared_data: Path):
    table = pl.read_csv(shared_data / "leaderboards" / "llm-leaderboard-csv_lmarena_text.csv")
    board = board_from_mirror(table, BoardQuery()).ratings.rename({"policy_model": "display_name"})
    many = pl.read_parquet(shared_data / "elo_snapshots.parquet").filter(
        pl.col("source") == "fboulnois/llm-leaderboard-csv", pl.col("category") == "overall", pl.col("date") == datetime.date(2025, 8, 4)
    )  # fmt: skip
    joined = board.join(many.unique("display_name"), on="display_name", suffix="_made")
    assert joined.height > 200
    made = {"rating": "rating_made", "rating_low": "ci_low", "rating_high": "ci_high", "votes": "votes_made"}
    for column, other in made.items():
        assert joined[column].cast(pl.Float64).to_list() == joined[other].cast(pl.Float64).to_list()
