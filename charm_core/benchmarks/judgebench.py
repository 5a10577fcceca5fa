"""JudgeBench: which of two responses to a hard question is objectively right?

Pairwise accuracy by source (MMLU-Pro: knowledge; LiveBench: reasoning and math; LiveCodeBench: coding) and overall, which is
over all pairs, not the mean of the sources. A tie is wrong. Published figures are for the 350 pairs of GPT-4o; the 270 of
Claude 3.5 Sonnet are a second set. Source: arXiv 2410.12784, METHOD.md section 5.

Example: ``judgebench([{"pair_id": "x", "source": "livebench-math", "question": "...", "response_model": "gpt-4o-2024-05-13",
"response_A": "...", "response_B": "...", "label": "A>B"}])``
"""

from collections.abc import Iterable
from functools import partial

from charm_core.benchmarks.benchmark import Benchmark, BenchmarkSource
from charm_core.benchmarks.items import BenchmarkItem, Row, conversation, one_of, read_items
from charm_core.benchmarks.outcomes import Measure, strictly_above

NAME = "JudgeBench"
SOURCES = {
    "mmlu-pro": "knowledge",
    "livebench-reasoning": "reasoning",
    "livebench-math": "math",
    "livecodebench": "coding",
}
"""What the source begins with, and the subset that it is."""

_OFFICIAL = {
    "gpt-4o-2024-05-13": {"overall": 350, "knowledge": 154, "reasoning": 98, "math": 56, "coding": 42},
    "claude-3-5-sonnet-20240620": {"overall": 270, "knowledge": 154, "reasoning": 51, "math": 34, "coding": 31},
}


def judgebench(rows: Iterable[Row]) -> Benchmark:
    """JudgeBench from its official rows: pair_id, source, question, response_model, response_A, response_B and label.

    Args:
        rows: The hub's ``ScalerLab/JudgeBench``, split ``gpt`` or ``claude`` or both, or the lines of the official JSON-lines
            files. If they are of two response models, each has its own subsets.

    Raises:
        TableError: See ``read_items``; an unknown source or label.
    """
    given = list(rows)
    models = sorted({str(row.get("response_model")) for row in given})
    shared = len(models) > 1
    official = {
        Measure(_of(subset, model, shared), "accuracy"): items
        for model in models
        for subset, items in _OFFICIAL.get(model, {}).items()
    }
    return Benchmark(
        name=NAME,
        items=read_items(given, partial(_read, shared=shared), benchmark=NAME),
        judge=strictly_above,
        official_items=official,
        note="published figures are for one response model" if shared else "",
    )


SOURCE = BenchmarkSource(
    about="JudgeBench.",
    read=judgebench,
    hub="ScalerLab/JudgeBench",
    splits=("gpt",),
    local="the JSON-lines files of its repository",
)


def _read(row: Row, *, shared: bool) -> BenchmarkItem:
    source, model = str(row["source"]), str(row["response_model"])
    kind = next((kind for beginning, kind in SOURCES.items() if source.startswith(beginning)), None)
    if kind is None:
        raise ValueError(f"the source {source!r} begins with none of {list(SOURCES)}")
    pair = (row["response_A"], row["response_B"])
    right = one_of(row["label"], ("A>B", "B>A"), "the label") == "B>A"
    return BenchmarkItem(
        item_id=str(row["pair_id"]),
        subset=_of(kind, model, shared),
        also_in=(_of("overall", model, shared), "overall") if shared else ("overall",),
        messages=conversation(row["question"]),
        chosen=(pair[right],),
        rejected=(pair[not right],),
    )


def _of(subset: str, model: str, shared: bool) -> str:
    return f"{subset} ({model})" if shared else subset
