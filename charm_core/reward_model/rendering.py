"""One canonical token sequence per (prompt, response), for scoring and for training.

A tokenizer with a chat template gets the conversation, response included, through that template: the template places its
own special tokens, so nothing is added and a BOS is never doubled. A tokenizer without one but with separator tokens
(BERT and its kin) gets the text pair (prompt, response). Anything else is an error.

What is too long is cut by one rule, *starts survive*:

1. ``max_prompt_characters``, where set, cuts every message of the prompt to its first so many characters.
2. If the whole exceeds ``max_length`` tokens, the response loses its end, but not the tokens that close the sequence.
3. If the response would then keep fewer than ``min_response_tokens`` tokens (or all it has), the prompt's longest message
   loses its end instead, as much as is needed.

A prompt of several messages becomes, for a text pair, ``role: content`` blocks joined by an empty line; a prompt of one
message is its bare content.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from charm_core.errors import ModelError
from charm_core.reward_model.spec import RewardModelSpec

# Some templates write today's date into the prompt, which would make a score depend on the day.
TEMPLATE_DATE = datetime(2024, 7, 26)

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
    if characters_cut and not rendered.prompt_cut:
        return Rendered(
            input_ids=rendered.input_ids,
            token_type_ids=rendered.token_type_ids,
            prompt_cut=True,
            response_cut=rendered.response_cut,
        )
    return rendered


def _render_chat(tokenizer: Any, messages: Sequence[Message], response: str, spec: RewardModelSpec) -> Rendered:
    conversation = [dict(message) for message in messages]
    kept_response, prompt_cut = response, False
    ids = _chat_ids(tokenizer, conversation, kept_response)
    shortest = response[: _characters_of(tokenizer, response, spec.min_response_tokens)]
    while len(ids) > spec.max_length and len(kept_response) > len(shortest):
        kept_response = _without_end(tokenizer, kept_response, len(ids) - spec.max_length, at_least=len(shortest))
        ids = _chat_ids(tokenizer, conversation, kept_response)
    while len(ids) > spec.max_length and any(message["content"] for message in conversation):
        prompt_cut = True
        longest = max(conversation, key=lambda message: len(message["content"]))
        longest["content"] = _without_end(tokenizer, longest["content"], len(ids) - spec.max_length, at_least=0)
        ids = _chat_ids(tokenizer, conversation, kept_response)
    if len(ids) > spec.max_length:
        raise ModelError(
            f"the chat template of {tokenizer.name_or_path!r} with an empty prompt takes {len(ids)} tokens, which is more than "
            f"max_length={spec.max_length} leaves; raise max_length"
        )
    return Rendered(
        input_ids=tuple(ids), token_type_ids=None, prompt_cut=prompt_cut, response_cut=len(kept_response) < len(response)
    )


def _chat_ids(tokenizer: Any, conversation: list[dict[str, str]], response: str) -> list[int]:
    try:
        text = tokenizer.apply_chat_template(
            [*conversation, {"role": "assistant", "content": response}], tokenize=False, strftime_now=TEMPLATE_DATE.strftime
        )
    except Exception as error:
        roles = [message["role"] for message in conversation]
        raise ModelError(
            f"the chat template of {tokenizer.name_or_path!r} refuses a prompt with the roles {roles}: {error}"
        ) from error
    # The template has written the special tokens itself.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _characters_of(tokenizer: Any, text: str, tokens: int) -> int:
    """How many characters the first ``tokens`` tokens of a text span."""
    ends = [end for _, end in tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]]
    return len(text) if tokens >= len(ends) else ends[tokens - 1] if tokens > 0 else 0


def _without_end(tokenizer: Any, text: str, tokens: int, *, at_least: int) -> str:
    """A text without its last ``tokens`` tokens, but with ``at_least`` characters; always shorter than before."""
    count = len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    kept = min(_characters_of(tokenizer, text, count - tokens), len(text) - 1)
    return text[: max(kept, at_least)]


def _render_pair(tokenizer: Any, messages: Sequence[Message], response: str, spec: RewardModelSpec) -> Rendered:
    encoded = tokenizer(joined_prompt(messages), response, add_special_tokens=True, verbose=False)
    owners = encoded.sequence_ids(0)
    tokens = {owner: owners.count(owner) for owner in (0, 1)}
    room = spec.max_length - owners.count(None)
    kept_prompt = min(tokens[0], max(0, room - min(tokens[1], spec.min_response_tokens)))
    kept = {0: kept_prompt, 1: min(tokens[1], room - kept_prompt)}
    chosen = _first_of_each(owners, kept)
    types = encoded["token_type_ids"] if "token_type_ids" in tokenizer.model_input_names else None
    return Rendered(
        input_ids=tuple(encoded["input_ids"][i] for i in chosen),
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
