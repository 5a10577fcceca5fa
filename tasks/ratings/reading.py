"""What is in a leaderboard file, whatever its format: read from a verified local file, computed by ``charm_core``."""

import json
from pathlib import Path
from typing import Any

import polars as pl

from charm_core.bradley_terry import ratings_from_battles
from charm_core.errors import ConfigError, RatingsError, TableError
from charm_core.leaderboard_formats import table_format
from charm_core.leaderboards import BoardHistory, BoardQuery, DatedBoard, board_as_asked, board_from_document
from charm_core.raw_battles import BattleTable, is_table_of_votes, read_battles, style_covariates
from charm_core.style_control import fit_style_control
from tasks.store import SourceFile, file_digest, read_source


def read_boards(
    files: tuple[SourceFile, ...],
    responses: SourceFile | None,
    query: BoardQuery,
    battles: BattleTable,
    *,
    every_date: bool = False,
) -> BoardHistory:
    """Read the wanted board out of a leaderboard file, or fit it to the votes in it.

    Args:
        files: A file, or the parts of one table.
        responses: Votes only: another file with the responses that were voted on.
        query: Which board.
        battles: Votes only: what their table looks like.
        every_date: All dates, where the file has several.

    Raises:
        RatingsError: The board is not there, or the file has a form that is not known.
        TableError: An unreadable table or bad values.
        GraphError: The votes do not determine the ratings.
    """
    document = _document(files[0])
    if document is not None:
        return BoardHistory(boards=(board_from_document(document, query),))
    table = _scan(files)
    columns = table.collect_schema().names()
    read = None if is_table_of_votes(columns, battles) else table_format(columns).read
    if read is None:
        return BoardHistory(boards=(_fitted(table.collect(), responses, query, battles),))
    return read(table, query, every_date)


def _document(file: SourceFile) -> dict[str, Any] | None:
    """A JSON file that is one object; None for a table."""
    if not file.path.endswith(".json"):
        return None
    try:
        document = json.loads(file.read_text())
    except ValueError as error:
        raise RatingsError(f"{file.path} is not JSON: {error}") from None
    return document if isinstance(document, dict) else None


def _scan(files: tuple[SourceFile, ...]) -> pl.LazyFrame:
    """A table, read lazily where its format allows that."""
    if any(not file.path.endswith(".parquet") for file in files):
        return pl.concat([read_source(file) for file in files], how="vertical_relaxed").lazy()
    for file in files:
        if not Path(file.path).is_file() or file_digest(Path(file.path)) != file.digest:
            raise ConfigError(f"{file.path} is gone or has changed since this run started; run again")
    try:
        table = pl.scan_parquet([file.path for file in files])
        table.collect_schema()
    # some damaged Parquet files make Polars panic, which is not an Exception
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
        raise TableError(f"{files[0].path} is not a readable parquet table: {error}") from None
    return table


def _fitted(table: pl.DataFrame, responses: SourceFile | None, query: BoardQuery, battles: BattleTable) -> DatedBoard:
    votes = read_battles(table, battles)
    notes = [f"Bradley-Terry fit of {votes.battles.height:,} votes", *votes.notes]
    if query.style_control:
        covariates = style_covariates(votes, battles, read_source(responses) if responses else None)
        fit = fit_style_control(votes.battles, covariates)
        ratings = fit.frame()
        notes += [f"style: {coefficient.sentence()}" for coefficient in fit.coefficients]
        notes += [f"style: {name} never differs between two responses" for name in fit.constant]
    else:
        ratings = ratings_from_battles(votes.battles)
    return board_as_asked(ratings, query, tuple(notes))
