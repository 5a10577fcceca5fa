"""RMB: pairs and best-of-n lists over 49 scenarios of helpfulness and harmlessness.

Pairwise: the chosen response scores strictly above the rejected one. Best-of-n: the best response scores strictly above all
of two to six losers. An accuracy is over all items of a goal, and the overall figure is the mean of the four (pairwise and
best-of-n, helpfulness and harmlessness). Several items share a prompt, so the bootstrap draws prompts. Source: arXiv
2410.09893.

Example: ``rmb([{"pair_uid": "1", "category_path": "Pairwise_set/Harmlessness/S1", "conversation_input": [{"role": "user",
"content": "..."}], "chosen": {"llm_name": "x", "answer": "..."}, "reject": {"llm_name": "y", "answer": "..."}}])``
"""

from collections.abc import Iterable

from charm_core.benchmarks.benchmark import Benchmark, BenchmarkSource
from charm_core.benchmarks.figures import Rollup
from charm_core.benchmarks.items import BenchmarkItem, Row, conversation, one_of, read_items
from charm_core.benchmarks.outcomes import Measure, strictly_above

NAME = "RMB"
GOALS = ("Helpfulness", "Harmlessness")
PAIRWISE = "pairwise accuracy"
BEST_OF_N = "best-of-n accuracy"

_SETS = {"Pairwise_set": PAIRWISE, "BoN_set": BEST_OF_N}
OVERALL = Measure("overall", "accuracy")
ROLLUPS = (
    Rollup(measure=OVERALL, parts={Measure(goal, metric): 1.0 for goal in GOALS for metric in (PAIRWISE, BEST_OF_N)}),
)
OFFICIAL_ITEMS = {
    Measure("Helpfulness", PAIRWISE): 10_067,
    Measure("Helpfulness", BEST_OF_N): 2_109,
    Measure("Harmlessness", PAIRWISE): 7_064,
    Measure("Harmlessness", BEST_OF_N): 1_677,
}


def rmb(rows: Iterable[Row]) -> Benchmark:
    """RMB from its official rows, pairs and lists together.

    Args:
        rows: The rows of the JSON files under ``RMB_dataset`` of its repository. Pairs have the fields pair_uid, chosen and
            reject, lists bon_uid, bon_best and loser_list; both conversation_input and category_path.

    Raises:
        TableError: See ``read_items``; a category path of another form.
    """
    return Benchmark(
        name=NAME,
        items=read_items(rows, _read, benchmark=NAME),
        judge=strictly_above,
        rollups=ROLLUPS,
        official_items=OFFICIAL_ITEMS,
    )


SOURCE = BenchmarkSource(
    about="RMB, pairwise and best-of-n.",
    read=rmb,
    hub=None,
    local="the JSON files under RMB_dataset of Zhou-Zoey/RMB-Reward-Model-Benchmark",
)


def _read(row: Row) -> BenchmarkItem:
    kind, goal, category = _category(str(row["category_path"]))
    pair = kind == PAIRWISE
    item = BenchmarkItem(
        item_id=f"pairwise/{row['pair_uid']}" if pair else f"best-of-n/{row['bon_uid']}",
        subset=goal,
        metric=kind,
        also_in=(f"{goal}: {category}",),
        messages=conversation(row["conversation_input"]),
        chosen=(row["chosen" if pair else "bon_best"]["answer"],),
        rejected=tuple(loser["answer"] for loser in ([row["reject"]] if pair else row["loser_list"])),
    )
    return item.model_copy(update={"group": item.prompt_id})


def _category(path: str) -> tuple[str, str, str]:
    """Metric, goal and category of a path such as ``BoN_set/Helpfulness/Code/Data Management``."""
    parts = path.split("/")
    if len(parts) < 3:
        raise ValueError(f"the category path {path!r} is not of the form Pairwise_set/Harmlessness/S1")
    kind = one_of(parts[0], _SETS, "the set in the category path")
    return _SETS[kind], one_of(parts[1], GOALS, "the goal in the category path"), parts[2]
