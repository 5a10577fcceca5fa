"""MLflow: one run per flow run, with the right status, in a real SQLite store."""

import contextlib
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from charm_core.errors import ArtifactError, ServiceError
from tasks.process_identity import process_identity
from tasks.store import ArtifactRef
from tasks.tracking import TrackedRun, current_run, open_registry, register_version, tracked_run
from tasks.tracking_settings import TrackingSettings, check_tracking


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> TrackingSettings:
    folder = tmp_path_factory.mktemp("tracking with space")
    return TrackingSettings(
        uri=f"sqlite:///{folder / 'mlflow.db'}", artifact_location=(folder / "artifacts").as_uri(), experiment="tests"
    )


@pytest.fixture(scope="module")
def client(settings: TrackingSettings) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=settings.uri, registry_uri=settings.uri)


@pytest.fixture
def logged(settings: TrackingSettings, client: Any) -> Callable[[Callable[[TrackedRun], object]], Any]:
    """What MLflow knows of a run after a function has logged to it."""

    def log(function: Callable[[TrackedRun], object]) -> Any:
        with tracked_run(settings, "run", tags={}) as run:
            function(run)
        return client.get_run(run.run_id)

    return log


class TestStatus:
    def test_success(self, settings: TrackingSettings, client: Any):
        with tracked_run(settings, "audit me", tags={"charm.flow": "audit"}) as run:
            assert client.get_run(run.run_id).info.status == "RUNNING"
            assert current_run() is run
        found = client.get_run(run.run_id)
        assert (found.info.status, found.info.run_name) == ("FINISHED", "audit me")
        assert found.data.tags["charm.flow"] == "audit"
        assert found.data.tags["version.polars"] == pl.__version__
        assert current_run() is None

    @pytest.mark.parametrize(
        ("error", "status"),
        [
            (ArtifactError("gone"), "FAILED"),
            (ValueError("bad"), "FAILED"),
            (KeyboardInterrupt(), "KILLED"),
            (SystemExit(1), "KILLED"),
        ],
    )
    def test_an_error_goes_on_and_its_kind_decides(
        self, settings: TrackingSettings, client: Any, error: BaseException, status: str
    ):
        runs: list[TrackedRun] = []

        def fail() -> None:
            with tracked_run(settings, "run", tags={}) as run, run.nested("training") as child:
                runs.extend([run, child])
                raise error

        with pytest.raises(type(error)) as raised:
            fail()
        assert raised.value is error
        assert [client.get_run(run.run_id).info.status for run in runs] == [status, status]
        assert current_run() is None

    def test_a_nested_run_that_fails_and_is_handled_fails_alone(self, settings: TrackingSettings, client: Any):
        with (
            tracked_run(settings, "run", tags={}) as run,
            pytest.raises(ValueError, match=r"no"),
            run.nested("training", {"a": "b"}) as child,
        ):
            raise ValueError("no")
        found = client.get_run(child.run_id)
        assert (found.info.status, found.data.tags["mlflow.parentRunId"], found.data.tags["a"]) == (
            "FAILED", run.run_id, "b",
        )  # fmt: skip
        assert client.get_run(run.run_id).info.status == "FINISHED"

    @pytest.mark.parametrize("statement", ["INSERT INTO metrics", "INSERT INTO runs"])
    def test_ctrl_c_in_the_middle_of_a_write_leaves_no_run_open(
        self, settings: TrackingSettings, client: Any, statement: str
    ):
        from sqlalchemy import event
        from sqlalchemy.engine import Engine

        struck = []

        def strike(*arguments: Any) -> None:
            if not struck and arguments[2].startswith(statement):
                struck.append(statement)
                os.kill(os.getpid(), signal.SIGINT)

        with tracked_run(settings, "another", tags={}) as another:
            experiment = another.experiment_id
        known = {found.info.run_id for found in client.search_runs([experiment])}
        event.listen(Engine, "after_cursor_execute", strike)
        try:
            with (
                pytest.raises(KeyboardInterrupt),
                tracked_run(settings, "run", tags={}) as run,
                run.nested("part") as part,
            ):
                part.show_curve([{"step": 0, "loss": 1.0}])
        finally:
            event.remove(Engine, "after_cursor_execute", strike)
        new = [found for found in client.search_runs([experiment]) if found.info.run_id not in known]
        assert struck
        assert {found.info.status for found in new} == {"KILLED"}

    def test_a_run_that_is_told_to_end_while_it_is_closed_is_closed(self, settings: TrackingSettings, client: Any):
        ids: list[str] = []

        def run() -> None:
            with tracked_run(settings, "run", tags={}) as run:
                close = run._client.set_terminated

                def interrupted(*_: object) -> None:
                    run._client.set_terminated = close
                    raise KeyboardInterrupt

                run._client.set_terminated = interrupted
                ids.append(run.run_id)

        with pytest.raises(KeyboardInterrupt):
            run()
        assert client.get_run(ids[0]).info.status == "KILLED"

    def test_the_error_of_the_run_survives_a_server_that_is_gone(self, settings: TrackingSettings, client: Any):
        def fail() -> None:
            with tracked_run(settings, "run", tags={}) as run:
                run._client.set_terminated = refuse
                raise ArtifactError("the real one")

        with pytest.raises(ArtifactError, match=r"the real one"):
            fail()

    def test_a_run_whose_process_was_killed_is_closed_by_the_next_one(self, settings: TrackingSettings, client: Any):
        script = (
            "import sys, os\n"
            "from tasks.tracking import tracked_run\n"
            "from tasks.tracking_settings import TrackingSettings\n"
            "with tracked_run(TrackingSettings.model_validate_json(sys.argv[1]), 'victim', tags={}) as run:\n"
            "    with run.nested('training') as child:\n"
            "        sys.stdout.write(f'{run.run_id} {child.run_id}\\n')\n"
            "        sys.stdout.flush()\n"
            "        sys.stdin.read()\n"
        )
        child = subprocess.Popen(
            [sys.executable, "-c", script, settings.model_dump_json()],
            env=os.environ | {"PYTHONPATH": str(Path.cwd())},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert child.stdout
        victims = child.stdout.readline().split()
        with tracked_run(settings, "neighbour", tags={}) as neighbour:
            # it lives, so it is left alone
            assert [client.get_run(name).info.status for name in victims] == ["RUNNING", "RUNNING"]
            child.send_signal(signal.SIGKILL)
            # not waited for yet: a zombie counts as dead
            while Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                pass
            with tracked_run(settings, "next", tags={}):
                found = [client.get_run(name) for name in victims]
                assert [run.info.status for run in found] == ["FAILED", "FAILED"]
                assert all("without closing it" in run.data.tags["charm.closed"] for run in found)
                assert client.get_run(neighbour.run_id).info.status == "RUNNING"
        child.communicate()
        assert client.get_run(neighbour.run_id).info.status == "FINISHED"

    def test_runs_of_other_machines_and_of_other_tools_are_left_alone(self, settings: TrackingSettings, client: Any):
        with tracked_run(settings, "run", tags={}) as run:
            pass
        foreign = [
            client.create_run(run.experiment_id, tags=tags).info.run_id
            for tags in ({}, {"charm.process": "elsewhere/1:0.00"}, {"charm.process": "nonsense"})
        ]
        own_but_dead = client.create_run(
            run.experiment_id, tags={"charm.process": f"{process_identity().rpartition(':')[0]}:1.00"}
        ).info.run_id
        with tracked_run(settings, "run", tags={}):
            assert [client.get_run(name).info.status for name in foreign] == ["RUNNING"] * 3
            assert client.get_run(own_but_dead).info.status == "FAILED"


def refuse(*_: object) -> None:
    from mlflow.exceptions import MlflowException

    raise MlflowException("gone")


class TestServerAway:
    def test_what_a_run_cannot_say_is_an_error_that_says_so(self, settings: TrackingSettings):
        def fail() -> None:
            with tracked_run(settings, "run", tags={}) as run:
                run._client.log_batch = lambda *_, **__: refuse()
                run.log_metrics({"a": 1.0})

        with pytest.raises(ServiceError, match=r"did not take .*gone.*finished steps are kept"):
            fail()

    def test_a_curve_is_only_watched(self, settings: TrackingSettings, caplog: pytest.LogCaptureFixture):
        with tracked_run(settings, "run", tags={}) as run:
            take, run._client.log_batch = run._client.log_batch, lambda *_, **__: refuse()
            assert not run.show_curve([{"step": 0, "loss": 1.0}])
            assert "training goes on" in caplog.text
            run._client.log_batch = take
            assert run.show_curve([{"step": 0, "loss": 1.0}])

    def test_a_nested_run_that_cannot_be_closed_is_closed_with_its_parent(
        self, settings: TrackingSettings, client: Any
    ):
        with tracked_run(settings, "run", tags={}) as run:
            close = run._client.set_terminated
            with run.nested("first try") as failed, suppress(ValueError), run.nested("part of it") as part:
                run._client.set_terminated = refuse
                raise ValueError("no")
            with run.nested("second try") as done:
                pass
            run._client.set_terminated = close
        runs = (run, failed, part, done)
        assert [client.get_run(one.run_id).info.status for one in runs] == [
            "FINISHED",
            "FINISHED",
            "FAILED",
            "FINISHED",
        ]

    def test_the_registry_of_a_run_waits_for_its_server(
        self, settings: TrackingSettings, monkeypatch: pytest.MonkeyPatch
    ):
        def away(_: TrackingSettings) -> None:
            raise ServiceError("does not answer")

        with tracked_run(settings, "run", tags={}) as run:
            monkeypatch.setattr("tasks.tracking.check_tracking", away)
            with pytest.raises(ServiceError, match=r"does not answer"), open_registry(settings):
                pass
            with run.registry() as client:  # it is the client that waits, or gives up
                assert client.search_registered_models() is not None


class TestLogging:
    def test_params_are_flat_cut_and_many(self, logged: Callable[..., Any]):
        found = logged(
            lambda run: run.log_params(
                {
                    "inner": {"rate": 0.5, "names": ("a", "b"), "deeper": {"none": None}, "empty": {}},
                    "long": "x" * 7000,
                    "where": {"source (v2) / é": "y", "..": "dots"},
                    "n" * 300: 1,
                    "many": {f"k{n}": n for n in range(250)},
                }
            )
        ).data.params
        assert found["inner.rate"] == "0.5"
        assert found["inner.names"] == "('a', 'b')"
        assert (found["inner.deeper.none"], found["inner.empty"]) == ("None", "{}")
        assert found["long"] == "x" * 6000
        assert found["where.source _v2_ _ é"] == "y"
        assert found["n" * 250] == "1"
        assert {found[f"many.k{n}"] for n in range(250)} == {str(n) for n in range(250)}

    def test_metrics_of_every_kind_of_number(self, logged: Callable[..., Any]):
        found = logged(
            lambda run: run.log_metrics(
                {
                    "a": 1.5,
                    "b": 2,
                    "c": np.float32(0.5),
                    "d": np.int64(3),
                    "none": None,
                    "flag": True,
                    "nan": float("nan"),
                }
            )
        ).data.metrics
        assert {name: found[name] for name in "abcd"} == {"a": 1.5, "b": 2.0, "c": 0.5, "d": 3.0}
        assert np.isnan(found["nan"])
        assert not {"none", "flag"} & set(found)

    def test_a_long_curve_keeps_its_steps(self, logged: Callable[..., Any], client: Any):
        rows = [{"step": n, "loss": 1 / (n + 1), "pairs per/step": 64, "note": "text"} for n in range(1200)]
        found = logged(lambda run: run.log_curve(rows))
        history = client.get_metric_history(found.info.run_id, "loss")
        assert sorted((point.step, point.value) for point in history) == [(row["step"], row["loss"]) for row in rows]
        assert found.data.metrics["pairs per_step"] == 64
        assert "note" not in found.data.metrics

    def test_nothing_to_log_is_no_error(self, logged: Callable[..., Any]):
        found = logged(lambda run: (run.log_metrics({}), run.log_params({}), run.log_curve([]), run.tag({})))
        assert found.info.status == "FINISHED"
        assert not found.data.metrics

    def test_digests_are_logged_as_datasets(self, logged: Callable[..., Any]):
        refs = {
            name: ArtifactRef(kind=name, digest=(letter * 64), uri=f"/store/{name}", rows=3, size=9)
            for name, letter in (("ratings", "a"), ("scores", "b"))
        }

        def log(run: TrackedRun) -> None:
            run.log_datasets(refs, "input")
            run.log_datasets({"calibrated": refs["scores"]}, "output")

        inputs = logged(log).inputs.dataset_inputs
        found = {
            entry.dataset.name: (entry.dataset.digest, entry.dataset.source, {tag.key: tag.value for tag in entry.tags})
            for entry in inputs
        }
        assert found["ratings"] == (
            "a" * 36, "/store/ratings", {"mlflow.data.context": "input", "charm.digest": "a" * 64},
        )  # fmt: skip
        assert found["calibrated"][2]["mlflow.data.context"] == "output"
        assert len(found) == 3

    @pytest.mark.parametrize(("message", "tries"), [("UNIQUE constraint failed: datasets.name", 3), ("no room", 1)])
    def test_datasets_that_another_run_logs_at_the_same_moment_are_logged_again(
        self, settings: TrackingSettings, message: str, tries: int
    ):
        from mlflow.exceptions import MlflowException

        asked = []

        def collide(*_: object, **__: object) -> None:
            asked.append(message)
            if len(asked) < 3:
                raise MlflowException(message)

        ref = ArtifactRef(kind="ratings", digest="a" * 64, uri="/store/ratings", size=1)
        with (
            contextlib.nullcontext() if tries == 3 else pytest.raises(ServiceError, match=message),
            tracked_run(settings, "run", tags={}) as run,
        ):
            run._client.log_inputs = collide
            run.log_datasets({"ratings": ref}, "input")
        assert len(asked) == tries

    def test_tables_and_texts_come_back(self, logged: Callable[..., Any], client: Any, tmp_path: Path):
        frame = pl.DataFrame({"policy_model": ["a", "b"], "overvaluation": [1.5, None]})

        def log(run: TrackedRun) -> None:
            run.log_table(frame, "models.json")
            run.log_text("<html>ü</html>", "report.html")

        found = logged(log)
        texts = {
            name: Path(client.download_artifacts(found.info.run_id, name, str(tmp_path))).read_text()
            for name in ("models.json", "report.html")
        }
        assert texts["report.html"] == "<html>ü</html>"
        assert json.loads(texts["models.json"]) == {
            "columns": ["policy_model", "overvaluation"],
            "data": [["a", 1.5], ["b", None]],
        }
        # by this MLflow's pages know that it is a table
        assert json.loads(found.data.tags["mlflow.loggedArtifacts"]) == [{"path": "models.json", "type": "table"}]

    def test_the_page_of_a_run(self, settings: TrackingSettings):
        with tracked_run(settings, "run", tags={}) as run:
            assert run.url == f"http://127.0.0.1:5000/#/experiments/{run.experiment_id}/runs/{run.run_id}"


class TestRegistry:
    def test_the_same_weights_are_registered_once(self, settings: TrackingSettings, client: Any, tmp_path: Path):
        (tmp_path / "config.json").write_text("{}")
        with tracked_run(settings, "run", tags={}) as run:
            source = run.log_folder(tmp_path, "models/calibrated")
            first = register_version(run, "charm-rm", source, {"digest": "a" * 64, "mad": "0.1"})
            again = register_version(run, "charm-rm", source, {"digest": "a" * 64})
            other = register_version(run, "charm-rm", source, {"digest": "b" * 64})
        assert (first, again, other) == ("1", "1", "2")
        version = client.get_model_version("charm-rm", "1")
        assert version.run_id == run.run_id
        assert version.tags == {"digest": "a" * 64, "mad": "0.1"}
        assert version.source.endswith("/models/calibrated")
        files = client.list_artifacts(run.run_id, "models/calibrated")
        assert [file.path for file in files] == ["models/calibrated/config.json"]

    def test_two_runs_that_register_the_same_at_once(self, settings: TrackingSettings, client: Any, tmp_path: Path):
        (tmp_path / "config.json").write_text("{}")
        with tracked_run(settings, "run", tags={}) as run:
            create = run._client.create_model_version

            def after_another(*args: Any, **options: Any) -> Any:
                create(*args, **options)  # between this run's look and its own
                return create(*args, **options)

            run._client.create_model_version = after_another
            version = register_version(run, "raced", run.log_folder(tmp_path, "model"), {"digest": "d" * 64})
        assert version == "1"
        assert [found.version for found in client.search_model_versions("name = 'raced'")] in (["1"], [1])

    def test_registered_weights_can_be_loaded_by_their_version(
        self, settings: TrackingSettings, client: Any, tmp_path: Path
    ):
        (tmp_path / "config.json").write_text('{"num_labels": 1}')
        with tracked_run(settings, "run", tags={}) as run:
            version = register_version(run, "other-rm", run.log_folder(tmp_path, "model"), {"digest": "c" * 64})
        location = client.get_model_version_download_uri("other-rm", version).removeprefix("file://")
        assert location.endswith("/model")


class TestServices:
    def test_a_server_that_does_not_answer(self):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))  # bound and not listening: nobody else can take the port
            settings = TrackingSettings(uri=f"http://127.0.0.1:{taken.getsockname()[1]}")
            with pytest.raises(ServiceError, match=rf"{settings.uri} does not answer.*CHARM_TRACKING_URI"):
                check_tracking(settings)
            with pytest.raises(ServiceError), tracked_run(settings, "run", tags={}):
                raise AssertionError("never gets here")

    @pytest.mark.parametrize("content", [None, b"this is not a database, whatever its name says" * 100])
    def test_a_database_that_cannot_be_used(self, tmp_path: Path, content: bytes | None):
        (tmp_path / "file").write_bytes(content or b"")
        path = tmp_path / "file" / "mlflow.db" if content is None else tmp_path / "file"
        with pytest.raises(ServiceError, match=r"MLflow database .*file.* cannot be written"):
            check_tracking(TrackingSettings(uri=f"sqlite:///{path}"))

    def test_a_store_that_refuses_the_experiment(self, settings: TrackingSettings):
        bad = settings.model_copy(update={"experiment": ""})
        with pytest.raises(ServiceError, match=r"cannot be used"), tracked_run(bad, "run", tags={}):
            raise AssertionError("never gets here")

    def test_a_deleted_experiment_is_not_written_to(self, settings: TrackingSettings, client: Any):
        client.delete_experiment(client.create_experiment("gone"))
        bad = settings.model_copy(update={"experiment": "gone"})
        with pytest.raises(ServiceError, match=r"'gone' was deleted; restore it"), tracked_run(bad, "run", tags={}):
            raise AssertionError("never gets here")

    def test_a_fresh_database_has_the_tables_that_mlflow_makes(self, tmp_path: Path):
        from mlflow import MlflowClient

        ours, theirs = tmp_path / "ours.db", tmp_path / "theirs.db"
        with tracked_run(TrackingSettings(uri=f"sqlite:///{ours}"), "run", tags={}):
            pass
        MlflowClient(tracking_uri=f"sqlite:///{theirs}")
        assert _tables(ours) == _tables(theirs)
        assert len(_tables(ours)) > 10

    def test_a_database_that_is_not_empty_is_left_as_it_is(self, tmp_path: Path):
        """Another MLflow may be making its tables at this moment."""
        path = tmp_path / "mlflow.db"
        with contextlib.closing(sqlite3.connect(path)) as database:
            database.execute("CREATE TABLE somebody (name TEXT)")
        with tracked_run(TrackingSettings(uri=f"sqlite:///{path}"), "run", tags={}):
            pass
        assert "somebody" in _tables(path)

    def test_two_processes_make_one_experiment_in_a_fresh_database(self, tmp_path: Path):
        settings = TrackingSettings(
            uri=f"sqlite:///{tmp_path / 'new' / 'mlflow.db'}", artifact_location=(tmp_path / "files").as_uri()
        )
        script = (
            "import sys\n"
            "from tasks.tracking import tracked_run\n"
            "from tasks.tracking_settings import TrackingSettings\n"
            "with tracked_run(TrackingSettings.model_validate_json(sys.argv[1]), 'run', tags={}) as run:\n"
            "    run.log_metrics({'a': 1.0})\n"
        )
        children = [
            subprocess.Popen(
                [sys.executable, "-c", script, settings.model_dump_json()],
                env=os.environ | {"PYTHONPATH": str(Path.cwd())},
                stderr=subprocess.PIPE,
                text=True,
            )
            for _ in range(2)
        ]
        errors = [child.communicate()[1] for child in children]
        assert [child.returncode for child in children] == [0, 0], errors
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=settings.uri)
        experiment = client.get_experiment_by_name("charm")
        runs = client.search_runs([experiment.experiment_id])
        assert [(run.info.status, run.data.metrics) for run in runs] == [("FINISHED", {"a": 1.0})] * 2


def _tables(path: Path) -> dict[str, dict[str, list[Any]]]:
    """Columns, foreign keys, indices and, of the schema's version, the content of every table."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        names = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        asked = ("table_info", "foreign_key_list", "index_list")
        tables: dict[str, dict[str, list[Any]]] = {
            # without their numbers, in which two databases that MLflow itself makes differ
            name: {what: sorted(str(row[1:]) for row in database.execute(f"PRAGMA {what}('{name}')")) for what in asked}
            for name in names
        }
        if "alembic_version" in tables:
            tables["alembic_version"]["rows"] = database.execute("SELECT * FROM alembic_version").fetchall()
    return tables
