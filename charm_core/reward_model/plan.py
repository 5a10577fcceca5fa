"""Which pairs are trained on in which step: decided in full before training, from the pairs and the seed alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import polars as pl

from charm_core.errors import TableError
from charm_core.reward_model.batching import PairGroup
from charm_core.reward_model.rendering import Rendered, render
from charm_core.reward_model.spec import RewardModelSpec, TrainingConfig
from charm_core.tables import PAIRS, validate


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Rendered texts and the pairs among them."""

    texts: tuple[Rendered, ...]
    lengths: tuple[int, ...]
    """Tokens per text."""
    train: tuple[PairGroup, ...]
    """All training pairs, one group per prompt, ordered by prompt id."""
    held_out: tuple[PairGroup, ...]
    margins: np.ndarray
    """Calibrated chosen minus rejected, per row of the pairs table."""
    levels: np.ndarray
    """Mean of both calibrated scores, per row of the pairs table."""


def prepare(pairs: pl.DataFrame, tokenizer: Any, spec: RewardModelSpec) -> TrainingData:
    """Render every distinct response of every prompt once and group the pairs by prompt.

    Raises:
        TableError: Not PAIRS, no training pair, an unknown split, a chosen or rejected side that is not one message, or a
            prompt that has two texts or lies in both splits.
    """
    table = validate(pairs, PAIRS)
    _check_pairs(table)
    texts: list[Rendered] = []
    groups: dict[str, list[PairGroup]] = {"train": [], "held_out": []}
    rows = table.select("prompt_id", "split", "prompt", "chosen", "rejected").rows()
    for prompt_id, numbered in groupby(enumerate(rows), key=lambda row: row[1][0]):
        numbers, members = zip(*numbered, strict=True)
        _, split, prompt = members[0][:3]
        known: dict[str, int] = {}
        sides = [(row[3][0]["content"], row[4][0]["content"]) for row in members]
        indices = tuple((known.setdefault(a, len(known)), known.setdefault(b, len(known))) for a, b in sides)
        positions = tuple(range(len(texts), len(texts) + len(known)))
        groups[split].append(PairGroup(prompt_id=prompt_id, texts=positions, pairs=indices, rows=numbers))
        texts.extend(render(tokenizer, prompt, response, spec) for response in known)
    calibrated = table.select("chosen_calibrated", "rejected_calibrated").to_numpy()
    return TrainingData(
        texts=tuple(texts),
        lengths=tuple(len(text.input_ids) for text in texts),
        train=tuple(groups["train"]),
        held_out=tuple(groups["held_out"]),
        margins=calibrated[:, 0] - calibrated[:, 1],
        levels=calibrated.mean(axis=1),
    )


def plan_steps(
    groups: Sequence[PairGroup], config: TrainingConfig, lengths: Sequence[int] = ()
) -> list[list[PairGroup]]:
    """Order the prompts and cut them into steps.

    Every epoch takes the prompts in a new order, drawn from the seed, and is cut evenly into as many steps as
    ``pairs_per_step`` or ``tokens_per_step`` makes it: a short last step would be a noisy one. No step has more pairs or
    tokens than that, but for a prompt that has more by itself. A fraction of an epoch takes that share of the prompts, at
    least one.

    Args:
        groups: All training pairs, one group per prompt.
        config: ``epochs``, ``pairs_per_step``, ``tokens_per_step`` and ``seed`` matter.
        lengths: Tokens per text; needed for ``tokens_per_step``.

    Returns:
        The groups of each step.
    """
    steps: list[list[PairGroup]] = []
    for epoch in range(math.ceil(config.epochs)):
        share = min(1.0, config.epochs - epoch)
        order = np.random.default_rng([config.seed, epoch]).permutation(len(groups))
        taken = [groups[index] for index in order[: max(1, round(share * len(groups)))]]
        if config.tokens_per_step is None:
            steps.extend(_cut(taken, [len(group.pairs) for group in taken], config.pairs_per_step))
        else:
            tokens = [sum(lengths[text] for text in group.texts) for group in taken]
            steps.extend(_cut(taken, tokens, config.tokens_per_step))
    return steps


def learning_rate_factor(step: int, steps: int, config: TrainingConfig) -> float:
    """Share of the peak learning rate that step ``step`` (from 0) of ``steps`` uses.

    The warm-up takes ``ceil(warmup_ratio * steps)`` steps and its first step is not lost: step 0 of w warm-up steps has
    1/w. The decay then reaches 0 one step after the last, so that the last step still learns.
    """
    warmup = math.ceil(config.warmup_ratio * steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    if config.schedule == "constant":
        return 1.0
    return 1 - progress if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))


def _cut(groups: Sequence[PairGroup], sizes: Sequence[int], most: int) -> list[list[PairGroup]]:
    """Cut groups of these sizes, in their order, into steps of about the same size and of at most ``most``."""
    total = sum(sizes)
    share = total / math.ceil(total / most)
    steps: list[list[PairGroup]] = []
    in_step = before = 0
    for group, size in zip(groups, sizes, strict=True):
        # a prompt belongs to the step in whose share its middle lies
        due = int((before + size / 2) / share) + 1
        if not steps or (len(steps) < due and in_step) or in_step + size > most:
            steps.append([])
            in_step = 0
        steps[-1].append(group)
        in_step += size
        before += size
    return steps


def _check_pairs(table: pl.DataFrame) -> None:
    unknown = table.filter(~pl.col("split").is_in(["train", "held_out"]))
    if not unknown.is_empty():
        raise TableError(f"the pairs table has the split {unknown['split'][0]!r}; it must be 'train' or 'held_out'")
    if table.filter(pl.col("split") == "train").is_empty():
        raise TableError("the pairs table has no pair whose split is 'train', so there is nothing to train on")
    for side in ("chosen", "rejected"):
        odd = table.filter(pl.col(side).list.len() != 1)
        if not odd.is_empty():
            raise TableError(
                f"{side!r} of prompt {odd['prompt_id'][0]!r} in the pairs table has {odd[side].list.len()[0]} messages; it must be "
                "one, the response"
            )
    per_prompt = table.group_by("prompt_id").agg(pl.col("split").n_unique(), pl.col("prompt").n_unique())
    for column, what in (("split", "lies in both splits"), ("prompt", "has two different texts")):
        bad = per_prompt.filter(pl.col(column) > 1)["prompt_id"].sort()
        if not bad.is_empty():
            raise TableError(f"prompt {bad[0]!r} {what} in the pairs table ({bad.len()} such prompts)")
