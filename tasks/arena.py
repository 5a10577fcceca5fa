"""Ratings: obtain a board from wherever it is published, or fit one from votes, and put it under the responses' names.

Fetching looks every time; what is read out of a file is cached by the file's content. Where a board came from is added
outside of the cached steps, so that it is always this run's.
"""

import datetime
import tomllib
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from charm_core.bradley_terry import ratings_from_battles
from charm_core.elo import Alias, resolve_aliases
from charm_core.errors import ConfigError
from charm_core.leaderboards import BoardHistory, BoardQuery, DateKind
from charm_core.raw_battles import BattleTable
from charm_core.tables import BATTLES, RATINGS
from tasks.addresses import SECRETLESS_SCHEMA, check_secretless
from tasks.caching import current_store, step
from tasks.ratings.fetching import FetchConfig
from tasks.ratings.reading import read_boards
from tasks.ratings.snapshots import BoardName, KeptSnapshot, RatingSnapshot, find_snapshot, keep_snapshots
from tasks.ratings.sources import HUB, Located, Origin, SourceQuery, local_file, locate
from tasks.store import ArtifactRef, ArtifactStore, SourceFile

DATE_NOTES: dict[DateKind, str] = {
    "committed": "the date is that of a commit in the mirror, not of publication",
    "collected": "the date is that on which the mirror was filled, not of publication",
}
"""What a report says about a date that is not that of publication."""


class ArenaConfig(BaseModel):
    """Which ratings: the board is a choice, and always shown."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = Field(
        default="",
        description="Path or https address of a leaderboard (arena-catalog JSON, CSV mirror, JSON with a meta block, a table of "
        "many snapshots, one with policy_model and rating, or raw votes); or the official dataset: its hub id, "
        "lmarena-ai/leaderboard-dataset, or a folder with its files. A login or key is named in braces: ?token={BOARD_TOKEN}.",
        json_schema_extra=SECRETLESS_SCHEMA,
    )
    snapshot: str | None = Field(
        default=None,
        description="Instead of a source: a snapshot in the store, by its date or the beginning of its digest.",
    )
    date: datetime.date | None = Field(
        default=None,
        description="Date of the board: chooses it in a source of many, and is shown with the results. Of the official dataset the "
        "latest board is taken without it.",
    )
    date_kind: DateKind = Field(
        default="stated",
        description="What kind of date that is, where neither the source nor its publisher is known to say.",
    )
    category: str = Field(default="overall", description="Board category, as its publisher calls it.")
    style_control: bool = Field(default=False, description="Whether the ratings are (to be) style-controlled.")
    arena: str = Field(default="text", description="Arena: text, vision, ...; a configuration of the official dataset.")
    publisher: str | None = Field(
        default=None,
        description="Who published the board: chooses it where several did on one date, and names a file that does not say.",
    )
    revision: str | None = Field(default=None, description="Hub dataset: branch, tag or commit; default: main.")
    hub_endpoint: str = Field(
        default=HUB, description="Hub dataset: address of the hub.", json_schema_extra=SECRETLESS_SCHEMA
    )
    licence: str = Field(default="", description="Licence of the ratings, shown with the results.")
    attribution: str = Field(default="", description="Whom to name as their source.")
    battles: BattleTable = Field(default=BattleTable(), description="Raw votes only: what the table looks like.")
    fetching: FetchConfig = Field(default=FetchConfig(), description="How files are fetched from the web.")
    aliases: str | None = Field(
        default=None,
        description="TOML file of reviewed aliases: policy_model, arena_name, match (exact, near, unknown), reason.",
    )
    accept_near: tuple[str, ...] = Field(
        default=(), description="Policy models for which a near match in the alias file may be used."
    )

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if bool(self.source) == (self.snapshot is not None):
            raise ValueError("give a source or a snapshot, and only one of them")
        if self.snapshot is not None and self.date is not None:
            raise ValueError("a snapshot says which date it is of; leave date out")
        return self

    @model_validator(mode="after")
    def _no_secrets(self) -> Self:
        check_secretless(self.source, "source")
        check_secretless(self.hub_endpoint, "hub_endpoint")
        check_secretless(self.battles.responses or "", "battles.responses")
        return self

    def identity(self) -> dict[str, Any]:
        """What decides what is read out of a file: not where it lies, and not under which names it is used."""
        read = {"date", "date_kind", "category", "style_control", "publisher"}
        return self.model_dump(mode="json", include=read) | {
            "battles": self.battles.model_dump(mode="json", exclude={"responses"})
        }

    def query(self) -> BoardQuery:
        """Which board of a document is wanted."""
        return BoardQuery(
            category=self.category,
            style_control=self.style_control,
            date=self.date,
            date_kind=self.date_kind,
            publisher=self.publisher,
        )


class Board(BaseModel):
    """One board of one date and where it comes from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ratings: ArtifactRef
    name: str = "Chatbot Arena"
    arena: str = "text"
    publisher: str = Field(default="", description="Who published it.")
    category: str
    style_control: bool
    date: datetime.date | None
    date_kind: DateKind = Field(default="stated", description="What kind of date it is.")
    source: str = Field(default="", description="Where it comes from, for people.")
    url: str = Field(default="", description="Path or address.")
    revision: str | None = Field(default=None, description="Commit of the source, where it has one.")
    document_digest: str = Field(default="", description="SHA-256 of the file that it was read from.")
    licence: str = ""
    attribution: str = ""
    snapshot: str | None = Field(default=None, description="Digest of the snapshot that it is kept as.")
    notes: tuple[str, ...] = ()

    def named(self) -> BoardName:
        """Which board it is, whatever the date."""
        return BoardName(**{field: getattr(self, field) for field in BoardName.model_fields})


class Boards(BaseModel):
    """Boards of many dates."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    boards: tuple[Board, ...]
    notes: tuple[str, ...] = Field(default=(), description="What was left out as a whole.")


def obtain_board(config: ArenaConfig) -> Board:
    """The board that the settings name, kept as a snapshot.

    Raises:
        ConfigError: The source does not exist, is refused, or contradicts the settings.
        RatingsError: The board is not there, or its form has changed.
        ServiceError: A server does not answer, or not as it should.
    """
    store = current_store()
    if config.snapshot is not None:
        return board_of(_find_pinned(store, config, config.snapshot))
    located, responses = _located(store, config, every_date=False)
    board = collect_ratings(located.files[0], config, located.files[1:], responses)
    return _kept(store, [_placed(board, located, config)])[0]


def obtain_history(config: ArenaConfig) -> Boards:
    """All dates of the boards that the settings name, each kept as a snapshot; of every publisher, if none is named.

    Raises:
        ConfigError, RatingsError, ServiceError: As ``obtain_board``.
    """
    store = current_store()
    if config.snapshot is not None:
        raise ConfigError("a history needs arena.source: a snapshot is of one date")
    located, responses = _located(store, config, every_date=True)
    found = collect_history(located.files[0], config, located.files[1:], responses)
    placed = [_placed(board, located, config) for board in found.boards]
    return Boards(boards=tuple(_kept(store, placed)), notes=found.notes)


@step(version=1)
def collect_ratings(
    store: ArtifactStore,
    file: SourceFile,
    config: ArenaConfig,
    parts: tuple[SourceFile, ...] = (),
    responses: SourceFile | None = None,
) -> Board:
    """Read one board from a leaderboard, whose table may have several parts, or fit it to votes."""
    return _stored(store, read_boards((file, *parts), responses, config.query(), config.battles)).boards[0]


@step(version=1)
def collect_history(
    store: ArtifactStore,
    file: SourceFile,
    config: ArenaConfig,
    parts: tuple[SourceFile, ...] = (),
    responses: SourceFile | None = None,
) -> Boards:
    """Read the boards of all dates."""
    return _stored(store, read_boards((file, *parts), responses, config.query(), config.battles, every_date=True))


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


def kept_note(digest: str) -> str:
    """What a report says about where a board is kept."""
    return f"kept as snapshot {digest[:12]}"


def board_of(kept: KeptSnapshot) -> Board:
    """The board that a snapshot keeps."""
    snapshot = kept.snapshot
    return Board(
        **snapshot.board.model_dump(),
        **{field: getattr(snapshot, field) for field in RatingSnapshot.model_fields if field not in ("board", "notes")},
        source=f"snapshot {kept.short} of {snapshot.board.publisher}",
        snapshot=kept.digest,
        notes=snapshot.notes,
    )


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


def _located(store: ArtifactStore, config: ArenaConfig, *, every_date: bool) -> tuple[Located, SourceFile | None]:
    folder = Path(store.work_folder, "fetched")
    query = SourceQuery(
        source=config.source,
        arena=config.arena,
        style_control=config.style_control,
        whole_history=every_date or config.date is not None,
        revision=config.revision,
        hub_endpoint=config.hub_endpoint,
        fetching=config.fetching,
    )
    beside = config.battles.responses
    return locate(query, folder), local_file(beside, config.fetching, folder) if beside else None


def _placed(board: Board, located: Located, config: ArenaConfig) -> Board:
    """A board that was read, with where it was read from."""
    origin: Origin = located.origin
    named = f" ({board.publisher})" if board.publisher and board.publisher != origin.publisher else ""
    dated = (DATE_NOTES[board.date_kind],) if board.date and board.date_kind in DATE_NOTES else ()
    return board.model_copy(
        update={
            "arena": config.arena,
            "publisher": board.publisher or origin.publisher,
            "source": f"{origin.shown}{named}",
            "url": origin.url,
            "revision": origin.revision,
            "document_digest": located.files[0].digest,
            "licence": config.licence or origin.licence,
            "attribution": config.attribution or origin.attribution,
            "notes": board.notes + origin.notes + dated,
        }
    )


def _kept(store: ArtifactStore, boards: list[Board]) -> list[Board]:
    snapshots = [
        RatingSnapshot(
            board=board.named(),
            **{field: getattr(board, field) for field in RatingSnapshot.model_fields if field != "board"},
        )
        for board in boards
    ]
    return [
        board.model_copy(update={"snapshot": kept.digest, "notes": (*board.notes, kept_note(kept.digest))})
        for board, kept in zip(boards, keep_snapshots(store, snapshots), strict=True)
    ]


def _find_pinned(store: ArtifactStore, config: ArenaConfig, pin: str) -> KeptSnapshot:
    """A digest says which board it is, a date does not: then the defaults count too."""
    fields = ("publisher", "category", "style_control", "arena")
    asked = {field: getattr(config, field) for field in fields if field in config.model_fields_set}
    usual = {"category": config.category, "style_control": config.style_control, "arena": config.arena}
    return find_snapshot(store, pin, asked, by_date=usual)


def _stored(store: ArtifactStore, history: BoardHistory) -> Boards:
    boards = tuple(
        Board(
            ratings=store.write_table(board.ratings, RATINGS),
            publisher=board.publisher or "",
            category=board.category,
            style_control=board.style_control,
            date=board.date,
            date_kind=board.date_kind,
            notes=board.notes,
        )
        for board in history.boards
    )
    return Boards(boards=boards, notes=history.notes)
