"""The fine-tuned model as a plain Hugging Face folder."""

import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from charm_core.errors import ArtifactError, TrainingError
from charm_core.reward_model.adapters import add_adapters, merge_adapters
from charm_core.reward_model.jobs import TrainingJob
from charm_core.reward_model.loading import load_reward_model
from charm_core.reward_model.network import trainable
from charm_core.reward_model.spec import RewardModelSpec
from charm_core.reward_model.stored.training_record import RECORD, recorded
from charm_core.reward_model.workdir import sync_folder


def save_model(trained: dict[str, Tensor], job: TrainingJob) -> None:
    """Write the fine-tuned model as a folder of its own, under a temporary name that is renamed last.

    Everything that was not trained comes from the original; weights are float32. LoRA adapters, those trained and one that
    the original was, are merged, so that a plain model is saved.

    Args:
        trained: Weights of all that was trained, by parameter name; none: the untouched model is saved.
        job: What was trained.

    Raises:
        ArtifactError: The folder cannot be written.
    """
    original = load_reward_model(job.model, dtype=torch.float32, device=torch.device("cpu"))
    network = trainable(original.network, job.model.path)
    add_adapters(network, job.config)
    unknown = network.load_state_dict(trained, strict=False).unexpected_keys
    if unknown:
        raise TrainingError(f"the trained weights {unknown[:3]} are not in the reward model; this is a bug, report it")
    merge_adapters(network)
    partial = job.output_dir.with_name(f"{job.output_dir.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        network.save(partial)
        original.tokenizer.save_pretrained(partial)
        _record_rendering(partial, job.model)
        sync_folder(partial)
        shutil.rmtree(job.output_dir, ignore_errors=True)
        partial.replace(job.output_dir)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise ArtifactError(f"the trained model cannot be written to {job.output_dir}: {error}") from error


def _record_rendering(folder: Path, spec: RewardModelSpec) -> None:
    """Note what a later scoring must not do otherwise, where it is not the default."""
    settings = recorded(spec)
    if settings:
        (folder / RECORD).write_text(json.dumps(settings, indent=1, sort_keys=True), encoding="utf-8")
