"""The Elo trigger on a real Prefect server and worker, with the deployments and the automation of prefect.yaml itself.

Ratings are the Arena's own, of four dates; responses and reward model are of a simulated arena under the names of real policy models,
so that a calibration takes seconds.
"""

import datetime
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import polars as pl
import pytest
from mlflow import MlflowClient
from prefect.client.schemas.actions import DeploymentUpdate
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterDeploymentId
from prefect.client.schemas.objects import FlowRun
from prefect.events.filters import EventFilter, EventNameFilter
from prefect.settings import PREFECT_API_URL, temporary_settings

from charm_core.mismatch import MismatchConfig
from charm_core.offsets import OffsetConfig
from charm_core.preferences import PreferenceConfig
from charm_core.promotion import GateConfig
from charm_core.reward_model.spec import RewardModelSpec, TrainingConfig
from charm_core.reward_model.tiny import build_tiny_reward_model
from charm_core.simulation import SimulationConfig, simulate_arena
from flows.command_line import settings_toml
from flows.runs import CollectRatingsRun, RecalibrationRun
from tasks.arena import ArenaConfig
from tasks.ledger import Ledger, last_ledger
from tasks.prompts import ResponsesConfig
from tasks.recalibration import RATINGS_UPDATED, Calibrated, RatingsUpdate, announce, calibrations
from tasks.registry import GATE_TAG, PromotionConfig
from tasks.store import ArtifactStore
from tests.prefect_server import PrefectServer, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.deployment, pytest.mark.real]

POLICY_MODELS = ("gpt-4-1106-preview", "gpt-4-0613", "llama-2-70b-chat", "gemma-2b-it", "chatglm2-6b")
CALIBRATED = datetime.date(2025, 2, 28)
QUIET = datetime.date(2025, 5, 20)
"""The anchor moved by 60 points since, and no win probability did."""
MOVED = datetime.date(2025, 11, 5)
LATER = datetime.date(2025, 12, 11)
RUN_WITHIN = 1200.0
"""Seconds for a run of the worker; a fraction of it on an idle machine."""


@dataclass
class Site:
    """What somebody has who runs CHARM: a server with the deployments of prefect.yaml, data, a reward model."""

    server: PrefectServer
    boards: Path
    responses: Path
    model: Path

    @property
    def store(self) -> ArtifactStore:
        home = self.server.folder / "home"
        return ArtifactStore(url=str(home / "store"), work_folder=str(home / "work"))

    def settings(self, name: str) -> RecalibrationRun:
        return RecalibrationRun(
            name=name,
            arena=self.arena(CALIBRATED),
            responses=ResponsesConfig(source=str(self.responses)),
            reward_model=RewardModelSpec(path=str(self.model), max_length=128),
            mismatch=MismatchConfig(bootstrap_replicates=50),
            calibration=OffsetConfig(bootstrap_replicates=20),
            preferences=PreferenceConfig(strategy="all_pairs"),
            training=TrainingConfig(
                objective="win_rate_matching",
                learning_rate=5e-4,
                pairs_per_step=200,
                zero_stage=None,
                threads_per_rank=1,
            ),
            promotion=PromotionConfig(gate=GateConfig(repeat_prompts=0)),
        )

    def arena(self, date: datetime.date) -> ArenaConfig:
        return ArenaConfig(source=str(self.boards), date=date, publisher="lmarena/arena-catalog")

    def collect(self, model: str, date: datetime.date) -> str:
        """What the daily run does, for ratings of a date."""
        file = self.server.folder / "collect.toml"
        run = CollectRatingsRun(name="replayed", arena=self.arena(date), recalibrates=model)
        file.write_text(settings_toml(run))
        return self.server.run("python", "-m", "flows.collect_ratings", "--config", str(file)).stdout

    def set_up(self, settings: RecalibrationRun) -> None:
        """Give the deployment its settings, as a person does on its page."""
        parameters = {"run": settings.model_dump(mode="json", exclude_unset=True)}
        with self.server.client() as client:
            client.update_deployment(self.deployment(), DeploymentUpdate(parameters=parameters))

    def deployment(self) -> UUID:
        with self.server.client() as client:
            return client.read_deployment_by_name("recalibrate/on-new-ratings").id

    def runs(self) -> list[FlowRun]:
        """Of the recalibrate deployment, the oldest first."""
        mine = FlowRunFilter(deployment_id=FlowRunFilterDeploymentId(any_=[self.deployment()]))
        with self.server.client() as client:
            return sorted(client.read_flow_runs(flow_run_filter=mine), key=lambda run: run.created)

    def finished(self, count: int) -> list[FlowRun]:
        """All runs, once there are so many and none is under way."""

        def ended() -> list[FlowRun]:
            runs = self.runs()
            return runs if len(runs) >= count and all(run.state and run.state.is_final() for run in runs) else []

        runs = wait_for(f"{count} finished runs", ended, RUN_WITHIN)
        assert [run.state.type.value for run in runs] == ["COMPLETED"] * count, self.log()[-4000:]
        return runs

    def made(self, model: str) -> tuple[Calibrated, ...]:
        return calibrations(self.store, model)

    def events(self) -> list[Any]:
        only = EventFilter(event=EventNameFilter(name=[RATINGS_UPDATED]))
        with self.server.client() as client:
            return client.read_events(only, limit=50).events

    @property
    def mlflow(self) -> MlflowClient:
        return MlflowClient(f"sqlite:///{self.server.folder / 'home' / 'mlflow.db'}")

    def tracked(self) -> list[Any]:
        """MLflow's runs of calibrations, without those nested in them."""
        experiment = self.mlflow.get_experiment_by_name("charm").experiment_id
        return self.mlflow.search_runs([experiment], filter_string="tags.`charm.flow` = 'calibrate'")

    def ledger(self, name: str) -> Ledger:
        found = last_ledger(self.store, f"calibrate {name}")
        assert found is not None
        return found

    def log(self) -> str:
        return (self.server.folder / "worker-gpu.log").read_text()


@pytest.fixture(scope="module")
def site(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    arena = simulate_arena(SimulationConfig(prompts=40, label_prompts=30, battles=2000))
    writers = sorted(arena.writers.get_column("policy_model"))[: len(POLICY_MODELS)]
    texts = arena.responses.filter(pl.col("policy_model").is_in(writers)).with_columns(
        pl.col("policy_model").replace_strict(dict(zip(writers, POLICY_MODELS, strict=True)))
    )
    asked = arena.prompts.select("prompt_id", prompt="messages")
    texts.join(asked, on="prompt_id").write_parquet(folder / "responses.parquet")
    build_tiny_reward_model(arena.vocabulary, folder / "model")
    boards = pl.read_parquet(shared_data / "elo_snapshots.parquet").filter(
        pl.col("source") == "lmarena/arena-catalog", pl.col("date").is_in([CALIBRATED, QUIET, MOVED, LATER])
    )
    boards.write_parquet(folder / "boards.parquet")
    server = PrefectServer(folder)
    try:
        server.start()
        for pool in ("cpu", "gpu", "shards"):
            server.run("prefect", "work-pool", "create", pool, "--type", "process")
        server.run("prefect", "--no-prompt", "deploy", "--all")
        yield Site(
            server=server,
            boards=folder / "boards.parquet",
            responses=folder / "responses.parquet",
            model=folder / "model",
        )
    finally:
        server.stop()


@pytest.fixture(scope="module")
def calibrated(site: Site) -> Site:
    """The deployment run once by hand: there is a first calibration."""
    site.set_up(site.settings("first"))
    site.server.start_worker("gpu")
    site.server.run("prefect", "deployment", "run", "recalibrate/on-new-ratings")
    site.finished(1)
    (made,) = site.made("charm-first")
    assert (made.version, made.date, made.policy_models) == ("1", CALIBRATED, tuple(sorted(POLICY_MODELS)))
    return site


@pytest.fixture(scope="module")
def recalibrated(calibrated: Site) -> tuple[Site, str]:
    """Ratings that have not moved, then ratings that have; what the second collection said."""
    quiet = calibrated.collect("charm-first", QUIET)
    assert "No re-calibration is due: since 2025-02-28 none of 10 win probabilities moved" in quiet
    assert calibrated.events() == []
    assert len(calibrated.runs()) == 1
    said = calibrated.collect("charm-first", MOVED)
    calibrated.finished(2)
    return calibrated, said


def test_no_movement_starts_nothing_and_movement_starts_one_calibration(recalibrated: tuple[Site, str]):
    site, said = recalibrated
    assert "A re-calibration is due: since 2025-02-28 2 of 10 win probabilities moved" in said
    assert "Prefect was told: charm.ratings.updated for charm-first" in said
    (event,) = site.events()
    assert event.resource.id == "charm.reward-model.charm-first"
    assert (event.payload["before"]["date"], event.payload["after"]["date"]) == ("2025-02-28", "2025-11-05")
    assert event.payload["moved"] == 2
    runs = site.runs()
    assert runs[1].parameters["update"] == event.payload
    assert [made.date for made in site.made("charm-first")] == [CALIBRATED, MOVED]
    assert [made.version for made in site.made("charm-first")] == ["1", "2"]


def test_it_goes_through_the_promotion_gate(recalibrated: tuple[Site, str]):
    site, _ = recalibrated
    versions = [site.mlflow.get_model_version("charm-first", number) for number in ("1", "2")]
    assert {version.tags[GATE_TAG] for version in versions} <= {"passed", "not passed"}


def test_it_does_again_only_what_depends_on_the_ratings(recalibrated: tuple[Site, str]):
    site, _ = recalibrated
    calls = site.ledger("first").calls
    ran = {call.step for call in calls if not call.reused}
    assert not ran & {"load_responses", "split_responses", "select_responses"}
    trained = {call.inputs["name"]: call.reused for call in calls if call.step == "train_reward_model"}
    assert trained == {"calibrated": False, "control": True}
    scored = [call.reused for call in calls if call.step == "score_responses"]
    assert scored.count(False) == 1  # the calibrated reward model's own
    assert [run.info.status for run in site.tracked()] == ["FINISHED"] * 2


def test_the_same_news_again_starts_nothing(recalibrated: tuple[Site, str]):
    site, _ = recalibrated
    assert "charm-first (version 2) is calibrated to this snapshot" in site.collect("charm-first", MOVED)
    (event,) = site.events()
    with temporary_settings({PREFECT_API_URL: site.server.url}):
        assert announce(RatingsUpdate.model_validate(event.payload)).startswith("Prefect knows since today")
    assert len(site.events()) == 1
    # as if it had been sent again on the next day, before the calibration was done
    tomorrow = event.model_dump(mode="json", exclude={"received"}) | {"id": str(UUID(int=event.id.int ^ 1))}
    with site.server.client() as client:
        client.request("POST", "/events", json=[tomorrow])
    site.finished(3)
    said = "Nothing to do: charm-first (version 2) is calibrated to the ratings of 2025-11-05"
    wait_for("sentence", lambda: said in site.log(), 60)
    assert len(site.made("charm-first")) == 2
    assert len(site.tracked()) == 2


def test_a_server_that_is_killed_before_the_run_is_picked_up_loses_nothing(recalibrated: tuple[Site, str]):
    site, _ = recalibrated
    # another registered model, whose calibration to the first ratings is all there already
    then = ArenaConfig(snapshot=site.made("charm-first")[0].snapshot)
    settings = site.settings("first").model_copy(update={"register_as": "charm-second", "arena": then})
    site.set_up(settings)
    before = len(site.runs())
    site.server.run("prefect", "deployment", "run", "recalibrate/on-new-ratings")
    site.finished(before + 1)
    site.server.stop_workers()
    assert "Prefect was told" in site.collect("charm-second", LATER)
    wait_for("scheduled run", lambda: len(site.runs()) == before + 2, 120)
    site.server.kill()
    site.server.start()
    site.server.start_worker("gpu")
    site.finished(before + 2)
    assert [made.date for made in site.made("charm-second")] == [CALIBRATED, LATER]


def test_the_daily_schedule_makes_runs(site: Site):
    def scheduled() -> list[FlowRun]:
        with site.server.client() as client:
            daily = client.read_deployment_by_name("collect_ratings/daily").id
            mine = FlowRunFilter(deployment_id=FlowRunFilterDeploymentId(any_=[daily]))
            return client.read_flow_runs(flow_run_filter=mine)

    # Prefect 3.8's scheduler makes none with SQLAlchemy 2.1, and says so only in the server's log
    runs = wait_for("runs of the schedule", scheduled, 180)
    assert {run.state_name for run in runs} == {"Scheduled"}
