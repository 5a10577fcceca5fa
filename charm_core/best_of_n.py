"""Best-of-n: what a reward model picks from n responses to one prompt, in exact expectation over the draw of the n.

Of K candidate responses to a prompt, n are drawn without replacement and the one with the highest score is picked; equal
scores share the pick. Nothing is simulated: with ``b`` candidates scored below a response and ``t`` others scored like it,
it is picked in ``(C(b + t + 1, n) - C(b, n)) / (t + 1)`` of the ``C(K, n)`` draws. At n = 1 every reward model picks alike;
at n = K it picks its favourite. Larger n is more selection pressure, which is what brings a bias out.

A candidate is a row of RESPONSES. Several samples of one policy model are candidates ``name#1``, ``name#2``, ...: see
``sample_name``.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field
from scipy.special import comb

from charm_core.errors import RatingsError, TableError
from charm_core.records import Estimate, Record
from charm_core.resampling import FloatArray, bootstrap_weights, percentile_estimate
from charm_core.tables import PREFERENCES, RATINGS, RESPONSES, SCORES, validate

Measure = Literal["rating", "length", "judge", "judge's best", "quality", "truly best"]
"""Of the picked response: Elo of its policy model; characters; the judge's mean preference for it; how often none of the n is
preferred by the judge; its true quality; how often none of the n is truly better."""

_BLOCK_CELLS = 20_000_000
_SAMPLE = re.compile(r"#\d+$")


class BestOfNConfig(Record):
    """For which n."""

    sizes: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(1, 2, 4, 8, 16, 32), description="Values of n; those above the number of candidates are left out."
    )
    bootstrap_replicates: int = Field(default=1000, ge=2, description="Resamples of the prompts.")
    confidence: float = Field(default=0.95, gt=0, lt=1, description="Coverage of the intervals.")
    seed: int = Field(default=0, ge=0, description="Seed of the resamples, which all reward models share.")


class PickedValue(Record):
    """What one reward model's picks are worth by one measure."""

    scorer: str = Field(description="The reward model.")
    n: int
    measure: Measure
    value: Estimate = Field(description="Mean over prompts.")
    best_possible: float | None = Field(
        default=None, description="Of somebody who picks by the measure itself; none for length."
    )
    prompts: int = Field(description="Prompts on which all candidates have the measure.")


class PickedDifference(Record):
    """Two reward models' picks on the same prompts; after minus before."""

    before: str
    after: str
    n: int
    measure: Measure
    difference: Estimate


class PickedShare(Record):
    """How often a policy model's responses are picked."""

    scorer: str
    n: int
    policy_model: str
    share: float


class BestOfNReport(Record):
    """Best-of-n of some reward models on the same candidates."""

    candidates: int = Field(description="Responses per prompt, K.")
    prompts: int
    prompts_left_out: int = Field(description="Prompts that lack a score of a candidate.")
    policy_models: tuple[str, ...]
    values: tuple[PickedValue, ...]
    differences: tuple[PickedDifference, ...]
    shares: tuple[PickedShare, ...]


@dataclass(frozen=True, kw_only=True)
class Known:
    """What is known of the candidates beside their scores; each adds measures."""

    ratings: pl.DataFrame | None = None
    """RATINGS of the policy models."""
    preferences: pl.DataFrame | None = None
    """PREFERENCES of a judge: against one common opponent, or among all candidates of a prompt."""
    quality: pl.DataFrame | None = None
    """SCORES whose score is the true quality."""


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """One measure of the candidates, and over which of the prompts."""

    name: Measure
    values: FloatArray
    """Shape (prompts, K)."""
    rows: NDArray[np.bool_]
    whether_best: bool = False

    def of(self, scores: FloatArray, n: int) -> FloatArray:
        """Expected value of the picks per prompt, shape (prompts,)."""
        values, picked = self.values[self.rows], scores[self.rows]
        if self.whether_best:
            return best_pick_rate(picked, values, n)
        return np.asarray((pick_probabilities(picked, n) * values).sum(axis=1))


def sample_name(policy_model: str, number: int) -> str:
    """What the ``number``-th sample of a policy model is called as a candidate, from 1."""
    return f"{policy_model}#{number}"


def policy_model_of(candidate: str) -> str:
    """The policy model of a candidate."""
    return _SAMPLE.sub("", candidate)


def pick_probabilities(scores: FloatArray, n: int) -> FloatArray:
    """How probably each candidate is picked from n drawn ones.

    Args:
        scores: Shape (prompts, K), finite.
        n: From 1 to K.

    Returns:
        Shape (prompts, K); rows sum to 1. Equal scores have equal probabilities.

    Raises:
        TableError: An n that no draw can have.
    """
    _check_size(scores, n)
    ordered = np.sort(scores, axis=1)
    below, up_to = (
        np.stack([np.searchsorted(row, cells, side) for row, cells in zip(ordered, scores, strict=True)])
        for side in ("left", "right")
    )
    return _share_of_draws(below, up_to - below - 1, scores.shape[1], n)


def best_pick_rate(scores: FloatArray, values: FloatArray, n: int) -> FloatArray:
    """How probably none of the n drawn candidates has a higher value than the one that is picked by score.

    With n = 2 and without ties this is the share of pairs that scores and values order alike. Equal values are equally good.

    Args:
        scores: Shape (prompts, K), finite.
        values: Likewise.
        n: From 1 to K.

    Returns:
        Shape (prompts,).

    Raises:
        TableError: An n that no draw can have.
    """
    _check_size(scores, n)
    prompts, candidates = scores.shape
    block = max(1, _BLOCK_CELLS // candidates**2)
    rates = []
    for start in range(0, prompts, block):
        part, worth = scores[start : start + block], values[start : start + block]
        not_better = worth[:, None, :] <= worth[:, :, None]
        below = (not_better & (part[:, None, :] < part[:, :, None])).sum(axis=2)
        tied = (not_better & (part[:, None, :] == part[:, :, None])).sum(axis=2) - 1
        rates.append(_share_of_draws(below, tied, candidates, n).sum(axis=1))
    return np.concatenate(rates)


def judge_values(preferences: pl.DataFrame) -> pl.DataFrame:
    """A judge's mean preference for each response over those that it was compared with.

    Fair among the responses to a prompt if they met the same opponents: one common opponent, or each other.

    Args:
        preferences: PREFERENCES.

    Returns:
        SCORES whose score, in [0, 1], is the mean preference. The common opponent has one too.
    """
    table = validate(preferences, PREFERENCES)
    sides = [
        table.select("prompt_id", pl.col("model_a").alias("policy_model"), pl.col("preference_a").alias("score")),
        table.select("prompt_id", pl.col("model_b").alias("policy_model"), (1 - pl.col("preference_a")).alias("score")),
    ]
    return validate(pl.concat(sides).group_by("prompt_id", "policy_model").agg(pl.col("score").mean()), SCORES)


def measure_best_of_n(
    scores: Mapping[str, pl.DataFrame],
    responses: pl.DataFrame,
    known: Known,
    config: BestOfNConfig | None = None,
    compared: Sequence[tuple[str, str]] = (),
) -> BestOfNReport:
    """What reward models pick from n responses per prompt, and what that is worth.

    Args:
        scores: SCORES by reward model. Candidates are the policy models that all of them scored; a prompt that lacks a score
            of a candidate is left out, so that all reward models choose among the same responses.
        responses: RESPONSES that were scored.
        known: Further measures.
        config: For which n.
        compared: Reward models to subtract, (before, after), paired by prompt.

    Returns:
        Intervals are over prompts; a rating counts as known.

    Raises:
        TableError: A bad table, a scored response without text, or no prompt of which all candidates are scored.
        RatingsError: A policy model without a rating.
    """
    settings = config or BestOfNConfig()
    tables = {name: validate(table, SCORES) for name, table in scores.items()}
    candidates = _common_candidates(tables)
    prompt_ids, all_prompts = _complete_prompts(tables, candidates)
    grids = {name: _grid(table, prompt_ids, candidates) for name, table in tables.items()}
    measures = _measures(prompt_ids, candidates, validate(responses, RESPONSES), known)
    sizes = sorted({n for n in settings.sizes if 1 <= n <= len(candidates)})
    found = [_picked(measure, grids, n, compared, settings) for measure in measures for n in sizes]
    return BestOfNReport(
        candidates=len(candidates),
        prompts=len(prompt_ids),
        prompts_left_out=all_prompts - len(prompt_ids),
        policy_models=tuple(sorted({policy_model_of(name) for name in candidates})),
        values=tuple(value for values, _ in found for value in values),
        differences=tuple(difference for _, differences in found for difference in differences),
        shares=tuple(
            share for name, grid in grids.items() for n in sizes for share in _shares(name, grid, candidates, n)
        ),
    )


def _picked(
    measure: _Measured,
    grids: Mapping[str, FloatArray],
    n: int,
    compared: Sequence[tuple[str, str]],
    config: BestOfNConfig,
) -> tuple[list[PickedValue], list[PickedDifference]]:
    """One measure of what every reward model picks from n."""
    per_prompt = {name: measure.of(grid, n) for name, grid in grids.items()}
    best = None if measure.name == "length" else float(measure.of(measure.values, n).mean())
    prompts = int(measure.rows.sum())
    weights = _resamples(prompts, config)
    values = [
        PickedValue(
            scorer=name,
            n=n,
            measure=measure.name,
            value=_mean(picks, weights, config),
            best_possible=best,
            prompts=prompts,
        )
        for name, picks in per_prompt.items()
    ]
    differences = [
        PickedDifference(
            before=before,
            after=after,
            n=n,
            measure=measure.name,
            difference=_mean(per_prompt[after] - per_prompt[before], weights, config),
        )
        for before, after in compared
    ]
    return values, differences


def _check_size(scores: FloatArray, n: int) -> None:
    if not 1 <= n <= scores.shape[1]:
        raise TableError(f"{n} of {scores.shape[1]} candidates cannot be drawn; n is from 1 to their number")


def _share_of_draws(below: NDArray[np.int64], tied: NDArray[np.int64], candidates: int, n: int) -> FloatArray:
    """Of all draws, those in which a response is picked, ties shared: see the top of this module."""
    picked = comb(below + tied + 1, n) - comb(below, n)
    return np.asarray(picked / (tied + 1) / comb(candidates, n), dtype=np.float64)


def _common_candidates(tables: Mapping[str, pl.DataFrame]) -> list[str]:
    if not tables:
        raise TableError("best-of-n needs the scores of at least one reward model")
    names = set.intersection(*(set(table.get_column("policy_model")) for table in tables.values()))
    if len(names) < 2:
        raise TableError(f"best-of-n needs at least two responses per prompt that all of {list(tables)} scored")
    return sorted(names)


def _complete_prompts(tables: Mapping[str, pl.DataFrame], candidates: Sequence[str]) -> tuple[list[str], int]:
    """Prompts of which every reward model scored every candidate, and how many prompts there are in all."""
    complete: list[set[str]] = []
    seen: set[str] = set()
    for table in tables.values():
        counted = table.filter(pl.col("policy_model").is_in(candidates)).group_by("prompt_id").len()
        complete.append(set(counted.filter(pl.col("len") == len(candidates)).get_column("prompt_id")))
        seen |= set(table.get_column("prompt_id"))
    common = set.intersection(*complete)
    if not common:
        raise TableError(
            f"of no prompt are all {len(candidates)} candidates scored; choose policy models that answered the same prompts"
        )
    return sorted(common), len(seen)


def _grid(table: pl.DataFrame, prompt_ids: Sequence[str], candidates: Sequence[str]) -> FloatArray:
    """A column ``score`` as (prompts, candidates); NaN where there is none."""
    cells = (
        pl.DataFrame({"prompt_id": prompt_ids}).join(pl.DataFrame({"policy_model": candidates}), how="cross")
    ).join(table, on=["prompt_id", "policy_model"], how="left", maintain_order="left")
    column = cells.get_column("score").cast(pl.Float64).fill_null(float("nan"))
    return column.to_numpy().reshape(len(prompt_ids), len(candidates))


def _measures(
    prompt_ids: Sequence[str], candidates: Sequence[str], responses: pl.DataFrame, known: Known
) -> list[_Measured]:
    characters = responses.select("prompt_id", "policy_model", pl.col("response").str.len_chars().alias("score"))
    lengths = _grid(characters, prompt_ids, candidates)
    if not np.isfinite(lengths).all():
        row, column = np.argwhere(~np.isfinite(lengths))[0]
        raise TableError(
            f"the scored response of {candidates[column]!r} to {prompt_ids[row]!r} is not in the responses table; use the "
            "responses that were scored"
        )
    everywhere = np.ones(len(prompt_ids), dtype=np.bool_)
    found = [_Measured(name="length", values=lengths, rows=everywhere)]
    if known.ratings is not None:
        ratings = np.tile(_ratings(candidates, known.ratings), (len(prompt_ids), 1))
        found.append(_Measured(name="rating", values=ratings, rows=everywhere))
    if known.preferences is not None:
        found += _with_best("judge", "judge's best", _grid(judge_values(known.preferences), prompt_ids, candidates))
    if known.quality is not None:
        found += _with_best("quality", "truly best", _grid(validate(known.quality, SCORES), prompt_ids, candidates))
    return found


def _with_best(name: Measure, best: Measure, values: FloatArray) -> list[_Measured]:
    """A measure's mean and how often the best is picked, on the prompts of which all candidates have it."""
    rows = np.asarray(np.isfinite(values).all(axis=1), dtype=np.bool_)
    if not rows.any():
        raise TableError(f"of no prompt do all candidates have the measure {name!r}; give it for the scored responses")
    return [
        _Measured(name=name, values=values, rows=rows),
        _Measured(name=best, values=values, rows=rows, whether_best=True),
    ]


def _ratings(candidates: Sequence[str], ratings: pl.DataFrame) -> FloatArray:
    board = dict(validate(ratings, RATINGS).select("policy_model", "rating").iter_rows())
    missing = sorted({policy_model_of(name) for name in candidates} - set(board))
    if missing:
        raise RatingsError(f"{missing} have no rating, so what picking them is worth is unknown; give their ratings")
    return np.array([board[policy_model_of(name)] for name in candidates], dtype=np.float64)


def _resamples(prompts: int, config: BestOfNConfig) -> list[FloatArray]:
    """The same for every reward model, which is how they are paired."""
    rng = np.random.default_rng(config.seed)
    blocks = bootstrap_weights(prompts, config.bootstrap_replicates, rng)
    return [block.astype(np.float64) / prompts for block in blocks]


def _mean(per_prompt: FloatArray, weights: Sequence[FloatArray], config: BestOfNConfig) -> Estimate:
    replicates = np.concatenate([block @ per_prompt for block in weights])
    return percentile_estimate(float(per_prompt.mean()), replicates, config.confidence)


def _shares(scorer: str, grid: FloatArray, candidates: Sequence[str], n: int) -> list[PickedShare]:
    shares: dict[str, float] = {}
    for name, share in zip(candidates, pick_probabilities(grid, n).mean(axis=0).tolist(), strict=True):
        shares[policy_model_of(name)] = shares.get(policy_model_of(name), 0.0) + share
    return [PickedShare(scorer=scorer, n=n, policy_model=name, share=share) for name, share in sorted(shares.items())]
