"""Collecting ratings from end to end: what is new, what moved, and whether to calibrate again."""

import datetime
import json
from pathlib import Path

import polars as pl
import pytest

from charm_core.errors import ConfigError, RatingsError
from charm_core.rating_movement import RecalibrationRule
from flows.collect_ratings import RatingsOutcome, collect_ratings
from flows.command_line import run_from_command_line
from flows.presets import COLLECT_RATINGS
from flows.runs import CollectRatingsRun
from flows.settings import CHECKOUT, RuntimeSettings
from tasks.arena import ArenaConfig, board_of
from tasks.pages.rating_page_data import RatingPageData
from tasks.ratings.fetching import FetchConfig
from tasks.ratings.snapshots import list_snapshots
from tasks.recalibration import note_calibration
from tests.leaderboard_server import serve, with_etag

BACKGROUND = {f"m{index:02d}": 1000.0 + 7 * index for index in range(40)}
POLICY = {"sky": 1150.0, "sea": 1120.0, "sand": 1050.0}
DAY = datetime.date(2025, 2, 28)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefect_session: None) -> Path:
    monkeypatch.setenv("CHARM_HOME", str(tmp_path / "home"))
    return tmp_path


def catalog(ratings: dict[str, float], shift: float = 0.0) -> str:
    entries = {
        name: {"rating": value + shift + 0.5, "rating_q025": value + shift - 3.5, "rating_q975": value + shift + 4.5}
        for name, value in (BACKGROUND | ratings).items()
    }
    return json.dumps({"full": entries})


def collected(
    home: Path, ratings: dict[str, float], weeks: int, *, shift: float = 0.0, **changes: object
) -> RatingsOutcome:
    """Collect a board of the same publisher, so many weeks after the first one."""
    path = home / "board.json"
    path.write_text(catalog(ratings, shift))
    arena = ArenaConfig(
        source=str(path), date=DAY + datetime.timedelta(weeks=weeks), publisher="p", licence="CC BY 4.0"
    )
    settings = {"name": "t", "arena": arena, "policy_models": tuple(POLICY)} | changes
    return collect_ratings(CollectRatingsRun.model_validate(settings))


def data_of(outcome: RatingsOutcome) -> RatingPageData:
    return RatingPageData.model_validate_json(Path(outcome.data.uri).read_bytes())


def test_the_first_board_has_nothing_to_be_compared_with(home: Path):
    outcome = collected(home, POLICY, 0)
    data = data_of(outcome)
    assert (outcome.due, outcome.new_snapshots) == (None, outcome.snapshots)
    assert "there is no other snapshot of this board" in outcome.why
    assert (data.comparisons, len(data.history.series[0].points)) == ((), 1)
    assert data.snapshots[0].licence == "CC BY 4.0"


def test_the_same_board_again_is_nothing_new(home: Path):
    first = collected(home, POLICY, 0)
    again = collected(home, POLICY, 0)
    assert (again.snapshots, again.new_snapshots) == (first.snapshots, ())
    assert "known already, nothing new" in again.summary
    assert collected(home, POLICY, 0).page == again.page


def test_a_new_board_on_which_nothing_moved_but_the_anchor(home: Path):
    first = collected(home, POLICY, 0)
    outcome = collected(home, POLICY | {"newcomer": 1300.0}, 1, shift=60.0)
    (item,) = data_of(outcome).comparisons
    assert outcome.due is False
    assert (item.movement.added, item.movement.dropped, item.movement.moved) == (("newcomer",), (), ())
    assert item.movement.shift == pytest.approx(60)
    assert item.pairs.largest == pytest.approx(0, abs=1e-9)
    assert item.before.endswith(f"({first.snapshots[0][:12]})")
    assert "No re-calibration is due: since 2025-02-28 none of 3 win probabilities moved" in outcome.summary


def test_a_policy_model_that_moved_makes_a_recalibration_due(home: Path):
    collected(home, POLICY, 0)
    outcome = collected(home, POLICY | {"sand": 1100.0}, 1)
    assert outcome.due is True
    assert "2 of 3 win probabilities moved" in outcome.why
    (item,) = data_of(outcome).comparisons
    assert {change.policy_model for change in item.movement.moved} == {"sand"}
    page = Path(outcome.page.uri).read_text()
    assert "A re-calibration is due" in page
    assert "Win probabilities over time" in page
    lenient = collected(home, POLICY | {"sand": 1100.0}, 1, recalibration=RecalibrationRule(smallest_change=0.2))
    assert lenient.due is False


def test_a_policy_model_that_is_rated_for_the_first_time_makes_one_due_too(home: Path):
    collected(home, {"sky": 1150.0, "sea": 1120.0}, 0, policy_models=("sky", "sea"))
    outcome = collected(home, POLICY, 1)
    assert outcome.due is True
    assert "sand now rated" in outcome.why


def test_drift_in_small_steps_is_seen_from_the_snapshot_that_was_calibrated_to(home: Path):
    calibrated = collected(home, POLICY, 0)
    for week in (1, 2, 3):
        step = collected(home, POLICY | {"sand": 1050.0 + 6 * week}, week)
        assert step.due is False
    since = collected(home, POLICY | {"sand": 1068.0}, 3, since=calibrated.snapshots[0][:10])
    assert since.due is True
    assert "since 2025-02-28 2 of 3" in since.why
    assert [item.title for item in data_of(since).comparisons] == ["Since the snapshot that was asked for"]
    assert collected(home, POLICY | {"sand": 1068.0}, 3, since="2025-02-28").due is True
    with pytest.raises(RatingsError, match=r"no snapshot .* matches '2024-01-01'"):
        collected(home, POLICY, 3, since="2024-01-01")


def test_ratings_are_held_against_those_that_a_model_is_calibrated_to_and_prefect_is_told(home: Path):
    watch = {"recalibrates": "charm-m", "policy_models": ()}
    first = collected(home, POLICY, 0, **watch)
    assert (first.due, first.told) == (None, "")
    assert "no calibration of charm-m to this board is known here" in first.why
    store = RuntimeSettings().artifact_store()
    (kept,) = list_snapshots(store)
    note_calibration(store, "charm-m", "1", board_of(kept), tuple(POLICY), "s")
    same = collected(home, POLICY, 0, **watch)
    assert (same.due, same.why) == (False, "charm-m (version 1) is calibrated to this snapshot")
    step = collected(home, POLICY | {"sand": 1059.0}, 1, **watch)
    assert (step.due, step.told) == (False, "")
    assert [item.title for item in data_of(step).comparisons] == ["Since the snapshot that charm-m is calibrated to"]
    # nobody was calibrated to the step between: drift adds up
    moved = collected(home, POLICY | {"sand": 1068.0}, 2, **watch)
    assert moved.due is True
    assert "since 2025-02-28 2 of 3" in moved.why
    assert moved.told.startswith("Prefect was told: charm.ratings.updated for charm-m")
    assert moved.told in moved.summary
    earlier = collected(home, POLICY, -1, **watch)
    assert (earlier.due, earlier.why) == (False, "charm-m (version 1) is calibrated to a later snapshot, of 2025-02-28")


def test_a_model_is_watched_on_one_board(home: Path):
    with pytest.raises(ValueError, match="recalibrates watches one board"):
        collected(home, POLICY, 0, recalibrates="charm-m", history=True)


def test_an_older_board_is_compared_with_what_came_before_it(home: Path):
    for week in (0, 2):
        collected(home, POLICY, week)
    outcome = collected(home, POLICY | {"sand": 1100.0}, 1)
    assert outcome.due is True
    assert [str(point.date) for point in data_of(outcome).history.series[0].points] == ["2025-02-28", "2025-03-07"]


def test_a_corrected_board_of_the_same_date_is_compared_with_the_first_version(home: Path):
    first = collected(home, POLICY, 0)
    outcome = collected(home, POLICY | {"sand": 1100.0}, 0)
    assert outcome.due is True
    assert f"another version of this date is in the store: {first.snapshots[0][:12]}" in outcome.summary
    (item,) = data_of(outcome).comparisons
    assert item.after.endswith(f"({outcome.snapshots[0][:12]})")


def test_boards_of_another_publisher_are_never_compared(home: Path):
    collected(home, POLICY, 0)
    path = home / "board.json"
    arena = ArenaConfig(source=str(path), date=DAY + datetime.timedelta(weeks=1), publisher="another")
    outcome = collect_ratings(CollectRatingsRun(name="t", arena=arena, policy_models=tuple(POLICY)))
    assert (outcome.due, data_of(outcome).comparisons) == (None, ())
    assert len(data_of(outcome).snapshots) == 2


def test_a_pinned_snapshot_is_compared_with_the_one_before_it(home: Path):
    collected(home, POLICY, 0)
    moved = collected(home, POLICY | {"sand": 1100.0}, 1)
    collected(home, POLICY, 2)
    pinned = CollectRatingsRun(name="t", arena=ArenaConfig(snapshot=moved.snapshots[0]), policy_models=tuple(POLICY))
    outcome = collect_ratings(pinned)
    assert (outcome.due, outcome.new_snapshots) == (True, ())


def test_without_policy_models_the_board_is_collected_all_the_same(home: Path):
    collected(home, POLICY, 0, policy_models=())
    outcome = collected(home, POLICY, 1, policy_models=())
    assert outcome.due is None
    assert "no policy models are named" in outcome.why
    assert len(data_of(outcome).history.series[0].points[0].rated) == 8


def test_a_board_without_a_date_or_without_a_policy_model(home: Path):
    path = home / "board.json"
    path.write_text(catalog(POLICY))
    with pytest.raises(ConfigError, match=r"board.json does not say of which date it is; set arena.date"):
        collect_ratings(CollectRatingsRun(arena=ArenaConfig(source=str(path)), policy_models=("sky",)))
    with pytest.raises(RatingsError, match=r"'skye' has no rating.*nearest names: sky"):
        collected(home, POLICY, 0, policy_models=("skye", "sea"))


def history_table(home: Path) -> ArenaConfig:
    """Two publishers, one of which lacks a model on one date and its intervals throughout."""
    rows = [
        (DAY + datetime.timedelta(weeks=week), name, "overall", False, value + 0.5, *interval, None, publisher, False)
        for publisher, shift in (("p", 0.0), ("q", 100.0))
        for week in range(4)
        for name, rating in (BACKGROUND | POLICY).items()
        if not (publisher == "q" and week == 1 and name == "sea")
        for value in (rating + shift * week,)
        for interval in (((value - 3.5, value + 4.5) if publisher == "p" else (None, None)),)
    ]
    columns = [
        "date",
        "model",
        "category",
        "style_control",
        "rating",
        "ci_low",
        "ci_high",
        "votes",
        "source",
        "relabelled",
    ]
    pl.DataFrame(rows, schema=columns, orient="row", infer_schema_length=None).write_parquet(home / "many.parquet")
    return ArenaConfig(source=str(home / "many.parquet"))


def test_all_dates_of_several_publishers(home: Path):
    run = CollectRatingsRun(name="t", arena=history_table(home), policy_models=tuple(POLICY), history=True)
    outcome = collect_ratings(run)
    data = data_of(outcome)
    assert len(outcome.new_snapshots) == 8
    assert [(one.board[0], len(one.points)) for one in data.history.series] == [("p", 4), ("q", 4)]
    assert [len(point.rated) for point in data.history.series[1].points] == [3, 2, 3, 3]
    assert outcome.due is False
    assert "on 1 of 2 boards (the others give no intervals)" in outcome.why
    assert [point.shift for point in data.history.series[1].points[1:]] == [pytest.approx(100)] * 3
    page = Path(outcome.page.uri).read_text()
    assert page.count("<h3>") >= 2
    again = collect_ratings(run)
    assert (again.new_snapshots, again.snapshots) == ((), outcome.snapshots)
    with pytest.raises(RatingsError, match=r"never rated on these boards: 'nobody'"):
        collect_ratings(run.model_copy(update={"policy_models": ("sky", "nobody")}))


def test_from_the_web_through_the_command_line(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("flows.collect_ratings.check_services", lambda: None)

    def call(*arguments: str) -> int:
        from flows.collect_ratings import start

        return run_from_command_line("collect_ratings", CollectRatingsRun, COLLECT_RATINGS, start, arguments)

    config = home / "run.toml"
    with serve(with_etag(catalog(POLICY).encode())) as server:
        config.write_text(
            f'policy_models = ["sky", "sea"]\n[arena]\nsource = "{server.url}/board.json"\ndate = 2025-02-28\n'
            f"[arena.fetching]\nallow_http = true\nmax_tries = 1\n"
        )
        assert call("--config", str(config)) == 0
        assert "snapshot" in capsys.readouterr().out
        assert call("--config", str(config)) == 0
        assert "known already, nothing new" in capsys.readouterr().out
    assert call("--config", str(config)) == 1
    assert "could not be fetched in 1 try" in capsys.readouterr().err
    assert call("--config", str(config), "--arena.fetching.when_down", "use_copy") == 0
    assert "the server did not answer: a copy of" in capsys.readouterr().out


def test_the_numbers_are_in_the_tracker(home: Path):
    from mlflow import MlflowClient

    collected(home, POLICY, 0)
    outcome = collected(home, POLICY | {"sand": 1100.0}, 1)
    client = MlflowClient(tracking_uri=f"sqlite:///{home / 'home' / 'mlflow.db'}")
    run = client.get_run(outcome.tracking_url.rsplit("/", 1)[-1])
    assert run.data.metrics["recalibration due"] == 1.0
    assert run.data.metrics["comparison 1_pairs moved"] == 2.0
    files = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {"ratings.html", "ratings.json", "figures", "win_probabilities.json"} <= files
    assert run.inputs.dataset_inputs


@pytest.mark.parametrize("name", ["collect_ratings", "collect_ratings_history", "collect_ratings_votes"])
def test_the_configurations_that_come_with_it_are_complete(name: str):
    import tomllib

    document = tomllib.loads((CHECKOUT / "benchmarks" / "real" / f"{name}.toml").read_text())
    run = CollectRatingsRun.model_validate(document)
    assert run.arena.fetching == FetchConfig()


@pytest.mark.real
def test_the_papers_seven_models_through_all_dates(home: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch):
    import tomllib

    monkeypatch.chdir(CHECKOUT)
    document = tomllib.loads((CHECKOUT / "benchmarks" / "real" / "collect_ratings_history.toml").read_text())
    document["arena"]["source"] = str(shared_data / "elo_snapshots.parquet")
    outcome = collect_ratings(CollectRatingsRun.model_validate(document))
    data = data_of(outcome)
    assert [(one.board.split(",")[0], len(one.points)) for one in data.history.series] == [
        ("fboulnois/llm-leaderboard-csv", 92), ("jasontrigg0/chatbot-arena-history", 84),
        ("lmarena/arena-catalog", 17), ("lmarena/arena-catalog", 19),
    ]  # fmt: skip
    assert len(data.snapshots) == len(outcome.new_snapshots) == 244
    catalog_styled = data.history.series[2]
    jump = next(point for point in catalog_styled.points if str(point.date) == "2025-05-20")
    assert jump.shift == pytest.approx(60, abs=1)  # the anchor moved, and no win probability did
    assert jump.largest == pytest.approx(0, abs=0.001)
    ratings = {one.policy_model: one.rating.value for one in catalog_styled.points[0].rated}
    assert ratings["GPT-4o-mini-2024-07-18"] == pytest.approx(1317, abs=2)
    assert all(len(point.rated) == 7 for point in catalog_styled.points)
    assert outcome.due is False
