"""Is this reward model biased? Ratings and scores in, a mismatch report out. Nothing is trained.

python -m flows.audit --config benchmarks/real/audit_internlm2.toml
"""

import sys
from dataclasses import dataclass

from prefect import flow

from flows.command_line import run_from_command_line
from flows.outcome import Outcome, Used, describe_provenance, finish
from flows.presets import AUDIT, demo_audit
from flows.runs import AuditRun
from flows.session import check_services, open_session
from flows.sources import gather_sources, rated
from tasks.arena import Board
from tasks.debiasing import check_offsets, choose_models
from tasks.evaluation import View, evaluate_preferences, evaluate_variant, evaluate_win_rates
from tasks.evidence import DomainParts, ReportParts, compose_report
from tasks.publishing import publish_markdown
from tasks.report_data import ReportVariant
from tasks.report_text import mismatch_markdown
from tasks.scoring import ScoresConfig, load_preferences, load_scores, load_win_rates, score_responses
from tasks.store import ArtifactRef, source_file

ALL = View(label="all prompts")

DEMO = demo_audit()
"""What a deployment runs if nothing else is asked for."""


@dataclass(frozen=True, kw_only=True)
class _Measured:
    board: Board
    evidence: ArtifactRef
    subject: str
    scores: ArtifactRef | None = None


@flow(name="audit", flow_run_name="audit {run.name}")
def audit(run: AuditRun = DEMO) -> Outcome:
    """Measure where a reward model, or a judge, disagrees with the Arena's human ratings."""
    with open_session("audit", run.name, run) as session:
        measured = _measure(run)
        report = session.store.read_record(measured.evidence, ReportVariant).mismatch
        publish_markdown("audit-mismatch", mismatch_markdown(report), f"Mismatch of {measured.subject}")
        selection = choose_models(measured.evidence, run.selection)
        correction = (
            check_offsets(measured.scores, measured.board.ratings, run.calibration, run.offset_splits)
            if measured.scores and run.offset_splits
            else None
        )
        inputs = {"ratings": measured.board.ratings, **({"scores": measured.scores} if measured.scores else {})}
        used = Used(inputs=inputs, outputs={"evidence": measured.evidence})
        composed = compose_report(
            ReportParts(
                kind="audit",
                title=run.name,
                reward_model=measured.subject,
                simulated=run.simulation is not None,
                board=measured.board,
                domains=(DomainParts(label=ALL.label, variants=(measured.evidence,)),),
                selection=selection,
                notes=(correction.sentence(),) if correction else (),
                provenance=describe_provenance("audit", run, used),
            )
        )
        return finish(session, composed, used)


def _measure(run: AuditRun) -> _Measured:
    if run.preferences is not None and run.arena is not None:
        loaded = load_preferences(source_file(run.preferences.source), run.preferences)
        board = rated(run.arena, loaded.policy_models)
        evidence = evaluate_preferences(loaded.table, board.ratings, run.mismatch)
        return _Measured(board=board, evidence=evidence, subject=_subject(run.preferences))
    if run.win_rates is not None and run.arena is not None:
        loaded = load_win_rates(source_file(run.win_rates.source), run.win_rates)
        board = rated(run.arena, loaded.policy_models)
        evidence = evaluate_win_rates(loaded.table, board.ratings, run.mismatch)
        return _Measured(board=board, evidence=evidence, subject=_subject(run.win_rates))
    if run.scores is not None and run.arena is not None:
        loaded = load_scores(source_file(run.scores.source), run.scores)
        board = rated(run.arena, loaded.policy_models)
        return _measured_scores(run, board, loaded.table, _subject(run.scores))
    return _scored(run)


def _scored(run: AuditRun) -> _Measured:
    sources = gather_sources(run.simulation, run.arena, run.responses, run.reward_model)
    scored = score_responses(sources.reward_model, sources.responses)
    return _measured_scores(run, sources.board, scored.scores, sources.name)


def _measured_scores(run: AuditRun, board: Board, scores: ArtifactRef, subject: str) -> _Measured:
    evidence = evaluate_variant("untouched", scores, None, board.ratings, None, ALL, run.mismatch)
    return _Measured(board=board, evidence=evidence, subject=subject, scores=scores)


def _subject(config: ScoresConfig) -> str:
    return ", ".join(config.where.values()) or source_file(config.source).path.rsplit("/", 1)[-1]


def start(run: AuditRun) -> str:
    """Run the flow and return its summary."""
    check_services()
    return audit(run).summary


if __name__ == "__main__":
    sys.exit(run_from_command_line("audit", AuditRun, AUDIT, start))
