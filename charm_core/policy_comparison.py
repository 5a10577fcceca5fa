"""Which of several policy models answers better: means, paired differences and win rates on the same prompts."""

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl
from pydantic import Field

from charm_core.errors import TableError
from charm_core.records import Estimate, Record
from charm_core.resampling import FloatArray, bootstrap_weights, percentile_estimate
from charm_core.tables import PREFERENCES, SCORES, validate


class ComparisonConfig(Record):
    """How sure a comparison is."""

    bootstrap_replicates: int = Field(default=1000, ge=2, description="Resamples of the prompts.")
    confidence: float = Field(default=0.95, gt=0, lt=1, description="Coverage of the intervals.")
    seed: int = Field(default=0, ge=0, description="Seed of the resamples, which all comparisons share.")


class PolicyMean(Record):
    """One policy model by one measure."""

    policy_model: str
    measure: str
    value: Estimate


class PolicyDifference(Record):
    """Two policy models by one measure, on the same prompts; after minus before."""

    before: str
    after: str
    measure: str
    difference: Estimate


class PolicyWinRate(Record):
    """How often one policy model's response beats another's, ties half."""

    policy_model: str
    opponent: str
    judge: str = Field(description="Who decides.")
    win_rate: Estimate
    prompts: int


class PolicyComparison(Record):
    """Policy models on the same prompts."""

    policy_models: tuple[str, ...]
    prompts: int = Field(description="Prompts that all of them answered.")
    means: tuple[PolicyMean, ...]
    differences: tuple[PolicyDifference, ...]
    win_rates: tuple[PolicyWinRate, ...]


def compare_policies(
    measures: Mapping[str, pl.DataFrame],
    policy_models: Sequence[str],
    compared: Sequence[tuple[str, str]],
    config: ComparisonConfig | None = None,
    *,
    decided_by: Mapping[str, str] | None = None,
    preferences: Mapping[str, pl.DataFrame] | None = None,
) -> PolicyComparison:
    """Compare policy models by numbers that each of their responses has, and by a judge's preferences.

    Args:
        measures: By name, SCORES whose score is the measure of a response. Only prompts count of which every policy model has
            every measure.
        policy_models: Whom to compare, in this order.
        compared: (before, after).
        config: Intervals.
        decided_by: Measures of which more is better, by the name of who would decide so: they give win rates.
        preferences: By the name of a judge, PREFERENCES among the policy models.

    Returns:
        Intervals are percentiles over prompts, paired.

    Raises:
        TableError: A bad table, no measure, or no prompt that all answered.
    """
    settings = config or ComparisonConfig()
    grids, prompts = _grids(measures, policy_models)
    weights = _resamples(prompts, settings)
    place = {name: column for column, name in enumerate(policy_models)}
    means, differences, wins = [], [], []
    for measure, grid in grids.items():
        means += [
            PolicyMean(policy_model=name, measure=measure, value=_mean(grid[:, column], weights, settings))
            for name, column in place.items()
        ]
        differences += [
            PolicyDifference(
                before=before,
                after=after,
                measure=measure,
                difference=_mean(grid[:, place[after]] - grid[:, place[before]], weights, settings),
            )
            for before, after in compared
        ]
    for judge, measure in (decided_by or {}).items():
        grid = grids[measure]
        wins += [
            _win_rate(_wins(grid[:, place[after]], grid[:, place[before]]), (after, before), judge, settings)
            for before, after in compared
        ]
    for judge, table in (preferences or {}).items():
        wins += _judged(validate(table, PREFERENCES), compared, judge, settings)
    return PolicyComparison(
        policy_models=tuple(policy_models),
        prompts=prompts,
        means=tuple(means),
        differences=tuple(differences),
        win_rates=tuple(wins),
    )


def _grids(measures: Mapping[str, pl.DataFrame], policy_models: Sequence[str]) -> tuple[dict[str, FloatArray], int]:
    """Each measure as (prompts, policy models), on the prompts that all have."""
    if not measures:
        raise TableError("policy models are compared by at least one measure; give one")
    tables = {name: validate(table, SCORES) for name, table in measures.items()}
    wide = {name: _wide(table, policy_models) for name, table in tables.items()}
    common = set.intersection(*(set(frame.get_column("prompt_id")) for frame in wide.values()))
    if not common:
        raise TableError(
            f"no prompt has a measured response of all of {list(policy_models)}; give responses to the same prompts"
        )
    grids = {
        name: frame.filter(pl.col("prompt_id").is_in(common)).sort("prompt_id").select(policy_models).to_numpy()
        for name, frame in wide.items()
    }
    return grids, len(common)


def _wide(table: pl.DataFrame, policy_models: Sequence[str]) -> pl.DataFrame:
    """One row per prompt of which every policy model has a value."""
    kept = table.filter(pl.col("policy_model").is_in(policy_models))
    complete = kept.filter(pl.len().over("prompt_id") == len(policy_models))
    if complete.is_empty():
        return pl.DataFrame(schema={"prompt_id": pl.String, **dict.fromkeys(policy_models, pl.Float64)})
    return complete.pivot("policy_model", index="prompt_id", values="score")


def _judged(
    table: pl.DataFrame, compared: Sequence[tuple[str, str]], judge: str, config: ComparisonConfig
) -> list[PolicyWinRate]:
    turned = table.select("prompt_id", model_a="model_b", model_b="model_a", preference_a=1 - pl.col("preference_a"))
    both = pl.concat([table, turned])
    found = []
    for before, after in compared:
        wins = both.filter(model_a=after, model_b=before).sort("prompt_id").get_column("preference_a").to_numpy()
        if wins.size:
            found.append(_win_rate(wins, (after, before), judge, config))
    return found


def _wins(mine: FloatArray, other: FloatArray) -> FloatArray:
    return np.asarray(0.5 + 0.5 * np.sign(mine - other), dtype=np.float64)


def _win_rate(wins: FloatArray, pair: tuple[str, str], judge: str, config: ComparisonConfig) -> PolicyWinRate:
    return PolicyWinRate(
        policy_model=pair[0],
        opponent=pair[1],
        judge=judge,
        win_rate=_mean(wins, _resamples(wins.size, config), config),
        prompts=wins.size,
    )


def _resamples(prompts: int, config: ComparisonConfig) -> list[FloatArray]:
    rng = np.random.default_rng(config.seed)
    return [
        block.astype(np.float64) / prompts for block in bootstrap_weights(prompts, config.bootstrap_replicates, rng)
    ]


def _mean(values: FloatArray, weights: Sequence[FloatArray], config: ComparisonConfig) -> Estimate:
    replicates = np.concatenate([block @ values for block in weights])
    return percentile_estimate(float(values.mean()), replicates, config.confidence)
