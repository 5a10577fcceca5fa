"""Debiased preference pairs (METHOD.md section 3).

A calibrated score is the raw score plus the offset of the response's policy model; of a pair, the higher one is chosen.
The control is the same call with all offsets 0: then the labels are the reward model's own.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import polars as pl
from pydantic import Field

from charm_core.errors import ConfigError, TableError
from charm_core.offsets import check_offsets
from charm_core.records import Record
from charm_core.selection import Selection
from charm_core.tables import PAIRS, PROMPTS, RESPONSES, SCORES, validate

_SIDE = ["policy_model", "score", "calibrated", "response"]


class PreferenceConfig(Record):
    """Which pairs to form."""

    strategy: Literal["overvalued_vs_reference", "extremes", "all_pairs"] = Field(
        "overvalued_vs_reference",
        description="Each overvalued model against each reference model; the best against the worst of each prompt; "
        "or all pairs.",
    )
    held_out_fraction: float = Field(0.1, ge=0.0, lt=1.0, description="Share of prompts kept from training.")
    min_margin: float = Field(0.0, ge=0.0, description="Smallest calibrated margin, in the reward model's unit.")
    max_pairs_per_prompt: int | None = Field(
        None, ge=1, description="Random pairs to keep of each prompt; the same ones whatever the offsets."
    )
    max_pairs: int | None = Field(
        None, ge=1, description="At most so many pairs in all: of random prompts, the same ones whatever the offsets."
    )
    seed: int = Field(0, ge=0, description="Seed of the split and of the random pairs and prompts.")


class PairSummary(Record):
    """What became of the candidate pairs."""

    strategy: str
    pairs: int
    train: int
    held_out: int
    train_prompts: int
    held_out_prompts: int
    flipped: int = Field(description="Pairs whose raw scores have the opposite order.")
    flip_rate: float = Field(description="Of the pairs kept; 0 if there are none.")
    ties_dropped: int = Field(description="Equal calibrated scores.")
    identical_dropped: int = Field(description="Equal texts.")
    small_margin_dropped: int
    over_limit_dropped: int
    median_margin: float | None


@dataclass(frozen=True, kw_only=True)
class PreferencePairs:
    """Training records and what they are made of."""

    frame: pl.DataFrame
    """PAIRS."""
    summary: PairSummary


def build_preference_pairs(
    prompts: pl.DataFrame,
    responses: pl.DataFrame,
    scores: pl.DataFrame,
    offsets: Mapping[str, float],
    config: PreferenceConfig | None = None,
    selection: Selection | None = None,
) -> PreferencePairs:
    """Form preference pairs from calibrated scores.

    Equal calibrated scores and equal texts give no pair. A pair counts as flipped if its raw scores have the opposite
    order; a raw tie that the offsets break does not. Which candidates ``max_pairs_per_prompt`` keeps does not depend
    on the offsets (except with ``extremes``, where the candidates do), so that the control has the same ones.

    Args:
        prompts: A PROMPTS frame that holds every scored prompt.
        responses: A RESPONSES frame that holds every scored response.
        scores: A SCORES frame; missing cells are allowed.
        offsets: Offset by policy model.
        config: Settings.
        selection: Overvalued and reference models, for the strategy that needs them.

    Raises:
        TableError: A bad table, or a score whose prompt or response is missing.
        ConfigError: A policy model without an offset, or no selection where one is needed.
    """
    settings = config or PreferenceConfig()
    asked = validate(prompts, PROMPTS)
    cells = _calibrated_cells(
        asked, validate(responses, RESPONSES), validate(scores, SCORES), offsets, settings, selection
    )
    candidates = _candidates(cells, settings, selection)
    limited = _limited(candidates, settings)
    different = limited.filter(pl.col("response") != pl.col("response_other"))
    ordered = _oriented(different)
    untied = ordered.filter(pl.col("margin") > 0)
    kept = untied.filter(pl.col("margin") >= settings.min_margin)
    frame = _as_pairs(kept, asked, settings)
    return PreferencePairs(
        frame=frame,
        summary=_summary(
            frame,
            settings.strategy,
            over_limit_dropped=candidates.height - limited.height,
            identical_dropped=limited.height - different.height,
            ties_dropped=ordered.height - untied.height,
            small_margin_dropped=untied.height - kept.height,
        ),
    )


def split_prompts(prompts: pl.DataFrame, held_out_fraction: float, seed: int = 0) -> pl.DataFrame:
    """Assign each prompt to ``train`` or ``held_out`` by a hash of its text.

    The split does not depend on ids, order or other prompts: two ids with one text are never on two sides, and adding
    prompts moves none.

    Args:
        prompts: A PROMPTS frame.
        held_out_fraction: Expected share of held-out prompts.
        seed: Another seed gives another split.

    Returns:
        prompt_id, split.
    """
    rows = zip(prompts.get_column("prompt_id"), prompts.get_column("messages").to_list(), strict=True)
    sides = [
        (name, "held_out" if _position(messages, seed) < held_out_fraction else "train") for name, messages in rows
    ]
    return pl.DataFrame(sides, schema={"prompt_id": pl.String, "split": pl.String}, orient="row")


def _position(messages: list[dict[str, str]], seed: int) -> float:
    text = json.dumps([seed, [[message["role"], message["content"]] for message in messages]], ensure_ascii=False)
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _calibrated_cells(
    prompts: pl.DataFrame,
    responses: pl.DataFrame,
    scores: pl.DataFrame,
    offsets: Mapping[str, float],
    config: PreferenceConfig,
    selection: Selection | None,
) -> pl.DataFrame:
    used = scores
    if config.strategy == "overvalued_vs_reference":
        overvalued, references = _sides(selection)
        used = scores.filter(pl.col("policy_model").is_in([*overvalued, *references]))
    _check_found(used.join(prompts, on="prompt_id", how="anti"), "prompt", "prompts")
    _check_found(used.join(responses, on=["prompt_id", "policy_model"], how="anti"), "response", "responses")
    check_offsets(offsets, used.get_column("policy_model").unique().sort().to_list())
    known = pl.DataFrame(
        {"policy_model": list(offsets), "offset": [float(value) for value in offsets.values()]},
        schema={"policy_model": pl.String, "offset": pl.Float64},
    )
    return (
        used.join(known, on="policy_model")
        .join(responses, on=["prompt_id", "policy_model"])
        .select(
            "prompt_id", "policy_model", "score", (pl.col("score") + pl.col("offset")).alias("calibrated"), "response"
        )
        .sort("prompt_id", "policy_model")
    )


def _sides(selection: Selection | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    if selection is None or not selection.overvalued or not selection.references:
        raise ConfigError(
            "the strategy 'overvalued_vs_reference' needs at least one overvalued and one reference model; "
            "name them, or use the strategy 'all_pairs' or 'extremes'"
        )
    return selection.overvalued_models, selection.reference_models


def _check_found(missing: pl.DataFrame, what: str, table: str) -> None:
    if not missing.is_empty():
        first = missing.select("prompt_id", "policy_model").row(0, named=True)
        raise TableError(
            f"{missing.height} scores have no {what} in the {table} table, first {first}; "
            f"use the {table} that were scored"
        )


def _candidates(cells: pl.DataFrame, config: PreferenceConfig, selection: Selection | None) -> pl.DataFrame:
    if config.strategy == "extremes":
        ranked = cells.sort(["prompt_id", "calibrated", "policy_model"], descending=[False, True, False])
        several = ranked.filter(pl.len().over("prompt_id") > 1)
        best = several.group_by("prompt_id", maintain_order=True).first()
        worst = several.group_by("prompt_id", maintain_order=True).last()
        return best.join(worst, on="prompt_id", suffix="_other")
    if config.strategy == "all_pairs":
        pairs = cells.join(cells, on="prompt_id", suffix="_other")
        pairs = pairs.filter(pl.col("policy_model") < pl.col("policy_model_other"))
    else:
        overvalued, references = _sides(selection)
        pairs = cells.filter(pl.col("policy_model").is_in(overvalued)).join(
            cells.filter(pl.col("policy_model").is_in(references)), on="prompt_id", suffix="_other"
        )
    return pairs.sort("prompt_id", "policy_model", "policy_model_other")


def _limited(candidates: pl.DataFrame, config: PreferenceConfig) -> pl.DataFrame:
    if config.max_pairs_per_prompt is not None:
        draw = pl.Series("draw", np.random.default_rng(config.seed).permutation(candidates.height))
        rank = pl.col("draw").rank("ordinal").over("prompt_id")
        candidates = candidates.with_columns(draw).filter(rank <= config.max_pairs_per_prompt).drop("draw")
    return candidates if config.max_pairs is None else _of_random_prompts(candidates, config.max_pairs, config.seed)


def _of_random_prompts(candidates: pl.DataFrame, most: int, seed: int) -> pl.DataFrame:
    """Whole prompts, for what a pair teaches is said against the others of its prompt; only the last may lose pairs."""
    prompts = candidates.get_column("prompt_id").unique().sort()
    order = pl.DataFrame({"prompt_id": prompts, "place": np.random.default_rng(seed).permutation(prompts.len())})
    placed = candidates.join(order, on="prompt_id").sort("place", "policy_model", "policy_model_other")
    return placed.head(most).drop("place").sort("prompt_id", "policy_model", "policy_model_other")


def _oriented(pairs: pl.DataFrame) -> pl.DataFrame:
    """Chosen and rejected columns; the margin is 0 for a tie."""
    first = pl.col("calibrated") >= pl.col("calibrated_other")
    sides = [
        pl.when(first).then(pl.col(f"{name}{own}")).otherwise(pl.col(f"{name}{other}")).alias(f"{side}_{name}")
        for side, own, other in (("chosen", "", "_other"), ("rejected", "_other", ""))
        for name in _SIDE
    ]
    oriented = pairs.select("prompt_id", *sides)
    return oriented.with_columns(
        (pl.col("chosen_calibrated") - pl.col("rejected_calibrated")).alias("margin"),
        (pl.col("chosen_score") < pl.col("rejected_score")).alias("flipped"),
    )


def _as_pairs(kept: pl.DataFrame, prompts: pl.DataFrame, config: PreferenceConfig) -> pl.DataFrame:
    split = split_prompts(prompts, config.held_out_fraction, config.seed)
    joined = kept.join(prompts, on="prompt_id").join(split, on="prompt_id")
    frame = joined.select(
        "prompt_id",
        "split",
        pl.col("messages").alias("prompt"),
        _conversation("chosen"),
        _conversation("rejected"),
        pl.col("chosen_policy_model").alias("chosen_model"),
        pl.col("rejected_policy_model").alias("rejected_model"),
        "chosen_score",
        "rejected_score",
        "chosen_calibrated",
        "rejected_calibrated",
        "margin",
        "flipped",
    )
    return validate(frame, PAIRS)


def _conversation(side: str) -> pl.Expr:
    message = pl.struct(pl.lit("assistant").alias("role"), pl.col(f"{side}_response").alias("content"))
    return pl.concat_list(message).alias(side)


def _summary(
    frame: pl.DataFrame,
    strategy: str,
    *,
    over_limit_dropped: int,
    identical_dropped: int,
    ties_dropped: int,
    small_margin_dropped: int,
) -> PairSummary:
    train, held_out = (frame.filter(pl.col("split") == side) for side in ("train", "held_out"))
    flipped = int(frame.get_column("flipped").sum())
    return PairSummary(
        strategy=strategy,
        pairs=frame.height,
        train=train.height,
        held_out=held_out.height,
        train_prompts=train.get_column("prompt_id").n_unique(),
        held_out_prompts=held_out.get_column("prompt_id").n_unique(),
        flipped=flipped,
        flip_rate=flipped / frame.height if frame.height else 0.0,
        ties_dropped=ties_dropped,
        identical_dropped=identical_dropped,
        small_margin_dropped=small_margin_dropped,
        over_limit_dropped=over_limit_dropped,
        median_margin=float(np.median(frame.get_column("margin").to_numpy())) if frame.height else None,
    )
