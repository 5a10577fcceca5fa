"""Checkpoints of a training run: safetensors files in a folder that gets its name once it is complete.

They hold full float32 weights and Adam moments by parameter name, so that a run goes on under another number of ranks or
ZeRO stage, and nothing has to be unpickled.
"""

import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from charm_core.errors import ArtifactError
from charm_core.reward_model.workdir import (
    best_folder,
    best_steps,
    checkpoint_folder,
    checkpoint_steps,
    sync_folder,
)

FILE_BYTES = 2 * 1024**3

State = Iterable[tuple[str, str, Tensor]]


def save_checkpoint(state: State, step: int, work_dir: Path, *, kept: int, writes: bool) -> None:
    """Write a checkpoint and delete all but the ``kept`` newest.

    Args:
        state: What ``Engine.state`` yields; consumed on every rank, because gathering it takes all of them.
        step: Optimiser steps done.
        work_dir: The job's work folder.
        kept: How many checkpoints stay.
        writes: Whether this rank is the one that writes.

    Raises:
        ArtifactError: Disk full or not writable; the checkpoints before are untouched.
    """
    _write(state, checkpoint_folder(work_dir, step), step, writes=writes)
    if writes:
        for old in checkpoint_steps(work_dir)[:-kept]:
            shutil.rmtree(checkpoint_folder(work_dir, old))


def save_best(weights: State, step: int, work_dir: Path, *, needed: Collection[int], writes: bool) -> None:
    """Write the weights of the best evaluation so far, and delete those of earlier ones that nothing goes back to.

    Args:
        weights: Of all that is trained; consumed on every rank.
        step: Optimiser steps done.
        work_dir: The job's work folder.
        needed: Steps of earlier bests to which a run that goes on from a checkpoint would return.
        writes: Whether this rank is the one that writes.

    Raises:
        ArtifactError: Disk full or not writable.
    """
    _write(weights, best_folder(work_dir, step), step, writes=writes)
    if writes:
        for old in set(best_steps(work_dir)) - {step, *needed}:
            shutil.rmtree(best_folder(work_dir, old))


def load_checkpoint(work_dir: Path, step: int) -> dict[tuple[str, str], Tensor]:
    """Read a checkpoint: (parameter name, ``weight`` or moment) to tensor.

    Raises:
        ArtifactError: A file is damaged.
    """
    return _read(checkpoint_folder(work_dir, step), "delete {folder} to go on from the one before")


def load_best(work_dir: Path, step: int) -> dict[str, Tensor]:
    """Read the weights of the best evaluation, by parameter name.

    Raises:
        ArtifactError: A file is damaged.
    """
    tensors = _read(best_folder(work_dir, step), "delete the work folder to train again")
    return {name: tensor for (name, _), tensor in tensors.items()}


def _write(state: State, final: Path, step: int, *, writes: bool) -> None:
    if not writes:
        for _ in state:
            pass
        return
    partial = final.with_name(f"partial-{step:08d}-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        for number, tensors in enumerate(_files(state)):
            save_file(tensors, partial / f"state-{number:05d}.safetensors")
        (partial / "state.json").write_text(json.dumps({"step": step}))
        sync_folder(partial)
        if final.exists():
            shutil.rmtree(final)
        partial.replace(final)
        sync_folder(final.parent)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise ArtifactError(f"the checkpoint of step {step} cannot be written to {final}: {error}") from error


def _read(folder: Path, advice: str) -> dict[tuple[str, str], Tensor]:
    tensors: dict[tuple[str, str], Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            stored = load_file(file)
        except Exception as error:
            raise ArtifactError(
                f"the checkpoint file {file} is damaged: {error}; {advice.format(folder=folder)}"
            ) from error
        for key, tensor in stored.items():
            name, _, kind = key.rpartition("|")
            tensors[name, kind] = tensor
    return tensors


def _files(state: State) -> Iterator[dict[str, Tensor]]:
    tensors: dict[str, Tensor] = {}
    size = 0
    for name, kind, tensor in state:
        # A copy: the gathered tensor may be a buffer that is used again.
        tensors[f"{name}|{kind}"] = tensor.detach().to("cpu", copy=True).contiguous()
        size += tensor.numel() * tensor.element_size()
        if size >= FILE_BYTES:
            yield tensors
            tensors, size = {}, 0
    if tensors:
        yield tensors
