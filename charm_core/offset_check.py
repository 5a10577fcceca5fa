"""What offsets alone would do: fitted on half of the prompts and judged on the other half, many times."""

import numpy as np
import polars as pl
from pydantic import Field

from charm_core.elo import select_ratings
from charm_core.mismatch_values import mismatch_values
from charm_core.offsets import OffsetConfig, apply_offsets, fit_offsets
from charm_core.records import Record
from charm_core.scores import score_matrix, score_outcomes


class OffsetCheck(Record):
    """Mean |mismatch degree| on the halves that were not fitted, mean and standard deviation over the splits."""

    splits: int
    before: float = Field(description="Without offsets.")
    before_deviation: float
    after: float = Field(description="With the offsets that were fitted on the other half.")
    after_deviation: float

    def sentence(self) -> str:
        """The check in words."""
        return (
            f"Offsets alone, fitted on half of the prompts and judged on the other half ({self.splits} seeded splits), take mean |MD| "
            f"from {self.before:.3f} ± {self.before_deviation:.3f} to {self.after:.3f} ± {self.after_deviation:.3f}."
        )


def split_half_check(
    scores: pl.DataFrame, ratings: pl.DataFrame, config: OffsetConfig, splits: int, *, seed: int = 0
) -> OffsetCheck:
    """Fit offsets on a random half of the prompts and judge them on the other half.

    Args:
        scores: SCORES. Missing cells are allowed, as in ``fit_offsets``.
        ratings: RATINGS of one board; it may hold more models.
        config: How offsets are fitted; intervals are not needed here and not computed.
        splits: How many splits; deviations are standard deviations over them.
        seed: Of the splits.

    Raises:
        TableError, GraphError, RatingsError: See ``fit_offsets``.
    """
    matrix = score_matrix(scores)
    reference = config.reference_model or matrix.policy_models[0]
    plain = config.model_copy(update={"bootstrap_replicates": 0})
    rng = np.random.default_rng(seed)
    before, after = [], []
    for _ in range(splits):
        fitted_on = set(rng.permutation(matrix.prompt_ids)[: len(matrix.prompt_ids) // 2].tolist())
        chosen = pl.col("prompt_id").is_in(fitted_on)
        held_out = scores.filter(~chosen)
        fit = fit_offsets(scores.filter(chosen), ratings, plain, [reference])
        before.append(_mean_absolute_mismatch(held_out, ratings))
        after.append(_mean_absolute_mismatch(apply_offsets(held_out, fit), ratings))
    return OffsetCheck(
        splits=splits,
        before=float(np.mean(before)),
        before_deviation=float(np.std(before)),
        after=float(np.mean(after)),
        after_deviation=float(np.std(after)),
    )


def _mean_absolute_mismatch(scores: pl.DataFrame, ratings: pl.DataFrame) -> float:
    outcomes = score_outcomes(score_matrix(scores))
    board = select_ratings(ratings, outcomes.policy_models)
    return float(mismatch_values(outcomes, board.get_column("rating").to_numpy()).mean_absolute_degree)
