"""Scores of responses, exact and independent of what else is in the batch.

Texts are rendered once, identical ones of a prompt scored once. In float32 the score of a text moves by less than 1e-5 with the
batch that it is in; by how much it moved is measured on some of the texts and reported. While the model works on some texts, the
next are rendered beside it, and no more than those are held as tokens.
"""

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import polars as pl

from charm_core.errors import ModelError, TableError
from charm_core.reward_model.jobs import ScoringSummary
from charm_core.reward_model.loading import RewardModel, load_reward_model
from charm_core.reward_model.rendering import Rendered, render
from charm_core.reward_model.scoring_shares import ties
from charm_core.reward_model.spec import RewardModelSpec
from charm_core.reward_model.text_scoring import BatchingCheck, Progress, choose_batching, run_texts
from charm_core.tables import PROMPTS, RESPONSES, SCORES, validate

logger = logging.getLogger(__name__)

WINDOW_TEXTS = 8192
"""Texts that are held as tokens at once; batches do not reach over its end."""


@dataclass(frozen=True, kw_only=True)
class ScoringResult:
    """Scores, and what happened on the way."""

    scores: pl.DataFrame
    """SCORES: one row per response."""
    summary: ScoringSummary
    cuts: pl.DataFrame
    """Columns prompt_id, policy_model, prompt_cut and response_cut: one row per response."""


@dataclass(frozen=True, kw_only=True)
class _Window:
    """Some of the responses, all those to a prompt together."""

    rows: tuple[int, ...]
    owners: tuple[str, ...]
    """Their prompts."""
    texts: tuple[Rendered, ...]


@dataclass(kw_only=True)
class _Tally:
    """What scoring has met so far, in the order of the rows it came to."""

    rows: list[int]
    scores: list[float]
    prompt_cut: list[bool]
    response_cut: list[bool]
    distinct: int = 0
    tokens: int = 0
    computed: int = 0
    longest: int = 0
    check: BatchingCheck | None = None


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
    tally = _Tally(rows=[], scores=[], prompt_cut=[], response_cut=[])
    for window in _windows(model, asked):
        if tally.check is None:
            model, tally.check = choose_batching(model, window.texts, window.owners, compiled=spec.compile)
        _score_window(model, window, tally, asked.height, progress)
    met = pl.DataFrame(
        {
            "row": pl.Series(tally.rows, dtype=pl.Int64),
            "score": pl.Series(tally.scores, dtype=pl.Float64),
            "prompt_cut": pl.Series(tally.prompt_cut, dtype=pl.Boolean),
            "response_cut": pl.Series(tally.response_cut, dtype=pl.Boolean),
        }
    ).sort("row")
    whole = pl.concat([asked.select("prompt_id", "policy_model"), met.drop("row")], how="horizontal")
    scores = whole.select("prompt_id", "policy_model", "score")
    _check_scores(scores, spec)
    scores = validate(scores, SCORES)
    summary = _summary(model.spec, asked, tally, scores)
    logger.info("scored %d texts (%d distinct) with %s", summary.texts, summary.distinct_texts, spec.path)
    cuts = whole.select("prompt_id", "policy_model", "prompt_cut", "response_cut")
    return ScoringResult(scores=scores, summary=summary, cuts=cuts)


def _windows(model: RewardModel, asked: pl.DataFrame) -> Iterator[_Window]:
    """The responses as tokens; the next window is rendered in a thread while one is used."""
    by_prompt = (
        asked.with_row_index("row").with_columns(first=pl.col("row").min().over("prompt_id")).sort("first", "row")
    )
    starts = [0]
    for start, size in (
        by_prompt.group_by("first", maintain_order=True)
        .len()
        .with_columns(start=pl.col("len").cum_sum() - pl.col("len"))
        .select("start", "len")
        .rows()
    ):
        if start > starts[-1] and start + size - starts[-1] > WINDOW_TEXTS:
            starts.append(start)
    ends = [*starts[1:], by_prompt.height]

    def rendered(start: int, end: int) -> _Window:
        part = by_prompt[start:end]
        return _Window(
            rows=tuple(part["row"].to_list()),
            owners=tuple(part["prompt_id"].to_list()),
            texts=tuple(
                render(model.tokenizer, messages, response, model.spec)
                for messages, response in part.select("messages", "response").iter_rows()
            ),
        )

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="render") as beside:
        spans = list(zip(starts, ends, strict=True)) if by_prompt.height else []
        coming = [beside.submit(rendered, *span) for span in spans[:1]]
        for following in [*spans[1:], None]:
            if not coming:
                return
            window = coming.pop().result()
            if following is not None:
                coming.append(beside.submit(rendered, *following))
            yield window


def _score_window(model: RewardModel, window: _Window, tally: _Tally, texts: int, progress: Progress | None) -> None:
    distinct: dict[tuple[str, Rendered], int] = {}
    positions = [
        distinct.setdefault((owner, _identity(text)), len(distinct))
        for owner, text in zip(window.owners, window.texts, strict=True)
    ]
    before, different = len(tally.rows), [text for _, text in distinct]

    def report(done: int, _of: int) -> None:
        if progress is not None:
            progress(before + done * len(positions) // len(distinct), texts)

    found = run_texts(model, different, [owner for owner, _ in distinct], report)
    tally.rows.extend(window.rows)
    tally.scores.extend(found.values[position] for position in positions)
    tally.prompt_cut.extend(text.prompt_cut for text in window.texts)
    tally.response_cut.extend(text.response_cut for text in window.texts)
    tally.distinct += len(different)
    tally.tokens += sum(len(text.input_ids) for text in different)
    tally.computed += found.computed_tokens
    tally.longest = max(tally.longest, *(len(text.input_ids) for text in different))


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


def _summary(spec: RewardModelSpec, asked: pl.DataFrame, tally: _Tally, scores: pl.DataFrame) -> ScoringSummary:
    tie_rate, smallest_gap = ties(scores)
    return ScoringSummary(
        texts=asked.height,
        distinct_texts=tally.distinct,
        tokens=tally.tokens,
        computed_tokens=tally.computed,
        padding_share=max(0.0, 1 - tally.tokens / tally.computed) if tally.computed else 0.0,
        batching="packed" if tally.check is not None and tally.check.refusal is None else "padded",
        batch_drift=None if tally.check is None else tally.check.drift,
        max_length=spec.max_length,
        longest_text=tally.longest,
        prompts_cut=sum(tally.prompt_cut),
        responses_cut=sum(tally.response_cut),
        empty_responses=asked.filter(pl.col("response") == "").height,
        tie_rate=tie_rate,
        smallest_gap=smallest_gap,
    )
