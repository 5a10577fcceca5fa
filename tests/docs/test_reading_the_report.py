"""The page about the report explains every section, table and figure that there is."""

import re

from flows.settings import CHECKOUT
from tests.docs.pages import DOCS

PAGES = CHECKOUT / "tasks" / "pages"


def page() -> str:
    return (DOCS / "reading-the-report.md").read_text(encoding="utf-8")


def headings() -> set[str]:
    return {line.lstrip("#").strip() for line in page().splitlines() if line.startswith("#")}


def test_every_section_of_the_report_is_explained():
    template = (PAGES / "report.html.j2").read_text(encoding="utf-8")
    sections = re.findall(r"<h[23][^>]*>([^<{]+)</h[23]>", template)
    assert len(sections) > 10
    assert set(sections) <= headings()


def test_every_column_of_the_overview_is_explained():
    macros = (PAGES / "report_macros.html.j2").read_text(encoding="utf-8")
    head = re.search(r"<th scope=\"col\">Reward model</th>.*?</tr>", macros, re.DOTALL)
    assert head
    columns = re.findall(r"<th[^>]*>([^<{]+)</th>", head[0])[1:]
    text = page().replace("\\|", "|")
    assert "Mean |MD|" in columns
    assert not [column for column in columns if column.split(" (")[0] not in text and column != "Prompts"]


def test_every_figure_is_named():
    source = (PAGES / "report_figures.py").read_text(encoding="utf-8")
    # name="mean-score", "win-rate", f"training-{name}", f"reliability-{place}"
    named = re.findall(r'(?:_page_figure\(\s*f?|name: str = |_figure\(data\.main, )"([a-z-]+)', source)
    assert {"overvaluation", "win-rate", "mean-score", "offsets", "training-", "reliability-"} <= set(named)
    assert not [name for name in named if f"`{name}" not in page()]
