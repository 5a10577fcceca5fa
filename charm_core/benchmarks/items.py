"""Items of a benchmark: a prompt with the responses that are right and those that are wrong.

Every benchmark reads its official format, as the rows of the hub's dataset or of local files, into these. Which texts a
reward model has to score for them depends on content alone, so that one pass of scoring serves all benchmarks.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field, StringConstraints, ValidationError

from charm_core.errors import TableError
from charm_core.records import Record
from charm_core.responses import prompt_content_id

Row = Mapping[str, Any]
"""One row of a benchmark in its official format."""

Name = Annotated[str, StringConstraints(min_length=1)]
_ID_LENGTH = 16


class Message(Record):
    """One turn of the conversation up to the response."""

    role: Name
    content: str


class BenchmarkItem(Record):
    """One case of a benchmark."""

    item_id: Name = Field(description="Unique within its benchmark.")
    subset: Name
    metric: Name = Field(default="accuracy", description="What is measured on it.")
    also_in: tuple[str, ...] = Field(default=(), description="Further, overlapping subsets that it counts in.")
    messages: tuple[Message, ...] = Field(min_length=1)
    chosen: tuple[str, ...] = Field(min_length=1, description="Right responses.")
    rejected: tuple[str, ...] = Field(min_length=1, description="Wrong responses.")
    group: str | None = Field(
        default=None, description="Items of one group are drawn together by the bootstrap; None: on its own."
    )
    stratum: str | None = Field(
        default=None, description="The bootstrap draws within a stratum, so that its size stays; None: the subset."
    )

    @property
    def unit(self) -> str:
        """What the bootstrap draws."""
        return self.group or self.item_id

    @property
    def responses(self) -> tuple[str, ...]:
        """The chosen, then the rejected."""
        return self.chosen + self.rejected

    @property
    def prompt_id(self) -> str:
        """A digest of the prompt: the same prompt in two benchmarks is one prompt."""
        return prompt_content_id([message.model_dump() for message in self.messages])

    @property
    def is_unwinnable(self) -> bool:
        """Whether a right response is also a wrong one, so that the two always tie."""
        return not set(self.chosen).isdisjoint(self.rejected)


def response_id(response: str) -> str:
    """A digest of a response: it stands where a policy model's name would."""
    return hashlib.sha256(response.encode()).hexdigest()[:_ID_LENGTH]


def read_items(
    rows: Iterable[Row], read: Callable[[Row], BenchmarkItem], *, benchmark: str
) -> tuple[BenchmarkItem, ...]:
    """Read rows in a benchmark's official format.

    Args:
        rows: What the file or the hub's dataset holds.
        read: Makes an item of a row; a KeyError is a missing field, a ValueError a wrong value.
        benchmark: Its name, for errors.

    Returns:
        Items in the order of the rows. Several different ones under one id get a number each.

    Raises:
        TableError: No rows, a missing field, a wrong value, or the same item twice.
    """
    items = [_read(row, number, read, benchmark) for number, row in enumerate(rows, start=1)]
    if not items:
        raise TableError(f"{benchmark} has no items; check the file")
    return _with_unique_ids(items, benchmark)


def conversation(prompt: Any) -> tuple[Message, ...]:
    """A prompt as messages: a text is one message of the user; of messages only role and content are kept.

    Raises:
        ValueError: Neither a text nor a list of messages.
    """
    if isinstance(prompt, str):
        return (Message(role="user", content=prompt),)
    if not isinstance(prompt, Sequence) or not all(isinstance(turn, Mapping) for turn in prompt):
        raise ValueError(f"the prompt is neither text nor messages but {type(prompt).__name__}")
    return tuple(Message(role=turn["role"], content=turn["content"]) for turn in prompt)


def one_of(value: Any, known: Iterable[str], what: str) -> str:
    """The value, if it is a known one.

    Raises:
        ValueError: It is not.
    """
    names = list(known)
    if value not in names:
        raise ValueError(f"{what} {value!r} is none of {names}")
    return str(value)


def _read(row: Row, number: int, read: Callable[[Row], BenchmarkItem], benchmark: str) -> BenchmarkItem:
    try:
        item = read(row)
        for text in (*(message.content for message in item.messages), *item.chosen, *item.rejected):
            text.encode()
    except KeyError as error:
        raise TableError(
            f"row {number} of {benchmark} lacks the field {error.args[0]!r}; it has {sorted(row)}; give the official format"
        ) from None
    except UnicodeEncodeError as error:
        raise TableError(
            f"row {number} of {benchmark} has half a character in a text: {error}; repair the file"
        ) from None
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, part['loc']))}: {part['msg']}" for part in error.errors())
        raise TableError(f"row {number} of {benchmark} cannot be used: {wrong}; give the official format") from None
    except ValueError as error:
        raise TableError(f"row {number} of {benchmark} cannot be used: {error}; give the official format") from None
    return item


def _with_unique_ids(items: Sequence[BenchmarkItem], benchmark: str) -> tuple[BenchmarkItem, ...]:
    found: dict[str, list[BenchmarkItem]] = {}
    unique = []
    for item in items:
        same = found.setdefault(item.item_id, [])
        if item in same:
            raise TableError(f"the item {item.item_id!r} of {benchmark} occurs twice; was a file given twice?")
        same.append(item)
        number = len(same)
        unique.append(item if number == 1 else item.model_copy(update={"item_id": f"{item.item_id}#{number}"}))
    return tuple(unique)
