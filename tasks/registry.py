"""From a fine-tuned model to a released one: a plain Hugging Face folder with its evidence, and a registered version."""

import shutil
import tempfile
from pathlib import Path

from tasks.caching import step
from tasks.evidence import Report
from tasks.scoring import RewardModelRef
from tasks.store import MANIFEST, ArtifactRef, ArtifactStore
from tasks.tracking import TrackedRun, register_version


@step(version=1)
def package_model(store: ArtifactStore, model: RewardModelRef, card: ArtifactRef) -> ArtifactRef:
    """The model's folder with its model card."""
    with model.local_spec(store) as spec, tempfile.TemporaryDirectory(prefix="charm-release-") as name:
        folder = Path(name, "model")
        shutil.copytree(spec.path, folder, ignore=shutil.ignore_patterns(MANIFEST))
        Path(folder, "README.md").write_bytes(store.read_bytes(card))
        return store.write_folder(folder, "released_model")


def register_model(run: TrackedRun, store: ArtifactStore, name: str, released: ArtifactRef, report: Report) -> str:
    """Register a released model as a version in the MLflow registry; the same content is registered once.

    Returns:
        Its URI in the registry, such as ``models:/charm-demo/3``.
    """
    with store.local_folder(released) as folder:
        source = run.log_folder(folder, "model")
    tags = {"digest": released.digest, "report": report.html.digest, "store_uri": released.uri}
    return f"models:/{name}/{register_version(run, name, source, tags)}"
