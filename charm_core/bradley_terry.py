"""Bradley-Terry ratings from votes: counts, Newton, sandwich and bootstrap intervals.

Votes are aggregated to counts first, so that the fit costs the same for a thousand battles and for a billion. Ties
count as half a win for each side. Source: METHOD.md section 6; the sandwich is Huber's, over battles.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field
from scipy.special import log_expit

from charm_core.comparison_graph import mutually_beaten_groups, name_models, require_connected
from charm_core.elo import ELO_POINTS_PER_LOGIT
from charm_core.errors import ConfigError, GraphError, TableError
from charm_core.records import Record
from charm_core.tables import BATTLES, RATINGS, validate

FloatArray = NDArray[np.float64]

_logger = logging.getLogger(__name__)
_INTERVAL_Z = 1.959963984540054
_TIES = ("tie", "tie (bothbad)")
_WINNERS = ("model_a", "model_b", *_TIES)
_BLOCK_CELLS = 2_000_000


@dataclass(frozen=True, kw_only=True, eq=False)
class BattleCounts:
    """Votes of K models, aggregated."""

    policy_models: tuple[str, ...]
    wins: FloatArray
    """Shape ``(K, K)``: entry ``[j, k]`` is how often j beat k outright."""
    ties: FloatArray
    """Shape ``(K, K)``, symmetric: how often j and k tied."""

    def __post_init__(self) -> None:
        """Check shapes and values."""
        models = len(self.policy_models)
        for name, counts in (("wins", self.wins), ("ties", self.ties)):
            if counts.shape != (models, models):
                raise TableError(f"{name} must be a {models}×{models} matrix for {models} models, not {counts.shape}")
            if not np.isfinite(counts).all() or (counts < 0).any() or np.diagonal(counts).any():
                raise TableError(f"{name} must be finite and not negative, with zeros on the diagonal; got {counts}")
        if not np.array_equal(self.ties, self.ties.T):
            raise TableError("ties must be symmetric: j tied with k as often as k with j")
        if models < 2:
            raise TableError(f"a Bradley-Terry fit needs at least two models, not {list(self.policy_models)}")

    @property
    def points(self) -> FloatArray:
        """Wins plus half the ties, shape ``(K, K)``."""
        return self.wins + 0.5 * self.ties


class BradleyTerryFit(Record):
    """Ratings in Elo points, in the order of ``policy_models``."""

    policy_models: tuple[str, ...]
    ratings: tuple[float, ...]
    standard_errors: tuple[float, ...] = Field(description="Sandwich standard errors, relative to the anchor.")
    votes: tuple[int, ...] = Field(description="Battles in which each model took part.")
    battles: int
    anchor: float
    anchor_model: str | None
    log_likelihood: float


def counts_from_battles(battles: pl.DataFrame) -> BattleCounts:
    """Aggregate votes to counts.

    Args:
        battles: A BATTLES frame. ``tie`` and ``tie (bothbad)`` both count as a tie.

    Returns:
        Counts with the models in sorted order.

    Raises:
        TableError: A bad table, an unknown winner, or a model that fights itself.
    """
    table = validate(battles, BATTLES)
    cells = table.group_by("model_a", "model_b", "winner").len(name="battles")
    _check_cells(cells)
    models = pl.concat([cells.get_column("model_a"), cells.get_column("model_b")]).unique().sort()
    first, second = (
        cells.get_column(side).cast(pl.Enum(models)).to_physical().to_numpy() for side in ("model_a", "model_b")
    )
    winner = cells.get_column("winner").to_numpy()
    number = cells.get_column("battles").to_numpy().astype(np.float64)
    wins, ties = np.zeros((2, models.len(), models.len()))
    tied, won, lost = np.isin(winner, _TIES), winner == "model_a", winner == "model_b"
    np.add.at(wins, (first[won], second[won]), number[won])
    np.add.at(wins, (second[lost], first[lost]), number[lost])
    np.add.at(ties, (first[tied], second[tied]), number[tied])
    return BattleCounts(policy_models=tuple(models), wins=wins, ties=ties + ties.T)


def fit_bradley_terry(
    counts: BattleCounts, *, anchor: float = 1000.0, anchor_model: str | None = None
) -> BradleyTerryFit:
    """Maximum-likelihood ratings.

    Args:
        counts: Aggregated votes.
        anchor: Elo points of the mean rating, or of ``anchor_model`` if one is named.
        anchor_model: The model whose rating is fixed, with a standard error of 0.

    Raises:
        GraphError: Some ratings would be arbitrary (disconnected) or infinite (a model, or a group of models, that
            never lost or never won against the others); the models are named.
        ConfigError: ``anchor_model`` took no part.
    """
    fixed = _anchor_index(counts, anchor_model)
    _require_finite_optimum(counts)
    strengths = solve_strengths(counts.points[None])[0]
    covariance = _sandwich(counts, strengths)
    if fixed is not None:
        relative = np.eye(strengths.size)
        relative[:, fixed] -= 1.0
        covariance = relative @ covariance @ relative.T
    errors = ELO_POINTS_PER_LOGIT * np.sqrt(np.maximum(np.diagonal(covariance), 0.0))
    taken_part = (counts.wins + counts.wins.T + counts.ties).sum(axis=1)
    differences = strengths[:, None] - strengths[None, :]
    return BradleyTerryFit(
        policy_models=counts.policy_models,
        ratings=tuple(_anchored(strengths, anchor, fixed).tolist()),
        standard_errors=tuple(errors.tolist()),
        votes=tuple(round(float(votes)) for votes in taken_part),
        battles=round(float(taken_part.sum()) / 2),
        anchor=anchor,
        anchor_model=anchor_model,
        log_likelihood=float((counts.points * log_expit(differences)).sum()),
    )


def bootstrap_ratings(
    counts: BattleCounts,
    *,
    replicates: int = 100,
    seed: int = 0,
    anchor: float = 1000.0,
    anchor_model: str | None = None,
) -> FloatArray:
    """Ratings of bootstrap resamples of the battles: a multinomial over the cells, each fit started at the optimum.

    A resample in which some model never wins or never loses has no finite optimum; it gets half a win for either side
    of every pair that was ever compared.

    Returns:
        Shape ``(replicates, K)`` in Elo points.

    Raises:
        GraphError: As for ``fit_bradley_terry``.
    """
    fixed = _anchor_index(counts, anchor_model)
    _require_finite_optimum(counts)
    start = solve_strengths(counts.points[None])[0]
    models = start.size
    upper = np.triu_indices(models, 1)
    cells = np.concatenate([counts.wins[upper], counts.wins.T[upper], counts.ties[upper]])
    total = round(float(cells.sum()))
    rng = np.random.default_rng(seed)
    ratings = np.empty((replicates, models))
    block = max(1, _BLOCK_CELLS // models**2)
    for begin in range(0, replicates, block):
        size = min(block, replicates - begin)
        won, lost, tied = np.split(rng.multinomial(total, cells / cells.sum(), size=size), 3, axis=1)
        points = np.zeros((size, models, models))
        points[:, upper[0], upper[1]] = won + 0.5 * tied
        points[:, upper[1], upper[0]] = lost + 0.5 * tied
        strengths = solve_strengths(_continuity_corrected(points, counts.points), start=start)
        ratings[begin : begin + size] = _anchored(strengths, anchor, fixed)
    return ratings


def ratings_from_battles(
    battles: pl.DataFrame, *, anchor: float = 1000.0, anchor_model: str | None = None
) -> pl.DataFrame:
    """A RATINGS frame, with 95 % sandwich intervals and votes, from a BATTLES frame.

    Raises:
        TableError: A bad table.
        GraphError: As for ``fit_bradley_terry``.
    """
    fit = fit_bradley_terry(counts_from_battles(battles), anchor=anchor, anchor_model=anchor_model)
    ratings, errors = np.asarray(fit.ratings), np.asarray(fit.standard_errors)
    frame = pl.DataFrame(
        {
            "policy_model": list(fit.policy_models),
            "rating": ratings,
            "rating_low": ratings - _INTERVAL_Z * errors,
            "rating_high": ratings + _INTERVAL_Z * errors,
            "votes": list(fit.votes),
        }
    )
    return validate(frame, RATINGS)


def solve_strengths(
    points: FloatArray, *, start: FloatArray | None = None, tolerance: float = 1e-8, max_iterations: int = 60
) -> FloatArray:
    """Damped Newton for many Bradley-Terry problems at once.

    Args:
        points: Shape ``(B, K, K)``: entry ``[b, j, k]`` is wins of j over k with ties as half.
        start: First guess in logits, shape ``(K,)`` or ``(B, K)``; zeros if None.
        tolerance: A problem is solved after a step that moves no strength by more than this, in logits. Convergence is
            quadratic, so what is left then is rounding error.
        max_iterations: Newton steps at most.

    Returns:
        Shape ``(B, K)`` in logits, each row with mean 0. What the points leave open (a model without comparisons)
        stays where it started; what they send to infinity stops after ``max_iterations``.
    """
    problems, models = points.shape[:2]
    strengths = np.zeros((problems, models)) if start is None else np.broadcast_to(start, (problems, models)).copy()
    played = points + points.swapaxes(1, 2)
    active = np.arange(problems)
    for _ in range(max_iterations):
        step = _damped(_newton_step(points[active], played[active], strengths[active]))
        strengths[active] += step
        active = active[np.abs(step).max(axis=1) > tolerance]
        if active.size == 0:
            break
    else:
        _logger.debug("%d of %d Bradley-Terry problems stopped after %d steps", active.size, problems, max_iterations)
    return np.asarray(strengths - strengths.mean(axis=1, keepdims=True))


def _newton_step(points: FloatArray, played: FloatArray, strengths: FloatArray) -> FloatArray:
    expected = 0.5 + 0.5 * np.tanh(0.5 * (strengths[:, :, None] - strengths[:, None, :]))
    gradient = (points - played * expected).sum(axis=2)
    weights = played * expected * expected.swapaxes(1, 2)
    diagonal = weights.sum(axis=2)
    # the floor keeps the scale off 0 where all sigmoids saturate
    floor = 1e-12 * played.max(axis=(1, 2)) + np.finfo(np.float64).tiny
    scale = np.maximum(diagonal.max(axis=1), floor)[:, None, None]
    models = strengths.shape[1]
    # the constant fixes the gauge; the whisper of a ridge keeps a model without comparisons where it is
    hessian = scale * (1.0 / models + 1e-13 * np.eye(models)) - weights
    index = np.arange(models)
    hessian[:, index, index] += diagonal
    return np.asarray(np.linalg.solve(hessian, gradient[:, :, None])[:, :, 0])


def _damped(step: FloatArray) -> FloatArray:
    # the third derivative of a logistic loss is bounded by its second, so that a Newton step which changes no
    # difference by more than one logit cannot overshoot: no line search is needed
    span = np.ptp(step, axis=1, keepdims=True)
    return np.asarray(step / np.maximum(span, 1.0))


def _sandwich(counts: BattleCounts, strengths: FloatArray) -> FloatArray:
    """Covariance of the mean-zero strengths: H⁺ G H⁺ with one score vector per battle."""
    expected = 0.5 + 0.5 * np.tanh(0.5 * (strengths[:, None] - strengths[None, :]))
    played = counts.wins + counts.wins.T + counts.ties
    squares = counts.wins * expected.T**2 + (counts.wins * expected.T**2).T + counts.ties * (0.5 - expected) ** 2
    gauge = np.full_like(expected, 1.0 / strengths.size)
    hessian = _laplacian(played * expected * expected.T)
    scale = float(np.trace(hessian)) / strengths.size
    inverse = np.linalg.inv(hessian + scale * gauge) - gauge / scale
    return np.asarray(inverse @ _laplacian(squares) @ inverse)


def _laplacian(weights: FloatArray) -> FloatArray:
    return np.asarray(np.diag(weights.sum(axis=1)) - weights)


def _anchored(strengths: FloatArray, anchor: float, fixed: int | None) -> FloatArray:
    origin = strengths.mean(axis=-1) if fixed is None else strengths[..., fixed]
    return np.asarray(anchor + ELO_POINTS_PER_LOGIT * (strengths - origin[..., None]))


def _continuity_corrected(points: FloatArray, observed: FloatArray) -> FloatArray:
    compared = (observed + observed.T > 0).astype(np.float64)
    unsolvable = [len(mutually_beaten_groups(replicate > 0)) > 1 for replicate in points]
    points[np.asarray(unsolvable)] += 0.5 * compared
    return points


def _anchor_index(counts: BattleCounts, anchor_model: str | None) -> int | None:
    if anchor_model is None:
        return None
    if anchor_model not in counts.policy_models:
        raise ConfigError(
            f"the anchor model {anchor_model!r} took part in no battle; "
            f"choose one of {name_models(counts.policy_models)}"
        )
    return counts.policy_models.index(anchor_model)


def _require_finite_optimum(counts: BattleCounts) -> None:
    beaten = counts.points > 0
    require_connected(beaten | beaten.T, counts.policy_models)
    groups = mutually_beaten_groups(beaten)
    if len(groups) == 1:
        return
    problems = [problem for group in groups[1:] for problem in _why_infinite(group, beaten, counts.policy_models)]
    raise GraphError(
        f"no finite Bradley-Terry rating exists: {'; '.join(problems)}; "
        f"leave these models out or add battles in which they do both"
    )


def _why_infinite(group: Sequence[int], beaten: NDArray[np.bool_], names: Sequence[str]) -> list[str]:
    inside = np.asarray(group)
    outside = np.setdiff1d(np.arange(len(names)), inside)
    who = name_models([names[index] for index in group])
    if not beaten[np.ix_(outside, inside)].any():
        return [f"{who} never lost to any other model"]
    if not beaten[np.ix_(inside, outside)].any():
        return [f"{who} never beat any other model"]
    return [f"{who} only lost to some and only beat others"]


def _check_cells(cells: pl.DataFrame) -> None:
    unknown = cells.filter(~pl.col("winner").is_in(_WINNERS))
    if not unknown.is_empty():
        raise TableError(
            f"{unknown['battles'].sum()} battles have a winner that is none of {list(_WINNERS)}, "
            f"first {unknown['winner'][0]!r}; convert the outcomes first"
        )
    itself = cells.filter(pl.col("model_a") == pl.col("model_b"))
    if not itself.is_empty():
        raise TableError(
            f"{itself['battles'].sum()} battles pit a model against itself, first {itself['model_a'][0]!r}; remove them"
        )
