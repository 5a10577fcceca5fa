"""Tables of many boards and dates: one board chosen, or all of them, and what is left out is said."""

import datetime
from pathlib import Path

import polars as pl
import pytest

from charm_core.errors import RatingsError
from charm_core.leaderboard_history import board_from_snapshots, boards_from_official, boards_from_snapshots
from charm_core.leaderboards import BoardQuery, DatedBoard

DAY = datetime.date(2025, 2, 28)


def snapshots(**changes: object) -> pl.DataFrame:
    row = {
        "date": DAY, "model": "m", "category": "overall", "style_control": False, "rating": 1200.0, "ci_low": 1190.0,
        "ci_high": 1210.0, "votes": 100, "source": "here", "relabelled": False, "rating_system": "bradley_terry",
    }  # fmt: skip
    return pl.DataFrame([row | changes])


def official(**changes: object) -> pl.DataFrame:
    row = {
        "model_name": "m", "organization": "o", "license": "l", "rating": 1200.5, "rating_lower": 1190.5,
        "rating_upper": 1210.5, "variance": 26.0, "vote_count": 100.0, "rank": 1.0, "category": "overall",
        "leaderboard_publish_date": "2025-02-27",
    }  # fmt: skip
    return pl.DataFrame([row | changes])


def the_only(boards: tuple[DatedBoard, ...]) -> DatedBoard:
    (board,) = boards
    return board


class TestSnapshots:
    def test_every_date_and_publisher_is_a_board_of_its_own(self):
        table = pl.concat(
            [
                snapshots(),
                snapshots(date=DAY + datetime.timedelta(7)),
                snapshots(source="there"),
                snapshots(category="math"),
                snapshots(style_control=True),
            ]
        )
        history = boards_from_snapshots(table, BoardQuery())
        assert [(board.publisher, str(board.date)) for board in history.boards] == [
            ("here", "2025-02-28"), ("here", "2025-03-07"), ("there", "2025-02-28"),
        ]  # fmt: skip
        assert len(boards_from_snapshots(table, BoardQuery(publisher="there")).boards) == 1

    def test_rows_known_to_be_wrong_are_left_out_and_counted(self):
        table = pl.concat(
            [
                snapshots(),
                snapshots(date=DAY - datetime.timedelta(1), relabelled=True),
                snapshots(date=DAY - datetime.timedelta(2), rating_system="online_elo"),
            ]
        )
        history = boards_from_snapshots(table, BoardQuery())
        assert [board.date for board in history.boards] == [DAY]
        assert len(history.notes) == 2
        assert "1 dates of here hold online Elo" in history.notes[0]
        assert "1 dates of here are marked as relabelled" in history.notes[1]

    @pytest.mark.parametrize(
        ("publisher", "kind"),
        [
            ("lmarena/arena-catalog", "committed"),
            ("oolong-tea-2026/arena-ai-leaderboards", "collected"),
            ("jasontrigg0/chatbot-arena-history", "published"),
            ("me", "stated"),
        ],
    )
    def test_it_is_known_what_kind_of_date_a_mirror_gives(self, publisher: str, kind: str):
        board = board_from_snapshots(snapshots(source=publisher), BoardQuery(date=DAY))
        assert (board.date_kind, board.publisher) == (kind, publisher)
        if publisher == "me":
            told = board_from_snapshots(snapshots(source="me"), BoardQuery(date=DAY, date_kind="published"))
            assert told.date_kind == "published"

    def test_a_row_that_occurs_twice_counts_once_and_contradictory_ones_not_at_all(self):
        table = pl.concat(
            [snapshots(), snapshots(), snapshots(model="n"), snapshots(model="n", rating=1205.0), snapshots(model="o")]
        )
        board = board_from_snapshots(table, BoardQuery(date=DAY))
        assert board.ratings["policy_model"].to_list() == ["m", "o"]
        assert board.notes == ("left out, because the board gives them several ratings: n",)

    def test_no_such_board(self):
        with pytest.raises(RatingsError, match=r"no snapshot for category 'maths'.*nearest dates: none"):
            boards_from_snapshots(snapshots(), BoardQuery(category="maths"))


class TestOfficialDataset:
    def test_the_latest_date_without_a_date_and_another_with_one(self):
        table = pl.concat([official(), official(leaderboard_publish_date="2025-01-01", rating=1100.5)])
        latest = the_only(boards_from_official(table.lazy(), BoardQuery(), every_date=False).boards)
        assert (str(latest.date), latest.date_kind) == ("2025-02-27", "published")
        assert latest.ratings.rows() == [("m", 1200.5, 1190.5, 1210.5, 100)]
        asked = BoardQuery(date=datetime.date(2025, 1, 1))
        assert (
            the_only(boards_from_official(table.lazy(), asked, every_date=False).boards).ratings["rating"][0] == 1100.5
        )

    def test_dates_of_any_type(self):
        day = official().with_columns(pl.col("leaderboard_publish_date").str.to_date())
        stamp = official().with_columns(pl.col("leaderboard_publish_date").str.to_datetime())
        for table in (day, stamp):
            board = the_only(boards_from_official(table.lazy(), BoardQuery(), every_date=False).boards)
            assert str(board.date) == "2025-02-27"

    def test_models_without_a_rating_are_left_out_and_named(self):
        table = pl.concat([official(), official(model_name="falcon", rating=float("nan"), vote_count=None)])
        board = the_only(boards_from_official(table.lazy(), BoardQuery(), every_date=False).boards)
        assert board.ratings.height == 1
        assert board.notes == ("left out, because the board gives them no rating: falcon",)

    def test_missing_intervals_stay_missing(self):
        table = official(rating_lower=None, rating_upper=float("nan"))
        board = the_only(boards_from_official(table.lazy(), BoardQuery(), every_date=False).boards)
        assert board.ratings.rows() == [("m", 1200.5, None, None, 100)]

    def test_online_elo_is_refused_and_left_out_of_the_history(self):
        table = pl.concat([official(), official(leaderboard_publish_date="2023-12-20")])
        with pytest.raises(RatingsError, match=r"2023-12-20 are online Elo.*from 2024-01-09 on"):
            boards_from_official(table.lazy(), BoardQuery(date=datetime.date(2023, 12, 20)), every_date=False)
        history = boards_from_official(table.lazy(), BoardQuery(), every_date=True)
        assert len(history.boards) == 1
        assert history.notes == ("1 dates before 2024-01-09 hold online Elo and are left out",)

    def test_what_there_is_is_listed(self):
        with pytest.raises(RatingsError, match=r"no category 'hard_6'; it has overall"):
            boards_from_official(official().lazy(), BoardQuery(category="hard_6"), every_date=False)
        with pytest.raises(RatingsError, match=r"no snapshot of 2025-03-01.*nearest dates: 2025-02-27"):
            boards_from_official(official().lazy(), BoardQuery(date=datetime.date(2025, 3, 1)), every_date=False)


@pytest.mark.real
class TestRealSnapshots:
    def test_every_board_is_readable_with_and_without_style_control(self, shared_data: Path):
        table = pl.read_parquet(shared_data / "elo_snapshots.parquet")
        plain, styled = (boards_from_snapshots(table, BoardQuery(style_control=style)) for style in (False, True))
        assert (len(plain.boards), len(styled.boards)) == (92 + 84 + 19, 17 + 32)
        assert any("21 dates of jasontrigg0" in note for note in plain.notes)
        assert any("2 dates of lmarena/arena-catalog are marked as relabelled" in note for note in styled.notes)

    def test_the_papers_seven_models_have_the_papers_ratings(self, shared_data: Path):
        # the arena_score of the reference repository's configs/pm_config.json
        reference = {
            "gpt-4o-mini-2024-07-18": 1273, "qwen2.5-72b-instruct": 1258, "llama-3.1-70b-instruct": 1248, "gemma-2-27b-it": 1220,
            "gemma-2-9b-it-simpo": 1216, "gemma-2-9b-it": 1191, "llama-3.1-8b-instruct": 1176,
        }  # fmt: skip
        table = pl.read_parquet(shared_data / "elo_snapshots.parquet")
        query = BoardQuery(date=datetime.date(2024, 12, 31), publisher="fboulnois/llm-leaderboard-csv")
        ratings = dict(board_from_snapshots(table, query).ratings.select("policy_model", "rating").rows())
        assert {name: ratings[name] for name in reference} == reference
