"""The worked examples: new files and edits that a page shows, applied to a copy of the checkout."""

import shutil
from pathlib import Path

from flows.settings import CHECKOUT
from tests.docs.pages import Block, blocks

COPIED = ("charm_core", "tasks", "flows", "tests", "pyproject.toml")


def copy_with_example(page: str, folder: Path) -> Path:
    """A copy of the checkout's code with a page's new files and edits."""
    for name in COPIED:
        source = CHECKOUT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    for block in blocks(page, "python"):
        path = folder / block.title
        assert not path.exists(), f"{block}: {block.title} is there already"
        path.write_text(block.text, encoding="utf-8")
    for block in blocks(page, "diff"):
        apply_edit(block, folder / block.title)
    return folder


def apply_edit(block: Block, path: Path) -> None:
    """Apply a diff without line numbers; each hunk's old lines must be found exactly once."""
    content = path.read_text(encoding="utf-8")
    for hunk in block.text.split("@@\n"):
        lines = hunk.splitlines(keepends=True)
        assert {line[0] for line in lines} <= {" ", "-", "+"}, f"{block}: not a diff"
        old = "".join(line[1:] for line in lines if line[0] != "+")
        new = "".join(line[1:] for line in lines if line[0] != "-")
        assert content.count(old) == 1, f"{block}: found {content.count(old)} times in {block.title}:\n{old}"
        content = content.replace(old, new)
    path.write_text(content, encoding="utf-8")
