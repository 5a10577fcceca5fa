"""One canonical token sequence per (prompt, response), for scoring and for training.

A tokenizer with a chat template gets the conversation, response included, through that template: the template places its
own special tokens, so nothing is added and a BOS is never doubled. A tokenizer without one but with separator tokens
(BERT and its kin) gets the text pair (prompt, response). Anything else is an error.

What is too long is cut by one rule, *starts survive*:

1. ``max_prompt_characters``, where set, cuts every message of the prompt to its first so many characters.
2. If the whole exceeds ``max_length`` tokens, the response loses its end, but not the tokens that close the sequence.
3. If the response would then keep fewer than ``min_response_tokens`` tokens (or all it has), the prompt's longest message
   loses its end instead, as much as is needed; only beside an empty prompt does the response keep still fewer.

A prompt of several messages becomes, for a text pair, ``role: content`` blocks joined by an empty line; a prompt of one
message is its bare content.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import lru_cache
from typing import Any

from charm_core.errors import ModelError
from charm_core.reward_model.spec import RewardModelSpec

# Some templates write today's date into the prompt, which would make a score depend on the day.
TEMPLATE_DATE = date(2024, 7, 26)

Message = Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendered:
    """The token ids of one (prompt, response) and what was cut from it."""

    input_ids: tuple[int, ...]
    token_type_ids: tuple[int, ...] | None
    prompt_cut: bool
    response_cut: bool


def check_can_render(tokenizer: Any) -> None:
    """Raise ModelError unless the tokenizer has a chat template or separates text pairs."""
    if not uses_chat_template(tokenizer) and (tokenizer.sep_token is None or tokenizer.cls_token is None):
        raise ModelError(
            f"the tokenizer of {tokenizer.name_or_path!r} has neither a chat template nor separator tokens for text pairs, so how "
            "the reward model wants its prompt and response is unknown; put its chat_template.jinja into the folder"
        )


def uses_chat_template(tokenizer: Any) -> bool:
    """Whether conversations go through the tokenizer's own template."""
    return tokenizer.chat_template is not None


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
    limit = spec.max_prompt_characters
    shortened = [{"role": m["role"], "content": m["content"][:limit]} for m in messages]
    characters_cut = any(len(m["content"]) > len(s["content"]) for m, s in zip(messages, shortened, strict=True))
    render_as = _render_chat if uses_chat_template(tokenizer) else _render_pair
    rendered = render_as(tokenizer, shortened, response, spec)
    return replace(rendered, prompt_cut=True) if characters_cut else rendered


def _render_chat(tokenizer: Any, messages: Sequence[Message], response: str, spec: RewardModelSpec) -> Rendered:
    conversation = [dict(message) for message in messages]
    answer = {"role": "assistant", "content": response}
    least = _characters_of(tokenizer, response, spec.min_response_tokens)
    excess = _shorten(tokenizer, [*conversation, answer], [answer], least, spec.max_length)
    if excess:
        excess = _shorten(tokenizer, [*conversation, answer], conversation, 0, spec.max_length)
    if excess:
        excess = _shorten(tokenizer, [*conversation, answer], [answer], 0, spec.max_length)
    if excess:
        raise ModelError(
            f"the chat template of {tokenizer.name_or_path!r} takes {spec.max_length + excess} tokens by itself, more than "
            f"max_length={spec.max_length}; raise max_length"
        )
    return Rendered(
        input_ids=tuple(_chat_ids(tokenizer, [*conversation, answer])),
        token_type_ids=None,
        prompt_cut=any(new["content"] != old["content"] for new, old in zip(conversation, messages, strict=True)),
        response_cut=answer["content"] != response,
    )


def _shorten(
    tokenizer: Any, whole: list[dict[str, str]], may_shrink: list[dict[str, str]], least: int, max_length: int
) -> int:
    """Take from the end of the longest shrinkable message until the whole fits or all have ``least`` characters.

    Cutting text instead of tokens keeps the result a regular tokenisation; its length is known only after doing it, hence
    the loop. Returns by how many tokens the whole is still too long.
    """
    excess = len(_chat_ids(tokenizer, whole)) - max_length
    while excess > 0:
        longest = max(may_shrink, key=lambda message: len(message["content"]))
        if len(longest["content"]) <= least:
            return excess
        longest["content"] = _without_end(tokenizer, longest["content"], excess, at_least=least)
        excess = len(_chat_ids(tokenizer, whole)) - max_length
    return 0


def _chat_ids(tokenizer: Any, conversation: list[dict[str, str]]) -> list[int]:
    template = _with_fixed_date(tokenizer.get_chat_template())
    try:
        text = tokenizer.apply_chat_template(conversation, chat_template=template, tokenize=False)
    except Exception as error:
        roles = [message["role"] for message in conversation]
        raise ModelError(
            f"the chat template of {tokenizer.name_or_path!r} refuses a conversation with the roles {roles}: {error}"
        ) from error
    # The template has written the special tokens itself.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


@lru_cache
def _with_fixed_date(template: str) -> str:
    """The template with its clock stopped at ``TEMPLATE_DATE``."""
    if "strftime_now" not in template:
        return template
    formats = {found[1] for found in re.findall(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)", template)}
    dates = json.dumps({text: TEMPLATE_DATE.strftime(text) for text in sorted(formats)})
    macro = f"{{%- macro strftime_now(format) -%}}{{{{ {dates}.get(format, '{TEMPLATE_DATE:%Y-%m-%d}') }}}}{{%- endmacro -%}}"
    return macro + template


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


def _render_pair(tokenizer: Any, messages: Sequence[Message], response: str, spec: RewardModelSpec) -> Rendered:
    # As lists: given as plain strings, an empty response would turn the pair into the prompt alone.
    encoded = tokenizer([joined_prompt(messages)], [response], add_special_tokens=True, verbose=False)
    owners = encoded.sequence_ids(0)
    tokens = {owner: owners.count(owner) for owner in (0, 1)}
    room = spec.max_length - owners.count(None)
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


def joined_prompt(messages: Sequence[Message]) -> str:
    """The prompt as one text: a single message bare, several as ``role: content`` blocks joined by an empty line."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)
