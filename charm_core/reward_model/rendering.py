"""One canonical token sequence per (prompt, response), for scoring and for training.

A tokenizer with a chat template gets the conversation, response included, through that template: the template places its
own special tokens, so nothing is added and a BOS is never doubled. A tokenizer without one but with separator tokens
(BERT and its kin) gets the text pair (prompt, response). Anything else is an error.

What is too long is cut by one of two rules. *Starts survive* (``truncation_side`` right):

1. ``max_prompt_characters``, where set, cuts every message of the prompt to its first so many characters.
2. If the whole exceeds ``max_length`` tokens, the response loses its end, but not the tokens that close the sequence.
3. If the response would then keep fewer than ``min_response_tokens`` tokens (or all it has), the prompt's longest message
   loses its end instead, as much as is needed; only beside an empty prompt does the response keep still fewer.

*Ends survive* (left):

1. ``max_prompt_characters`` cuts every message of the prompt to its last so many characters.
2. If the whole exceeds ``max_length`` tokens, the prompt loses its beginning: its messages, from the first on, lose
   theirs, while system messages stay.
3. If nothing else of the prompt is left, the response loses its beginning, and system messages last of all.

A prompt of several messages becomes, for a text pair, ``role: content`` blocks joined by an empty line; a prompt of one
message is its bare content. ``system_prompt`` is a message of its own before prompts that have no system message.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from charm_core.errors import ModelError
from charm_core.reward_model.heads.catalogue import KINDS
from charm_core.reward_model.spec import RewardModelSpec
from charm_core.reward_model.templates import Message, chat_ids, check_can_render, response_start, uses_chat_template


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendered:
    """The token ids of one (prompt, response) and what was cut from it."""

    input_ids: tuple[int, ...]
    token_type_ids: tuple[int, ...] | None
    prompt_cut: bool
    response_cut: bool
    response_start: int | None = None
    """Position of the response's first token, for kinds that need it (dpo)."""


def render(tokenizer: Any, messages: Sequence[Message], response: str, spec: RewardModelSpec) -> Rendered:
    """Turn one prompt and response into tokens.

    Args:
        tokenizer: A fast Hugging Face tokenizer.
        messages: The conversation up to the response, each with ``role`` and ``content``.
        response: The answer to be scored; may be empty.
        spec: Limits; ``spec.max_length`` must not exceed what the model can take.

    Returns:
        At most ``spec.max_length`` ids.

    Raises:
        ModelError: The tokenizer cannot render conversations, its template refuses this one, or the template alone
            exceeds ``max_length``.
    """
    check_can_render(tokenizer)
    messages = with_system_prompt(messages, spec)
    shortened = _within_characters(messages, spec)
    characters_cut = any(len(m["content"]) > len(s["content"]) for m, s in zip(messages, shortened, strict=True))
    render_as = _render_chat if uses_chat_template(tokenizer) else _render_pair
    rendered = render_as(tokenizer, shortened, response, spec)
    return replace(rendered, prompt_cut=True) if characters_cut else rendered


def uncut_length(tokenizer: Any, messages: Sequence[Message], response: str, spec: RewardModelSpec) -> int:
    """Tokens that a prompt and response would have if ``max_length`` were no matter.

    Raises:
        ModelError: The tokenizer cannot render conversations, or its template refuses this one.
    """
    check_can_render(tokenizer)
    shortened = _within_characters(with_system_prompt(messages, spec), spec)
    if uses_chat_template(tokenizer):
        return len(chat_ids(tokenizer, [*shortened, {"role": "assistant", "content": response}]))
    return len(tokenizer([joined_prompt(shortened)], [response], verbose=False)["input_ids"][0])


def with_system_prompt(messages: Sequence[Message], spec: RewardModelSpec) -> Sequence[Message]:
    """The prompt with ``spec.system_prompt`` before it, unless it has a system message."""
    if spec.system_prompt is None or any(message["role"] == "system" for message in messages):
        return messages
    return [{"role": "system", "content": spec.system_prompt}, *messages]


def _within_characters(messages: Sequence[Message], spec: RewardModelSpec) -> list[dict[str, str]]:
    """The messages, cut to ``max_prompt_characters``."""
    limit = spec.max_prompt_characters
    kept = slice(limit) if limit is None or spec.truncation_side == "right" else slice(-limit, None)
    return [{"role": message["role"], "content": message["content"][kept]} for message in messages]


def _render_chat(tokenizer: Any, messages: Sequence[Message], response: str, spec: RewardModelSpec) -> Rendered:
    conversation = [dict(message) for message in messages]
    answer = {"role": "assistant", "content": response}
    excess = 0
    for may_shrink, least in _in_turn(tokenizer, conversation, answer, spec):
        excess = _shorten(tokenizer, [*conversation, answer], may_shrink, least, spec)
        if not excess:
            break
    if excess:
        raise ModelError(
            f"the chat template of {tokenizer.name_or_path!r} takes {spec.max_length + excess} tokens by itself, more than "
            f"max_length={spec.max_length}; raise max_length"
        )
    ids = chat_ids(tokenizer, [*conversation, answer])
    start_matters = spec.kind != "auto" and KINDS[spec.kind].needs_response_start
    return Rendered(
        input_ids=tuple(ids),
        token_type_ids=None,
        prompt_cut=any(new["content"] != old["content"] for new, old in zip(conversation, messages, strict=True)),
        response_cut=answer["content"] != response,
        response_start=response_start(tokenizer, conversation, ids) if start_matters else None,
    )


def _in_turn(
    tokenizer: Any, conversation: list[dict[str, str]], answer: dict[str, str], spec: RewardModelSpec
) -> list[tuple[list[dict[str, str]], int]]:
    """Which messages may shrink, one group after the other, and to how many characters."""
    if spec.truncation_side == "left":
        system = [message for message in conversation if message["role"] == "system"]
        others = [message for message in conversation if message["role"] != "system"]
        return [([message], 0) for message in (*others, answer, *system)]
    least = _characters_of(tokenizer, answer["content"], spec.min_response_tokens)
    return [([answer], least), (conversation, 0), ([answer], 0)]


def _shorten(
    tokenizer: Any,
    whole: list[dict[str, str]],
    may_shrink: list[dict[str, str]],
    least: int,
    spec: RewardModelSpec,
) -> int:
    """Cut the longest shrinkable message until the whole fits or all have ``least`` characters.

    Cutting text instead of tokens keeps the result a regular tokenisation; its length is known only after doing it, hence
    the loop. Returns by how many tokens the whole is still too long.
    """
    excess = len(chat_ids(tokenizer, whole)) - spec.max_length
    while excess > 0:
        longest = max(may_shrink, key=lambda message: len(message["content"]))
        if len(longest["content"]) <= least:
            return excess
        if spec.truncation_side == "left":
            longest["content"] = _without_start(tokenizer, longest["content"], excess)
        else:
            longest["content"] = _without_end(tokenizer, longest["content"], excess, at_least=least)
        excess = len(chat_ids(tokenizer, whole)) - spec.max_length
    return 0


def _characters_of(tokenizer: Any, text: str, tokens: int) -> int:
    """How many characters the first ``tokens`` tokens of a text span."""
    ends = [
        end
        for _, end in tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)[
            "offset_mapping"
        ]
    ]
    return len(text) if tokens >= len(ends) else ends[tokens - 1] if tokens > 0 else 0


def _without_end(tokenizer: Any, text: str, tokens: int, *, at_least: int) -> str:
    """A text without its last ``tokens`` tokens, but with ``at_least`` characters; always shorter than before."""
    count = len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    kept = min(_characters_of(tokenizer, text, count - tokens), len(text) - 1)
    return text[: max(kept, at_least)]


def _without_start(tokenizer: Any, text: str, tokens: int) -> str:
    """A text without its first ``tokens`` tokens; always shorter than before."""
    return text[max(1, _characters_of(tokenizer, text, tokens)) :]


def _render_pair(tokenizer: Any, messages: Sequence[Message], response: str, spec: RewardModelSpec) -> Rendered:
    # As lists: given as plain strings, an empty response would turn the pair into the prompt alone.
    encoded = tokenizer([joined_prompt(messages)], [response], add_special_tokens=True, verbose=False)
    owners = encoded.sequence_ids(0)
    tokens = {owner: owners.count(owner) for owner in (0, 1)}
    room = spec.max_length - owners.count(None)
    if spec.truncation_side == "left":
        kept_response = min(tokens[1], room)
        kept = {0: min(tokens[0], room - kept_response), 1: kept_response}
        chosen = _last_of_each(owners, kept)
    else:
        kept_prompt = min(tokens[0], max(0, room - min(tokens[1], spec.min_response_tokens)))
        kept = {0: kept_prompt, 1: min(tokens[1], room - kept_prompt)}
        chosen = _first_of_each(owners, kept)
    types = encoded["token_type_ids"][0] if "token_type_ids" in tokenizer.model_input_names else None
    return Rendered(
        input_ids=tuple(encoded["input_ids"][0][i] for i in chosen),
        token_type_ids=None if types is None else tuple(types[i] for i in chosen),
        prompt_cut=kept[0] < tokens[0],
        response_cut=kept[1] < tokens[1],
    )


def _first_of_each(owners: Sequence[int | None], kept: Mapping[int, int]) -> list[int]:
    """Positions of all special tokens and of the first ``kept[owner]`` tokens of each owner."""
    positions, seen = [], {0: 0, 1: 0}
    for position, owner in enumerate(owners):
        if owner is not None:
            seen[owner] += 1
            if seen[owner] > kept[owner]:
                continue
        positions.append(position)
    return positions


def _last_of_each(owners: Sequence[int | None], kept: Mapping[int, int]) -> list[int]:
    """Positions of all special tokens and of the last ``kept[owner]`` tokens of each owner."""
    length = len(owners)
    return [length - 1 - position for position in reversed(_first_of_each(owners[::-1], kept))]


def joined_prompt(messages: Sequence[Message]) -> str:
    """The prompt as one text: a single message bare, several as ``role: content`` blocks joined by an empty line."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)
