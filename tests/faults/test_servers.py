"""The Prefect server or the MLflow server is killed: for a while, or until somebody starts it again."""

import pytest

from tasks.ledger import Ledger
from tests.faults.night import Night, Server
from tests.faults.test_killed import STAGES, assert_as_undisturbed, prepare

IMPATIENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "PREFECT_CLIENT_MAX_RETRIES": "1"}
"""Both clients try for half a minute (Prefect) and four minutes (MLflow) before they give up; here for a few seconds."""


def server(night: Night, name: str) -> Server:
    return night.prefect if name == "prefect" else night.mlflow


@pytest.mark.parametrize("stage", ["scoring", "training", "reporting", "registering"])
@pytest.mark.parametrize("name", ["prefect", "mlflow"])
def test_it_comes_back(night: Night, undisturbed: Ledger, name: str, stage: str):
    again = prepare(night, stage)
    job = night.start(STAGES[stage].point)
    job.halted()
    server(night, name).kill()
    job.go_on()
    server(night, name).start()
    assert job.wait() == 0, job.output()
    assert night.ran() == again
    assert_as_undisturbed(night, undisturbed)
    assert night.flow_run_states() == ["COMPLETED"]


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
