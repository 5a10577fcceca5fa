"""When a re-calibration has nothing to do, and to which ratings it goes; what it does then is in tests/deployments."""

import datetime
import json
from pathlib import Path

import polars as pl
import pytest
from prefect.client.orchestration import get_client

from charm_core.errors import ConfigError, RatingsError, ServiceError
from charm_core.mismatch import MismatchConfig
from charm_core.reward_model.spec import RewardModelSpec
from charm_core.tables import RATINGS
from flows.command_line import run_from_command_line, settings_toml
from flows.presets import RECALIBRATE
from flows.recalibrate import recalibrate, start
from flows.runs import CalibrationRun, RecalibrationRun
from flows.settings import RuntimeSettings
from tasks.arena import ArenaConfig, board_of
from tasks.prompts import ResponsesConfig
from tasks.ratings.snapshots import BoardName, KeptSnapshot, RatingSnapshot, keep_snapshots
from tasks.recalibration import RatingsUpdate, SnapshotDate, note_calibration, settings_digest
from tasks.store import ArtifactStore

DAY = datetime.date(2025, 2, 28)
BOARD = BoardName(publisher="p", category="overall", style_control=False)
RUN = RecalibrationRun(
    name="m",
    arena=ArenaConfig(snapshot=str(DAY)),
    responses=ResponsesConfig(source="nowhere.parquet"),
    reward_model=RewardModelSpec(path="nowhere"),
)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefect_session: None) -> ArtifactStore:
    monkeypatch.setenv("CHARM_HOME", str(tmp_path / "home"))
    return RuntimeSettings().artifact_store()


def keep(store: ArtifactStore, weeks: int, board: BoardName = BOARD) -> KeptSnapshot:
    """A snapshot of so many weeks later."""
    frame = pl.DataFrame(
        {
            "policy_model": ["sea", "sky"],
            "rating": [1000.0, 1100.0 + weeks],
            "rating_low": None,
            "rating_high": None,
            "votes": None,
        },
        schema=dict(RATINGS.columns),
    )
    ratings = store.write_table(frame, RATINGS)
    date = DAY + datetime.timedelta(weeks=weeks)
    return keep_snapshots(store, [RatingSnapshot(board=board, date=date, date_kind="stated", ratings=ratings)])[0]


def calibrated(store: ArtifactStore, kept: KeptSnapshot, run: CalibrationRun = RUN) -> None:
    note_calibration(store, "charm-m", "3", board_of(kept), ("sea", "sky"), settings_digest(run))


def news(before: KeptSnapshot, after: KeptSnapshot, model: str = "charm-m") -> RatingsUpdate:
    dates = (SnapshotDate(snapshot=one.digest, date=one.snapshot.date) for one in (before, after))
    return RatingsUpdate(model=model, board=after.snapshot.board, **dict(zip(("before", "after"), dates, strict=True)))


def test_news_of_a_snapshot_that_the_model_is_calibrated_to_is_no_news(store: ArtifactStore):
    old, new = keep(store, 0), keep(store, 1)
    calibrated(store, new)
    outcome = recalibrate(RUN, news(old, new))
    assert outcome.calibration is None
    assert outcome.summary == (
        f"Nothing to do: charm-m (version 3) is calibrated to the ratings of 2025-03-07 ({new.short}) with these settings already."
    )


def test_news_that_is_older_than_what_the_model_is_calibrated_to_changes_nothing(store: ArtifactStore):
    old, new, newest = (keep(store, week) for week in range(3))
    calibrated(store, newest)
    assert (
        "is calibrated to later ratings already, of 2025-03-14; these are of 2025-03-07"
        in recalibrate(RUN, news(old, new)).summary
    )


def test_its_runs_say_what_became_of_them(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch):
    old, new = keep(store, 0), keep(store, 1)
    calibrated(store, new)
    assert recalibrate(RUN, news(old, new)).calibration is None
    monkeypatch.setenv("CHARM_TRACKING_URI", "http://127.0.0.1:9")  # nothing listens: a calibration ends as it begins
    other = RUN.model_copy(update={"mismatch": MismatchConfig(bootstrap_replicates=70)})
    with pytest.raises(ServiceError, match="MLflow"):
        recalibrate(other, news(old, new))
    with get_client(sync_client=True) as prefect:
        names = {run.name for run in prefect.read_flow_runs()}
    assert {"recalibrate charm-m · nothing to do", f"recalibrate charm-m · board 2025-03-07 ({new.short})"} <= names


def test_other_settings_are_calibrated_again(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch):
    kept = keep(store, 0)
    calibrated(store, kept)
    monkeypatch.setenv("CHARM_TRACKING_URI", "http://127.0.0.1:9")  # nothing listens: a calibration ends as it begins
    assert recalibrate(RUN, news(kept, kept)).calibration is None
    other = RUN.model_copy(update={"mismatch": MismatchConfig(bootstrap_replicates=70)})
    with pytest.raises(ServiceError, match="MLflow"):
        recalibrate(other, news(kept, kept))


def test_news_of_another_model_or_another_board(store: ArtifactStore):
    old, new = keep(store, 0), keep(store, 1)
    other = recalibrate(RUN, news(old, new, "charm-other"))
    assert other.summary == "Nothing to do: the ratings are news for charm-other, and this calibrates charm-m."
    styled = keep(store, 1, BOARD.model_copy(update={"style_control": True}))
    with pytest.raises(RatingsError, match=r"no snapshot .* with .*'style_control' False|style_control False"):
        recalibrate(RUN, news(old, styled))


def test_a_simulated_arena_has_no_news(store: ArtifactStore):
    assert "a simulated arena has no other ratings" in recalibrate().summary
    kept = keep(store, 0)
    with pytest.raises(
        ConfigError, match=r"other ratings for charm-m, but charm-simulated-arena .* simulated arena; give this"
    ):
        recalibrate(update=news(kept, kept))


def test_by_hand_it_goes_to_the_latest_snapshot_of_its_board_or_to_the_one_that_is_named(
    store: ArtifactStore, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("flows.recalibrate.check_services", lambda: None)
    board = {"full": {"sea": {"rating": 1000.0, "rating_q025": 990.0, "rating_q975": 1010.0}}}
    (tmp_path / "board.json").write_text(json.dumps(board))
    arena = ArenaConfig(source=str(tmp_path / "board.json"), date=DAY, publisher="p")
    run = RUN.model_copy(update={"arena": arena})
    later = keep(store, 2)
    keep(store, 3, BOARD.model_copy(update={"publisher": "another"}))
    calibrated(store, later, run)
    file = tmp_path / "calibrate.toml"
    # the file of the calibration does
    file.write_text(settings_toml(CalibrationRun(**dict(run))))

    def call(*options: str) -> int:
        return run_from_command_line(
            "recalibrate", RecalibrationRun, RECALIBRATE, start, ["--config", str(file), *options]
        )

    assert call() == 0
    assert f"calibrated to the ratings of 2025-03-14 ({later.short})" in capsys.readouterr().out
    pinned = ("--arena.source", "", "--arena.date", "None", "--arena.snapshot", later.digest[:12])
    assert call(*pinned) == 0
    assert f"calibrated to the ratings of 2025-03-14 ({later.short})" in capsys.readouterr().out
