"""Reading any text about the simulated arena as its people do: what is right in it, what is wrong, and how it is styled.

The arena of :mod:`charm_core.simulation` knows the true quality of what its writers wrote. A policy model that is post-trained
writes texts of its own; their true quality is counted here, word by word, by the same rule. For the writers' responses both
agree exactly.
"""

import re
from collections.abc import Sequence

import numpy as np
import polars as pl

from charm_core.errors import TableError
from charm_core.simulated_texts import Lexicon, WordCounts, write_prompt
from charm_core.simulated_writers import SimulationConfig, true_quality
from charm_core.simulation import arena_lexicon
from charm_core.tables import PROMPTS, RESPONSES, SCORES, validate

_WORD = re.compile(r"[a-z]+")
_FRESH = 6
"""Streams of random numbers up to here are the arena's own."""


def fresh_prompts(config: SimulationConfig, count: int, name: str) -> pl.DataFrame:
    """Prompts about the arena's topics that are not among its own.

    Args:
        config: Of the arena.
        count: How many.
        name: Their prompt set and what their ids begin with; another name gives other prompts.

    Returns:
        PROMPTS.
    """
    lexicon = arena_lexicon(config)
    rng = np.random.default_rng(np.random.SeedSequence([*name.encode()], spawn_key=(_FRESH, config.seed)))
    rows = []
    for number in range(count):
        topics = rng.choice(len(lexicon.topics), 2, replace=False).tolist()
        text = write_prompt(rng, lexicon, topics)
        rows.append((f"{name}-{number:06d}", name, [{"role": "user", "content": text}]))
    return validate(pl.DataFrame(rows, schema=dict(PROMPTS.columns), orient="row"), PROMPTS)


def read_texts(config: SimulationConfig, prompts: pl.DataFrame, responses: pl.DataFrame) -> pl.DataFrame:
    """Count what is in responses about the arena, whoever wrote them.

    Args:
        config: Of the arena.
        prompts: PROMPTS in its words.
        responses: RESPONSES to them. Words that it does not know count for nothing.

    Returns:
        prompt_id, policy_model, right, myth, beside, flourish, hedge, mark, words (integers).

    Raises:
        TableError: A bad table, a response without its prompt, or a prompt that names no topic of the arena.
    """
    asked, written = validate(prompts, PROMPTS), validate(responses, RESPONSES)
    lonely = written.join(asked, on="prompt_id", how="anti")
    if not lonely.is_empty():
        raise TableError(
            f"there is no prompt {lonely.row(0)[0]!r} in the prompts table; give the prompts that were answered"
        )
    lexicon = arena_lexicon(config)
    meaning = _meanings(lexicon)
    topics = {
        prompt_id: _topics_of(lexicon, prompt_id, messages)
        for prompt_id, messages in asked.select("prompt_id", "messages").iter_rows()
    }
    rows = [
        (prompt_id, model, *_count(meaning, topics[prompt_id], response))
        for prompt_id, model, response in written.iter_rows()
    ]
    return pl.DataFrame(rows, schema=["prompt_id", "policy_model", *_KINDS, "words"], orient="row")


def quality_of(config: SimulationConfig, read: pl.DataFrame) -> pl.DataFrame:
    """True quality of texts that were read, by the rule of the arena.

    Args:
        config: Of the arena.
        read: What ``read_texts`` returns.

    Returns:
        SCORES, in logits of preference.
    """
    counts = WordCounts(
        **{kind: read.get_column(kind).to_numpy() for kind in _KINDS}, filler=np.zeros(read.height, dtype=np.int64)
    )
    scored = read.select("prompt_id", "policy_model").with_columns(score=pl.Series(true_quality(counts, config)))
    return validate(scored, SCORES)


_KINDS = ("right", "myth", "beside", "flourish", "hedge", "mark")


def _meanings(lexicon: Lexicon) -> dict[str, tuple[str, int]]:
    """Word to its kind, and to its topic where it has one."""
    kinds = {"flourish": lexicon.flourishes, "hedge": lexicon.hedges, "mark": lexicon.marks}
    found = {word: (kind, -1) for kind, words in kinds.items() for word in words}
    for topic, (facts, myths) in enumerate(zip(lexicon.facts, lexicon.myths, strict=True)):
        found |= dict.fromkeys(facts, ("fact", topic)) | dict.fromkeys(myths, ("myth", topic))
    return found


def _topics_of(lexicon: Lexicon, prompt_id: str, messages: Sequence[dict[str, str]]) -> set[int]:
    words = {word for message in messages for word in _WORD.findall(message["content"])}
    topics = {topic for topic, word in enumerate(lexicon.topics) if word in words}
    if not topics:
        raise TableError(f"the prompt {prompt_id!r} names no topic of this arena; give prompts in its words")
    return topics


def _count(meaning: dict[str, tuple[str, int]], topics: set[int], response: str) -> tuple[int, ...]:
    words = _WORD.findall(response)
    counts = dict.fromkeys(_KINDS, 0)
    for word in words:
        kind, topic = meaning.get(word, ("", -1))
        if kind == "fact":
            # a fact is right in an answer about its topic and beside the point in any other
            kind = "right" if topic in topics else "beside"
        if kind:
            counts[kind] += 1
    return (*counts.values(), len(words))
