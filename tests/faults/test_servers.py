"""The Prefect server or the MLflow server is killed: for a while, or until somebody starts it again."""

import pytest

from tasks.ledger import Ledger
from tests.faults.night import Night, Server, requested
from tests.faults.test_killed import STAGES, WAY, assert_as_undisturbed, assert_kept, prepare, steps_done

IMPATIENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "PREFECT_CLIENT_MAX_RETRIES": "1"}
"""Both clients try for half a minute (Prefect) and four minutes (MLflow) before they give up; here for a few seconds."""

CLOSING = requested(r"POST /api/2\.0/mlflow/runs/update ")
"""After the end of the flow's own work its MLflow run is closed."""


def server(night: Night, name: str) -> Server:
    return night.prefect if name == "prefect" else night.mlflow


@pytest.mark.parametrize("name", ["prefect", "mlflow"])
def test_it_is_killed_and_comes_back_at_every_stage(night: Night, undisturbed: Ledger, name: str):
    night.forget_all()
    # without MLflow a run does not begin, see below
    points = [point for stage, point in WAY.items() if (name, stage) != ("mlflow", "opening")] + [CLOSING]
    job = night.start(*points)
    finished: dict[str, tuple[int, int]] = {}
    for number in range(len(points)):
        job.halted(number)
        assert_kept(night, finished)
        finished = night.records()
        server(night, name).kill()
        job.go_on(number)
        server(night, name).start()
    assert job.wait() == 0, job.output()
    assert_kept(night, finished)
    assert all(not call.reused for call in night.ledger().calls)
    assert_as_undisturbed(night, undisturbed)
    assert {count for done in steps_done(night) for count in done} == {1}
    assert night.flow_run_states() == ["COMPLETED"]
    assert set(night.statuses().values()) == {"FINISHED"}


@pytest.mark.parametrize("name", ["prefect", "mlflow"])
def test_it_stays_away(night: Night, undisturbed: Ledger, name: str):
    again = prepare(night, "evaluating")
    job = night.start(STAGES["evaluating"].point, **IMPATIENT)
    job.halted()
    server(night, name).kill()
    job.go_on()
    assert job.wait() == 1, job.output()
    assert "finished steps are kept" in job.output()
    assert f"{night.api if name == 'prefect' else night.environment()['CHARM_TRACKING_URI']}" in job.output()
    assert job.no_process_is_left()
    refused = night.start()
    assert refused.wait() == 1
    assert "does not answer" in refused.output()
    server(night, name).start()
    night.finish()
    # Prefect is missed at the end only, MLflow where something is to be logged; what was finished then is not done again
    assert len(night.ran()) <= (0 if name == "prefect" else len(again) - 1)
    assert_as_undisturbed(night, undisturbed)
    assert "RUNNING" not in night.flow_run_states()
