"""Chat templates: how a conversation becomes tokens, uncut, and where in them the answer begins. No torch."""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Any

from charm_core.errors import ModelError

# Some templates write today's date into the prompt, which would make a score depend on the day.
TEMPLATE_DATE = date(2024, 7, 26)

Message = Mapping[str, str]


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


def template_text(template: str) -> str:
    """The Jinja text of a chat template that is given as text or as a file.

    Raises:
        ModelError: Neither.
    """
    if "{{" in template or "{%" in template:
        return template
    try:
        return Path(template).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ModelError(
            f"chat_template {template!r} is neither Jinja text, which has {{{{ or {{%, nor a file that can be read: {error}"
        ) from error


def chat_ids(
    tokenizer: Any, conversation: Sequence[Message], *, answer_begins: bool = False, day: date = TEMPLATE_DATE
) -> list[int]:
    """The tokens of a whole conversation, uncut.

    Args:
        tokenizer: One with a chat template.
        conversation: Messages, the response among them if there is one.
        answer_begins: Whether the header of an answer follows.
        day: What the template takes for today.

    Raises:
        ModelError: The template refuses the conversation.
    """
    template = fixed_template(tokenizer, day)
    try:
        text = tokenizer.apply_chat_template(
            conversation, chat_template=template, tokenize=False, add_generation_prompt=answer_begins
        )
    except Exception as error:
        roles = [message["role"] for message in conversation]
        raise ModelError(
            f"the chat template of {tokenizer.name_or_path!r} refuses a conversation with the roles {roles}: {error}"
        ) from error
    # The template has written the special tokens itself.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def fixed_template(tokenizer: Any, day: date = TEMPLATE_DATE) -> str:
    """A tokenizer's chat template with its clock stopped at a day, for those who render with it themselves."""
    return _with_fixed_date(tokenizer.get_chat_template(), day)


def response_start(tokenizer: Any, conversation: list[dict[str, str]], ids: Sequence[int]) -> int:
    """Where the response begins: after what the text has in common with its prompt, answer's header included.

    At least 1, because the first token of a text has no probability.
    """
    prompt = chat_ids(tokenizer, conversation, answer_begins=True)
    same = (count for count, (ours, theirs) in enumerate(zip(ids, prompt, strict=False)) if ours != theirs)
    return max(1, next(same, min(len(ids), len(prompt))))


@lru_cache
def _with_fixed_date(template: str, day: date) -> str:
    """The template with its clock stopped at a day."""
    if "strftime_now" not in template:
        return template
    formats = {found[1] for found in re.findall(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)", template)}
    dates = json.dumps({text: day.strftime(text) for text in sorted(formats)})
    macro = f"{{%- macro strftime_now(format) -%}}{{{{ {dates}.get(format, '{day:%Y-%m-%d}') }}}}{{%- endmacro -%}}"
    return macro + template
