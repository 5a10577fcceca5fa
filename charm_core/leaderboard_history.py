"""Tables of many boards and dates: the official dataset, and collections of snapshots.

What is known to be wrong or on another footing is left out, and said: ratings of the time before the Arena fitted
Bradley-Terry models (online Elo depends on the order of the votes), and style-controlled numbers in files that were called
raw. A mirror's date can be that of a commit or of its collecting; which one it is stays with the board.
"""

import datetime
from collections.abc import Mapping

import polars as pl

from charm_core.errors import RatingsError
from charm_core.leaderboards import (
    BoardHistory,
    BoardQuery,
    DatedBoard,
    DateKind,
    TableFormat,
    canonical_ratings,
    renamed,
)

BRADLEY_TERRY_SINCE = datetime.date(2024, 1, 9)
"""Since when the official dataset holds Bradley-Terry ratings; online Elo before."""

_DATE_KINDS: Mapping[str, DateKind] = {
    "lmarena/arena-catalog": "committed",
    "fboulnois/llm-leaderboard-csv": "committed",
    "oolong-tea-2026/arena-ai-leaderboards": "collected",
    "jasontrigg0/chatbot-arena-history": "published",  # dates of the Arena's own result files
}
_NEAREST_SHOWN = 5


def ratings_from_snapshots(
    snapshots: pl.DataFrame, *, date: datetime.date | None, category: str, style_control: bool, publisher: str | None
) -> pl.DataFrame:
    """The RATINGS frame of one snapshot, see ``board_from_snapshots``."""
    query = BoardQuery(category=category, style_control=style_control, date=date, publisher=publisher)
    return board_from_snapshots(snapshots, query).ratings


def board_from_snapshots(snapshots: pl.DataFrame, query: BoardQuery) -> DatedBoard:
    """One snapshot out of a long table of many.

    Args:
        snapshots: Columns date, model, category, style_control, rating, ci_low, ci_high, votes, source; rows marked
            ``relabelled`` or ``rating_system == "online_elo"`` are left out, for they are known to be wrong or noise.
        query: Its date, category and style control; the publisher (``source``) too, where several published one on that
            date.

    Raises:
        RatingsError: No such snapshot (dates near it are listed), or several; a column of the wrong type.
        TableError: Bad values, see ``tables.validate``.
    """
    board = _matching(snapshots, query)
    if query.date is None:
        raise RatingsError("a table of many snapshots needs arena.date; give the date of the one to use")
    found = board.filter(pl.col("date") == query.date)
    if found.is_empty():
        raise RatingsError(_no_snapshot(query, board.get_column("date").to_list()))
    publishers = found.get_column("source").unique().sort().to_list()
    if len(publishers) > 1:
        raise RatingsError(
            f"{len(publishers)} publishers have a snapshot of {query.date}: {publishers}; set arena.publisher"
        )
    return _snapshot(found, query)


def boards_from_snapshots(snapshots: pl.DataFrame, query: BoardQuery) -> BoardHistory:
    """All dates of one category, with or without style control, of one publisher or of each.

    Raises:
        RatingsError: There is none, or a column has the wrong type.
        TableError: Bad values, see ``tables.validate``.
    """
    board = _matching(snapshots, query)
    if board.is_empty():
        raise RatingsError(_no_snapshot(query, []))
    parts = board.sort("source", "date").partition_by("source", "date", maintain_order=True)
    return BoardHistory(boards=tuple(_snapshot(part, query) for part in parts), notes=_left_out(snapshots, query))


def _read_snapshots(table: pl.LazyFrame, query: BoardQuery, every_date: bool) -> BoardHistory:
    snapshots = table.collect()
    if every_date:
        return boards_from_snapshots(snapshots, query)
    return BoardHistory(boards=(board_from_snapshots(snapshots, query),))


SNAPSHOTS = TableFormat(
    columns=("date", "model", "category", "style_control", "rating", "ci_low", "ci_high", "votes", "source"),
    read=_read_snapshots,
)


def boards_from_official(table: pl.LazyFrame, query: BoardQuery, every_date: bool) -> BoardHistory:
    """Boards of the official dataset ``lmarena-ai/leaderboard-dataset``, read lazily: its history has a million rows.

    Args:
        table: A scan of one of its configurations.
        query: Category and date; without a date, the latest one.
        every_date: All dates instead of one.

    Raises:
        RatingsError: No such category or date (what there is is listed), or a date of the time of online Elo.
        TableError: Bad values, see ``tables.validate``.
    """
    day = pl.col("leaderboard_publish_date").cast(pl.String).str.slice(0, 10)
    rows = table.filter(pl.col("category") == query.category).select(
        "model_name", "rating", "rating_lower", "rating_upper", "vote_count", day.str.to_date("%Y-%m-%d").alias("date")
    )
    dates = rows.select(pl.col("date").unique().sort()).collect().get_column("date").to_list()
    if not dates:
        known = table.select(pl.col("category").unique().sort()).collect().get_column("category").to_list()
        raise RatingsError(f"the dataset has no category {query.category!r}; it has {', '.join(known)}")
    wanted = _wanted_dates(dates, query, every_date=every_date)
    found = rows.filter(pl.col("date").is_in(wanted)).collect()
    boards = tuple(
        _official_board(part, query) for part in found.sort("date").partition_by("date", maintain_order=True)
    )
    early = [date for date in dates if date < BRADLEY_TERRY_SINCE]
    note = f"{len(early)} dates before {BRADLEY_TERRY_SINCE} hold online Elo and are left out"
    return BoardHistory(boards=boards, notes=(note,) if every_date and early else ())


OFFICIAL = TableFormat(
    columns=(
        "model_name", "rating", "rating_lower", "rating_upper", "vote_count", "category", "leaderboard_publish_date",
    ),
    read=boards_from_official,
)  # fmt: skip


def _wanted_dates(dates: list[datetime.date], query: BoardQuery, *, every_date: bool) -> list[datetime.date]:
    if every_date:
        return [date for date in dates if date >= BRADLEY_TERRY_SINCE]
    date = query.date or dates[-1]
    if date not in dates:
        raise RatingsError(_no_snapshot(query, dates))
    if date < BRADLEY_TERRY_SINCE:
        raise RatingsError(
            f"ratings of {date} are online Elo, which depends on the order of the votes; choose a date from "
            f"{BRADLEY_TERRY_SINCE} on, when the Arena changed to Bradley-Terry"
        )
    return [date]


def _official_board(part: pl.DataFrame, query: BoardQuery) -> DatedBoard:
    numbers = ("rating", "rating_lower", "rating_upper", "vote_count")
    table = part.with_columns(pl.col(name).cast(pl.Float64).fill_nan(None) for name in numbers)
    unrated = table.filter(pl.col("rating").is_null()).get_column("model_name").sort().to_list()
    ratings, notes = canonical_ratings(
        renamed(
            table.filter(pl.col("rating").is_not_null()),
            "model_name", "rating", "rating_lower", "rating_upper", "vote_count",
        )
    )  # fmt: skip
    without = (f"left out, because the board gives them no rating: {', '.join(unrated)}",) if unrated else ()
    return DatedBoard(
        ratings=ratings,
        category=query.category,
        style_control=query.style_control,
        date=part.get_column("date")[0],
        date_kind="published",
        publisher=query.publisher,
        notes=notes + without,
    )


def _matching(snapshots: pl.DataFrame, query: BoardQuery) -> pl.DataFrame:
    missing = [name for name in SNAPSHOTS.columns if name not in snapshots.columns]
    if missing:
        raise RatingsError(f"the snapshots table lacks the columns {missing}; it has {snapshots.columns}")
    return _trusted(_of_board(_typed(snapshots), query))


def _of_board(snapshots: pl.DataFrame, query: BoardQuery) -> pl.DataFrame:
    return snapshots.filter(
        pl.col("category") == query.category,
        pl.col("style_control") == query.style_control,
        pl.lit(True) if query.publisher is None else pl.col("source") == query.publisher,
    )


def _snapshot(part: pl.DataFrame, query: BoardQuery) -> DatedBoard:
    publisher = part.get_column("source")[0]
    ratings, notes = canonical_ratings(renamed(part, "model", "rating", "ci_low", "ci_high", "votes"))
    return DatedBoard(
        ratings=ratings,
        category=query.category,
        style_control=query.style_control,
        date=part.get_column("date")[0],
        date_kind=_DATE_KINDS.get(publisher, query.date_kind),
        publisher=publisher,
        notes=notes,
    )


def _relabelled(snapshots: pl.DataFrame) -> pl.Expr:
    if "relabelled" not in snapshots.columns:
        return pl.lit(False)
    return pl.col("relabelled").cast(pl.Boolean).fill_null(value=False)


def _online_elo(snapshots: pl.DataFrame) -> pl.Expr:
    if "rating_system" not in snapshots.columns:
        return pl.lit(False)
    return pl.col("rating_system").fill_null("bradley_terry") == "online_elo"


def _trusted(snapshots: pl.DataFrame) -> pl.DataFrame:
    return snapshots.filter(~_relabelled(snapshots), ~_online_elo(snapshots))


def _left_out(snapshots: pl.DataFrame, query: BoardQuery) -> tuple[str, ...]:
    board = _of_board(_typed(snapshots), query)
    notes = []
    for marked, why in (
        (_online_elo(board), "hold online Elo, which depends on the order of the votes"),
        (_relabelled(board), "are marked as relabelled: style-controlled numbers in a file called raw, or the reverse"),
    ):
        rows = board.filter(marked).select("source", "date").unique().sort("source", "date")
        for (publisher,), days in rows.group_by("source", maintain_order=True):
            notes.append(f"{days.height} dates of {publisher} {why}; they are left out")
    return tuple(notes)


def _typed(snapshots: pl.DataFrame) -> pl.DataFrame:
    """CSV files have their dates as text."""
    dates = snapshots.get_column("date")
    days = dates.str.to_date("%Y-%m-%d", strict=False) if dates.dtype == pl.String else dates
    if days.dtype != pl.Date or days.null_count():
        raise RatingsError(
            f"column 'date' of the snapshots must hold dates such as 2025-02-28, not {dates.head(3).to_list()}"
        )
    for name in ("style_control", "relabelled"):
        if snapshots.schema.get(name, pl.Boolean) not in (pl.Boolean, pl.Null):
            raise RatingsError(f"column {name!r} of the snapshots must be true or false, not {snapshots.schema[name]}")
    return snapshots.with_columns(days)


def _no_snapshot(query: BoardQuery, dates: list[datetime.date]) -> str:
    which = f"category {query.category!r}, style_control={query.style_control}"
    if query.publisher:
        which += f", publisher {query.publisher!r}"
    wanted = f"of {query.date} " if query.date else ""
    near = sorted(set(dates), key=lambda day: abs((day - (query.date or day)).days))[:_NEAREST_SHOWN]
    return f"no snapshot {wanted}for {which}; nearest dates: {', '.join(map(str, near)) or 'none'}"
