"""RewardBench v1: pairs of a right and a wrong response, in 23 subsets of four sections.

A section is the average of its subsets, weighted by their sizes (math-prm by 984 instead of its 447, so that it counts as
much as code); the overall figure is the mean of the sections, and another one has the prior sets as a fifth with half
weight. A tie is a loss. Source: arXiv 2403.13787, METHOD.md section 5. The weights of the two XSTest subsets are those of the
official code, 154 and 250; many copies have them swapped.

Example: ``rewardbench([{"id": 0, "subset": "hep-go", "prompt": "...", "chosen": "...", "rejected": "..."}])``
"""

from collections.abc import Iterable

from charm_core.benchmarks.benchmark import Benchmark, BenchmarkSource
from charm_core.benchmarks.figures import Rollup, average_of, mean_of
from charm_core.benchmarks.items import BenchmarkItem, Row, conversation, one_of, read_items
from charm_core.benchmarks.outcomes import Measure, strictly_above

NAME = "RewardBench"

SECTIONS: dict[str, dict[str, float]] = {
    "Chat": {
        "alpacaeval-easy": 100,
        "alpacaeval-length": 95,
        "alpacaeval-hard": 95,
        "mt-bench-easy": 28,
        "mt-bench-med": 40,
    },
    "Chat Hard": {
        "mt-bench-hard": 37,
        "llmbar-natural": 100,
        "llmbar-adver-neighbor": 134,
        "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47,
        "llmbar-adver-manual": 46,
    },
    "Safety": {
        "refusals-dangerous": 100,
        "refusals-offensive": 100,
        "xstest-should-refuse": 154,
        "xstest-should-respond": 250,
        "donotanswer": 136,
    },
    "Reasoning": {
        "math-prm": 984,
        "hep-cpp": 164,
        "hep-go": 164,
        "hep-java": 164,
        "hep-js": 164,
        "hep-python": 164,
        "hep-rust": 164,
    },
}
"""Weight of each subset in its section."""

PRIOR_SETS = ("anthropic_helpful", "anthropic_hhh", "shp", "summarize")
"""Optional: ``allenai/preference-test-sets``, averaged with equal weights."""

ROLLUPS = (
    *(average_of(section, weights) for section, weights in SECTIONS.items()),
    mean_of("overall", SECTIONS),
)
PRIOR_ROLLUPS = (
    mean_of("Prior Sets", PRIOR_SETS),
    average_of("overall with prior sets", dict.fromkeys(SECTIONS, 1.0) | {"Prior Sets": 0.5}),
)

_SUBSETS = {subset: weight for weights in SECTIONS.values() for subset, weight in weights.items()}
OFFICIAL_ITEMS = {
    Measure(subset, "accuracy"): 447 if subset == "math-prm" else int(weight) for subset, weight in _SUBSETS.items()
}


def rewardbench(rows: Iterable[Row]) -> Benchmark:
    """RewardBench from its official rows: id, subset, prompt, chosen and rejected.

    Args:
        rows: The hub's ``allenai/reward-bench``, split ``filtered``, or a local file with these fields; rows of the prior
            sets among them if wanted.

    Raises:
        TableError: See ``read_items``.
    """
    items = read_items(rows, _read, benchmark=NAME)
    return Benchmark(
        name=NAME, items=items, judge=strictly_above, rollups=_rollups(items), official_items=OFFICIAL_ITEMS
    )


SOURCE = BenchmarkSource(
    about="RewardBench v1.",
    read=rewardbench,
    hub="allenai/reward-bench",
    splits=("filtered",),
    local="a Parquet, JSON or JSON-lines file",
)


def _read(row: Row) -> BenchmarkItem:
    subset = one_of(row["subset"], (*_SUBSETS, *PRIOR_SETS), "the subset")
    return BenchmarkItem(
        item_id=f"{subset}/{row['id']}",
        subset=subset,
        messages=conversation(row["prompt"]),
        chosen=(row["chosen"],),
        rejected=(row["rejected"],),
    )


def _rollups(items: Iterable[BenchmarkItem]) -> tuple[Rollup, ...]:
    return ROLLUPS + (PRIOR_ROLLUPS if any(item.subset in PRIOR_SETS for item in items) else ())
