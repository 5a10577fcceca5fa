"""What the promotion gate looks at: numbers before and after a calibration, and two scorings of the same texts."""

import numpy as np
import polars as pl
from pydantic import Field

from charm_core.errors import TableError
from charm_core.records import Estimate, Record
from charm_core.tables import SCORES, validate


class MeasuredChange(Record):
    """One number before and after."""

    what: str = Field(description="Within a sentence: 'held-out prompts'.")
    before: Estimate
    after: Estimate
    difference: Estimate | None = Field(default=None, description="After minus before, paired, where that is known.")


class BiasChange(Record):
    """A correlation of the score with what should not decide it."""

    what: str
    before: float | None
    after: float | None
    difference: Estimate | None = Field(default=None, description="After minus before, paired; shown, not judged.")


class SpreadChange(Record):
    """How scores are spread on one domain."""

    what: str
    tie_rate_before: float
    tie_rate_after: float
    spread_before: float | None = Field(description="Typical 5 to 95 % range within a policy model; None if not kept.")
    spread_after: float | None


class RepeatedScores(Record):
    """The same texts scored twice with the same weights, in other batches and by another process."""

    texts: int
    largest_difference: float
    standard_deviation: float = Field(description="Of the first scores.")
    reordered: float = Field(description="Share of response pairs of one prompt that changed their order or a tie.")


class PromotionEvidence(Record):
    """All that the gate looks at; what is None or empty was not measured."""

    mismatch_untouched: MeasuredChange | None = None
    mismatch_control: MeasuredChange | None = None
    mismatch_elsewhere: tuple[MeasuredChange, ...] = ()
    benchmarks: tuple[MeasuredChange, ...] = ()
    length_bias: tuple[BiasChange, ...] = ()
    markdown_bias: tuple[BiasChange, ...] = ()
    spread: tuple[SpreadChange, ...] = ()
    repeated: RepeatedScores | None = None


def repeated_scores(first: pl.DataFrame, again: pl.DataFrame) -> RepeatedScores:
    """Compare two scorings of the same texts.

    Args:
        first: A SCORES frame; it may hold more texts.
        again: A SCORES frame of some of the same texts.

    Raises:
        TableError: A bad table, no rows, or a text that was not scored the first time.
    """
    one, other = validate(first, SCORES), validate(again, SCORES)
    both = other.join(one, on=["prompt_id", "policy_model"], suffix="_first").sort("prompt_id", "policy_model")
    if both.is_empty() or both.height < other.height:
        raise TableError(
            f"{other.height - both.height} of {other.height} texts that were scored again have no first score; "
            f"score a part of the same responses again"
        )
    scores, repeated = both.get_column("score_first").to_numpy(), both.get_column("score").to_numpy()
    return RepeatedScores(
        texts=both.height,
        largest_difference=float(np.abs(repeated - scores).max()),
        standard_deviation=float(scores.std()),
        reordered=_reordered(both),
    )


def _reordered(both: pl.DataFrame) -> float:
    changed = pairs = 0
    for part in both.partition_by("prompt_id"):
        scores, repeated = part.get_column("score_first").to_numpy(), part.get_column("score").to_numpy()
        upper = np.triu_indices(part.height, 1)
        orders = [np.sign(side[:, None] - side[None, :])[upper] for side in (scores, repeated)]
        changed += int((orders[0] != orders[1]).sum())
        pairs += upper[0].size
    return changed / pairs if pairs else 0.0
