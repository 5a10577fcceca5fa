"""The fine-tuned model as a plain Hugging Face folder."""

import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from charm_core.errors import ArtifactError
from charm_core.reward_model.jobs import TrainingJob
from charm_core.reward_model.loading import load_reward_model
from charm_core.reward_model.network import trainable
from charm_core.reward_model.spec import RewardModelSpec
from charm_core.reward_model.stored.training_record import RECORD, recorded
from charm_core.reward_model.workdir import sync_folder


def save_model(trained: dict[str, Tensor], job: TrainingJob) -> None:
    """Write the fine-tuned model as a folder of its own, under a temporary name that is renamed last.

    Everything that was not trained comes from the original; weights are float32. What a LoRA adapter was merged into is
    saved as a plain classifier.

    Raises:
        ArtifactError: The folder cannot be written.
    """
    original = load_reward_model(job.model, dtype=torch.float32, device=torch.device("cpu"))
    network = trainable(original.network, job.model.path)
    network.load_state_dict(trained, strict=False)
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
