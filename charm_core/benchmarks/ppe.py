"""PPE human preference: does a reward model prefer what people on the Chatbot Arena preferred?

Pairwise accuracy over the votes that name a winner; votes for a tie are left out and counted, equal scores are wrong.
Subsets overlap: kinds of prompts and languages as the data tags them, and the pairs whose shorter response (in characters)
was preferred, which a reward model that likes length gets wrong. Source: arXiv 2410.14872.

Example: ``ppe([{"question_id": "x", "prompt": "...", "response_1": "...", "response_2": "...", "winner": "model_b"}])``
"""

from collections.abc import Iterable, Iterator

from charm_core.benchmarks.benchmark import Benchmark, BenchmarkSource
from charm_core.benchmarks.items import BenchmarkItem, Row, conversation, one_of, read_items
from charm_core.benchmarks.outcomes import strictly_above
from charm_core.errors import TableError

NAME = "PPE human preference"
TIES = ("tie", "tie (bothbad)")
SHORTER_PREFERRED = "shorter response preferred"
TAGS = {
    "hard_prompt": "hard prompts",
    "easy_prompt": "easy prompts",
    "if_prompt": "instruction following",
    "math_prompt": "math",
    "is_code": "code",
}
"""Columns that tag a prompt, and the subset that they make; a column that is not there makes none."""
LANGUAGES = ("English", "Chinese", "Russian")
OFFICIAL_VOTES = 16_038


def ppe(rows: Iterable[Row]) -> Benchmark:
    """PPE's human preferences from its official rows: question_id, prompt, response_1, response_2, winner and tags.

    Args:
        rows: The hub's ``lmarena-ai/PPE-Human-Preference-V1``, split ``test``, or a local file with these fields.

    Raises:
        TableError: See ``read_items``; an unknown winner, or no vote that names one.
    """
    given = list(rows)
    decided = [row for row in given if row.get("winner") not in TIES]
    if given and not decided:
        raise TableError(f"all {len(given)} votes of {NAME} are ties, so nothing can be right or wrong; check the file")
    ties = f"{len(given) - len(decided)} of {len(given)} votes are ties and left out"
    few = f"; {len(given)} of {OFFICIAL_VOTES} votes: not comparable with published figures"
    return Benchmark(
        name=NAME,
        items=read_items(decided, _read, benchmark=NAME),
        judge=strictly_above,
        note=ties + (few if len(given) != OFFICIAL_VOTES else ""),
    )


SOURCE = BenchmarkSource(
    about="Human preferences of PPE, votes of the Chatbot Arena.",
    read=ppe,
    hub="lmarena-ai/PPE-Human-Preference-V1",
    splits=("test",),
    local="a Parquet or JSON-lines file",
)


def _read(row: Row) -> BenchmarkItem:
    second = one_of(row["winner"], ("model_a", "model_b"), "the winner") == "model_b"
    pair = (row["response_1"], row["response_2"])
    item = BenchmarkItem(
        item_id=str(row["question_id"]),
        subset="overall",
        messages=conversation(row["prompt"]),
        chosen=(pair[second],),
        rejected=(pair[not second],),
    )
    return item.model_copy(update={"also_in": tuple(_subsets(row, item))})


def _subsets(row: Row, item: BenchmarkItem) -> Iterator[str]:
    yield from (subset for column, subset in TAGS.items() if row.get(column))
    if len(item.chosen[0]) < len(item.rejected[0]):
        yield SHORTER_PREFERRED
    language = row.get("language")
    if language in LANGUAGES:
        yield str(language)
    if language not in (None, "English"):
        yield "not English"
