"""How far a run is, on a terminal and where nobody looks."""

import io
import logging
import re
import time
from types import SimpleNamespace

import pytest

from tasks.progress import TerminalHandler, stage_line, step_line, tell
from tasks.publishing import report_progress


class Terminal(io.StringIO):
    """Keeps what is written, and says that somebody looks."""

    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        """What is left to see of each line."""
        lines = self.getvalue().split("\n")
        shown = [re.split(r"\r|\x1b\[A", line)[-1] or line.rstrip("\r").split("\r")[-1] for line in lines]
        return [re.sub(r"\x1b\[\w", "", line).strip() for line in shown]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    found = Terminal()
    monkeypatch.setattr("tasks.progress.sys", SimpleNamespace(stderr=found))
    monkeypatch.setenv("COLUMNS", "120")
    return found


def test_a_stage_has_a_rate_the_time_that_is_left_and_its_note(terminal: Terminal):
    with stage_line("scoring", "texts") as progress:
        time.sleep(0.3)  # it is drawn so often at most
        progress(10, 40, "loss 0.4")
    drawn = r"scoring: +25%.* 10/40 \[\d\d:\d\d<\d\d:\d\d, +[\d.]+ texts/s, loss 0\.4\]"
    assert re.search(drawn, terminal.getvalue())
    # what is left says that it is done, also if the last report came before the end
    assert re.search(r"scoring: 100%\|.*40/40", terminal.screen()[0])


def test_a_stage_that_fails_does_not_say_that_it_is_done(terminal: Terminal):
    def fails() -> None:
        with stage_line("scoring", "texts") as progress:
            progress(10, 40)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert "100%" not in terminal.getvalue()
    assert "10/40" in terminal.getvalue()


def test_several_stages_at_once_leave_a_line_each(terminal: Terminal):
    with stage_line("sampling sea", "answers") as sea, stage_line("sampling sky", "answers") as sky:
        sea(1, 2)
        sky(1, 4)
    shown = "\n".join(terminal.screen())
    assert "sampling sea: 100%" in shown
    assert "sampling sky: 100%" in shown


def test_a_step_is_named_while_it_is_done(terminal: Terminal):
    with step_line("fit_model_offsets"):
        assert "fit model offsets …" in terminal.getvalue()
    assert terminal.screen()[-1] == ""


def test_a_stage_takes_the_place_of_its_step(terminal: Terminal):
    with step_line("score_responses"), stage_line("scoring", "texts") as progress:
        progress(1, 1)
    assert terminal.getvalue().count("\n") == 1  # no line below that would have to be cleared
    assert terminal.screen()[0].startswith("scoring: 100%")


def test_nothing_is_written_where_nobody_looks(capfd: pytest.CaptureFixture[str]):
    with step_line("fit_model_offsets"), stage_line("scoring", "texts") as progress:
        progress(1, 2)
        tell("starting")
    assert capfd.readouterr() == ("", "")


def test_what_is_said_stands_above_the_lines_that_move(terminal: Terminal):
    logger = logging.Logger("test")  # one that no other test has
    logger.addHandler(TerminalHandler())
    with stage_line("scoring", "texts") as progress:
        progress(1, 2)
        logger.warning("mind the gap")
        tell("a word")
    shown = terminal.screen()
    assert "mind the gap" in shown
    assert "a word" in shown
    assert any(line.startswith("scoring: 100%") for line in shown)


def test_outside_of_a_prefect_run_there_is_the_line_alone(terminal: Terminal):
    with report_progress("scoring", "texts") as progress:
        progress(3, 3)
    assert "scoring: 100%" in terminal.getvalue()
