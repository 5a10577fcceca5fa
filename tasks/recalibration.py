"""To which ratings a registered model was calibrated, and how Prefect is told that they have moved.

The note is what makes the trigger safe: ratings are compared with those that the model was calibrated to, so that slow drift adds
up, and an event that was lost is sent again by the next collection, until a calibration has written its note.
"""

import datetime
import hashlib
import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_URL, UUID, uuid5

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.events import Event
from prefect.events.filters import EventFilter, EventIDFilter, EventNameFilter, EventRelatedFilter
from prefect.settings import PREFECT_API_URL
from pydantic import BaseModel, ConfigDict, Field

from charm_core.errors import ArtifactError, ServiceError
from tasks.addresses import shown_address
from tasks.arena import ArenaConfig, Board
from tasks.locks import held_alone
from tasks.ratings.snapshots import BoardName
from tasks.store import ArtifactStore, file_digest

RATINGS_UPDATED = "charm.ratings.updated"
"""Name of the event."""

_ABOUT_THE_BOARD = set(ArenaConfig.model_fields) - {"aliases", "accept_near"}
"""Settings of an arena that only say which board: that is noted by itself."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Calibrated(_Record):
    """One calibration: which version of a registered model it made, and to which ratings."""

    model: str = Field(description="Name in the model registry.")
    version: str
    board: BoardName
    snapshot: str = Field(description="Digest of the snapshot of ratings.")
    date: datetime.date | None = Field(description="Of the ratings.")
    policy_models: tuple[str, ...] = Field(description="Whose ratings were used.")
    settings: str = Field(description="Digest of everything else that was set; see settings_digest.")
    at: datetime.datetime


class _Calibrations(_Record):
    calibrations: tuple[Calibrated, ...] = ()


class SnapshotDate(_Record):
    """A snapshot of ratings, by digest and date."""

    snapshot: str = Field(min_length=6, description="Digest, or its beginning.")
    date: datetime.date | None = Field(default=None, description="Of the ratings.")

    def shown(self) -> str:
        """For people."""
        return f"{self.date or 'undated'} ({self.snapshot[:12]})"


class RatingsUpdate(_Record):
    """The ratings of a registered model's policy models have moved: what the event says."""

    model: str = Field(description="Name in the model registry of the calibrated reward model.")
    board: BoardName = Field(description="Which board.")
    before: SnapshotDate = Field(description="Ratings that it is calibrated to.")
    after: SnapshotDate = Field(description="Ratings to calibrate it to.")
    pairs: int = Field(default=0, ge=0, description="Win probabilities that were compared.")
    moved: int = Field(default=0, ge=0, description="Those that moved by the rule.")
    largest: float | None = Field(default=None, description="Largest change of a win probability, without its sign.")
    mean: float | None = Field(default=None, description="Mean change, without signs.")
    why: str = Field(default="", description="Why a calibration is due.")

    def event_id(self, day: datetime.date, attempt: int = 0) -> UUID:
        """The same for the same news of one day."""
        names = (RATINGS_UPDATED, self.model, self.before.snapshot, self.after.snapshot, day.isoformat(), str(attempt))
        return uuid5(NAMESPACE_URL, "/".join(names))


def calibrations(store: ArtifactStore, model: str) -> tuple[Calibrated, ...]:
    """All calibrations of a registered model that this store knows of, one for each board and version, the latest last."""
    try:
        return _Calibrations.model_validate_json(store.read_note(_note(model))).calibrations
    except (ArtifactError, ValueError):  # none yet, or no longer readable: then it is as if there were none
        return ()


def last_calibration(store: ArtifactStore, model: str, board: BoardName) -> Calibrated | None:
    """The latest calibration of a registered model to a board; None if this store knows of none."""
    return next((one for one in reversed(calibrations(store, model)) if one.board == board), None)


def note_calibration(
    store: ArtifactStore, model: str, version: str, board: Board, policy_models: tuple[str, ...], settings: str
) -> None:
    """Note what was calibrated to which ratings; ratings without a snapshot, of a simulated arena, leave nothing to note.

    Raises:
        ArtifactError: The store cannot be written.
    """
    if board.snapshot is None:
        return
    made = Calibrated(
        model=model,
        version=version,
        board=board.named(),
        snapshot=board.snapshot,
        date=board.date,
        policy_models=policy_models,
        settings=settings,
        at=datetime.datetime.now(datetime.UTC),
    )
    with held_alone(
        _lock_file(store, f"note {model}"), f"another run notes what {model} is calibrated to; waiting for it"
    ):
        others = [one for one in calibrations(store, model) if (one.board, one.version) != (made.board, version)]
        # what is the latest is said by the order: a clock can be set back
        kept = _Calibrations(calibrations=(*others, made))
        store.write_note(_note(model), kept.model_dump_json().encode())


def settings_digest(settings: BaseModel) -> str:
    """Digest of a calibration's settings and of the files that they name, without what only says which board.

    A folder that they name counts by what lies in it and when that was written: at worst something unchanged counts as changed.
    """
    content = settings.model_dump(mode="json")
    arena = content.get("arena") or {}
    content["arena"] = {name: value for name, value in arena.items() if name not in _ABOUT_THE_BOARD}
    files = {text: _file_state(Path(text).expanduser()) for text in sorted(_texts(content))}
    content["files"] = {text: state for text, state in files.items() if state is not None}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@contextmanager
def one_recalibration(store: ArtifactStore, model: str) -> Iterator[None]:
    """Wait until nobody else recalibrates this registered model on this machine, or with this store if that is a folder."""
    waiting = f"{model} is being recalibrated by another run; waiting for it"
    with held_alone(_lock_file(store, f"recalibrate {model}"), waiting):
        yield


def announce(update: RatingsUpdate) -> str:
    """Tell Prefect that ratings have moved; what an automation has acted on today is not told again.

    Returns:
        What was done, in a sentence.

    Raises:
        ServiceError: The Prefect server does not answer, or refuses; nobody was told.
    """
    address = PREFECT_API_URL.value()
    if not address:
        return "Nobody was told: there is no Prefect server (PREFECT_API_URL); run python -m flows.recalibrate"
    try:
        with get_client(sync_client=True) as client:
            return _told(client, update)
    except httpx.HTTPError as error:
        status = f"status {error.response.status_code}" if isinstance(error, httpx.HTTPStatusError) else ""
        raise ServiceError(
            f"the Prefect server at {shown_address(address)} could not be told that the ratings have moved "
            f"({status or str(error) or type(error).__name__}); the next collection tries again, or run python -m flows.recalibrate"
        ) from None


def _told(client: SyncPrefectClient, update: RatingsUpdate) -> str:
    # an event that the server keeps may have met no automation; and by itself it knows an event again for half an hour only
    now = datetime.datetime.now(datetime.UTC)
    attempts = itertools.count()
    while True:
        event_id = update.event_id(now.date(), next(attempts))
        what = f"{RATINGS_UPDATED} for {update.model} (event {event_id})"
        acted = EventFilter(
            event=EventNameFilter(name=["prefect.automation.action.executed"]),
            related=EventRelatedFilter(id=[f"prefect.event.{event_id}"]),
        )
        if client.read_events(acted, limit=1).events:
            return f"Prefect knows since today: {what}"
        if not client.read_events(EventFilter(id=EventIDFilter(id=[event_id])), limit=1).events:
            client.request("POST", "/events", json=[_event(update, event_id, now).model_dump(mode="json")])
            return f"Prefect was told: {what}"


def _event(update: RatingsUpdate, event_id: UUID, now: datetime.datetime) -> Event:
    return Event(
        id=event_id,
        occurred=now,
        event=RATINGS_UPDATED,
        resource={
            "prefect.resource.id": f"charm.reward-model.{update.model}",
            "prefect.resource.name": update.model,
        },
        related=[
            {"prefect.resource.id": f"charm.ratings.{one.snapshot}", "prefect.resource.role": role}
            for role, one in (("before", update.before), ("after", update.after))
        ],
        payload=update.model_dump(mode="json"),
    )


def _note(model: str) -> str:
    return f"calibrations-{model}"


def _lock_file(store: ArtifactStore, name: str) -> Path:
    # a folder can be shared by several machines; where the store is no folder, a file locks one machine only
    folder = Path(store.work_folder if "://" in store.url else store.url, "locks")
    return folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.lock"


def _texts(value: Any) -> set[str]:
    if isinstance(value, dict):
        return {text for item in value.values() for text in _texts(item)}
    if isinstance(value, list):
        return {text for item in value for text in _texts(item)}
    return {value} if isinstance(value, str) and value else set()


def _file_state(path: Path) -> Any:
    try:
        if path.is_file():
            return file_digest(path)
        if path.is_dir():
            inside = [(file, file.stat()) for file in sorted(path.rglob("*")) if file.is_file()]
            return [[str(file.relative_to(path)), state.st_size, state.st_mtime_ns] for file, state in inside]
    except (OSError, ValueError):  # a text that cannot be a path, or that may not be read
        return None
    return None
