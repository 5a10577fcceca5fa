"""Which formats of tables of ratings there are; by what one is recognised, and what reads it, stands in its own file."""

from collections.abc import Mapping, Sequence

from charm_core.errors import RatingsError
from charm_core.leaderboard_history import OFFICIAL, SNAPSHOTS
from charm_core.leaderboards import MIRROR, RATINGS_TABLE, TableFormat
from charm_core.raw_battles import VOTES

FORMATS: Mapping[str, TableFormat] = {
    "ratings": RATINGS_TABLE,
    "snapshots": SNAPSHOTS,
    "official": OFFICIAL,
    "mirror": MIRROR,
    "battles": VOTES,
}
"""By what messages call them; of two that a table fits, the first one counts."""


def table_format(columns: Sequence[str]) -> TableFormat:
    """Recognise a table by its columns.

    Raises:
        RatingsError: No known format; the closest one is named with what it lacks.
    """
    for known in FORMATS.values():
        if set(known.columns) <= set(columns):
            return known
    share = {name: len(set(known.columns) & set(columns)) / len(known.columns) for name, known in FORMATS.items()}
    closest = max(FORMATS, key=lambda name: share[name])
    needed = FORMATS[closest].columns
    missing = [column for column in needed if column not in columns]
    raise RatingsError(
        f"the columns {list(columns)} are those of no leaderboard format that CHARM knows; expected for the closest one, "
        f"{closest!r}: {list(needed)}, of which it lacks the columns {missing}; if the publisher changed the "
        f"format, rename the columns"
    )
