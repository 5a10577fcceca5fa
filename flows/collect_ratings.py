"""New Arena ratings? Collect a board, keep it as a snapshot, and say whether the win probabilities that matter have moved.

python -m flows.collect_ratings --config benchmarks/real/collect_ratings.toml
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import polars as pl
from prefect import flow
from pydantic import BaseModel, ConfigDict, Field

from charm_core.errors import ConfigError
from charm_core.rating_history import BoardSeries, first_complete
from charm_core.rating_movement import across_boards
from flows.command_line import run_from_command_line
from flows.outcome import Used, describe_provenance, name_run
from flows.presets import COLLECT_RATINGS, official_ratings
from flows.rating_watch import policy_names, settled_decision, since_board, since_what, tell_of_movement
from flows.runs import CollectRatingsRun
from flows.session import Session, check_services, open_session
from tasks.arena import DATE_NOTES, Board, board_of, kept_note, match_ratings, obtain_board, obtain_history
from tasks.pages.rating_page import rating_figures_for_tracking
from tasks.pages.rating_page_data import RatingHistory, RatingPageData, SnapshotRow
from tasks.pages.rating_text import rating_summary
from tasks.publishing import publish_link, publish_markdown, publish_table
from tasks.ratings.changes import (
    ComparedBoards,
    Movement,
    PolicyNames,
    RatingPage,
    RatingPageParts,
    by_board,
    compare_boards,
    compose_rating_page,
    trace_boards,
)
from tasks.ratings.snapshots import KeptSnapshot, list_snapshots
from tasks.store import ArtifactRef, ArtifactStore

OFFICIAL = official_ratings()
"""What a deployment runs if nothing else is asked for."""


class RatingsOutcome(BaseModel):
    """What collecting ratings leaves behind."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    page: ArtifactRef = Field(description="The HTML page.")
    data: ArtifactRef = Field(description="All of its numbers, as JSON.")
    snapshots: tuple[str, ...] = Field(description="Digests of the snapshots that were collected.")
    new_snapshots: tuple[str, ...] = Field(description="Those that the store did not have.")
    due: bool | None = Field(description="Whether to calibrate again; None where that cannot be judged.")
    why: str
    told: str = Field(default="", description="Whether and how Prefect was told that a calibration is due.")
    tracking_url: str = Field(description="Page of the MLflow run.")
    summary: str = Field(description="The result in a few lines.")


@dataclass(frozen=True, kw_only=True)
class _Collected:
    """Boards as they are now, those to plot, and what the store had before."""

    boards: tuple[Board, ...]
    traced: tuple[Board, ...]
    known: frozenset[str]
    notes: tuple[str, ...] = ()

    @property
    def new(self) -> tuple[str, ...]:
        """Digests that the store did not have."""
        return tuple(board.snapshot for board in self.boards if board.snapshot and board.snapshot not in self.known)


@flow(name="collect_ratings", flow_run_name="collect ratings {run.name}")
def collect_ratings(run: CollectRatingsRun = OFFICIAL) -> RatingsOutcome:
    """Collect Arena ratings, and say what is new since the last ones and whether a re-calibration is due."""
    with open_session("collect_ratings", run.name, run) as session:
        names = policy_names(session.store, run)
        collected = _collect_history(session.store, run) if run.history else _collect_board(session.store, run, names)
        history = trace_boards(collected.traced, names, run.recalibration)
        comparisons = _compare(session.store, run, names, collected, history)
        due, why = _decide(session.store, run, names, collected, comparisons)
        name_run(session, "", collected.boards[-1], "re-calibration due" if due else "", page="ratings.html")
        used = Used(
            inputs={_dataset_name(board): board.ratings for board in collected.boards[-20:]},
            outputs={"history": history},
        )
        page = compose_rating_page(
            RatingPageParts(
                title=run.name,
                boards=collected.boards,
                new=bool(collected.new),
                names=names,
                significance=run.recalibration.significance,
                due=due,
                why=why,
                comparisons=comparisons,
                history=history,
                snapshots=_rows(list_snapshots(session.store), collected.known),
                notes=collected.notes,
                provenance=describe_provenance("collect_ratings", run, used),
            )
        )
        outcome = _finish(session, page, collected, used)
        if run.recalibrates is None or not due:
            return outcome
        # last: if nobody can be told, all else is done
        told = tell_of_movement(session.store, run.recalibrates, comparisons[0], why)
        return outcome.model_copy(update={"told": told, "summary": f"{outcome.summary}\n{told}"})


def _collect_board(store: ArtifactStore, run: CollectRatingsRun, names: PolicyNames) -> _Collected:
    known = frozenset(kept.digest for kept in list_snapshots(store))
    board = _dated(obtain_board(run.arena))
    # every policy model must be on the board as it is now; on earlier dates some may not be rated yet
    if names.policy_models:
        match_ratings(board, names.policy_models, names.aliases, names.accept_near)
    same = [
        one for one in list_snapshots(store) if one.snapshot.board == board.named() and one.digest != board.snapshot
    ]
    earlier = [one for one in map(board_of, same) if str(one.date) <= str(board.date) and one.date is not None]
    # the page has places of its own for the kind of date and the digest
    shown = {*DATE_NOTES.values(), kept_note(board.snapshot or "")}
    versions = [
        f"another version of this date is in the store: {(one.snapshot or '')[:12]}"
        for one in earlier
        if one.date == board.date
    ]
    notes = [note for note in board.notes if note not in shown]
    return _Collected(boards=(board,), traced=(*earlier, board), known=known, notes=(*notes, *versions))


def _collect_history(store: ArtifactStore, run: CollectRatingsRun) -> _Collected:
    known = frozenset(kept.digest for kept in list_snapshots(store))
    configs = [run.arena]
    if run.both_styles:
        configs.append(run.arena.model_copy(update={"style_control": not run.arena.style_control}))
    histories = [obtain_history(config) for config in configs]
    boards = tuple(_dated(board) for history in histories for board in history.boards)
    notes = tuple(dict.fromkeys(note for history in histories for note in history.notes))
    return _Collected(boards=boards, traced=boards, known=known, notes=notes)


def _compare(
    store: ArtifactStore, run: CollectRatingsRun, names: PolicyNames, collected: _Collected, history: ArtifactRef
) -> tuple[ComparedBoards, ...]:
    """The last date of every board against the one that the user named, or else the usual one."""
    found = []
    series = {one.board: one for one in store.read_record(history, RatingHistory).series}
    for board, dated in by_board(collected.traced).items():
        last = dated[-1]
        since = since_board(store, run, last)
        if since is not None:
            found.append((f"Since {since_what(run)}", since, last))
        if since is None and len(dated) > 1 and board in series:
            found.append(_usual(run, series[board], dated))
    return tuple(
        ComparedBoards(
            title=title,
            before=before,
            after=after,
            movement=compare_boards(before, after, names, run.recalibration),
        )
        for title, before, after in found
    )


def _usual(run: CollectRatingsRun, series: BoardSeries, dated: Sequence[Board]) -> tuple[str, Board, Board]:
    """The date before; of a history the first date that has all policy models, for the dates between are compared one by one."""
    first = first_complete(series)
    if run.history and first < len(dated) - 2:
        return "Since the first date with all of these policy models", dated[first], dated[-1]
    return "Since the date before", dated[-2], dated[-1]


def _decide(
    store: ArtifactStore,
    run: CollectRatingsRun,
    names: PolicyNames,
    collected: _Collected,
    comparisons: Sequence[ComparedBoards],
) -> tuple[bool | None, str]:
    settled = settled_decision(store, run.recalibrates, collected.boards[-1]) if run.recalibrates else None
    if settled is not None:
        return settled
    if not names.policy_models:
        return None, "no policy models are named in policy_models, so there are no win probabilities to watch"
    if not comparisons:
        return None, "there is no other snapshot of this board to compare with"
    moved = [(compared, store.read_record(compared.movement, Movement).pairs) for compared in comparisons]
    if not run.history:
        compared, pairs = moved[0]
        return pairs.due, f"since {compared.before.date} {pairs.why}"
    due, why = across_boards([(next(iter(by_board([compared.after]))), pairs) for compared, pairs in moved])
    since = "the snapshot that was asked for" if run.since else "the first date with all of these policy models"
    return due, f"since {since}, {why}"


def _dated(board: Board) -> Board:
    if board.date is None:
        raise ConfigError(f"{board.source} does not say of which date it is; set arena.date")
    return board


def _dataset_name(board: Board) -> str:
    return (
        f"ratings {board.publisher} {board.category}{' style-controlled' if board.style_control else ''} {board.date}"
    )


def _rows(snapshots: Sequence[KeptSnapshot], known: frozenset[str]) -> tuple[SnapshotRow, ...]:
    return tuple(
        SnapshotRow(
            board=kept.snapshot.board.shown(),
            date=str(kept.snapshot.date or ""),
            date_kind=kept.snapshot.date_kind,
            digest=kept.digest,
            models=kept.snapshot.ratings.rows or 0,
            source=kept.snapshot.url,
            revision=kept.snapshot.revision or "",
            licence=kept.snapshot.licence,
            attribution=kept.snapshot.attribution,
            new=kept.digest not in known,
        )
        for kept in snapshots
    )


def _finish(session: Session, page: RatingPage, collected: _Collected, used: Used) -> RatingsOutcome:
    """Log the page and its numbers, link it in Prefect, and say what came out; runs on every run, cached steps or not."""
    data = session.store.read_record(page.data, RatingPageData)
    session.run.log_metrics(_metrics(data))
    session.run.log_datasets(used.inputs, "input")
    session.run.log_datasets(used.outputs, "output")
    session.run.log_text(session.store.read_bytes(page.html).decode(), "ratings.html")
    session.run.log_text(data.model_dump_json(indent=1), "ratings.json")
    for name, drawn in rating_figures_for_tracking(data).items():
        session.run.log_text(drawn.decode(), f"figures/{name}")
    if _pair_rows(data):
        session.run.log_table(pl.DataFrame(_pair_rows(data), infer_schema_length=None), "win_probabilities.json")
    summary = rating_summary(data)
    path = page.html.uri if not urlsplit(page.html.uri).scheme else None
    publish_link(
        "collect-ratings-page", Path(path).as_uri() if path else page.html.uri, "Ratings", summary.splitlines()[0]
    )
    publish_table("collect-ratings-pairs", _pair_rows(data), "Win probabilities among the policy models")
    publish_table("collect-ratings-snapshots", [row.model_dump() for row in data.snapshots], "Snapshots in the store")
    publish_markdown("collect-ratings-summary", f"```\n{summary}\n```", "Summary")
    pages = f"Ratings  {path or page.html.uri}\nMLflow   {session.run.url}  (`make mlflow-ui` opens the pages)"
    return RatingsOutcome(
        page=page.html,
        data=page.data,
        snapshots=tuple(board.snapshot for board in collected.boards if board.snapshot),
        new_snapshots=collected.new,
        due=data.due,
        why=data.why,
        tracking_url=session.run.url,
        summary=f"{summary}\n{pages}",
    )


def _metrics(data: RatingPageData) -> Mapping[str, float | None]:
    metrics: dict[str, float | None] = {
        "recalibration due": None if data.due is None else float(data.due),
        "new snapshots": float(sum(row.new for row in data.snapshots)),
    }
    for index, item in enumerate(data.comparisons):
        name = f"comparison {index + 1}"
        metrics[f"{name}/largest change of a win probability"] = item.pairs.largest
        metrics[f"{name}/mean change of win probabilities"] = item.pairs.mean
        metrics[f"{name}/pairs moved"] = float(len(item.pairs.moved))
        metrics[f"{name}/models added"] = float(len(item.movement.added))
        metrics[f"{name}/models dropped"] = float(len(item.movement.dropped))
        metrics[f"{name}/models moved"] = float(len(item.movement.moved))
        metrics[f"{name}/anchor shift"] = item.movement.shift
    return metrics


def _pair_rows(data: RatingPageData) -> list[dict[str, object]]:
    return [
        {
            "board": item.board,
            "from": item.before,
            "to": item.after,
            "policy model": pair.model_a,
            "over": pair.model_b,
            "before": pair.before,
            "after": pair.after,
            "change": pair.change.value,
            "low": pair.change.low,
            "high": pair.change.high,
            "p (Holm)": pair.p_value_holm,
            "moved": pair.moved,
        }
        for item in data.comparisons
        for pair in item.pairs.pairs
    ]


def start(run: CollectRatingsRun) -> RatingsOutcome:
    """Check the servers and run the flow."""
    check_services()
    return collect_ratings(run)


if __name__ == "__main__":
    sys.exit(run_from_command_line("collect_ratings", CollectRatingsRun, COLLECT_RATINGS, start))
