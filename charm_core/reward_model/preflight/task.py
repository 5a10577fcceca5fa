"""Rules about what is to be done: the texts that will be scored, and the fine-tuning."""

from collections.abc import Iterator

from charm_core.errors import ModelError
from charm_core.reward_model.findings import Finding
from charm_core.reward_model.heads.catalogue import KINDS
from charm_core.reward_model.preflight.facts import Facts, finding
from charm_core.reward_model.rendering import uncut_length


def texts_fit(facts: Facts) -> Iterator[Finding]:
    """Prompts and responses are within the limit, and the template takes them."""
    lengths: list[int] = []
    for messages, response in facts.texts:
        try:
            lengths.append(uncut_length(facts.tokenizer, messages, response, facts.spec))
        except ModelError as error:
            yield finding(
                "texts",
                "error",
                f"{error}. Leave such prompts out, or give a template that takes them as reward_model.chat_template",
            )
            return
    long = [length for length in lengths if length > facts.max_length]
    if long:
        yield finding("length", "warning", _too_long(facts, len(lengths), long))


def _too_long(facts: Facts, looked_at: int, long: list[int]) -> str:
    of = f"{looked_at:,} texts"
    if facts.texts_in_all > looked_at:
        of = f"{looked_at:,} sampled texts (of {facts.texts_in_all:,}; about {len(long) / looked_at:.0%} of all)"
    lost = (
        "their prompts lose their beginning"
        if facts.spec.truncation_side == "left"
        else f"their responses lose their end, or their prompts where fewer than {facts.spec.min_response_tokens} tokens of the response "
        "would be left"
    )
    advice = (
        f"raise reward_model.max_length (the model takes {facts.limit:,})"
        if facts.limit > facts.max_length
        else "the model takes no more, so take shorter texts, or set reward_model.max_prompt_characters"
    )
    return (
        f"{len(long):,} of {of} are longer than {facts.max_length:,} tokens, the longest {max(long):,}: {lost}. If that "
        f"matters, {advice}"
    )


def kind_can_train(facts: Facts) -> Iterator[Finding]:
    """What is to be fine-tuned can be."""
    if facts.training is not None and not KINDS[facts.files.kind].trainable:
        trainable = ", ".join(name for name, kind in KINDS.items() if kind.trainable)
        yield finding(
            "training",
            "error",
            f"{facts.files.model.name!r} is of kind {facts.files.kind!r}, which CHARM scores with but cannot fine-tune (those it can "
            f"are {trainable}): take another reward model for a calibration, or audit this one",
        )


def enough_layers(facts: Facts) -> Iterator[Finding]:
    """There are as many layers as are to be trained."""
    wanted = facts.training.trainable_layers if facts.training is not None else None
    layers = facts.config.get("num_hidden_layers")
    if wanted is not None and layers is not None and wanted > layers:
        yield finding(
            "training",
            "error",
            f"training.trainable_layers is {wanted}, but {facts.files.backbone.name!r} has {layers} layers: set it to at most that",
        )
