from typing import Any

import pytest

from charm_core.benchmarks.items import BenchmarkItem, Message, conversation, read_items, response_id
from charm_core.benchmarks.rewardbench import rewardbench
from charm_core.errors import TableError
from charm_core.responses import prompt_content_id
from tests.charm_core.benchmarks.made_up import pair


def _item(**changes: Any) -> BenchmarkItem:
    fields: dict[str, Any] = {
        "item_id": "1",
        "subset": "a",
        "messages": conversation("q"),
        "chosen": ("right",),
        "rejected": ("wrong",),
    }
    return BenchmarkItem(**fields | changes)


def test_a_text_is_a_message_of_the_user_and_messages_stay_what_they_are() -> None:
    assert conversation("hello") == (Message(role="user", content="hello"),)
    turns = [
        {"role": "user", "content": "a", "language": "English"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    assert [(turn.role, turn.content) for turn in conversation(turns)] == [
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
    ]


def test_ids_are_of_content_alone() -> None:
    one, other = _item(item_id="1", subset="a"), _item(item_id="2", subset="b", chosen=("else",))
    assert one.prompt_id == other.prompt_id == prompt_content_id([{"role": "user", "content": "q"}])
    assert response_id("right") != response_id("right ")
    assert _item(messages=conversation("other")).prompt_id != one.prompt_id


def test_an_item_is_drawn_alone_unless_it_belongs_to_a_group() -> None:
    assert (_item().unit, _item(group="prompt 7").unit) == ("1", "prompt 7")


def test_a_response_that_is_right_and_wrong_can_only_tie() -> None:
    assert not _item().is_unwinnable
    assert _item(chosen=("a", "b"), rejected=("b",)).is_unwinnable


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"prompt": None},
            r"row 2 of RewardBench cannot be used: the prompt is neither text nor messages but NoneType",
        ),
        ({"chosen": None}, r"row 2 of RewardBench cannot be used: chosen.0: Input should be a valid string"),
        ({"prompt": []}, r"row 2 of RewardBench cannot be used: messages: Tuple should have at least 1 item"),
        ({"prompt": [{"role": "user"}]}, r"row 2 of RewardBench lacks the field 'content'"),
        ({"rejected": "half \ud83d a pair"}, "row 2 of RewardBench has half a character in a text"),
        ({"subset": "poetry"}, r"the subset 'poetry' is none of \['alpacaeval-easy'"),
    ],
)
def test_a_bad_row_is_an_error_that_names_it(change: dict[str, Any], message: str) -> None:
    with pytest.raises(TableError, match=message):
        rewardbench([pair(1, "hep-go", "1", "0"), pair(2, "hep-go", "1", "0") | change])


def test_a_missing_field_is_named_with_the_fields_that_there_are() -> None:
    row = pair(1, "hep-go", "1", "0")
    del row["rejected"]
    with pytest.raises(
        TableError,
        match=r"row 1 of RewardBench lacks the field 'rejected'; it has \['chosen', 'id', 'prompt', 'subset'\]",
    ):
        rewardbench([row])


def test_no_rows_are_an_error() -> None:
    with pytest.raises(TableError, match="RewardBench has no items; check the file"):
        rewardbench([])


def test_one_row_twice_is_an_error_but_one_id_may_have_two_items() -> None:
    row = pair(1, "hep-go", "1", "0")
    with pytest.raises(TableError, match="the item 'hep-go/1' of RewardBench occurs twice"):
        rewardbench([row, dict(row)])
    items = rewardbench([row, row | {"chosen": "2"}, row | {"chosen": "3"}]).items
    assert [item.item_id for item in items] == ["hep-go/1", "hep-go/1#2", "hep-go/1#3"]
    assert len({item.unit for item in items}) == 3


def test_what_a_reader_cannot_use_is_an_error() -> None:
    def refuse(row: Any) -> BenchmarkItem:
        raise ValueError("the colour is wrong")

    with pytest.raises(TableError, match="row 1 of X cannot be used: the colour is wrong; give the official format"):
        read_items([{}], refuse, benchmark="X")
