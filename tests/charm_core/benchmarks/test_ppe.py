from typing import Any

import pytest

from charm_core.benchmarks.ppe import ppe
from charm_core.errors import TableError
from tests.charm_core.benchmarks.made_up import result_as_written, values


def _vote(number: int, one: str, two: str, winner: str, **tags: Any) -> dict[str, Any]:
    return {
        "question_id": f"q{number}",
        "model_a": "x",
        "model_b": "y",
        "winner": winner,
        "prompt": f"prompt {number}",
        "response_1": one,
        "response_2": two,
    } | tags


def test_votes_for_a_winner() -> None:
    votes = [
        _vote(1, "2", "1", "model_a"),  # right
        _vote(2, "2", "1", "model_b"),  # wrong
        _vote(3, "1", "2", "model_b"),  # right
        _vote(4, "1", "1", "model_b"),  # equal scores are wrong
    ]
    figure = result_as_written(ppe(votes)).figure("overall")
    assert (figure.value.value, figure.tie_rate, figure.items) == (0.5, 0.25, 4)


def test_votes_for_a_tie_are_left_out_and_counted() -> None:
    votes = [_vote(1, "2", "1", "model_a"), _vote(2, "2", "1", "tie"), _vote(3, "1", "2", "tie (bothbad)")]
    result = result_as_written(ppe(votes))
    assert result.figure("overall").items == 1
    assert result.note == (
        "2 of 3 votes are ties and left out; 3 of 16038 votes: not comparable with published figures"
    )


def test_subsets_overlap() -> None:
    votes = [
        _vote(1, "2", "1", "model_a", language="English", hard_prompt=True, math_prompt=True, is_code=False),
        _vote(2, "2", "1", "model_b", language="Chinese", hard_prompt=True, math_prompt=False, is_code=False),
        _vote(3, "2", "1", "model_a", language="Dutch", hard_prompt=False, math_prompt=False, is_code=False),
    ]
    assert values(result_as_written(ppe(votes))) == {
        ("overall", "accuracy"): pytest.approx(2 / 3),
        ("hard prompts", "accuracy"): 0.5,
        ("math", "accuracy"): 1.0,
        ("English", "accuracy"): 1.0,
        ("Chinese", "accuracy"): 0.0,
        ("not English", "accuracy"): 0.5,
    }


def test_where_the_shorter_response_was_preferred_length_is_always_wrong() -> None:
    votes = [_vote(1, "2", "10", "model_a"), _vote(2, "2", "10", "model_b"), _vote(3, "20", "1", "model_b")]
    result = result_as_written(ppe(votes))
    figure = result.figure("shorter response preferred")
    assert (figure.items, figure.value.value, figure.length_only) == (2, 0.0, 0.0)
    assert result.figure("overall").length_only == pytest.approx(1 / 3)


def test_only_ties_are_an_error() -> None:
    with pytest.raises(TableError, match="all 1 votes of PPE human preference are ties"):
        ppe([_vote(1, "2", "1", "tie")])


def test_an_unknown_winner_is_an_error() -> None:
    with pytest.raises(TableError, match=r"the winner 'x' is none of \['model_a', 'model_b'\]"):
        ppe([_vote(1, "2", "1", "x")])
    with pytest.raises(TableError, match="PPE human preference has no items"):
        ppe([])
