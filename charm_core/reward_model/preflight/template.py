"""Rules about the chat template: does it work, is it the one that the model was trained with."""

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from charm_core.errors import ModelError
from charm_core.reward_model.findings import Finding
from charm_core.reward_model.heads.catalogue import KINDS
from charm_core.reward_model.preflight.facts import ANSWER, Facts, finding, own_template, stored_templates
from charm_core.reward_model.stored.files import read_json
from charm_core.reward_model.stored.gates import answer_header
from charm_core.reward_model.stored.training_record import FIELDS, RECORD
from charm_core.reward_model.templates import TEMPLATE_DATE, chat_ids, check_can_render


def can_render(facts: Facts) -> Iterator[Finding]:
    """There is a way to render conversations, and it takes the system prompt if there is one."""
    try:
        check_can_render(facts.tokenizer)
        if facts.renders_chats:
            _ = facts.example_ids
    except ModelError as error:
        advice = "; leave reward_model.system_prompt out" if facts.spec.system_prompt is not None else ""
        yield finding("template", "error", f"{error}{advice}")


def date_in_template(facts: Facts) -> Iterator[Finding]:
    """The template does not write today's date."""
    if not facts.renders_chats:
        return
    later = chat_ids(facts.tokenizer, facts.example, day=TEMPLATE_DATE + timedelta(days=137))
    if later != facts.example_ids:
        yield finding(
            "template-date",
            "info",
            f"the chat template writes the day's date into every text. CHARM writes {TEMPLATE_DATE:%d %B %Y} on every day: its scores do "
            "not change from day to day. Scores from other tools do, so do not compare them with these to the last digit",
        )


def one_template(facts: Facts) -> Iterator[Finding]:
    """A folder does not hold two chat templates that differ."""
    stored = stored_templates(facts.files.tokenizer)
    if facts.spec.chat_template is None and len(set(stored.values())) > 1:
        used, *others = stored
        yield finding(
            "two-templates",
            "warning",
            f"{facts.files.tokenizer.name!r} holds two chat templates that differ, in {used} and {' and '.join(others)}. The one in {used} "
            "is used; older tools use the other. Find out which one the model was trained with, and give it as reward_model.chat_template",
        )


def override_is_the_models_own(facts: Facts) -> Iterator[Finding]:
    """A template given in the settings does not replace another one that came with the model."""
    own = own_template(facts.files.tokenizer)
    if facts.spec.chat_template is None or own is None or own.strip() == facts.tokenizer.chat_template.strip():
        return
    if _ids_under(facts, own) != facts.example_ids:
        yield finding(
            "template-override",
            "warning",
            f"reward_model.chat_template replaces the template that came with {facts.files.tokenizer.name!r}, and texts become "
            "other tokens. That is right only if the model was not trained with the template "
            "stored beside it; otherwise leave the setting out",
        )


def adapter_template_is_the_bases(facts: Facts) -> Iterator[Finding]:
    """A LoRA adapter and its base model render texts alike."""
    if facts.files.base is None or facts.spec.chat_template is not None or not facts.files.model.has_tokenizer:
        return
    own, base = own_template(facts.files.model), own_template(facts.files.base)
    if base is None or own == base or not facts.renders_chats or _ids_under(facts, base) == facts.example_ids:
        return
    yield finding(
        "adapter-template",
        "warning",
        f"the tokenizer of the LoRA adapter {facts.files.model.name!r} has another chat template than its base model "
        f"{facts.files.base.name!r}. The adapter's is used; if it was trained with the base model's, give that as "
        "reward_model.chat_template",
    )


def rendered_as_trained(facts: Facts) -> Iterator[Finding]:
    """A model that CHARM fine-tuned is scored with the rendering it was trained with."""
    record = read_json(facts.files.model.folder / RECORD)
    if record is None:
        return
    for name in FIELDS:
        trained = record.get(name, type(facts.spec).model_fields[name].default)
        if trained != getattr(facts.spec, name):
            yield finding(
                "rendering",
                "warning",
                f"{facts.files.model.name!r} was fine-tuned with {name}={trained!r}, but is to be scored with "
                f"{name}={getattr(facts.spec, name)!r}: set reward_model.{name} to what it was trained with",
            )


def gate_is_found(facts: Facts) -> Iterator[Finding]:
    """The template writes the tokens at which a gated model reads the prompt."""
    if facts.files.kind != "gated":
        return
    try:
        header = answer_header(facts.files.model, facts.tokenizer)
    except ModelError as error:
        yield finding("gate", "error", str(error))
        return
    if not facts.renders_chats or not _contains(facts.example_ids, header):
        yield finding(
            "gate",
            "error",
            f"the gate of {facts.files.model.name!r} reads the prompt where the tokens {header} begin the answer, but the chat template "
            "does not write them: give the template that the model was trained with as reward_model.chat_template",
        )


def response_is_set_apart(facts: Facts) -> Iterator[Finding]:
    """Where it matters: the tokens of the prompt with the answer's header are those that the whole text begins with."""
    if not KINDS[facts.files.kind].needs_response_start:
        return
    if not facts.renders_chats:
        yield finding(
            "response-start",
            "error",
            f"the reward model {facts.files.model.name!r} has no chat template, so which tokens are the response's is unknown: give the "
            "one that it was trained with as reward_model.chat_template",
        )
        return
    prompt = chat_ids(facts.tokenizer, facts.example[:-1], answer_begins=True)
    if facts.example_ids[: len(prompt)] != prompt:
        yield finding(
            "response-start",
            "warning",
            f"the chat template of {facts.files.model.name!r} writes a prompt that awaits its answer otherwise than a prompt with its "
            f"answer ({ANSWER['content']!r}, say). All tokens from the first difference on count as the response's; give a template "
            "whose add_generation_prompt adds the header of the answer and nothing else as reward_model.chat_template",
        )


def _ids_under(facts: Facts, template: str) -> Any:
    """The example's tokens under another template; none if that refuses it."""
    tokenizer = facts.tokenizer
    before = tokenizer.chat_template
    try:
        tokenizer.chat_template = template
        return chat_ids(tokenizer, facts.example)
    except ModelError:
        return None
    finally:
        tokenizer.chat_template = before


def _contains(ids: list[int], part: list[int]) -> bool:
    return any(ids[start : start + len(part)] == part for start in range(len(ids) - len(part) + 1))
