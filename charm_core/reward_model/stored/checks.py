"""Rules over stored files: what would make a reward model unusable, found without reading a weight.

Loading obeys the same rules as the pre-flight: an error here is an error there.
"""

from collections.abc import Iterator
from itertools import chain
from typing import Any

from charm_core.errors import ModelError
from charm_core.reward_model.findings import Finding
from charm_core.reward_model.heads.catalogue import KINDS
from charm_core.reward_model.spec import RewardModelSpec
from charm_core.reward_model.stored.files import StoredModel
from charm_core.reward_model.stored.kinds import HEAD_NAMES, ModelFiles

CLASSIFIER_CLASS = "AutoModelForSequenceClassification"
ADAPTER_PREFIX = "base_model.model."
"""How PEFT begins the names of an adapter's tensors."""


def check_files(files: ModelFiles, spec: RewardModelSpec) -> None:
    """Raise ModelError for the first thing that makes the files unusable."""
    for finding in stored_findings(files, spec):
        if finding.severity == "error":
            raise ModelError(finding.message)


def stored_findings(files: ModelFiles, spec: RewardModelSpec) -> Iterator[Finding]:
    """All findings of the rules below."""
    models = [model for model in (files.model, files.base, files.reference) if model is not None]
    for model in models:
        yield from chain(config_is_there(model), weights_are_safe(model), weights_are_complete(model))
    yield from native_or_trusted(files, spec)
    yield from one_label(files)
    yield from head_is_stored(files, spec)
    yield from same_vocabulary(files)


def config_is_there(model: StoredModel) -> Iterator[Finding]:
    """A model folder has a config.json, an adapter's folder an adapter_config.json."""
    if not model.config and model.adapter is None:
        yield _error(
            "config",
            f"the reward model folder {model.name} has no config.json; is it a Hugging Face model folder?",
        )


def weights_are_safe(model: StoredModel) -> Iterator[Finding]:
    """Weights are in safetensors files; pickled ones are never read."""
    if not model.tensors:
        pickled = (
            f", only {sorted(model.pickles)}, which is never unpickled; convert it to safetensors"
            if model.pickles
            else "; download the model whole"
        )
        yield _error("weights", f"the reward model folder {model.name} has no .safetensors file{pickled}")


def weights_are_complete(model: StoredModel) -> Iterator[Finding]:
    """Every file that the index of the weights names is there."""
    if model.tensors and model.absent:
        yield _error(
            "weights",
            f"the reward model folder {model.name} lacks {len(model.absent)} of its weights files, first {model.absent[0]}; download "
            "the model whole",
        )


def native_or_trusted(files: ModelFiles, spec: RewardModelSpec) -> Iterator[Finding]:
    """The model is one that transformers knows, or one whose own code the user trusts."""
    model = files.backbone
    kind = model.config.get("model_type")
    code = model.config.get("auto_map") or {}
    if not model.config or kind in _native_types(files.kind):
        return
    if not code:
        yield _error(
            "remote-code",
            f"transformers does not know the model type {kind!r} of the reward model {model.name!r} as a "
            f"{KINDS[files.kind].body}; use a version that does, or another reward model",
        )
    elif files.kind != "classifier" or CLASSIFIER_CLASS not in code:
        yield _error(
            "remote-code",
            f"the reward model {model.name!r} (model type {kind!r}) comes with code of its own for {sorted(code)}, which is not what CHARM "
            "scores with; serve it and score through its server, or give scores that exist already",
        )
    elif not spec.trust_remote_code:
        yield _error(
            "remote-code",
            f"the reward model {model.name!r} (model type {kind!r}) runs only with the Python code that comes with it: read "
            f"{code[CLASSIFIER_CLASS]!r} there, then set reward_model.trust_remote_code = true",
        )


def one_label(files: ModelFiles) -> Iterator[Finding]:
    """A classifier has one label: its one score."""
    if files.kind != "classifier" or not files.model.config or not files.model.tensors:
        return
    labels = _labels(files.model)
    if labels != 1 and not _is_causal(files.model):
        yield _error(
            "labels",
            f"the reward model {files.model.name!r} has {labels} labels, but a reward model gives one score: it needs "
            "num_labels=1 in config.json",
        )


def head_is_stored(files: ModelFiles, spec: RewardModelSpec) -> Iterator[Finding]:
    """The layer that gives the score is among the weights; otherwise it would be made up at random."""
    if not files.model.tensors:
        return
    if files.kind == "lora":
        yield from _adapter_has_head(files)
    elif files.kind == "classifier" and not (spec.trust_remote_code and files.model.config.get("auto_map")):
        if not classifier_head(files.model):
            yield _error("head", _no_head(files.model))
    elif files.kind == "gated":
        yield from _objectives_fit(files.model)
    elif (head := KINDS[files.kind].one_row) is not None:
        yield from _head_is_scalar(files.model, head)


def same_vocabulary(files: ModelFiles) -> Iterator[Finding]:
    """A DPO model and its reference read the same token ids."""
    if files.reference is None:
        return
    sizes = [model.config.get("vocab_size") for model in (files.model, files.reference)]
    if None not in sizes and sizes[0] != sizes[1]:
        yield _error(
            "reference",
            f"the DPO model {files.model.name!r} has a vocabulary of {sizes[0]} tokens and its reference {files.reference.name!r} one "
            f"of {sizes[1]}: give the model that DPO training began with as reward_model.reference_model",
        )
    if (files.model.folder, files.model.name) == (files.reference.folder, files.reference.name):
        yield _error(
            "reference",
            f"the DPO model {files.model.name!r} is its own reference, so all scores would be 0: give the model that DPO training "
            "began with as reward_model.reference_model",
        )


def classifier_head(model: StoredModel) -> str | None:
    """The dotted name of a stored classifier head, in an adapter too."""
    stored = {name.removeprefix(ADAPTER_PREFIX) for name in model.tensors}
    return next((name for name in HEAD_NAMES if f"{name}.weight" in stored), None)


def states_labels(model: StoredModel) -> bool:
    """Whether config.json says how many labels there are."""
    return bool(model.config.get("id2label")) or "num_labels" in model.config


def _labels(model: StoredModel) -> int:
    """As config.json states them, else the rows of the stored head; without either, two, as transformers has it."""
    if states_labels(model):
        return len(model.config["id2label"]) if model.config.get("id2label") else int(model.config["num_labels"])
    head = classifier_head(model)
    return model.tensors[f"{head}.weight"].shape[0] if head else 2


def _adapter_has_head(files: ModelFiles) -> Iterator[Finding]:
    if classifier_head(files.model) is not None:
        return
    promised = set((files.model.adapter or {}).get("modules_to_save") or ()) & set(HEAD_NAMES)
    if promised:
        yield _error(
            "head",
            f"the LoRA adapter {files.model.name!r} was trained with a head of its own (modules_to_save has {sorted(promised)}), but "
            "holds none: it was lost when the adapter was saved (as happens under ZeRO-3). Save it again with its head",
        )
    elif files.base is None or classifier_head(files.base) is None:
        yield _error(
            "head",
            f"the LoRA adapter {files.model.name!r} holds no head, nor does its base model {files.backbone.name!r}: none of "
            f"{_weights_of_heads()} is stored, so the head would be random. Save the adapter with modules_to_save=['score']",
        )


def _head_is_scalar(model: StoredModel, head: str) -> Iterator[Finding]:
    weights = [tensor for name, tensor in model.tensors.items() if name.startswith(head) and len(tensor.shape) == 2]
    if 1 not in [tensor.shape[0] for tensor in weights]:
        shapes = sorted(tensor.shape for tensor in weights)
        yield _error(
            "head",
            f"the head of the reward model {model.name!r} ({head}*) has layers of the shapes {shapes}, none with one output: it gives no "
            "single score",
        )


def _objectives_fit(model: StoredModel) -> Iterator[Finding]:
    rows = model.tensors["regression_layer.weight"].shape[0]
    gates = [tensor.shape[0] for name, tensor in sorted(model.tensors.items()) if _is_last_gate(name, model)]
    if len(gates) != 1 or rows % gates[0]:
        yield _error(
            "head",
            f"the reward model {model.name!r} has {rows} rewards but a gate of {gates or 'no'} weights: its weights are not complete",
        )


def _is_last_gate(name: str, model: StoredModel) -> bool:
    numbers = [int(other.split(".")[2]) for other in model.tensors if other.startswith("gating.layers.")]
    return bool(numbers) and name == f"gating.layers.{max(numbers)}.weight"


def _no_head(model: StoredModel) -> str:
    advice = "A base model without its head is not a reward model"
    if _is_causal(model):
        advice = (
            "It is a language model; if it was trained with DPO, set reward_model.reference_model to the model that training began "
            "with"
        )
    elif model.config.get("auto_map"):
        advice = (
            "Its config.json names code of its own; if the head is defined there, read that code, then set "
            "reward_model.trust_remote_code = true"
        )
    return f"the reward model {model.name!r} has no head: none of {_weights_of_heads()} is among its weights. {advice}"


def _weights_of_heads() -> str:
    return ", ".join(f"{name}.weight" for name in HEAD_NAMES)


def _is_causal(model: StoredModel) -> bool:
    return any("ForCausalLM" in name for name in model.config.get("architectures") or ())


def _native_types(kind: str) -> Any:
    """Model types that transformers has a class of the right sort for."""
    from transformers.models.auto import modeling_auto

    return {
        "language model": modeling_auto.MODEL_MAPPING_NAMES,
        "sequence classifier": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        "causal language model": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    }[KINDS[kind].body]


def _error(rule: str, message: str) -> Finding:
    return Finding(rule=rule, severity="error", message=message)
