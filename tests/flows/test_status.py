"""How things stand: champions, the age of their ratings, what is due, what was left unfinished."""

import datetime
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from charm_core.tables import RATINGS
from flows.command_line import run_from_command_line
from flows.settings import RuntimeSettings
from flows.status import PRESETS, StatusRun, status
from tasks.arena import Board, board_of
from tasks.evidence import Report
from tasks.model_registry import ModelRegistry
from tasks.ratings.snapshots import BoardName, RatingSnapshot, keep_snapshots
from tasks.recalibration import note_calibration
from tasks.registry import PromotionConfig, register_model, settle_promotion
from tasks.tracking import TITLE_TAG, TrackedRun, open_registry, tracked_run
from tests.promotion_samples import report

NAME = "charm-sample"
DAY = datetime.date(2025, 2, 28)
BOARD = BoardName(publisher="p", category="overall", style_control=False)
MODELS = ("sand", "sea", "sky")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CHARM_HOME", str(tmp_path / "home"))
    return tmp_path


def snapshot(weeks: int, ratings: tuple[float, ...]) -> Board:
    store = RuntimeSettings().artifact_store()
    table = pl.DataFrame(
        {
            "policy_model": MODELS,
            "rating": ratings,
            "rating_low": [rating - 4 for rating in ratings],
            "rating_high": [rating + 4 for rating in ratings],
            "votes": [5000, 5000, 5000],
        }
    )
    date = DAY + datetime.timedelta(weeks=weeks)
    one = RatingSnapshot(board=BOARD, date=date, date_kind="published", ratings=store.write_table(table, RATINGS))
    return board_of(keep_snapshots(store, [one])[0])


@pytest.fixture
def champion(promoted: tuple[Path, Board], home: Path) -> Board:
    """A version that was promoted, and what it was calibrated to; each test has a copy of its own."""
    made, board = promoted
    shutil.copytree(made / "home", home / "home")
    return board


@pytest.fixture(scope="module")
def promoted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Board]:
    """MLflow takes seconds to make its tables."""
    folder = tmp_path_factory.mktemp("promoted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CHARM_HOME", str(folder / "home"))
        return folder, promote(folder)


def promote(home: Path) -> Board:
    store = RuntimeSettings().artifact_store()
    folder = home / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_text("weights")
    html = store.write_bytes(b"<html>", "report", ".html")
    composed = Report(html=html, data=store.write_record(report(0.1), "report_data"), card=html)
    with run("calibrate sample") as opened:
        version = register_model(opened, store, NAME, store.write_folder(folder, "released_model"), composed)
        with opened.registry() as client:
            config = PromotionConfig(promote="force", reason="a test")
            settle_promotion(ModelRegistry.of(client), store, opened.run_id, version, composed.data, config)
    board = snapshot(0, (1000.0, 1050.0, 1100.0))
    note_calibration(store, NAME, "1", board, MODELS, "settings")
    return board


def run(title: str) -> Any:
    return tracked_run(RuntimeSettings().tracking(), title, tags={TITLE_TAG: title})


def test_where_nothing_has_run_nothing_is_made(home: Path):
    found = status(StatusRun())
    assert (found.models, found.unfinished) == ((), ())
    assert "nothing has run yet" in found.summary
    assert not list(home.rglob("*.db"))


def test_a_champion_its_evidence_and_its_age(champion: Board):
    (one,) = status(StatusRun()).models
    assert (one.model, one.champion, one.versions) == (NAME, "1", 1)
    assert one.since is not None
    assert one.evidence.startswith("mean |MD| 0.")
    assert "on held-out prompts" in one.evidence
    assert one.age is not None
    assert (one.age.date, one.age.newer) == (DAY, 0)
    assert (one.due, one.why) == (False, "there are no newer ratings of its board in the store")


@pytest.mark.parametrize(
    ("ratings", "due"), [((1000.0, 1050.0, 1101.0), False), ((1000.0, 1150.0, 1100.0), True)], ids=["still", "moved"]
)
def test_newer_ratings_count_and_are_due_if_they_moved(champion: Board, ratings: tuple[float, ...], due: bool):
    snapshot(1, (1000.0, 1050.0, 1300.0))  # only the last one counts
    snapshot(2, ratings)
    (one,) = status(StatusRun()).models
    assert one.age is not None
    assert (one.age.newer, one.age.newest) == (2, DAY + datetime.timedelta(weeks=2))
    assert one.due is due
    assert one.why.startswith(f"since {DAY} ")


def test_a_board_that_calls_them_otherwise_is_not_judged_here(home: Path, champion: Board):
    store = RuntimeSettings().artifact_store()
    note_calibration(store, NAME, "1", champion, ("my-sea", "my-sky"), "settings")
    snapshot(1, (1000.0, 1050.0, 1300.0))
    (one,) = status(StatusRun()).models
    assert one.due is None
    assert "by other names" in one.why


def test_without_a_champion_something_is_due(champion: Board):
    with open_registry(RuntimeSettings().tracking()) as client:
        client.delete_registered_model_alias(NAME, "champion")
    (one,) = status(StatusRun(model=NAME)).models
    assert (one.champion, one.since, one.evidence, one.due) == (None, None, "", True)


@pytest.fixture
def failed() -> Callable[[str, type[BaseException]], None]:
    def fail(title: str, error: type[BaseException]) -> None:
        def body() -> TrackedRun:
            with run(title):
                raise error

        with pytest.raises(error):
            body()

    return fail


def test_runs_that_nobody_finished(champion: Board, failed: Callable[[str, type[BaseException]], None]):
    failed("calibrate a", ValueError)
    failed("calibrate b", KeyboardInterrupt)
    failed("calibrate c", ValueError)
    with run("calibrate c"):  # done since
        pass
    with run("calibrate d"):
        found = status(StatusRun())
    assert {one.title: one.state for one in found.unfinished} == {
        "calibrate a": "failed",
        "calibrate b": "ended early",
        "calibrate d": "running",
    }
    assert "calibrate b ended early; run it again: finished steps are kept" in found.summary


def test_the_command_line(champion: Board, capsys: pytest.CaptureFixture[str]):
    assert run_from_command_line("status", StatusRun, PRESETS, status, []) == 0
    shown = capsys.readouterr().out
    assert f"{NAME}\n  champion  version 1 of 1 since " in shown
    assert run_from_command_line("status", StatusRun, PRESETS, status, ["--json"]) == 0
    assert json.loads(capsys.readouterr().out)["outcome"]["models"][0]["champion"] == "1"
    assert run_from_command_line("status", StatusRun, PRESETS, status, ["--model", "nobody"]) == 1
    assert "no model 'nobody' is registered" in capsys.readouterr().err
