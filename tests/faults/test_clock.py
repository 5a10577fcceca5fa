"""The clock is set back: what was written lies in the future, and running processes seem to have started at other times."""

import os
import time

import psutil
import pytest

from charm_core.reward_model.worker import identify, is_alive
from tasks.ledger import Ledger
from tasks.process_identity import has_ended, process_identity
from tests.faults.night import Night
from tests.faults.test_killed import STAGES, assert_as_undisturbed, prepare

DAY = 86_400


def test_a_killed_run_goes_on_before_it_was_started(night: Night, undisturbed: Ledger):
    """The clock of the run alone is moved, at the interpreter's ``time.time``; the machine's is everybody's."""
    again = prepare(night, "training")
    job = night.start(STAGES["training"].point)
    job.halted()
    job.kill()
    assert job.no_process_is_left()
    for path in night.home.rglob("*"):
        os.utime(path, (time.time() + DAY, time.time() + DAY))
    night.finish(NIGHT_CLOCK=str(-DAY))
    assert night.ran() == again
    (log,) = (night.home / "work").glob("train-*/progress/training.log")
    assert log.read_text().count("step 1 of ") == 1
    assert_as_undisturbed(night, undisturbed)


def test_a_living_process_stays_known(monkeypatch: pytest.MonkeyPatch):
    """Linux moves the time at which it was booted along with the clock; that is where the clock comes in."""
    me, mine = identify(os.getpid()), process_identity()
    booted = psutil.boot_time()
    for module in (psutil, psutil._psplatform):
        monkeypatch.setattr(module, "boot_time", lambda: booted - DAY)
    assert psutil.Process().create_time() < time.time() - DAY / 2
    assert is_alive(me)
    assert not has_ended(mine)
    assert process_identity() == mine
