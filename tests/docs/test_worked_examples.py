"""Each worked example does what its page says, in a copy of the checkout."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.material import write_material
from tests.docs.pages import Block, blocks, pages, write_settings
from tests.docs.shell import run_blocks, shell_environment
from tests.docs.worked_example import copy_with_example

EXAMPLES = [page for page in pages() if page.startswith("extend/")]
LOADS_TORCH = "extend/head.md"


def commands(page: str, *, tests: bool) -> list[Block]:
    return [block for block in blocks(page, "sh") if block.text.startswith("python -m pytest") == tests]


def check_style(page: str, folder: Path) -> None:
    shown = sorted({block.title for block in blocks(page) if block.language in ("python", "diff")})
    for arguments in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *arguments, "--no-cache", *shown],
            cwd=folder, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", EXAMPLES)
def test_it_takes_one_file_and_one_line_of_one_table(page: str):
    shown = [block for block in blocks(page) if block.title and not block.title.startswith("tests/")]
    files = [block for block in shown if block.language == "python"]
    (edit,) = [block for block in shown if block.language == "diff"]
    added = [line for line in edit.text.splitlines() if line.startswith("+") and not line.startswith("+from ")]
    assert (len(files), len(added)) == (1, 1)


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[pytest.mark.slow] if page == LOADS_TORCH else []) for page in EXAMPLES]
)
def test_the_example_is_in_the_project_s_style_and_its_tests_pass(page: str, tmp_path: Path):
    checkout = copy_with_example(page, tmp_path)
    check_style(page, checkout)
    output = run_blocks(commands(page, tests=True), checkout, shell_environment(tmp_path, checkout), timeout=300)
    assert " passed" in output


@pytest.mark.slow
@pytest.mark.parametrize("page", EXAMPLES)
def test_the_example_can_be_used(page: str, tmp_path: Path):
    used = commands(page, tests=False)
    if not used:
        pytest.skip("its test is its use")
    (tmp_path / "checkout").mkdir()
    checkout = copy_with_example(page, tmp_path / "checkout")
    write_material(tmp_path)
    write_settings(page, tmp_path)
    run_blocks(used, tmp_path, shell_environment(tmp_path, checkout), timeout=900)
