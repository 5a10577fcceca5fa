import numpy as np
import pytest

from charm_core.comparison_graph import connected_groups, mutually_beaten_groups, name_models, require_connected
from charm_core.errors import GraphError


def _graph(models: int, *edges: tuple[int, int]) -> np.ndarray:
    graph = np.zeros((models, models), dtype=np.bool_)
    for first, second in edges:
        graph[first, second] = True
    return graph


def test_direction_does_not_matter_for_connection() -> None:
    assert connected_groups(_graph(4, (1, 0), (1, 2))) == [[0, 1, 2], [3]]


def test_a_cycle_of_wins_is_one_group_and_an_undefeated_model_is_alone() -> None:
    assert mutually_beaten_groups(_graph(4, (0, 1), (1, 2), (2, 0), (3, 0))) == [[0, 1, 2], [3]]


def test_the_error_names_every_group() -> None:
    with pytest.raises(GraphError, match=r"2 groups .* \[b, c\]; \[a\]"):
        require_connected(_graph(3, (1, 2)), ["a", "b", "c"])


def test_long_lists_of_names_are_shortened() -> None:
    assert name_models([f"m{index}" for index in range(8)]) == "[m0, m1, m2, m3, m4, m5, and 2 more]"
