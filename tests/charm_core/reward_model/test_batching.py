import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from charm_core.errors import TableError
from charm_core.reward_model.batching import PairGroup, padded_cost, share_out, token_budget_batches
from charm_core.reward_model.plan import learning_rate_factor, plan_steps, prepare
from charm_core.reward_model.spec import RewardModelSpec, TrainingConfig
from tests.charm_core.reward_model.tiny import _pair_row as pair_row
from tests.charm_core.reward_model.tiny import messages, pair_tokenizer, pairs_table

SPEC = RewardModelSpec(path="unused", max_length=64)
lengths = st.lists(st.integers(1, 50), min_size=1, max_size=40)


def groups_of(sizes):
    """One group per number of texts; every text is paired with the first."""
    groups, first = [], 0
    for number, size in enumerate(sizes):
        pairs = tuple((0, other) for other in range(1, size)) or ((0, 0),)
        groups.append(
            PairGroup(
                prompt_id=f"p{number}",
                texts=tuple(range(first, first + size)),
                pairs=pairs,
                rows=tuple(range(len(pairs))),
            )
        )
        first += size
    return groups


@given(lengths, st.integers(1, 200))
def test_batches_hold_every_text_once_within_the_budget_longest_first(counts, budget):
    batches = token_budget_batches(counts, budget)
    assert sorted(index for batch in batches for index in batch) == list(range(len(counts)))
    ordered = [counts[index] for batch in batches for index in batch]
    assert ordered == sorted(counts, reverse=True)
    assert all(len(batch) == 1 or len(batch) * counts[batch[0]] <= budget for batch in batches)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=12), st.integers(1, 4), st.integers(1, 200), st.randoms())
def test_every_group_goes_whole_to_one_rank_and_ranks_have_equally_many_micro_batches(sizes, ranks, budget, random):
    groups = groups_of(sizes)
    counts = [random.randint(1, 30) for _ in range(sum(sizes))]
    shares = share_out(groups, padded_cost(counts), ranks=ranks, budget=budget)
    assert len(shares) == ranks
    assert len({len(share) for share in shares}) == 1
    dealt = [group.prompt_id for share in shares for batch in share for group in batch]
    assert sorted(dealt) == sorted(group.prompt_id for group in groups)
    for batch in (batch for share in shares for batch in share if len(batch) > 1):
        texts = [text for group in batch for text in group.texts]
        assert len(texts) * max(counts[text] for text in texts) <= budget


@given(st.lists(st.integers(2, 8), min_size=1, max_size=15), st.integers(1, 12), st.floats(0.1, 3), st.integers(0, 9))
def test_steps_take_whole_prompts_every_epoch_once(sizes, pairs_per_step, epochs, seed):
    groups = groups_of(sizes)
    config = TrainingConfig(pairs_per_step=pairs_per_step, epochs=epochs, seed=seed)
    steps = plan_steps(groups, config)
    order = [group.prompt_id for step in steps for group in step]
    whole = int(epochs)
    for epoch in range(whole):
        assert sorted(order[epoch * len(groups) : (epoch + 1) * len(groups)]) == sorted(
            group.prompt_id for group in groups
        )
    assert len(order) - whole * len(groups) == (max(1, round((epochs - whole) * len(groups))) if epochs > whole else 0)
    assert all(len(step) == 1 or sum(len(group.pairs) for group in step) <= pairs_per_step for step in steps)
    assert steps == plan_steps(groups, config)


@given(
    st.lists(st.lists(st.integers(1, 30), min_size=2, max_size=5), min_size=1, max_size=15), st.integers(1, 90), st.integers(0, 9)
)  # fmt: skip
def test_steps_are_cut_by_tokens_if_asked(lengths, tokens_per_step, seed):
    groups = groups_of([len(texts) for texts in lengths])
    counts = [count for texts in lengths for count in texts]
    config = TrainingConfig(tokens_per_step=tokens_per_step, pairs_per_step=1, seed=seed)
    steps = plan_steps(groups, config, counts)
    assert sorted(group.prompt_id for step in steps for group in step) == sorted(group.prompt_id for group in groups)
    tokens = [sum(counts[text] for group in step for text in group.texts) for step in steps]
    assert all(len(step) == 1 or size <= tokens_per_step for step, size in zip(steps, tokens, strict=True))
    # as many as the limit makes necessary where every prompt is small
    if max(sum(texts) for texts in lengths) * len(lengths) <= tokens_per_step:
        assert len(steps) == 1


def test_steps_of_as_many_tokens_have_different_numbers_of_pairs():
    groups = groups_of([2, 2, 2, 2, 2, 2])
    counts = [40, 40, 10, 10, 10, 10, 10, 10, 10, 10, 10, 10]
    steps = plan_steps(groups, TrainingConfig(tokens_per_step=80), counts)
    assert ["p0"] in [[group.prompt_id for group in step] for step in steps]
    assert max(len(step) for step in steps) > 1


def test_the_learning_rate_warms_up_and_decays_and_never_wastes_a_step():
    config = TrainingConfig(warmup_ratio=0.2, schedule="cosine")
    factors = [learning_rate_factor(step, 10, config) for step in range(10)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert factors[6] == pytest.approx(0.5)
    assert all(np.diff(factors[2:]) < 0)
    assert factors[-1] > 0
    linear = config.model_copy(update={"schedule": "linear"})
    assert [learning_rate_factor(step, 10, linear) for step in (2, 6, 9)] == [1.0, 0.5, 0.125]


def test_each_response_of_a_prompt_is_one_text_however_many_pairs_it_is_in():
    data = prepare(pairs_table(prompts=6, models="abcd", held_out=2), pair_tokenizer(), SPEC)
    assert [len(group.pairs) for group in data.train] == [6] * 4
    assert [len(group.texts) for group in data.train] == [4] * 4
    assert len(data.held_out) == 2
    assert len(data.texts) == 6 * 4
    np.testing.assert_allclose(
        data.margins, pairs_table(6, "abcd", 2).sort("prompt_id", "chosen_model", "rejected_model")["margin"]
    )


def bad_pairs(**changes):
    row = pair_row("p", "train", messages("w1"), (1.0, "a", "w2"), (0.0, "b", "w3"))
    import polars as pl

    other = pair_row("p", "train", messages("w1"), (1.0, "a", "w2"), (0.0, "c", "w4"))
    return pl.DataFrame([row, other | changes])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "test"}, "split 'test'"),
        ({"split": "held_out"}, "lies in both splits"),
        ({"prompt": messages("w9")}, "two different texts"),
        ({"chosen": messages("w1", "w2")}, "has 2 messages"),
        ({"chosen_calibrated": float("nan")}, "NaN or infinite"),
    ],
)
def test_pairs_that_cannot_be_meant_are_errors(changes, message):
    with pytest.raises(TableError, match=message):
        prepare(bad_pairs(**changes), pair_tokenizer(), SPEC)


def test_no_training_pair_is_an_error():
    with pytest.raises(TableError, match="nothing to train on"):
        prepare(pairs_table(prompts=3, held_out=3), pair_tokenizer(), SPEC)
