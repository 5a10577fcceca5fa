"""One offset per policy model that makes a reward model's win rates those of the Arena.

``paired`` compares responses to the same prompt and is what mismatch measures; ``cross_prompt`` is the reference
implementation's estimator. Only differences of offsets matter, so the reference models' mean offset stays at 0.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field, field_validator

from charm_core.comparison_graph import name_models
from charm_core.cross_prompt_offsets import CrossPromptTarget, cross_prompt_replicates, solve_cross_prompt
from charm_core.elo import rating_standard_errors, select_ratings, win_probability
from charm_core.errors import ConfigError, GraphError
from charm_core.mismatch_values import mismatch_degree
from charm_core.paired_offsets import (
    PairDifferences,
    PairedSolution,
    difference_spread,
    exact_offset,
    hard_win_rates,
    pair_differences,
    paired_replicates,
    solve_paired,
)
from charm_core.records import Estimate, Record
from charm_core.resampling import percentile_estimate
from charm_core.scores import ScoreMatrix, score_matrix
from charm_core.tables import SCORES, validate

FloatArray = NDArray[np.float64]

_FEW_PROMPTS = 30


class OffsetConfig(Record):
    """How to fit offsets."""

    estimator: Literal["paired", "cross_prompt"] = Field(
        "paired", description="'paired' compares responses to one prompt; 'cross_prompt' is the reference's estimator."
    )
    reference_model: str | None = Field(
        None, description="Policy model whose offset stays at 0; chosen automatically if not given."
    )
    smoothing: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (1.0, 0.3, 0.1),
        min_length=1,
        description="paired: falling temperatures, as multiples of the spread of the score differences.",
    )
    score_temperature: float = Field(
        0.1, ge=0.0, description="cross_prompt: temperature of the sigmoid in raw score units; 0 for hard wins."
    )
    block_prompts: int = Field(1000, ge=2, description="cross_prompt: prompts that are compared with one another.")
    bootstrap_replicates: int = Field(200, ge=0, description="Bootstrap replicates for the intervals; 0 for none.")
    confidence: float = Field(0.95, gt=0.5, lt=1.0, description="Coverage of the intervals.")
    seed: int = Field(0, ge=0, description="Seed of the bootstrap.")

    @field_validator("smoothing")
    @classmethod
    def _falling(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if list(value) != sorted(value, reverse=True):
            raise ValueError(f"smoothing temperatures must be falling, not {value}")
        return value


class ModelOffset(Record):
    """Offset of one policy model, in the reward model's score unit."""

    policy_model: str
    offset: Estimate


class OffsetFit(Record):
    """Offsets and how well they do on the prompts that they were fitted on."""

    offsets: tuple[ModelOffset, ...]
    reference_models: tuple[str, ...]
    estimator: Literal["paired", "cross_prompt"]
    residual: float = Field(description="Largest |hard, paired win rate - win probability| over all pairs.")
    mean_absolute_residual: float = Field(description="Mean of the same.")
    mean_absolute_mismatch: float = Field(description="Mean |mismatch degree| with the offsets added.")
    iterations: int
    prompts: int
    note: str = ""

    def as_mapping(self) -> dict[str, float]:
        """Offset by policy model."""
        return {model.policy_model: model.offset.value or 0.0 for model in self.offsets}


def fit_offsets(
    scores: pl.DataFrame,
    ratings: pl.DataFrame,
    config: OffsetConfig | None = None,
    reference_models: Sequence[str] = (),
) -> OffsetFit:
    """Fit one offset per policy model.

    Args:
        scores: A SCORES frame. Missing cells are allowed: every pair uses the prompts that it shares.
        ratings: A RATINGS frame of one board at one date; it may hold more models.
        config: Settings.
        reference_models: Models whose mean offset is 0; ``config.reference_model`` if empty. With ``cross_prompt`` each
            of them stays at 0, and all others are fitted against them.

    Raises:
        TableError, GraphError: See ``score_matrix``.
        RatingsError: A policy model has no rating.
        ConfigError: No reference model, or one without scores.
    """
    settings = config or OffsetConfig()
    matrix = score_matrix(scores)
    board = select_ratings(ratings, matrix.policy_models)
    references = _reference_indices(matrix, settings, reference_models)
    rated = board.get_column("rating").to_numpy()
    pairs = pair_differences(matrix.values)
    if settings.estimator == "cross_prompt":
        offsets, replicates, iterations, notes = _fit_cross_prompt(matrix, board, settings, references)
    elif len(matrix.policy_models) == 2:
        offsets, replicates, iterations, notes = _fit_two(pairs[0], matrix, board, settings)
    else:
        offsets, replicates, iterations, notes = _fit_joint(pairs, matrix, board, settings)
    offsets = offsets - offsets[references].mean()
    replicates = replicates - replicates[:, references].mean(axis=1, keepdims=True)
    rates = hard_win_rates(pairs, offsets)
    targets = np.asarray([float(win_probability(rated[pair.first], rated[pair.second])) for pair in pairs])
    few = min(pair.values.size for pair in pairs)
    if few < _FEW_PROMPTS:
        notes.append(f"some pair shares only {few} prompts")
    return OffsetFit(
        offsets=tuple(
            ModelOffset(
                policy_model=name, offset=_estimate(float(offsets[index]), replicates[:, index], settings.confidence)
            )
            for index, name in enumerate(matrix.policy_models)
        ),
        reference_models=tuple(matrix.policy_models[index] for index in references),
        estimator=settings.estimator,
        residual=float(np.abs(rates - targets).max()),
        mean_absolute_residual=float(np.abs(rates - targets).mean()),
        mean_absolute_mismatch=float(np.abs(mismatch_degree(rates, targets)).mean()),
        iterations=iterations,
        prompts=len(matrix.prompt_ids),
        note="; ".join(notes),
    )


def apply_offsets(scores: pl.DataFrame, offsets: OffsetFit | Mapping[str, float]) -> pl.DataFrame:
    """Add to every score the offset of its policy model; no training is needed where the policy model is known.

    Args:
        scores: A SCORES frame.
        offsets: A fit, or offsets by policy model. Offsets of models that the scores do not hold are not used.

    Returns:
        A SCORES frame of calibrated scores.

    Raises:
        TableError: A bad table.
        ConfigError: A policy model has no offset.
    """
    table = validate(scores, SCORES)
    by_model = offsets.as_mapping() if isinstance(offsets, OffsetFit) else dict(offsets)
    check_offsets(by_model, table.get_column("policy_model").unique().sort().to_list())
    known = pl.DataFrame(
        {"policy_model": list(by_model), "offset": list(by_model.values())},
        schema={"policy_model": pl.String, "offset": pl.Float64},
    )
    calibrated = table.join(known, on="policy_model", how="left", maintain_order="left")
    return validate(calibrated.select("prompt_id", "policy_model", pl.col("score") + pl.col("offset")), SCORES)


def check_offsets(offsets: Mapping[str, float], policy_models: Sequence[str]) -> None:
    """Check that every policy model has a finite offset.

    Raises:
        ConfigError: One has none, or one that is NaN or infinite.
    """
    without = [model for model in policy_models if model not in offsets]
    if without:
        raise ConfigError(
            f"no offset for the policy models {name_models(without)}; offsets exist for {name_models(list(offsets))}: "
            f"fit offsets on scores that include them, or leave them out"
        )
    broken = {model: value for model, value in offsets.items() if not np.isfinite(value)}
    if broken:
        raise ConfigError(f"offsets must be finite numbers, not {broken}; fit them again")


def _fit_two(
    pair: PairDifferences, matrix: ScoreMatrix, board: pl.DataFrame, config: OffsetConfig
) -> tuple[FloatArray, FloatArray, int, list[str]]:
    rows = slice(None) if pair.rows is None else pair.rows
    first, second = matrix.values[rows, pair.first], matrix.values[rows, pair.second]
    ratings = board.get_column("rating").to_numpy()
    exact = exact_offset(first, second, float(win_probability(ratings[0], ratings[1])))
    notes = []
    if exact.tie_block:
        notes.append(
            f"the nearest reachable win rate is {exact.win_rate:.4f}: a block of {exact.tie_block} prompts has equal "
            f"score differences and moves together"
        )
    offsets = np.asarray([exact.offset, 0.0])
    # the two-model bootstrap is the joint one: smooth quantiles are better behaved under resampling than hard ones
    temperature = config.smoothing[-1] * difference_spread([pair])
    smooth = solve_paired([pair], ratings, offsets, config.smoothing).smooth_offsets
    solution = PairedSolution(
        offsets=offsets - offsets.mean(), iterations=1, smooth_offsets=smooth, temperature=temperature
    )
    return offsets, _paired_bootstrap([pair], solution, matrix, board, config), 1, notes


def _fit_joint(
    pairs: Sequence[PairDifferences], matrix: ScoreMatrix, board: pl.DataFrame, config: OffsetConfig
) -> tuple[FloatArray, FloatArray, int, list[str]]:
    start = -np.nanmean(matrix.values, axis=0)
    solution = solve_paired(pairs, board.get_column("rating").to_numpy(), start, config.smoothing)
    return solution.offsets, _paired_bootstrap(pairs, solution, matrix, board, config), solution.iterations, []


def _paired_bootstrap(
    pairs: Sequence[PairDifferences],
    solution: PairedSolution,
    matrix: ScoreMatrix,
    board: pl.DataFrame,
    config: OffsetConfig,
) -> FloatArray:
    for_prompts, drawn = _draws(board, config)
    return paired_replicates(pairs, solution, drawn, len(matrix.prompt_ids), for_prompts)


def _fit_cross_prompt(
    matrix: ScoreMatrix, board: pl.DataFrame, config: OffsetConfig, references: list[int]
) -> tuple[FloatArray, FloatArray, int, list[str]]:
    ratings = board.get_column("rating").to_numpy()
    models = len(matrix.policy_models)
    offsets, replicates, evaluations = np.zeros(models), np.zeros((config.bootstrap_replicates, models)), 0
    for model in sorted(set(range(models)) - set(references)):
        chosen = [reference for reference in references if _shared_rows(matrix, model, reference).size]
        if not chosen:
            raise GraphError(
                f"{matrix.policy_models[model]!r} shares no prompt with the reference models "
                f"{name_models([matrix.policy_models[index] for index in references])}; choose another reference model"
            )
        targets = [_cross_prompt_target(matrix, ratings, model, reference) for reference in chosen]
        offsets[model], taken = solve_cross_prompt(
            targets, score_temperature=config.score_temperature, block_prompts=config.block_prompts
        )
        evaluations += taken
        for_prompts, drawn = _draws(board, config)
        if config.bootstrap_replicates:
            replicates[:, model] = cross_prompt_replicates(
                targets,
                float(offsets[model]),
                win_probability(drawn[:, [model]], drawn[:, chosen]),
                len(matrix.prompt_ids),
                for_prompts,
                score_temperature=config.score_temperature,
                block_prompts=config.block_prompts,
            )
    return offsets, replicates, evaluations, ["prompt difficulty leaks into cross-prompt offsets"]


def _cross_prompt_target(matrix: ScoreMatrix, ratings: FloatArray, model: int, reference: int) -> CrossPromptTarget:
    rows = _shared_rows(matrix, model, reference)
    return CrossPromptTarget(
        scores=matrix.values[rows, model],
        reference=matrix.values[rows, reference],
        rows=rows,
        probability=float(win_probability(ratings[model], ratings[reference])),
    )


def _shared_rows(matrix: ScoreMatrix, model: int, reference: int) -> NDArray[np.intp]:
    return np.flatnonzero(np.isfinite(matrix.values[:, model]) & np.isfinite(matrix.values[:, reference]))


def _draws(board: pl.DataFrame, config: OffsetConfig) -> tuple[np.random.Generator, FloatArray]:
    for_prompts, for_ratings = (np.random.default_rng(child) for child in np.random.SeedSequence(config.seed).spawn(2))
    draws = for_ratings.standard_normal((config.bootstrap_replicates, board.height))
    return for_prompts, board.get_column("rating").to_numpy() + draws * rating_standard_errors(board)


def _reference_indices(matrix: ScoreMatrix, config: OffsetConfig, reference_models: Sequence[str]) -> list[int]:
    named = list(reference_models) or ([config.reference_model] if config.reference_model else [])
    if not named:
        raise ConfigError(
            f"offsets need a reference model whose offset is 0; name one of {name_models(matrix.policy_models)}"
        )
    unknown = [model for model in named if model not in matrix.policy_models]
    if unknown:
        raise ConfigError(
            f"the reference models {name_models(unknown)} have no scores; "
            f"choose from {name_models(matrix.policy_models)}"
        )
    return sorted({matrix.policy_models.index(model) for model in named})


def _estimate(value: float, replicates: FloatArray, confidence: float) -> Estimate:
    return percentile_estimate(value, replicates, confidence) if replicates.size else Estimate(value=value)
