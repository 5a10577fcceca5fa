"""Ratings: read a board, or fit one from battles, and put it under the names that the responses use."""

import datetime
import json
import tomllib
from pathlib import Path
from typing import Any

import polars as pl
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from charm_core.bradley_terry import ratings_from_battles
from charm_core.elo import Alias, resolve_aliases
from charm_core.errors import ConfigError, RatingsError
from charm_core.leaderboards import ratings_from_catalog, ratings_from_snapshots, ratings_from_table
from charm_core.tables import BATTLES, RATINGS
from tasks.caching import step
from tasks.store import ArtifactRef, ArtifactStore, SourceFile, read_source


class ArenaConfig(BaseModel):
    """Which ratings: the board is a choice, and always shown."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = Field(
        description="Leaderboard file: arena-catalog JSON; a Parquet or CSV of many snapshots; "
        "or one with the columns policy_model and rating (rating_low, rating_high, votes)."
    )
    date: datetime.date | None = Field(
        default=None, description="Date of the snapshot: chooses it in a file of many, and is shown with the results."
    )
    category: str = Field(default="overall", description="Board category.")
    style_control: bool = Field(default=False, description="Whether the ratings are (to be) style-controlled.")
    publisher: str | None = Field(
        default=None, description="Who published the snapshot, where several did on one date."
    )
    licence: str = Field(default="", description="Licence of the ratings, shown with the results.")
    aliases: str | None = Field(
        default=None,
        description="TOML file of reviewed aliases: policy_model, arena_name, match (exact, near), reason.",
    )
    accept_near: tuple[str, ...] = Field(
        default=(), description="Policy models for which a near match in the alias file may be used."
    )

    def identity(self) -> dict[str, Any]:
        """What goes into cache keys of the whole board: the files come in by their content."""
        return self.model_dump(mode="json", exclude={"source", "aliases", "accept_near"})


class Board(BaseModel):
    """One snapshot of ratings and where it comes from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ratings: ArtifactRef
    name: str
    category: str
    style_control: bool
    date: datetime.date | None
    source: str
    licence: str = ""
    notes: tuple[str, ...] = ()


@step(version=1)
def collect_ratings(store: ArtifactStore, file: SourceFile, config: ArenaConfig) -> Board:
    """Read one board from a leaderboard file."""
    ratings = store.write_table(_read_board(file, config), RATINGS)
    return Board(
        ratings=ratings,
        name="Chatbot Arena",
        category=config.category,
        style_control=config.style_control,
        date=config.date,
        source=f"{Path(file.path).name}{f' ({config.publisher})' if config.publisher else ''}",
        licence=config.licence,
    )


@step(version=1)
def fit_arena_ratings(store: ArtifactStore, battles: ArtifactRef, name: str) -> Board:
    """Fit ratings to human votes."""
    ratings = store.write_table(ratings_from_battles(store.read_table(battles, BATTLES)), RATINGS)
    return Board(
        ratings=ratings,
        name="Simulated arena",
        category="overall",
        style_control=False,
        date=None,
        source=name,
        notes=(f"Bradley-Terry fit of {battles.rows:,} votes",),
    )


@step(version=1)
def match_ratings(
    store: ArtifactStore,
    board: Board,
    policy_models: tuple[str, ...],
    aliases: SourceFile | None,
    accept_near: tuple[str, ...],
) -> Board:
    """The board's ratings under the names of the given policy models."""
    table = read_aliases(aliases) if aliases else []
    ratings, applied = resolve_aliases(
        store.read_table(board.ratings, RATINGS), policy_models, table, accept_near=accept_near
    )
    notes = tuple(
        f"{alias.policy_model} has the rating of {alias.arena_name} ({alias.match}: {alias.reason})"
        for alias in applied
    )
    return board.model_copy(update={"ratings": store.write_table(ratings, RATINGS), "notes": board.notes + notes})


def read_aliases(file: SourceFile) -> list[Alias]:
    """Read a reviewed alias file: TOML with one ``[[alias]]`` table per entry.

    Raises:
        ConfigError: Not TOML, or an entry with missing or unknown fields.
    """
    try:
        document = tomllib.loads(file.read_text())
        return list(_AliasFile.model_validate(document).alias)
    except (tomllib.TOMLDecodeError, ValidationError) as error:
        raise ConfigError(f"the alias file {file.path} is wrong: {error}") from None


class _AliasFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    alias: tuple[Alias, ...]


def _read_board(file: SourceFile, config: ArenaConfig) -> pl.DataFrame:
    if file.path.endswith(".json"):
        try:
            document = json.loads(file.read_text())
        except ValueError as error:
            raise RatingsError(f"{file.path} is not JSON: {error}") from None
        if isinstance(document, dict):
            return ratings_from_catalog(document, category=config.category)
    table = read_source(file)
    if "policy_model" in table.columns:
        return ratings_from_table(table)
    return ratings_from_snapshots(
        table,
        date=config.date,
        category=config.category,
        style_control=config.style_control,
        publisher=config.publisher,
    )
