"""What a run is made with is known, with git and without."""

import sys
from pathlib import Path

import pytest

from flows.settings import CHECKOUT
from tasks import origin
from tasks.origin import git_revision, package_versions


def test_what_a_run_is_made_with_is_known():
    assert package_versions()["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"torch", "polars", "prefect", "mlflow"} <= package_versions().keys()
    revision, _, changes = git_revision().partition("+")
    assert len(revision) == 40 or revision == "unknown"
    assert changes in ("", "changes")


def test_an_image_knows_its_revision_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert origin._REVISION == CHECKOUT / "REVISION"
    monkeypatch.setattr(origin, "_REVISION", tmp_path / "REVISION")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_revision() == "unknown"
    (tmp_path / "REVISION").write_text("v1.2-3-gabc\n")
    assert git_revision() == "v1.2-3-gabc"
