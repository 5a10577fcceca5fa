"""All rules, one after the other."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain

from charm_core.errors import ModelError
from charm_core.reward_model.findings import Finding, PreflightReport
from charm_core.reward_model.preflight import numbers, room, task, template, tokens
from charm_core.reward_model.preflight.facts import Facts, Machine, Text, finding
from charm_core.reward_model.pretrained import load_tokenizer, model_limit
from charm_core.reward_model.spec import RewardModelSpec, TrainingConfig
from charm_core.reward_model.stored.checks import stored_findings
from charm_core.reward_model.stored.kinds import ModelFiles, open_files

RULES: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
    tokens.pad_token,
    tokens.ids_have_embeddings,
    tokens.padding_side,
    tokens.tokenizer_as_stored,
    template.one_template,
    template.rendered_as_trained,
    numbers.finite_weights,
    numbers.float16_overflow,
    numbers.attention_kernel,
    task.kind_can_train,
    task.enough_layers,
    room.training_fits,
)
RULES_OF_TEXTS: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
    tokens.bos_doubled,
    tokens.bos_missing,
    template.date_in_template,
    template.override_is_the_models_own,
    template.adapter_template_is_the_bases,
    template.gate_is_found,
    template.response_is_set_apart,
    task.texts_fit,
)
"""Those that need a template that works."""
SEVERITIES = ("error", "warning", "info")


def preflight(
    spec: RewardModelSpec,
    texts: Sequence[Text] = (),
    *,
    texts_in_all: int | None = None,
    training: TrainingConfig | None = None,
    machine: Machine | None = None,
) -> PreflightReport:
    """Look at a reward model and at what is to be done with it, without loading its weights.

    Args:
        spec: The reward model.
        texts: Prompts and responses that it is to score, or a sample of them.
        texts_in_all: How many the sample stands for.
        training: How it is to be fine-tuned, if it is.
        machine: Where, if that is known: then it is judged whether there is memory enough.

    Returns:
        What there is to say, the worst first. A model that cannot be used is an error in it, not an exception.

    Raises:
        ServiceError: The model is on the hub, which does not answer.
    """
    in_all = len(texts) if texts_in_all is None else texts_in_all
    report = PreflightReport(texts=len(texts), texts_in_all=in_all)
    try:
        files = open_files(spec, weights=False)
    except ModelError as error:
        return report.model_copy(update={"findings": (finding("files", "error", str(error)),)})
    found = list(stored_findings(files, spec))
    try:
        facts = _facts(spec, files, texts, in_all)
        facts = replace(facts, training=training, machine=machine)
    except ModelError as error:
        # What keeps a config or tokenizer from being read has mostly been found in the files already.
        if not any(one.severity == "error" for one in found):
            found.append(finding("tokenizer", "error", str(error)))
    else:
        found.extend(_all_findings(facts))
    found.sort(key=lambda one: SEVERITIES.index(one.severity))
    return report.model_copy(update={"kind": files.kind, "findings": tuple(found)})


def _facts(spec: RewardModelSpec, files: ModelFiles, texts: Sequence[Text], in_all: int) -> Facts:
    tokenizer = load_tokenizer(files, spec, in_haste=True)
    config = files.backbone.config.get("text_config", files.backbone.config)
    return Facts(
        spec=spec.model_copy(update={"kind": files.kind}),
        files=files,
        config=config,
        tokenizer=tokenizer,
        limit=model_limit(config.get("max_position_embeddings"), tokenizer),
        texts=tuple(texts),
        texts_in_all=in_all,
    )


def _all_findings(facts: Facts) -> Iterator[Finding]:
    yield from chain.from_iterable(rule(facts) for rule in RULES)
    broken = list(template.can_render(facts))
    yield from broken
    if not broken:
        yield from chain.from_iterable(rule(facts) for rule in RULES_OF_TEXTS)
