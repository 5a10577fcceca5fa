"""Who writes in the simulated arena and what their responses contain: writers, settings, word counts, what people like.

See :mod:`charm_core.simulation` for what is simulated and what is not.
"""

from dataclasses import dataclass, replace

import numpy as np
from pydantic import Field
from scipy.special import expit, logit

from charm_core.records import Record
from charm_core.resampling import FloatArray
from charm_core.simulated_texts import IntArray, WordCounts

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


class SimulationConfig(Record):
    """How large the simulated arena is, how noisy its people are and how strong the planted bias is."""

    seed: int = Field(default=0, ge=0, description="Seed of everything simulated: words, texts, votes, labels.")
    prompts: int = Field(default=500, ge=10, le=100_000, description="Prompts that every simulated writer answers.")
    battles: int = Field(
        default=20_000, ge=500, le=5_000_000, description="Simulated human votes, each on a prompt of its own."
    )
    label_prompts: int = Field(
        default=600, ge=10, le=100_000, description="Further prompts, labelled to train the biased reward model."
    )
    label_pairs_per_prompt: int = Field(
        default=18, ge=1, le=36, description="Response pairs shown to the labellers per label prompt; ties are dropped."
    )
    bias: float = Field(
        default=0.35, ge=0.0, le=5.0, description="Logits that the labellers add per flourish word; 0 plants no bias."
    )
    quality_scale: float = Field(
        default=0.4, gt=0.0, le=5.0, description="Logits of preference per right word more or wrong word less."
    )
    tie_band: float = Field(
        default=0.6, ge=0.0, le=5.0, description="Felt differences up to so many logits are voted a tie."
    )
    style_variation: float = Field(
        default=0.3, ge=0.0, le=3.0, description="Spread of a writer's style from response to response, in log-odds."
    )
    ability_variation: float = Field(
        default=0.6, ge=0.0, le=3.0, description="Spread of a writer's ability from response to response, in log-odds."
    )
    difficulty_variation: float = Field(
        default=0.5, ge=0.0, le=3.0, description="Spread of the prompts' difficulty, in log-odds of a right word."
    )
    writer_variation: float = Field(
        default=0.1, ge=0.0, le=1.0, description="Spread of each writer's ability from seed to seed, in log-odds."
    )
    habit_strength: float = Field(
        default=0.2, gt=0.0, le=10.0, description="How much writers differ in their favourite filler words."
    )
    topics: int = Field(default=16, ge=4, le=200, description="Invented topics; each prompt asks about two of them.")
    facts_per_topic: int = Field(default=8, ge=2, le=50, description="Facts, and as many myths, of each topic.")


def vary_writers(rng: np.random.Generator, config: SimulationConfig) -> tuple[Writer, ...]:
    """The nine writers, their abilities varied by ``writer_variation``."""
    shifts = rng.normal(0.0, config.writer_variation, len(WRITERS))
    return tuple(
        replace(writer, ability=writer.ability + float(shift)) for writer, shift in zip(WRITERS, shifts, strict=True)
    )


def draw_counts(
    rng: np.random.Generator, writers: tuple[Writer, ...], prompts: int, config: SimulationConfig
) -> WordCounts:
    """Word counts of every writer's response to fresh prompts, arrays of shape (prompts, writers)."""
    shape = (prompts, len(writers))

    def styled(shares: list[float]) -> IntArray:
        spread = rng.normal(0.0, config.style_variation, shape)
        return rng.binomial(_STYLE_PLACES, expit(logit(shares) + spread))

    difficulty = rng.normal(0.0, config.difficulty_variation, (prompts, 1))
    noise = rng.normal(0.0, config.ability_variation, shape)
    log_odds = np.array([writer.ability for writer in writers]) - difficulty + noise
    content = _CONTENT_WORDS // 2 + rng.poisson(_CONTENT_WORDS / 2, shape)
    right = rng.binomial(content, expit(log_odds))
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


def true_quality(counts: WordCounts, config: SimulationConfig) -> FloatArray:
    """What people prefer, in logits: right words minus myths and beside-the-point facts. Style does not enter."""
    return np.asarray(config.quality_scale * (counts.right - counts.myth - counts.beside), dtype=np.float64)


def label_utility(counts: WordCounts, config: SimulationConfig) -> FloatArray:
    """What the biased labellers prefer, in logits: true quality plus ``bias`` per flourish word."""
    return true_quality(counts, config) + config.bias * counts.flourish
