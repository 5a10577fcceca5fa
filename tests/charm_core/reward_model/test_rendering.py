import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from charm_core.errors import ModelError
from charm_core.reward_model.rendering import joined_prompt, render, uncut_length
from charm_core.reward_model.spec import RewardModelSpec
from tests.charm_core.reward_model.tiny import VOCABULARY, WORDS, chat_tokenizer, messages, pair_tokenizer

CHAT, PAIR = chat_tokenizer(), pair_tokenizer()
words = st.lists(st.sampled_from(WORDS), max_size=30).map(" ".join)


def spec(**changes):
    return RewardModelSpec(path="unused", **({"max_length": 64} | changes))


def tokens(tokenizer, rendered):
    return tokenizer.convert_ids_to_tokens(list(rendered.input_ids))


def test_a_chat_template_is_used_as_it_is_and_its_bos_is_not_doubled():
    assert CHAT("w1")["input_ids"][0] == VOCABULARY["<bos>"]  # this tokenizer would add one of its own
    rendered = render(CHAT, messages("w1 w2", "w3", "w4"), "w5", spec())
    assert tokens(CHAT, rendered) == (
        [
            "<bos>",
            "<user>",
            "w1",
            "w2",
            "<eos>",
            "<assistant>",
            "w3",
            "<eos>",
            "<user>",
            "w4",
            "<eos>",
            "<assistant>",
            "w5",
            "<eos>",
        ]
    )
    assert rendered.token_type_ids is None
    assert not rendered.prompt_cut
    assert not rendered.response_cut


def test_a_text_pair_has_separators_and_segment_ids():
    rendered = render(PAIR, messages("w1 w2"), "w3", spec())
    assert tokens(PAIR, rendered) == ["[CLS]", "w1", "w2", "[SEP]", "w3", "[SEP]"]
    assert rendered.token_type_ids == (0, 0, 0, 0, 1, 1)


def test_several_messages_become_one_text_for_an_encoder():
    assert joined_prompt(messages("a", "b", "c")) == "user: a\n\nassistant: b\n\nuser: c"
    assert joined_prompt(messages("a")) == "a"


def test_an_empty_response_is_rendered():
    assert tokens(PAIR, render(PAIR, messages("w1"), "", spec())) == ["[CLS]", "w1", "[SEP]", "[SEP]"]
    assert tokens(CHAT, render(CHAT, messages("w1"), "", spec())) == [
        "<bos>",
        "<user>",
        "w1",
        "<eos>",
        "<assistant>",
        "<eos>",
    ]


@pytest.mark.parametrize("tokenizer", [CHAT, PAIR], ids=["chat", "pair"])
@settings(max_examples=60, deadline=None)
@given(prompt=words, response=words, limit=st.integers(8, 40), least=st.integers(1, 20))
def test_what_is_too_long_loses_ends_and_keeps_the_closing_tokens(tokenizer, prompt, response, limit, least):
    whole = tokens(tokenizer, render(tokenizer, messages(prompt), response, spec(max_length=200)))
    cut = render(tokenizer, messages(prompt), response, spec(max_length=limit, min_response_tokens=least))
    kept = tokens(tokenizer, cut)
    assert len(kept) == min(len(whole), limit)
    assert kept[-1] == whole[-1]
    fixed = len(whole) - len(prompt.split()) - len(response.split())
    kept_response = min(len(response.split()), max(min(least, limit - fixed), limit - fixed - len(prompt.split())))
    kept_prompt = min(len(prompt.split()), limit - fixed - kept_response)
    assert [token for token in kept if token in WORDS] == prompt.split()[:kept_prompt] + response.split()[
        :kept_response
    ]
    assert cut.prompt_cut == (kept_prompt < len(prompt.split()))
    assert cut.response_cut == (kept_response < len(response.split()))


@pytest.mark.parametrize("tokenizer", [CHAT, PAIR], ids=["chat", "pair"])
@settings(max_examples=60, deadline=None)
@given(prompt=words, response=words, limit=st.integers(8, 40))
def test_with_truncation_side_left_the_prompt_loses_its_beginning_first(tokenizer, prompt, response, limit):
    whole = tokens(tokenizer, render(tokenizer, messages(prompt), response, spec(max_length=200)))
    cut = render(tokenizer, messages(prompt), response, spec(max_length=limit, truncation_side="left"))
    kept = tokens(tokenizer, cut)
    assert len(kept) == min(len(whole), limit)
    assert (kept[0], kept[-1]) == (whole[0], whole[-1])
    asked, said = prompt.split(), response.split()
    room = limit - (len(whole) - len(asked) - len(said))
    kept_said = min(len(said), room)
    kept_asked = min(len(asked), room - kept_said)
    expected = asked[len(asked) - kept_asked :] + said[len(said) - kept_said :]
    assert [token for token in kept if token in WORDS] == expected
    assert cut.prompt_cut == (kept_asked < len(asked))
    assert cut.response_cut == (kept_said < len(said))


def test_with_truncation_side_left_the_first_turns_go_and_the_system_message_stays():
    conversation = [{"role": "system", "content": "w1"}, *messages("w2 w3 w4", "w5 w6", "w7 w8")]
    left = spec(max_length=19, truncation_side="left")
    cut = render(CHAT, conversation, "w9 w10", left)
    # 11 tokens are the template's, so 8 words stay
    assert [token for token in tokens(CHAT, cut) if token in WORDS] == ["w1", "w4", "w5", "w6", "w7", "w8", "w9", "w10"]
    shorter = render(CHAT, conversation, "w9 w10", left.model_copy(update={"max_length": 14}))
    assert [token for token in tokens(CHAT, shorter) if token in WORDS] == ["w1", "w9", "w10"]
    least = render(CHAT, conversation, "w9 w10", left.model_copy(update={"max_length": 12}))
    assert [token for token in tokens(CHAT, least) if token in WORDS] == ["w1"]


def test_max_prompt_characters_keeps_ends_with_truncation_side_left():
    rendered = render(CHAT, messages("w1 w2 w3"), "w4 w5", spec(max_prompt_characters=5, truncation_side="left"))
    assert [token for token in tokens(CHAT, rendered) if token in WORDS] == ["w2", "w3", "w4", "w5"]
    assert rendered.prompt_cut
    assert not rendered.response_cut


def test_a_system_prompt_comes_before_prompts_that_have_none():
    instructed = spec(system_prompt="w1 w2")
    chat = tokens(CHAT, render(CHAT, messages("w3"), "w4", instructed))
    assert chat[:4] == ["<bos>", "<system>", "w1", "w2"]
    own = [{"role": "system", "content": "w5"}, *messages("w3")]
    assert tokens(CHAT, render(CHAT, own, "w4", instructed)) == tokens(CHAT, render(CHAT, own, "w4", spec()))
    pair = tokens(PAIR, render(PAIR, messages("w3"), "w4", instructed))
    assert pair == ["[CLS]", "[UNK]", "w1", "w2", "[UNK]", "w3", "[SEP]", "w4", "[SEP]"]  # system: ... user: ...


def test_uncut_length_is_that_of_the_text_without_a_limit():
    for tokenizer in (CHAT, PAIR):
        short = spec(max_length=12, max_prompt_characters=8, system_prompt="w1 w2 w3 w4")
        prompt, response = messages("w1 w2 w3 w4 w5"), " ".join(["w6"] * 30)
        whole = render(tokenizer, prompt, response, short.model_copy(update={"max_length": 200}))
        assert uncut_length(tokenizer, prompt, response, short) == len(whole.input_ids) > 12


def test_the_response_start_is_known_where_it_is_needed():
    assert render(CHAT, messages("w1"), "w2", spec()).response_start is None
    needed = render(CHAT, messages("w1"), "w2", spec(kind="dpo", reference_model="other"))
    # this template has no header of its own for an answer to come, so its role token counts as the response's
    assert tokens(CHAT, needed)[needed.response_start :] == ["<assistant>", "w2", "<eos>"]


def test_max_prompt_characters_cuts_each_message_at_its_end():
    rendered = render(CHAT, messages("w1 w2 w3", "w4", "w5 w6"), "w7 w8 w9", spec(max_prompt_characters=2))
    assert tokens(CHAT, rendered) == (
        [
            "<bos>",
            "<user>",
            "w1",
            "<eos>",
            "<assistant>",
            "w4",
            "<eos>",
            "<user>",
            "w5",
            "<eos>",
            "<assistant>",
            "w7",
            "w8",
            "w9",
            "<eos>",
        ]
    )
    assert rendered.prompt_cut
    assert not rendered.response_cut


def test_a_template_cannot_see_the_date():
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = "{%- set day = strftime_now('w%d') -%}{{ day }} {{ messages[-1]['content'] }}"
    assert tokens(tokenizer, render(tokenizer, messages("w1"), "w2", spec())) == ["w26", "w2"]


def test_a_template_that_refuses_a_conversation_is_named():
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(ModelError, match=r"roles \['user', 'assistant'\].*no system role"):
        render(tokenizer, messages("w1"), "w2", spec())


def test_a_tokenizer_that_cannot_say_what_the_model_wants_is_an_error():
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="neither a chat template nor separator tokens"):
        render(tokenizer, messages("w1"), "w2", spec())


def test_a_template_longer_than_the_limit_is_an_error():
    rng = np.random.default_rng(0)
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = " ".join(rng.choice(WORDS, 20)) + " {{ messages[-1]['content'] }}"
    with pytest.raises(ModelError, match="raise max_length"):
        render(tokenizer, messages("w1"), "w2", spec(max_length=10))
