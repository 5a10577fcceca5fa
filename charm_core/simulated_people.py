"""People of the simulated arena: votes on true quality, and labels by those who also like flourishes.

See :mod:`charm_core.simulation` for what is simulated and what is not.
"""

import numpy as np
import polars as pl
from scipy.special import expit

from charm_core.resampling import FloatArray
from charm_core.simulated_writers import SimulationConfig, Writer, draw_counts, true_quality
from charm_core.tables import BATTLES, PAIRS, validate


def vote_probabilities(utility_a: FloatArray, utility_b: FloatArray, tie_band: float) -> tuple[FloatArray, FloatArray]:
    """Probabilities that a vote goes to a and to b; the rest is a tie.

    The felt difference is ``utility_a - utility_b`` plus standard logistic noise; within ``tie_band`` of 0 it is a tie.
    """
    difference = np.asarray(utility_a - utility_b, dtype=np.float64)
    return expit(difference - tie_band), expit(-difference - tie_band)


def cast_votes(rng: np.random.Generator, writers: tuple[Writer, ...], config: SimulationConfig) -> pl.DataFrame:
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


def label_pairs(
    rng: np.random.Generator,
    prompts: pl.DataFrame,
    responses: pl.DataFrame,
    utility: FloatArray,
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
    texts = responses.with_row_index("cell").join(prompts, on="prompt_id", maintain_order="left")
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
