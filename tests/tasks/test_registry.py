"""The gate moves the champion in a real MLflow registry, and only then; force is recorded."""

from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from prefect.runtime import flow_run

from charm_core.errors import ConfigError
from charm_core.promotion import GateConfig
from tasks.evidence import Report
from tasks.model_registry import ModelRegistry, Move
from tasks.pages.report_data import ReportData
from tasks.registry import (
    Promotion,
    PromotionConfig,
    judge_promotion,
    register_model,
    released_ref,
    roll_back,
    settle_promotion,
)
from tasks.store import ArtifactRef, ArtifactStore
from tasks.tracking import TrackedRun, open_registry, tracked_run
from tasks.tracking_settings import TrackingSettings
from tests.promotion_samples import report, with_domain

GATE = PromotionConfig()
FORCE = PromotionConfig(promote="force", reason="the board is wrong")
GOOD, BETTER, BAD = report(0.1), report(0.0), report(1.5)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> TrackingSettings:
    folder = tmp_path_factory.mktemp("tracking")
    return TrackingSettings(uri=f"sqlite:///{folder / 'mlflow.db'}", artifact_location=(folder / "artifacts").as_uri())


@pytest.fixture(scope="module")
def numbers() -> Iterator[int]:
    return count()


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(url=str(tmp_path / "store"), work_folder=str(tmp_path))


@pytest.fixture
def name(numbers: Iterator[int]) -> str:
    return f"charm-{next(numbers)}"


@pytest.fixture
def registered(
    settings: TrackingSettings, store: ArtifactStore, name: str, tmp_path: Path
) -> Callable[[ReportData], tuple[str, ArtifactRef]]:
    """Register a model with a report; the version and the report's numbers."""
    folders = count()

    def register(data: ReportData) -> tuple[str, ArtifactRef]:
        folder = tmp_path / f"model-{next(folders)}"
        folder.mkdir()
        (folder / "weights.safetensors").write_text(str(folder))
        composed = Report(
            html=store.write_bytes(b"<html>", "report", ".html"),
            data=store.write_record(data, "report_data"),
            card=store.write_bytes(b"# card", "model_card", ".md"),
        )
        with tracked_run(settings, "run", tags={}) as run:
            return register_model(
                run, store, name, store.write_folder(folder, "released_model"), composed
            ), composed.data

    return register


@pytest.fixture
def settle(
    settings: TrackingSettings, store: ArtifactStore, registered: Callable[[ReportData], tuple[str, ArtifactRef]]
) -> Callable[..., Promotion]:
    """Register a model and judge it."""

    def judge(data: ReportData, config: PromotionConfig = GATE) -> Promotion:
        version, evidence = registered(data)
        with open_registry(settings) as client:
            return settle_promotion(ModelRegistry.of(client), store, "run", version, evidence, config)

    return judge


@pytest.fixture
def model(settings: TrackingSettings, name: str) -> Callable[[], Any]:
    def look() -> Any:
        with open_registry(settings) as client:
            return ModelRegistry.of(client).model(name)

    return look


def test_the_first_version_becomes_champion_if_the_gate_passes(
    settle: Callable[..., Promotion], model: Callable[[], Any]
):
    promotion = settle(GOOD)
    assert (promotion.moved, promotion.champion) == (True, "1")
    assert promotion.verdict.rule("champion").note == "there is no champion yet"
    assert "is the champion now, by the gate" in promotion.sentence
    found = model()
    assert found.champion == "1"
    assert found.version("1").tags["charm.gate"] == "passed"
    assert [(move.action, move.before, move.after) for move in found.moves] == [("promote", "", "1")]
    assert found.moves[0].verdict.startswith("the gate passes")


def test_the_first_version_does_not_become_champion_if_the_gate_does_not_pass(
    settle: Callable[..., Promotion], model: Callable[[], Any]
):
    promotion = settle(BAD)
    assert (promotion.moved, promotion.champion) == (False, None)
    found = model()
    assert (found.champion, found.moves) == (None, ())
    assert found.version("1").tags["charm.gate"] == "not passed"
    assert "failed: mismatch_untouched" in found.version("1").tags["charm.verdict"]


def test_a_bad_version_leaves_the_champion_alone_and_a_better_one_follows_it(
    settle: Callable[..., Promotion], model: Callable[[], Any]
):
    assert [settle(data).champion for data in (GOOD, BAD, BETTER)] == ["1", "1", "3"]
    assert [(move.before, move.after) for move in model().moves] == [("", "1"), ("1", "3")]


def test_a_version_that_is_clearly_worse_than_the_champion_stays_behind(settle: Callable[..., Promotion]):
    settle(report(0.0, 3.0))
    promotion = settle(report(0.9, 3.0))  # far better than the untouched one, but not than the champion
    assert promotion.verdict.named("failed") == ("champion",)
    assert (promotion.moved, promotion.champion) == (False, "1")
    (finding,) = promotion.verdict.rule("champion").findings
    assert finding.what == "held-out prompts, against version 1"


@pytest.mark.parametrize(
    ("change", "note"),
    [
        ({"reward_model": "another RM"}, "version 1 is a calibration of an RM, not of another RM"),
        (
            {"provenance": GOOD.provenance.model_copy(update={"digests": GOOD.provenance.digests[:1]})},
            "version 1 was measured on other held out responses",
        ),
        ({"domains": (GOOD.main.model_copy(update={"label": "x"}),)}, "version 1 was not measured on x"),
    ],
)
def test_versions_that_were_measured_otherwise_are_not_compared(
    settle: Callable[..., Promotion], change: dict[str, Any], note: str
):
    settle(GOOD)
    promotion = settle(GOOD.model_copy(update=change))
    assert promotion.verdict.rule("champion").result == "not applicable"
    assert promotion.verdict.rule("champion").note == note
    assert promotion.moved


def test_a_champion_whose_evidence_is_gone_is_not_compared(
    settle: Callable[..., Promotion], store: ArtifactStore, model: Callable[[], Any]
):
    settle(GOOD)
    evidence = ArtifactRef.model_validate_json(model().version("1").tags["evidence"])
    Path(evidence.uri).unlink()
    assert not store.is_sound(evidence)
    promotion = settle(BETTER)
    assert "the evidence of version 1 cannot be read" in promotion.verdict.rule("champion").note
    assert promotion.moved


class TestForce:
    def test_needs_a_reason(self):
        with pytest.raises(ValueError, match="'force' needs a reason"):
            PromotionConfig(promote="force", reason="  ")

    def test_is_recorded_with_reason_and_verdict(self, settle: Callable[..., Promotion], model: Callable[[], Any]):
        promotion = settle(BAD, FORCE)
        assert (promotion.moved, promotion.verdict.passed) == (True, False)
        assert "by force (the board is wrong)" in promotion.sentence
        found = model()
        (move,) = found.moves
        assert isinstance(move, Move)
        assert (found.champion, move.action, move.reason) == ("1", "force", "the board is wrong")
        assert move.verdict.startswith("the gate does not pass (failed: mismatch_untouched")
        assert "@" in move.by
        assert found.version("1").tags["charm.gate"] == "not passed"  # force changes no verdict


def test_never_only_judges(settle: Callable[..., Promotion], model: Callable[[], Any]):
    promotion = settle(GOOD, PromotionConfig(promote="never"))
    assert promotion.verdict.passed
    assert not promotion.moved
    assert "switched off" in promotion.sentence
    assert model().champion is None


def test_what_was_not_measured_needs_permission(settle: Callable[..., Promotion]):
    unmeasured = GOOD.model_copy(update={"benchmarks": ()})
    assert "not measured: benchmarks" in settle(unmeasured).sentence
    allowed = settle(unmeasured, PromotionConfig(gate=GateConfig(may_be_unmeasured=("benchmarks",))))
    assert (allowed.moved, allowed.champion) == (True, "2")
    assert "not measured, which is allowed: benchmarks" in allowed.sentence


class TestAgain:
    """A run that is repeated finds its version registered already."""

    @pytest.fixture
    def again(
        self, settings: TrackingSettings, store: ArtifactStore, name: str, model: Callable[[], Any]
    ) -> Callable[..., Promotion]:
        def judge(number: str, config: PromotionConfig = GATE) -> Promotion:
            evidence = ArtifactRef.model_validate_json(model().version(number).tags["evidence"])
            with open_registry(settings) as client:
                version = f"models:/{name}/{number}"
                return settle_promotion(ModelRegistry.of(client), store, "run", version, evidence, config)

        return judge

    def test_the_champion_stays_without_another_move(
        self, settle: Callable[..., Promotion], again: Callable[..., Promotion], model: Callable[[], Any]
    ):
        settle(GOOD)
        promotion = again("1")
        assert not promotion.moved
        assert "is the champion already" in promotion.sentence
        assert len(model().moves) == 1

    def test_the_gate_does_not_bring_back_an_older_version(
        self, settle: Callable[..., Promotion], again: Callable[..., Promotion]
    ):
        settle(BETTER)
        settle(BETTER)
        promotion = again("1")
        assert promotion.verdict.passed
        assert (promotion.moved, promotion.champion) == (False, "2")
        assert "older than the champion, version 2" in promotion.sentence
        assert again("1", FORCE).champion == "1"

    def test_the_gate_does_not_bring_back_what_was_rolled_back(
        self,
        settle: Callable[..., Promotion],
        again: Callable[..., Promotion],
        model: Callable[[], Any],
        settings: TrackingSettings,
        name: str,
    ):
        settle(GOOD)
        settle(BETTER)
        with open_registry(settings) as client:
            roll_back(ModelRegistry.of(client), name, "worse in use", "run")
        promotion = again("2")
        assert (promotion.moved, promotion.champion) == (False, "1")
        assert "it was taken back" in promotion.sentence
        assert "worse in use" in promotion.sentence
        assert again("2", FORCE).champion == "2"
        assert [move.action for move in model().moves] == ["promote", "promote", "roll back", "force"]
        assert not again("2").moved  # the champion already


def test_a_version_keeps_what_it_was_made_of(
    registered: Callable[[ReportData], tuple[str, ArtifactRef]], model: Callable[[], Any], store: ArtifactStore
):
    registered(GOOD)
    version = model().version("1")
    with store.local_folder(released_ref(version)) as folder:
        assert (folder / "weights.safetensors").is_file()
    old = version.model_copy(update={"tags": {"digest": "x"}})
    with pytest.raises(ConfigError, match="version 1 was registered without its released"):
        released_ref(old)


def test_the_verdict_is_published(
    settings: TrackingSettings,
    store: ArtifactStore,
    registered: Callable[[ReportData], tuple[str, ArtifactRef]],
    prefect_session: None,
):
    from mlflow import MlflowClient

    version, evidence = registered(with_domain(GOOD, comparisons=GOOD.main.comparisons[:1]))

    own: list[UUID] = []

    @flow(validate_parameters=False)
    def judge(run: TrackedRun) -> Promotion:
        own.append(UUID(str(flow_run.id)))
        return judge_promotion(run, store, version, evidence, GATE)

    with tracked_run(settings, "run", tags={}) as run:
        promotion = judge(run)
    assert promotion.verdict.named("not measured") == ("mismatch_control",)
    with get_client(sync_client=True) as prefect:  # the server also has those of other tests
        (published,) = prefect.read_artifacts(
            artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=own))
        )
    assert published.key == "promotion"
    assert promotion.sentence in str(published.data)
    assert "| ? not measured |" in str(published.data)
    client = MlflowClient(tracking_uri=settings.uri)
    tags = client.get_run(run.run_id).data.tags
    assert (tags["charm.gate"], tags["charm.promotion"]) == ("not passed", promotion.sentence)
    assert {file.path for file in client.list_artifacts(run.run_id)} == {"promotion.md", "verdict.json"}
