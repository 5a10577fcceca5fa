import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from charm_core.reward_model.packing import lay_out, packed_batches, packed_tokens, prefix_groups
from charm_core.reward_model.rendering import Rendered

token_lists = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8).map(tuple), min_size=1, max_size=20)


def rendered(ids):
    return Rendered(input_ids=tuple(ids), token_type_ids=None, prompt_cut=False, response_cut=False)


@given(token_lists, st.integers(1, 4))
def test_groups_hold_every_text_once_of_one_owner_with_what_they_all_share(texts, owners):
    whose = [number % owners for number in range(len(texts))]
    groups = prefix_groups(texts, whose)
    assert sorted(text for group in groups for text in group.texts) == list(range(len(texts)))
    for group in groups:
        assert len({whose[text] for text in group.texts}) == 1
        assert len({texts[text][: group.shared] for text in group.texts}) == 1
        assert all(len(texts[text]) >= group.shared for text in group.texts)
    lengths = [len(text) for text in texts]
    assert sum(packed_tokens(group, lengths) for group in groups) <= sum(lengths)


def test_owners_that_are_all_different_share_nothing():
    assert [group.shared for group in prefix_groups([(1, 2, 3)] * 3, range(3))] == [0, 0, 0]


def test_a_response_with_another_beginning_does_not_take_the_prompt_from_the_others():
    prompt = (1,) * 50
    texts = [(*prompt, 2), (*prompt, 3, 4), (1, 9), (*prompt, 5)]
    groups = prefix_groups(texts, [0] * 4)
    assert {group.texts: group.shared for group in groups} == {(0, 1, 3): 50, (2,): 0}


@settings(max_examples=60)
@given(token_lists, st.integers(1, 30), st.integers(1, 3))
def test_rows_hold_every_text_once_within_the_budget(texts, budget, owners):
    lengths = [len(text) for text in texts]
    groups = prefix_groups(texts, [number % owners for number in range(len(texts))])
    rows = packed_batches(groups, lengths, budget)
    assert sorted(text for row in rows for group in row for text in group.texts) == list(range(len(texts)))
    for row in rows:
        alone = len(row) == 1 and len(row[0].texts) == 1
        assert alone or sum(packed_tokens(group, lengths) for group in row) <= budget
    first = [packed_tokens(row[0], lengths) for row in rows]
    assert first == sorted(first, reverse=True)


@given(token_lists, st.integers(1, 4))
def test_every_token_of_every_text_is_found_in_the_row(ids, owners):
    texts = [rendered(text) for text in ids]
    row = lay_out(prefix_groups(ids, [number % owners for number in range(len(ids))]), texts)
    assert sorted(row.texts) == list(range(len(texts)))
    for number, text in enumerate(row.texts):
        places = [row.index(number, place) for place in range(len(ids[text]))]
        assert [row.input_ids[place] for place in places] == list(ids[text])
        assert [row.position_ids[place] for place in places] == list(range(len(ids[text])))


def test_a_text_that_is_all_shared_ends_with_what_is_shared():
    ids = [(1, 2), (1, 2, 3)]
    row = lay_out(prefix_groups(ids, [0, 0]), [rendered(text) for text in ids])
    assert row.input_ids == [1, 2, 3]
    assert [row.index(0, 1), row.index(1, 2)] == [1, 2]
    with pytest.raises(IndexError, match="text 0 of the row has 2 tokens, not 3"):
        row.index(0, 2)


def test_a_row_as_it_is_drawn_in_the_module():
    prompt, other = (1, 2, 3), (4, 5)
    ids = [(*prompt, 6), (*prompt, 7, 8), (*other, 9)]
    row = lay_out(prefix_groups(ids, ["one", "one", "two"]), [rendered(text) for text in ids])
    assert row.input_ids == [1, 2, 3, 6, 7, 8, 4, 5, 9]
    assert row.position_ids == [0, 1, 2, 3, 3, 4, 0, 1, 2]
    assert [(s.start, s.length, s.prefix_start, s.prefix_length) for s in row.segments] == [
        (0, 3, 0, 0),
        (3, 1, 0, 3),
        (4, 2, 0, 3),
        (6, 3, 0, 0),
    ]
