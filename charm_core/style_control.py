"""Bradley-Terry ratings with style covariates: how good a model is when neither response is longer or more marked up.

The Arena's style control (lmsys.org, "Does style matter?", August 2024) adds the difference in style of two responses to the
logit of a Bradley-Terry fit. Each covariate enters as its normalised difference ``(a - b) / (a + b)``, 0 where both are 0,
divided by its root mean square. The Arena subtracts the mean besides; we do not, so that a fit does not depend on which of
two responses is called a (with random sides the mean is 0 and the two agree). No ridge: what the battles do not determine is
an error that names it, not an answer that the ridge chose. Intervals are Huber's sandwich over battles.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field
from scipy.special import expit, log_expit

from charm_core.bradley_terry import counts_from_battles, fit_bradley_terry
from charm_core.elo import ELO_POINTS_PER_LOGIT
from charm_core.errors import GraphError, TableError
from charm_core.records import Record
from charm_core.tables import BATTLES, RATINGS, validate

FloatArray = NDArray[np.float64]
IndexArray = NDArray[np.int64]

_INTERVAL_Z = 1.959963984540054
_OUTCOMES = {"model_a": 1.0, "model_b": 0.0, "tie": 0.5, "tie (bothbad)": 0.5}
_MAX_ITERATIONS = 100
_TOLERANCE = 1e-9
_HOPELESS_LOGIT = 40.0
_UNDETERMINED = 1e-9


class StyleCoefficient(Record):
    """What one covariate is worth to voters."""

    name: str
    coefficient: float = Field(description="Logits per unit of the covariate.")
    standard_error: float = Field(description="Sandwich standard error, logits.")
    unit: float = Field(description="Root mean square of the normalised difference: one unit.")

    @property
    def elo(self) -> float:
        """Elo points that a response gains from one unit more than its opponent."""
        return self.coefficient * ELO_POINTS_PER_LOGIT

    def sentence(self) -> str:
        """For people."""
        half = _INTERVAL_Z * self.standard_error * ELO_POINTS_PER_LOGIT
        numbers = f"{self.elo:+.0f} Elo points [{self.elo - half:+.0f}, {self.elo + half:+.0f}]".replace("-", "−")
        return f"{self.name}: {numbers} for {self.unit:.2f} of normalised difference, (a − b) / (a + b)"


class StyleControlFit(Record):
    """Ratings at equal style, in Elo points, in the order of ``policy_models``."""

    policy_models: tuple[str, ...]
    ratings: tuple[float, ...]
    standard_errors: tuple[float, ...] = Field(description="Sandwich standard errors, relative to the mean rating.")
    votes: tuple[int, ...] = Field(description="Battles in which each model took part.")
    battles: int
    anchor: float = Field(description="Mean rating.")
    coefficients: tuple[StyleCoefficient, ...]
    constant: tuple[str, ...] = Field(description="Covariates that never differ, which say nothing.")
    log_likelihood: float

    def frame(self) -> pl.DataFrame:
        """A RATINGS frame with 95 % intervals."""
        ratings, errors = np.asarray(self.ratings), np.asarray(self.standard_errors)
        columns = {
            "policy_model": list(self.policy_models),
            "rating": ratings,
            "rating_low": ratings - _INTERVAL_Z * errors,
            "rating_high": ratings + _INTERVAL_Z * errors,
            "votes": list(self.votes),
        }
        return validate(pl.DataFrame(columns), RATINGS)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Design:
    """Who fights whom, how it ended, and what differs in style."""

    first: IndexArray
    second: IndexArray
    outcomes: FloatArray
    differences: FloatArray
    """Shape ``(battles, covariates)``, scaled."""
    models: int

    def logits(self, parameters: FloatArray) -> FloatArray:
        strengths, coefficients = parameters[: self.models], parameters[self.models :]
        return np.asarray(strengths[self.first] - strengths[self.second] + self.differences @ coefficients)

    def sums(self, values: FloatArray) -> FloatArray:
        """``Dᵀ values`` for the matrix D with one row per battle: +1, -1 and the differences."""
        gained = np.bincount(self.first, values, self.models) - np.bincount(self.second, values, self.models)
        return np.concatenate([gained, self.differences.T @ values])

    def products(self, weights: FloatArray) -> FloatArray:
        """``Dᵀ diag(weights) D``."""
        models, covariates = self.models, self.differences.shape[1]
        pairs = np.bincount(self.first * models + self.second, weights, models**2).reshape(models, models)
        pairs = pairs + pairs.T
        weighted = self.differences * weights[:, None]
        result = np.empty((models + covariates, models + covariates))
        result[:models, :models] = np.diag(pairs.sum(axis=1)) - pairs
        result[models:, models:] = self.differences.T @ weighted
        for column in range(covariates):
            result[:, models + column] = self.sums(weighted[:, column])
        result[models:, :models] = result[:models, models:].T
        return result


def style_counts(texts: pl.Series) -> pl.DataFrame:
    """Style of responses: characters, and Markdown headers, bold passages and list items outside of code blocks.

    The Arena measures length in tokens; a normalised difference is nearly the same in characters. Where token counts exist,
    give them as covariates instead.

    Args:
        texts: Responses.

    Returns:
        Columns length, headers, bold, lists in the order of ``texts``.
    """
    text = pl.col("text")
    prose = text.str.replace_all(r"```[^`]*```", "")
    return texts.alias("text").to_frame().select(
        length=text.str.len_chars().cast(pl.Float64),
        headers=prose.str.count_matches(r"(?m)^#{1,6}\s").cast(pl.Float64),
        bold=(prose.str.count_matches(r"\*\*[^*\n]+\*\*") + prose.str.count_matches(r"__[^_\n]+__")).cast(pl.Float64),
        lists=prose.str.count_matches(r"(?m)^[ \t]*(?:\d+\.|[-*+])\s").cast(pl.Float64),
    )  # fmt: skip


def normalised_differences(first: FloatArray, second: FloatArray) -> FloatArray:
    """``(a - b) / (a + b)``, which lies in [-1, 1]; 0 where both are 0.

    Raises:
        TableError: A count that is negative, NaN or infinite.
    """
    for counts in (first, second):
        if not np.isfinite(counts).all() or (counts < 0).any():
            raise TableError("style covariates must be finite and not negative; leave battles without them out")
    total = first + second
    return np.asarray((first - second) / np.where(total > 0, total, 1.0))


def fit_style_control(
    battles: pl.DataFrame, covariates: Mapping[str, tuple[FloatArray, FloatArray]], *, anchor: float = 1000.0
) -> StyleControlFit:
    """Maximum-likelihood ratings and style coefficients.

    Args:
        battles: A BATTLES frame.
        covariates: Name to what was counted in the responses of ``model_a`` and of ``model_b``, in the order of ``battles``.
            Without any the result is that of ``fit_bradley_terry``.
        anchor: Elo points of the mean rating.

    Raises:
        TableError: A bad table, or covariates of another length or with impossible values.
        GraphError: The battles do not determine the ratings or the coefficients; who or what is named.
    """
    table = validate(battles, BATTLES)
    for name, sides in covariates.items():
        if any(side.shape != (table.height,) for side in sides):
            raise TableError(f"the style covariate {name!r} must have one value per battle and side ({table.height})")
    counts = counts_from_battles(table)
    unstyled = fit_bradley_terry(counts, anchor=anchor)  # names the models whose ratings would be infinite
    order = battles.get_column("battle_id").arg_sort().to_numpy()  # validated tables are sorted by it
    raw = {name: normalised_differences(*sides)[order] for name, sides in covariates.items()}
    units = {name: float(np.sqrt(np.mean(values**2))) for name, values in raw.items()}
    used = [name for name, unit in units.items() if unit > 0]
    design = _design(table, counts.policy_models, [raw[name] / units[name] for name in used])
    _require_determined(design, used)
    start = (np.asarray(unstyled.ratings) - anchor) / ELO_POINTS_PER_LOGIT
    solution = _solve(design, np.concatenate([start, np.zeros(len(used))]), used)
    errors = np.sqrt(np.maximum(np.diagonal(_sandwich(design, solution)), 0.0))
    models = design.models
    strengths = solution[:models] - solution[:models].mean()
    logits = design.logits(solution)
    likelihood = design.outcomes * log_expit(logits) + (1 - design.outcomes) * log_expit(-logits)
    return StyleControlFit(
        policy_models=counts.policy_models,
        ratings=tuple((anchor + ELO_POINTS_PER_LOGIT * strengths).tolist()),
        standard_errors=tuple((ELO_POINTS_PER_LOGIT * errors[:models]).tolist()),
        votes=unstyled.votes,
        battles=unstyled.battles,
        anchor=anchor,
        coefficients=tuple(
            StyleCoefficient(name=name, coefficient=float(value), standard_error=float(error), unit=units[name])
            for name, value, error in zip(used, solution[models:], errors[models:], strict=True)
        ),
        constant=tuple(name for name, unit in units.items() if unit == 0),
        log_likelihood=float(likelihood.sum()),
    )


def _design(table: pl.DataFrame, names: Sequence[str], differences: Sequence[FloatArray]) -> _Design:
    order = pl.Enum(list(names))
    first, second = (
        table.get_column(side).cast(order).to_physical().to_numpy().astype(np.int64) for side in ("model_a", "model_b")
    )
    outcomes = table.get_column("winner").replace_strict(_OUTCOMES, return_dtype=pl.Float64).to_numpy()
    stacked = np.stack(differences, axis=1) if differences else np.zeros((table.height, 0))
    return _Design(first=first, second=second, outcomes=outcomes, differences=stacked, models=len(names))


def _gauged(matrix: FloatArray, models: int) -> tuple[FloatArray, FloatArray]:
    """The matrix with its null direction, a constant added to all ratings, filled in; and what the inverse then has too much."""
    scale = float(np.trace(matrix[:models, :models])) / models
    gauge = np.zeros_like(matrix)
    gauge[:models, :models] = 1.0 / models
    return matrix + scale * gauge, gauge / scale


def _require_determined(design: _Design, names: Sequence[str]) -> None:
    """Check that no covariate is a combination of others and of who wrote the response."""
    if not names:
        return
    models = design.models
    full, _ = _gauged(design.products(np.ones(design.outcomes.size)), models)
    across = full[:models, models:]
    left = full[models:, models:] - across.T @ np.linalg.solve(full[:models, :models], across)
    spread = np.sqrt(np.diagonal(full[models:, models:]))
    values, vectors = np.linalg.eigh(left / np.outer(spread, spread))
    if values[0] < _UNDETERMINED:
        involved = [name for name, part in zip(names, vectors[:, 0], strict=True) if abs(part) > 0.1]
        raise GraphError(
            f"the style covariates {involved} cannot be told apart from each other or from who wrote the responses; "
            f"leave one of them out"
        )


def _solve(design: _Design, start: FloatArray, names: Sequence[str]) -> FloatArray:
    parameters = start
    for _ in range(_MAX_ITERATIONS):
        chances = expit(design.logits(parameters))
        hessian, _ = _gauged(design.products(chances * (1 - chances)), design.models)
        try:
            step = np.asarray(np.linalg.solve(hessian, design.sums(design.outcomes - chances)), dtype=np.float64)
        except np.linalg.LinAlgError:
            break
        # as in bradley_terry: a Newton step that changes no logit by more than one cannot overshoot
        longest = float(np.abs(design.logits(step)).max())
        parameters = parameters + step / max(longest, 1.0)
        if longest < _TOLERANCE:
            return parameters
        if float(np.abs(design.logits(parameters)).max()) > _HOPELESS_LOGIT:
            break
    largest = names[int(np.abs(parameters[design.models :]).argmax())] if names else "none"
    raise GraphError(
        f"no finite fit with the style covariates {list(names)} exists: they and the models predict some outcomes without a "
        f"single exception (most of all {largest!r}); leave a covariate out or add battles"
    )


def _sandwich(design: _Design, parameters: FloatArray) -> FloatArray:
    """H⁺ G H⁺ with one score vector per battle; ratings relative to their mean."""
    chances = expit(design.logits(parameters))
    hessian, excess = _gauged(design.products(chances * (1 - chances)), design.models)
    inverse = np.linalg.inv(hessian) - excess
    return np.asarray(inverse @ design.products((design.outcomes - chances) ** 2) @ inverse)


def looks_encoded(texts: pl.Series) -> bool:
    """Whether responses are JSON lists in the form of text, in which no line begins where it should."""
    sample = texts.drop_nulls().head(20).to_list()
    return bool(sample) and all(_is_list(text) for text in sample)


def _is_list(text: str) -> bool:
    try:
        return isinstance(json.loads(text), list)
    except ValueError:
        return False
