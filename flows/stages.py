"""What a person finds in Prefect after each stage of a calibration: an artifact of its result, and the run's name."""

from collections.abc import Mapping
from typing import Any

from charm_core.offsets import OffsetFit
from flows.calibration import Correction, Split
from flows.outcome import name_run
from flows.session import Session
from flows.sources import Sources
from tasks.pages.report_data import ReportVariant
from tasks.pages.report_text import mismatch_markdown
from tasks.publishing import publish_markdown, publish_table
from tasks.store import ArtifactRef
from tasks.training import TrainedModel


def show_sources(sources: Sources, split: Split) -> None:
    """Whom the reward model is held against, on what."""
    board = sources.board
    facts: dict[str, Any] = {
        "reward model": sources.name,
        "board": f"{board.name}, {board.category}, style control {'on' if board.style_control else 'off'}",
        "date of the ratings": str(board.date or ""),
        "policy models": len(sources.responses.policy_models),
        "responses to calibrate with": split.seen.responses.rows,
        "responses held out": split.unseen.responses.rows,
    }
    publish_table("calibrate-sources", [facts], "Ratings, responses and what is held out")


def show_mismatch(session: Session, evidence: ArtifactRef) -> None:
    """Where the untouched reward model disagrees with people."""
    report = session.store.read_record(evidence, ReportVariant).mismatch
    publish_markdown(
        "mismatch", mismatch_markdown(report), "Mismatch of the untouched reward model, calibration prompts"
    )


def show_correction(session: Session, sources: Sources, correction: Correction) -> None:
    """Who takes part in the correction, the offsets and the pairs; and the run's name, for now it is known what it found."""
    selection = correction.selection
    roles = {choice.policy_model: ("overvalued", choice.reason) for choice in selection.overvalued}
    roles |= {choice.policy_model: ("reference", choice.reason) for choice in selection.references}
    offsets = session.store.read_record(correction.offsets, OffsetFit).offsets
    rows = [
        {
            "policy model": one.policy_model,
            "offset": one.offset.value,
            "role": roles.get(one.policy_model, ("", ""))[0],
            "why": roles.get(one.policy_model, ("", ""))[1],
        }
        for one in offsets
    ]
    publish_table(
        "calibrate-offsets", rows, "Offsets, in the reward model's unit, and who takes part in the correction"
    )
    sets = {"calibrated": correction.pairs, "control": correction.control_pairs}
    pairs = [{"pairs for": name, **one.summary.model_dump(mode="json")} for name, one in sets.items()]
    publish_table("calibrate-pairs", pairs, "Preference pairs, and what became of the other candidates")
    name_run(session, sources.name, sources.board, f"{len(selection.overvalued)} overvalued")


def show_training(trained: Mapping[str, TrainedModel]) -> None:
    """What training met."""
    rows = [
        {"reward model": name, **one.summary.model_dump(mode="json", exclude={"evaluation_before", "evaluation_after"})}
        for name, one in trained.items()
    ]
    publish_table("calibrate-training", rows, "Fine-tuning")
