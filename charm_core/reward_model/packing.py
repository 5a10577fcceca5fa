"""Texts side by side in one row, without padding, where texts that begin alike share their beginning. No torch.

Responses to one prompt have its tokens in common. A decoder's hidden states at those tokens depend on nothing that comes
later, so they are computed once for all of the responses. What is shared is found in the token ids, never in the text: a
tokenizer may join the end of a prompt with the beginning of a response.

A row is made of segments. A segment's tokens attend to those before them in their segment and, where there is one, to the
segment that they share with others:

    row       | prompt 1 | response a | response b | prompt 2 | response c |
    position    0 .. 5     6 .. 9       6 .. 12      0 .. 3     4 .. 8
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import groupby

from charm_core.reward_model.rendering import Rendered


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefixGroup:
    """Texts that begin with the same tokens."""

    texts: tuple[int, ...]
    """Indices of texts."""
    shared: int
    """How many tokens they share; 0 where nothing is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """Tokens that lie side by side in a row."""

    start: int
    """Of its first token in the row."""
    length: int
    prefix_start: int = 0
    """Of the segment that it goes on from."""
    prefix_length: int = 0
    """0 where it goes on from none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A packed row."""

    texts: tuple[int, ...]
    """The texts in it, in order."""
    input_ids: list[int]
    position_ids: list[int]
    """Of every token in its own text."""
    token_type_ids: list[int] | None
    segments: tuple[Segment, ...]
    owners: tuple[tuple[Segment | None, Segment | None], ...]
    """Per text the segment that it shares and the one that is its own; at least one of them."""

    def index(self, text: int, place: int) -> int:
        """Where in the row the token at ``place`` of the ``text``-th text of the row lies."""
        shared, own = self.owners[text]
        before = shared.length if shared is not None else 0
        if shared is not None and place < before:
            return shared.start + place
        if own is None:
            raise IndexError(f"text {text} of the row has {before} tokens, not {place + 1}")
        return own.start + place - before


def prefix_groups(token_ids: Sequence[Sequence[int]], owners: Sequence[Hashable]) -> list[PrefixGroup]:
    """Find out which texts share their beginning.

    Only texts of one owner are put together. They join a group as long as that saves tokens: one response before which the
    prompt was cut does not take the shared prompt from the others.

    Args:
        token_ids: Per text.
        owners: Per text what it belongs to, such as its prompt; all different: nothing is shared.

    Returns:
        Every text in one group; groups in the order of their owners' first texts.
    """
    first: dict[Hashable, int] = {}
    for owner in owners:
        first.setdefault(owner, len(first))
    order = sorted(range(len(owners)), key=lambda text: (first[owners[text]], token_ids[text], text))
    groups: list[PrefixGroup] = []
    for _, members in groupby(order, key=lambda text: first[owners[text]]):
        groups.extend(_alike(list(members), token_ids))
    return groups


def _alike(members: Sequence[int], token_ids: Sequence[Sequence[int]]) -> list[PrefixGroup]:
    """Groups of texts in lexicographic order, where neighbours are most alike."""
    found: list[tuple[list[int], int]] = []
    for text in members:
        if found:
            together, shared = found[-1]
            common = _common(
                token_ids[together[0]], token_ids[text], len(token_ids[text]) if len(together) == 1 else shared
            )
            if len(together) * common > (len(together) - 1) * shared:
                found[-1] = ([*together, text], common)
                continue
        found.append(([text], 0))
    return [PrefixGroup(texts=tuple(sorted(texts)), shared=shared if len(texts) > 1 else 0) for texts, shared in found]


def _common(one: Sequence[int], other: Sequence[int], most: int) -> int:
    """How many tokens two texts have in common at their beginning, ``most`` at most."""
    length = min(len(one), len(other), most)
    return next((place for place in range(length) if one[place] != other[place]), length)


def packed_tokens(group: PrefixGroup, lengths: Sequence[int]) -> int:
    """Tokens that a group takes in a row."""
    return group.shared + sum(lengths[text] - group.shared for text in group.texts)


def packed_batches(groups: Sequence[PrefixGroup], lengths: Sequence[int], budget: int) -> list[list[PrefixGroup]]:
    """Groups in rows of at most ``budget`` tokens, largest groups first.

    A group that exceeds the budget is split, and what its texts share is computed once per part; a longer text has a row of
    its own. A row that has room left takes the largest group that fits.

    Args:
        groups: Of texts.
        lengths: Tokens per text.
        budget: Most tokens per row.
    """
    parts = [part for group in groups for part in _parts(group, lengths, budget)]
    # first-fit with few rows open, so that this takes linear time
    rows: list[list[PrefixGroup]] = []
    opened: list[tuple[int, int]] = []
    for part in sorted(parts, key=lambda part: -packed_tokens(part, lengths)):
        size = packed_tokens(part, lengths)
        place = next((i for i, (_, room) in enumerate(opened) if size <= room), None)
        if place is None:
            rows.append([])
            opened = [*opened[-_OPEN_ROWS:], (len(rows) - 1, budget)]
            place = len(opened) - 1
        number, room = opened[place]
        rows[number].append(part)
        opened[place] = (number, room - size)
    return rows


_OPEN_ROWS = 16


def _parts(group: PrefixGroup, lengths: Sequence[int], budget: int) -> list[PrefixGroup]:
    parts: list[PrefixGroup] = []
    taken: list[int] = []
    size = group.shared
    for text in group.texts:
        own = lengths[text] - group.shared
        if taken and size + own > budget:
            parts.append(_part(taken, group.shared))
            taken, size = [], group.shared
        taken.append(text)
        size += own
    return [*parts, _part(taken, group.shared)]


def _part(texts: Sequence[int], shared: int) -> PrefixGroup:
    return PrefixGroup(texts=tuple(texts), shared=shared if len(texts) > 1 else 0)


def lay_out(groups: Sequence[PrefixGroup], texts: Sequence[Rendered]) -> Row:
    """Put groups of texts into one row.

    Args:
        groups: Which texts, and what they share.
        texts: All texts; the groups hold indices into them.
    """
    ids: list[int] = []
    positions: list[int] = []
    types: list[int] | None = [] if texts[groups[0].texts[0]].token_type_ids is not None else None
    segments: list[Segment] = []
    owners: list[tuple[Segment | None, Segment | None]] = []

    def put(text: Rendered, begin: int, end: int, before: Segment | None) -> Segment | None:
        if begin == end:
            return None
        prefix = (before.start, before.length) if before is not None else (0, 0)
        segment = Segment(start=len(ids), length=end - begin, prefix_start=prefix[0], prefix_length=prefix[1])
        ids.extend(text.input_ids[begin:end])
        positions.extend(range(begin, end))
        if types is not None:
            types.extend((text.token_type_ids or ())[begin:end])
        segments.append(segment)
        return segment

    for group in groups:
        shared = put(texts[group.texts[0]], 0, group.shared, None)
        for number in group.texts:
            text = texts[number]
            owners.append((shared, put(text, group.shared, len(text.input_ids), shared)))
    return Row(
        texts=tuple(text for group in groups for text in group.texts),
        input_ids=ids,
        position_ids=positions,
        token_type_ids=types,
        segments=tuple(segments),
        owners=tuple(owners),
    )
