"""Snapshots of ratings: every board that was collected stays in the store, with where it came from, and is found again.

A snapshot never changes. The same numbers of the same board and date are one snapshot, however often and from wherever they
are collected; when that was plays no part.
"""

import datetime
import hashlib
import logging
import string
from collections.abc import Sequence
from typing import Any

import fsspec
from pydantic import BaseModel, ConfigDict, Field

from charm_core.errors import RatingsError
from charm_core.leaderboards import DateKind
from tasks.store import ArtifactRef, ArtifactStore

logger = logging.getLogger(__name__)

_KIND = "rating_snapshot"
_SHORTEST_PIN = 6
_SHOWN = 12
_CANDIDATES_SHOWN = 12


class BoardName(BaseModel):
    """Which board: snapshots of the same one can be compared."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(default="Chatbot Arena", description="Whose votes.")
    arena: str = Field(default="text", description="Arena: text, vision, ...")
    publisher: str = Field(description="Who published it; a mirror is another publisher.")
    category: str = Field(description="Board category, as its publisher calls it.")
    style_control: bool = Field(description="Whether its ratings are style-controlled.")

    def shown(self) -> str:
        """For people."""
        style = "with" if self.style_control else "without"
        return f"{self.publisher}, {self.arena}, {self.category}, {style} style control"


class RatingSnapshot(BaseModel):
    """One board of one date."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    board: BoardName
    date: datetime.date | None
    date_kind: DateKind
    ratings: ArtifactRef = Field(description="RATINGS, under the board's own names.")
    url: str = Field(default="", description="Where it was first collected from.")
    revision: str | None = None
    document_digest: str = Field(default="", description="SHA-256 of the file that it was read from.")
    licence: str = ""
    attribution: str = ""
    notes: tuple[str, ...] = ()

    def same(self) -> tuple[Any, ...]:
        """What makes two collections one snapshot."""
        return (self.board, self.date, self.ratings.digest)


class KeptSnapshot(BaseModel):
    """A snapshot in the store, by its digest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    digest: str
    snapshot: RatingSnapshot

    @property
    def short(self) -> str:
        """Enough of the digest to pin it."""
        return self.digest[:_SHOWN]

    def shown(self) -> str:
        """For people."""
        date = self.snapshot.date or "undated"
        return f"{date} {self.short} ({self.snapshot.board.shown()}, {self.snapshot.ratings.rows} models)"


def keep_snapshots(store: ArtifactStore, snapshots: Sequence[RatingSnapshot]) -> tuple[KeptSnapshot, ...]:
    """Keep snapshots; those that are there already stay as they were first collected."""
    known = {kept.snapshot.same(): kept for kept in reversed(list_snapshots(store))}
    result = []
    for snapshot in snapshots:
        kept = known.get(snapshot.same())
        if kept is None:
            kept = KeptSnapshot(digest=store.write_record(snapshot, _KIND).digest, snapshot=snapshot)
            known[snapshot.same()] = kept
        result.append(kept)
    return tuple(result)


def list_snapshots(store: ArtifactStore) -> tuple[KeptSnapshot, ...]:
    """All snapshots of a store, by board and date."""
    filesystem, folder = fsspec.core.url_to_fs(f"{store.url.rstrip('/')}/{_KIND}")
    paths = [path for path in filesystem.find(folder) if str(path).endswith(".json")]
    contents: dict[str, bytes] = filesystem.cat(paths) if paths else {}  # many at once where the store is remote
    kept = [_read(store, str(path), content) for path, content in contents.items()]
    return tuple(sorted((one for one in kept if one is not None), key=_order))


def find_snapshot(
    store: ArtifactStore, pin: str, board: dict[str, Any], *, by_date: dict[str, Any] | None = None
) -> KeptSnapshot:
    """The one snapshot that a pin means.

    Args:
        store: Where to look.
        pin: A date (2025-02-28), or the beginning of the digest of a snapshot or of its ratings.
        board: What the board must be, by field of ``BoardName``.
        by_date: What it must be besides if the pin is a date, which says nothing about the board.

    Raises:
        RatingsError: None, or several; the candidates are listed.
    """
    everything = list_snapshots(store)
    date = _as_date(pin)
    wanted = board | (by_date or {} if date else {})
    matching = [kept for kept in everything if all(getattr(kept.snapshot.board, k) == v for k, v in wanted.items())]
    if date is not None:
        found = [kept for kept in matching if kept.snapshot.date == date]
    else:
        _check_digest(pin)
        found = [kept for kept in matching if _begins(kept, pin.lower())]
    if len(found) == 1:
        return found[0]
    described = ", ".join(f"{name} {value!r}" for name, value in wanted.items())
    if found:
        raise RatingsError(
            f"{len(found)} snapshots match {pin!r}: {_listed(found)}; pin the digest, or set arena.publisher, category, ..."
        )
    raise RatingsError(
        f"no snapshot in {store.url} matches {pin!r}{f' with {described}' if described else ''}; "
        + (f"there are {_listed(_nearest(matching or list(everything), date))}; " if everything else "there are none; ")
        + "collect it with python -m flows.collect_ratings"
    )


def _read(store: ArtifactStore, path: str, content: bytes) -> KeptSnapshot | None:
    digest = path.rsplit("/", 1)[-1].removesuffix(".json")
    try:
        snapshot = RatingSnapshot.model_validate_json(content)
    except ValueError as error:
        logger.warning("the snapshot %s is of another form and is left out: %s", path, error)
        return None
    if hashlib.sha256(content).hexdigest() != digest:
        logger.warning("the snapshot %s does not match its digest and is left out", path)
        return None
    # the store may have been moved since
    place = "/".join((store.url.rstrip("/"), *snapshot.ratings.uri.split("/")[-3:]))
    ratings = snapshot.ratings.model_copy(update={"uri": place})
    return KeptSnapshot(digest=digest, snapshot=snapshot.model_copy(update={"ratings": ratings}))


def _order(kept: KeptSnapshot) -> tuple[Any, ...]:
    board = kept.snapshot.board
    date = kept.snapshot.date or datetime.date.min
    return (board.name, board.arena, board.publisher, board.category, board.style_control, date, kept.digest)


def _as_date(pin: str) -> datetime.date | None:
    try:
        return datetime.date.fromisoformat(pin) if "-" in pin else None
    except ValueError:
        raise RatingsError(f"arena.snapshot must be a date such as 2025-02-28 or a digest, not {pin!r}") from None


def _check_digest(pin: str) -> None:
    if len(pin) < _SHORTEST_PIN or set(pin.lower()) - set(string.hexdigits):
        raise RatingsError(
            f"arena.snapshot must be a date such as 2025-02-28, or at least {_SHORTEST_PIN} digits of a digest, not {pin!r}"
        )


def _begins(kept: KeptSnapshot, pin: str) -> bool:
    return kept.digest.startswith(pin) or kept.snapshot.ratings.digest.startswith(pin)


def _nearest(found: list[KeptSnapshot], date: datetime.date | None) -> list[KeptSnapshot]:
    if date is None:
        return found
    return sorted(found, key=lambda kept: abs(((kept.snapshot.date or datetime.date.min) - date).days))


def _listed(found: list[KeptSnapshot]) -> str:
    shown = "; ".join(kept.shown() for kept in found[:_CANDIDATES_SHOWN])
    return shown + (f"; and {len(found) - _CANDIDATES_SHOWN} more" if len(found) > _CANDIDATES_SHOWN else "")
