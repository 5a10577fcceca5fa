"""Is this reward model biased? Ratings and scores in, a mismatch report out. Nothing is trained.

python -m flows.audit --config benchmarks/real/audit_internlm2.toml
"""

import sys
from dataclasses import dataclass

from prefect import flow

from charm_core.errors import ConfigError
from flows.command_line import run_from_command_line
from flows.outcome import Outcome, Used, describe_provenance, finish, name_run
from flows.presets import AUDIT, demo_audit
from flows.runs import AuditRun
from flows.session import check_services, open_session
from flows.sources import Answers, Sources, gather_answers, rated, real_sources, simulated_sources
from tasks.arena import Board
from tasks.debiasing import check_offsets, choose_models
from tasks.evaluation import View, evaluate_preferences, evaluate_variant, evaluate_win_rates
from tasks.evidence import DomainParts, ReportParts, compose_report
from tasks.judging import JudgeConfig, judge_responses
from tasks.pages.report_data import ReportVariant
from tasks.pages.report_text import mismatch_markdown
from tasks.publishing import publish_markdown
from tasks.remote_scoring import RemoteScorerConfig, score_remotely
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
    answers: Answers | None = None
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@flow(name="audit", flow_run_name="audit {run.name}")
def audit(run: AuditRun = DEMO) -> Outcome:
    """Measure where a reward model, or a judge, disagrees with the Arena's human ratings."""
    with open_session("audit", run.name, run) as session:
        measured = _measure(run)
        report = session.store.read_record(measured.evidence, ReportVariant).mismatch
        publish_markdown("audit-mismatch", mismatch_markdown(report), f"Mismatch of {measured.subject}")
        selection = choose_models(measured.evidence, run.selection)
        name_run(session, measured.subject, measured.board, f"{len(selection.overvalued)} overvalued")
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
                responses=measured.answers.rows if measured.answers else (),
                warnings=measured.warnings,
                notes=(*measured.notes, *((correction.sentence(),) if correction else ())),
                provenance=describe_provenance("audit", run, used),
            )
        )
        return finish(session, composed, used)


def _measure(run: AuditRun) -> _Measured:
    if run.simulation is not None:
        return _scored(run, simulated_sources(run.simulation))
    if run.reward_model is not None:
        return _scored(run, real_sources(run.arena, run.responses, run.sampling, run.reward_model, None))
    if run.scorer is not None:
        return _scored_remotely(run, gather_answers(run.arena, run.responses, run.sampling), run.scorer)
    if run.judge is not None:
        return _judged(run, gather_answers(run.arena, run.responses, run.sampling), run.judge)
    return _loaded(run)


def _loaded(run: AuditRun) -> _Measured:
    """Scores, preferences or win rates that exist already."""
    config = run.scores or run.preferences or run.win_rates
    if config is None or run.arena is None:
        raise ConfigError("arena and something to hold against it are needed where nothing is simulated")
    load = load_scores if run.scores else load_preferences if run.preferences else load_win_rates
    loaded = load(source_file(config.source), config)
    board = rated(run.arena, loaded.policy_models)
    if run.scores is not None:
        return _Measured(
            board=board, evidence=_evidence(run, loaded.table, board), subject=_subject(config), scores=loaded.table
        )
    evaluate = evaluate_preferences if run.preferences else evaluate_win_rates
    return _Measured(
        board=board, evidence=evaluate(loaded.table, board.ratings, run.mismatch), subject=_subject(config)
    )


def _scored(run: AuditRun, sources: Sources) -> _Measured:
    scored = score_responses(sources.reward_model, sources.responses)
    return _Measured(
        board=sources.board,
        evidence=_evidence(run, scored.scores, sources.board),
        subject=sources.name,
        scores=scored.scores,
        answers=sources.answers,
        warnings=sources.warnings + sources.answers.warnings,
        notes=sources.answers.notes,
    )


def _scored_remotely(run: AuditRun, answers: Answers, scorer: RemoteScorerConfig) -> _Measured:
    scored = score_remotely(answers.responses, scorer)
    return _Measured(
        board=answers.board,
        evidence=_evidence(run, scored.scores, answers.board),
        subject=scorer.endpoint.model,
        scores=scored.scores,
        answers=answers,
        warnings=answers.warnings + scored.warnings,
        notes=answers.notes,
    )


def _judged(run: AuditRun, answers: Answers, judge: JudgeConfig) -> _Measured:
    judged = judge_responses(answers.responses, judge)
    return _Measured(
        board=answers.board,
        evidence=evaluate_preferences(judged.preferences, answers.board.ratings, run.mismatch),
        subject=judged.judge,
        answers=answers,
        warnings=answers.warnings + judged.warnings,
        notes=answers.notes + judged.sentences(),
    )


def _evidence(run: AuditRun, scores: ArtifactRef, board: Board) -> ArtifactRef:
    return evaluate_variant("untouched", scores, None, board.ratings, None, ALL, run.mismatch)


def _subject(config: ScoresConfig) -> str:
    return ", ".join(config.where.values()) or source_file(config.source).path.rsplit("/", 1)[-1]


def start(run: AuditRun) -> Outcome:
    """Check the servers and run the flow."""
    check_services()
    return audit(run)


if __name__ == "__main__":
    sys.exit(run_from_command_line("audit", AuditRun, AUDIT, start))
