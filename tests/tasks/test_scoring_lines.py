"""What a scoring says in the log of its run."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect import flow

from charm_core.reward_model.jobs import ScoringSummary
from tasks.caching import use_store
from tasks.scoring import Scored, score_responses
from tasks.scoring_lines import pass_warnings_on, scoring_line, ties_line
from tasks.store import ArtifactStore
from tests.charm_core.reward_model import tiny
from tests.tasks.tiny_scoring import response_set, reward_model

SUMMARY = ScoringSummary(
    texts=1500,
    distinct_texts=1400,
    tokens=123_456,
    computed_tokens=150_000,
    padding_share=0.177,
    batching="padded",
    batch_drift=1.3e-7,
    max_length=64,
    longest_text=64,
    prompts_cut=0,
    responses_cut=0,
    empty_responses=0,
    tie_rate=0.0123,
    smallest_gap=0.00042,
)


def test_warnings_and_worse_are_passed_on_once_and_nothing_else(caplog: pytest.LogCaptureFixture):
    line = pass_warnings_on()
    with caplog.at_level(logging.DEBUG):
        for text in (
            "INFO charm_core.reward_model.scoring: scored 15 texts",
            "WARNING charm_core.reward_model.text_scoring: out of memory with 900 tokens at once; going on with 450",
            "WARNING charm_core.reward_model.text_scoring: out of memory with 900 tokens at once; going on with 450",
            "ERROR torch: 100% wrong",
            "Traceback (most recent call last):",
            "  WARNING indented",
            "WARNINGS are not a level",
            "",
        ):
            line(text)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "charm_core.reward_model.text_scoring: out of memory with 900 tokens at once; going on with 450"),
        ("ERROR", "torch: 100% wrong"),
    ]


def test_one_line_says_what_a_scoring_met():
    assert scoring_line(SUMMARY) == (
        "scored 1,500 texts, 1,400 of them different, of 123,456 tokens; 150,000 tokens computed, 17.7% padding; padded, "
        "in a batch a score moves by 1.3e-07; tie rate 1.23%, smallest gap 0.00042"
    )
    little = SUMMARY.model_copy(
        update={"computed_tokens": None, "batch_drift": None, "tie_rate": None, "smallest_gap": None}
    )
    assert scoring_line(little).endswith("moves by unknown; no prompt has two responses")
    assert "unknown tokens computed" in scoring_line(little)
    assert ties_line(1.0, None) == "tie rate 100.00%, smallest gap none"


class _Kept(logging.Handler):
    """What is logged in Prefect's task runs."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture
def of_task_runs() -> Iterator[list[logging.LogRecord]]:
    kept, logger = _Kept(), logging.getLogger("prefect.task_runs")
    logger.addHandler(kept)
    yield kept.records
    logger.removeHandler(kept)


@pytest.mark.usefixtures("prefect_session")
def test_a_warning_of_the_process_that_scores_is_in_the_log_of_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of_task_runs: list[logging.LogRecord]
):
    # a module that the process imports, changed from outside
    (tmp_path / "sitecustomize.py").write_text(
        "import charm_core.reward_model.scoring as s\n"
        "score = s.score_responses\n"
        "def warning(*given):\n"
        "    s.logger.warning('out of memory with %d tokens at once; going on with %d', 900, 450)\n"
        "    return score(*given)\n"
        "s.score_responses = warning\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    store = ArtifactStore(url=str(tmp_path / "store"), work_folder=str(tmp_path / "work"))
    model = reward_model(tiny.save_model(tmp_path / "rm"))

    @flow
    def scores() -> Any:
        return score_responses(model, response_set(store, 5))

    with use_store(store):
        scored: Scored = scores()
    said = [(record.levelname, record.getMessage(), record.task_run_name) for record in of_task_runs]  # type: ignore[attr-defined]
    warned = [one for one in said if "out of memory with 900 tokens at once; going on with 450" in one[1]]
    assert [(level, name.startswith("score_responses")) for level, _, name in warned] == [("WARNING", True)]
    told = [message for level, message, _ in said if level == "INFO"]
    assert scoring_line(scored.summary) in told
    assert not [message for message in told if message.startswith("charm_core.")]  # what the process says in passing
