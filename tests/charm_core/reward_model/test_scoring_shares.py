"""Shards and shares of responses: every text once, conversations whole, the same whatever the order of the rows."""

import itertools

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from charm_core.errors import TableError
from charm_core.reward_model.batching import deal_out
from charm_core.reward_model.jobs import ScoringSummary
from charm_core.reward_model.scoring_shares import (
    ScoringShare,
    cut_into_shards,
    merge_summaries,
    share_responses,
    ties,
)
from charm_core.tables import PROMPTS, RESPONSES, SCORES, validate
from tests.charm_core.reward_model.tiny import messages

KEY = ["prompt_id", "policy_model"]

cells = st.lists(
    st.tuples(st.integers(0, 12), st.sampled_from("abcd"), st.text("xyz ", max_size=30)),
    min_size=1,
    max_size=40,
    unique_by=lambda cell: cell[:2],
)
"""Number of the prompt, policy model, response; every third prompt asks the same under another id."""


def tables(answers: list[tuple[int, str, str]]) -> tuple[pl.DataFrame, pl.DataFrame]:
    numbers = sorted({number for number, _, _ in answers} | {99})
    asked = pl.DataFrame(
        [(f"p{number}", "x", messages(f"question {number % 3}" * (number % 3 + 1))) for number in numbers],
        schema=dict(PROMPTS.columns),
        orient="row",
    )
    rows = [(f"p{number}", name, response) for number, name, response in answers]
    return asked, pl.DataFrame(rows, schema=dict(RESPONSES.columns), orient="row")


def conversations(share: ScoringShare) -> set[str]:
    return {str(asked) for asked in share.prompts["messages"].to_list()}


def assert_dealt(shares: list[ScoringShare], responses: pl.DataFrame) -> None:
    """Every response exactly once, its prompt with it, no conversation in two places, nothing empty."""
    together = pl.concat([share.responses for share in shares])
    assert validate(together, RESPONSES).equals(validate(responses, RESPONSES))
    for share in shares:
        assert set(share.prompts["prompt_id"]) == set(share.responses["prompt_id"])
    asked = [conversation for share in shares for conversation in conversations(share)]
    assert len(asked) == len(set(asked))


def as_sets(shares: list[ScoringShare]) -> list[frozenset[tuple[str, str]]]:
    return [frozenset(share.responses.select(KEY).rows()) for share in shares]


@given(cells, st.integers(1, 6), st.randoms())
def test_shares_hold_every_text_once_and_conversations_whole(answers, count, random):
    prompts, responses = tables(answers)
    shares = share_responses(prompts, responses, count, max_length=5)
    assert_dealt(shares, responses)
    assert len(shares) == min(count, len({number % 3 for number, _, _ in answers}))
    random.shuffle(answers)
    other_order = tables(answers)[1]
    assert as_sets(share_responses(prompts.reverse(), other_order, count, max_length=5)) == as_sets(shares)


@given(cells, st.integers(1, 50), st.randoms())
def test_shards_hold_every_text_once_and_depend_on_content_alone(answers, shard_texts, random):
    prompts, responses = tables(answers)
    shards = cut_into_shards(prompts, responses, shard_texts)
    assert_dealt(shards, responses)
    assert len(shards) == 1 or responses.height > shard_texts
    random.shuffle(answers)
    assert as_sets(cut_into_shards(prompts.reverse(), tables(answers)[1], shard_texts)) == as_sets(shards)
    renamed = [
        table.with_columns(pl.lit("q") + pl.col("prompt_id").alias("prompt_id")) for table in (prompts, responses)
    ]
    assert [conversations(shard) for shard in cut_into_shards(*renamed, shard_texts)] == [
        conversations(shard) for shard in shards
    ]


def test_one_prompt_more_changes_one_shard():
    def shards(prompts: int) -> list[frozenset[tuple[str, str]]]:
        asked = pl.DataFrame(
            [(f"p{number}", "x", messages(f"question {number}")) for number in range(prompts)],
            schema=dict(PROMPTS.columns),
            orient="row",
        )
        rows = [(f"p{number}", "a", "answer") for number in range(prompts)]
        return as_sets(cut_into_shards(asked, pl.DataFrame(rows, schema=dict(RESPONSES.columns), orient="row"), 16))

    before, after = shards(100), shards(101)
    assert len(before) == len(after) == 8
    assert sum(one != other for one, other in zip(before, after, strict=True)) == 1


@given(st.lists(st.integers(1, 100), min_size=1, max_size=60), st.integers(1, 8))
def test_pieces_are_dealt_out_evenly(sizes, shares):
    dealt = deal_out(sizes, shares)
    assert sorted(index for share in dealt for index in share) == list(range(len(sizes)))
    loads = [sum(sizes[index] for index in share) for share in dealt]
    # nobody has more than the mean and one piece
    assert max(loads) <= sum(sizes) / shares + max(sizes)
    assert all(sizes[first] >= sizes[second] for share in dealt for first, second in itertools.pairwise(share))


def test_what_is_cut_off_is_no_work():
    """A text far beyond the limit is as much work as one at it: it does not have a share for itself."""
    asked = pl.DataFrame(
        [(f"p{number}", "x", messages(f"question {number}")) for number in range(4)],
        schema=dict(PROMPTS.columns),
        orient="row",
    )
    rows = [(f"p{number}", "a", "x" * (1_000_000 if number == 3 else 4000)) for number in range(4)]
    responses = pl.DataFrame(rows, schema=dict(RESPONSES.columns), orient="row")

    def sizes(max_length: int | None) -> list[int]:
        return sorted(share.responses.height for share in share_responses(asked, responses, 2, max_length))

    assert sizes(None) == [1, 3]
    assert sizes(100) == [2, 2]


def test_a_response_without_its_prompt_is_an_error():
    prompts, responses = tables([(0, "a", "x"), (1, "a", "y")])
    with pytest.raises(TableError, match=r"1 prompt ids .* first \['p1'\]; give the prompts that were answered"):
        share_responses(prompts.filter(pl.col("prompt_id") != "p1"), responses, 2)


def summary(**changes: float | str) -> ScoringSummary:
    plain = {
        "texts": 4,
        "distinct_texts": 3,
        "tokens": 90,
        "computed_tokens": 100,
        "padding_share": 0.1,
        "batching": "padded",
        "batch_drift": 1e-7,
        "max_length": 64,
        "longest_text": 30,
        "prompts_cut": 1,
        "responses_cut": 0,
        "empty_responses": 1,
        "tie_rate": None,
        "smallest_gap": None,
    }
    return ScoringSummary(**{**plain, **changes})


def score_table(*rows: tuple[str, str, float]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=dict(SCORES.columns), orient="row")


def test_summaries_add_up_and_ties_are_counted_over_all():
    scores = score_table(
        ("p", "a", 1.0), ("p", "b", 1.0), ("p", "c", 1.5), ("q", "a", 0.0), ("q", "b", 0.25), ("r", "a", 7.0)
    )
    merged = merge_summaries(
        [summary(), summary(texts=2, tokens=110, computed_tokens=110, longest_text=64, batch_drift=2e-7)], scores
    )
    assert merged == summary(
        texts=6,
        distinct_texts=6,
        tokens=200,
        computed_tokens=210,
        padding_share=1 - 200 / 210,
        batch_drift=2e-7,
        longest_text=64,
        prompts_cut=2,
        empty_responses=2,
        tie_rate=1 / 4,
        smallest_gap=0.25,
    )
    shared = summary(computed_tokens=50, padding_share=0.0, batching="packed")
    assert merge_summaries([shared, shared], scores).padding_share == 0
    assert merge_summaries([shared, shared], scores).batching == "packed"
    assert merge_summaries([shared, summary()], scores).batching == "padded"
    assert merge_summaries([summary(tie_rate=1 / 4, smallest_gap=0.25)], scores).tie_rate == ties(scores)[0]


def test_without_a_pair_there_is_no_tie_rate():
    assert ties(score_table(("p", "a", 1.0), ("q", "b", 1.0))) == (None, None)
