"""Leaderboards in the formats that people publish, to one RATINGS frame each.

Parsing only: fetching and storing is the business of tasks/arena.py. Nothing is guessed: a document in which the wanted
board is missing or ambiguous is an error that lists what there is, and one whose form has changed is an error that shows
what was expected and what was found. Tables of many dates are in ``leaderboard_history.py``; which formats of tables there
are stands in ``leaderboard_formats.py``.
"""

import datetime
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import polars as pl
from pydantic import Field

from charm_core.errors import RatingsError
from charm_core.records import Record
from charm_core.tables import RATINGS, validate

DateKind = Literal["published", "committed", "collected", "stated"]
"""What a board's date is: of publication, of a commit in a mirror, of a mirror's collecting, or stated without saying."""

OVERALL = "overall"
_CATALOG_OVERALL = "full"
_NAMES_SHOWN = 30
_STYLE_BY_DEFAULT = datetime.date(2025, 5, 16)
_STYLED_SITES = ("text", "vision")
_HALF_WIDTHS = r"^\+(\d+(?:\.\d+)?)\s*/\s*[-−](\d+(?:\.\d+)?)$"


class BoardQuery(Record):
    """Which board of a document is wanted."""

    category: str = Field(OVERALL, description="Board category.")
    style_control: bool = Field(False, description="Whether style-controlled ratings are wanted.")
    date: datetime.date | None = Field(None, description="Its date.")
    date_kind: DateKind = Field("stated", description="What kind of date that is, where the document does not say.")
    publisher: str | None = Field(None, description="Who published it, where several did.")


@dataclass(frozen=True, kw_only=True, eq=False)
class DatedBoard:
    """One board of one date."""

    ratings: pl.DataFrame
    """A RATINGS frame."""
    category: str
    style_control: bool
    date: datetime.date | None
    date_kind: DateKind
    publisher: str | None = None
    """Who published it, if the document says so."""
    notes: tuple[str, ...] = ()


def board_as_asked(ratings: pl.DataFrame, query: BoardQuery, notes: tuple[str, ...] = ()) -> DatedBoard:
    """A board out of a document that says nothing of its date and publisher: they are what the query says."""
    return DatedBoard(
        ratings=ratings,
        category=query.category,
        style_control=query.style_control,
        date=query.date,
        date_kind=query.date_kind,
        publisher=query.publisher,
        notes=notes,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class BoardHistory:
    """Boards in order of publisher and date."""

    boards: tuple[DatedBoard, ...]
    notes: tuple[str, ...] = ()
    """What was left out as a whole."""


BoardReader = Callable[[pl.LazyFrame, BoardQuery, bool], BoardHistory]
"""From a table to the wanted board, or to those of every date where that is wanted and the table has them."""


@dataclass(frozen=True, kw_only=True)
class TableFormat:
    """A format of tables, recognised by its columns, and what reads it."""

    columns: tuple[str, ...]
    """All of them are needed."""
    read: BoardReader | None
    """None: it holds votes, to which a board is fitted."""


def one_board(read: Callable[[pl.DataFrame, BoardQuery], DatedBoard]) -> BoardReader:
    """The reader of a format whose tables hold one board, out of a function that reads such a table."""

    def boards(table: pl.LazyFrame, query: BoardQuery, every_date: bool) -> BoardHistory:  # noqa: ARG001 - there is one
        return BoardHistory(boards=(read(table.collect(), query),))

    return boards


def board_from_document(document: Mapping[str, Any], query: BoardQuery) -> DatedBoard:
    """A JSON document: arena-catalog's, or a copy of the Arena's page with a meta block.

    Raises:
        RatingsError: The wanted board is not in it, or its form is not the one expected.
        TableError: Bad values, see ``tables.validate``.
    """
    if "meta" in document and "models" in document:
        return board_from_site(document, query)
    return board_as_asked(ratings_from_catalog(document, category=query.category), query)


def board_from_ratings(table: pl.DataFrame, query: BoardQuery) -> DatedBoard:
    """A table of one board with our own columns; see ``ratings_from_table`` for the errors."""
    return board_as_asked(ratings_from_table(table), query)


def board_from_mirror(table: pl.DataFrame, query: BoardQuery) -> DatedBoard:
    """A table of one board with the columns of the CSV mirrors.

    Raises:
        RatingsError: Another category than the overall board is wanted, or an interval is not of the form ``+5/-5``.
        TableError: Bad values, see ``tables.validate``.
    """
    if query.category != OVERALL:
        raise RatingsError(f"a CSV mirror holds the overall board only, not {query.category!r}; use another source")
    ratings, notes = ratings_from_mirror(table)
    return board_as_asked(ratings, query, notes)


RATINGS_TABLE = TableFormat(columns=("policy_model", "rating"), read=one_board(board_from_ratings))
MIRROR = TableFormat(columns=("model", "arena_score", "95_pct_ci", "votes"), read=one_board(board_from_mirror))


def ratings_from_table(table: pl.DataFrame) -> pl.DataFrame:
    """A table that already has the columns ``policy_model`` and ``rating``; intervals and votes are optional.

    Raises:
        RatingsError: A needed column is missing.
        TableError: Bad values, see ``tables.validate``.
    """
    missing = [name for name in ("policy_model", "rating") if name not in table.columns]
    if missing:
        raise RatingsError(f"a ratings table needs the columns policy_model and rating but has {table.columns}")
    absent = [
        pl.lit(None, dtype=RATINGS.columns[name]).alias(name) for name in RATINGS.columns if name not in table.columns
    ]
    return validate(table.with_columns(absent).select(list(RATINGS.columns)), RATINGS)


def ratings_from_catalog(document: Mapping[str, Any], *, category: str) -> pl.DataFrame:
    """arena-catalog's JSON: category, then model, then rating with 2.5 % and 97.5 % quantiles.

    Raises:
        RatingsError: The category is missing, or an entry lacks a field.
        TableError: Bad values, see ``tables.validate``.
    """
    key = _CATALOG_OVERALL if category == OVERALL else category
    if key not in document:
        raise RatingsError(f"the leaderboard has no category {key!r}; it has {_some(list(document))}")
    board = document[key]
    if not isinstance(board, Mapping) or not board:
        raise RatingsError(
            f"the category {key!r} of the leaderboard must map models to ratings; check the file's format"
        )
    fields = ("rating", "rating_q025", "rating_q975")
    for model, entry in board.items():
        if not (isinstance(entry, Mapping) and all(_is_number(entry.get(field)) for field in fields)):
            raise RatingsError(f"the entry of {model!r} needs the numbers {list(fields)} but is {entry!r}")
    rows = [{"model": model, **{field: float(entry[field]) for field in fields}} for model, entry in board.items()]
    table = pl.DataFrame(rows, infer_schema_length=None).with_columns(votes=pl.lit(None, dtype=pl.Int64))
    return validate(renamed(table, "model", "rating", "rating_q025", "rating_q975", "votes"), RATINGS)


def ratings_from_mirror(table: pl.DataFrame) -> tuple[pl.DataFrame, tuple[str, ...]]:
    """A CSV mirror's table: whole-number ratings, intervals such as ``+5/-5``, display names.

    Returns:
        A RATINGS frame, and remarks on rows that were left out.

    Raises:
        RatingsError: An interval of another form.
        TableError: Bad values, see ``tables.validate``.
    """
    width = pl.col("95_pct_ci").cast(pl.String).str.strip_chars()
    found = table.with_columns(
        up=width.str.extract(_HALF_WIDTHS, 1).cast(pl.Float64),
        down=width.str.extract(_HALF_WIDTHS, 2).cast(pl.Float64),
    )
    unread = found.filter(width.is_not_null() & pl.col("up").is_null())
    if not unread.is_empty():
        row = unread.row(0, named=True)
        raise RatingsError(
            f"the interval of {row['model']!r} must look like +5/-5, not {row['95_pct_ci']!r}; "
            f"if the publisher changed the format, convert the column 95_pct_ci"
        )
    bounds = found.with_columns(low=pl.col("arena_score") - pl.col("down"), high=pl.col("arena_score") + pl.col("up"))
    return canonical_ratings(renamed(bounds, "model", "arena_score", "low", "high", "votes"))


def board_from_site(document: Mapping[str, Any], query: BoardQuery) -> DatedBoard:
    """A copy of the Arena's page: a meta block, and the top models with score and half-width of the interval.

    Raises:
        RatingsError: Another form, another date, another category, cut off, or ratings that are style-controlled while
            others were asked for.
        TableError: Bad values, see ``tables.validate``.
    """
    meta, models = document["meta"], document["models"]
    _check_site(meta, models, query)
    date = _written_date(meta["last_updated"])
    if query.date not in (None, date):
        raise RatingsError(f"the document is of {date} (last_updated), not of {query.date}; correct arena.date")
    if not query.style_control and meta.get("leaderboard") in _STYLED_SITES and date >= _STYLE_BY_DEFAULT:
        raise RatingsError(
            f"the Arena's {meta['leaderboard']} page of {date} shows style-controlled ratings, as it does by default since "
            f"{_STYLE_BY_DEFAULT}; set arena.style_control = true, or take ratings without it from another source"
        )
    rows = [
        {
            "policy_model": entry["model"],
            "rating": float(entry["score"]),
            "rating_low": float(entry["score"]) - entry["ci"],
            "rating_high": float(entry["score"]) + entry["ci"],
            "votes": entry.get("votes"),
        }
        for entry in models
    ]
    ratings, notes = canonical_ratings(pl.DataFrame(rows, schema=dict(RATINGS.columns)))
    cut = f"the source lists its top {len(models)} models only: one that is missing may be rated lower"
    return DatedBoard(
        ratings=ratings,
        category=OVERALL,
        style_control=query.style_control,
        date=date,
        date_kind="published",
        publisher=query.publisher,
        notes=(*notes, cut),
    )


def style_by_name(name: str) -> bool | None:
    """What a file's name says about style control; None if it says nothing."""
    if re.search(r"style[-_ ]?c(?:on)?tr(?:o)?l", name, re.IGNORECASE):
        return True
    return False if re.search(r"leaderboard-(?:text|vision)\.json$", name) else None


def renamed(table: pl.DataFrame, model: str, rating: str, low: str, high: str, votes: str) -> pl.DataFrame:
    """The columns of RATINGS out of those of another table."""
    columns = zip(RATINGS.columns, (model, rating, low, high, votes), strict=True)
    return table.select(pl.col(theirs).alias(ours) for ours, theirs in columns)


def canonical_ratings(table: pl.DataFrame) -> tuple[pl.DataFrame, tuple[str, ...]]:
    """A RATINGS frame from published rows: a row that occurs twice counts once, and contradictory ones not at all.

    Returns:
        The frame, and remarks on the models that were left out.

    Raises:
        TableError: Bad values, see ``tables.validate``.
    """
    rows = table.unique(maintain_order=True)
    twice = rows.filter(pl.col("policy_model").is_duplicated()).get_column("policy_model").unique().sort().to_list()
    kept = rows.filter(~pl.col("policy_model").is_in(twice))
    note = f"left out, because the board gives them several ratings: {', '.join(twice)}"
    return validate(kept, RATINGS), (note,) if twice else ()


def _check_site(meta: Any, models: Any, query: BoardQuery) -> None:
    fields: dict[str, tuple[type, ...]] = {"model": (str,), "score": (int, float), "ci": (int, float)}
    if not (isinstance(meta, Mapping) and isinstance(meta.get("last_updated"), str)):
        raise RatingsError(f"the meta block needs last_updated, the date of publication, but is {meta!r}")
    if not (isinstance(models, Sequence) and models and all(isinstance(entry, Mapping) for entry in models)):
        raise RatingsError("models must be a list of entries with model, score and ci; check the file's format")
    for entry in models:
        if not all(isinstance(entry.get(name), kind) for name, kind in fields.items()):
            raise RatingsError(f"an entry needs {list(fields)} (a name and two numbers) but is {dict(entry)!r}")
    if meta.get("model_count", len(models)) != len(models):
        raise RatingsError(
            f"the document says that it lists {meta['model_count']} models but has {len(models)}; it was cut off"
        )
    if query.category != OVERALL:
        raise RatingsError(
            f"a copy of the Arena's page holds the overall board only, not {query.category!r}; use another source"
        )


def _written_date(text: str) -> datetime.date:
    for form in ("%b %d, %Y", "%Y-%m-%d"):
        # Polars reads English month names whatever the machine's language
        date: datetime.date | None = pl.Series([text]).str.to_date(form, strict=False)[0]
        if date is not None:
            return date
    raise RatingsError(f"last_updated must be a date such as 'Mar 26, 2026' or 2026-03-26, not {text!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(sorted(names)[:_NAMES_SHOWN])
    return shown if len(names) <= _NAMES_SHOWN else f"{shown}, … ({len(names)})"
