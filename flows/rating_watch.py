"""Watching the ratings of a calibrated reward model: what a collection compares with, when that is settled, whom it tells."""

from charm_core.errors import RatingsError
from flows.runs import CollectRatingsRun
from tasks.arena import Board, board_of
from tasks.publishing import run_logger
from tasks.ratings.changes import ComparedBoards, Movement, PolicyNames
from tasks.ratings.snapshots import find_snapshot
from tasks.recalibration import RatingsUpdate, SnapshotDate, announce, calibrations, last_calibration
from tasks.store import ArtifactStore, source_file


def policy_names(store: ArtifactStore, run: CollectRatingsRun) -> PolicyNames:
    """The policy models to watch: those that are named, or else those of the calibrated model that is watched for."""
    made = calibrations(store, run.recalibrates)[-1:] if run.recalibrates else ()
    return PolicyNames(
        policy_models=run.policy_models or tuple(name for one in made for name in one.policy_models),
        aliases=source_file(run.arena.aliases) if run.arena.aliases else None,
        accept_near=run.arena.accept_near,
    )


def since_board(store: ArtifactStore, run: CollectRatingsRun, board: Board) -> Board | None:
    """The ratings to compare a board with, if they are named or a model is calibrated to them; None: the usual ones.

    Raises:
        RatingsError: They are not in the store.
    """
    made = last_calibration(store, run.recalibrates, board.named()) if run.recalibrates else None
    pin = run.since or (made.snapshot if made else None)
    if pin is None:
        return None
    kept = find_snapshot(store, pin, board.named().model_dump())
    return None if kept.digest == board.snapshot else board_of(kept)


def since_what(run: CollectRatingsRun) -> str:
    """What those ratings are, for the title of the comparison."""
    if run.since is None and run.recalibrates:
        return f"the snapshot that {run.recalibrates} is calibrated to"
    return "the snapshot that was asked for"


def settled_decision(store: ArtifactStore, model: str, board: Board) -> tuple[bool | None, str] | None:
    """Whether to calibrate a registered model again, and why, where that needs no comparison; None where it does."""
    made = last_calibration(store, model, board.named())
    if made is None:
        return (
            None,
            f"no calibration of {model} to this board is known here; calibrate it, then its ratings are watched",
        )
    calibrated = f"{model} (version {made.version}) is calibrated to"
    if made.snapshot == board.snapshot:
        return False, f"{calibrated} this snapshot"
    if str(made.date) > str(board.date):
        return False, f"{calibrated} a later snapshot, of {made.date}"
    return None


def tell_of_movement(store: ArtifactStore, model: str, compared: ComparedBoards, why: str) -> str:
    """Tell Prefect that the ratings of a calibrated reward model have moved; say what was done.

    Raises:
        ServiceError: The Prefect server does not answer.
    """
    pairs = store.read_record(compared.movement, Movement).pairs
    told = announce(
        RatingsUpdate(
            model=model,
            board=compared.after.named(),
            before=_dated(compared.before),
            after=_dated(compared.after),
            pairs=len(pairs.pairs),
            moved=len(pairs.moved),
            largest=pairs.largest,
            mean=pairs.mean,
            why=why,
        )
    )
    run_logger().info(told)
    return told


def _dated(board: Board) -> SnapshotDate:
    if board.snapshot is None:
        raise RatingsError(f"{board.source} is not kept as a snapshot, so nothing can be calibrated to it")
    return SnapshotDate(snapshot=board.snapshot, date=board.date)
