"""LoRA adapters on a base model, merged into it: what comes out is a sequence classifier like any other.

Any PEFT adapter of a sequence classifier whose folder has ``adapter_config.json`` and ``adapter_model.safetensors``. The
head must be stored: PEFT keeps it in the adapter as ``modules_to_save``; where the base model is a reward model itself, its
own head counts. The adapter's tokenizer is used if it has one.
"""

import warnings
from typing import Any

import torch

from charm_core.errors import ModelError
from charm_core.reward_model.heads.backbone import check_nothing_is_made_up
from charm_core.reward_model.heads.classifier import ClassifierNetwork, load_classifier
from charm_core.reward_model.spec import RewardModelSpec
from charm_core.reward_model.stored.checks import ADAPTER_PREFIX
from charm_core.reward_model.stored.kinds import ModelFiles


def load(
    files: ModelFiles,
    spec: RewardModelSpec,
    dtype: torch.dtype,
    tokenizer: Any,  # noqa: ARG001 - of no use here
) -> ClassifierNetwork:
    """Load the base model and merge the adapter into it.

    Raises:
        ModelError: Weights cannot be read or are missing, or the adapter does not fit.
    """
    from peft import PeftModel

    adapter = files.model
    classifier, report = load_classifier(files.backbone, spec, dtype, num_labels=1)
    in_adapter = {name.removeprefix(ADAPTER_PREFIX) for name in adapter.tensors}
    check_nothing_is_made_up(report, files.backbone, allowed=in_adapter)
    try:
        with warnings.catch_warnings():
            # PEFT 0.21 asks transformers 5.23 for something by its old name.
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
            merged = PeftModel.from_pretrained(classifier, str(adapter.folder)).merge_and_unload()
    except Exception as error:
        raise ModelError(
            f"the LoRA adapter {adapter.name!r} cannot be merged into {files.backbone.name!r}: {str(error)[:300]}; is that the "
            "base model that it was trained on? If not, set reward_model.base_model"
        ) from error
    # PEFT has frozen the base model; what is merged can be trained like any classifier.
    return ClassifierNetwork(merged.requires_grad_(True))
