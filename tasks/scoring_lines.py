"""What a scoring says in the log of its run: the warnings of its processes, and afterwards in one line what it met."""

import logging
import re

from charm_core.reward_model.jobs import ScoringSummary
from tasks.publishing import run_logger
from tasks.worker_processes import OnLine

_WARNING = re.compile(r"(WARNING|ERROR|CRITICAL) (.*)")
"""A line of a worker that somebody should see; see ``charm_core.reward_model.worker.main``."""


def pass_warnings_on() -> OnLine:
    """What to do with a line that a scoring process prints: warnings and worse go to the log of the current run, others nowhere.

    What several processes say alike is logged once.
    """
    logger, told = run_logger(), set[str]()

    def line(text: str) -> None:
        found = _WARNING.match(text)
        if found is not None and text not in told:
            told.add(text)
            logger.log(logging.getLevelNamesMapping()[found[1]], "%s", found[2])

    return line


def log_scoring(summary: ScoringSummary) -> None:
    """Say in the log of the current run what a scoring met."""
    run_logger().info("%s", scoring_line(summary))


def scoring_line(summary: ScoringSummary) -> str:
    """What a scoring met, in one line."""
    computed = summary.computed_tokens
    return "; ".join(
        (
            f"scored {summary.texts:,} texts, {summary.distinct_texts:,} of them different, of {summary.tokens:,} tokens",
            f"{'unknown' if computed is None else f'{computed:,}'} tokens computed, {summary.padding_share:.1%} padding",
            f"{summary.batching}, in a batch a score moves by {_number(summary.batch_drift)}",
            ties_line(summary.tie_rate, summary.smallest_gap),
        )
    )


def ties_line(tie_rate: float | None, smallest_gap: float | None) -> str:
    """How well scores tell responses to one prompt apart; see ``charm_core.reward_model.scoring_shares.ties``."""
    if tie_rate is None:
        return "no prompt has two responses"
    return f"tie rate {tie_rate:.2%}, smallest gap {'none' if smallest_gap is None else _number(smallest_gap)}"


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2g}"
