"""Words and texts of the simulated arena: an invented lexicon, prompts about its topics, responses that realise counts.

Used by :mod:`charm_core.simulation` only. All words are invented from syllables, so that nothing can be mistaken for a
real prompt or response.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from charm_core.resampling import FloatArray

IntArray = NDArray[np.int64]

_ONSETS = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z")
_VOWELS = ("a", "e", "i", "o", "u")
_ENDS = ("", "l", "n", "r", "s")
_FLOURISHES, _HEDGES, _MARKS, _FILLERS = 20, 12, 4, 60
_SENTENCE = 9
_REQUESTS = ("explain", "describe", "compare", "summarise", "discuss", "introduce")
_AUDIENCES = ("children", "students", "experts", "travellers", "colleagues", "neighbours")
_PROMPT_WORDS = ("please", "and", "for", "of", "from", *_REQUESTS, *_AUDIENCES)
_PUNCTUATION = (".", ",")


@dataclass(frozen=True, kw_only=True)
class Lexicon:
    """The invented words of one simulated arena."""

    topics: tuple[str, ...]
    facts: tuple[tuple[str, ...], ...]
    """Per topic, the words that are right in a response about it and beside the point in any other."""
    myths: tuple[tuple[str, ...], ...]
    """Per topic, the words that are wrong wherever they stand."""
    flourishes: tuple[str, ...]
    hedges: tuple[str, ...]
    marks: tuple[str, ...]
    fillers: tuple[str, ...]

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Every word and punctuation mark that a prompt or response can contain, each once, in a fixed order."""
        per_topic = [word for words in (*self.facts, *self.myths) for word in words]
        styled = (*self.flourishes, *self.hedges, *self.marks, *self.fillers)
        return (*_PUNCTUATION, *_PROMPT_WORDS, *self.topics, *per_topic, *styled)


@dataclass(frozen=True, kw_only=True)
class WordCounts:
    """How many words of each kind the responses have; integer arrays of one shape, (prompts, writers)."""

    right: IntArray
    myth: IntArray
    beside: IntArray
    flourish: IntArray
    hedge: IntArray
    mark: IntArray
    filler: IntArray


def invent_lexicon(rng: np.random.Generator, topics: int, facts_per_topic: int) -> Lexicon:
    """Invent the words of an arena.

    Args:
        rng: Source of randomness; the same state gives the same words.
        topics: Number of topics.
        facts_per_topic: Facts, and as many myths, of each topic.
    """
    needed = topics * (1 + 2 * facts_per_topic) + _FLOURISHES + _HEDGES + _MARKS + _FILLERS
    words = iter(_invent_words(rng, needed))

    def take(count: int) -> tuple[str, ...]:
        return tuple(next(words) for _ in range(count))

    return Lexicon(
        topics=take(topics),
        facts=tuple(take(facts_per_topic) for _ in range(topics)),
        myths=tuple(take(facts_per_topic) for _ in range(topics)),
        flourishes=take(_FLOURISHES),
        hedges=take(_HEDGES),
        marks=take(_MARKS),
        fillers=take(_FILLERS),
    )


def write_prompt(rng: np.random.Generator, lexicon: Lexicon, topics: Sequence[int]) -> str:
    """A request to write about the given topics, worded so that hardly any two prompts are the same."""
    request, audience = rng.choice(_REQUESTS), rng.choice(_AUDIENCES)
    origin = " from ".join(rng.choice(lexicon.fillers, 2))
    return f"please {request} {' and '.join(lexicon.topics[topic] for topic in topics)} for {audience} of {origin}."


def write_response(
    rng: np.random.Generator,
    lexicon: Lexicon,
    topics: Sequence[int],
    counts: WordCounts,
    cell: tuple[int, int],
    filler_weights: FloatArray,
) -> str:
    """A response that has exactly the counted words of each kind, in random order.

    Args:
        rng: Source of randomness.
        lexicon: The arena's words.
        topics: The prompt's topics.
        counts: Word counts of all responses.
        cell: The response's (prompt, writer) in ``counts``.
        filler_weights: The writer's liking for each filler word; sums to 1.
    """
    own_facts = [word for topic in topics for word in lexicon.facts[topic]]
    own_myths = [word for topic in topics for word in lexicon.myths[topic]]
    foreign = [topic for topic in range(len(lexicon.topics)) if topic not in topics]
    other_facts = lexicon.facts[foreign[rng.integers(len(foreign))]]
    words = np.concatenate(
        [
            rng.choice(own_facts, counts.right[cell]),
            rng.choice(own_myths, counts.myth[cell]),
            rng.choice(other_facts, counts.beside[cell]),
            rng.choice(lexicon.flourishes, counts.flourish[cell]),
            rng.choice(lexicon.hedges, counts.hedge[cell]),
            rng.choice(lexicon.marks, counts.mark[cell]),
            rng.choice(lexicon.fillers, counts.filler[cell], p=filler_weights),
        ]
    )
    ordered = rng.permutation(words)
    sentences = [" ".join(ordered[start : start + _SENTENCE]) for start in range(0, len(ordered), _SENTENCE)]
    return ". ".join(sentences) + "."


def filler_habits(rng: np.random.Generator, writers: int, strength: float) -> FloatArray:
    """Each writer's liking for the filler words, shape (writers, fillers); rows sum to 1 and overlap.

    ``strength`` is the inverse concentration of the Dirichlet distribution that they are drawn from: towards 0 all
    writers use all filler words alike.
    """
    return rng.dirichlet(np.full(_FILLERS, 1.0 / strength), size=writers)


def _invent_words(rng: np.random.Generator, count: int) -> list[str]:
    """Distinct words of two or three syllables."""
    words: dict[str, None] = {}
    while len(words) < count:
        syllables = [f"{rng.choice(_ONSETS)}{rng.choice(_VOWELS)}" for _ in range(rng.integers(2, 4))]
        word = "".join(syllables) + str(rng.choice(_ENDS))
        if word not in _PROMPT_WORDS:
            words[word] = None
    return list(words)
