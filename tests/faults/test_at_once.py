"""Two runs at once: two of the same job, and two different ones on one device."""

import re

from charm_core.mismatch import MismatchConfig
from flows.runs import AuditRun
from tasks.ledger import Ledger
from tests.faults.conftest import JOB
from tests.faults.night import LIMIT, MODEL, Job, Night, eventually, write_settings
from tests.faults.test_killed import STAGES, assert_as_undisturbed, prepare


def counted(job: Job) -> tuple[int, int]:
    """Steps that a job took, and that it ran."""
    found = re.search(r"(\d+) steps reused, (\d+) ran", job.output())
    assert found, job.output()
    return int(found[1]), int(found[2])


def said(job: Job, text: str) -> bool:
    assert job.process.poll() is None, job.output()
    return text in job.output()


def test_two_identical_runs(night: Night, undisturbed: Ledger):
    again = prepare(night, "scoring")
    night.client().delete_registered_model(MODEL)
    first = night.start(STAGES["scoring"].point)
    first.halted()
    second = night.start()
    eventually(lambda: said(second, "another run is at the step score_responses"), LIMIT, "the second one waits")
    first.go_on()
    assert (first.wait(), second.wait()) == (0, 0), first.output() + second.output()
    # one of them did each step, and the other took what it made
    assert counted(first)[1] + counted(second)[1] == len(again)
    assert counted(first)[1] > 0
    assert_as_undisturbed(night, undisturbed)
    assert night.flow_run_states() == ["COMPLETED", "COMPLETED"]


def test_two_different_runs_on_one_slot(night: Night, undisturbed: Ledger):
    prepare(night, "scoring")
    audit = AuditRun(
        name=JOB.name, simulation=JOB.simulation, mismatch=MismatchConfig(bootstrap_replicates=100)
    )  # fmt: skip
    write_settings(night.folder / "audit.toml", audit)
    first = night.start(STAGES["scoring"].point, CHARM_CPU_JOBS="1")
    worker = first.halted()
    second = night.start(flow="audit", config="audit.toml", CHARM_CPU_JOBS="1")
    eventually(lambda: said(second, "CHARM_CPU_JOBS"), LIMIT, "the second one waits for its turn")
    workers = [process.pid for process in second.processes() if "charm-scoring" in " ".join(process.cmdline())]
    assert workers == [worker]  # the first one's; a second has not been started
    first.go_on()
    assert (first.wait(), second.wait()) == (0, 0), first.output() + second.output()
    assert_as_undisturbed(night, undisturbed)
