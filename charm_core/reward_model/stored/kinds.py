"""What kind of reward model some files are, told from what is stored; the kinds are those of ``heads/catalogue.py``."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from charm_core.errors import ModelError
from charm_core.reward_model.heads.catalogue import KINDS
from charm_core.reward_model.spec import RewardModelSpec
from charm_core.reward_model.stored.files import COMMIT, StoredModel, is_folder, open_model

HEAD_NAMES = ("score", "classifier", "classifier.out_proj")
"""Where Hugging Face classifiers keep the layer whose output is the score."""


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """All files that decide a reward model's scores."""

    kind: str
    """One of ``KINDS``."""
    model: StoredModel
    base: StoredModel | None = None
    """What a LoRA adapter is applied to."""
    reference: StoredModel | None = None
    """What a DPO model's probabilities are compared with."""

    @property
    def backbone(self) -> StoredModel:
        """The model whose config.json and body count."""
        return self.base or self.model

    @property
    def tokenizer(self) -> StoredModel:
        """Where the tokenizer lies: with an adapter if it has one."""
        return self.model if self.base is None or self.model.has_tokenizer else self.base


def open_files(spec: RewardModelSpec, *, weights: bool = True) -> ModelFiles:
    """Find a reward model's files and tell its kind.

    Args:
        spec: The reward model.
        weights: Whether weights on the hub are wanted here, or only what their headers say.

    Raises:
        ModelError: A file is missing or damaged, or the files are not those of the kind asked for.
        ServiceError: The hub does not answer.
    """
    code = spec.trust_remote_code
    model = open_model(spec.path, spec.revision, weights=weights, code=code)
    kind = find_kind(spec, model)
    base = reference = None
    if kind == "lora":
        path, revision = base_of(spec, model.adapter or {})
        base = open_model(path, revision, weights=weights, code=code)
    if kind == "dpo" and spec.reference_model is not None:
        reference = open_model(spec.reference_model, spec.reference_revision, weights=weights, code=code)
    return ModelFiles(kind=kind, model=model, base=base, reference=reference)


def find_kind(spec: RewardModelSpec, model: StoredModel) -> str:
    """The kind of a model's files.

    Raises:
        ModelError: The spec asks for another one, or has settings that contradict the files.
    """
    found = _kind_of_files(spec, model)
    if spec.kind not in ("auto", found):
        raise ModelError(
            f"the files of the reward model {model.name!r} are those of kind {found!r}, not {spec.kind!r}: "
            "set reward_model.kind to 'auto', or correct reward_model.path"
        )
    if spec.base_model is not None and found != "lora":
        raise ModelError(
            f"base_model is set, but {model.name!r} has no adapter_config.json, so it is not a LoRA adapter: leave base_model out, or "
            "correct reward_model.path"
        )
    return found


def _kind_of_files(spec: RewardModelSpec, model: StoredModel) -> str:
    if model.adapter is not None:
        if spec.reference_model is not None:
            raise ModelError(
                f"the DPO model {model.name!r} is a LoRA adapter: merge it into its base model and give that folder"
            )
        return "lora"
    if spec.reference_model is not None:
        return "dpo"
    told = (name for name, kind in KINDS.items() if kind.tensors and all(map(model.has, kind.tensors)))
    return next(told, "classifier")


def base_of(spec: RewardModelSpec, adapter: Mapping[str, Any]) -> tuple[str, str | None]:
    """Path and revision of a LoRA adapter's base model: those of the spec, else those that the adapter names.

    Raises:
        ModelError: Neither names one, it is not to be found, or it is on the hub without a commit hash.
    """
    named = adapter.get("base_model_name_or_path")
    path = spec.base_model or named
    if not path:
        raise ModelError(
            f"the LoRA adapter {spec.path!r} does not say what its base model is: set reward_model.base_model"
        )
    try:
        in_folder = is_folder(path)
    except ModelError as error:
        raise ModelError(
            f"the base model {path!r} of the LoRA adapter {spec.path!r} is not on this machine: set reward_model.base_model to its "
            "folder or hub id"
        ) from error
    revision = spec.base_revision or (adapter.get("revision") if path == named else None)
    if not in_folder and not COMMIT.fullmatch(revision or ""):
        raise ModelError(
            f"the base model {path!r} of the LoRA adapter {spec.path!r} is a hub id: set reward_model.base_revision to the commit "
            f"hash of the version that the adapter was trained on, not {revision!r}"
        )
    return path, revision
