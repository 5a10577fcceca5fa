"""What the pages name exists: settings, functions, files, flows."""

import importlib
import re
from collections.abc import Iterator
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from flows import runs
from flows.promote import PromoteRun
from flows.settings import CHECKOUT
from tests.docs.pages import DOCS, pages

MODELS = (
    runs.AuditRun, runs.CalibrationRun, runs.CollectRatingsRun, runs.EvaluationRun, runs.PostTrainRun, PromoteRun,
)  # fmt: skip
DOTTED = re.compile(r"`([a-z_]\w*(?:\.[a-z_]\w*)+)(?: = [^`]*)?`")
PATH = re.compile(r"`((?:charm_core|tasks|flows|tests|deployments|benchmarks)/[\w./-]*)`")


def text_of(page: str) -> str:
    """A page without its blocks."""
    return re.sub(r"^```.*?^```$", "", (DOCS / page).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def nested(annotation: Any) -> Iterator[type[BaseModel]]:
    """The settings models that a field may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from nested(part)


def has_setting(model: type[BaseModel], path: list[str]) -> bool:
    field = model.model_fields.get(path[0])
    if field is None:
        return False
    return len(path) == 1 or any(has_setting(one, path[1:]) for one in nested(field.annotation))


def is_function(name: str) -> bool:
    """Whether it is something in a module of charm_core, such as ``elo.win_probability``."""
    module, _, attribute = name.partition(".")
    path = CHECKOUT / "charm_core" / f"{module}.py"
    return path.exists() and hasattr(importlib.import_module(f"charm_core.{module}"), attribute)


@pytest.mark.parametrize("page", pages())
def test_settings_that_are_named_exist(page: str):
    known = {name for model in MODELS for name in model.model_fields}
    named = [name.split(".") for name in DOTTED.findall(text_of(page)) if not is_function(name)]
    unknown = [path for path in named if path[0] in known and not any(has_setting(model, path) for model in MODELS)]
    assert unknown == []


@pytest.mark.parametrize("page", pages())
def test_files_that_are_named_exist(page: str):
    assert [name for name in PATH.findall(text_of(page)) if not (CHECKOUT / name).exists()] == []


def test_functions_of_the_method_exist():
    named = [name for name in DOTTED.findall(text_of("method.md")) if "_" in name.rpartition(".")[2]]
    settings = {name for model in MODELS for name in model.model_fields}
    assert [name for name in named if not is_function(name) and name.partition(".")[0] not in settings] == []
    assert sum(map(is_function, named)) > 5


def test_every_flow_is_listed():
    flows = {path.stem for path in (CHECKOUT / "flows").glob("*.py") if "__main__" in path.read_text(encoding="utf-8")}
    listed = set(re.findall(r"^\| `(\w+)` \|", text_of("first-run.md"), re.MULTILINE))
    assert flows == listed
