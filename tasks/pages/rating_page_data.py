"""All that the page about collected ratings is made of."""

from pydantic import Field

from charm_core.rating_history import BoardSeries
from charm_core.rating_movement import BoardMovement, PairMovement
from charm_core.records import Record
from tasks.pages.report_data import Provenance


class SnapshotRow(Record):
    """One snapshot of the store."""

    board: str
    date: str
    date_kind: str
    digest: str
    models: int
    source: str = Field(description="Where it was first collected from.")
    revision: str = ""
    licence: str = ""
    attribution: str = ""
    new: bool = Field(False, description="Whether this run brought it.")


class Comparison(Record):
    """What moved between two snapshots of one board."""

    title: str
    board: str
    before: str
    """Date and digest."""
    after: str
    movement: BoardMovement
    pairs: PairMovement


class RatingHistory(Record):
    """Policy models through the dates of one or more boards, which are never mixed."""

    series: tuple[BoardSeries, ...]
    without_policy_models: tuple[str, ...] = Field((), description="Boards on which none of them is rated.")


class RatingPageData(Record):
    """All numbers and words of the page."""

    title: str
    board: str = Field(description="The board that was collected; of a history, the boards.")
    date: str = ""
    date_kind: str = ""
    digest: str = ""
    models: int = 0
    new: bool = Field(description="Whether anything was collected that the store did not have.")
    policy_models: tuple[str, ...]
    significance: float = Field(0.05, description="Error rate of the joint intervals and of the flags.")
    due: bool | None = Field(description="Whether to calibrate again; None where that cannot be judged.")
    why: str
    comparisons: tuple[Comparison, ...]
    history: RatingHistory
    snapshots: tuple[SnapshotRow, ...]
    notes: tuple[str, ...] = ()
    provenance: Provenance
