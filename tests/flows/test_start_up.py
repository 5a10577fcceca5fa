"""The command line's help comes at once: nothing is imported for it that only a run needs."""

import subprocess
import sys

import pytest

from flows.settings import CHECKOUT

LATE = (
    "torch",
    "transformers",
    "deepspeed",
    "mlflow",
    "datasets",
    "openai",
    "matplotlib",
    "pandas",
    "scipy.stats",
    "scipy.linalg",
)

SCRIPT = """
import runpy, sys
sys.argv = [sys.argv[1], "--help"]
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
except SystemExit as stop:
    assert not stop.code
print("\\nimported:", [name for name in {late!r} if name in sys.modules])
"""


@pytest.mark.parametrize("flow", ["audit", "calibrate", "status"])
def test_help_imports_nothing_heavy(flow: str):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(late=LATE), f"flows.{flow}"],
        cwd=CHECKOUT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "imported: []"
    assert "usage:" in done.stdout
