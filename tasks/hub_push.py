"""A registered version to the Hugging Face hub, with a model card that carries the evidence. Shown, not done, by default."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from charm_core.errors import ConfigError, ServiceError
from tasks.model_registry import Move, RegisteredModel
from tasks.registry import GATE_TAG, released_ref
from tasks.scratch import scratch_folder
from tasks.secrets import SECRET_NAME_SCHEMA, check_secret_name, secret
from tasks.store import MANIFEST, ArtifactStore, file_digest

CARD = "README.md"

_REPOSITORY = r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$"
_WEIGHTS = ".safetensors"
_REPLACED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
"""What an earlier version may have left that would be loaded beside, or instead of, the new files."""
_LOADS_AS_CODE = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".py")


class HubConfig(BaseModel):
    """Where on the hub, and whether it is really pushed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    repository: str = Field(pattern=_REPOSITORY, description="Such as 'my-organisation/my-reward-model'.")
    branch: str = Field(default="main", min_length=1, description="Branch that gets the commit.")
    private: bool = Field(default=True, description="A repository that does not exist yet is made private.")
    dry_run: bool = Field(default=True, description="Only say what would be pushed: nothing is sent.")
    token: str = Field(
        default="HF_TOKEN",
        description="Name of the secret that allows to write; not the token.",
        json_schema_extra=SECRET_NAME_SCHEMA,
    )
    endpoint: str | None = Field(
        default=None,
        pattern=r"^(https://|http://(127\.0\.0\.1|localhost)[:/])",
        description="Address of another hub than huggingface.co; https, because the token goes there.",
    )

    @model_validator(mode="after")
    def _token_is_named(self) -> Self:
        check_secret_name(self.token, "token")
        return self


class PushedFile(BaseModel):
    """One file of a push."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    size: int
    digest: str


class HubPush(BaseModel):
    """What was pushed, or would be."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: str
    repository: str
    branch: str
    private: bool
    files: tuple[PushedFile, ...]
    card: str
    commit: str | None = Field(description="Address of the commit; None if nothing was sent.")

    def sentence(self) -> str:
        """What was done, with the files."""
        size = sum(file.size for file in self.files) / 1e6
        what = f"version {self.version} to {self.repository} ({self.branch}): {len(self.files)} files, {size:,.1f} MB"
        if self.commit is not None:
            return f"Pushed {what}; {self.commit}"
        names = "".join(f"\n  {file.name}  {file.size:,} bytes  {file.digest[:12]}" for file in self.files)
        kind = "private" if self.private else "public"
        return (
            f"Nothing was sent (dry run). Would push {what}; if the repository is new, it is made {kind}.{names}\n"
            f"Set push.dry_run to false to push."
        )


def push_version(store: ArtifactStore, model: RegisteredModel, number: str, config: HubConfig) -> HubPush:
    """Push a version that is or was made champion; the card says how it got there.

    Args:
        store: Where the released folder is; its content is verified.
        model: The registered model.
        number: The version.
        config: Where to.

    Raises:
        ConfigError: The version does not exist, was never champion, or its folder holds what nobody should load.
        ArtifactError: The folder is gone or damaged.
        ServiceError: The hub refuses or does not answer.
    """
    version = model.version(number)
    made = [move for move in model.moves if move.after == number]
    if not made:
        raise ConfigError(
            f"version {number} of {model.name} was never champion (gate: {version.tags.get(GATE_TAG, 'not judged')}); promote it "
            f"before it is pushed"
        )
    with _release(store, model, number) as folder:
        push = HubPush(
            version=number,
            repository=config.repository,
            branch=config.branch,
            private=config.private,
            files=tuple(
                PushedFile(name=path.relative_to(folder).as_posix(), size=path.stat().st_size, digest=file_digest(path))
                for path in sorted(folder.rglob("*"))
                if path.is_file()
            ),
            card=(folder / CARD).read_text(encoding="utf-8"),
            commit=None,
        )
        _check(push)
        return push if config.dry_run else push.model_copy(update={"commit": _send(folder, model.name, number, config)})


def promotion_card(card: str, model: RegisteredModel, number: str) -> str:
    """The model card with how the version became champion: a card made before that cannot know it."""
    moves = [move for move in model.moves if number in (move.before, move.after)]
    lines = [f"- {_escaped(move)}" for move in moves]
    state = "is the champion" if model.champion == number else "is not the champion any more"
    head = f"Version {number} of `{model.name}` {state}."
    return "\n".join([card.rstrip(), "", "## Promotion", "", head, "", *lines, ""])


def _escaped(move: Move) -> str:
    """A reason is somebody's free text: it must not become markup of a public page, and an account is nobody's business."""
    text = move.model_copy(update={"by": "the maintainers"}).sentence()
    return re.sub(r"([\\`*_{}\[\]<>#|!])", r"\\\1", " ".join(text.split()))


@contextmanager
def _release(store: ArtifactStore, model: RegisteredModel, number: str) -> Iterator[Path]:
    with (
        store.local_folder(released_ref(model.version(number))) as source,
        scratch_folder("push") as scratch,
    ):
        folder = scratch / "model"
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns(MANIFEST))
        card = folder / CARD
        card.write_text(promotion_card(card.read_text(encoding="utf-8"), model, number), encoding="utf-8")
        yield folder


def _check(push: HubPush) -> None:
    names = [file.name for file in push.files]
    bad = [name for name in names if name.lower().endswith(_LOADS_AS_CODE)]
    if bad:
        raise ConfigError(f"{bad} run code when they are loaded, so they are not pushed; release safetensors only")
    if not any(name.endswith(_WEIGHTS) for name in names):
        raise ConfigError(f"version {push.version} has no {_WEIGHTS} file: {names}; calibrate again")


def _send(folder: Path, model: str, number: str, config: HubConfig) -> str:
    from huggingface_hub import HfApi

    # HTTPError is that of whichever HTTP client this version of the hub's client uses
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]

    api: Any = HfApi(endpoint=config.endpoint, token=secret(config.token).get_secret_value())
    try:
        api.create_repo(config.repository, private=config.private, exist_ok=True)
        if config.private and not api.repo_info(config.repository).private:
            raise ConfigError(
                f"{config.repository} exists and is public; set push.private to false if the model may be public, or name another "
                f"repository"
            )
        if config.branch != "main":
            api.create_branch(config.repository, branch=config.branch, exist_ok=True)
        done = api.upload_folder(
            repo_id=config.repository,
            folder_path=folder,
            revision=config.branch,
            commit_message=f"Version {number} of {model}",
            delete_patterns=_REPLACED,
        )
    except HfHubHTTPError as error:
        raise ServiceError(_refused(config, error.response.status_code, str(error))) from None
    except HTTPError as error:
        raise ServiceError(
            f"the hub does not answer ({error}); no commit was made, run the same command again"
        ) from None
    except RuntimeError as error:  # a file did not arrive
        raise ServiceError(f"{error} No commit was made; run the same command again") from error
    return str(done.commit_url)


def _refused(config: HubConfig, status: int, message: str) -> str:
    hint = f"; the secret {config.token} must allow to write to {config.repository}" if status in (401, 403) else ""
    return f"the hub refuses the push to {config.repository} ({status}){hint}: {' '.join(message.split())[:300]}"
