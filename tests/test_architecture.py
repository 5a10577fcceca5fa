"""The rules of the house, held over the syntax trees."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("charm_core", "tasks", "flows")
LIBRARY_IMPORTS = {"numpy", "scipy", "polars", "pydantic"}
HEAVY = {"torch", "transformers", "deepspeed", "safetensors", "accelerate", "peft", "trl", "vllm"}
SLOW = {"mlflow", "matplotlib", "datasets", "huggingface_hub", "openai", "vllm", "peft", "trl"}
"""Imported only where they are used: they take long, and the command line's help needs none of them."""
READS_ENVIRONMENT = {"flows/settings.py"}
MAY_USE_ENVIRONMENT = {
    "tasks/worker_processes.py": "worker_environment",  # passes it on to child processes
    "charm_core/reward_model/worker.py": "_rank",  # torchrun tells a rank its number in the environment
}
"""File to the one function in it."""


def sources() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), relative(path))


def imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}:{node.lineno} has a relative import"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def top_level(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


def dotted(node: ast.AST) -> str:
    """``a.b.c`` of a chain of attributes, otherwise what can be said of it."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def names_used(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.Attribute, ast.Name)):
            yield dotted(node), node.lineno
        elif isinstance(node, ast.ImportFrom):
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            yield dotted(node.func), node


def is_reward_model(path: Path) -> bool:
    return relative(path).startswith("charm_core/reward_model/")


every_source = pytest.mark.parametrize("path", sources(), ids=relative)


def test_the_rules_are_held_over_something():
    assert {
        package: any(relative(path).startswith(package) for path in sources()) for package in PACKAGES
    } == dict.fromkeys(PACKAGES, True)
    assert {"prefect"} <= top_level(ROOT / "tasks" / "caching.py")
    assert "mlflow" in top_level(ROOT / "tasks" / "tracking.py")
    assert any(name == "os.environ" for name, _ in names_used(ROOT / "flows" / "settings.py"))


@every_source
def test_imports_go_one_way(path: Path):
    forbidden = {"charm_core": {"tasks", "flows", "tests"}, "tasks": {"flows", "tests"}, "flows": {"tests"}}
    package = relative(path).partition("/")[0]
    assert not top_level(path) & (forbidden[package] | {"benchmarks", "deployments"})


@every_source
def test_only_the_reward_model_imports_what_is_heavy(path: Path):
    if not is_reward_model(path):
        assert not top_level(path) & HEAVY


@every_source
def test_only_tracking_imports_mlflow(path: Path):
    if relative(path) != "tasks/tracking.py":
        assert "mlflow" not in top_level(path)


@every_source
def test_what_is_slow_to_import_is_imported_late(path: Path):
    for node in tree(path).body:  # what is under TYPE_CHECKING is not imported
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not {name.partition(".")[0] for name in names} & SLOW


@pytest.mark.parametrize("path", [path for path in sources() if relative(path).startswith("charm_core/")], ids=relative)
def test_the_library_knows_no_pipeline(path: Path):
    import sys

    others = top_level(path) - set(sys.stdlib_module_names) - {"charm_core"}
    assert others <= LIBRARY_IMPORTS | (
        HEAVY | {"datasets", "filelock", "huggingface_hub", "psutil", "tokenizers"} if is_reward_model(path) else set()
    )


@every_source
def test_the_environment_is_read_in_one_place(path: Path):
    if relative(path) in READS_ENVIRONMENT:
        return
    allowed = MAY_USE_ENVIRONMENT.get(relative(path))
    lines = {
        line
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef) and node.name == allowed
        for line in range(node.lineno, (node.end_lineno or 0) + 1)
    }
    used = [
        f"{name} in line {line}"
        for name, line in names_used(path)
        if name in ("os.environ", "os.getenv", "os.environb", "os.putenv", "environ", "getenv") and line not in lines
    ]
    assert not used


@pytest.mark.parametrize(
    "path",
    [path for path in sources() if relative(path).startswith("charm_core/") and not is_reward_model(path)],
    ids=relative,
)
def test_the_method_knows_no_clock(path: Path):
    assert not top_level(path) & {
        "time",
        "uuid",
        "secrets",
        "random",
        "socket",
        "subprocess",
        "urllib",
        "httpx",
        "requests",
    }
    assert not {name for name, _ in names_used(path) if name.endswith((".now", ".today", ".utcnow"))}


@every_source
def test_nothing_is_unpickled(path: Path):
    assert not top_level(path) & {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    for name, call in calls(path):
        options = {keyword.arg: keyword.value for keyword in call.keywords}
        if name == "torch.load":
            only_weights = options.get("weights_only")
            assert isinstance(only_weights, ast.Constant), f"torch.load in line {call.lineno}"
            assert only_weights.value is True, f"torch.load in line {call.lineno}"
        if name.endswith(("np.load", "numpy.load")):
            assert "allow_pickle" not in options, f"{name} in line {call.lineno}"


@every_source
def test_nothing_is_printed(path: Path):
    assert "print" not in {name for name, _ in calls(path)}


@every_source
def test_nothing_is_imported_by_star_or_run_by_eval(path: Path):
    stars = [node for node in ast.walk(tree(path)) if isinstance(node, ast.ImportFrom) and node.names[0].name == "*"]
    assert not stars
    assert not {"eval", "exec", "os.system"} & {name for name, _ in calls(path)}


@every_source
def test_random_numbers_have_a_seed(path: Path):
    assert not [name for name, _ in names_used(path) if name.startswith(("np.random.seed", "random.seed"))]
    for name, call in calls(path):
        if name.endswith("default_rng"):
            assert call.args or call.keywords, f"default_rng without a seed in line {call.lineno}"


def test_the_tests_have_no_packages():
    # tests/tasks with an __init__.py would shadow tasks
    assert not list((ROOT / "tests").rglob("__init__.py"))
