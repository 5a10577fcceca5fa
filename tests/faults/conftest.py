"""One job, run undisturbed once; every test starts from what that left."""

import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from charm_core.mismatch import MismatchConfig
from charm_core.offsets import OffsetConfig
from charm_core.preferences import PreferenceConfig
from charm_core.responses import SplitConfig
from charm_core.reward_model.spec import TrainingConfig
from charm_core.simulation import HELD_OUT_WRITERS, SimulationConfig
from flows.runs import CalibrationRun
from tasks.ledger import Ledger, last_ledger
from tasks.simulation import SimulatedWorld
from tasks.store import ArtifactStore
from tests.faults.night import NAME, TITLE, Night, copy_code, servers, write_settings

JOB = CalibrationRun(
    name=NAME,
    simulation=SimulatedWorld(
        arena=SimulationConfig(prompts=30, label_prompts=20, battles=2000),
        base_training=TrainingConfig(
            epochs=1, learning_rate=1e-3, pairs_per_step=90, zero_stage=None, threads_per_rank=1
        ),
    ),
    split=SplitConfig(held_out_policy_models=HELD_OUT_WRITERS),
    mismatch=MismatchConfig(bootstrap_replicates=100),
    calibration=OffsetConfig(bootstrap_replicates=20),
    preferences=PreferenceConfig(strategy="all_pairs", held_out_fraction=0.3),
    training=TrainingConfig(
        objective="win_rate_matching",
        learning_rate=5e-4,
        pairs_per_step=60,
        ranks=2,
        zero_stage=3,
        checkpoint_every_steps=1,
    ),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.faults)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where everything lies. In the folder ``CHARM_TEST_NIGHT``, if that is set, the undisturbed run stays for the next session.

    That is for a suite that is run in pieces, one at a time; remove the folder when the code has changed.
    """
    if "CHARM_TEST_NIGHT" not in os.environ:
        return tmp_path_factory.mktemp("night")
    kept = Path(os.environ["CHARM_TEST_NIGHT"])
    for name in ("code", "tmp", "flags"):
        shutil.rmtree(kept / name, ignore_errors=True)
    kept.mkdir(parents=True, exist_ok=True)
    return kept


@pytest.fixture(scope="session")
def whole_night(folder: Path) -> Iterator[tuple[Night, Ledger]]:
    """The servers, and what an undisturbed run came to."""
    copy_code(folder / "code")
    (folder / "tmp").mkdir()
    write_settings(folder / "run.toml", JOB)
    pristine = folder / "pristine"
    for prefect, mlflow in servers(folder):
        night = Night(folder, prefect, mlflow, experiment="undisturbed")
        try:
            if not pristine.exists():
                night.finish()
                night.home.rename(pristine)
            ledger = last_ledger(ArtifactStore(url=str(pristine / "store"), work_folder=str(pristine / "work")), TITLE)
            assert ledger is not None
            yield night, ledger
        finally:
            night.clear_up()


@pytest.fixture
def night(whole_night: tuple[Night, Ledger], request: pytest.FixtureRequest) -> Iterator[Night]:
    """The store as the undisturbed run left it, without its work folder, and an MLflow experiment for this test alone."""
    night, _ = whole_night
    shutil.rmtree(night.home, ignore_errors=True)
    shutil.copytree(night.folder / "pristine" / "store", night.home / "store")
    # a test that is repeated on a kept folder has an experiment of its own all the same
    night.experiment = f"{re.sub(r'[^a-z0-9]+', '-', request.node.name.lower())[:60]}-{time.time_ns()}"
    try:
        yield night
    finally:
        night.clear_up()


@pytest.fixture
def undisturbed(whole_night: tuple[Night, Ledger]) -> Ledger:
    return whole_night[1]
