"""Attention over packed rows (see ``packing``), as an attention function of transformers.

Every model that gets its attention through transformers' interface can take packed rows.

On a GPU in half precision all segments go through one call of PyTorch's variable-length flash attention. Elsewhere each
segment has a call of its own, which at the lengths of real texts costs next to nothing beside the arithmetic.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from charm_core.errors import ModelError
from charm_core.reward_model.devices import sent
from charm_core.reward_model.packing import Segment

PACKED = "charm_packed"
"""What transformers knows it by."""

READS_ONLY = "charm_reads_only"
"""An attribute of a layer that says that only what the layout reads is wanted of it; see ``last_layer``."""

# What models give to their attention besides; none of it changes what attends to what in a packed row.
_HARMLESS = {"position_ids", "use_cache", "output_attentions", "output_hidden_states", "return_dict", "cache_position"}


class Layout:
    """The segments of a row, as attention needs them."""

    def __init__(self, segments: Sequence[Segment], device: torch.device, reads: Tensor | None = None) -> None:
        """Lay out segments; ``reads`` are the indices of the tokens whose last hidden states are read, ascending, None: all."""
        self.segments = tuple(segments)
        self.device = device
        self.reads = reads
        self._masks: dict[tuple[int, int, int | None], Tensor] = {}

    @cached_property
    def shares(self) -> bool:
        """Whether any segment goes on from another."""
        return any(segment.prefix_length for segment in self.segments)

    @cached_property
    def keys(self) -> Tensor:
        """Indices into the row of what each segment attends to, one segment after the other."""
        places = torch.cat(
            [
                torch.arange(start, start + length)
                for segment in self.segments
                for start, length in (
                    (segment.prefix_start, segment.prefix_length),
                    (segment.start, segment.length),
                )
            ]
        )
        return sent(places, self.device)

    @cached_property
    def query_ends(self) -> Tensor:
        """Where segments begin, and the last ends, in the row; int32."""
        return self._ends([segment.length for segment in self.segments])

    @cached_property
    def key_ends(self) -> Tensor:
        """Where they begin, and the last ends, in ``keys``; int32."""
        return self._ends([segment.prefix_length + segment.length for segment in self.segments])

    @cached_property
    def longest(self) -> tuple[int, int]:
        """Most tokens of a segment, and most tokens that one attends to."""
        return (
            max(segment.length for segment in self.segments),
            max(segment.prefix_length + segment.length for segment in self.segments),
        )

    @cached_property
    def read_places(self) -> list[list[int]]:
        """Per segment, which of its tokens are read."""
        reads = [] if self.reads is None else self.reads.tolist()
        ends = [segment.start + segment.length for segment in self.segments]
        found: list[list[int]] = [[] for _ in ends]
        for read in reads:
            number = bisect_right(ends, read)
            found[number].append(read - self.segments[number].start)
        return found

    def mask(self, segment: Segment, window: int | None) -> Tensor | None:
        """Which of a segment's tokens (rows) see which of its keys (columns); None where causality says it all.

        Args:
            segment: One of this layout.
            window: How many tokens a token sees, itself included; None: all before it.
        """
        keys = segment.prefix_length + segment.length
        if window is not None and window >= keys:
            window = None
        if window is None and not segment.prefix_length:
            return None
        kind = (segment.length, segment.prefix_length, window)
        if kind not in self._masks:
            places = torch.arange(keys, device=self.device)
            own = places[segment.prefix_length :, None]
            seen = places[None, :] <= own
            if window is not None:
                seen &= places[None, :] > own - window
            self._masks[kind] = seen
        return self._masks[kind]

    def _ends(self, lengths: list[int]) -> Tensor:
        return sent(torch.tensor([0, *lengths]).cumsum(0).to(torch.int32), self.device)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: Layout | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attend within the segments of a row.

    Args:
        module: The attention layer.
        query: 1 × heads × tokens × width.
        key: 1 × key heads × tokens × width.
        value: Same shape as ``key``.
        attention_mask: None: the layout says everything.
        layout: Of the row.
        scaling: Factor of the products.
        dropout: Must be 0.
        sliding_window: How many tokens a token sees, itself included.
        softcap: Bound of the products, by tanh.
        is_causal: Whether a token sees only what is before it; default: what the layer says.
        others: Anything that changes attention is an error.

    Returns:
        1 × tokens × heads × width, and no weights.

    Raises:
        ModelError: The layer wants something else of its attention.
    """
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    _check(module, attention_mask, layout, dropout, sliding_window, others)
    assert layout is not None  # noqa: S101 - for the type checker; _check has looked
    if layout.shares and not causal:
        raise ModelError("texts of a model that looks ahead cannot share their beginning")
    query, key, value = (_as_computed(part) for part in (query, key, value))
    how = _How(causal=causal, window=sliding_window, scaling=scaling, softcap=softcap)
    if _takes_flash(query, value, softcap):
        return _flash(query, key, value, layout, how), None
    keys, values = (part[:, :, layout.keys] if layout.shares else part for part in (key, value))
    only_reads = layout.reads is not None and getattr(module, READS_ONLY, False) and (causal or sliding_window is None)
    return (_attend_reads if only_reads else _attend_all)(query, keys, values, layout, how), None


def _as_computed(part: Tensor) -> Tensor:
    """Queries, keys or values in the type that autocast computes attention in.

    Under it, rotary embeddings leave queries and keys in float32 beside values in half precision.
    """
    kind = part.device.type
    return part.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else part


@dataclass(frozen=True, kw_only=True)
class _How:
    """What a layer wants of its attention."""

    causal: bool
    window: int | None
    scaling: float | None
    softcap: float | None


def _attend_all(query: Tensor, keys: Tensor, values: Tensor, layout: Layout, how: _How) -> Tensor:
    """Attention of every token, one segment after the other."""
    parts, at = [], 0
    for segment in layout.segments:
        width = segment.prefix_length + segment.length
        own = query[:, :, segment.start : segment.start + segment.length]
        mask = layout.mask(segment, how.window) if how.causal else None
        parts.append(_attend(own, keys[:, :, at : at + width], values[:, :, at : at + width], mask, how))
        at += width
    return torch.cat(parts, dim=2).transpose(1, 2)


def _attend_reads(query: Tensor, keys: Tensor, values: Tensor, layout: Layout, how: _How) -> Tensor:
    """Attention of the tokens that are read, each by itself; zero elsewhere."""
    parts, at = [], 0
    alone = replace(how, causal=False)  # nothing that comes later is among its keys
    for segment, places in zip(layout.segments, layout.read_places, strict=True):
        width = segment.prefix_length + segment.length
        for place in places:
            end = segment.prefix_length + place + 1 if how.causal else width
            seen = slice(at + (0 if how.window is None else max(0, end - how.window)), at + end)
            own = query[:, :, segment.start + place : segment.start + place + 1]
            parts.append(_attend(own, keys[:, :, seen], values[:, :, seen], None, alone))
        at += width
    some = torch.cat(parts, dim=2).transpose(1, 2)
    everywhere = some.new_zeros((1, query.shape[2], *some.shape[2:]))
    return everywhere.index_copy(1, cast(Tensor, layout.reads), some)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, how: _How) -> Tensor:
    """Attention of one segment; ``mask`` None: what ``how.causal`` says."""
    key, value = _for_heads(key, query), _for_heads(value, query)
    if how.softcap is None:
        # its own way to say causal is for as many queries as keys
        causal = how.causal and mask is None and query.shape[2] > 1
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, scale=how.scaling)
    products = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if how.scaling is None else how.scaling)
    products = how.softcap * torch.tanh(products / how.softcap)
    if how.causal:
        if mask is None:
            mask = torch.ones(products.shape[-2:], dtype=torch.bool, device=query.device).tril()
        products = products.masked_fill(~mask, torch.finfo(products.dtype).min)
    return products.softmax(dim=-1, dtype=torch.float32).to(value.dtype) @ value


def _for_heads(part: Tensor, query: Tensor) -> Tensor:
    """Keys or values with as many heads as there are queries: neighbouring query heads share one."""
    times = query.shape[1] // part.shape[1]
    return part if times == 1 else part.repeat_interleave(times, dim=1)


def _takes_flash(query: Tensor, value: Tensor, softcap: float | None) -> bool:
    half = query.dtype in (torch.bfloat16, torch.float16)
    width = query.shape[-1]
    fits = width <= 256 and width % 8 == 0 and value.shape[-1] == width
    return half and softcap is None and fits and _has_flash(query.device)


@cache
def _has_flash(device: torch.device) -> bool:
    """Whether PyTorch has variable-length flash attention there: on NVIDIA's GPUs from Ampere on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def _flash(query: Tensor, key: Tensor, value: Tensor, layout: Layout, how: _How) -> Tensor:
    """All segments in one call. Its causality is aligned at the ends, so that a segment sees what it goes on from."""
    from torch.nn.attention.varlen import varlen_attn

    own, seen, read = (part[0].transpose(0, 1) for part in (query, key, value))
    if layout.shares:
        seen, read = seen[layout.keys], read[layout.keys]
    own, seen, read = (part.contiguous() for part in (own, seen, read))
    most_queries, most_keys = layout.longest
    before = -1 if how.window is None else how.window - 1
    attended = varlen_attn(
        own,
        seen,
        read,
        layout.query_ends,
        layout.key_ends,
        most_queries,
        most_keys,
        scale=how.scaling,
        window_size=(before, 0) if how.causal else (before, before),
        enable_gqa=query.shape[1] != key.shape[1],
        # otherwise how a text is computed depends on the longest one beside it
        num_splits=1,
    )
    return cast(Tensor, attended).unsqueeze(0)


def _check(
    module: nn.Module,
    attention_mask: Tensor | None,
    layout: Layout | None,
    dropout: float,
    sliding_window: int | None,
    others: dict[str, Any],
) -> None:
    name = type(module).__name__
    if layout is None:
        raise ModelError(f"{name} does not hand the layout of packed rows on to its attention; set batching='padded'")
    if attention_mask is not None or dropout:
        raise ModelError(f"{name} wants a mask or dropout, which packed rows have not; set batching='padded'")
    unknown = sorted(key for key, found in others.items() if found is not None and key not in _HARMLESS)
    if unknown:
        raise ModelError(f"{name} wants {unknown} of its attention, which packed rows have not; set batching='padded'")
    types = getattr(getattr(module, "config", None), "layer_types", None)
    number = getattr(module, "layer_idx", None)
    if types is not None and number is not None and types[number] != "full_attention" and sliding_window is None:
        raise ModelError(
            f"{name} has {types[number]} without saying how far it sees, so packed rows cannot be had; set batching='padded'"
        )


# Segments differ from row to row: compiled, it would be compiled anew for each.
AttentionInterface.register(PACKED, torch.compiler.disable(packed_attention))  # type: ignore[no-untyped-call]
