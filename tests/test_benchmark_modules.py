"""Benchmarks are run by hand, so a name that moves away from under one would be noticed late."""

import importlib
import sys
from pathlib import Path

import pytest

from flows.settings import CHECKOUT

MODULES = sorted(path.stem for path in (CHECKOUT / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.filterwarnings("ignore")  # they are those of other people's packages
def test_it_finds_what_it_imports(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", [str(CHECKOUT), *sys.path])
    module = importlib.import_module(f"benchmarks.{name}")
    assert Path(module.__file__ or "").name == f"{name}.py"
