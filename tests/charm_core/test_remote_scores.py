"""What servers of reward models are sent and answer, form by form."""

from typing import Any

import numpy as np
import pytest

from charm_core.errors import ConfigError, ModelError
from charm_core.remote_scores import Route, read_scores, request_body, undo_activation

TOKENS = [[1, 2, 3], [4, 5]]


def test_requests():
    assert request_body("vllm_classify", "rm", {"tokens": TOKENS}) == {
        "model": "rm",
        "input": TOKENS,
        "add_special_tokens": False,
        "use_activation": False,
    }
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert request_body("vllm_pooling", "rm", {"messages": messages})["messages"] == messages
    pairs = request_body("vllm_score", "rm", {"pairs": [("a", "b"), ("x", "y")]})
    assert pairs == {"model": "rm", "text_1": ("a", "b"), "text_2": ("x", "y"), "use_activation": False}
    assert request_body("sglang_classify", "rm", {"tokens": TOKENS}) == {"model": "rm", "input_ids": TOKENS}
    assert request_body("sglang_v1_classify", "rm", {"tokens": TOKENS}) == {"model": "rm", "input": TOKENS}


ANSWERS: list[tuple[Route, Any]] = [
    (
        "vllm_classify",
        {"data": [{"index": 1, "label": None, "probs": [2.5], "num_classes": 1}, {"index": 0, "probs": [-1]}]},
    ),
    ("vllm_pooling", {"data": [{"index": 0, "object": "pooling", "data": [-1.0]}, {"index": 1, "data": [2.5]}]}),
    ("vllm_pooling", {"data": [{"index": 0, "data": [[9.0], [-1.0]]}, {"index": 1, "data": [[2.5]]}]}),
    ("vllm_score", {"data": [{"index": 1, "object": "score", "score": 2.5}, {"index": 0, "score": -1.0}]}),
    ("sglang_classify", [{"embedding": [-1.0], "meta_info": {"prompt_tokens": 3}}, {"embedding": [2.5]}]),
    ("sglang_v1_classify", {"data": [{"index": 0, "label": "LABEL_0", "probs": [-1.0]}, {"index": 1, "probs": [2.5]}]}),
]


@pytest.mark.parametrize(("route", "answer"), ANSWERS)
def test_answers(route: Route, answer: Any):
    assert read_scores(route, answer, 2) == [-1.0, 2.5]


def test_sglang_answers_a_single_text_without_a_list():
    assert read_scores("sglang_classify", {"embedding": [0.5], "meta_info": {}}, 1) == [0.5]


@pytest.mark.parametrize(
    ("route", "answer"),
    [
        ("vllm_classify", None),
        ("vllm_classify", {"error": "busy"}),
        ("vllm_classify", {"data": [{"index": 0, "probs": [1.0]}]}),
        ("vllm_classify", {"data": [{"index": 0, "probs": [1.0]}] * 2}),
        ("vllm_classify", {"data": [{"probs": [1.0]}, {"probs": [1.0]}]}),
        ("vllm_classify", {"data": [{"index": 0, "probs": ["1"]}, {"index": 1, "probs": [1.0]}]}),
        ("vllm_classify", {"data": [{"index": 0, "probs": [float("nan")]}, {"index": 1, "probs": [1.0]}]}),
        ("vllm_classify", {"data": [{"index": 0}, {"index": 1}]}),
        ("vllm_score", {"data": [{"index": 0, "score": True}, {"index": 1, "score": 1.0}]}),
        ("sglang_classify", {"embedding": [0.5]}),
        ("sglang_classify", [{"embedding": [0.5]}, "x"]),
    ],
)
def test_answers_that_are_malformed(route: Route, answer: Any):
    with pytest.raises(ValueError, match=r"texts were sent|indices of the answer|not a finite number"):
        read_scores(route, answer, 2)


def test_a_classifier_of_two_classes_is_no_reward_model():
    with pytest.raises(ModelError, match="gives 2 numbers per text, so its model is no reward model"):
        read_scores("vllm_classify", {"data": [{"index": 0, "probs": [0.3, 0.7]}]}, 1)


SCORES = np.linspace(-9, 9, 40)
SQUASHED = 1 / (1 + np.exp(-SCORES))


def test_scores_are_taken_as_they_are():
    for activation in ("auto", "off"):
        scores, said = undo_activation(SCORES, activation)
        assert scores is SCORES
        assert said == ()
    assert undo_activation(SQUASHED, "off")[0] is SQUASHED
    assert undo_activation(SQUASHED[:15], "auto")[0] is not None  # so few may lie there by chance


def test_a_sigmoid_is_noticed_and_undone():
    with pytest.raises(
        ConfigError, match=r"all 40 scores lie from 0 to 1 \(0.0001234 to 0.9999\): the server seems to apply a sigmoid"
    ):
        undo_activation(SQUASHED, "auto")
    scores, said = undo_activation(SQUASHED, "sigmoid")
    assert scores == pytest.approx(SCORES, abs=1e-9)
    assert said == ()
    single = SQUASHED.astype(np.float32).astype(np.float64)
    assert undo_activation(single, "sigmoid")[0] == pytest.approx(SCORES, abs=1e-3)


def test_what_a_sigmoid_has_rounded_away_is_said():
    high = np.append(SQUASHED, 1 / (1 + np.exp(-12.0)))
    _, said = undo_activation(high, "sigmoid")
    assert said == ("The server's sigmoid was undone; 1 scores are above 10, where it leaves few digits.",)
    with pytest.raises(ConfigError, match="2 of 42 scores are exactly 0 or 1"):
        undo_activation(np.append(SQUASHED, [1.0, 0.0]), "sigmoid")


@pytest.mark.parametrize("activation", ["auto", "off", "sigmoid"])
def test_a_softmax_over_one_label_is_an_error_in_any_case(activation: Any):
    with pytest.raises(ConfigError, match="all 3 scores are exactly 1: the server applies a softmax"):
        undo_activation(np.ones(3), activation)


def test_scores_that_did_not_go_through_a_sigmoid():
    with pytest.raises(ConfigError, match="the scores go from -9 to 9: they did not go through one"):
        undo_activation(SCORES, "sigmoid")
