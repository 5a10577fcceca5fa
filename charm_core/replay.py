"""Responses that exist already, matched to the prompts of a set.

A response belongs to a prompt if the text that was asked is the same, message for message. Arena-Hard's answers name their
question by its id instead, so they belong to the prompts of Arena-Hard's question file, which keep those ids; so do tables
that have ids and no texts.
"""

from dataclasses import dataclass

import polars as pl
from pydantic import Field

from charm_core.conversations import layout_key
from charm_core.errors import ConfigError, TableError
from charm_core.records import Record
from charm_core.replay_formats import Answers, ReplayRules
from charm_core.responses import prompt_content_id
from charm_core.sampling import status_of
from charm_core.tables import PROMPTS, SAMPLES, validate

_SHOWN = 40
_EXCERPT = 60


class ReplayCounts(Record):
    """What became of the rows of a file of responses, and of the prompts."""

    rows: int = Field(description="Rows in the file.")
    filtered: int = Field(description="Left out by where.")
    other_policy_models: int = Field(description="Of other policy models.")
    without_prompt: int = Field(description="To prompts that are not in the set.")
    repeated: int = Field(description="The same response to the same prompt as an earlier row.")
    contradicting: int = Field(default=0, description="Another response to a prompt than an earlier row, left out.")
    responses: int = Field(description="Kept.")
    missing: int = Field(description="Prompts of the set without a response.")
    called: str | None = Field(default=None, description="What the file calls the policy model.")

    def sentences(self, policy_model: str) -> tuple[str, ...]:
        """What somebody should look at; nothing where everything fits."""
        strange = self.called is not None and _bare(self.called) != _bare(policy_model)
        called = (
            (
                f"The responses of {policy_model} were replayed from a file that calls it {self.called}: make sure it is the same.",
            )
            if strange
            else ()
        )
        if not (self.missing or self.repeated or self.contradicting):
            return called  # that there are responses to further prompts is of no matter then
        parts = [
            f"{count:,} {what}"
            for count, what in (
                (self.missing, "prompts have no response"),
                (self.without_prompt, "responses are to prompts that are not in the set"),
                (self.repeated, "responses are there more than once"),
                (self.contradicting, "further responses to the same prompt were left out"),
            )
            if count
        ]
        return (*called, f"In the replayed file of {policy_model}, {'; '.join(parts)}.")


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """Responses of one policy model to the prompts of a set."""

    samples: pl.DataFrame
    """SAMPLES; a prompt without a response has no row."""
    counts: ReplayCounts


def match_answers(
    answers: Answers,
    prompts: pl.DataFrame,
    policy_model: str,
    rules: ReplayRules | None = None,
) -> Replayed:
    """Give each prompt the response that a file has for it.

    Args:
        answers: What was read.
        prompts: PROMPTS.
        policy_model: Whose responses they are; a file with several must call it by this name.
        rules: What is an error.

    Raises:
        ConfigError: Responses of several policy models, none of this name.
        TableError: No response belongs to a prompt; a prompt has none though it must; a prompt has several.
    """
    settings = rules or ReplayRules()
    asked = validate(prompts, PROMPTS)
    mine, called = _of_policy_model(answers.frame, policy_model)
    matched = _matched(mine, asked)
    if matched.is_empty():
        raise TableError(_nothing_matches(mine, asked, policy_model))
    distinct = matched.unique(["prompt_id", "response"], keep="first", maintain_order=True)
    if settings.repeated == "error":
        _check_one_response(distinct, policy_model)
    kept = distinct.unique("prompt_id", keep="first", maintain_order=True)
    missing = asked.filter(~pl.col("prompt_id").is_in(kept.get_column("prompt_id").to_list()))
    if not settings.allow_missing and not missing.is_empty():
        raise TableError(
            f"{missing.height} of {asked.height} prompts have no response of {policy_model!r}, first "
            f"{missing.get_column('prompt_id')[0]!r}; give all of them, or set allow_missing"
        )
    return Replayed(
        samples=_samples(kept, policy_model),
        counts=ReplayCounts(
            rows=answers.rows,
            filtered=answers.filtered,
            other_policy_models=answers.frame.height - mine.height,
            without_prompt=mine.height - matched.get_column("row").n_unique(),
            repeated=matched.height - distinct.height,
            contradicting=distinct.height - kept.height,
            responses=kept.height,
            missing=missing.height,
            called=called,
        ),
    )


def _bare(name: str) -> str:
    """A name without case and punctuation, in which the lists of models differ most."""
    return "".join(character for character in name.casefold() if character.isalnum())


def _of_policy_model(answers: pl.DataFrame, policy_model: str) -> tuple[pl.DataFrame, str | None]:
    names = answers.get_column("called").unique().sort().to_list()
    if len(names) == 1:
        return answers, names[0]
    if policy_model in names:
        return answers.filter(pl.col("called") == policy_model), policy_model
    raise ConfigError(
        f"the file has responses of {len(names)} policy models and none is called {policy_model!r}; choose one with where: "
        f"{', '.join(str(name) for name in names[:_SHOWN])}{' ...' if len(names) > _SHOWN else ''}"
    )


def _matched(answers: pl.DataFrame, prompts: pl.DataFrame) -> pl.DataFrame:
    """row, prompt_id, response: by content, and by the id of the question where that finds nothing."""
    contents = [prompt_content_id(messages) for messages in prompts.get_column("messages").to_list()]
    by_content = answers.join(prompts.select("prompt_id", content=pl.Series(contents, dtype=pl.String)), on="content")
    others = answers.filter(~pl.col("row").is_in(by_content.get_column("row").to_list()))
    by_question = others.join(prompts.select("prompt_id", question="prompt_id"), on="question")
    columns = ["row", "prompt_id", "response"]
    return pl.concat([by_content.select(columns), by_question.select(columns)]).sort("row", "prompt_id")


def _nothing_matches(answers: pl.DataFrame, prompts: pl.DataFrame, policy_model: str) -> str:
    said = f"none of the {answers.height} responses of {policy_model!r} is to one of the {prompts.height} prompts"
    if answers.get_column("content").null_count() == answers.height:
        return (
            f"{said}: they name their questions by ids ({answers.get_column('question')[0]!r}) and not by text; take the prompts "
            "from the question file of the same benchmark, or name the column with those ids in prompts.columns.prompt_id"
        )
    keys = {layout_key(messages) for messages in prompts.get_column("messages").to_list()}
    alike = answers.filter(pl.col("layout").is_in(sorted(keys))).height
    hint = f"{alike} would be but for case and white space" if alike else "they are responses to something else"
    return f"{said}: {hint}; give the responses to these prompts"


def _check_one_response(distinct: pl.DataFrame, policy_model: str) -> None:
    several = distinct.filter(pl.col("prompt_id").is_duplicated())
    if several.is_empty():
        return
    first = several.filter(pl.col("prompt_id") == several.get_column("prompt_id")[0])
    shown = " / ".join(repr(text[:_EXCERPT]) for text in first.get_column("response").head(2))
    raise TableError(
        f"{several.get_column('prompt_id').n_unique()} prompts have several responses of {policy_model!r}, first "
        f"{first.get_column('prompt_id')[0]!r} in the rows {first.get_column('row').to_list()}: {shown}; keep one of each, or "
        "set repeated = 'first' to take the first one"
    )


def _samples(kept: pl.DataFrame, policy_model: str) -> pl.DataFrame:
    frame = kept.select(
        "prompt_id",
        pl.lit(policy_model).alias("policy_model"),
        "response",
        pl.Series("status", [status_of(text, None) for text in kept.get_column("response")], dtype=pl.String),
        pl.lit(None, pl.String).alias("finish_reason"),
        pl.lit(None, pl.Int64).alias("prompt_tokens"),
        pl.lit(None, pl.Int64).alias("response_tokens"),
    )
    return validate(frame, SAMPLES)
