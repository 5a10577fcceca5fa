"""Rendered texts to scores: the inner loop of scoring.

Texts go through the model in packed rows, where responses to one prompt share its computation, or, with models that cannot take
such rows, padded and sorted by length. Which of the two is decided by trying: a few of the very texts are scored alone the
plain way and together the packed way, and the packed way is taken only if it gives the same scores. How far the two are apart
is reported.
"""

import logging
import math
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from charm_core.errors import ModelError
from charm_core.reward_model.batching import token_budget_batches
from charm_core.reward_model.devices import Arriving
from charm_core.reward_model.last_layer import Trimmed
from charm_core.reward_model.loading import RewardModel
from charm_core.reward_model.network import Batch, collate, compile_layers, let_pack, pack, transformer_layers
from charm_core.reward_model.packing import PrefixGroup, packed_batches, prefix_groups
from charm_core.reward_model.rendering import Rendered

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with (texts scored so far, texts to score)."""

CPU_BATCH_TOKENS = 4096
MOST_BATCH_TOKENS = 65536
"""More tokens at once make no GPU faster."""
PROBE_OWNERS, PROBE_TEXTS = 3, 3
TOLERANCE = {torch.float32: 1e-5}
LOW_PRECISION_TOLERANCE = 2**-5
"""Of the largest score. More is rounding only where padded batches move scores about as much."""
PADDED_DRIFT = 4
MOST_REASON = 300
"""Characters; errors of kernels can be pages long."""
TRIMMED_DRIFT, TRIMMED_TOLERANCE = 4, 1e-6
"""A last layer that is trimmed wrongly changes scores altogether; rightly, by another order of the same sums."""
IN_FLIGHT = 2
"""Batches that a GPU is working on: while it does the second, scores of the first are read and the next is laid out."""


@dataclass(frozen=True, kw_only=True)
class TextScores:
    """Scores of texts, and what it took."""

    values: list[float]
    computed_tokens: int
    """Tokens that went through the model: padding included, what is shared once."""


@dataclass(frozen=True, kw_only=True)
class BatchingCheck:
    """What trying a few texts both ways has shown."""

    texts: int
    drift: float
    """Largest difference between a text's score in a batch and alone."""
    refusal: str | None
    """Why rows are not packed; None: they are."""


def choose_batching(
    model: RewardModel,
    texts: Sequence[Rendered],
    owners: Sequence[Hashable],
    *,
    compiled: bool = False,
    trimmed: bool = True,
) -> tuple[RewardModel, BatchingCheck]:
    """Find out whether a model can take packed rows, by trying, and make it take them.

    Args:
        model: As it was loaded. The network of the one that is returned is the same object and takes only packed rows if the
            returned one is packed.
        texts: What will be scored.
        owners: Per text what it belongs to; see ``prefix_groups``.
        compiled: Compile the layers, if rows are packed.
        trimmed: Compute the last layer only where it is read, if rows are packed and nothing is compiled, which would be done
            anew for every number of texts.

    Raises:
        ModelError: Packed rows are asked for and cannot be had.
    """
    budget = batch_tokens(model)
    probe = _probe(texts, owners, budget)
    some, whose = [texts[index] for index in probe], [owners[index] for index in probe]
    alone = [_score_alone(model, text) for text in some]
    check = _try_packing(model, some, whose, alone, trimmed=trimmed and not compiled)
    if check.refusal is None:
        packed = replace(model, packed=True, row_tokens=budget if compiled else None)
        if compiled:
            compile_layers(model.network)
            check = replace(check, drift=_drift(packed, some, whose, alone))
        return packed, check
    if model.spec.batching == "packed":
        raise ModelError(
            f"the reward model {model.spec.path!r} cannot take packed rows: {check.refusal}; set batching='auto'"
        )
    if compiled:
        logger.warning("layers are not compiled, because texts are padded: %s", check.refusal)
    return model, check


def _set_otherwise(model: RewardModel) -> str | None:
    spec = model.spec
    if spec.strict:
        return "strict scores every text alone"
    if spec.batching == "padded":
        return "batching is 'padded'"
    return None if spec.attention == "auto" else f"attention is {spec.attention!r}"


def _try_packing(
    model: RewardModel, some: Sequence[Rendered], whose: Sequence[Hashable], alone: Sequence[float], *, trimmed: bool
) -> BatchingCheck:
    """Score some texts in a packed row; from then on the network takes only such rows, or none."""
    if (refusal := _set_otherwise(model)) is not None:
        return _padded_check(model, some, alone, refusal)
    transformer = model.network.packable
    if transformer is None:
        return _padded_check(model, some, alone, "this kind of reward model takes no packed rows")
    before = transformer.config._attn_implementation
    if not let_pack(model.network):
        refusal = "its transformer does not get its attention through transformers' interface"
        return _padded_check(model, some, alone, refusal)
    drift, refusal = _tried(model, some, whose, alone)
    bound = max(1.0, *map(abs, alone)) * TOLERANCE.get(transformer.dtype, LOW_PRECISION_TOLERANCE)
    if drift > bound:
        # rounding alone, if texts move as much with other texts in a padded batch
        transformer.set_attn_implementation(before)
        bound = max(bound, PADDED_DRIFT * _padded_check(model, some, alone, refusal).drift)
        let_pack(model.network)
    if drift <= bound:
        if trimmed:
            drift = _try_trimming(model, some, whose, alone, drift)
        return BatchingCheck(texts=len(some), drift=drift, refusal=None)
    transformer.set_attn_implementation(before)
    logger.warning("texts are padded, not packed: %s", refusal)
    return _padded_check(model, some, alone, refusal)


def _try_trimming(
    model: RewardModel, some: Sequence[Rendered], whose: Sequence[Hashable], alone: Sequence[float], drift: float
) -> float:
    """Compute the last layer only where it is read, if that changes no score by more than packing does; the drift then."""
    trimmed = Trimmed(transformer_layers(model.network.packable)[-1])
    then, _ = _tried(model, some, whose, alone)
    if then <= max(TRIMMED_DRIFT * drift, TRIMMED_TOLERANCE * max(map(abs, alone))):
        return then
    trimmed.undo()
    return drift


def _tried(
    model: RewardModel, some: Sequence[Rendered], whose: Sequence[Hashable], alone: Sequence[float]
) -> tuple[float, str]:
    """How far scores in a packed row are off, and how to say so."""
    try:
        drift = _drift(replace(model, packed=True), some, whose, alone)
    except (ModelError, TypeError, RuntimeError) as error:
        return math.nan, str(error).split("\n")[0][:MOST_REASON]
    return drift, f"a score in a packed row is off by {drift:.2g}"


def _padded_check(model: RewardModel, some: Sequence[Rendered], alone: Sequence[float], refusal: str) -> BatchingCheck:
    """The same for padded batches, as they will be; those that do not fit into memory show nothing."""
    if model.spec.strict:
        return BatchingCheck(texts=len(some), drift=0.0, refusal=refusal)
    apart: list[float] = []
    for batch in plan_batches(model, some, groups_of(model, some, range(len(some))), batch_tokens(model)):
        numbers = [number for group in batch for number in group.texts]
        scores = _forward_if_it_fits(model, batch, some)
        if scores is not None:
            apart += [abs(score - alone[number]) for number, score in zip(numbers, scores.tolist(), strict=True)]
    return BatchingCheck(texts=len(apart), drift=max(apart, default=0.0), refusal=refusal)


def _drift(model: RewardModel, some: Sequence[Rendered], whose: Sequence[Hashable], alone: Sequence[float]) -> float:
    """Largest difference between scores in one packed row and alone."""
    groups = groups_of(model, some, whose)
    values: list[float] = _forward(model, groups, some).tolist()
    packed = dict(zip((text for group in groups for text in group.texts), values, strict=True))
    return max(abs(packed[number] - value) for number, value in enumerate(alone))


def _probe(texts: Sequence[Rendered], owners: Sequence[Hashable], budget: int) -> list[int]:
    """Texts to try: some of the owner of the longest, for windows that only long ones reach, and some of others.

    Those beside the longest are left out where all would be more than a batch.
    """
    longest = max(range(len(texts)), key=lambda index: len(texts[index].input_ids))
    chosen = list(dict.fromkeys([owners[longest], *owners]))[:PROBE_OWNERS]
    found = []
    for owner in chosen:
        own = [index for index, other in enumerate(owners) if other == owner]
        found.extend(sorted(own, key=lambda index: index != longest)[:PROBE_TEXTS])
    room = max(0, budget - len(texts[longest].input_ids))
    kept = [longest]
    for index in found:
        if index != longest and len(texts[index].input_ids) <= room:
            room -= len(texts[index].input_ids)
            kept.append(index)
    return kept


def score_texts(
    model: RewardModel,
    texts: Sequence[Rendered],
    owners: Sequence[Hashable] | None = None,
    progress: Progress | None = None,
) -> list[float]:
    """Score rendered texts; scores in the order of the texts. See ``run_texts``."""
    return run_texts(model, texts, owners, progress).values


def run_texts(
    model: RewardModel,
    texts: Sequence[Rendered],
    owners: Sequence[Hashable] | None = None,
    progress: Progress | None = None,
) -> TextScores:
    """Score rendered texts in batches under ``model.spec.batch_tokens``.

    A batch that does not fit into the GPU's memory is halved, and so is every later one of its size.

    Args:
        model: See ``choose_batching``; as loaded, it gets padded batches.
        texts: What to score.
        owners: Per text what it belongs to, such as its prompt; default: nothing is shared.
        progress: Called now and then.

    Raises:
        ModelError: One text alone does not fit into memory.
    """
    groups = groups_of(model, texts, range(len(texts)) if owners is None else owners)
    budget = batch_tokens(model)
    waiting = deque(plan_batches(model, texts, groups, budget))
    values = [0.0] * len(texts)
    running: deque[tuple[list[int], Arriving]] = deque()
    done = computed = 0
    while waiting or running:
        if waiting and len(running) < IN_FLIGHT:
            batch = waiting.popleft()
            size = batch_size(model, batch, texts)
            if size > budget and _texts(batch) > 1:
                waiting.extendleft(reversed(_halves(batch)))
                continue
            scores = _forward_if_it_fits(model, batch, texts)
            if scores is None:
                if _texts(batch) == 1:
                    raise _too_long(model, size)
                torch.cuda.empty_cache()
                budget = size // 2
                logger.warning("out of memory with %d tokens at once; going on with %d", size, budget)
                waiting.appendleft(batch)
                continue
            computed += _row_size(model, size)
            running.append(([index for group in batch for index in group.texts], Arriving(scores)))
            continue
        numbers, arriving = running.popleft()
        for index, score in zip(numbers, arriving.wait(), strict=True):
            values[index] = score
        done += len(numbers)
        if progress is not None:
            progress(done, len(texts))
    return TextScores(values=values, computed_tokens=computed)


def groups_of(model: RewardModel, texts: Sequence[Rendered], owners: Sequence[Hashable]) -> list[PrefixGroup]:
    """Which texts share what: nothing where the model looks ahead or takes no packed rows."""
    if model.network.packable is None or model.network.looks_ahead or model.spec.strict:
        return [_single(number) for number in range(len(texts))]
    return prefix_groups([text.input_ids for text in texts], owners)


def plan_batches(
    model: RewardModel, texts: Sequence[Rendered], groups: Sequence[PrefixGroup], budget: int
) -> list[list[PrefixGroup]]:
    """Which texts go through the model together."""
    if model.spec.strict:
        return [[group] for group in groups]
    lengths = [len(text.input_ids) for text in texts]
    if model.packed:
        return packed_batches(groups, lengths, budget)
    return [[_single(index) for index in batch] for batch in token_budget_batches(lengths, budget)]


def batch_size(model: RewardModel, batch: Sequence[PrefixGroup], texts: Sequence[Rendered]) -> int:
    """Tokens that a batch makes the model compute."""
    if model.packed:
        return sum(
            group.shared + sum(len(texts[index].input_ids) - group.shared for index in group.texts) for group in batch
        )
    return _texts(batch) * max(len(texts[index].input_ids) for group in batch for index in group.texts)


def batch_tokens(model: RewardModel) -> int:
    """Most tokens in one batch: as set, or what the memory that is free allows; of compiled layers always the same."""
    if model.row_tokens is not None:
        return model.row_tokens
    if model.spec.batch_tokens != "auto":
        return model.spec.batch_tokens
    if model.device.type != "cuda":
        return CPU_BATCH_TOKENS
    free, _ = torch.cuda.mem_get_info(model.device)
    reserved = torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
    return budget_in(free + reserved, bytes_per_token(model))


def budget_in(free: int, per_token: int) -> int:
    """Tokens for which half of the free memory is enough: the estimate is rough, and a miss costs a batch."""
    return max(1, min(MOST_BATCH_TOKENS, free // 2 // per_token))


def bytes_per_token(model: RewardModel) -> int:
    """Memory that a token takes in one layer: its states, keys, values, and three times the width between."""
    transformer = model.network.packable or model.network
    embedding, *layers = (weight for weight in transformer.parameters() if weight.ndim == 2)
    widest = max(max(layer.shape) for layer in layers)
    return int((3 * widest + 12 * min(embedding.shape)) * embedding.element_size())


def inputs_of(model: RewardModel, batch: Sequence[PrefixGroup], texts: Sequence[Rendered]) -> Batch:
    """What the network gets for a batch; its scores are in the order of the groups' texts."""
    if model.packed:
        size = _row_size(model, batch_size(model, batch, texts))
        return pack(batch, texts, model.device, model.network, size)
    together = [texts[index] for group in batch for index in group.texts]
    return collate(together, model.pad_token_id, model.device, model.network)


def _row_size(model: RewardModel, tokens: int) -> int:
    """Of compiled layers one of a few sizes, since they are compiled anew for each: parts of the longest row, or multiples of it."""
    longest = model.row_tokens
    if longest is None:
        return tokens
    parts = (max(1, longest // part) for part in _ROW_PARTS)
    return next((size for size in parts if tokens <= size), -(-tokens // longest) * longest)


_ROW_PARTS = (8, 4, 2, 1)


def _forward(model: RewardModel, batch: Sequence[PrefixGroup], texts: Sequence[Rendered]) -> Tensor:
    with torch.inference_mode():
        scores: Tensor = model.network(**inputs_of(model, batch, texts))
    return scores


def _score_alone(model: RewardModel, text: Rendered) -> float:
    scores = _forward_if_it_fits(model, [_single(0)], [text])
    if scores is None:
        raise _too_long(model, len(text.input_ids))
    return float(scores[0].item())


def _too_long(model: RewardModel, tokens: int) -> ModelError:
    return ModelError(
        f"a text of {tokens} tokens does not fit into the GPU's memory beside the reward model {model.spec.path!r}; lower "
        "max_length, or use a GPU with more memory"
    )


def _forward_if_it_fits(model: RewardModel, batch: Sequence[PrefixGroup], texts: Sequence[Rendered]) -> Tensor | None:
    """None: out of memory. What the attempt held is free again only here, outside of the error's frames."""
    try:
        return _forward(model, batch, texts)
    except torch.OutOfMemoryError:
        return None


def _single(index: int) -> PrefixGroup:
    return PrefixGroup(texts=(index,), shared=0)


def _texts(batch: Sequence[PrefixGroup]) -> int:
    return sum(len(group.texts) for group in batch)


def _halves(batch: Sequence[PrefixGroup]) -> list[list[PrefixGroup]]:
    """A batch in two: its groups, or the texts of its only one."""
    if len(batch) > 1:
        middle = len(batch) // 2
        return [list(batch[:middle]), list(batch[middle:])]
    group = batch[0]
    middle = len(group.texts) // 2
    return [[replace(group, texts=part)] for part in (group.texts[:middle], group.texts[middle:])]
