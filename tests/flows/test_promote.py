"""One command each: show, promote, force, roll back, withdraw, push."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from pydantic import ValidationError

from charm_core.promotion import GateConfig
from flows.command_line import run_from_command_line
from flows.promote import PRESETS, PromoteRun, start
from flows.settings import CHECKOUT, RuntimeSettings
from tasks.evidence import Report
from tasks.pages.report_data import ReportData
from tasks.promotion import judge_report
from tasks.registry import register_model
from tasks.store import ArtifactRef
from tasks.tracking import tracked_run
from tests.promotion_samples import report

Command = Callable[..., tuple[int, str]]
NAME = "charm-sample"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, prefect_session: None) -> Iterator[Path]:
    """Three versions: good, bad, and good but for what was not measured; the last was judged when it was made."""
    folder = tmp_path_factory.mktemp("home")
    unmeasured = report(0.0).model_copy(update={"benchmarks": ()})
    allowed = GateConfig(may_be_unmeasured=("benchmarks",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CHARM_HOME", str(folder))
        for number, data in enumerate(
            [report(0.1), report(1.5), unmeasured.model_copy(update={"verdict": judge_report(unmeasured, allowed)})]
        ):
            register(folder, number, data)
        yield folder


def register(home: Path, number: int, data: ReportData) -> None:
    store = RuntimeSettings().artifact_store()
    folder = home / f"model-{number}"
    folder.mkdir()
    (folder / "model.safetensors").write_text(str(number))
    (folder / "README.md").write_text("# card")
    html: ArtifactRef = store.write_bytes(b"<html>", "report", ".html")
    composed = Report(html=html, data=store.write_record(data, "report_data"), card=html)
    with tracked_run(RuntimeSettings().tracking(), "calibrate", tags={}) as run:
        register_model(run, store, NAME, store.write_folder(folder, "released_model"), composed)


@pytest.fixture
def command(home: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run the command line; its exit status and all that it said."""

    def run(*options: str) -> tuple[int, str]:
        capsys.readouterr()
        status = run_from_command_line("promote", PromoteRun, PRESETS, start, options)
        said = capsys.readouterr()
        return status, said.out + said.err

    return run


@pytest.fixture
def client(home: Path) -> MlflowClient:
    uri = RuntimeSettings().tracking().uri
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


@pytest.fixture
def nobody(client: MlflowClient) -> None:
    """No champion and no history."""
    client.delete_registered_model_alias(NAME, "champion")
    for tag in client.get_registered_model(NAME).tags:
        client.delete_registered_model_tag(NAME, tag)


def champion(client: MlflowClient) -> str | None:
    found = client.get_registered_model(NAME).aliases.get("champion")
    return None if found is None else str(found)


@pytest.mark.usefixtures("nobody")
class TestCommands:
    def test_show_changes_and_records_nothing(self, command: Command, client: MlflowClient):
        runs = len(client.search_runs(["0", "1"]))
        status, said = command()
        assert (status, said.split()) == (0, ["model", "champion", "versions", NAME, "nobody", "3"])
        status, said = command("--model", NAME)
        assert status == 0
        assert f"{NAME}: the champion is nobody" in said
        assert len(client.search_runs(["0", "1"])) == runs

    def test_a_model_that_does_not_exist_is_named(self, command: Command):
        status, said = command("--model", "other")
        assert (status, said) == (
            1, f"error: no model 'other' is registered: it has ['{NAME}']; a calibration registers its model\n",
        )  # fmt: skip

    def test_the_gate_decides(self, command: Command, client: MlflowClient):
        assert "is the champion now, by the gate" in command("--model", NAME, "--version", "1", "--promote", "gate")[1]
        status, said = command("--model", NAME, "--version", "2", "--promote", "gate")
        assert (status, champion(client)) == (0, "1")
        experiments = [one.experiment_id for one in client.search_experiments()]
        assert client.search_runs(experiments)[0].info.run_name == f"promote {NAME} · champion: 1"
        assert "Version 2 of charm-sample did not become the champion (version 1 stays)" in said
        assert "failed: mismatch_untouched" in said

    def test_the_newest_is_meant_and_judged_as_when_it_was_made(self, command: Command, client: MlflowClient):
        assert "not measured, which is allowed: benchmarks" in command("--model", NAME, "--promote", "gate")[1]
        assert champion(client) == "3"

    def test_another_demand_can_be_made(self, command: Command, client: MlflowClient):
        _, said = command("--model", NAME, "--promote", "gate", "--gate.spread_factor", "2")
        assert "(not measured: benchmarks)" in said
        assert champion(client) is None

    def test_force_is_recorded(self, command: Command, client: MlflowClient):
        status, said = command(
            "--model", NAME, "--version", "2", "--promote", "force", "--reason", "the board is wrong"
        )
        assert (status, champion(client)) == (0, "2")
        assert "by force (the board is wrong)" in said
        shown = command("--model", NAME)[1]
        assert "version 2 promoted by force by" in shown
        assert "the board is wrong; the gate does not pass (failed: mismatch_untouched)" in shown

    def test_roll_back_is_one_command(self, command: Command, client: MlflowClient):
        command("--model", NAME, "--version", "1", "--promote", "gate")
        command("--model", NAME, "--version", "2", "--promote", "force", "--reason", "x")
        status, said = command("--model", NAME, "--roll_back", "--reason", "worse in use")
        assert (status, champion(client)) == (0, "1")
        assert "rolled back from version 2 to 1 by" in said
        assert "worse in use" in said
        run = client.search_runs([client.get_experiment_by_name("charm").experiment_id], max_results=1)[0]
        assert "rolled back from version 2 to 1" in run.data.tags["charm.promotion"]
        assert run.info.status == "FINISHED"
        status, said = command("--model", NAME, "--roll_back", "--reason", "again")
        assert (status, champion(client)) == (1, "1")
        assert "no earlier champion" in said

    def test_withdraw(self, command: Command, client: MlflowClient):
        command("--model", NAME, "--version", "1", "--promote", "gate")
        assert command("--model", NAME, "--withdraw", "--reason", "bad")[0] == 0
        assert champion(client) is None

    def test_push_is_a_dry_run_and_needs_a_champion(self, command: Command):
        push = ("--model", NAME, "--push.repository", "me/rm")
        assert "has no champion to push" in command(*push)[1]
        command("--model", NAME, "--version", "1", "--promote", "gate")
        status, said = command(*push)
        assert status == 0
        assert "Nothing was sent (dry run). Would push version 1 to me/rm" in said
        assert "model.safetensors" in said


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"promote": "force", "model": "x"}, "promote needs a reason"),
        ({"roll_back": True, "model": "x"}, "roll_back needs a reason"),
        ({"roll_back": True, "reason": "x"}, "roll_back needs model"),
        ({"roll_back": True, "promote": "gate", "model": "x", "reason": "x"}, "at most one of"),
        ({"withdraw": True, "version": "1", "model": "x", "reason": "x"}, "leave version out"),
        ({"version": "latest"}, "version"),
    ],
)
def test_contradictions_are_refused(wrong: dict[str, object], message: str):
    with pytest.raises(ValidationError, match=message):
        PromoteRun.model_validate(wrong)


def test_show_runs_as_a_command(home: Path):
    done = subprocess.run(
        [sys.executable, "-m", "flows.promote", "--model", NAME],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"{NAME}: the champion is" in done.stdout
