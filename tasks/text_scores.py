"""Scores text by text: every text is scored once by a reward model, in whatever benchmark or run it comes up again.

A step is cached as a whole, so one more item makes it another step. What its other texts got is looked up here: by the
exact messages and response, among all that this reward model, with these settings, has scored and that is still in the
store. So another benchmark, or an item more, costs the scoring of what is new. What is stored is verified when it is read;
what is damaged or gone is scored again. One text has one score: the first that was stored.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import polars as pl
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from charm_core.errors import ArtifactError
from charm_core.reward_model.jobs import ScoringJob, ScoringSummary
from charm_core.reward_model.scoring_shares import conversation_digest, merge_summaries
from charm_core.tables import PROMPTS, RESPONSES, SCORES, TableSchema, validate
from tasks.caching import step
from tasks.progress import Progress
from tasks.prompts import ResponseSet
from tasks.publishing import report_progress
from tasks.scoring import RewardModelRef
from tasks.scoring_launch import run_scoring
from tasks.scoring_lines import log_scoring, pass_warnings_on
from tasks.scratch import scratch_folder
from tasks.store import ArtifactRef, ArtifactStore
from tasks.worker_processes import OnLine

logger = logging.getLogger(__name__)

TEXT_SCORES = TableSchema(
    name="text scores",
    columns={"text": pl.String(), "score": pl.Float64(), "prompt_cut": pl.Boolean(), "response_cut": pl.Boolean()},
    key=("text",),
)
"""One row per text, by the digest of its messages and response; whether it was cut to be scored."""

TEXTS_PER_PROCESS = 20_000
"""What a killed run loses at most. Each process loads the reward model, so fewer would cost."""

_KEPT_VERSION = 1
_REFS = TypeAdapter(tuple[ArtifactRef, ...])
_CELL = ("prompt_id", "policy_model")


class ScoredTexts(BaseModel):
    """Scores of one set of texts, and what was cut to make them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    scores: ArtifactRef
    cut: ArtifactRef | None
    """Columns prompt_id, policy_model, prompt_cut and response_cut: the texts of which something was cut. None: not known."""
    texts: int
    prompts_cut: int
    responses_cut: int


@dataclass(frozen=True, kw_only=True)
class _Part:
    """What one process scored."""

    scores: pl.DataFrame
    """TEXT_SCORES."""
    summary: ScoringSummary


@step(version=1)
def score_texts(store: ArtifactStore, model: RewardModelRef, sets: tuple[ResponseSet, ...]) -> tuple[ScoredTexts, ...]:
    """Score several sets of texts in one pass, each different text once, and only those without a score so far.

    Args:
        store: Where the texts are, and where scores are kept.
        model: The reward model.
        sets: Prompts and responses; sets may share texts.

    Returns:
        Scores of each set, in order.

    Raises:
        ModelError: The reward model cannot be used, or gives NaN or infinite scores.
        WorkerLostError: Scoring was killed; what it had finished is kept.
    """
    asked = [_texts(store, texts) for texts in sets]
    wanted = pl.concat(asked).unique("text", maintain_order=True)
    known = _known_scores(store, model, wanted)
    missing = wanted.join(known, on="text", how="anti", maintain_order="left")
    logger.info("%d of %d texts have a score already", wanted.height - missing.height, wanted.height)
    # in the order of their digests every part has texts of all lengths, and the same texts make the same parts; responses to
    # one conversation stay together, for their prompt is computed once
    scored = _score_missing(store, model, missing.sort("conversation", "text"))
    scores = pl.concat([known, scored])
    return tuple(_scored_set(store, cells, scores) for cells in asked)


def _texts(store: ArtifactStore, texts: ResponseSet) -> pl.DataFrame:
    """Columns text and conversation (digests), prompt_id, policy_model, messages and response, one row per response."""
    prompts = store.read_table(texts.prompts, PROMPTS).select("prompt_id", "messages")
    cells = store.read_table(texts.responses, RESPONSES).join(
        prompts, on="prompt_id", how="inner", maintain_order="left"
    )
    digests = [text_digest(messages, response) for messages, response in cells.select("messages", "response").rows()]
    asked = [conversation_digest(messages) for messages in cells.get_column("messages").to_list()]
    return cells.with_columns(
        text=pl.Series(digests, dtype=pl.String), conversation=pl.Series(asked, dtype=pl.String)
    ).select("text", "conversation", *_CELL, "messages", "response")


def text_digest(messages: Sequence[dict[str, str]], response: str) -> str:
    """What identifies a text: roles and contents of the conversation, and the response, to the last character."""
    content = json.dumps([[[message["role"], message["content"]] for message in messages], response])
    return hashlib.sha256(content.encode()).hexdigest()


def _score_missing(store: ArtifactStore, model: RewardModelRef, missing: pl.DataFrame) -> pl.DataFrame:
    if missing.is_empty():
        return pl.DataFrame(schema=dict(TEXT_SCORES.columns))
    parts: list[_Part] = []
    log = pass_warnings_on()
    with report_progress("scoring texts", "texts") as progress:
        for start in range(0, missing.height, TEXTS_PER_PROCESS):
            so_far = partial(_report, progress, start, missing.height)
            part = _score(store, model, missing[start : start + TEXTS_PER_PROCESS], so_far, log)
            _keep(store, model, part.scores)
            parts.append(part)
    scored = pl.concat([part.scores for part in parts])
    by_prompt = missing.select("text", prompt_id="conversation").join(scored, on="text")
    log_scoring(merge_summaries([part.summary for part in parts], by_prompt))
    return scored


def _report(progress: Progress, before: int, total: int, done: int, _of: int) -> None:
    progress(before + done, total)


def _score(store: ArtifactStore, model: RewardModelRef, texts: pl.DataFrame, progress: Progress, log: OnLine) -> _Part:
    """Score some texts in one process."""
    with scratch_folder("scoring") as folder, model.local_spec(store) as spec:
        cuts = Path(folder, "cuts.parquet")
        job = ScoringJob(
            model=spec,
            prompts_path=Path(folder, "prompts.parquet"),
            responses_path=Path(folder, "responses.parquet"),
            scores_path=Path(folder, "scores.parquet"),
            cuts_path=cuts,
        )
        # two sets may call different prompts by one id, and one policy model may have answered in both
        named = texts.with_columns(
            prompt_id=pl.col("conversation"), policy_model=pl.col("text"), prompt_set=pl.lit("texts")
        )
        named.select(list(PROMPTS.columns)).unique("prompt_id").write_parquet(job.prompts_path)
        named.select(list(RESPONSES.columns)).write_parquet(job.responses_path)
        summary = run_scoring(job, progress, log)
        found = pl.read_parquet(job.scores_path).join(pl.read_parquet(cuts), on=_CELL)
    scored = found.select(pl.col("policy_model").alias("text"), "score", "prompt_cut", "response_cut")
    return _Part(scores=validate(scored, TEXT_SCORES), summary=summary)


def _scored_set(store: ArtifactStore, cells: pl.DataFrame, scores: pl.DataFrame) -> ScoredTexts:
    found = cells.select("text", *_CELL).join(scores, on="text", how="left", maintain_order="left")
    cut = found.filter(pl.col("prompt_cut") | pl.col("response_cut"))
    return ScoredTexts(
        scores=store.write_table(found.select(list(SCORES.columns)), SCORES),
        cut=store.write_frame(cut.select(*_CELL, "prompt_cut", "response_cut").sort(_CELL), "cut_texts"),
        texts=cells.height,
        prompts_cut=int(cut.get_column("prompt_cut").sum()),
        responses_cut=int(cut.get_column("response_cut").sum()),
    )


def _known_scores(store: ArtifactStore, model: RewardModelRef, wanted: pl.DataFrame) -> pl.DataFrame:
    """TEXT_SCORES of those of the wanted texts that were scored before."""
    tables = [pl.DataFrame(schema=dict(TEXT_SCORES.columns))]
    for ref in _kept(store, model):
        try:
            tables.append(store.read_table(ref, TEXT_SCORES))
        except ArtifactError as error:
            logger.warning("scores that were kept cannot be used, their texts are scored again: %s", error)
    scored = pl.concat(tables).unique("text", keep="first", maintain_order=True)
    return scored.join(wanted, on="text", how="semi", maintain_order="left")


def _keep(store: ArtifactStore, model: RewardModelRef, scores: pl.DataFrame) -> None:
    """Note scores for later. Of two runs that do so at the same moment one may be forgotten, which costs time only."""
    ref = store.write_table(scores, TEXT_SCORES)
    store.write_note(_name(model), _REFS.dump_json((*_kept(store, model), ref)))


def _kept(store: ArtifactStore, model: RewardModelRef) -> tuple[ArtifactRef, ...]:
    try:
        return _REFS.validate_json(store.read_note(_name(model)))
    except (ArtifactError, ValidationError):  # none yet, or of another form
        return ()


def _name(model: RewardModelRef) -> str:
    """Under which name the scores of a reward model are noted: all that decides a score is in it."""
    return f"text scores v{_KEPT_VERSION} {json.dumps(model.identity(), sort_keys=True)}"
