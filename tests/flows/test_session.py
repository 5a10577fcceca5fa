"""A run that cannot succeed says so at once, before anything is computed."""

import re
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from charm_core.errors import ArtifactError, ServiceError
from flows.outcome import name_run
from flows.promote import PromoteRun
from flows.runs import AblationRun
from flows.session import check_services, is_chosen, open_session, server_away
from tasks.arena import ArenaConfig

NOBODY = "http://127.0.0.1:9"  # the discard port: nothing listens


def test_a_prefect_server_that_does_not_answer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CHARM_HOME", str(tmp_path))
    with (
        temporary_settings({PREFECT_API_URL: f"{NOBODY}/api"}),
        pytest.raises(ServiceError, match=rf"Prefect server at {NOBODY}/api does not answer.*unset PREFECT_API_URL"),
    ):
        check_services()


def test_an_mlflow_server_that_does_not_answer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CHARM_HOME", str(tmp_path))
    monkeypatch.setenv("CHARM_TRACKING_URI", NOBODY)
    with pytest.raises(ServiceError, match=rf"{NOBODY}.*CHARM_TRACKING_URI"):
        check_services()


def test_a_store_that_cannot_be_written_stops_the_run_before_it_is_tracked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("CHARM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CHARM_STORE", str(tmp_path / "file" / "store"))
    with pytest.raises(ArtifactError, match="cannot write"), open_session("audit", "t", ArenaConfig(source="x")):
        pytest.fail("the session opened")
    assert not (tmp_path / "home" / "mlflow.db").exists()


@pytest.mark.parametrize(
    ("run", "name"),
    [
        (AblationRun.model_construct(name="ablation"), "ablate skywork-8b · 12 recipes"),
        (AblationRun.model_construct(name="nightly"), "ablate nightly · 12 recipes"),
        (PromoteRun(model="charm-m"), "ablate charm-m · 12 recipes"),
    ],
    ids=["not named by anybody", "named", "settings without a name"],
)
def test_a_run_that_nobody_named_is_called_after_what_it_is_about(
    run: AblationRun | PromoteRun, name: str, monkeypatch: pytest.MonkeyPatch
):
    named: list[str] = []
    monkeypatch.setattr("flows.outcome.rename_flow_run", named.append)
    given = run.model if isinstance(run, PromoteRun) else run.name
    tracked = SimpleNamespace(url="u", show=lambda shown, _description: named.append(shown))
    session = SimpleNamespace(
        kind="ablate", name=given, named=is_chosen(given, run), run=tracked, flow_run_url="https://prefect/run"
    )
    name_run(session, "skywork-8b", None, "12 recipes")
    assert named == [name, name]


def test_a_run_that_lost_its_prefect_server_says_so_and_no_other_does():
    lost = httpx.ConnectError("Connection refused")
    with temporary_settings({PREFECT_API_URL: f"{NOBODY}/api"}):
        assert server_away(ValueError("another reason")) is None
        assert re.search(rf"{NOBODY}/api does not answer.*finished steps are kept", str(server_away(lost)))
    with temporary_settings({PREFECT_API_URL: ""}):  # it has one of its own
        assert server_away(lost) is None
