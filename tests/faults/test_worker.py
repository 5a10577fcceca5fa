"""The Prefect worker is killed, or the run that it has started."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import httpx
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.exceptions import ObjectAlreadyExists
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.workers.process import ProcessWorker

from tasks.ledger import Ledger
from tests.faults.conftest import JOB
from tests.faults.night import LIMIT, Job, Night, eventually, kill_tree
from tests.faults.test_killed import STAGES, assert_as_undisturbed, prepare

POOL = "night"


@dataclass
class Worker:
    """A process worker with the deployment of the job."""

    night: Night
    job: Job

    @property
    def pid(self) -> int:
        return self.job.process.pid

    def run(self, *, stopped: bool) -> UUID:
        """Have it run the job once, to be stopped where the stage ``evaluating`` is or not."""
        point = STAGES["evaluating"].point
        ambush = {"event": point.event, "pattern": point.pattern, "flag": str(self.job.flag)}
        environment = self.night.environment(**({"NIGHT_AMBUSH": json.dumps(ambush)} if stopped else {}))
        own = {name: value for name, value in environment.items() if os.environ.get(name) != value}
        with temporary_settings({PREFECT_API_URL: self.night.api}), get_client(sync_client=True) as client:
            deployment = client.create_deployment(
                client.create_flow_from_name("calibrate"),
                name=POOL,
                work_pool_name=POOL,
                entrypoint="flows.calibrate.calibrate",
                pull_steps=[{"prefect.deployments.steps.set_working_directory": {"directory": str(self.night.code)}}],
                parameters={"run": JOB.model_dump(mode="json")},
                job_variables={"env": own},
            )
            return UUID(str(client.create_flow_run_from_deployment(deployment).id))

    def state(self, run: UUID) -> str:
        return str(httpx.get(f"{self.night.api}/flow_runs/{run}", timeout=30).json()["state"]["type"])


@pytest.fixture
def worker(night: Night) -> Iterator[Worker]:
    with temporary_settings({PREFECT_API_URL: night.api}), get_client(sync_client=True) as client:
        template = ProcessWorker.get_default_base_job_template()
        with contextlib.suppress(ObjectAlreadyExists):
            client.create_work_pool(WorkPoolCreate(name=POOL, type="process", base_job_template=template))
    environment = night.environment()
    own = {name: value for name, value in environment.items() if not name.startswith(("CHARM_", "PYTHONPATH"))}
    log = night.folder / f"{night.experiment}-worker.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(Path(sys.executable).parent / "prefect"), "worker", "start", "--pool", POOL],
            env=own, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    (night.folder / "flags").mkdir(exist_ok=True)
    job = Job(process, log, night.home, night.folder / "flags" / night.experiment)
    night.jobs.append(job)
    try:
        yield Worker(night, job)
    finally:
        kill_tree(process.pid)
        process.wait()


def test_the_run_is_killed_and_its_worker_says_so(night: Night, worker: Worker, undisturbed: Ledger):
    again = prepare(night, "evaluating")
    first = worker.run(stopped=True)
    os.kill(worker.job.halted(), signal.SIGKILL)
    eventually(lambda: worker.state(first) == "CRASHED", 120, "the worker tells the server")
    assert worker.job.no_process_is_left()
    second = worker.run(stopped=False)
    eventually(lambda: worker.state(second) == "COMPLETED", LIMIT, "the second run is done")
    assert set(night.ran()) <= set(again)
    assert_as_undisturbed(night, undisturbed)


def test_the_worker_is_killed_and_its_run_ends_with_it(night: Night, worker: Worker, undisturbed: Ledger):
    again = prepare(night, "evaluating")
    run = worker.run(stopped=True)
    worker.job.halted()
    os.kill(worker.pid, signal.SIGKILL)
    worker.job.process.wait()
    worker.job.go_on()
    # Prefect ends a run whose worker has gone, which has the time to say so
    eventually(lambda: worker.state(run) == "CRASHED", LIMIT, "the run ends without its worker")
    assert worker.job.no_process_is_left()
    assert "RUNNING" not in night.statuses().values()
    night.finish()
    assert set(night.ran()) <= set(again)
    assert_as_undisturbed(night, undisturbed)
