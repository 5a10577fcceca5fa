"""What changed between two snapshots of one board, and whether it matters for the chosen policy models.

The anchor of a board moves between dates, so ratings are compared after the common shift is taken out: the weighted median
of the changes of all models that both snapshots have, which a few models that really moved do not bend. What a reward model
is calibrated to are win probabilities, which no anchor touches; they decide whether to calibrate again.

Joint intervals treat the two snapshots as independent. They share most of their votes, so the intervals are too wide rather
than too narrow: what lies outside of them did move. Where the board gives no interval nothing can be called a movement, and
the one model to which a board is anchored cannot move by definition.
"""

from collections.abc import Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field
from scipy.special import ndtr, ndtri

from charm_core.elo import ELO_POINTS_PER_LOGIT, rating_standard_errors, win_probability
from charm_core.errors import RatingsError
from charm_core.records import Estimate, Record
from charm_core.resampling import holm_adjusted
from charm_core.tables import RATINGS, validate

FloatArray = NDArray[np.float64]

_ROUNDING_VARIANCE = 1.0 / 12.0
_NAMES_SHOWN = 5


class RecalibrationRule(Record):
    """When new ratings call for a new calibration."""

    significance: float = Field(
        0.05, gt=0.0, lt=0.5, description="Family-wise error rate (Holm) at which a win probability counts as moved."
    )
    smallest_change: float = Field(
        0.0,
        ge=0.0,
        lt=1.0,
        description="A win probability must have moved by more than this besides, for example 0.01.",
    )


class RatingChange(Record):
    """One model that both snapshots have."""

    policy_model: str
    before: float
    after: float
    change: Estimate = Field(description="Elo points after the anchor's shift was taken out; joint interval.")
    p_value_holm: float | None = Field(description="Of 'it did not move', corrected for all models; None: no interval.")
    beyond_interval: bool = Field(description="Whether its own joint interval leaves 0 out.")
    moved: bool = Field(description="Whether that also holds after the correction.")


class PairChange(Record):
    """Win probability of ``model_a`` over ``model_b`` in both snapshots."""

    model_a: str
    model_b: str
    before: float
    after: float
    change: Estimate = Field(description="After minus before, with the joint interval.")
    p_value_holm: float | None = Field(description="Of 'it did not move', corrected for all pairs; None: no interval.")
    moved: bool = Field(description="Whether it moved by the rule: beyond chance, and by enough.")


class BoardMovement(Record):
    """What is new on the board as a whole."""

    added: tuple[str, ...]
    dropped: tuple[str, ...]
    shift: float = Field(description="Common shift of the anchor, Elo points.")
    changes: tuple[RatingChange, ...] = Field(description="Largest first.")

    @property
    def moved(self) -> tuple[RatingChange, ...]:
        """Models that moved beyond chance."""
        return tuple(change for change in self.changes if change.moved)


class PairMovement(Record):
    """What it means for the chosen policy models."""

    pairs: tuple[PairChange, ...] = Field(description="Largest change first.")
    largest: float | None = Field(description="Largest |change| of a win probability.")
    mean: float | None = Field(description="Mean |change|.")
    mean_by_chance: float | None = Field(
        description="What the mean |change| would be if nothing had moved, by the intervals; None without intervals."
    )
    newly_rated: tuple[str, ...] = Field(description="Policy models that only the later snapshot has.")
    no_longer_rated: tuple[str, ...] = Field(description="Policy models that only the earlier snapshot has.")
    due: bool | None = Field(description="Whether to calibrate again; None where that cannot be judged.")
    why: str

    @property
    def moved(self) -> tuple[PairChange, ...]:
        """Pairs that moved by the rule."""
        return tuple(pair for pair in self.pairs if pair.moved)


def board_movement(before: pl.DataFrame, after: pl.DataFrame, *, significance: float = 0.05) -> BoardMovement:
    """Compare two snapshots of one board.

    Args:
        before: A RATINGS frame.
        after: A later RATINGS frame of the same board.
        significance: Error rate of the intervals, and of the flags after Holm's correction.

    Raises:
        RatingsError: The two have no model in common.
        TableError: Bad tables.
    """
    joined = _joined(validate(before, RATINGS), validate(after, RATINGS))
    if joined.is_empty():
        raise RatingsError("the two snapshots have no model in common; they are not of one board")
    raw = (joined.get_column("rating_after") - joined.get_column("rating")).to_numpy()
    joint = joined.get_column("joint_error").to_numpy()
    errors = np.where(joint > 0.0, joint, np.nan)  # the model that a board is anchored to has no interval of its own
    shift = weighted_median(raw, 1.0 / np.square(errors))
    changes = raw - shift
    p_values, adjusted = _p_values(changes, errors)
    half = _half_width(errors, significance)
    rows = [
        RatingChange(
            policy_model=row["policy_model"],
            before=row["rating"],
            after=row["rating_after"],
            change=_estimate(changes[index], half[index]),
            p_value_holm=_known(adjusted[index]),
            beyond_interval=bool(p_values[index] <= significance),
            moved=bool(adjusted[index] <= significance),
        )
        for index, row in enumerate(joined.iter_rows(named=True))
    ]
    names, later = set(before.get_column("policy_model")), set(after.get_column("policy_model"))
    return BoardMovement(
        added=tuple(sorted(later - names)),
        dropped=tuple(sorted(names - later)),
        shift=float(shift),
        changes=tuple(sorted(rows, key=lambda row: (-abs(row.change.value or 0.0), row.policy_model))),
    )


def pair_movement(before: pl.DataFrame, after: pl.DataFrame, rule: RecalibrationRule) -> PairMovement:
    """How much the win probabilities among policy models moved.

    Args:
        before: A RATINGS frame of the policy models, under their own names, as far as they were rated.
        after: The same, later.
        rule: When that calls for a new calibration.
    """
    joined = _joined(before, after)
    names = joined.get_column("policy_model").to_list()
    first, second = np.triu_indices(len(names), 1)
    old, new = (joined.get_column(column).to_numpy() for column in ("rating", "rating_after"))
    then, now = (win_probability(ratings[first], ratings[second]) for ratings in (old, new))
    errors = np.sqrt(
        _probability_variance(then, joined.get_column("error").to_numpy(), first, second)
        + _probability_variance(now, joined.get_column("error_after").to_numpy(), first, second)
    )
    changes = now - then
    _, adjusted = _p_values(changes, errors)
    half = _half_width(errors, rule.significance)
    moved = (adjusted <= rule.significance) & (np.abs(changes) > rule.smallest_change)
    pairs = tuple(
        PairChange(
            model_a=names[first[index]],
            model_b=names[second[index]],
            before=float(then[index]),
            after=float(now[index]),
            change=_estimate(changes[index], half[index]),
            p_value_holm=_known(adjusted[index]),
            moved=bool(moved[index]),
        )
        for index in np.lexsort((second, first, -np.abs(changes)))
    )
    newly = tuple(sorted(set(after.get_column("policy_model")) - set(names)))
    gone = tuple(sorted(set(before.get_column("policy_model")) - set(names)))
    due, why = _decision(pairs, newly, gone, rule)
    return PairMovement(
        pairs=pairs,
        largest=float(np.abs(changes).max()) if pairs else None,
        mean=float(np.abs(changes).mean()) if pairs else None,
        # the mean of |N(0, s)| is s √(2/π)
        mean_by_chance=_known(float(errors.mean()) * np.sqrt(2.0 / np.pi)) if pairs else None,
        newly_rated=newly,
        no_longer_rated=gone,
        due=due,
        why=why,
    )


def across_boards(movements: Sequence[tuple[str, PairMovement]]) -> tuple[bool | None, str]:
    """One decision from several boards: due if it is on any, open only if it can be judged on none.

    Args:
        movements: Name of the board and what moved on it; not empty.
    """
    verdicts: tuple[bool | None, ...] = (True, False, None)
    verdict = next(one for one in verdicts if any(pairs.due is one for _, pairs in movements))
    agreeing = [(board, pairs) for board, pairs in movements if pairs.due is verdict]
    if verdict is not False:
        return verdict, "; ".join(f"on {board}: {pairs.why}" for board, pairs in agreeing)
    board, most = max(agreeing, key=lambda item: item[1].largest or 0.0)
    top = most.pairs[0]
    return False, (
        f"on {len(agreeing)} of {len(movements)} boards (the others give no intervals) "
        if len(agreeing) < len(movements)
        else f"on all {len(agreeing)} boards "
    ) + (
        f"no win probability moved beyond its joint interval; the largest change is "
        f"{100 * abs(top.change.value or 0.0):.1f} percentage points ({top.model_a} over {top.model_b}, {board})"
    )


def weighted_median(values: FloatArray, weights: FloatArray) -> float:
    """Median of weighted values; of all values alike where no weight is known.

    Args:
        values: Shape ``(n,)``, not empty.
        weights: Shape ``(n,)``; a value whose weight is NaN does not count where others are known.
    """
    known = np.isfinite(weights)
    if not known.any():
        return float(np.median(values))
    order = np.argsort(values[known], kind="stable")
    ordered, summed = values[known][order], np.cumsum(weights[known][order])
    half = 0.5 * summed[-1]
    index = int(np.searchsorted(summed, half))
    if np.isclose(summed[index], half, rtol=1e-12) and index + 1 < ordered.size:
        return float(0.5 * (ordered[index] + ordered[index + 1]))
    return float(ordered[index])


def known_standard_errors(ratings: pl.DataFrame) -> FloatArray:
    """Standard errors of ratings in Elo points, NaN where the board gives no interval; rounding included.

    Args:
        ratings: A RATINGS frame.

    Returns:
        Shape ``(K,)`` in the frame's order.
    """
    errors = rating_standard_errors(ratings)
    unknown = ratings.select(pl.col("rating_low").is_null() | pl.col("rating_high").is_null()).to_series().to_numpy()
    values = ratings.get_column("rating").to_numpy()
    rounded = _ROUNDING_VARIANCE if np.array_equal(values, np.round(values)) else 0.0
    return np.asarray(np.where(unknown, np.nan, np.sqrt(np.square(errors) + rounded)))


def _joined(before: pl.DataFrame, after: pl.DataFrame) -> pl.DataFrame:
    old, new = (
        ratings.sort("policy_model").with_columns(error=pl.Series(known_standard_errors(ratings.sort("policy_model"))))
        for ratings in (before, after)
    )
    joined = old.join(new, on="policy_model", how="inner", suffix="_after", maintain_order="left")
    return joined.with_columns(joint_error=(pl.col("error") ** 2 + pl.col("error_after") ** 2).sqrt())


def _probability_variance(
    probability: FloatArray, errors: FloatArray, first: NDArray[np.intp], second: NDArray[np.intp]
) -> FloatArray:
    """Variance of win probabilities, to first order."""
    slope = probability * (1.0 - probability) / ELO_POINTS_PER_LOGIT
    return np.asarray(slope**2 * (errors[first] ** 2 + errors[second] ** 2))


def _p_values(changes: FloatArray, errors: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Two-sided p-values and Holm's adjustment over those that are known; NaN where no interval is."""
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.where(changes == 0.0, 0.0, np.abs(changes) / errors)
    p_values = np.where(np.isnan(errors), np.nan, 2.0 * ndtr(-z))
    adjusted = np.full_like(p_values, np.nan)
    known = ~np.isnan(p_values)
    adjusted[known] = holm_adjusted(p_values[known])
    return np.asarray(p_values), adjusted


def _half_width(errors: FloatArray, significance: float) -> FloatArray:
    return np.asarray(ndtri(1.0 - significance / 2.0) * errors)


def _estimate(value: float, half: float) -> Estimate:
    if np.isnan(half):
        return Estimate(value=float(value))
    return Estimate(value=float(value), low=float(value - half), high=float(value + half))


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _decision(
    pairs: Sequence[PairChange], newly: tuple[str, ...], gone: tuple[str, ...], rule: RecalibrationRule
) -> tuple[bool | None, str]:
    if newly or gone:
        changes = [f"{_names(newly)} now rated"] if newly else []
        changes += [f"{_names(gone)} no longer rated"] if gone else []
        return True, f"the set of rated policy models changed: {', '.join(changes)}"
    if not pairs:
        return (
            None,
            "fewer than two policy models are rated in both snapshots, so there is no win probability to compare",
        )
    moved = [pair for pair in pairs if pair.moved]
    enough = f" and by more than {rule.smallest_change:g}" if rule.smallest_change else ""
    if moved:
        top = moved[0]
        return True, (
            f"{len(moved)} of {len(pairs)} win probabilities moved beyond their joint interval after Holm's correction"
            f"{enough}, most of all {top.model_a} over {top.model_b}: {100 * top.before:.1f} % to {100 * top.after:.1f} %"
        )
    if all(pair.p_value_holm is None for pair in pairs):
        return (
            None,
            "the board gives no intervals, so movement cannot be told from chance; judge by the changes themselves",
        )
    return (
        False,
        f"none of {len(pairs)} win probabilities moved beyond its joint interval after Holm's correction{enough}",
    )


def _names(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more
