"""Which policy model it is: what decides its answers beside the decoding, as far as that can be known before asking."""

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from charm_core.errors import ConfigError
from tasks.answering.generation import LocalBackEnd
from tasks.policy_models import LiveBackend, PolicyModel, ReplayBackend
from tasks.source_digests import weights_digest

_COMMIT = re.compile(r"[0-9a-f]{40}")


class PolicyModelRef(BaseModel):
    """A policy model that answers live, identified by what decides its answers: not by where it runs or how fast."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    backend: Annotated[LiveBackend, Field(discriminator="kind")]
    weights: str | None = Field(
        default=None, description="Digest of a folder, or hub id and revision; not for servers."
    )

    def identity(self) -> dict[str, Any]:
        """What goes into cache keys."""
        return {"name": self.name, "weights": self.weights, "backend": self.backend.identity()}


def identify_policy_model(model: PolicyModel) -> PolicyModelRef:
    """Identify a local policy model by a digest of its folder or by its hub revision, a served one by what it is served as.

    Raises:
        ConfigError: It replays responses, there is no such folder, or a hub id comes without a commit hash.
    """
    backend = model.backend
    if isinstance(backend, ReplayBackend):
        raise ConfigError(f"the policy model {model.name!r} replays responses, so it cannot be sampled: replay it")
    if not isinstance(backend, LocalBackEnd):
        return PolicyModelRef(name=model.name, backend=backend)
    folder = Path(backend.path).expanduser()
    if folder.is_dir():
        here = backend.model_copy(update={"path": str(folder.resolve())})
        return PolicyModelRef(name=model.name, backend=here, weights=weights_digest(folder))
    if backend.path.startswith((".", "/", "~")) or backend.path.count("/") > 1:
        raise ConfigError(
            f"there is no folder {backend.path!r} of the policy model {model.name!r}; correct backend.path"
        )
    if not _COMMIT.fullmatch(backend.revision or ""):
        raise ConfigError(
            f"the policy model {model.name!r} is the hub id {backend.path!r}: set backend.revision to the commit hash of the "
            f"version you mean, not {backend.revision!r}"
        )
    return PolicyModelRef(name=model.name, backend=backend, weights=f"hub:{backend.path}@{backend.revision}")
