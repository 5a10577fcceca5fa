"""Prompts as they are published: each format gives the conversation that a policy model was asked."""

from typing import Any

import pytest

from charm_core.conversations import check_conversation
from charm_core.errors import TableError
from charm_core.prompt_formats import PromptReading, PromptRows, read_prompts, recognise
from charm_core.responses import prompt_content_id

Row = dict[str, Any]


def said(*contents: str, first: str = "user") -> list[dict[str, str]]:
    roles = ("user", "assistant") if first == "user" else ("system", "user", "assistant")
    return [
        {
            "role": roles[place] if place < len(roles) else ("user", "assistant")[(place - len(roles)) % 2],
            "content": text,
        }
        for place, text in enumerate(contents)
    ]


def read(rows: list[Row], **reading: Any) -> PromptRows:
    return read_prompts([rows], PromptReading.model_validate(reading))


def conversations(found: PromptRows) -> list[list[dict[str, str]]]:
    return found.frame.get_column("messages").to_list()


def test_alpaca_eval():
    rows = [
        {"instruction": "Name a river", "output": "Rhine", "generator": "text_davinci_003", "dataset": "helpful_base"},
        {"instruction": "Name a lake", "output": "Como", "generator": "text_davinci_003", "dataset": "koala"},
    ]
    found = read(rows)
    assert conversations(found) == [said("Name a river"), said("Name a lake")]
    assert found.frame.get_column("prompt_set").to_list() == ["helpful_base", "koala"]
    assert found.frame.get_column("prompt_id").to_list() == [
        prompt_content_id(said(row["instruction"])) for row in rows
    ]
    assert (found.rows, found.filtered, found.unusable) == (2, 0, ())


def test_arena_hard_of_both_versions_keeps_the_ids_by_which_answers_name_the_questions():
    first = read(
        [{"question_id": "96d2", "category": "arena-hard-v0.1", "cluster": "Keys", "turns": [{"content": "Flash it"}]}]
    )
    second = read([{"uid": "0001", "category": "hard_prompt", "subcategory": "coding", "prompt": "Flash it"}])
    assert first.frame.drop("row").rows() == [("96d2", "arena-hard-v0.1", said("Flash it"))]
    assert second.frame.drop("row").rows() == [("0001", "hard_prompt", said("Flash it"))]


def test_the_prompt_of_a_preference_pair_is_the_common_beginning():
    rows = [
        {"chosen": said("a", "x"), "rejected": said("a", "y")},
        {"chosen": said("a", "x", "b", "y"), "rejected": said("a", "x", "b", "z")},
        {"chosen": said("a", "x", "b", "y"), "rejected": said("a", "other", "b", "y")},
        {"chosen": said("a", "x"), "rejected": said("a", "x")},
        {"chosen": said("be kind", "a", "x", first="system"), "rejected": said("be kind", "a", "y", first="system")},
        # the field order of preference_700K
        {"chosen": [{"content": "a", "role": "user"}], "rejected": [{"content": "a", "role": "user"}]},
    ]
    expected = [
        said("a"),
        said("a", "x", "b"),
        said("a"),
        said("a"),
        said("be kind", "a", first="system"),
        said("a"),
    ]
    assert conversations(read(rows)) == expected
    assert conversations(read(rows, messages="first"))[1] == said("a")


def test_a_prompt_column_goes_before_the_pair():
    row = {"prompt": "asked", "chosen": said("other", "x"), "rejected": said("other", "y")}
    assert conversations(read([row])) == [said("asked")]
    assert conversations(read([row], format="preferences")) == [said("other")]


def test_tables_with_texts_messages_and_named_columns():
    several = [*said("a", "x", "b")]
    rows: list[Row] = [
        {"question": "plain", "id": 7, "domain": "chat"},
        {"question": several, "id": "b", "domain": None},
        {"question": {"role": "user", "content": "one"}, "id": "c", "domain": "code"},
        {"question": [{"role": "user", "content": "more", "language": "en"}], "id": "d", "domain": "code"},
    ]
    columns = {"prompt": "question", "prompt_id": "id", "prompt_set": "domain"}
    found = read(rows, columns=columns, name="mine")
    assert found.frame.drop("row").rows() == [
        ("7", "chat", said("plain")),
        ("b", "mine", several),
        ("c", "code", said("one")),
        ("d", "code", said("more")),
    ]


def test_rows_are_filtered_and_counted():
    rows = [{"prompt": f"p{n}", "language": "en" if n % 3 else "de"} for n in range(9)]
    found = read_prompts([rows[:4], [], rows[4:]], PromptReading(where={"language": "de"}))
    assert found.frame.get_column("row").to_list() == [1, 4, 7]
    assert (found.rows, found.filtered) == (9, 6)
    with pytest.raises(TableError, match="no row has language = 'fr'"):
        read(rows, where={"language": "fr"})
    with pytest.raises(TableError, match=r"lacks the field 'tongue'; it has \['language', 'prompt'\]"):
        read(rows, where={"tongue": "fr"})


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("", "the last message is empty"),
        (" \n", "the last message is empty"),
        (None, "no prompt"),
        ([], "no prompt"),
        (7, "neither text nor messages but int"),
        ([{"role": "user"}], "lacks its role or content"),
        ([{"role": "user", "content": None}], "not text"),
        ([{"role": "human", "content": "a"}], "a role other than system, user, assistant: 'human'"),
        (said("a", "x"), "the last message is the assistant's, not the user's"),
        (said("only", first="system"), "no message of the user"),
        ([*said("a"), *said("b")], "do not take turns"),
        ([*said("a", "x"), *said("be kind", "b", first="system")], "do not take turns"),
        ([{"role": "assistant", "content": "hi"}, *said("b")], "do not take turns"),
        ("half \ud83d", "half a character"),
    ],
)
def test_what_cannot_be_asked_is_counted_with_its_reason(value: Any, reason: str):
    found = read([{"prompt": "fine"}, {"prompt": value}, {"prompt": value}])
    assert found.frame.height == 1
    (unusable,) = found.unusable
    assert reason in unusable.reason
    assert (unusable.rows, unusable.first_row) == (2, 2)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"chosen": said("a", "x"), "rejected": said("b", "x")}, "do not begin with the same message"),
        ({"question_id": "q", "turns": [{"content": "a"}, {"content": "b"}]}, "needs one turn"),
        ({"question_id": "q", "turns": []}, "needs one turn"),
        ({"question_id": "q", "turns": [{"content": None}]}, "no prompt"),
    ],
)
def test_rows_of_special_formats_that_hold_no_prompt(row: Row, reason: str):
    (unusable,) = read([row]).unusable
    assert reason in unusable.reason


def test_a_prompt_without_the_id_that_was_named():
    (unusable,) = read([{"prompt": "a", "id": None}], columns={"prompt_id": "id"}).unusable
    assert unusable.reason == "no prompt id"


@pytest.mark.parametrize(
    ("rows", "reading", "message"),
    [
        ([], {}, "no rows"),
        ([{"text": "a"}], {}, r"no prompts recognised: the fields are \['text'\], and none is 'prompt'"),
        ([{"text": "a"}], {"format": "table"}, "lacks the field 'prompt'"),
        ([{"text": "a"}], {"format": "alpaca_eval"}, "lacks the field 'instruction'"),
        ([{"prompt": "a"}], {"format": "arena_hard"}, "neither question_id nor uid"),
        ([{"prompt": "a"}], {"columns": {"prompt_id": "id"}}, "lacks the field 'id'"),
    ],
)
def test_sources_that_are_not_what_they_should_be(rows: list[Row], reading: dict[str, Any], message: str):
    with pytest.raises(TableError, match=message):
        read(rows, **reading)


def test_a_column_that_is_named_goes_before_the_known_formats():
    fields = ("question_id", "turns", "text")
    columns = PromptReading.model_validate({"columns": {"prompt": "text"}}).columns
    assert recognise(fields, PromptReading().columns) == "arena_hard"
    assert recognise(fields, columns) == "table"


def test_a_conversation_may_open_with_the_system():
    assert check_conversation(said("be kind", "a", "x", "b", first="system")) is None
