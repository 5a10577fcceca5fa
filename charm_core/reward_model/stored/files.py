"""A model's files, in a folder or on the hub, looked at without reading weights and without torch.

Safetensors headers say which tensors there are; that, and JSON, is enough to tell what kind of reward model it is and
whether something is missing. Pickled weights are named, never read. From the hub, weights are fetched only where asked
for: without them, headers are read by range requests.
"""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from charm_core.errors import ModelError
from charm_core.reward_model.stored import hub

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
COMMIT = re.compile(r"[0-9a-f]{40}")
"""A hub revision that cannot come to mean something else."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
NOT_WEIGHTS = {"training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"}
"""Pickles that training scripts leave beside a model."""
MOST_HEADER_BYTES = 100_000_000
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """What a safetensors header says of one tensor."""

    dtype: str
    """As safetensors names it: F32, BF16, F16, ..."""
    shape: tuple[int, ...]
    file: str
    start: int
    """Offset of its bytes in the file."""
    size: int
    """Bytes."""


@dataclass(frozen=True, kw_only=True)
class StoredModel:
    """One model's files."""

    name: str
    """As the user gave it: for messages."""
    folder: Path
    """On this machine; the weights may be missing from it if the model is on the hub."""
    tensors: Mapping[str, StoredTensor]
    config: Mapping[str, Any]
    """``config.json``; empty if there is none."""
    adapter: Mapping[str, Any] | None
    """``adapter_config.json``, which makes it a LoRA adapter."""
    pickles: tuple[str, ...]
    """Files of pickled weights."""
    absent: tuple[str, ...]
    """Files that the index names and that are not there."""

    @property
    def has_tokenizer(self) -> bool:
        """Whether tokenizer files lie beside the weights."""
        return any((self.folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))

    def has(self, *prefixes: str) -> bool:
        """Whether a stored tensor's name begins like this."""
        return any(name.startswith(prefixes) for name in self.tensors)


def is_folder(path: str) -> bool:
    """Whether a path is a folder rather than a hub id.

    Raises:
        ModelError: It is neither.
    """
    if Path(path).expanduser().is_dir():
        return True
    if Path(path).exists() or not HUB_ID.fullmatch(path):
        raise ModelError(f"the reward model {path!r} is not a folder; give a Hugging Face model folder or a hub id")
    return False


def open_model(path: str, revision: str | None = None, *, weights: bool = True, code: bool = False) -> StoredModel:
    """Look at a model's files, fetching them from the hub if need be.

    Args:
        path: Folder or hub id.
        revision: Hub revision.
        weights: Whether weights on the hub are wanted here, or only what their headers say.
        code: Whether Python files on the hub are wanted too.

    Raises:
        ModelError: Neither a folder nor on the hub, or a file is damaged.
        ServiceError: The hub does not answer.
    """
    local = is_folder(path)
    folder = Path(path).expanduser() if local else hub.fetch(path, revision, weights=weights, code=code)
    here = {file.name for file in folder.iterdir() if file.is_file()}
    names = here
    if not local and not (_indexed(folder) <= here and any(name.endswith(".safetensors") for name in here)):
        names = here | hub.file_names(path, revision, folder)
    tensors = _local_tensors(folder, here) | _remote_tensors(path, revision, names - here)
    return StoredModel(
        name=path if revision is None or local else f"{path}@{revision}",
        folder=folder,
        tensors=tensors,
        config=read_json(folder / "config.json") or {},
        adapter=read_json(folder / "adapter_config.json"),
        pickles=tuple(name for name in sorted(names) if name.endswith(PICKLES) and name not in NOT_WEIGHTS),
        absent=tuple(sorted(_indexed(folder) - names)),
    )


def read_json(file: Path) -> dict[str, Any] | None:
    """A JSON file's object; none if there is no such file.

    Raises:
        ModelError: It is not JSON, or not an object.
    """
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"the file {file} cannot be read as JSON: {error}; use an intact copy of the model") from error
    if not isinstance(content, dict):
        raise ModelError(f"the file {file} holds a {type(content).__name__} where an object belongs")
    return content


def _indexed(folder: Path) -> set[str]:
    index = read_json(folder / INDEX) or {}
    return set(index.get("weight_map", {}).values())


def _local_tensors(folder: Path, names: Collection[str]) -> dict[str, StoredTensor]:
    found: dict[str, StoredTensor] = {}
    for name in sorted(names):
        if name.endswith(".safetensors"):
            found |= _header(folder / name)
    return found


def _header(file: Path) -> dict[str, StoredTensor]:
    """The header of a safetensors file: its length in 8 bytes, then JSON."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(min(length, MOST_HEADER_BYTES)))
        tensors = {
            name: StoredTensor(
                dtype=entry["dtype"],
                shape=tuple(entry["shape"]),
                file=file.name,
                start=8 + length + entry["data_offsets"][0],
                size=entry["data_offsets"][1] - entry["data_offsets"][0],
            )
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"the weights file {file} cannot be read: {error}; use an intact copy of the model") from error
    end = max((tensor.start + tensor.size for tensor in tensors.values()), default=0)
    if end > file.stat().st_size:
        raise ModelError(
            f"the weights file {file} cannot be read: it has {file.stat().st_size} of {end} bytes; use an intact copy of the model"
        )
    return tensors


def _remote_tensors(path: str, revision: str | None, names: Collection[str]) -> dict[str, StoredTensor]:
    found: dict[str, StoredTensor] = {}
    for name in sorted(names):
        if name.endswith(".safetensors"):
            for tensor, (dtype, shape) in hub.header(path, revision, name).items():
                found[tensor] = StoredTensor(dtype=dtype, shape=shape, file=name, start=0, size=0)
    return found
