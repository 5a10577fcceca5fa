"""From the files in which prompts are published to conversations that a policy model can answer.

AlpacaEval's instructions, Arena-Hard's questions (v0.1 with turns, v2 with a prompt), preference pairs whose common beginning is
the prompt, and any table with a column of texts or of message lists. A row that is no such conversation is never passed over
in silence: it is counted with its reason, or an error.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import polars as pl
from pydantic import BaseModel, ConfigDict, Field

from charm_core.conversations import (
    Message,
    NoPromptError,
    as_messages,
    check_conversation,
    common_beginning,
    opening,
)
from charm_core.errors import TableError
from charm_core.records import Record
from charm_core.responses import prompt_content_id
from charm_core.tables import MESSAGES

Row = Mapping[str, Any]
PromptFormat = Literal["table", "alpaca_eval", "arena_hard", "preferences"]

ROWS_SCHEMA: dict[str, pl.DataType] = {
    "row": pl.Int64(),
    "prompt_id": pl.String(),
    "prompt_set": pl.String(),
    "messages": MESSAGES,
}
_QUESTION_IDS = ("question_id", "uid")


class PromptColumns(BaseModel):
    """What the columns of a table of prompts are called."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str = Field(default="prompt", description="Prompts: text, one {role, content} message, or a list of them.")
    prompt_id: str | None = Field(default=None, description="Prompt ids; none: made from the prompt's content.")
    prompt_set: str | None = Field(default=None, description="Where a prompt comes from (its domain), if there is one.")
    chosen: str = Field(default="chosen", description="Preference pairs only: the preferred conversations.")
    rejected: str = Field(default="rejected", description="Preference pairs only: the other conversations.")


class PromptReading(BaseModel):
    """How rows become prompts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["auto", "table", "alpaca_eval", "arena_hard", "preferences"] = Field(
        default="auto", description="Format; auto recognises it by its fields."
    )
    columns: PromptColumns = Field(default=PromptColumns(), description="Tables only: what the columns are called.")
    where: dict[str, str] = Field(default={}, description="Keep rows whose column equals the value.")
    name: str | None = Field(
        default=None, description="What the prompt set is called where no column says it; default: 'all'."
    )
    messages: Literal["all", "first"] = Field(
        default="all",
        description="first: only the opening message of the user, as for CHARM's 20,000 prompts of preference_700K.",
    )


class Unusable(Record):
    """Rows that hold no prompt."""

    reason: str
    rows: int
    first_row: int = Field(description="The number of the first of them, from 1.")


@dataclass(frozen=True, kw_only=True)
class PromptRows:
    """What was read."""

    frame: pl.DataFrame
    """row (its number, from 1), prompt_id, prompt_set, messages."""
    rows: int
    """Rows in the source."""
    filtered: int
    """Of them, those that ``where`` left out."""
    unusable: tuple[Unusable, ...] = ()


def recognise(fields: Iterable[str], columns: PromptColumns) -> PromptFormat:
    """The format of a source, by the names of its fields.

    Raises:
        TableError: None of the known ones.
    """
    names = set(fields)
    if columns.prompt == "prompt" and "question_id" in names and "turns" in names:
        return "arena_hard"
    if "uid" in names and "prompt" in names and names & {"category", "subcategory"}:
        return "arena_hard"
    if columns.prompt in names:
        return "table"
    if "instruction" in names:
        return "alpaca_eval"
    if {columns.chosen, columns.rejected} <= names:
        return "preferences"
    raise TableError(
        f"no prompts recognised: the fields are {sorted(names)}, and none is {columns.prompt!r}; name the column with the prompts "
        "in columns.prompt, or say the format"
    )


def read_prompts(slices: Iterable[Sequence[Row]], reading: PromptReading) -> PromptRows:
    """Read the prompts of a source.

    Args:
        slices: Its rows, some at a time, so that a large source need not be in memory whole.
        reading: Its format and what of it is wanted.

    Raises:
        TableError: A missing column, no rows, nothing left by ``where``.
    """
    reader = _Reader(reading)
    frames = [reader.read(rows) for rows in slices if rows]
    if not reader.rows:
        raise TableError("the source has no rows; check the file")
    if reader.filtered == reader.rows:
        raise TableError(f"no row has {_shown(reading.where)}; check where")
    return PromptRows(
        frame=pl.concat([pl.DataFrame(schema=ROWS_SCHEMA), *frames]),
        rows=reader.rows,
        filtered=reader.filtered,
        unusable=tuple(
            Unusable(reason=reason, rows=count, first_row=reader.first[reason])
            for reason, count in reader.unusable.most_common()
        ),
    )


class _Reader:
    """Reads slices, and counts what it meets."""

    def __init__(self, reading: PromptReading) -> None:
        self._reading = reading
        self._format: PromptFormat | None = None if reading.format == "auto" else reading.format
        self.rows = self.filtered = 0
        self.unusable: Counter[str] = Counter()
        self.first: dict[str, int] = {}

    def read(self, rows: Sequence[Row]) -> pl.DataFrame:
        if self._format is None:
            self._format = recognise(rows[0], self._reading.columns)
        found = []
        for row in rows:
            self.rows += 1
            if not keeps(row, self._reading.where):
                self.filtered += 1
                continue
            try:
                found.append(self._prompt(row, self._format))
            except NoPromptError as reason:
                self.unusable[str(reason)] += 1
                self.first.setdefault(str(reason), self.rows)
        return pl.DataFrame(found, schema=ROWS_SCHEMA, orient="row")

    def _prompt(self, row: Row, kind: PromptFormat) -> tuple[int, str, str, list[Message]]:
        columns = self._reading.columns
        if kind == "alpaca_eval":
            messages, named, prompt_set = as_messages(needed(row, "instruction")), None, row.get("dataset")
        elif kind == "arena_hard":
            messages, named, prompt_set = _arena_question(row), question_id(row), row.get("category")
        else:
            messages = _of_pair(row, columns) if kind == "preferences" else as_messages(needed(row, columns.prompt))
            named = None if columns.prompt_id is None else _named(needed(row, columns.prompt_id))
            prompt_set = None if columns.prompt_set is None else needed(row, columns.prompt_set)
        if self._reading.messages == "first":
            messages = opening(messages)
        reason = check_conversation(messages)
        if reason is not None:
            raise NoPromptError(reason)
        prompt_id = prompt_content_id(messages) if named is None else str(named)
        return self.rows, prompt_id, (self._reading.name or "all") if prompt_set is None else str(prompt_set), messages


def keeps(row: Row, where: Mapping[str, str]) -> bool:
    """Whether a row has the wanted values.

    Raises:
        TableError: It has no such column.
    """
    return all(str(needed(row, name)) == value for name, value in where.items())


def needed(row: Row, name: str) -> Any:
    """The value of a field that every row must have.

    Raises:
        TableError: This one has not.
    """
    try:
        return row[name]
    except KeyError:
        raise TableError(
            f"a row lacks the field {name!r}; it has {sorted(row)}; check the format and the columns that are named"
        ) from None


def question_id(row: Row) -> str:
    """The id of an Arena-Hard question or answer.

    Raises:
        TableError: It has none.
    """
    for name in _QUESTION_IDS:
        if row.get(name) is not None:
            return str(row[name])
    raise TableError(f"an Arena-Hard row has neither {' nor '.join(_QUESTION_IDS)}; its fields are {sorted(row)}")


def _named(value: Any) -> str:
    if value is None:
        raise NoPromptError("no prompt id")
    return str(value)


def _arena_question(row: Row) -> list[Message]:
    if "turns" not in row:
        return as_messages(needed(row, "prompt"))
    turns = row["turns"]
    if not isinstance(turns, Sequence) or len(turns) != 1 or not isinstance(turns[0], Mapping):
        raise NoPromptError(
            "an Arena-Hard question needs one turn: further ones would depend on the policy model's answers"
        )
    return as_messages(turns[0].get("content"))


def _of_pair(row: Row, columns: PromptColumns) -> list[Message]:
    return common_beginning(*(as_messages(needed(row, name)) for name in (columns.chosen, columns.rejected)))


def _shown(where: Mapping[str, str]) -> str:
    return " and ".join(f"{name} = {value!r}" for name, value in where.items())
