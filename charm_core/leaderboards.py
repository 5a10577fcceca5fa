"""Leaderboard documents in the formats that people publish, to one RATINGS frame.

Parsing only: fetching and storing is the business of tasks/arena.py. Nothing is guessed: a document in which the wanted
board is missing or ambiguous is an error that lists what there is.
"""

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from charm_core.errors import RatingsError
from charm_core.tables import RATINGS, validate

_OVERALL = "overall"
_CATALOG_OVERALL = "full"
_NAMES_SHOWN = 30


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


def ratings_from_snapshots(
    snapshots: pl.DataFrame, *, date: datetime.date | None, category: str, style_control: bool, publisher: str | None
) -> pl.DataFrame:
    """One snapshot out of a long table of many.

    Args:
        snapshots: Columns date, model, category, style_control, rating, ci_low, ci_high, votes, source; rows marked
            ``relabelled`` or ``rating_system == "online_elo"`` are left out, for they are known to be wrong or noise.
        date: Date of the snapshot.
        category: Board category, such as ``overall``.
        style_control: Whether the style-controlled ratings are wanted.
        publisher: Value of ``source``, needed where several published one on that date.

    Raises:
        RatingsError: No such snapshot (dates near it are listed), or several; a column of the wrong type.
        TableError: Bad values, see ``tables.validate``.
    """
    needed = ["date", "model", "category", "style_control", "rating", "ci_low", "ci_high", "votes", "source"]
    missing = [name for name in needed if name not in snapshots.columns]
    if missing:
        raise RatingsError(f"the snapshots table lacks the columns {missing}; it has {snapshots.columns}")
    if date is None:
        raise RatingsError("a table of many snapshots needs arena.date; give the date of the one to use")
    board = _trusted(_typed(snapshots)).filter(
        pl.col("category") == category,
        pl.col("style_control") == style_control,
        pl.lit(True) if publisher is None else pl.col("source") == publisher,
    )
    found = board.filter(pl.col("date") == date)
    if found.is_empty():
        near = sorted(set(board.get_column("date").to_list()), key=lambda day: abs((day - date).days))[:5]
        raise RatingsError(
            f"no snapshot of {date} for category {category!r}, style_control={style_control}"
            f"{f', publisher {publisher!r}' if publisher else ''}; nearest dates: {', '.join(map(str, near)) or 'none'}"
        )
    publishers = found.get_column("source").unique().sort().to_list()
    if len(publishers) > 1:
        raise RatingsError(f"{len(publishers)} publishers have a snapshot of {date}: {publishers}; set arena.publisher")
    return _canonical(found, "model", "ci_low", "ci_high")


def ratings_from_catalog(document: Mapping[str, Any], *, category: str) -> pl.DataFrame:
    """arena-catalog's JSON: category, then model, then rating with 2.5 % and 97.5 % quantiles.

    Raises:
        RatingsError: The category is missing, or an entry lacks a field.
        TableError: Bad values, see ``tables.validate``.
    """
    key = _CATALOG_OVERALL if category == _OVERALL else category
    if key not in document:
        raise RatingsError(f"the leaderboard has no category {key!r}; it has {_some(list(document))}")
    board = document[key]
    if not isinstance(board, Mapping) or not board:
        raise RatingsError(
            f"the category {key!r} of the leaderboard must map models to ratings; check the file's format"
        )
    fields = ("rating", "rating_q025", "rating_q975")
    for model, entry in board.items():
        if not (isinstance(entry, Mapping) and all(isinstance(entry.get(field), (int, float)) for field in fields)):
            raise RatingsError(f"the entry of {model!r} needs the numbers {list(fields)} but is {entry!r}")
    rows = [{"model": model, **{field: float(entry[field]) for field in fields}} for model, entry in board.items()]
    table = pl.DataFrame(rows, infer_schema_length=None).with_columns(votes=pl.lit(None, dtype=pl.Int64))
    return _canonical(table, "model", "rating_q025", "rating_q975")


def _trusted(snapshots: pl.DataFrame) -> pl.DataFrame:
    kept = snapshots
    if "relabelled" in kept.columns:
        kept = kept.filter(~pl.col("relabelled").cast(pl.Boolean).fill_null(value=False))
    if "rating_system" in kept.columns:
        kept = kept.filter(pl.col("rating_system").fill_null("bradley_terry") != "online_elo")
    return kept


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


def _canonical(table: pl.DataFrame, model: str, low: str, high: str) -> pl.DataFrame:
    return validate(
        table.select(
            pl.col(model).alias("policy_model"),
            "rating",
            pl.col(low).alias("rating_low"),
            pl.col(high).alias("rating_high"),
            "votes",
        ),
        RATINGS,
    )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(sorted(names)[:_NAMES_SHOWN])
    return shown if len(names) <= _NAMES_SHOWN else f"{shown}, … ({len(names)})"
