from typing import Any

import numpy as np
import pytest

from charm_core.benchmarks.figures import credit_replicates, roll_up
from charm_core.benchmarks.outcomes import Measure
from charm_core.benchmarks.rmb import BEST_OF_N, GOALS, OFFICIAL_ITEMS, OVERALL, PAIRWISE, ROLLUPS, rmb
from charm_core.errors import TableError
from tests.charm_core.benchmarks.made_up import outcomes_as_written, result_as_written, values

PUBLISHED = {
    "Tulu-v2.5-13b-preference-mix-rm": (0.355, 0.562, 0.351, 0.545, 0.453),
    "SteerLM-RM 70B": (0.502, 0.574, 0.578, 0.673, 0.582),
    "Skywork-Reward-Gemma-2-27B": (0.472, 0.653, 0.561, 0.721, 0.602),
    "Internlm2-20b-reward": (0.585, 0.763, 0.499, 0.670, 0.629),
    "ArmoRM-Llama3-8B-v0.1": (0.636, 0.787, 0.497, 0.663, 0.646),
    "Internlm2-7b-reward": (0.626, 0.782, 0.563, 0.712, 0.671),
    "Eurus-RM-7b": (0.679, 0.818, 0.543, 0.693, 0.683),
    "Skywork-Reward-Llama-3.1-8B": (0.627, 0.781, 0.603, 0.759, 0.693),
    "INF-ORM-Llama3.1-70B": (0.650, 0.798, 0.607, 0.767, 0.705),
    "Starling-RM-34B": (0.604, 0.774, 0.674, 0.795, 0.712),
    "GPT-4o-2024-05-13": (0.639, 0.815, 0.682, 0.814, 0.738),
}
"""Helpfulness best-of-n and pairwise, harmlessness best-of-n and pairwise, overall (arXiv 2410.09893 and 2505.02387)."""


def _conversation(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt, "language": "English"}]


def _pair(number: int, chosen: str, reject: str, category: str = "Harmlessness/S1", prompt: str = "") -> dict[str, Any]:
    return {
        "pair_uid": str(number),
        "category_path": f"Pairwise_set/{category}",
        "conversation_input": _conversation(prompt or f"prompt {number}"),
        "chosen": {"llm_name": "x", "answer": chosen},
        "reject": {"llm_name": "y", "answer": reject},
    }


def _list(number: int, best: str, losers: list[str], category: str = "Harmlessness/S1") -> dict[str, Any]:
    return {
        "bon_uid": str(number),
        "category_path": f"BoN_set/{category}",
        "conversation_input": _conversation(f"prompt {number}"),
        "bon_best": {"llm_name": "x", "answer": best},
        "loser_list": [{"llm_name": f"y{place}", "answer": loser} for place, loser in enumerate(losers)],
    }


@pytest.mark.parametrize("model", PUBLISHED)
def test_the_published_overall_is_the_mean_of_four(model: str) -> None:
    *parts, overall = PUBLISHED[model]
    measures = [Measure(goal, metric) for goal in GOALS for metric in (BEST_OF_N, PAIRWISE)]
    # parts and wholes are rounded to 0.001
    assert roll_up(dict(zip(measures, parts, strict=True)), ROLLUPS)[OVERALL] == pytest.approx(overall, abs=0.001)


def test_the_official_sizes() -> None:
    assert sum(OFFICIAL_ITEMS.values()) == 17_131 + 3_786


def test_the_best_must_be_strictly_above_all_losers() -> None:
    rows = [
        _list(1, "3", ["1", "2"]),  # right
        _list(2, "3", ["1", "3"]),  # a tie is a loss
        _list(3, "3", ["1", "2", "4"]),  # two of three are not enough
    ]
    figure = result_as_written(rmb(rows)).figure("Harmlessness", BEST_OF_N)
    assert (figure.value.value, figure.tie_rate) == (pytest.approx(1 / 3), pytest.approx(1 / 3))


def test_pairs_and_lists_are_counted_apart_and_by_items() -> None:
    code, chat = "Helpfulness/Code/Data Management", "Helpfulness/Chat/Discussion"
    rows = [
        _pair(1, "2", "1", code),
        _pair(2, "1", "2", chat),
        _pair(3, "1", "2", chat),
        _pair(4, "1", "1", chat),
        _list(5, "2", ["1", "0"], code),
        _pair(6, "2", "1"),
        _list(7, "2", ["1", "5"]),
    ]
    result = result_as_written(rmb(rows))
    assert values(result) == {
        ("overall", "accuracy"): pytest.approx((0.25 + 1.0 + 1.0 + 0.0) / 4),
        ("Helpfulness", PAIRWISE): 0.25,  # not (1 + 0) / 2: over items, not over categories
        ("Helpfulness", BEST_OF_N): 1.0,
        ("Harmlessness", PAIRWISE): 1.0,
        ("Harmlessness", BEST_OF_N): 0.0,
        ("Helpfulness: Code", PAIRWISE): 1.0,
        ("Helpfulness: Code", BEST_OF_N): 1.0,
        ("Helpfulness: Chat", PAIRWISE): 0.0,
        ("Harmlessness: S1", PAIRWISE): 1.0,
        ("Harmlessness: S1", BEST_OF_N): 0.0,
    }
    assert result.figure("overall").items == 7
    assert result.figure("overall").note == "parts of it are incomplete: not comparable with published figures"


def test_pairs_alone_are_said_to_be_incomplete() -> None:
    result = result_as_written(rmb([_pair(1, "2", "1")]))
    assert result.figure("overall").note == (
        f"without Helpfulness {PAIRWISE} and Helpfulness {BEST_OF_N} and Harmlessness {BEST_OF_N}: "
        "not comparable with published figures"
    )


def test_pairs_and_lists_of_one_prompt_are_drawn_together() -> None:
    rows = [_pair(n, "2", "1" if n % 2 else "3") for n in range(20)] + [
        _list(n, "2", ["1" if n % 2 else "3", "0"]) for n in range(20)
    ]
    drawn = credit_replicates(outcomes_as_written(rmb(rows)), 100)
    np.testing.assert_array_equal(drawn[Measure("Harmlessness", PAIRWISE)], drawn[Measure("Harmlessness", BEST_OF_N)])


def test_only_role_and_content_of_a_message_reach_the_reward_model() -> None:
    (item,) = rmb([_pair(1, "2", "1")]).items
    assert item.messages[0].model_dump() == {"role": "user", "content": "prompt 1"}


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("Pairwise_set/Harmlessness", "'Pairwise_set/Harmlessness' is not of the form"),
        ("Other_set/Harmlessness/S1", r"the set in the category path 'Other_set' is none of"),
        ("BoN_set/Honesty/S1", r"the goal in the category path 'Honesty' is none of"),
        ("BoN_set/Harmlessness/S1", r"lacks the field 'bon_uid'"),
    ],
)
def test_bad_rows(path: str, message: str) -> None:
    with pytest.raises(TableError, match=message):
        rmb([_pair(1, "2", "1") | {"category_path": path}])
