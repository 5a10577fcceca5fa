"""A simulated arena with known truth. Nothing here is real: no prompt, writer, response or vote was observed anywhere.

Everything is drawn from one seed. Nine *simulated writers* answer prompts about invented topics in invented words. A
response states facts of the prompt's topics (right), myths about them (wrong) or facts of another topic (beside the
point); that alone is its **true quality**. Apart from it, and in words of their own, it has **style**: flourishes,
hedges, list marks, a writer's favourite filler words. Simulated people vote on true quality only (``battles``);
simulated labellers have the same taste plus a liking for flourishes (``biased_pairs``), and a reward model trained on
their labels really has the bias that the rest of CHARM is to find and remove.

What makes it less than trivial: votes and labels are noisy (Bradley-Terry with ties); prompts differ in difficulty; a
writer's quality and style vary from response to response and the styles of writers overlap; each seed draws its own
variation of the writers; beside-the-point facts are wrong only given the prompt, so a small reward model learns quality
imperfectly; offsets are fitted per writer although the bias is a matter of each text.

What it is not: language. Quality is a count of words, the bias is linear in a count of words, a writer's responses to
all prompts come from one distribution, and people agree on what is good up to noise. One assumption matters for what
fine-tuning on single responses can learn: how far a style is a trait of a writer rather than of a response. With the
default ``style_variation`` about three quarters of the variance of flourishes lies between writers, at 1.0 about half;
offsets per writer say nothing about the rest. Results here show that the parts work together and do what they claim
where the truth is known; they say nothing about the size of a gain on real data.
"""

from dataclasses import dataclass

import numpy as np
import polars as pl

from charm_core.bradley_terry import solve_strengths
from charm_core.elo import ELO_POINTS_PER_LOGIT
from charm_core.errors import TableError
from charm_core.records import Estimate
from charm_core.resampling import FloatArray, bootstrap_weights, percentile_estimate
from charm_core.simulated_people import cast_votes, label_pairs, vote_probabilities
from charm_core.simulated_texts import (
    Lexicon,
    WordCounts,
    filler_habits,
    invent_lexicon,
    write_prompt,
    write_response,
)
from charm_core.simulated_writers import (
    HELD_OUT_WRITERS,
    WRITERS,
    SimulationConfig,
    Writer,
    draw_counts,
    label_utility,
    true_quality,
    vary_writers,
)
from charm_core.tables import PROMPTS, RESPONSES, SCORES, validate

__all__ = [
    "HELD_OUT_WRITERS",
    "WRITERS",
    "SimulatedArena",
    "SimulationConfig",
    "arena_lexicon",
    "planted_overvaluation",
    "simulate_arena",
    "truth_accuracy",
]

_PLANTED_PROMPTS = 20_000


@dataclass(frozen=True, kw_only=True)
class SimulatedArena:
    """One drawn arena. ``true_quality`` and ``writers`` are what only a simulation can know."""

    prompts: pl.DataFrame
    """PROMPTS, one prompt set ``simulated``."""
    responses: pl.DataFrame
    """RESPONSES of every writer to every prompt."""
    battles: pl.DataFrame
    """BATTLES: votes on true quality. Prompts of their own, so ratings owe nothing to the responses above."""
    true_quality: pl.DataFrame
    """SCORES whose score is the true quality of the response, in logits of preference."""
    biased_pairs: pl.DataFrame
    """PAIRS by the labellers who like flourishes, on prompts of their own; scores are 1 for chosen, 0 for rejected."""
    writers: pl.DataFrame
    """policy_model, ability (log-odds of a right word), flourish, hedge, mark (share of places used), held_out."""
    vocabulary: tuple[str, ...]
    """Every word that can occur, for a word-level tokenizer."""


def simulate_arena(config: SimulationConfig) -> SimulatedArena:
    """Draw a simulated arena; the same configuration gives the same frames.

    Source of the vote model: Bradley-Terry on latent qualities with a band of felt ties (Rao and Kupper, 1967).
    Every writer answers every prompt: no cell is missing.
    """
    writers_rng, words_rng, prompts_rng, votes_rng, labels_rng, _ = _streams(config)
    writers = vary_writers(writers_rng, config)
    lexicon = invent_lexicon(words_rng, config.topics, config.facts_per_topic)
    habits = filler_habits(words_rng, len(writers), config.habit_strength)
    counts = draw_counts(prompts_rng, writers, config.prompts, config)
    prompts, responses = _write_texts(prompts_rng, lexicon, habits, writers, counts, "simulated")
    label_counts = draw_counts(labels_rng, writers, config.label_prompts, config)
    labelled = _write_texts(labels_rng, lexicon, habits, writers, label_counts, "label")
    return SimulatedArena(
        prompts=validate(prompts, PROMPTS),
        responses=validate(responses, RESPONSES),
        battles=cast_votes(votes_rng, writers, config),
        true_quality=validate(_as_scores(responses, true_quality(counts, config)), SCORES),
        biased_pairs=label_pairs(labels_rng, *labelled, label_utility(label_counts, config), config),
        writers=_writers_frame(writers),
        vocabulary=lexicon.vocabulary,
    )


def arena_lexicon(config: SimulationConfig) -> Lexicon:
    """The invented words of the arena that this configuration draws, by which any text about it can be read."""
    return invent_lexicon(_streams(config)[1], config.topics, config.facts_per_topic)


def planted_overvaluation(config: SimulationConfig) -> dict[str, float]:
    """By how many Elo points the labellers overvalue each writer: the bias that was planted.

    It is the rating by votes cast like labels (quality plus bias) minus the rating by votes on true quality, both by
    Bradley-Terry on vote probabilities averaged over 20,000 simulated prompts and both with mean 0. The same people's
    noise is in both, so the difference is the bias alone: with ``bias=0`` every value is 0. Monte Carlo error about 1.

    Returns:
        Policy model to Elo points, positive where the labellers are too generous.
    """
    writers_rng, planted_rng = _streams(config)[0], _streams(config)[5]
    writers = vary_writers(writers_rng, config)
    counts = draw_counts(planted_rng, writers, _PLANTED_PROMPTS, config)
    liked, true = (
        solve_strengths(_expected_points(utility, config.tie_band)[None])[0]
        for utility in (label_utility(counts, config), true_quality(counts, config))
    )
    return dict(zip((w.name for w in writers), (ELO_POINTS_PER_LOGIT * (liked - true)).tolist(), strict=True))


def truth_accuracy(
    scores: pl.DataFrame,
    quality: pl.DataFrame,
    *,
    replicates: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """How often a reward model prefers the response of higher true quality.

    Args:
        scores: SCORES of the reward model, of prompts and writers to judge it on.
        quality: SCORES with the true quality, of these responses and possibly more.
        replicates: Bootstrap resamples of the prompts; the same seed pairs two reward models.
        confidence: Coverage of the interval.
        seed: Seed of the resamples.

    Returns:
        Share of right decisions among all pairs of responses to one prompt that differ in true quality; equal scores
        count as half right. Missing cells give no pair.

    Raises:
        TableError: A bad table, a scored response without a true quality, or no pair that could be judged.
    """
    table = validate(scores, SCORES).join(
        validate(quality, SCORES), on=["prompt_id", "policy_model"], how="left", suffix="_true"
    )
    if table.get_column("score_true").null_count():
        first = table.filter(pl.col("score_true").is_null()).row(0)[:2]
        raise TableError(
            f"the scores have {first}, of which the true quality is not known; give the arena's own responses"
        )
    pairs = table.join(table, on="prompt_id", suffix="_other").filter(pl.col("score_true") > pl.col("score_true_other"))
    if pairs.is_empty():
        raise TableError("no two responses to one prompt differ in true quality; give at least two writers' scores")
    difference = pl.col("score") - pl.col("score_other")
    right = pl.when(difference == 0).then(0.5).otherwise((difference > 0).cast(pl.Float64))
    per_prompt = pairs.group_by("prompt_id").agg(right.sum().alias("right"), pl.len().alias("pairs")).sort("prompt_id")
    counts = per_prompt.select("right", pl.col("pairs").cast(pl.Float64)).to_numpy()
    draws = bootstrap_weights(per_prompt.height, replicates, np.random.default_rng(seed))
    resampled = np.concatenate([weights @ counts for weights in draws])
    value = float(counts[:, 0].sum() / counts[:, 1].sum())
    return percentile_estimate(value, resampled[:, 0] / resampled[:, 1], confidence)


def _streams(config: SimulationConfig) -> list[np.random.Generator]:
    """Independent generators for writers, words, prompts, votes, labels and the planted bias."""
    return [np.random.default_rng(seed) for seed in np.random.SeedSequence(config.seed).spawn(6)]


def _expected_points(utility: FloatArray, tie_band: float) -> FloatArray:
    """Expected points per vote of every writer against every other, ties as half; shape (writers, writers)."""
    won, lost = vote_probabilities(utility[:, :, None], utility[:, None, :], tie_band)
    points = 0.5 + 0.5 * (won - lost).mean(axis=0)
    np.fill_diagonal(points, 0.0)
    return np.asarray(points)


def _write_texts(
    rng: np.random.Generator,
    lexicon: Lexicon,
    habits: FloatArray,
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


def _as_scores(responses: pl.DataFrame, values: FloatArray) -> pl.DataFrame:
    """SCORES of responses that were written row by row of ``values`` (prompts, writers)."""
    return responses.select("prompt_id", "policy_model", pl.Series("score", values.ravel()))


def _writers_frame(writers: tuple[Writer, ...]) -> pl.DataFrame:
    rows = [(w.name, w.ability, w.flourish, w.hedge, w.mark, w.name in HELD_OUT_WRITERS) for w in writers]
    return pl.DataFrame(
        rows, schema=["policy_model", "ability", "flourish", "hedge", "mark", "held_out"], orient="row"
    ).sort("policy_model")
