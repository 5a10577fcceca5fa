"""Overlap of prompts with benchmark texts, held against a plain reading of its definition."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from charm_core import ngram_overlap
from charm_core.ngram_overlap import OverlapConfig, find_overlaps

ITEM = "Name the seven wonders of the ancient world and say in one sentence each what became of them"
"""Eighteen words: six 13-grams."""


def plain_share(prompt: str, text: str, config: OverlapConfig) -> float:
    """The definition, word for word, for texts of letters."""
    mine, theirs = (re.findall(r"[a-z0-9]+", words.lower()) for words in (prompt, text))
    shorter, longer = sorted((mine, theirs), key=len)
    if not shorter:
        return 0.0
    if len(shorter) < config.words:
        if len(shorter) < config.short_words:
            return float(shorter == longer)
        size = len(shorter)
    else:
        size = config.words
    grams = [tuple(shorter[start : start + size]) for start in range(len(shorter) - size + 1)]
    others = {tuple(longer[start : start + size]) for start in range(len(longer) - size + 1)}
    return sum(gram in others for gram in grams) / len(grams)


def shares(prompts: list[str], texts: list[str], **config: float) -> dict[int, tuple[int, float]]:
    found = find_overlaps(prompts, {"it": texts}, OverlapConfig.model_validate(config))
    return {prompt: (text, share) for prompt, _, text, share in found.iter_rows()}


words = st.lists(st.sampled_from("abc"), max_size=14).map(" ".join)


@given(
    prompts=st.lists(words, min_size=1, max_size=6),
    texts=st.lists(words, max_size=6),
    size=st.integers(2, 6),
    short=st.integers(1, 4),
    least=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
)
def test_it_is_the_definition(prompts: list[str], texts: list[str], size: int, short: int, least: float):
    config = OverlapConfig(words=size, share=least, short_words=min(short, size))
    best = {
        number: max(((plain_share(prompt, text, config), -place) for place, text in enumerate(texts)), default=(0.0, 0))
        for number, prompt in enumerate(prompts)
    }
    expected = {
        number: (-place, pytest.approx(share))
        for number, (share, place) in best.items()
        if share > 0 and share >= least
    }
    found = find_overlaps(prompts, {"it": texts}, config)
    assert {prompt: (text, share) for prompt, _, text, share in found.iter_rows()} == expected


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch):
    texts = [" ".join("abcab"[(n + k) % 5] for k in range(n % 9)) for n in range(40)]
    config = OverlapConfig(words=3, short_words=2, share=0.2)
    known = {"one": texts[::3], "two": texts[1::5], "none": []}
    whole = find_overlaps(texts, known, config)
    monkeypatch.setattr(ngram_overlap, "_BLOCK_PROMPTS", 7)
    monkeypatch.setattr(ngram_overlap, "_BLOCK_MATCHES", 5)
    assert find_overlaps(texts, known, config).equals(whole)
    alone = {name: shares(texts, known[name], words=3, short_words=2, share=0.2) for name in known}
    assert {(prompt, name): (text, share) for prompt, name, text, share in whole.iter_rows()} == {
        (prompt, name): best for name, found in alone.items() for prompt, best in found.items()
    }
    assert [len(found) for found in alone.values()] == [30, 32, 0]


def test_an_item_inside_a_long_prompt_and_a_prompt_inside_an_item():
    long = f"{'So much for that. ' * 100} {ITEM}. {'And so on. ' * 100}"
    assert shares([long, "Hello there"], [ITEM]) == {0: (0, 1.0)}
    assert shares([ITEM], [long]) == {0: (0, 1.0)}


def test_case_punctuation_and_layout_do_not_matter():
    assert shares([ITEM.upper().replace(" ", ",\n")], [ITEM]) == {0: (0, 1.0)}


def test_the_share_is_of_the_shorter_text():
    half = " ".join(ITEM.split()[:15])  # three of the six 13-grams of the item; all of its own
    other = f"{half} if any of this is known to you at all"
    assert shares([half], [ITEM]) == {0: (0, 1.0)}
    assert shares([other], [ITEM]) == {0: (0, 0.5)}
    assert shares([other], [ITEM], share=0.51) == {}
    assert shares([" ".join(ITEM.split()[:13]) + " or do not do it"], [ITEM], share=0) == {0: (0, pytest.approx(1 / 6))}


@pytest.mark.parametrize(
    ("prompt", "text", "found"),
    [
        ("Tell me a joke", "tell me a joke!", True),
        ("Tell me a joke", f"{ITEM}. Tell me a joke", False),
        (f"{ITEM}. Tell me a joke", "Tell me a joke", False),
        ("Tell me a very long joke about two cows", f"{ITEM}. Tell me a very long joke about two cows", True),
        (f"{ITEM}. Tell me a very long joke about two cows", "Tell me a very long joke about two cows", True),
        ("Tell me a very long joke about two cows", "Tell me a very long joke about two pigs", False),
        ("", "", False),
        ("?!", "?!", False),
        ("请写一首关于春天早晨的短诗好吗", "先生,请写一首关于春天早晨的短诗好吗?", True),
        ("请写一首关于春天早晨的短诗好吗", "请写一首关于秋天傍晚的短诗好吗", False),
    ],
)
def test_short_texts(prompt: str, text: str, found: bool):
    assert bool(shares([prompt], [text])) == found


def test_the_text_that_is_most_alike_is_named():
    assert shares([ITEM], ["something else", f"{ITEM} and", ITEM]) == {0: (1, 1.0)}


def test_each_benchmark_is_told_apart():
    known = {"b": ["unlike", f"{ITEM}!"], "a": [ITEM, "unlike"], "c": ["unlike"], "d": []}
    found = find_overlaps(["other", ITEM, "unlike"], known)
    assert found.rows() == [(1, "a", 0, 1.0), (1, "b", 1, 1.0), (2, "a", 1, 1.0), (2, "b", 0, 1.0), (2, "c", 0, 1.0)]


def test_nothing_to_compare():
    assert find_overlaps([], {"it": [ITEM]}).is_empty()
    assert find_overlaps([ITEM], {"it": []}).is_empty()
    assert find_overlaps([ITEM], {}).is_empty()


def test_short_may_not_be_longer_than_an_n_gram():
    with pytest.raises(ValidationError, match="short_words=9 must not exceed words=8"):
        OverlapConfig(words=8, short_words=9)
