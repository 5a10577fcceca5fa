"""Which texts share a batch: length-sorted, under a token budget. Pure arithmetic over token counts, no torch."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PairGroup:
    """The pairs of one prompt that are trained in one step; each distinct response is encoded once.

    ``texts`` are indices of rendered texts; ``pairs`` are (position of chosen, position of rejected) in ``texts``.
    """

    prompt_id: str
    texts: tuple[int, ...]
    pairs: tuple[tuple[int, int], ...]
    rows: tuple[int, ...]
    """Rows of the pairs table, one per pair."""


def token_budget_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of texts in batches, longest first, so that the first batch is the largest and padding is next to nothing.

    Args:
        lengths: Tokens per text.
        budget: Most tokens per batch, padding included. A longer text has a batch of its own.

    Returns:
        Every index exactly once. Equal lengths keep their order.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    batches: list[list[int]] = []
    for index in order:
        if not batches or lengths[batches[-1][0]] * (len(batches[-1]) + 1) > budget:
            batches.append([])
        batches[-1].append(index)
    return batches


def deal_out(sizes: Sequence[int], shares: int) -> list[list[int]]:
    """Deal work out evenly: the largest piece first, each to the share that has least so far.

    Args:
        sizes: Work per piece, in any unit.
        shares: Number of shares.

    Returns:
        Per share, the indices of its pieces, largest first; every index exactly once. Equal pieces keep their order.
    """
    dealt: list[list[int]] = [[] for _ in range(shares)]
    loads = [0] * shares
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        lightest = loads.index(min(loads))
        dealt[lightest].append(index)
        loads[lightest] += sizes[index]
    return dealt


def share_out(
    groups: Sequence[PairGroup], lengths: Sequence[int], *, ranks: int, budget: int
) -> list[list[list[PairGroup]]]:
    """Deal one step's groups out to the ranks and into micro-batches.

    Groups go, most tokens first, to the rank with the fewest tokens so far. A group is never split: one that exceeds the
    budget has a micro-batch of its own. Every rank gets the same number of micro-batches, because ZeRO-3 communicates in
    each of them; missing ones are empty.

    Args:
        groups: The step's groups.
        lengths: Tokens per text.
        ranks: Number of processes.
        budget: Most tokens per micro-batch, padding included.

    Returns:
        Per rank, its micro-batches, each a list of groups.
    """

    def tokens(group: PairGroup) -> int:
        return sum(lengths[text] for text in group.texts)

    dealt_out = deal_out([tokens(group) for group in groups], ranks)
    shares = [[groups[index] for index in share] for share in dealt_out]
    dealt = [_micro_batches(share, lengths, budget) for share in shares]
    most = max(len(batches) for batches in dealt)
    return [batches + [[] for _ in range(most - len(batches))] for batches in dealt]


def _micro_batches(groups: Sequence[PairGroup], lengths: Sequence[int], budget: int) -> list[list[PairGroup]]:
    def longest(group: PairGroup) -> int:
        return max(lengths[text] for text in group.texts)

    batches: list[list[PairGroup]] = []
    texts = width = 0
    for group in sorted(groups, key=longest, reverse=True):
        if not batches or width * (texts + len(group.texts)) > budget:
            batches.append([])
            texts, width = 0, longest(group)
        batches[-1].append(group)
        texts += len(group.texts)
    return batches
