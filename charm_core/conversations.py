"""Conversations: the messages up to the response of a policy model."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Message = dict[str, str]

_ROLES = ("system", "user", "assistant")
_KEY_BYTES = 16


class NoPromptError(Exception):
    """A row holds no prompt; its message is the reason. It is counted and goes no further."""


def as_messages(value: Any) -> list[Message]:
    """A prompt as a list of messages: a text is one message of the user.

    Raises:
        NoPromptError: It is empty, or not a text, a message or a list of messages.
    """
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if isinstance(value, Mapping):
        value = [value]
    if not value:
        raise NoPromptError("no prompt")
    if not isinstance(value, Sequence):
        raise NoPromptError(f"the prompt is neither text nor messages but {type(value).__name__}")
    return [_message(part) for part in value]


def check_conversation(messages: Sequence[Mapping[str, str]]) -> str | None:
    """Why a policy model cannot be asked this, or None if it can.

    A conversation is an optional system message and then turns of user and assistant, the user's first and last.
    """
    roles = [message["role"] for message in messages]
    unknown = [role for role in roles if role not in _ROLES]
    if unknown:
        return f"a role other than {', '.join(_ROLES)}: {unknown[0]!r}"
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns:
        return "no message of the user"
    if turns[-1] != "user":
        return f"the last message is the {turns[-1]}'s, not the user's"
    if any(role != _ROLES[1 + place % 2] for place, role in enumerate(turns)):
        return "user and assistant do not take turns"
    if not messages[-1]["content"].strip():
        return "the last message is empty"
    return None if all(_is_unicode(message["content"]) for message in messages) else "half a character in the text"


def common_beginning(one: Sequence[Message], other: Sequence[Message]) -> list[Message]:
    """What two conversations have in common, up to the last message of the user in it.

    Raises:
        NoPromptError: Nothing.
    """
    same = list(_equal_messages(one, other))
    while same and same[-1]["role"] != "user":
        same.pop()
    if not same:
        raise NoPromptError("chosen and rejected do not begin with the same message of the user")
    return same


def opening(messages: Sequence[Message]) -> list[Message]:
    """A conversation up to the first message of the user."""
    for place, message in enumerate(messages):
        if message["role"] == "user":
            return list(messages[: place + 1])
    return list(messages)


def layout_key(messages: Sequence[Mapping[str, str]]) -> str:
    """A digest that two conversations share if they differ in case and white space only."""
    digest = hashlib.blake2b(digest_size=_KEY_BYTES)
    for message in messages:
        for part in (message["role"], message["content"]):
            digest.update(" ".join(part.casefold().split()).encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def users_text(messages: Sequence[Mapping[str, str]]) -> str:
    """What the user says in a conversation: the text that is held against benchmarks."""
    return "\n".join(message["content"] for message in messages if message["role"] == "user")


def _message(part: Any) -> Message:
    if not isinstance(part, Mapping) or "role" not in part or "content" not in part:
        raise NoPromptError("a message lacks its role or content")
    if not isinstance(part["role"], str) or not isinstance(part["content"], str):
        raise NoPromptError("a message's role or content is not text")
    return {"role": part["role"], "content": part["content"]}


def _is_unicode(text: str) -> bool:
    """JSON can hold half of a pair of surrogates, which no other format can."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _equal_messages(one: Sequence[Message], other: Sequence[Message]) -> Iterator[Message]:
    for mine, theirs in zip(one, other, strict=False):
        if mine != theirs:
            return
        yield mine
