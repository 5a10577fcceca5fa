"""Scores of responses, exact and independent of what else is in the batch.

Texts are rendered once, identical ones scored once, and sorted by length into batches under a token budget. In float32 the
score of a text moves by less than 1e-5 with the batch that it is in.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import polars as pl
import torch

from charm_core.errors import ModelError, TableError
from charm_core.reward_model.batching import token_budget_batches
from charm_core.reward_model.jobs import ScoringSummary
from charm_core.reward_model.loading import RewardModel, load_reward_model
from charm_core.reward_model.network import collate
from charm_core.reward_model.rendering import Rendered, render
from charm_core.reward_model.scoring_shares import ties
from charm_core.reward_model.spec import RewardModelSpec
from charm_core.tables import PROMPTS, RESPONSES, SCORES, validate

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with (texts scored so far, texts to score)."""


@dataclass(frozen=True, kw_only=True)
class ScoringResult:
    """Scores, and what happened on the way."""

    scores: pl.DataFrame
    """SCORES: one row per response."""
    summary: ScoringSummary
    cuts: pl.DataFrame
    """Columns prompt_id, policy_model, prompt_cut and response_cut: one row per response."""


def score_responses(
    spec: RewardModelSpec, prompts: pl.DataFrame, responses: pl.DataFrame, progress: Progress | None = None
) -> ScoringResult:
    """Score every response with a reward model, on the GPU if there is one.

    An empty response is scored like any other; the summary counts them. Rows of ``prompts`` without response are ignored.

    Args:
        spec: The reward model.
        prompts: PROMPTS.
        responses: RESPONSES.
        progress: Called now and then with (texts scored, texts to score).

    Raises:
        TableError: A table is malformed, or a response's prompt is missing.
        ModelError: The model cannot be used, or gives NaN or infinite scores.
    """
    asked = _join(prompts, responses)
    model = load_reward_model(spec)
    rendered = [
        render(model.tokenizer, messages, response, model.spec)
        for messages, response in zip(asked["messages"].to_list(), asked["response"].to_list(), strict=True)
    ]
    distinct: dict[Rendered, int] = {}
    positions = [distinct.setdefault(_identity(text), len(distinct)) for text in rendered]
    values = score_texts(model, list(distinct), progress)
    scores = asked.select("prompt_id", "policy_model").with_columns(
        pl.Series("score", [values[position] for position in positions], dtype=pl.Float64)
    )
    _check_scores(scores, spec)
    scores = validate(scores, SCORES)
    summary = _summary(model.spec, asked, rendered, list(distinct), scores)
    logger.info("scored %d texts (%d distinct) with %s", summary.texts, summary.distinct_texts, spec.path)
    cuts = asked.select("prompt_id", "policy_model").with_columns(
        pl.Series(name, [getattr(text, name) for text in rendered], dtype=pl.Boolean)
        for name in ("prompt_cut", "response_cut")
    )
    return ScoringResult(scores=scores, summary=summary, cuts=cuts)


def score_texts(model: RewardModel, texts: Sequence[Rendered], progress: Progress | None = None) -> list[float]:
    """Score rendered texts in batches under ``model.spec.batch_tokens``; scores in the order of the texts."""
    values = [0.0] * len(texts)
    done = 0
    for batch in token_budget_batches([len(text.input_ids) for text in texts], model.spec.batch_tokens):
        inputs = collate([texts[index] for index in batch], model.pad_token_id, model.device)
        with torch.inference_mode():
            scores = model.network(**inputs).tolist()
        for index, score in zip(batch, scores, strict=True):
            values[index] = score
        done += len(batch)
        if progress is not None:
            progress(done, len(texts))
    return values


def _join(prompts: pl.DataFrame, responses: pl.DataFrame) -> pl.DataFrame:
    asked = validate(responses, RESPONSES).join(
        validate(prompts, PROMPTS).select("prompt_id", "messages"), on="prompt_id", how="left", maintain_order="left"
    )
    unknown = asked.filter(pl.col("messages").is_null())["prompt_id"].unique(maintain_order=True).to_list()
    if unknown:
        raise TableError(
            f"{len(unknown)} prompt ids of the responses table are not in the prompts table, first {unknown[:3]}; "
            "give the prompts that were answered"
        )
    return asked


def _identity(text: Rendered) -> Rendered:
    """The text without what was cut to make it, so that equal token sequences are equal."""
    return replace(text, prompt_cut=False, response_cut=False)


def _check_scores(scores: pl.DataFrame, spec: RewardModelSpec) -> None:
    bad = scores.filter(~pl.col("score").is_finite())
    if not bad.is_empty():
        raise ModelError(
            f"the reward model {spec.path!r} gave {bad.height} scores that are NaN or infinite, first for {bad.row(0, named=True)}; "
            "try dtype='float32'"
        )


def _summary(
    spec: RewardModelSpec,
    asked: pl.DataFrame,
    rendered: Sequence[Rendered],
    distinct: Sequence[Rendered],
    scores: pl.DataFrame,
) -> ScoringSummary:
    lengths = [len(text.input_ids) for text in distinct]
    batches = token_budget_batches(lengths, spec.batch_tokens)
    padded = sum(len(batch) * lengths[batch[0]] for batch in batches)
    tie_rate, smallest_gap = ties(scores)
    return ScoringSummary(
        texts=len(rendered),
        distinct_texts=len(distinct),
        tokens=sum(lengths),
        padding_share=1 - sum(lengths) / padded,
        max_length=spec.max_length,
        longest_text=max(lengths),
        prompts_cut=sum(text.prompt_cut for text in rendered),
        responses_cut=sum(text.response_cut for text in rendered),
        empty_responses=asked.filter(pl.col("response") == "").height,
        tie_rate=tie_rate,
        smallest_gap=smallest_gap,
    )
