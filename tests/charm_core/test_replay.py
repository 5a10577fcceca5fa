"""Responses that exist already: each goes to the prompt that it answers, and to no other."""

from typing import Any

import polars as pl
import pytest

from charm_core.errors import ConfigError, TableError
from charm_core.replay import ReplayCounts, Replayed, match_answers
from charm_core.replay_formats import ReplayRules, read_answers
from charm_core.responses import prompt_content_id
from charm_core.tables import MESSAGES

Row = dict[str, Any]


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def prompts(*texts: str, ids: tuple[str, ...] | None = None) -> pl.DataFrame:
    conversations = [user(text) for text in texts]
    names = ids or tuple(prompt_content_id(conversation) for conversation in conversations)
    return pl.DataFrame(
        {"prompt_id": list(names), "prompt_set": "all", "messages": conversations},
        schema={"prompt_id": pl.String, "prompt_set": pl.String, "messages": MESSAGES},
    )


def replay(rows: list[Row], asked: pl.DataFrame, model: str = "mine", **rules: Any) -> Replayed:
    settings = ReplayRules.model_validate(rules)
    return match_answers(read_answers([rows[:1], rows[1:]], settings), asked, model, settings)


def answers(replayed: Replayed) -> dict[str, str]:
    return dict(replayed.samples.select("prompt_id", "response").iter_rows())


ALPACA = [
    {"instruction": "one", "output": "first", "generator": "gpt4", "dataset": "koala"},
    {"instruction": "two", "output": None, "generator": "gpt4", "dataset": "koala"},
    {"instruction": "elsewhere", "output": "third", "generator": "gpt4", "dataset": "koala"},
]


def test_alpaca_eval():
    asked = prompts("one", "two", "three", ids=("p1", "p2", "p3"))
    replayed = replay(ALPACA, asked)
    assert answers(replayed) == {"p1": "first", "p2": ""}
    assert replayed.samples.select("status").to_series().to_list() == ["complete", "empty"]
    assert replayed.samples.get_column("policy_model").unique().to_list() == ["mine"]
    assert replayed.counts == ReplayCounts(
        rows=3, filtered=0, other_policy_models=0, without_prompt=1, repeated=0, responses=2, missing=1, called="gpt4"
    )
    assert replayed.counts.sentences("mine") == (
        "The responses of mine were replayed from a file that calls it gpt4: make sure it is the same.",
        "In the replayed file of mine, 1 prompts have no response; 1 responses are to prompts that are not in the set.",
    )


@pytest.mark.parametrize("name", ["gpt4", "GPT-4"])
def test_nothing_to_say_where_everything_fits(name: str):
    # not even of responses to prompts that are not asked
    assert replay(ALPACA, prompts("one", "two"), name).counts.sentences(name) == ()


@pytest.mark.parametrize("content", ["Press it.", {"answer": "Press it."}])
def test_arena_hard_of_the_first_version_goes_by_the_id_of_the_question(content: Any):
    row = {
        "question_id": "96d2",
        "answer_id": "x",
        "model_id": "gpt-4-0314",
        "choices": [{"index": 0, "turns": [{"content": content, "token_len": 3}]}],
        "tstamp": 1.5,
    }
    assert answers(replay([row], prompts("How?", "Why?", ids=("96d2", "4f8b")))) == {"96d2": "Press it."}
    with pytest.raises(
        TableError, match=r"they name their questions by ids \('96d2'\) and not by text; take the prompts"
    ):
        replay([row], prompts("How?"))


def test_arena_hard_of_the_second_version_goes_by_the_text_or_else_the_id():
    def row(uid: str, *messages: dict[str, Any]) -> Row:
        return {"uid": uid, "ans_id": "x", "model": "sky-t1", "messages": list(messages), "metadata": {}}

    said = {"role": "assistant", "content": {"answer": "42", "thought": "hm"}}
    system = {"role": "system", "content": "be kind"}
    rows = [row("u1", *user("one"), said), row("u2", system, *user("two"), said | {"content": "43"})]
    assert answers(replay(rows, prompts("one", "two", ids=("u1", "u2")))) == {"u1": "42", "u2": "43"}
    assert list(answers(replay(rows, prompts("one", "two"))).values()) == ["42"]


def test_tables_like_charms_own_with_one_policy_model_and_no_ids():
    rows = [{"prompt": "one", "response": "first"}, {"prompt": user("two")[0], "response": "second"}]
    replayed = replay(rows, prompts("one", "two", ids=("a", "b")))
    assert answers(replayed) == {"a": "first", "b": "second"}
    assert replayed.counts.called is None


def test_tables_with_conversations_and_other_names():
    conversation = [*user("one"), {"role": "assistant", "content": "x"}, *user("two")]
    asked = pl.DataFrame(
        {"prompt_id": ["p"], "prompt_set": "all", "messages": [conversation]},
        schema={"prompt_id": pl.String, "prompt_set": pl.String, "messages": MESSAGES},
    )
    rows = [
        {"asked": [{"content": message["content"], "role": message["role"]} for message in conversation], "by": "m",
         "said": [{"role": "assistant", "content": "yes"}]},
        {"asked": user("two"), "by": "m", "said": [{"role": "assistant", "content": "no"}]},
    ]  # fmt: skip
    columns = {"prompt": "asked", "policy_model": "by", "response": "said"}
    assert answers(replay(rows, asked, columns=columns)) == {"p": "yes"}


def test_ids_are_looked_at_only_where_there_is_no_text():
    asked = prompts("one", "two", ids=("1", "2"))
    by_id = [{"prompt_id": 2, "response": "b"}, {"prompt_id": 1, "response": "a"}, {"prompt_id": 9, "response": "c"}]
    assert answers(replay(by_id, asked)) == {"1": "a", "2": "b"}
    other_numbering = [
        {"prompt_id": 1, "prompt": "two", "response": "b"},
        {"prompt_id": 2, "prompt": "new", "response": "c"},
    ]
    assert answers(replay(other_numbering, asked)) == {"2": "b"}


def test_one_policy_model_of_several():
    rows = [
        {"prompt": text, "policy_model": model, "response": f"{model} on {text}", "bad": bad}
        for text in ("one", "two")
        for model, bad in (("a", "no"), ("b", "no"), ("c", "yes"))
    ]
    asked = prompts("one", "two")
    replayed = replay(rows, asked, "b")
    assert set(answers(replayed).values()) == {"b on one", "b on two"}
    assert replayed.counts.other_policy_models == 4
    chosen = replay(rows, asked, "mine", where={"policy_model": "c", "bad": "yes"})
    assert set(answers(chosen).values()) == {"c on one", "c on two"}
    assert (chosen.counts.filtered, chosen.counts.called) == (4, "c")
    with pytest.raises(
        ConfigError, match=r"responses of 3 policy models and none is called 'mine'; choose one with where: a, b, c$"
    ):
        replay(rows, asked)


def test_identical_repetitions_are_collapsed_and_different_ones_are_an_error():
    rows = [{"prompt": "one", "response": text} for text in ("same", "same", "other", "same")]
    asked = prompts("one", ids=("p",))
    same = replay([rows[0], rows[1], rows[3]], asked)
    assert (answers(same), same.counts.repeated, same.counts.contradicting) == ({"p": "same"}, 2, 0)
    with pytest.raises(
        TableError,
        match=r"1 prompts have several responses of 'mine', first 'p' in the rows \[1, 3\]: 'same' / 'other'; keep one",
    ):
        replay(rows, asked)
    first = replay(rows, asked, repeated="first")
    assert (answers(first), first.counts.repeated, first.counts.contradicting) == ({"p": "same"}, 2, 1)
    assert "1 further responses to the same prompt were left out" in first.counts.sentences("mine")[0]


def test_a_response_to_a_text_that_has_two_ids_goes_to_both():
    asked = prompts("one", "one", ids=("a", "b"))
    replayed = replay([{"prompt": "one", "response": "x"}], asked)
    assert answers(replayed) == {"a": "x", "b": "x"}
    assert (replayed.counts.without_prompt, replayed.counts.missing) == (0, 0)


def test_missing_responses_are_counted_or_an_error():
    asked = prompts("one", "two", "three", ids=("a", "b", "c"))
    rows = [{"prompt": "two", "response": "x"}]
    assert replay(rows, asked).counts.missing == 2
    with pytest.raises(TableError, match="2 of 3 prompts have no response of 'mine', first 'a'; give all of them"):
        replay(rows, asked, allow_missing=False)


def test_truncated_is_not_known_and_refused_is_recognised():
    rows = [{"prompt": "one", "response": "I'm sorry, but I can't help with that."}]
    assert replay(rows, prompts("one")).samples.get_column("status").to_list() == ["refused"]


@pytest.mark.parametrize(
    ("rows", "rules", "error", "message"),
    [
        ([], {}, TableError, "no responses among 0 rows"),
        (
            [{"prompt": "one", "text": "x"}],
            {},
            TableError,
            r"no responses recognised: the fields are \['prompt', 'text'\]",
        ),
        ([{"prompt": "one", "response": 7}], {}, TableError, "row 1: the response is int, not text"),
        (
            [{"prompt": "one", "response": "x"}],
            {"columns": {"policy_model": "modle"}},
            TableError,
            "row 1: a row lacks the field 'modle'",
        ),
        (
            [{"prompt": "one", "response": "x", "part": "a"}],
            {"where": {"part": "b"}},
            TableError,
            "no responses among 1 rows with",
        ),
        ([{"response": "x", "prompt_id": None}], {}, TableError, "row 1: there is no 'prompt' and no 'prompt_id'"),
        ([{"prompt": "One ", "response": "x"}], {}, TableError, "1 would be but for case and white space"),
        ([{"prompt": "else", "response": "x"}], {}, TableError, "they are responses to something else"),
        (
            [{"prompt": None, "response": "x"}, {"prompt": "\ud83d", "response": "x"}],
            {},
            TableError,
            "none of the 2 responses",
        ),
        (
            [{"question_id": "q", "choices": []}],
            {},
            TableError,
            r"row 1: choices\[0\] must have one turn with a content, not '\[\]'",
        ),
        ([{"question_id": "q", "choices": [{"turns": [{"content": "a"}] * 2}]}], {}, TableError, "must have one turn"),
        ([{"uid": "q", "messages": user("one")}], {}, TableError, "row 1: the last message is not the assistant's"),
        ([{"uid": "q", "messages": []}], {}, TableError, "row 1: the last message is not the assistant's"),
    ],
)
def test_files_that_hold_no_responses_to_these_prompts(
    rows: list[Row], rules: Row, error: type[Exception], message: str
):
    with pytest.raises(error, match=message):
        replay(rows, prompts("one"), **rules)


def test_half_a_character_in_a_response_is_replaced():
    (response,) = answers(replay([{"prompt": "one", "response": "half \ud83d"}], prompts("one"))).values()
    assert response == "half ?"
