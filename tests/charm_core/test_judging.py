"""What a judge is shown, and how strictly its verdicts are read."""

from typing import Any

import polars as pl
import pytest
from pydantic import ValidationError

from charm_core.errors import ConfigError, TableError
from charm_core.judging import (
    TEMPLATE,
    JudgePlan,
    JudgeRules,
    VerdictMarks,
    judge_messages,
    plan_judgements,
    read_verdict,
    second_tries,
)
from charm_core.tables import MESSAGES, PROMPTS, validate

MARKS = VerdictMarks()


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def prompts(count: int) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "prompt_id": [f"p{n}" for n in range(count)],
            "prompt_set": "all",
            "messages": [user(f"ask {n}") for n in range(count)],
        },
        schema={"prompt_id": pl.String, "prompt_set": pl.String, "messages": MESSAGES},
    )


def responses(rows: dict[tuple[str, str], str]) -> pl.DataFrame:
    return pl.DataFrame(
        [(*cell, text) for cell, text in rows.items()], schema=["prompt_id", "policy_model", "response"], orient="row"
    )


def plan(count: int, models: str = "abc", **rules: Any) -> JudgePlan:
    cells = {(f"p{n}", model): f"{model} on {n}" for n in range(count) for model in models}
    return plan_judgements(prompts(count), responses(cells), JudgeRules.model_validate(rules))


def test_all_pairs_are_shown_in_both_orders():
    found = plan(2)
    assert found.comparisons.select("prompt_id", "model_a", "model_b").rows() == [
        (prompt, *pair) for prompt in ("p0", "p1") for pair in (("a", "b"), ("a", "c"), ("b", "c"))
    ]
    assert found.requests.height == 12
    shown = dict(found.requests.select("prompt_id", "messages").iter_rows())
    first = found.comparisons.row(0, named=True)
    assert shown[first["a_first"]] == judge_messages(user("ask 0"), "a on 0", "b on 0", TEMPLATE)
    assert shown[first["b_first"]] == judge_messages(user("ask 0"), "b on 0", "a on 0", TEMPLATE)
    validate(found.requests, PROMPTS)


def test_one_policy_model_against_all_others():
    assert plan(1, against="b").comparisons.select("model_a", "model_b").rows() == [("a", "b"), ("b", "c")]
    with pytest.raises(ConfigError, match=r"no responses of 'd' to compare with, only of \['a', 'b', 'c'\]"):
        plan(1, against="d")


def test_identical_responses_are_not_shown_and_equal_questions_are_asked_once():
    cells = {("p0", "a"): "same", ("p0", "b"): "same", ("p0", "c"): "longer than same"}
    found = plan_judgements(prompts(1), responses(cells), JudgeRules())
    assert found.comparisons.select("model_a", "model_b", "longer").rows() == [
        ("a", "b", None),
        ("a", "c", "c"),
        ("b", "c", "c"),
    ]
    assert found.comparisons.get_column("a_first").is_null().to_list() == [True, False, False]
    assert found.requests.height == 2


def test_prompts_are_drawn_by_content_and_seed():
    drawn = plan(40, max_prompts=10)
    assert drawn.comparisons.get_column("prompt_id").n_unique() == 10
    fewer = set(plan(40, max_prompts=5).comparisons.get_column("prompt_id"))
    assert fewer < set(drawn.comparisons.get_column("prompt_id"))
    assert fewer != set(plan(40, max_prompts=5, seed=1).comparisons.get_column("prompt_id"))
    assert plan(3, max_prompts=None).comparisons.height == 9


def test_prompts_with_one_response_cost_nothing():
    cells = {("p0", "a"): "x", ("p0", "b"): "y", ("p1", "a"): "z"}
    found = plan_judgements(prompts(2), responses(cells), JudgeRules(max_prompts=1))
    assert found.comparisons.get_column("prompt_id").to_list() == ["p0"]
    with pytest.raises(TableError, match="no prompt has responses of two policy models"):
        plan_judgements(prompts(2), responses({("p0", "a"): "x", ("p1", "b"): "y"}), JudgeRules())
    with pytest.raises(TableError, match="1 answered prompts are not in the prompts table, first 'p7'"):
        plan_judgements(prompts(2), responses({("p7", "a"): "x", ("p7", "b"): "y"}), JudgeRules())


def test_what_looks_like_a_placeholder_in_a_response_stays_what_it_is():
    (message,) = judge_messages(
        user("ask {first}"), "{second} {conversation}", "{first}", "{conversation}|{first}|{second}"
    )
    assert message == {"role": "user", "content": "ask {first}|{second} {conversation}|{first}"}


def test_conversations_are_shown_with_their_roles():
    conversation = [*user("a"), {"role": "assistant", "content": "b"}, *user("c")]
    (message,) = judge_messages(conversation, "x", "y", "{conversation}\n{first}{second}")
    assert message["content"] == "user: a\n\nassistant: b\n\nuser: c\nxy"


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("[[FIRST]]", "first"),
        ("The second errs.\n\n[[SECOND]]\n \n", "second"),
        ("Both do.\nVerdict: **[[tie]]**.", "tie"),
        ("[[FIRST]] it might be, but no.\n[[SECOND]]", "second"),
        ("", None),
        ("The first one is better.", None),
        ("[[FIRST]]\nThat is my verdict.", None),
        ("[[FIRST]] or [[SECOND]]", None),
        ("[[FIRST]] [[FIRST]]", None),
        ("FIRST", None),
        ("[[THIRD]]", None),
    ],
)
def test_verdicts_are_read_strictly(answer: str, verdict: str | None):
    assert read_verdict(answer, MARKS) == verdict


def test_other_marks():
    marks = VerdictMarks(first="[[A]]", second="[[B]]", tie="[[C]]")
    assert read_verdict("My final verdict is: [[A]]", marks) == "first"
    assert read_verdict("[[FIRST]]", marks) is None
    JudgeRules(template="{conversation}{first}{second} [[A]] [[B]]", marks=marks)


def test_a_second_try_goes_on_with_the_conversation():
    found = plan(1, "ab")
    first, second = found.requests.get_column("prompt_id").to_list()
    again = second_tries(found.requests, {first: "I like both."}, MARKS)
    assert again.get_column("prompt_id").to_list() == [first]
    roles = [message["role"] for message in again.get_column("messages")[0]]
    assert roles == ["user", "assistant", "user"]
    assert again.get_column("messages")[0][1]["content"] == "I like both."
    assert second_tries(found.requests, {first: "[[TIE]]", second: "[[FIRST]]"}, MARKS).is_empty()
    (empty,) = second_tries(found.requests, {second: ""}, MARKS).get_column("messages").to_list()
    assert empty[1]["content"] == "(no answer)"


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"template": "{conversation} {first} [[FIRST]] [[SECOND]]"}, r"placeholders once; check \{second\}"),
        ({"template": TEMPLATE + "{first}"}, r"placeholders once; check \{first\}"),
        ({"template": "{conversation}{first}{second}"}, r"does not say when to write \[\[FIRST\]\] and \[\[SECOND\]\]"),
        ({"marks": {"first": "A", "second": "AB", "tie": "C"}}, "no mark may contain another one"),
        ({"marks": {"first": "A", "second": "a", "tie": "C"}}, "no mark may contain another one"),
    ],
)
def test_templates_and_marks_that_cannot_work(rules: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        JudgeRules.model_validate(rules)
