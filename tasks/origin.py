"""Which code made a result: its commit, and the packages that decide a number."""

import contextlib
import platform
import subprocess
from importlib import metadata
from pathlib import Path

_REVISION = Path(__file__).resolve().parent.parent / "REVISION"
_RECORDED_PACKAGES = ("charm-rm", "torch", "transformers", "deepspeed", "polars", "numpy", "scipy", "prefect", "mlflow")


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    versions = {"python": platform.python_version()}
    for package in _RECORDED_PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def git_revision() -> str:
    """Commit of the checkout, with '+changes' if it has uncommitted ones; of an image what its build noted, or 'unknown'."""
    folder = Path(__file__).parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"],  # noqa: S607
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
        changes = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],  # noqa: S607
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return _REVISION.read_text(encoding="utf-8").strip() if _REVISION.exists() else "unknown"
    return head.stdout.strip() + ("+changes" if changes.stdout.strip() else "")
