"""The documentation's pages and their fenced blocks, by which the tests hold the pages to what they say."""

import re
from dataclasses import dataclass
from pathlib import Path

from flows.settings import CHECKOUT

DOCS = CHECKOUT / "docs"
NEEDS = "needs "
"""How the title of a block of commands begins that cannot run on any machine."""
PART_OF = "part of "
"""How the title of a block of settings begins that is no whole file."""
_OPEN = re.compile(r'^```(?P<language>\w*)(?: title="(?P<title>[^"]*)")?$')


@dataclass(frozen=True, kw_only=True)
class Block:
    """One fenced block."""

    page: str
    line: int
    language: str
    title: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[str]:
    return sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


def blocks(page: str, language: str | None = None) -> list[Block]:
    """The fenced blocks of a page, of one language or of all."""
    found, lines = [], enumerate((DOCS / page).read_text(encoding="utf-8").splitlines(), start=1)
    for number, line in lines:
        if "```" not in line:
            continue
        opened = _OPEN.match(line)
        assert opened, f'{page}:{number}: a fence is ```language title="..." at the margin, not {line!r}'
        text = []
        for _, inner in lines:
            if inner == "```":
                break
            text.append(inner)
        found.append(
            Block(
                page=page,
                line=number,
                language=opened["language"],
                title=opened["title"] or "",
                text="\n".join(text) + "\n",
            )
        )
    return [block for block in found if language in (None, block.language)]


def all_blocks(language: str | None = None) -> list[Block]:
    return [block for page in pages() for block in blocks(page, language)]


def write_settings(page: str, folder: Path) -> None:
    """The settings files that a page shows, where its commands look for them."""
    for block in blocks(page, "toml"):
        if not block.title.startswith(PART_OF):
            (folder / block.title).write_text(block.text, encoding="utf-8")
