"""Other Arena ratings? Calibrate a reward model again, and only what depends on them; the promotion gate decides what becomes of it.

Started by the event that collect_ratings sends (see prefect.yaml), or by hand with the settings of the calibration:

python -m flows.recalibrate --config calibrate.toml
python -m flows.recalibrate --config calibrate.toml --arena.source "" --arena.snapshot 2025-02-28
"""

import sys
from uuid import UUID

from prefect import flow
from prefect.runtime import flow_run
from pydantic import BaseModel, ConfigDict, Field

from charm_core.errors import ConfigError
from flows.calibrate import calibrate
from flows.command_line import run_from_command_line
from flows.outcome import Outcome
from flows.presets import RECALIBRATE, demo_recalibration
from flows.runs import CalibrationRun, RecalibrationRun
from flows.session import check_services
from flows.settings import RuntimeSettings, find_secret
from tasks.abandoned_flow_runs import claim_flow_run
from tasks.arena import ArenaConfig, obtain_board
from tasks.caching import use_store
from tasks.publishing import publish_markdown, rename_flow_run, run_logger
from tasks.ratings.snapshots import KeptSnapshot, find_snapshot, list_snapshots
from tasks.recalibration import RatingsUpdate, last_calibration, one_recalibration, settings_digest
from tasks.secrets import use_secrets
from tasks.store import ArtifactStore

DEMO = demo_recalibration()
"""What a deployment runs if nothing else is asked for."""


class RecalibrationOutcome(BaseModel):
    """What became of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    calibration: Outcome | None = Field(description="What the calibration left behind; None where none was needed.")
    summary: str = Field(description="What was done and why, in a few lines.")


@flow(name="recalibrate", flow_run_name="recalibrate {run.name}")
def recalibrate(run: RecalibrationRun = DEMO, update: RatingsUpdate | None = None) -> RecalibrationOutcome:
    """Calibrate a reward model to other ratings than before, unless that has been done already.

    Args:
        run: The settings of the calibration.
        update: What the event says; without it the latest snapshot in the store of the board that run.arena names is taken.
    """
    claim_flow_run(UUID(str(flow_run.id)))
    why_not = _not_meant(run, update)
    if why_not:
        return _nothing_to_do(run, why_not)
    store = RuntimeSettings().artifact_store()
    store.check_writable()
    with use_store(store), use_secrets(find_secret), one_recalibration(store, run.registered_name):
        kept = _ratings(store, run, update)
        why_not = _done_already(store, run, kept, update)
        if why_not:
            return _nothing_to_do(run, why_not)
        rename_flow_run(f"recalibrate {run.registered_name} · board {_shown(kept)}")
        reason = _reason(store, run, kept, update)
        run_logger().info(reason)
        return _said(calibrate(_pinned(run, kept)), reason)


def _not_meant(run: RecalibrationRun, update: RatingsUpdate | None) -> str:
    """Why it is not this flow's business; empty if it is.

    Raises:
        ConfigError: There is news, and nobody has said yet what is to be calibrated.
    """
    if run.arena is None and update is not None:
        raise ConfigError(
            f"there are other ratings for {update.model}, but {run.registered_name} is calibrated in a simulated arena; give this "
            f"deployment the settings of the calibration (its parameter run)"
        )
    if run.arena is None:
        return "Nothing to do: a simulated arena has no other ratings. Give arena, responses and reward_model."
    if update is not None and update.model != run.registered_name:
        return f"Nothing to do: the ratings are news for {update.model}, and this calibrates {run.registered_name}."
    return ""


def _ratings(store: ArtifactStore, run: RecalibrationRun, update: RatingsUpdate | None) -> KeptSnapshot:
    """The snapshot to calibrate to.

    Raises:
        RatingsError: It is not in the store, or not of the board that the settings name.
    """
    arena = run.arena
    if arena is None:
        raise ConfigError("arena is missing")
    if update is not None:
        asked = {"arena": arena.arena, "category": arena.category, "style_control": arena.style_control}
        return find_snapshot(
            store, update.after.snapshot, asked | ({"publisher": arena.publisher} if arena.publisher else {})
        )
    board = obtain_board(arena)
    named = find_snapshot(store, board.snapshot or "", board.named().model_dump())
    return named if arena.snapshot is not None else (_later(store, named) or named)


def _later(store: ArtifactStore, kept: KeptSnapshot) -> KeptSnapshot | None:
    """The latest snapshot of the same board, if it is of a later date."""
    same = [one for one in list_snapshots(store) if one.snapshot.board == kept.snapshot.board]
    last = max(same, key=_date, default=kept)
    return last if _date(last) > _date(kept) else None


def _done_already(store: ArtifactStore, run: RecalibrationRun, kept: KeptSnapshot, update: RatingsUpdate | None) -> str:
    """Why there is nothing to do; empty if there is."""
    made = last_calibration(store, run.registered_name, kept.snapshot.board)
    if made is None or made.settings != settings_digest(run):
        return ""
    calibrated = f"Nothing to do: {run.registered_name} (version {made.version}) is calibrated"
    if made.snapshot == kept.digest:
        return f"{calibrated} to the ratings of {_shown(kept)} with these settings already."
    if update is not None and str(made.date) > _date(kept):
        return f"{calibrated} to later ratings already, of {made.date}; these are of {_shown(kept)}."
    return ""


def _reason(store: ArtifactStore, run: RecalibrationRun, kept: KeptSnapshot, update: RatingsUpdate | None) -> str:
    made = last_calibration(store, run.registered_name, kept.snapshot.board)
    before = f"from {made.date or 'undated'} ({made.snapshot[:12]})" if made else "for the first time on this board"
    lines = [f"{run.registered_name} is calibrated to the ratings of {_shown(kept)}, {before}."]
    lines += [f"Why: {update.why}."] if update and update.why else []
    later = _later(store, kept)
    lines += [f"There are later ratings in the store, of {_shown(later)}."] if later else []
    return "\n".join(lines)


def _pinned(run: RecalibrationRun, kept: KeptSnapshot) -> CalibrationRun:
    """The calibration with ratings that cannot change."""
    settings = {name: getattr(run, name) for name in CalibrationRun.model_fields}
    names = run.arena.model_dump(include={"aliases", "accept_near"}) if run.arena else {}
    board = kept.snapshot.board.model_dump(exclude={"name"})
    return CalibrationRun(**settings | {"arena": ArenaConfig(snapshot=kept.digest, **board, **names)})


def _nothing_to_do(run: RecalibrationRun, why: str) -> RecalibrationOutcome:
    rename_flow_run(f"recalibrate {run.registered_name} · nothing to do")
    run_logger().info(why)
    return _said(None, why)


def _said(calibration: Outcome | None, sentence: str) -> RecalibrationOutcome:
    publish_markdown("recalibration", sentence, "What was calibrated to which ratings, and why")
    summary = f"{sentence}\n\n{calibration.summary}" if calibration else sentence
    return RecalibrationOutcome(calibration=calibration, summary=summary)


def _date(kept: KeptSnapshot) -> str:
    return str(kept.snapshot.date or "")


def _shown(kept: KeptSnapshot) -> str:
    return f"{kept.snapshot.date or 'undated'} ({kept.short})"


def start(run: RecalibrationRun) -> RecalibrationOutcome:
    """Check the servers and run the flow."""
    check_services()
    return recalibrate(run)


if __name__ == "__main__":
    sys.exit(run_from_command_line("recalibrate", RecalibrationRun, RECALIBRATE, start))
