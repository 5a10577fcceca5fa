"""What was calibrated to which ratings, and telling Prefect about new ones, on a real server."""

import datetime
import threading
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings
from pydantic import BaseModel

from charm_core.errors import ServiceError
from tasks.arena import ArenaConfig, Board
from tasks.ratings.snapshots import BoardName
from tasks.recalibration import (
    RatingsUpdate,
    SnapshotDate,
    announce,
    calibrations,
    last_calibration,
    note_calibration,
    one_recalibration,
    settings_digest,
)
from tasks.store import ArtifactRef, ArtifactStore

DAY = datetime.date(2025, 2, 28)
BOARD = BoardName(publisher="p", category="overall", style_control=False)
NOBODY = "http://127.0.0.1:9/api"  # the discard port: nothing listens


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(url=str(tmp_path / "store"), work_folder=str(tmp_path / "work"))


def board(snapshot: str | None, *, weeks: int = 0, style_control: bool = False) -> Board:
    return Board(
        ratings=ArtifactRef(kind="ratings", digest="0" * 64, uri="", size=0),
        publisher="p",
        category="overall",
        style_control=style_control,
        date=DAY + datetime.timedelta(weeks=weeks),
        snapshot=snapshot,
    )


def note(store: ArtifactStore, version: str, on: Board, model: str = "charm-m") -> None:
    note_calibration(store, model, version, on, ("sea", "sky"), "s")


def update(model: str, after: str = "b" * 64) -> RatingsUpdate:
    return RatingsUpdate(
        model=model,
        board=BOARD,
        before=SnapshotDate(snapshot="a" * 64, date=DAY),
        after=SnapshotDate(snapshot=after, date=DAY),
    )


class TestNotes:
    def test_what_was_calibrated_to_what(self, store: ArtifactStore):
        assert calibrations(store, "charm-m") == ()
        note(store, "1", board("a" * 64))
        note(store, "2", board("b" * 64, weeks=1))
        note(store, "1", board("c" * 64), model="charm-other")
        assert [(one.version, one.snapshot[0]) for one in calibrations(store, "charm-m")] == [("1", "a"), ("2", "b")]
        last = last_calibration(store, "charm-m", BOARD)
        assert last is not None
        assert (last.version, last.date, last.policy_models) == ("2", DAY + datetime.timedelta(weeks=1), ("sea", "sky"))

    def test_boards_are_told_apart(self, store: ArtifactStore):
        note(store, "1", board("a" * 64))
        note(store, "2", board("b" * 64, style_control=True))
        last = last_calibration(store, "charm-m", BOARD)
        assert last is not None
        assert last.version == "1"
        assert last_calibration(store, "charm-m", BOARD.model_copy(update={"publisher": "q"})) is None

    def test_going_back_to_earlier_ratings_makes_an_earlier_version_the_latest_calibration(self, store: ArtifactStore):
        for version, snapshot in (("1", "a"), ("2", "b"), ("1", "a")):
            note(store, version, board(snapshot * 64))
        assert [one.version for one in calibrations(store, "charm-m")] == ["2", "1"]

    def test_ratings_of_a_simulation_leave_no_note(self, store: ArtifactStore):
        note(store, "1", board(None))
        assert calibrations(store, "charm-m") == ()

    def test_a_damaged_note_is_none(self, store: ArtifactStore):
        note(store, "1", board("a" * 64))
        (file,) = Path(store.url, "notes").iterdir()
        file.write_bytes(file.read_bytes()[:-10])
        assert calibrations(store, "charm-m") == ()
        note(store, "2", board("b" * 64))
        assert [one.version for one in calibrations(store, "charm-m")] == ["2"]

    def test_notes_of_two_runs_at_once_are_both_kept(self, store: ArtifactStore):
        together = threading.Barrier(8)

        def write(number: int) -> None:
            together.wait()
            note(store, str(number), board(str(number) * 64))

        threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {one.version for one in calibrations(store, "charm-m")} == {str(number) for number in range(8)}


class Settings(BaseModel):
    arena: ArenaConfig
    responses: str
    model: str
    epochs: int = 1


class TestSettingsDigest:
    @pytest.fixture
    def settings(self, tmp_path: Path) -> Settings:
        (tmp_path / "responses.parquet").write_text("content")
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "weights").write_text("content")
        (tmp_path / "aliases.toml").write_text("")
        return Settings(
            arena=ArenaConfig(source="x.json", aliases=str(tmp_path / "aliases.toml")),
            responses=str(tmp_path / "responses.parquet"),
            model=str(tmp_path / "model"),
        )

    def test_which_board_it_is_plays_no_part(self, settings: Settings):
        pinned = ArenaConfig(snapshot="a" * 64, aliases=settings.arena.aliases, publisher="p")
        assert settings_digest(settings) == settings_digest(settings.model_copy(update={"arena": pinned}))

    def test_everything_else_does(self, settings: Settings, tmp_path: Path):
        digests = [settings_digest(settings), settings_digest(settings.model_copy(update={"epochs": 2}))]
        near = settings.arena.model_copy(update={"accept_near": ("sea",)})
        digests.append(settings_digest(settings.model_copy(update={"arena": near})))
        for file in ("responses.parquet", "model/weights", "aliases.toml"):
            (tmp_path / file).write_text("something else")
            digests.append(settings_digest(settings))
        assert len(set(digests)) == 6

    def test_a_text_that_can_be_no_path(self, settings: Settings):
        settings_digest(settings.model_copy(update={"model": "a\0b" * 5000}))


def test_recalibrations_of_one_model_wait_for_each_other_and_others_do_not(store: ArtifactStore):
    order: list[str] = []
    inside, go = threading.Event(), threading.Event()

    def first() -> None:
        with one_recalibration(store, "charm-m"):
            inside.set()
            go.wait(60)
            order.append("first")

    def second() -> None:
        with one_recalibration(store, "charm-m"):
            order.append("second")

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    threads[0].start()
    assert inside.wait(60)
    threads[1].start()
    with one_recalibration(store, "charm-other"):
        order.append("other")
    go.set()
    for thread in threads:
        thread.join()
    assert order == ["other", "first", "second"]


class TestAnnounce:
    def test_without_a_server_nobody_is_told(self):
        with temporary_settings({PREFECT_API_URL: None}):
            assert announce(update("charm-m")).startswith("Nobody was told: there is no Prefect server")

    def test_a_server_that_does_not_answer_is_an_error(self):
        with (
            temporary_settings({PREFECT_API_URL: NOBODY}),
            pytest.raises(
                ServiceError, match=r"127\.0\.0\.1:9/api could not be told .* the next collection tries again"
            ),
        ):
            announce(update("charm-m"))

    def test_the_same_news_of_one_day_is_one_event(self):
        one = update("charm-m")
        assert one.event_id(DAY) == one.model_copy(update={"why": "in other words"}).event_id(DAY)
        others = {
            one.event_id(DAY + datetime.timedelta(days=1)),
            update("charm-n").event_id(DAY),
            update("charm-m", "c" * 64).event_id(DAY),
            one.event_id(DAY, attempt=1),
        }
        assert len(others | {one.event_id(DAY)}) == 5

    def test_a_server_is_told(self, prefect_session: None):
        said = announce(update("charm-told"))
        assert said.startswith("Prefect was told: charm.ratings.updated for charm-told (event ")
