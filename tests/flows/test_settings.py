"""The environment: read in one place, and never a reason for another result."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from charm_core.errors import ConfigError, ServiceError
from flows.settings import CHECKOUT, RuntimeSettings, prepare_environment
from tasks.scoring_settings import RayCluster, ScoringProcesses, ScoringSettings


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.upper().startswith("CHARM_")]:
        monkeypatch.delenv(name)


def test_everything_is_below_the_checkout_by_default():
    settings = RuntimeSettings()
    assert settings.artifact_store().url == str(CHECKOUT / ".charm" / "store")
    assert settings.artifact_store().work_folder == str(CHECKOUT / ".charm" / "work")


def test_home_moves_everything(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    home = tmp_path / "a home"
    monkeypatch.setenv("CHARM_HOME", str(home))
    store, tracking = RuntimeSettings().artifact_store(), RuntimeSettings().tracking()
    assert (store.url, store.work_folder) == (f"{home}/store", f"{home}/work")
    assert tracking.uri == f"sqlite:///{home}/mlflow.db"
    assert tracking.artifact_location == f"file://{tmp_path}/a%20home/mlflow-artifacts"
    assert home.is_dir()


@pytest.mark.parametrize("name", ["CHARM_HOME", "CHARM_STORE", "CHARM_TRACKING_URI", "CHARM_EXPERIMENT"])
def test_an_empty_variable_is_no_variable(monkeypatch: pytest.MonkeyPatch, name: str):
    default = RuntimeSettings()
    monkeypatch.setenv(name, "")
    assert RuntimeSettings() == default


def test_relative_and_tilde_paths_become_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    monkeypatch.setenv("CHARM_HOME", "~/charm")
    monkeypatch.setenv("CHARM_STORE", "there/store")
    store = RuntimeSettings().artifact_store()
    assert (store.url, store.work_folder) == (f"{tmp_path}/there/store", f"{tmp_path}/me/charm/work")


@pytest.mark.parametrize("url", ["memory://charm", "s3://bucket/charm"])
def test_a_store_at_a_url_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch, url: str):
    monkeypatch.setenv("CHARM_STORE", url)
    assert RuntimeSettings().artifact_store().url == url


def test_a_tracking_server_chooses_where_its_artifacts_go(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CHARM_TRACKING_URI", "http://mlflow:5000")
    monkeypatch.setenv("CHARM_EXPERIMENT", "mine")
    tracking = RuntimeSettings().tracking()
    assert (tracking.uri, tracking.artifact_location, tracking.experiment) == ("http://mlflow:5000", None, "mine")


def test_a_server_that_cannot_be_asked_is_named_and_asked_only_if_need_be(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):  # the discard port: nothing listens
        with pytest.raises(
            ServiceError, match=r"Prefect server at http://127.0.0.1:9/api cannot be asked for CHARM_STORE"
        ):
            RuntimeSettings().artifact_store()
        monkeypatch.setenv("CHARM_STORE", str(tmp_path))
        assert RuntimeSettings().artifact_store().url == str(tmp_path)


def test_what_the_user_has_set_is_kept(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DO_NOT_TRACK", "0")
    monkeypatch.delenv("PREFECT_SERVER_ANALYTICS_ENABLED", raising=False)
    prepare_environment()
    assert os.environ["DO_NOT_TRACK"] == "0"
    assert os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"


def test_the_environment_is_ready_before_prefect_and_mlflow_are_imported():
    script = (
        "import sys, os, flows\n"
        "assert not {'prefect', 'mlflow', 'torch'} & set(sys.modules), sorted(sys.modules)\n"
        "assert os.environ['PREFECT_SERVER_ANALYTICS_ENABLED'] == 'false'\n"
        "assert os.environ['MLFLOW_DISABLE_TELEMETRY'] == 'true'\n"
    )
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PREFECT", "MLFLOW", "DO_NOT"))
    }
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=CHECKOUT,
        env=environment | {"PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_how_scoring_is_done_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch):
    assert RuntimeSettings().scoring() == ScoringSettings()
    monkeypatch.setenv("CHARM_SCORING_PROCESSES", "3")
    monkeypatch.setenv("CHARM_SHARD_TEXTS", "1000")
    monkeypatch.setenv("CHARM_RAY_ADDRESS", "head:6379")
    monkeypatch.setenv("CHARM_RAY_GPUS", "2")
    with temporary_settings({PREFECT_API_URL: "http://server:4200/api"}):
        assert RuntimeSettings().scoring() == ScoringSettings(
            processes=ScoringProcesses(number=3), shard_texts=1000, ray=RayCluster(address="head:6379", gpus=2)
        )


OTHER_MACHINES = {"CHARM_RAY_ADDRESS": "head:6379", "CHARM_SCORING_DEPLOYMENT": "score-shard/workers"}


@pytest.mark.parametrize(("variable", "value"), OTHER_MACHINES.items())
def test_other_machines_need_a_prefect_server(variable: str, value: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(variable, value)
    with (
        temporary_settings({PREFECT_API_URL: ""}),
        pytest.raises(ConfigError, match=f"{variable}={value}, but no Prefect server is named"),
    ):
        RuntimeSettings().scoring()


def test_shards_are_done_by_one_kind_of_machines(monkeypatch: pytest.MonkeyPatch):
    for variable, value in OTHER_MACHINES.items():
        monkeypatch.setenv(variable, value)
    with (
        temporary_settings({PREFECT_API_URL: "http://server:4200/api"}),
        pytest.raises(ConfigError, match=r"on a Ray cluster or on Prefect workers; unset one"),
    ):
        RuntimeSettings().scoring()
    monkeypatch.delenv("CHARM_RAY_ADDRESS")
    with temporary_settings({PREFECT_API_URL: "http://server:4200/api"}):
        assert RuntimeSettings().scoring() == ScoringSettings(deployment="score-shard/workers")


def test_a_training_stays_on_one_machine_unless_several_are_named(monkeypatch: pytest.MonkeyPatch):
    assert RuntimeSettings().node_settings() is None
    monkeypatch.setenv("CHARM_NODES", "alone")
    assert RuntimeSettings().node_settings() is None


def test_machines_come_from_a_list_or_a_hostfile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("CHARM_NODES", "first, second")
    monkeypatch.setenv("CHARM_NODES_PORT", "29400")
    found = RuntimeSettings().node_settings()
    assert found is not None
    assert (found.hosts, found.port) == (("first", "second"), 29400)
    assert found.environment["NCCL_SOCKET_IFNAME"] == "ib0"
    assert "HF_TOKEN" not in found.environment

    (tmp_path / "hostfile").write_text("first slots=8  # here\n\n# the others\nsecond slots=8\nthird slots=8\n")
    monkeypatch.setenv("CHARM_NODES", str(tmp_path / "hostfile"))
    monkeypatch.setenv("CHARM_REMOTE_SHELL", "srun --nodelist")
    found = RuntimeSettings().node_settings()
    assert found is not None
    assert (found.hosts, found.remote_shell) == (("first", "second", "third"), "srun --nodelist")


@pytest.mark.parametrize(("nodes", "message"), [("./absent", "cannot be read"), ("a,b,a", "names the machine a twice")])
def test_machines_that_are_not_told_rightly(monkeypatch: pytest.MonkeyPatch, nodes: str, message: str):
    monkeypatch.setenv("CHARM_NODES", nodes)
    with pytest.raises(ConfigError, match=message):
        RuntimeSettings().node_settings()
