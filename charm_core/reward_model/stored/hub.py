"""Models on the Hugging Face hub: which files there are, and the ones that are wanted here.

``huggingface_hub`` keeps them in its own cache and reads its own settings (HF_HOME, HF_TOKEN, HF_ENDPOINT,
HF_HUB_OFFLINE). Files in sub-folders and pickled weights are never fetched.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from charm_core.errors import ModelError, ServiceError

SMALL = ("*.json", "*.jinja", "*.model", "*.txt")
"""Config, tokenizer, chat template, index of the weights."""
WEIGHTS = ("*.safetensors",)
CODE = ("*.py",)


def fetch(path: str, revision: str | None, *, weights: bool, code: bool) -> Path:
    """Bring a model's files here; returns their folder in the cache.

    Raises:
        ModelError: There is no such model or revision, or it is not open to this user.
        ServiceError: The hub does not answer.
    """
    from huggingface_hub import snapshot_download

    patterns = [*SMALL, *(WEIGHTS if weights else ()), *(CODE if code else ())]
    with _explained(path, revision):
        folder = snapshot_download(path, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"])
    return Path(folder)


def file_names(path: str, revision: str | None, folder: Path) -> set[str]:
    """All of a model's files outside sub-folders; in offline mode, those in the cache."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    with _explained(path, revision):
        try:
            names = HfApi().list_repo_files(path, revision=revision)
        except OfflineModeIsEnabled:
            names = [file.name for file in folder.iterdir()]
    return {name for name in names if "/" not in name}


def header(path: str, revision: str | None, file: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Names, types and shapes of the tensors in a safetensors file, of which only the beginning is fetched."""
    from huggingface_hub import HfApi

    with _explained(path, revision):
        found = HfApi().parse_safetensors_file_metadata(path, file, revision=revision)
    return {name: (str(tensor.dtype), tuple(tensor.shape)) for name, tensor in found.tensors.items()}


@contextmanager
def _explained(path: str, revision: str | None) -> Iterator[None]:
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise ModelError(
            f"the reward model {path!r} on the hub is open only to those who accepted its terms: accept them there and set "
            f"HF_TOKEN: {error}"
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        raise ModelError(
            f"there is no reward model {path!r} with revision {revision!r} on the hub, nor a folder of that name; correct "
            f"reward_model.path and revision (a private one needs HF_TOKEN): {error}"
        ) from error
    except errors.SafetensorsParsingError as error:
        raise ModelError(f"the weights of the reward model {path!r} on the hub are damaged: {error}") from error
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError) as error:
        raise ServiceError(
            f"the reward model {path!r} cannot be had from the hub now: {error}; try again, or give a folder"
        ) from error
