"""A simulated arena with known truth. Nothing here is real: no prompt, writer, response or vote was observed anywhere.

Everything is drawn from one seed. Nine *simulated writers* answer prompts about invented topics in invented words. A
response states facts of the prompt's topics (right), myths about them (wrong) or facts of another topic (beside the
point); that alone is its **true quality**. Apart from it, and in words of their own, it has **style**: flourishes,
hedges, list marks, a writer's favourite filler words. Simulated people vote on true quality only (``battles``); simulated
labellers have the same taste plus a liking for flourishes (``biased_pairs``), and a reward model trained on their labels
really has the bias that the rest of CHARM is to find and remove.

What makes it less than trivial: votes and labels are noisy (Bradley-Terry with ties); prompts differ in difficulty; a
writer's quality and style vary from response to response and the styles of writers overlap; each seed draws its own
variation of the writers; beside-the-point facts are wrong only given the prompt, so a small reward model learns quality
imperfectly; offsets are fitted per writer although the bias is a matter of each text.

What it is not: language. Quality is a count of words, the bias is linear in a count of words, a writer's responses to all
prompts come from one distribution, and people agree on what is good up to noise. Results here show that the parts work
together and do what they claim where the truth is known; they say nothing about the size of a gain on real data.
"""

from dataclasses import dataclass, replace

import numpy as np
import polars as pl
from pydantic import BaseModel, ConfigDict, Field

from charm_core.elo import ELO_POINTS_PER_LOGIT
from charm_core.errors import TableError
from charm_core.simulated_texts import (
    Lexicon,
    WordCounts,
    filler_habits,
    invent_lexicon,
    write_prompt,
    write_response,
)
from charm_core.tables import BATTLES, PAIRS, PROMPTS, RESPONSES, SCORES, validate

_CONTENT_WORDS = 14
_FILLER_WORDS = 16
_BESIDE_SHARE = 0.3
_STYLE_PLACES = 12


@dataclass(frozen=True, kw_only=True)
class Writer:
    """A simulated policy model: what it knows and how it likes to write."""

    name: str
    ability: float
    """Log-odds that a content word is right, on a prompt of average difficulty."""
    flourish: float
    """Typical share of the places for a flourish that are used, in (0, 1); a response has twelve."""
    hedge: float = 0.15
    """The same for hedge words."""
    mark: float = 0.12
    """The same for list marks."""


WRITERS = (
    Writer(name="sim-amber", ability=1.05, flourish=0.15, mark=0.25),
    Writer(name="sim-birch", ability=0.85, flourish=0.35),
    Writer(name="sim-coral", ability=0.35, flourish=0.75, hedge=0.10),
    Writer(name="sim-dune", ability=0.70, flourish=0.10, hedge=0.30),
    Writer(name="sim-ember", ability=0.55, flourish=0.45),
    Writer(name="sim-fjord", ability=0.25, flourish=0.15, mark=0.20),
    Writer(name="sim-grove", ability=0.05, flourish=0.20, hedge=0.25),
    Writer(name="sim-heron", ability=0.45, flourish=0.60, mark=0.05),
    Writer(name="sim-iris", ability=0.75, flourish=0.12),
)
"""The nine simulated writers before each seed's own variation; ``sim-coral`` is the one whose style labellers like."""

HELD_OUT_WRITERS = ("sim-heron", "sim-iris")
"""Meant to stay out of the calibration: the first shares the favoured style, the second does not."""


class SimulationConfig(BaseModel):
    """How large the simulated arena is, how noisy its people are and how strong the planted bias is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int = Field(0, ge=0, description="Seed of everything in the simulation: words, texts, votes, labels.")
    prompts: int = Field(400, ge=10, le=100_000, description="Prompts that every simulated writer answers.")
    battles: int = Field(20_000, ge=100, le=5_000_000, description="Simulated human votes, on prompts of their own.")
    label_prompts: int = Field(600, ge=10, le=100_000, description="Further prompts, labelled to train the biased reward model.")
    label_pairs_per_prompt: int = Field(18, ge=1, le=36, description="Labelled response pairs per label prompt.")
    bias: float = Field(0.35, ge=0.0, le=5.0, description="Logits that labellers add per flourish word; 0 plants no bias.")
    quality_scale: float = Field(0.4, gt=0.0, le=5.0, description="Logits of preference per right word more or wrong word less.")
    tie_band: float = Field(0.6, ge=0.0, le=5.0, description="Half-width, in logits, of felt differences called a tie.")
    style_variation: float = Field(0.5, ge=0.0, le=2.0, description="Spread of style from response to response, log-odds of using a place.")
    ability_variation: float = Field(0.6, ge=0.0, le=3.0, description="Spread of ability from response to response, log-odds.")
    difficulty_variation: float = Field(0.5, ge=0.0, le=3.0, description="Spread of prompt difficulty, log-odds.")
    writer_variation: float = Field(0.1, ge=0.0, le=1.0, description="Spread of the writers' abilities between seeds, log-odds.")
    topics: int = Field(16, ge=4, le=200, description="Invented topics; each prompt asks about two of them.")
    facts_per_topic: int = Field(8, ge=2, le=50, description="Facts, and as many myths, of each topic.")


@dataclass(frozen=True, kw_only=True)
class SimulatedArena:
    """One drawn arena; all frames are validated. ``true_quality`` and ``writers`` are what only a simulation can know."""

    prompts: pl.DataFrame
    """PROMPTS, one prompt set ``simulated``."""
    responses: pl.DataFrame
    """RESPONSES of every writer to every prompt."""
    battles: pl.DataFrame
    """BATTLES: votes on true quality. Prompts of their own, so ratings owe nothing to the responses above."""
    true_quality: pl.DataFrame
    """SCORES whose score is the true quality of the response, in logits of preference."""
    biased_pairs: pl.DataFrame
    """PAIRS by the labellers who like flourishes, on prompts of their own; chosen_score 1, rejected_score 0, margin 1."""
    writers: pl.DataFrame
    """policy_model, ability (log-odds of a right word), flourish, hedge, mark (mean words per response), held_out."""
    vocabulary: tuple[str, ...]
    """Every word that can occur, for a word-level tokenizer."""


def simulate_arena(config: SimulationConfig) -> SimulatedArena:
    """Draw a simulated arena; the same configuration gives the same frames.

    Source of the vote model: Bradley-Terry on latent qualities with a band of felt ties (Glenn and David, 1960, with
    logistic noise). Every writer answers every prompt: no cell is missing.
    """
    streams = [np.random.default_rng(seed) for seed in np.random.SeedSequence(config.seed).spawn(5)]
    writers_rng, words_rng, prompts_rng, votes_rng, labels_rng = streams
    writers = _vary_writers(writers_rng, config)
    lexicon = invent_lexicon(words_rng, config.topics, config.facts_per_topic)
    habits = filler_habits(words_rng, len(writers))
    counts = draw_counts(prompts_rng, writers, config.prompts, config)
    prompts, responses = _write_texts(prompts_rng, lexicon, habits, writers, counts, "sim")
    label_counts = draw_counts(labels_rng, writers, config.label_prompts, config)
    label_prompts, label_responses = _write_texts(labels_rng, lexicon, habits, writers, label_counts, "label")
    return SimulatedArena(
        prompts=validate(prompts, PROMPTS),
        responses=validate(responses, RESPONSES),
        battles=_vote(votes_rng, writers, config),
        true_quality=validate(_as_scores(responses, true_quality(counts, config)), SCORES),
        biased_pairs=_label(labels_rng, label_prompts, label_responses, label_utility(label_counts, config), config),
        writers=_writers_frame(writers),
        vocabulary=lexicon.vocabulary,
    )


def draw_counts(
    rng: np.random.Generator, writers: tuple[Writer, ...], prompts: int, config: SimulationConfig
) -> WordCounts:
    """Word counts of every writer's response to fresh prompts, arrays of shape (prompts, writers)."""
    shape = (prompts, len(writers))

    def styled(rates: list[float]) -> np.ndarray:
        shares = np.array(rates)
        spread = rng.normal(0.0, config.style_variation, shape)
        return rng.binomial(_STYLE_PLACES, _sigmoid(np.log(shares / (1.0 - shares)) + spread))

    difficulty = rng.normal(0.0, config.difficulty_variation, (prompts, 1))
    noise = rng.normal(0.0, config.ability_variation, shape)
    log_odds = np.array([writer.ability for writer in writers]) - difficulty + noise
    content = _CONTENT_WORDS // 2 + rng.poisson(_CONTENT_WORDS / 2, shape)
    right = rng.binomial(content, _sigmoid(log_odds))
    beside = rng.binomial(content - right, _BESIDE_SHARE)
    return WordCounts(
        right=right,
        myth=content - right - beside,
        beside=beside,
        flourish=styled([writer.flourish for writer in writers]),
        hedge=styled([writer.hedge for writer in writers]),
        mark=styled([writer.mark for writer in writers]),
        filler=rng.poisson(_FILLER_WORDS, shape),
    )


def true_quality(counts: WordCounts, config: SimulationConfig) -> np.ndarray:
    """What people prefer, in logits: right words minus myths and beside-the-point facts. Style does not enter."""
    return np.asarray(config.quality_scale * (counts.right - counts.myth - counts.beside), dtype=np.float64)


def label_utility(counts: WordCounts, config: SimulationConfig) -> np.ndarray:
    """What the biased labellers prefer, in logits: true quality plus ``bias`` per flourish word."""
    return true_quality(counts, config) + config.bias * counts.flourish


def vote_probabilities(utility_a: np.ndarray, utility_b: np.ndarray, tie_band: float) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities that a vote goes to a and to b; the rest is a tie.

    The felt difference is ``utility_a - utility_b`` plus standard logistic noise; within ``tie_band`` of 0 it is a tie.
    """
    difference = np.asarray(utility_a - utility_b, dtype=np.float64)
    return _sigmoid(difference - tie_band), _sigmoid(-difference - tie_band)


def _sigmoid(value: np.ndarray) -> np.ndarray:
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * value)))


def _vary_writers(rng: np.random.Generator, config: SimulationConfig) -> tuple[Writer, ...]:
    shifts = rng.normal(0.0, config.writer_variation, len(WRITERS))
    return tuple(replace(writer, ability=writer.ability + shift) for writer, shift in zip(WRITERS, shifts, strict=True))


def _write_texts(
    rng: np.random.Generator,
    lexicon: Lexicon,
    habits: np.ndarray,
    writers: tuple[Writer, ...],
    counts: WordCounts,
    prompt_set: str,
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """PROMPTS and RESPONSES frames whose responses have the given word counts."""
    prompt_rows, response_rows = [], []
    for row in range(counts.right.shape[0]):
        topics = rng.choice(len(lexicon.topics), 2, replace=False).tolist()
        prompt_id = f"{prompt_set}-{row:06d}"
        text = write_prompt(rng, lexicon, topics)
        prompt_rows.append((prompt_id, prompt_set, [{"role": "user", "content": text}]))
        for column, writer in enumerate(writers):
            response = write_response(rng, lexicon, topics, counts, (row, column), habits[column])
            response_rows.append((prompt_id, writer.name, response))
    return (
        pl.DataFrame(prompt_rows, schema=dict(PROMPTS.columns), orient="row"),
        pl.DataFrame(response_rows, schema=dict(RESPONSES.columns), orient="row"),
    )


def _as_scores(responses: pl.DataFrame, values: np.ndarray) -> pl.DataFrame:
    """SCORES of responses that were written row by row of ``values`` (prompts, writers)."""
    return responses.select("prompt_id", "policy_model", pl.Series("score", values.ravel()))


def _writers_frame(writers: tuple[Writer, ...]) -> pl.DataFrame:
    rows = [(w.name, w.ability, w.flourish, w.hedge, w.mark, w.name in HELD_OUT_WRITERS) for w in writers]
    return pl.DataFrame(
        rows, schema=["policy_model", "ability", "flourish", "hedge", "mark", "held_out"], orient="row"
    ).sort("policy_model")


def _vote(rng: np.random.Generator, writers: tuple[Writer, ...], config: SimulationConfig) -> pl.DataFrame:
    """BATTLES between two random writers each, every battle on a prompt of its own."""
    battles = np.arange(config.battles)
    quality = true_quality(draw_counts(rng, writers, config.battles, config), config)
    first = rng.integers(len(writers), size=config.battles)
    second = (first + rng.integers(1, len(writers), size=config.battles)) % len(writers)
    quality_a, quality_b = quality[battles, first], quality[battles, second]
    p_a, p_b = vote_probabilities(quality_a, quality_b, config.tie_band)
    draw = rng.random(config.battles)
    both_bad = np.maximum(quality_a, quality_b) < 0.0
    winner = np.where(
        draw < p_a, "model_a", np.where(draw < p_a + p_b, "model_b", np.where(both_bad, "tie (bothbad)", "tie"))
    )
    names = np.array([writer.name for writer in writers])
    frame = pl.DataFrame({"battle_id": battles, "model_a": names[first], "model_b": names[second], "winner": winner})
    return validate(frame, BATTLES)


def _label(
    rng: np.random.Generator,
    prompts: pl.DataFrame,
    responses: pl.DataFrame,
    utility: np.ndarray,
    config: SimulationConfig,
) -> pl.DataFrame:
    """PAIRS labelled by ``utility`` with voting noise; ties give no pair."""
    count, writers = utility.shape
    left, right = np.triu_indices(writers, 1)
    chosen_pairs = np.argsort(rng.random((count, left.size)), axis=1)[:, : config.label_pairs_per_prompt]
    rows = np.repeat(np.arange(count), chosen_pairs.shape[1])
    a, b = left[chosen_pairs].ravel(), right[chosen_pairs].ravel()
    p_a, p_b = vote_probabilities(utility[rows, a], utility[rows, b], config.tie_band)
    draw = rng.random(rows.size)
    decided = draw < p_a + p_b
    winner, loser = np.where(draw < p_a, a, b)[decided], np.where(draw < p_a, b, a)[decided]
    cells = pl.DataFrame({"winner": rows[decided] * writers + winner, "loser": rows[decided] * writers + loser})
    texts = responses.with_row_index("cell").join(prompts, on="prompt_id")
    return _pairs_frame(cells, texts)


def _pairs_frame(cells: pl.DataFrame, texts: pl.DataFrame) -> pl.DataFrame:
    """PAIRS from the row numbers (``winner``, ``loser``) of the responses in ``texts``."""
    message = pl.concat_list(pl.struct(pl.lit("assistant").alias("role"), pl.col("response").alias("content")))
    sides = texts.select("cell", "prompt_id", pl.col("messages").alias("prompt"), "policy_model", message.alias("text"))
    chosen, rejected = sides[cells["winner"]], sides[cells["loser"]]
    vote, none = pl.lit(1.0), pl.lit(0.0)
    frame = chosen.select(
        "prompt_id",
        pl.lit("train").alias("split"),
        "prompt",
        pl.col("text").alias("chosen"),
        rejected["text"].alias("rejected"),
        pl.col("policy_model").alias("chosen_model"),
        rejected["policy_model"].alias("rejected_model"),
        vote.alias("chosen_score"),
        none.alias("rejected_score"),
        vote.alias("chosen_calibrated"),
        none.alias("rejected_calibrated"),
        vote.alias("margin"),
        pl.lit(False).alias("flipped"),
    )
    return validate(frame, PAIRS)
