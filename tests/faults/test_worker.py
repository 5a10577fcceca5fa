"""The Prefect worker is killed, or the run that it has started."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
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
from tests.faults.night import LIMIT, Job, Night, Point, eventually, kill_tree
from tests.faults.test_killed import STAGES, WAY, assert_as_undisturbed, assert_kept, prepare, steps_done

POOL = "night"


@dataclass
class Worker:
    """A process worker with the deployment of the job."""

    night: Night
    job: Job

    def run(self, *at: Point) -> UUID:
        """Have it run the job once, to be stopped at points or not."""
        self.job.flags, ambush = self.night.ambush(at)
        environment = self.night.environment(**ambush)
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

    def kill(self) -> None:
        """``kill -9`` of the worker's own process only."""
        self.job.kill()

    def state(self, run: UUID) -> str:
        return str(httpx.get(f"{self.night.api}/flow_runs/{run}", timeout=30).json()["state"]["type"])


Start = Callable[[], Worker]


@pytest.fixture
def start(night: Night) -> Iterator[Start]:
    """Starts a worker of a pool of its own, another one each time."""
    with temporary_settings({PREFECT_API_URL: night.api}), get_client(sync_client=True) as client:
        template = ProcessWorker.get_default_base_job_template()
        with contextlib.suppress(ObjectAlreadyExists):
            client.create_work_pool(WorkPoolCreate(name=POOL, type="process", base_job_template=template))
    environment = night.environment(PREFECT_WORKER_QUERY_SECONDS="1")
    own = {name: value for name, value in environment.items() if not name.startswith(("CHARM_", "PYTHONPATH"))}
    processes: list[subprocess.Popen[bytes]] = []

    def start() -> Worker:
        log = night.folder / f"{night.experiment}-worker-{len(processes)}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [str(Path(sys.executable).parent / "prefect"), "worker", "start", "--pool", POOL],
                env=own, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        processes.append(process)
        night.jobs.append(Job(process, log, night.home, []))
        return Worker(night, night.jobs[-1])

    try:
        yield start
    finally:
        for process in processes:
            kill_tree(process.pid)
            process.wait()


def test_the_run_is_killed_and_its_worker_says_so(night: Night, start: Start, undisturbed: Ledger):
    again = prepare(night, "evaluating")
    worker = start()
    first = worker.run(STAGES["evaluating"].point)
    os.kill(worker.job.halted(), signal.SIGKILL)
    eventually(lambda: worker.state(first) == "CRASHED", 120, "the worker tells the server")
    assert worker.job.no_process_is_left()
    second = worker.run()
    eventually(lambda: worker.state(second) == "COMPLETED", LIMIT, "the second run is done")
    assert set(night.ran()) <= set(again)
    assert_as_undisturbed(night, undisturbed)


def test_the_worker_is_killed_at_every_stage(night: Night, start: Start, undisturbed: Ledger):
    night.forget_all()
    finished: dict[str, tuple[int, int]] = {}
    # a run whose worker has gone ends at the next line of its log: one that has saved its model has also stored it by then
    for stage, point in [(stage, point) for stage, point in WAY.items() if stage != "storing the model"]:
        worker = start()
        run = worker.run(point)
        worker.job.halted()
        worker.kill()
        worker.job.go_on()
        # at the end there may be no further line
        ends = {"CRASHED", "COMPLETED"} if stage == "ending" else {"CRASHED"}
        eventually(lambda: worker.state(run) in ends, LIMIT, f"the run ends without its worker: {stage}")  # noqa: B023
        assert worker.job.no_process_is_left(), stage
        assert "RUNNING" not in night.statuses().values(), stage
        assert_kept(night, finished)
        finished = night.records()
    worker = start()
    run = worker.run()
    eventually(lambda: worker.state(run) == "COMPLETED", LIMIT, "the last run is done")
    assert_kept(night, finished)
    assert_as_undisturbed(night, undisturbed)
    assert [done[0] for done in steps_done(night)] == [1, 1, 1]
