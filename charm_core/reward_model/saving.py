"""The fine-tuned model as a plain Hugging Face folder."""

import shutil
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from charm_core.errors import ArtifactError
from charm_core.reward_model.jobs import TrainingJob
from charm_core.reward_model.loading import load_reward_model
from charm_core.reward_model.workdir import sync_folder


def save_model(trained: dict[str, Tensor], job: TrainingJob) -> None:
    """Write the fine-tuned model as a plain Hugging Face folder, under a temporary name that is renamed last.

    Everything that was not trained comes from the original folder; weights are float32.

    Raises:
        ArtifactError: The folder cannot be written.
    """
    original = load_reward_model(job.model, dtype=torch.float32, device=torch.device("cpu"))
    original.network.load_state_dict(trained, strict=False)
    partial = job.output_dir.with_name(f"{job.output_dir.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        classifier: Any = original.network.classifier
        classifier.save_pretrained(partial)
        original.tokenizer.save_pretrained(partial)
        sync_folder(partial)
        shutil.rmtree(job.output_dir, ignore_errors=True)
        partial.replace(job.output_dir)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise ArtifactError(f"the trained model cannot be written to {job.output_dir}: {error}") from error
