import polars as pl
import pytest

from charm_core.errors import TableError
from charm_core.simulated_reading import fresh_prompts, quality_of, read_texts
from charm_core.simulation import SimulationConfig, arena_lexicon, simulate_arena

CONFIG = SimulationConfig(seed=3, prompts=40, label_prompts=10, battles=500)


@pytest.fixture(scope="module")
def arena():
    return simulate_arena(CONFIG)


def asked(text: str) -> pl.DataFrame:
    return pl.DataFrame({"prompt_id": ["p"], "prompt_set": ["s"], "messages": [[{"role": "user", "content": text}]]})


def answered(text: str) -> pl.DataFrame:
    return pl.DataFrame({"prompt_id": ["p"], "policy_model": ["m"], "response": [text]})


def test_what_the_writers_wrote_is_read_as_it_was_meant(arena):
    read = read_texts(CONFIG, arena.prompts, arena.responses)
    assert quality_of(CONFIG, read).equals(arena.true_quality)
    liked = dict(read.group_by("policy_model").agg(pl.col("flourish").mean()).iter_rows())
    assert max(liked, key=liked.get) == "sim-coral"


def test_each_word_counts_for_what_it_is():
    lexicon = arena_lexicon(CONFIG)
    own, other = lexicon.facts[0], lexicon.facts[5]
    words = [own[0], own[0], own[1], other[0], lexicon.myths[0][0], lexicon.myths[5][0], lexicon.flourishes[0], "xyz"]
    read = read_texts(
        CONFIG,
        asked(f"please explain {lexicon.topics[0]}."),
        answered(" ".join(words[:4]) + ". " + ", ".join(words[4:])),
    )
    assert read.row(0)[2:] == (3, 2, 1, 1, 0, 0, 8)
    # the others' facts and the myths count against it
    assert quality_of(CONFIG, read).row(0)[2] == pytest.approx(CONFIG.quality_scale * (3 - 2 - 1))


def test_fresh_prompts_are_new_and_the_same_every_time(arena):
    texts = {row[0]["content"] for row in arena.prompts.get_column("messages")}
    first, other = fresh_prompts(CONFIG, 30, "practice"), fresh_prompts(CONFIG, 30, "exam")
    assert first.equals(fresh_prompts(CONFIG, 30, "practice"))
    assert fresh_prompts(CONFIG, 40, "practice").head(30).equals(first)
    contents = [{row[0]["content"] for row in frame.get_column("messages")} for frame in (first, other)]
    assert not contents[0] & contents[1]
    assert not contents[0] & texts
    vocabulary = set(arena.vocabulary)
    assert {word for text in contents[0] for word in text.rstrip(".").split()} <= vocabulary
    elsewhere = fresh_prompts(CONFIG.model_copy(update={"seed": 4}), 30, "practice")
    assert not {row[0]["content"] for row in elsewhere.get_column("messages")} & contents[0]


def test_what_cannot_be_read_says_why():
    with pytest.raises(TableError, match="the prompt 'p' names no topic of this arena"):
        read_texts(CONFIG, asked("what is the weather?"), answered("fine"))
    with pytest.raises(TableError, match="there is no prompt 'p' in the prompts table"):
        read_texts(CONFIG, asked("x").with_columns(prompt_id=pl.lit("q")), answered("fine"))
