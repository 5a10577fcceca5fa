"""Which models a set of comparisons ties together.

Differences between two models are determined only along comparisons, so a graph that falls apart is an error that
names its parts rather than an arbitrary answer.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import scipy
from numpy.typing import NDArray

from charm_core.errors import GraphError

_NAMES_SHOWN = 6


def connected_groups(compared: NDArray[np.bool_]) -> list[list[int]]:
    """Groups of models that comparisons connect, largest first, from a K×K matrix of "were compared"."""
    return _groups(compared, "weak")


def mutually_beaten_groups(beaten: NDArray[np.bool_]) -> list[list[int]]:
    """Groups within which every model has beaten every other along some chain, largest first.

    A Bradley-Terry optimum is finite exactly within such a group (Ford 1957). ``beaten[j, k]``: j won something from k.
    """
    return _groups(beaten, "strong")


def require_connected(compared: NDArray[np.bool_], policy_models: Sequence[str]) -> None:
    """Check that comparisons connect all models.

    Raises:
        GraphError: They do not; the message names the groups.
    """
    groups = connected_groups(compared)
    if len(groups) > 1:
        named = "; ".join(name_models([policy_models[index] for index in group]) for group in groups)
        raise GraphError(
            f"the comparisons fall into {len(groups)} groups of models without shared prompts or battles between them: "
            f"{named}; add comparisons between the groups or treat each group by itself"
        )


def name_models(names: Sequence[str]) -> str:
    """Names in brackets, shortened where there are many."""
    shown = ", ".join(names[:_NAMES_SHOWN])
    return f"[{shown}, and {len(names) - _NAMES_SHOWN} more]" if len(names) > _NAMES_SHOWN else f"[{shown}]"


def _groups(adjacency: NDArray[np.bool_], connection: Literal["weak", "strong"]) -> list[list[int]]:
    count, labels = scipy.sparse.csgraph.connected_components(
        scipy.sparse.csr_array(adjacency.astype(np.int8)), directed=True, connection=connection
    )
    groups = [np.flatnonzero(labels == label).tolist() for label in range(count)]
    return sorted(groups, key=lambda group: (-len(group), group))
