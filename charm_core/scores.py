"""Scores as a matrix, and what they say about each pair of policy models on each prompt.

Rules used everywhere: a comparison is paired, that is on one prompt that both models answered; a tie is half a win;
a missing cell is a missing row and takes only that model's pairs on that prompt with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import polars as pl
from numpy.typing import NDArray

from charm_core.comparison_graph import name_models, require_connected
from charm_core.errors import TableError
from charm_core.tables import PREFERENCES, SCORES, WIN_RATES, validate

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class ScoreMatrix:
    """Scores of K policy models on n prompts."""

    prompt_ids: tuple[str, ...]
    policy_models: tuple[str, ...]
    values: FloatArray
    """Shape ``(n, K)`` in the reward model's own unit; NaN where there is no score."""


@dataclass(frozen=True, kw_only=True)
class PairOutcomes:
    """What each compared pair did on each prompt."""

    prompt_ids: tuple[str, ...]
    policy_models: tuple[str, ...]
    first: NDArray[np.intp]
    """Shape ``(P,)``: index of the pair's first model; pairs without a shared prompt are left out."""
    second: NDArray[np.intp]
    """Shape ``(P,)``: index of the pair's second model."""
    outcomes: NDArray[np.float32]
    """Shape ``(n, P)``: 1 where the first model wins, 0.5 for a tie, 0 where it loses (a judge's preference may lie
    in between); NaN where the pair does not share the prompt."""

    @property
    def shared(self) -> FloatArray:
        """Shape ``(P,)``: prompts that each pair shares."""
        return np.asarray(np.isfinite(self.outcomes).sum(axis=0), dtype=np.float64)

    @property
    def win_rate(self) -> FloatArray:
        """Shape ``(P,)``: mean outcome of each pair over its shared prompts."""
        return np.asarray(np.nansum(self.outcomes, axis=0, dtype=np.float64) / self.shared)

    @property
    def tie_rate(self) -> FloatArray:
        """Shape ``(P,)``: share of each pair's prompts on which it ties."""
        return np.asarray((self.outcomes == 0.5).sum(axis=0) / self.shared)


def score_matrix(scores: pl.DataFrame, policy_models: Sequence[str] | None = None) -> ScoreMatrix:
    """Bring a SCORES frame into matrix form.

    Args:
        scores: A SCORES frame.
        policy_models: Models to keep, in this order; all of the frame's, sorted, if None. Prompts that none of them
            answered are left out.

    Raises:
        TableError: A bad table, a model that has no scores, a model named twice, fewer than two models, or no
            prompt that two of them share.
        GraphError: Shared prompts do not connect all models.
    """
    table = validate(scores, SCORES)
    models = _models_to_keep(table, policy_models)
    kept = table.filter(pl.col("policy_model").is_in(models))
    prompts = kept.get_column("prompt_id").unique().sort()
    values = np.full((prompts.len(), len(models)), np.nan)
    rows = kept.get_column("prompt_id").cast(pl.Enum(prompts)).to_physical().to_numpy()
    columns = kept.get_column("policy_model").cast(pl.Enum(models)).to_physical().to_numpy()
    values[rows, columns] = kept.get_column("score").to_numpy()
    matrix = ScoreMatrix(prompt_ids=tuple(prompts), policy_models=tuple(models), values=values)
    present = np.isfinite(values).astype(np.float32)
    _check_shared(present.T @ present > 0, models)
    return matrix


def score_outcomes(matrix: ScoreMatrix) -> PairOutcomes:
    """Compare every pair of columns on the prompts that both have; equal scores are a tie.

    Returns:
        Pairs in the order (0, 1), (0, 2), ..., (K-2, K-1), without those that share no prompt.
    """
    present = np.isfinite(matrix.values)
    pairs = [
        (j, k) for j, k in combinations(range(len(matrix.policy_models)), 2) if (present[:, j] & present[:, k]).any()
    ]
    outcomes = np.empty((len(matrix.prompt_ids), len(pairs)), dtype=np.float32)
    for column, (j, k) in enumerate(pairs):
        # the sign of a difference: NaN stays NaN, so that missing cells need no mask
        outcomes[:, column] = 0.5 + 0.5 * np.sign(matrix.values[:, j] - matrix.values[:, k])
    indices = np.asarray(pairs, dtype=np.intp).reshape(-1, 2)
    return PairOutcomes(
        prompt_ids=matrix.prompt_ids,
        policy_models=matrix.policy_models,
        first=indices[:, 0],
        second=indices[:, 1],
        outcomes=outcomes,
    )


def preference_outcomes(preferences: pl.DataFrame) -> PairOutcomes:
    """Outcomes from a judge's pairwise preferences, such as many models against one baseline.

    Args:
        preferences: A PREFERENCES frame. A pair judged in both orders on one prompt counts once, with the mean.

    Raises:
        TableError: A bad table, a preference outside of [0, 1], or a model that is compared with itself.
        GraphError: The comparisons do not connect all models.
    """
    table = validate(preferences, PREFERENCES)
    _check_preferences(table)
    swap = pl.col("model_a") > pl.col("model_b")
    ordered = table.select(
        "prompt_id",
        pl.when(swap).then(pl.col("model_b")).otherwise(pl.col("model_a")).alias("first"),
        pl.when(swap).then(pl.col("model_a")).otherwise(pl.col("model_b")).alias("second"),
        pl.when(swap).then(1.0 - pl.col("preference_a")).otherwise(pl.col("preference_a")).alias("preference"),
    )
    cells = ordered.group_by("prompt_id", "first", "second").agg(pl.col("preference").mean())
    prompts = cells.get_column("prompt_id").unique().sort()
    models = pl.concat([cells.get_column("first"), cells.get_column("second")]).unique().sort()
    pairs = cells.select("first", "second").unique().sort("first", "second").with_row_index("pair")
    located = cells.join(pairs, on=["first", "second"])
    outcomes = np.full((prompts.len(), pairs.height), np.nan, dtype=np.float32)
    rows = located.get_column("prompt_id").cast(pl.Enum(prompts)).to_physical().to_numpy()
    outcomes[rows, located.get_column("pair").to_numpy()] = located.get_column("preference").to_numpy()
    first, second = (
        pairs.get_column(side).cast(pl.Enum(models)).to_physical().to_numpy().astype(np.intp)
        for side in ("first", "second")
    )
    compared = np.zeros((models.len(), models.len()), dtype=np.bool_)
    compared[first, second] = True
    require_connected(compared, models.to_list())
    return PairOutcomes(
        prompt_ids=tuple(prompts), policy_models=tuple(models), first=first, second=second, outcomes=outcomes
    )


def win_rate_outcomes(win_rates: pl.DataFrame) -> PairOutcomes:
    """Outcomes that stand for published win rates, whose single prompts are not known.

    Each pair gets as many outcomes as it had prompts, with exactly the published mean and a spread that makes the
    standard error of their mean the published one. Their order is random and independent between pairs: what the pairs
    owe to common prompts is not published either.

    Args:
        win_rates: A WIN_RATES frame.

    Raises:
        TableError: A bad table, a win rate outside of [0, 1], fewer than two prompts, or a model compared with itself.
        GraphError: The comparisons do not connect all models.
    """
    table = validate(win_rates, WIN_RATES)
    _check_win_rates(table)
    models = pl.concat([table.get_column("model_a"), table.get_column("model_b")]).unique().sort().to_list()
    first, second = (
        table.get_column(side).cast(pl.Enum(models)).to_physical().to_numpy().astype(np.intp)
        for side in ("model_a", "model_b")
    )
    compared = np.zeros((len(models), len(models)), dtype=np.bool_)
    compared[first, second] = True
    require_connected(compared, models)
    prompts = table.get_column("prompts").to_list()
    outcomes = np.full((max(prompts), table.height), np.nan, dtype=np.float32)
    rng = np.random.default_rng(0)
    rows = zip(table.get_column("win_rate"), table.get_column("standard_error"), prompts, strict=True)
    for column, (mean, error, number) in enumerate(rows):
        # +1 and -1 in equal numbers, and one 0 where their number is odd
        signs = np.resize([1.0, -1.0], number - number % 2)
        deviations = rng.permutation(np.append(signs, np.zeros(number % 2)))
        outcomes[:number, column] = mean + deviations * error * number / np.sqrt(signs.size)
    return PairOutcomes(
        prompt_ids=tuple(map(str, range(max(prompts)))),
        policy_models=tuple(models),
        first=first,
        second=second,
        outcomes=outcomes,
    )


def pairs_with(outcomes: PairOutcomes, focus: Sequence[str]) -> PairOutcomes:
    """Only the pairs that have at least one of the named models; all if none is named.

    Raises:
        TableError: A named model is not among the policy models.
    """
    if not focus:
        return outcomes
    unknown = sorted(set(focus) - set(outcomes.policy_models))
    if unknown:
        raise TableError(f"no scores for the policy models {name_models(unknown)}; correct the names or score them")
    chosen = [outcomes.policy_models.index(model) for model in focus]
    kept = np.isin(outcomes.first, chosen) | np.isin(outcomes.second, chosen)
    return replace(
        outcomes, first=outcomes.first[kept], second=outcomes.second[kept], outcomes=outcomes.outcomes[:, kept]
    )


def _models_to_keep(table: pl.DataFrame, policy_models: Sequence[str] | None) -> list[str]:
    present = table.get_column("policy_model").unique().sort().to_list()
    models = present if policy_models is None else list(policy_models)
    unknown = sorted(set(models) - set(present))
    if unknown:
        raise TableError(
            f"no scores for the policy models {name_models(unknown)}; the table has {name_models(present)}: "
            f"correct the names or score their responses"
        )
    repeated = sorted({model for model in models if models.count(model) > 1})
    if repeated:
        raise TableError(f"the policy models {name_models(repeated)} are asked for more than once; name each one once")
    if len(models) < 2:
        raise TableError(f"a comparison needs at least two policy models, not {models}; add scores of another one")
    return models


def _check_shared(compared: NDArray[np.bool_], models: Sequence[str]) -> None:
    if not (compared & ~np.eye(len(models), dtype=np.bool_)).any():
        raise TableError(
            f"no two of the policy models {name_models(models)} have scores on the same prompt; "
            f"score responses to one common set of prompts and check that prompt_id means the same for all of them"
        )
    require_connected(compared, models)


def _check_win_rates(table: pl.DataFrame) -> None:
    wrong = table.filter(
        ~pl.col("win_rate").is_between(0.0, 1.0)
        | (pl.col("standard_error") < 0)
        | (pl.col("prompts") < 2)
        | (pl.col("model_a") == pl.col("model_b"))
    )
    if not wrong.is_empty():
        raise TableError(
            f"{wrong.height} win rates are unusable, first {wrong.row(0, named=True)}; a win rate lies in [0, 1], its standard "
            f"error is not negative, it comes from at least two prompts and compares two different models"
        )
    reverse = table.select(model_a="model_b", model_b="model_a").join(table, on=["model_a", "model_b"], how="semi")
    if not reverse.is_empty():
        raise TableError(f"the win rate of {reverse.row(0)} is given in both orders; keep one")


def _check_preferences(table: pl.DataFrame) -> None:
    outside = table.filter(~pl.col("preference_a").is_between(0.0, 1.0))
    if not outside.is_empty():
        raise TableError(
            f"{outside.height} preferences lie outside of [0, 1], first {outside.row(0, named=True)}; "
            f"preference_a is the probability that model_a is preferred (a judge's 1-or-2 answers need converting)"
        )
    itself = table.filter(pl.col("model_a") == pl.col("model_b"))
    if not itself.is_empty():
        raise TableError(f"{itself.height} preferences compare a model with itself, first {itself.row(0, named=True)}")
