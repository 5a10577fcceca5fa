"""A canary in every place where a secret can be put sings nowhere: not in what is kept, shown, logged or said."""

import json
import logging
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from prefect.blocks.system import Secret
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_DATABASE_CONNECTION_URL, temporary_settings

from charm_core.errors import CharmError, ConfigError, ServiceError
from charm_core.mismatch import MismatchConfig
from charm_core.sampling import Decoding
from flows.audit import audit
from flows.runs import AuditRun
from flows.settings import RuntimeSettings
from tasks.arena import ArenaConfig
from tasks.gathering import SamplingConfig
from tasks.judging import JudgeConfig
from tasks.policy_models import OpenAIBackend, PolicyModel
from tasks.prompt_sets import PromptSetConfig
from tasks.ratings.fetching import FetchConfig
from tests.endpoint_server import Asked, EndpointServer, Reply, completion, failure
from tests.leaderboard_server import Answer, serve
from tests.prefect_server import BIN, PrefectServer, free_port, wait_for

CANARY = "c4n4ry"
QUALITY = {"sky": 4, "sea": 3}
BOARD = "policy_model,rating\n" + "\n".join(f"{name},{1000 + 40 * value}" for name, value in QUALITY.items())
ENVIRONMENT = {
    "POLICY_KEY": f"sk-{CANARY}-policy",
    "BOARD_TOKEN": f"{CANARY}-token",
    "BOARD_LOGIN": f"me:{CANARY}-login",
    "HF_TOKEN": f"hf_{CANARY}hub",
    "OPENAI_API_KEY": f"sk-{CANARY}-hosted",
    "MLFLOW_TRACKING_PASSWORD": f"{CANARY}-tracking",
    "AWS_SECRET_ACCESS_KEY": f"{CANARY}-store",
}
BLOCK = f"sk-{CANARY}-block"


def sings(content: bytes) -> bool:
    return CANARY.encode() in content


def singing_files(*folders: Path) -> list[Path]:
    return [path for folder in folders for path in folder.rglob("*") if path.is_file() and sings(path.read_bytes())]


@dataclass
class Place:
    """Where a run reads from, and where it keeps what it makes."""

    home: Path
    run: AuditRun
    endpoint: EndpointServer
    boards: list[str]
    """What the server of the ratings was asked for, with the login."""


def answer(asked: Asked) -> Reply | None:
    key = asked.headers.get("authorization", "")
    if key not in (f"Bearer {ENVIRONMENT['POLICY_KEY']}", f"Bearer {BLOCK}"):
        return failure(401, f"wrong key: {key}")  # as some servers do
    if asked.body["model"] == "judge":
        return Reply(completion("[[FIRST]]", model="judge"))
    return Reply(completion(f"by {asked.body['model']}: {asked.body['messages'][-1]['content']}"))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefect_session: None) -> Iterator[Place]:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CHARM_HOME", str(tmp_path / "home"))
    Secret(value=BLOCK).save("judge-key", overwrite=True)
    questions = tmp_path / "questions.jsonl"
    questions.write_text("\n".join(json.dumps({"prompt": f"question {n}"}) for n in range(12)))
    asked: list[str] = []

    def board(request: object) -> Answer:
        asked.append(f"{request.path} {request.headers.get('authorization', '')}")
        return Answer(body=BOARD.encode())

    with EndpointServer(answer) as endpoint, serve(board) as boards:

        def backend(model: str, key: str) -> OpenAIBackend:
            return OpenAIBackend(base_url=endpoint.url, model=model, deployment=model, api_key=key, max_tries=2)

        named = boards.url.replace("://", "://{BOARD_LOGIN}@") + "/board.csv?token={BOARD_TOKEN}"
        run = AuditRun(
            name="canary",
            arena=ArenaConfig(source=named, fetching=FetchConfig(allow_http=True, max_tries=1)),
            sampling=SamplingConfig(
                prompts=PromptSetConfig(source=str(questions)),
                policy_models=tuple(PolicyModel(name=name, backend=backend(name, "POLICY_KEY")) for name in QUALITY),
                decoding=Decoding(max_tokens=9),
            ),
            judge=JudgeConfig(backend=backend("judge", "JUDGE_KEY")),
            mismatch=MismatchConfig(bootstrap_replicates=50),
        )
        with temporary_settings({PREFECT_API_AUTH_STRING: f"admin:{CANARY}-prefect"}):
            yield Place(home=tmp_path / "home", run=run, endpoint=endpoint, boards=asked)


def test_a_run_that_uses_secrets_keeps_and_says_none(
    place: Place, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    outcome = audit(place.run)
    # they were really used
    assert place.boards == ["/board.csv?token=c4n4ry-token Basic bWU6YzRuNHJ5LWxvZ2lu"]
    assert {asked.headers["authorization"].split("-")[-1] for asked in place.endpoint.asked} == {"policy", "block"}
    assert not sings(outcome.model_dump_json().encode())
    assert len([path for path in place.home.rglob("*") if path.is_file()]) > 20
    assert singing_files(place.home) == []
    database = Path(PREFECT_API_DATABASE_CONNECTION_URL.value().partition(":///")[2])
    assert database.stat().st_size > 0
    assert singing_files(database.parent) == []
    shown = capfd.readouterr()
    assert not sings(f"{shown.out}{shown.err}".encode())
    assert not [record for record in caplog.records if sings(record.getMessage().encode())]


@pytest.mark.parametrize("broken", ["key", "board"])
def test_a_run_that_fails_over_a_secret_does_not_say_it(
    place: Place, broken: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    run = place.run
    if broken == "key":
        monkeypatch.setenv("POLICY_KEY", f"sk-{CANARY}-wrong")
    else:
        assert run.arena is not None
        away = re.sub(r":\d+/", ":9/", run.arena.source)  # the discard port: nothing listens
        run = run.model_copy(update={"arena": run.arena.model_copy(update={"source": away})})
    with pytest.raises(CharmError) as failed:
        audit(run)
    shown = capfd.readouterr()
    assert not sings(f"{failed.value}{shown.out}{shown.err}".encode())
    assert singing_files(place.home) == []


class TestWhereThingsAreKept:
    def test_a_store_whose_address_holds_a_key_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        for url in (f"s3://me:{CANARY}@bucket/charm", f"abfs://charm@account/x?sig={CANARY}"):
            monkeypatch.setenv("CHARM_STORE", url)
            with pytest.raises(ConfigError, match=r"store's address \w+://\S+ holds a password or a key") as refused:
                RuntimeSettings().artifact_store()
            assert not sings(str(refused.value).encode())

    def test_a_login_at_the_tracking_server_is_used_and_not_shown(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "")
        monkeypatch.setenv("CHARM_TRACKING_URI", f"https://me:{CANARY}%40x@mlflow.example.org/a")
        tracking = RuntimeSettings().tracking()
        assert (tracking.uri, tracking.pages) == ("https://mlflow.example.org/a", "https://mlflow.example.org/a")
        assert (os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"]) == ("me", f"{CANARY}@x")

    def test_nor_is_that_of_a_database(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("CHARM_TRACKING_URI", f"postgresql://me:{CANARY}@db/mlflow")
        tracking = RuntimeSettings().tracking()
        assert (tracking.shown_uri, tracking.pages) == ("postgresql://db/mlflow", "http://127.0.0.1:5000")

    def test_the_pages_may_be_elsewhere(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("CHARM_TRACKING_URI", "http://mlflow:5000")
        assert RuntimeSettings().tracking().pages == "http://mlflow:5000"
        monkeypatch.setenv("CHARM_MLFLOW_UI_URL", "http://127.0.0.1:5000/")
        assert RuntimeSettings().tracking().pages == "http://127.0.0.1:5000"

    def test_prefect_keeps_them_where_the_environment_does_not_say(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefect_session: None
    ):
        from prefect.variables import Variable

        monkeypatch.delenv("CHARM_STORE", raising=False)
        monkeypatch.delenv("CHARM_TRACKING_URI", raising=False)
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "")
        Variable.set("charm_store", "s3://bucket/charm", overwrite=True)
        Secret(value=f"http://me:{CANARY}@127.0.0.1:9/").save("charm-tracking-uri", overwrite=True)
        try:
            assert RuntimeSettings().artifact_store().url == "s3://bucket/charm"
            assert RuntimeSettings().tracking().uri == "http://127.0.0.1:9/"
            monkeypatch.setenv("CHARM_STORE", str(tmp_path))
            assert RuntimeSettings().artifact_store().url == str(tmp_path)
        finally:
            Variable.unset("charm_store")
            Secret.delete("charm-tracking-uri")


class GuardedServer(PrefectServer):
    """Prefect and MLflow that ask for a password, as in deployments/compose.yaml."""

    login = f"admin:{CANARY}-pages"
    password = f"{CANARY}-tracking-server"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.mlflow_port = free_port()
        self._mlflow: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        secret = ENVIRONMENT | {"PREFECT_API_AUTH_STRING": self.login, "PREFECT_SERVER_API_AUTH_STRING": self.login}
        del secret["MLFLOW_TRACKING_PASSWORD"]
        return super().environment | secret

    def start_mlflow(self) -> None:
        config = self.folder / "auth.ini"
        config.write_text(
            "[mlflow]\ndefault_permission = READ\n"
            f"database_uri = sqlite:///{self.folder}/auth.db\n"
            "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        )
        environment = self.environment | {
            "MLFLOW_AUTH_CONFIG_PATH": str(config),
            "MLFLOW_AUTH_ADMIN_USERNAME": "admin",
            "MLFLOW_AUTH_ADMIN_PASSWORD": self.password,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": f"{CANARY}-sessions",
        }
        command = [
            str(BIN / "mlflow"), "server", "--app-name=basic-auth", "--host=127.0.0.1", f"--port={self.mlflow_port}",
            f"--backend-store-uri=sqlite:///{self.folder}/mlflow.db", f"--artifacts-destination={self.folder}/artifacts",
        ]  # fmt: skip
        self._mlflow = self._popen(command, "mlflow", environment)
        wait_for("MLflow server", self._mlflow_answers, 300)

    def stop(self) -> None:
        super().stop()
        if self._mlflow is not None:
            os.killpg(self._mlflow.pid, signal.SIGKILL)
            self._mlflow.wait()

    def _mlflow_answers(self) -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{self.mlflow_port}/health", timeout=5).is_success
        except httpx.HTTPError:
            return False


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[GuardedServer]:
    server = GuardedServer(tmp_path)
    try:
        server.start()
        server.start_mlflow()
        yield server
    finally:
        server.stop()


@pytest.mark.slow
@pytest.mark.deployment
def test_servers_that_ask_for_passwords(guarded: GuardedServer, tmp_path: Path):
    """The login of MLflow lies in a Secret block, the store in a Variable; the run is typed, and its database is the server's own."""
    uri = f"http://admin:{guarded.password}@127.0.0.1:{guarded.mlflow_port}"
    keep = (
        "import sys\nfrom prefect.blocks.system import Secret\nfrom prefect.variables import Variable\n"
        "Secret(value=sys.argv[1]).save('charm-tracking-uri')\nVariable.set('charm_store', sys.argv[2])\n"
    )
    guarded.run("python", "-c", keep, uri, str(tmp_path / "the store"))
    (tmp_path / "board.csv").write_text(BOARD)
    (tmp_path / "scores.csv").write_text(
        "prompt_id,policy_model,score\n"
        + "\n".join(f"{n},{m},{n % 7 + q}" for n in range(60) for m, q in QUALITY.items())
    )
    (tmp_path / "run.toml").write_text(
        f'name = "guarded"\n[arena]\nsource = "{tmp_path}/board.csv"\n[scores]\nsource = "{tmp_path}/scores.csv"\n'
    )
    done = guarded.run("python", "-m", "flows.audit", "--config", str(tmp_path / "run.toml"))
    assert f"http://127.0.0.1:{guarded.mlflow_port}/#/experiments/" in done.stdout
    assert not sings(f"{done.stdout}{done.stderr}".encode())
    assert len(list((tmp_path / "the store").rglob("*.parquet"))) >= 2
    assert (tmp_path / "mlflow.db").stat().st_size > 0
    assert list((tmp_path / "artifacts").rglob("report.html"))
    # the server's own log and database as well: the block in it is encrypted
    assert singing_files(tmp_path) == []
    refused = guarded.run(
        "python", "-m", "flows.audit", "--arena.source", f"https://me:{CANARY}@host/b.csv", check=False
    )
    assert refused.returncode == 2
    assert "holds a login or a key" in refused.stderr
    assert not sings(f"{refused.stdout}{refused.stderr}".encode())


def test_a_prefect_server_that_wants_another_password_is_told_apart_from_one_that_is_down(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    from flows.session import check_services

    monkeypatch.setenv("CHARM_HOME", str(tmp_path))
    with (
        serve(lambda asked: Answer(status=200 if asked.path.endswith("/health") else 401)) as server,
        monkeypatch.context() as here,
    ):
        from prefect.settings import PREFECT_API_URL

        here.delenv("CHARM_TRACKING_URI", raising=False)
        with (
            temporary_settings({PREFECT_API_URL: f"{server.url}/api", PREFECT_API_AUTH_STRING: f"a:{CANARY}"}),
            pytest.raises(ServiceError, match=r"does not accept the login.*PREFECT_API_AUTH_STRING") as refused,
        ):
            check_services()
    assert not sings(str(refused.value).encode())
