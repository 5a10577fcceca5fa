"""From the files in which responses are published to rows that say who answered what, and how.

AlpacaEval's outputs, Arena-Hard's answers (v0.1 with choices, v2 with messages), and any table with a column of responses.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import polars as pl
from pydantic import BaseModel, ConfigDict

from charm_core.conversations import NoPromptError, as_messages, layout_key
from charm_core.errors import TableError
from charm_core.prompt_formats import Row, keeps, needed, question_id
from charm_core.responses import ColumnNames, prompt_content_id

AnswerFormat = Literal["table", "alpaca_eval", "arena_hard"]

_DEFAULT = ColumnNames()
_EXCERPT = 60

_SCHEMA: dict[str, pl.DataType] = {
    "row": pl.Int64(),
    "called": pl.String(),
    "content": pl.String(),
    "layout": pl.String(),
    "question": pl.String(),
    "response": pl.String(),
}


class ReplayRules(BaseModel):
    """How rows become responses. The settings are those of ``ReplayBackend``, where they are described."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["auto", "table", "alpaca_eval", "arena_hard"] = "auto"
    columns: ColumnNames = ColumnNames()
    where: dict[str, str] = {}
    allow_missing: bool = True
    """Whether prompts may be without a response."""
    repeated: Literal["error", "first"] = "error"
    """What to do about a prompt with several different responses: an error, or take the first one."""


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What was read of a file of responses."""

    frame: pl.DataFrame
    """row, called, content, layout, question, response; what a format lacks is null."""
    rows: int
    filtered: int


def recognise_answers(fields: Iterable[str], columns: ColumnNames) -> AnswerFormat:
    """The format of a file of responses, by the names of its fields.

    Raises:
        TableError: None of the known ones.
    """
    names = set(fields)
    if columns.response in names and names & {columns.prompt, columns.prompt_id}:
        return "table"
    if {"instruction", "output"} <= names:
        return "alpaca_eval"
    if {"question_id", "choices"} <= names or {"uid", "messages"} <= names:
        return "arena_hard"
    raise TableError(
        f"no responses recognised: the fields are {sorted(names)}, and none is {columns.response!r}; name the columns in columns"
    )


def read_answers(slices: Iterable[Sequence[Row]], rules: ReplayRules) -> Answers:
    """Read a file of responses.

    Args:
        slices: Its rows, some at a time.
        rules: Its format and what of it is wanted.

    Raises:
        TableError: No rows, a missing field, a response that is no text, nothing left by ``where``.
    """
    found: list[tuple[Any, ...]] = []
    rows = 0
    kind: AnswerFormat | None = None if rules.format == "auto" else rules.format
    for part in slices:
        for row in part:
            rows += 1
            kind = kind or recognise_answers(row, rules.columns)
            if keeps(row, rules.where):
                try:
                    found.append((rows, *_READERS[kind](row, rules.columns)))
                except TableError as error:
                    raise TableError(f"row {rows}: {error}") from None
    if not found:
        raise TableError(
            f"no responses among {rows} rows{f' with {rules.where}' if rules.where else ''}; check the file"
        )
    return Answers(frame=pl.DataFrame(found, schema=_SCHEMA, orient="row"), rows=rows, filtered=rows - len(found))


_Found = tuple[str | None, str | None, str | None, str | None, str]
"""What the file calls the policy model, digests of the prompt's content, the id of the question, the response."""


def _from_alpaca_eval(row: Row, columns: ColumnNames) -> _Found:
    del columns
    return (_name(row.get("generator")), *_digests(needed(row, "instruction")), None, _text(needed(row, "output")))


def _from_arena_hard(row: Row, columns: ColumnNames) -> _Found:
    del columns
    called = _name(row.get("model_id", row.get("model")))
    if "messages" not in row:
        return called, None, None, question_id(row), _text(_arena_answer(needed(row, "choices")))
    *asked, answer = needed(row, "messages") or [None]
    if not isinstance(answer, Mapping) or answer.get("role") != "assistant":
        raise TableError(f"the last message is not the assistant's: {answer!r}")
    return called, *_digests(asked), question_id(row), _text(answer.get("content"))


def _from_table(row: Row, columns: ColumnNames) -> _Found:
    digests = _digests(row[columns.prompt]) if columns.prompt in row else (None, None)
    # an id says nothing where the text is known: in another file it may be that of another prompt
    question = _name(row.get(columns.prompt_id)) if columns.prompt_id and columns.prompt not in row else None
    if columns.prompt not in row and question is None:
        raise TableError(f"there is no {columns.prompt!r} and no {columns.prompt_id!r}; the fields are {sorted(row)}")
    # a file of one policy model need not name it, but a name that was given must be there
    named = columns.policy_model in row or columns.policy_model != _DEFAULT.policy_model
    called = _name(needed(row, columns.policy_model)) if named else None
    return called, *digests, question, _text(needed(row, columns.response))


_READERS = {"alpaca_eval": _from_alpaca_eval, "arena_hard": _from_arena_hard, "table": _from_table}


def _arena_answer(choices: Any) -> Any:
    """The content of the only turn of the first choice."""
    try:
        (turn,) = choices[0]["turns"]
        return turn["content"]
    except (TypeError, ValueError, KeyError, IndexError):
        raise TableError(f"choices[0] must have one turn with a content, not {str(choices)[:_EXCERPT]!r}") from None


def _digests(prompt: Any) -> tuple[str | None, str | None]:
    try:
        messages = as_messages(prompt)
        return prompt_content_id(messages), layout_key(messages)
    except (NoPromptError, UnicodeEncodeError):
        return None, None  # no prompt of a set is like it


def _name(value: Any) -> str | None:
    return None if value is None else str(value)


def _text(value: Any) -> str:
    """A response as text: some files keep it in a record or a message, and write null for a request that failed."""
    if isinstance(value, Mapping):
        value = value.get("answer", value.get("content"))
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], Mapping):
        value = value[0].get("content")
    if value is None:
        return ""
    if not isinstance(value, str):
        raise TableError(f"the response is {type(value).__name__}, not text; name the right column in columns.response")
    return value.encode("utf-8", "replace").decode()  # JSON can hold half of a pair of surrogates
