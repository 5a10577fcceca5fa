"""Which texts share a batch: length-sorted, under a token budget. Pure arithmetic over token counts, no torch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from charm_core.reward_model.packing import PrefixGroup, packed_tokens


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


Cost = Callable[[Sequence[PairGroup]], int]
"""Tokens that groups make the model compute when they go through it together."""


def padded_cost(lengths: Sequence[int]) -> Cost:
    """The cost of texts that are filled up to the longest of them."""

    def cost(groups: Sequence[PairGroup]) -> int:
        return sum(len(group.texts) for group in groups) * max(
            lengths[text] for group in groups for text in group.texts
        )

    return cost


def packed_cost(prefixes: Mapping[str, Sequence[PrefixGroup]], lengths: Sequence[int]) -> Cost:
    """The cost of texts side by side, where what they share counts once.

    Args:
        prefixes: What the texts of each prompt id share.
        lengths: Tokens per text.
    """
    own = {prompt_id: sum(packed_tokens(group, lengths) for group in groups) for prompt_id, groups in prefixes.items()}

    def cost(groups: Sequence[PairGroup]) -> int:
        return sum(own[group.prompt_id] for group in groups)

    return cost


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


def share_out(groups: Sequence[PairGroup], cost: Cost, *, ranks: int, budget: int) -> list[list[list[PairGroup]]]:
    """Deal one step's groups out to the ranks and into micro-batches.

    Groups go, most tokens first, to the rank with the fewest tokens so far. A group is never split: one that exceeds the
    budget has a micro-batch of its own. Every rank gets the same number of micro-batches, because ZeRO-3 communicates in
    each of them; missing ones are empty.

    Args:
        groups: The step's groups.
        cost: Of groups that go through the model together.
        ranks: Number of processes.
        budget: Most tokens per micro-batch.

    Returns:
        Per rank, its micro-batches, each a list of groups.
    """
    dealt_out = deal_out([cost([group]) for group in groups], ranks)
    dealt = [_micro_batches([groups[index] for index in share], cost, budget) for share in dealt_out]
    most = max(len(batches) for batches in dealt)
    return [batches + [[] for _ in range(most - len(batches))] for batches in dealt]


def _micro_batches(groups: Sequence[PairGroup], cost: Cost, budget: int) -> list[list[PairGroup]]:
    batches: list[list[PairGroup]] = []
    # widest first, so that what is filled up is filled up with next to nothing
    for group in sorted(groups, key=lambda group: -cost([group]) / len(group.texts)):
        if not batches or cost([*batches[-1], group]) > budget:
            batches.append([])
        batches[-1].append(group)
    return batches
