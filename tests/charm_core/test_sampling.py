"""Decoding, how answers end, and how prompts are cut into shards."""

import math
from collections import Counter

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from charm_core.errors import TableError
from charm_core.sampling import (
    Answer,
    Decoding,
    Status,
    conversation,
    count_samples,
    decoding_differences,
    request_seed,
    samples_table,
    shard_numbers,
    status_of,
)
from charm_core.tables import SAMPLES

IDS = st.lists(st.text(min_size=1, max_size=8), unique=True, max_size=300)


@pytest.mark.parametrize(
    ("response", "finish_reason", "status"),
    [
        ("It is 42.", "stop", "complete"),
        ("It is 42.", None, "complete"),
        ("It is", "length", "truncated"),
        ("I'm sorry, but I can't help with that.", "stop", "refused"),
        ("I'm sorry, but I can't help with", "length", "truncated"),
        ("some of it", "content_filter", "refused"),
        ("", "content_filter", "refused"),
        ("", "stop", "empty"),
        (" \n\t", "length", "empty"),
        ("", None, "empty"),
        ("x", "tool_calls", "complete"),
    ],
)
def test_how_an_answer_ended(response: str, finish_reason: str | None, status: Status):
    assert status_of(response, finish_reason) == status


def answer(prompt_id: str, status: Status = "complete", tokens: int | None = 3) -> Answer:
    return Answer(prompt_id=prompt_id, response="x", status=status, prompt_tokens=5, response_tokens=tokens)


class TestTables:
    def test_rows_are_sorted_and_keep_what_the_table_has(self):
        table = samples_table("m", [answer("b"), answer("a", "failed").model_copy(update={"reason": "why"})])
        assert table.columns == list(SAMPLES.columns)
        assert table["prompt_id"].to_list() == ["a", "b"]
        assert table["status"].to_list() == ["failed", "complete"]

    def test_two_answers_to_one_prompt_are_an_error(self):
        with pytest.raises(TableError, match="occur more than once"):
            samples_table("m", [answer("a"), answer("a")])

    def test_counts(self):
        statuses: list[Status] = ["complete", "complete", "truncated", "empty", "refused", "failed"]
        answers = [answer(f"p{n}", status, None if n == 0 else 3) for n, status in enumerate(statuses)]
        counts = count_samples(samples_table("m", answers))
        assert counts.model_dump() == {
            "prompts": 6, "complete": 2, "truncated": 1, "empty": 1, "refused": 1, "failed": 1,
            "prompt_tokens": 30, "response_tokens": 15,
        }  # fmt: skip

    def test_tokens_that_nobody_counted_are_not_none_of_them(self):
        counts = count_samples(samples_table("m", [answer("a", tokens=None)]))
        assert (counts.prompt_tokens, counts.response_tokens) == (5, None)


class TestShards:
    @given(IDS, st.integers(1, 60))
    def test_the_mean_size_is_as_asked_and_the_number_a_power_of_two(self, ids: list[str], size: int):
        numbers = shard_numbers(ids, size)
        assert len(numbers) == len(ids)
        most = 2 ** math.ceil(math.log2(max(1, len(ids) / size)))
        assert all(0 <= number < most for number in numbers)

    @given(IDS, st.integers(1, 60))
    def test_a_shard_is_by_the_id_alone(self, ids: list[str], size: int):
        forth = dict(zip(ids, shard_numbers(ids, size), strict=True))
        back = dict(zip(ids[::-1], shard_numbers(ids[::-1], size), strict=True))
        assert forth == back

    def test_one_more_prompt_changes_one_shard(self):
        ids = [f"p{n}" for n in range(1500)]
        before, after = shard_numbers(ids, 1000), shard_numbers([*ids, "another"], 1000)
        assert after[:-1] == before

    def test_where_the_number_doubles_each_falls_into_two(self):
        ids = [f"p{n}" for n in range(2000)]
        few, many = shard_numbers(ids, 1000), shard_numbers(ids, 999)
        assert (max(few), max(many)) == (1, 3)
        assert [number // 2 for number in many] == few

    def test_they_are_about_equal(self):
        sizes = Counter(shard_numbers([f"p{n}" for n in range(16_000)], 1000))
        assert len(sizes) == 16
        assert max(sizes.values()) - min(sizes.values()) < 6 * math.sqrt(1000)

    def test_the_cut_is_golden(self):
        # another one would make everybody's finished work unreachable
        assert shard_numbers([f"p{n}" for n in range(8)], 2) == [0, 3, 0, 1, 2, 1, 1, 0]

    def test_no_prompts_and_few(self):
        assert shard_numbers([], 10) == []
        assert shard_numbers(["a", "b"], 10) == [0, 0]


class TestRequests:
    def test_every_prompt_has_its_own_seed(self):
        seeds = [request_seed(0, f"p{n}") for n in range(1000)]
        assert len(set(seeds)) == 1000
        assert all(seed is not None and 0 <= seed < 2**31 for seed in seeds)
        assert request_seed(0, "p1") == request_seed(0, "p1") != request_seed(1, "p1")
        assert request_seed(None, "p1") is None

    def test_the_seed_is_golden(self):
        assert request_seed(0, "p1") == 2117894432

    @pytest.mark.parametrize(
        ("roles", "system_prompt", "sent"),
        [
            (["user"], None, ["user"]),
            (["user"], "s", ["system", "user"]),
            (["user"], "", ["system", "user"]),
            (["system", "user"], "s", ["system", "user"]),
            (["user", "assistant", "user"], "s", ["system", "user", "assistant", "user"]),
        ],
    )
    def test_the_system_prompt_goes_before_what_has_none(
        self, roles: list[str], system_prompt: str | None, sent: list[str]
    ):
        messages = [{"role": role, "content": "own"} for role in roles]
        found = conversation(messages, system_prompt)
        assert [message["role"] for message in found] == sent
        assert [message["role"] for message in messages] == roles


class TestDecodings:
    def test_the_same_for_all_is_no_confound(self):
        assert decoding_differences([("a", Decoding()), ("b", Decoding())]) == ()
        assert decoding_differences([]) == decoding_differences([("a", None)]) == ()

    def test_what_differs_is_named_with_its_values(self):
        found = decoding_differences([("a", Decoding()), ("b", Decoding(top_p=0.9)), ("c", Decoding())])
        assert found == ("Policy models were sampled with different top_p: 1.0 for a, c; 0.9 for b.",)

    def test_what_is_not_known_is_said_beside_what_is(self):
        (found,) = decoding_differences([("a", None), ("b", Decoding())])
        assert found.startswith("The decoding of 1 replayed policy models is not known (a), while b were sampled")

    @pytest.mark.parametrize(
        "wrong", [{"sampling_temperature": -0.1}, {"top_p": 0.0}, {"top_p": 1.1}, {"max_tokens": 0}, {"top_k": 5}]
    )
    def test_what_is_no_decoding(self, wrong: dict[str, float]):
        with pytest.raises(ValidationError):
            Decoding(**wrong)


def test_answers_survive_json():
    one = Answer(prompt_id="p", response="ä\n\u2028", status="failed", reason="429: no", served_as="m")
    assert Answer.model_validate_json(one.model_dump_json()) == one


def test_samples_have_one_dtype_whatever_is_missing():
    table = samples_table("m", [Answer(prompt_id="p", response="", status="failed")])
    assert dict(table.schema) == dict(SAMPLES.columns)
    assert isinstance(table, pl.DataFrame)
