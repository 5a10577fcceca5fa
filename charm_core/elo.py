"""Ratings and what they imply: win probabilities, rating uncertainty, and which rating belongs to which policy model.

Source: METHOD.md sections 1 and 6. Ratings are Elo points on the Arena's scale. The anchor of a board moves between
dates, so only differences within one snapshot mean anything; every function here uses differences only.
"""

import difflib
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Literal, Self

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from charm_core.errors import RatingsError
from charm_core.tables import RATINGS, validate

ELO_POINTS_PER_LOGIT = 400.0 / math.log(10.0)
"""A difference of one natural logit of win probability, in Elo points (about 173.7)."""

_INTERVAL_Z = 1.959963984540054
_NEAREST_SHOWN = 5


class Alias(BaseModel):
    """How a policy model is called on the Arena's board, as somebody has reviewed it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    policy_model: str = Field(min_length=1, description="Name in the responses or scores.")
    arena_name: str | None = Field(default=None, min_length=1, description="Name on the board; not for an unknown one.")
    other_names: tuple[str, ...] = Field(
        default=(), description="What boards of other publishers call the same entry, such as its display name."
    )
    match: Literal["exact", "near", "unknown"] = Field(
        description="The same model, a stand-in for it, or reviewed and found to have no rating."
    )
    reason: str = Field(
        min_length=1, description="Why the two belong together; how a near match differs; why there is no match."
    )

    @model_validator(mode="after")
    def _named_if_known(self) -> Self:
        if (self.match == "unknown") != (self.arena_name is None):
            raise ValueError("an exact or near match needs an arena_name, and an unknown one has none")
        if self.match == "unknown" and self.other_names:
            raise ValueError("an unknown match has no other_names")
        return self


def win_probability(rating: ArrayLike, other: ArrayLike) -> NDArray[np.float64]:
    """Probability that people prefer the model rated ``rating`` to the one rated ``other``.

    Args:
        rating: Elo points, any shape.
        other: Elo points, broadcast against ``rating``.

    Returns:
        ``1 / (1 + 10 ** ((other - rating) / 400))``, ties counted as half a win. METHOD.md section 1.
    """
    difference = np.asarray(rating, dtype=np.float64) - np.asarray(other, dtype=np.float64)
    # the half-angle form neither overflows nor loses P + (1 - P) = 1 for large differences
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * difference / ELO_POINTS_PER_LOGIT)))


def win_probability_matrix(ratings: ArrayLike) -> NDArray[np.float64]:
    """Win probabilities of all ordered pairs.

    Args:
        ratings: Elo points, shape ``(..., K)``.

    Returns:
        Shape ``(..., K, K)``; entry ``[j, k]`` is the probability that j is preferred to k, the diagonal is 0.5.
    """
    values = np.asarray(ratings, dtype=np.float64)
    return win_probability(values[..., :, None], values[..., None, :])


def rating_standard_errors(ratings: pl.DataFrame) -> NDArray[np.float64]:
    """Standard error of each rating in Elo points, from its 95 % interval; 0 where the board gives none.

    Args:
        ratings: A RATINGS frame.

    Returns:
        Shape ``(K,)`` in the frame's order.
    """
    width = (ratings.get_column("rating_high") - ratings.get_column("rating_low")).fill_null(0.0).to_numpy()
    return np.asarray(width / (2.0 * _INTERVAL_Z), dtype=np.float64)


def select_ratings(ratings: pl.DataFrame, policy_models: Sequence[str]) -> pl.DataFrame:
    """Rows of a RATINGS frame for the given policy models, in their order.

    Raises:
        RatingsError: A policy model is not on the board (the nearest names are listed; nothing is matched by likeness),
            or an interval is upside down.
    """
    board = validate(ratings, RATINGS)
    upside_down = board.filter(
        (pl.col("rating_low") > pl.col("rating") + 0.5) | (pl.col("rating_high") < pl.col("rating") - 0.5)
    )
    if not upside_down.is_empty():
        raise RatingsError(
            f"the interval of {upside_down['policy_model'][0]!r} does not contain its rating: "
            f"{upside_down.row(0, named=True)}; check the board's columns"
        )
    names = board.get_column("policy_model").to_list()
    unknown = [model for model in policy_models if model not in set(names)]
    if unknown:
        raise RatingsError("; ".join(_not_rated(model, names) for model in unknown))
    order = pl.DataFrame({"policy_model": list(policy_models)}, schema={"policy_model": pl.String})
    return order.join(board, on="policy_model", how="left", maintain_order="left")


def resolve_aliases(
    ratings: pl.DataFrame, policy_models: Sequence[str], aliases: Sequence[Alias], *, accept_near: Sequence[str] = ()
) -> tuple[pl.DataFrame, tuple[Alias, ...]]:
    """Ratings under the names that the responses use.

    A policy model whose own name is on the board needs no alias; if it has one all the same, the alias counts.
    Everything else needs an entry in the reviewed alias table, and a near match needs the user's consent besides.

    Args:
        ratings: A RATINGS frame with the board's names.
        policy_models: Names in the responses or scores.
        aliases: The reviewed table; names that no policy model uses are ignored.
        accept_near: Policy models whose near match the user accepts.

    Returns:
        A RATINGS frame keyed by policy-model name, in sorted order, and the aliases that were applied, each with the
        name that this board uses.

    Raises:
        RatingsError: An unknown or ambiguous name, or a near match without consent.
    """
    names = ratings.get_column("policy_model").to_list()
    found, problems = _looked_up(policy_models, names, aliases, accept_near)
    problems += [_not_rated(alias.arena_name or model, names) for model, alias, known in found if not known]
    if problems:
        raise RatingsError("; ".join(problems))
    reviewed = {alias.policy_model for alias in aliases}
    chosen = select_ratings(ratings, [known[0] for _, _, known in found]).with_columns(
        pl.Series("policy_model", list(policy_models), pl.String)
    )
    applied = tuple(
        alias.model_copy(update={"arena_name": known[0], "other_names": ()})
        for model, alias, known in found
        if model in reviewed
    )
    return validate(chosen, RATINGS), applied


def present_ratings(
    ratings: pl.DataFrame, policy_models: Sequence[str], aliases: Sequence[Alias], *, accept_near: Sequence[str] = ()
) -> pl.DataFrame:
    """Ratings of those policy models that a board has: one of an earlier date may lack some.

    Args:
        ratings: A RATINGS frame with the board's names.
        policy_models: Names in the responses or scores.
        aliases: The reviewed table.
        accept_near: Policy models whose near match the user accepts.

    Returns:
        Columns of RATINGS, keyed by policy-model name, in sorted order; no rows if none is rated.

    Raises:
        RatingsError: A near match without consent, an ambiguous name, or one that is known to have no rating.
    """
    names = ratings.get_column("policy_model").to_list()
    found, problems = _looked_up(policy_models, names, aliases, accept_near)
    if problems:
        raise RatingsError("; ".join(problems))
    known = [(model, names_known[0]) for model, _, names_known in found if names_known]
    order = pl.DataFrame(known, schema={"model": pl.String, "policy_model": pl.String}, orient="row")
    rows = order.join(ratings, on="policy_model", how="left", maintain_order="left")
    return (
        rows.drop("policy_model").rename({"model": "policy_model"}).select(list(RATINGS.columns)).sort("policy_model")
    )


def _looked_up(
    policy_models: Sequence[str], names: Sequence[str], aliases: Sequence[Alias], accept_near: Sequence[str]
) -> tuple[list[tuple[str, Alias, list[str]]], list[str]]:
    """Each policy model with its alias and the names of it that the board has; and what forbids to use them."""
    table, known = _alias_table(aliases), set(names)
    found, problems = [], []
    for model in policy_models:
        alias = table.get(model) or Alias(policy_model=model, arena_name=model, match="exact", reason="its own name")
        present = [name for name in (alias.arena_name, *alias.other_names) if name in known and name is not None]
        problems += _alias_problems(alias, present, known, consent=model in accept_near)
        if alias.match != "unknown":
            found.append((model, alias, present))
    return found, problems


def _alias_problems(alias: Alias, found: Sequence[str], names: Collection[str], *, consent: bool) -> list[str]:
    """What forbids to use an alias on this board."""
    model = alias.policy_model
    if alias.match == "unknown" and model in names:
        return [f"the alias table says that {model!r} has no rating ({alias.reason}), but this board has; review it"]
    if alias.match == "unknown":
        return [f"{model!r} is known to have no rating ({alias.reason}); leave it out"]
    problems = []
    if alias.match == "near" and not consent:
        problems.append(
            f"{model!r} is only nearly {alias.arena_name!r} ({alias.reason}); "
            f"add it to arena.accept_near to use that rating"
        )
    if len(found) > 1:
        problems.append(
            f"{model!r} has several names of the alias table on this board: {', '.join(map(repr, found))}; keep one"
        )
    return problems


def _alias_table(aliases: Sequence[Alias]) -> Mapping[str, Alias]:
    table: dict[str, Alias] = {}
    for alias in aliases:
        other = table.setdefault(alias.policy_model, alias)
        if (other.arena_name, other.match) != (alias.arena_name, alias.match):
            raise RatingsError(
                f"the alias table maps {alias.policy_model!r} to both {other.arena_name!r} ({other.match}) and "
                f"{alias.arena_name!r} ({alias.match}); keep one"
            )
    return table


def _not_rated(model: str, names: Sequence[str]) -> str:
    return (
        f"policy model {model!r} has no rating on this board ({nearest_names(model, names)}); correct the name or add a "
        f"reviewed alias"
    )


def nearest_names(model: str, names: Sequence[str]) -> str:
    """The most similar names in words, for an error message and for nothing else."""
    folded = {name.casefold(): name for name in names}
    nearest = difflib.get_close_matches(model.casefold(), list(folded), n=_NEAREST_SHOWN, cutoff=0.5)
    return f"nearest names: {', '.join(folded[name] for name in nearest)}" if nearest else "no similar name"
