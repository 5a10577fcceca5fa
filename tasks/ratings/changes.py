"""What is new on a board: compare snapshots, trace policy models through all dates, compose the page."""

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from charm_core.elo import Alias, nearest_names, present_ratings
from charm_core.errors import RatingsError
from charm_core.rating_history import DatedRatings, board_series
from charm_core.rating_movement import BoardMovement, PairMovement, RecalibrationRule, board_movement, pair_movement
from charm_core.records import Record
from charm_core.tables import RATINGS
from tasks.arena import Board, read_aliases
from tasks.caching import step
from tasks.pages.rating_page import render_rating_page
from tasks.pages.rating_page_data import Comparison, RatingHistory, RatingPageData, SnapshotRow
from tasks.pages.report_data import Provenance
from tasks.store import ArtifactRef, ArtifactStore, SourceFile

_MOST_WITHOUT_POLICY_MODELS = 8


class PolicyNames(BaseModel):
    """Policy models, and how boards call them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    policy_models: tuple[str, ...]
    aliases: SourceFile | None = None
    accept_near: tuple[str, ...] = ()

    def table(self) -> list[Alias]:
        """The reviewed aliases."""
        return read_aliases(self.aliases) if self.aliases else []


class Movement(Record):
    """What moved between two snapshots, stored."""

    board: BoardMovement
    pairs: PairMovement


class ComparedBoards(BaseModel):
    """A comparison, by what is stored about it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    before: Board
    after: Board
    movement: ArtifactRef


class RatingPageParts(BaseModel):
    """All that the page is made of."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    boards: tuple[Board, ...]
    new: bool
    names: PolicyNames
    significance: float
    due: bool | None
    why: str
    comparisons: tuple[ComparedBoards, ...]
    history: ArtifactRef
    snapshots: tuple[SnapshotRow, ...]
    notes: tuple[str, ...] = ()
    provenance: Provenance


class RatingPage(BaseModel):
    """The finished page."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    html: ArtifactRef
    data: ArtifactRef


@step(version=1)
def compare_boards(
    store: ArtifactStore, before: Board, after: Board, names: PolicyNames, rule: RecalibrationRule
) -> ArtifactRef:
    """What moved from one snapshot of a board to another."""
    old, new = (store.read_table(board.ratings, RATINGS) for board in (before, after))
    aliases = names.table()
    rated = [
        present_ratings(ratings, names.policy_models, aliases, accept_near=names.accept_near) for ratings in (old, new)
    ]
    movement = Movement(
        board=board_movement(old, new, significance=rule.significance), pairs=pair_movement(rated[0], rated[1], rule)
    )
    return store.write_record(movement, "rating_movement")


@step(version=1)
def trace_boards(
    store: ArtifactStore, boards: tuple[Board, ...], names: PolicyNames, rule: RecalibrationRule
) -> ArtifactRef:
    """Policy models through the dates of boards; without any, the highest-rated models of each board's last date."""
    aliases, series, without, found = names.table(), [], [], set()
    for name, dated in by_board(boards).items():
        tables = [store.read_table(board.ratings, RATINGS) for board in dated]
        top = tables[-1].sort("rating", descending=True).head(_MOST_WITHOUT_POLICY_MODELS)
        models = names.policy_models or tuple(top.get_column("policy_model"))
        rated = [present_ratings(table, models, aliases, accept_near=names.accept_near) for table in tables]
        found |= {model for table in rated for model in table.get_column("policy_model")}
        if all(table.is_empty() for table in rated):
            without.append(name)
            continue
        dates = [
            DatedRatings(date=board.date, ratings=table, rated=few, snapshot=board.snapshot or "")
            for board, table, few in zip(dated, tables, rated, strict=True)
            if board.date is not None
        ]
        series.append(board_series(name, dates, rule, date_kind=dated[-1].date_kind))
    _require_rated(store, names, found, boards[-1])
    return store.write_record(
        RatingHistory(series=tuple(series), without_policy_models=tuple(without)), "rating_history"
    )


@step(version=1)
def compose_rating_page(store: ArtifactStore, parts: RatingPageParts) -> RatingPage:
    """Gather the results and render the page."""
    one = parts.boards[0] if len(parts.boards) == 1 else None
    data = RatingPageData(
        title=parts.title,
        board="; ".join(by_board(parts.boards)),
        date=str(one.date or "") if one else "",
        date_kind=one.date_kind if one else "",
        digest=(one.snapshot or "") if one else "",
        models=(one.ratings.rows or 0) if one else 0,
        new=parts.new,
        policy_models=parts.names.policy_models,
        significance=parts.significance,
        due=parts.due,
        why=parts.why,
        comparisons=tuple(_comparison(store, compared) for compared in parts.comparisons),
        history=store.read_record(parts.history, RatingHistory),
        snapshots=parts.snapshots,
        notes=parts.notes,
        provenance=parts.provenance,
    )
    return RatingPage(
        html=store.write_bytes(render_rating_page(data).encode(), "rating_page", ".html"),
        data=store.write_record(data, "rating_page_data"),
    )


def by_board(boards: Sequence[Board]) -> dict[str, list[Board]]:
    """Boards by which one they are of, each in order of date; of one date in the given order."""
    found: dict[str, list[Board]] = {}
    for board in sorted(boards, key=lambda board: str(board.date)):
        found.setdefault(board.named().shown(), []).append(board)
    return dict(sorted(found.items()))


def _require_rated(store: ArtifactStore, names: PolicyNames, found: set[str], last: Board) -> None:
    missing = sorted(set(names.policy_models) - found)
    if missing:
        known = store.read_table(last.ratings, RATINGS).get_column("policy_model").to_list()
        hints = "; ".join(f"{model!r} ({nearest_names(model, known)})" for model in missing)
        raise RatingsError(f"never rated on these boards: {hints}; correct the names or add reviewed aliases")


def _comparison(store: ArtifactStore, compared: ComparedBoards) -> Comparison:
    movement = store.read_record(compared.movement, Movement)
    return Comparison(
        title=compared.title,
        board=next(iter(by_board([compared.after]))),
        before=_label(compared.before),
        after=_label(compared.after),
        movement=movement.board,
        pairs=movement.pairs,
    )


def _label(board: Board) -> str:
    return f"{board.date} ({(board.snapshot or '')[:12]})"
