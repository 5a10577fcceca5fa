"""The main job, end to end: measure where a reward model disagrees with people, correct it, show whether that worked.

python -m flows.calibrate --preset demo
python -m flows.calibrate --config benchmarks/real/calibrate_minilm.toml
"""

import sys
from collections.abc import Mapping

from prefect import flow

from charm_core.best_of_n import BestOfNConfig, BestOfNReport
from charm_core.errors import ConfigError
from charm_core.responses import HELD_OUT
from flows.calibration import (
    Correction,
    Split,
    calibration_sources,
    correct,
    hold_out,
    judged_views,
    knowing_scores,
    measure_untouched,
)
from flows.command_line import run_from_command_line
from flows.outcome import Outcome, Used, describe_provenance, finish
from flows.presets import CALIBRATE, demo
from flows.runs import CalibrationRun
from flows.session import Session, check_services, open_session
from flows.sources import Sources
from flows.stages import show_correction, show_mismatch, show_sources, show_training
from tasks.benchmarking import run_benchmarks
from tasks.best_of_n import best_of_n_metrics, pick_best_of_n
from tasks.debiasing import (
    offset_scores,
    rate_by_scores,
)
from tasks.evaluation import View, compare_styles, compare_variants, evaluate_variant, judge_truth
from tasks.evidence import CurveParts, DomainParts, Report, ReportParts, compose_report
from tasks.model_registry import split_version
from tasks.pages.best_of_n_table import best_of_n_markdown
from tasks.pages.report_data import VariantName
from tasks.promotion import score_again
from tasks.publishing import publish_markdown
from tasks.recalibration import note_calibration, settings_digest
from tasks.registry import judge_promotion, package_model, register_model
from tasks.scoring import Scored, load_preferences, score_responses
from tasks.store import ArtifactRef, source_file
from tasks.training import TrainedModel, log_training, ratings_for, train_reward_model

DEMO = demo()
"""What a deployment runs if nothing else is asked for."""

COMPARED: tuple[tuple[VariantName, VariantName], ...] = (
    ("untouched", "calibrated"),
    ("control", "calibrated"),
    ("untouched", "offsets"),
)
"""Every claimed gain is against the control as well as against the untouched reward model."""


BASELINES: tuple[VariantName, ...] = ("untouched", "control")


@flow(name="calibrate", flow_run_name="calibrate {run.name}")
def calibrate(run: CalibrationRun = DEMO) -> Outcome:
    """Calibrate a reward model with the Arena's human ratings, and prove what it did."""
    with open_session("calibrate", run.name, run) as session:
        sources = calibration_sources(run)
        split = hold_out(run, sources)
        show_sources(sources, split)
        scored_seen = score_responses(sources.reward_model, split.seen)
        mismatch = measure_untouched(run, sources, scored_seen)
        show_mismatch(session, mismatch)
        correction = correct(run, sources.board.ratings, split, scored_seen, mismatch)
        show_correction(session, sources, correction)
        calibrated, control = _fine_tune(session, run, sources, scored_seen, correction)
        show_training({"calibrated": calibrated, "control": control})
        untouched = score_responses(sources.reward_model, split.unseen)
        scored: dict[VariantName, Scored] = {
            "untouched": untouched,
            "offsets": Scored(scores=offset_scores(untouched.scores, correction.offsets), summary=untouched.summary),
            "control": score_responses(control.model, split.unseen),
            "calibrated": score_responses(calibrated.model, split.unseen),
        }
        domains = tuple(
            _judge(run, sources, scored, split, view) for view in judged_views(run.split, split.seen.policy_models)
        )
        trained: dict[VariantName, TrainedModel] = {"calibrated": calibrated, "control": control}
        used = _used(sources, split, scored_seen, correction, trained)
        warnings = sources.warnings + sources.answers.warnings + _warnings(scored_seen, split.seen.empty_responses)
        truth = _truth(run, sources, scored, correction.mismatch, split)
        picked = _best_of_n(session, run, sources, scored, split)
        repeated = score_again(calibrated.model, split.unseen, scored["calibrated"].scores, run.promotion.gate)
        report = _report(run, sources, correction, trained, domains, used, warnings, truth, picked, repeated)
        released = package_model(calibrated.model, report.card)
        version = register_model(session.run, session.store, run.registered_name, released, report)
        promotion = judge_promotion(session.run, session.store, version, report.data, run.promotion)
        outcome = finish(session, report, used, model=released, model_version=version, promotion=promotion.sentence)
        # last: from now on new ratings are held against these
        note_calibration(
            session.store, *split_version(version), sources.board, sources.responses.policy_models, settings_digest(run)
        )
        return outcome


def _fine_tune(
    session: Session, run: CalibrationRun, sources: Sources, scored: Scored, correction: Correction
) -> tuple[TrainedModel, TrainedModel]:
    base, ratings = sources.reward_model, sources.board.ratings
    training = knowing_scores(run.training, base.spec, scored)
    calibrated = train_reward_model(
        "calibrated", base, correction.pairs.pairs, ratings_for(training, ratings), training
    )
    # everything but the correction: the same pairs without offsets, and the reward model's own Elo instead of people's
    own = rate_by_scores(scored.scores)
    control = train_reward_model("control", base, correction.control_pairs.pairs, ratings_for(training, own), training)
    log_training(session.store, session.run, {"calibrated": calibrated, "control": control})
    return calibrated, control


def _judge(
    run: CalibrationRun, sources: Sources, scored: Mapping[VariantName, Scored], split: Split, view: View
) -> DomainParts:
    # an offset belongs to a policy model: one that the calibration never saw has none
    judged = {name: item for name, item in scored.items() if not (name == "offsets" and view.focus)}
    ratings, responses = sources.board.ratings, split.unseen.responses
    return DomainParts(
        label=view.label,
        held_out_models=view.focus,
        variants=tuple(
            evaluate_variant(name, item.scores, responses, ratings, split.parts, view, run.mismatch, item.summary)
            for name, item in judged.items()
        ),
        comparisons=tuple(
            compare_variants(
                (before, judged[before].scores), (after, judged[after].scores), ratings, split.parts, view, run.mismatch
            )
            for before, after in COMPARED
            if before in judged and after in judged
        ),
        styles=tuple(
            compare_styles(
                (before, judged[before].scores),
                ("calibrated", judged["calibrated"].scores),
                responses,
                split.parts,
                view,
                run.mismatch,
            )
            for before in BASELINES
        ),
    )


def _best_of_n(
    session: Session, run: CalibrationRun, sources: Sources, scored: Mapping[VariantName, Scored], split: Split
) -> tuple[ArtifactRef, ...]:
    """What each variant would pick of several policy models' responses: published, and logged as metrics."""
    everybody = View(label="held-out prompts", parts=(HELD_OUT,))
    picked = [_pick(sources, scored, split, everybody, None)]
    if run.judge_preferences is not None:
        judged = load_preferences(source_file(run.judge_preferences.source), run.judge_preferences)
        both = tuple(name for name in split.unseen.policy_models if name in judged.policy_models)
        if len(both) < 2:
            raise ConfigError(
                f"judge_preferences are about {list(judged.policy_models)}, of which fewer than two have responses; "
                "name them as the responses do"
            )
        picked.append(_pick(sources, scored, split, everybody.model_copy(update={"policy_models": both}), judged.table))
    reports = [session.store.read_record(ref, BestOfNReport) for ref in picked]
    # where both have a number, it is the one about everybody
    metrics = {name: value for report in reversed(reports) for name, value in best_of_n_metrics(report).items()}
    session.run.log_metrics(metrics)
    table = "\n\n".join(best_of_n_markdown(report) for report in reports)
    session.run.log_text(table, "best_of_n.md")
    publish_markdown("best-of-n", table, "What each variant picks of n responses to a held-out prompt")
    return tuple(picked)


def _pick(
    sources: Sources,
    scored: Mapping[VariantName, Scored],
    split: Split,
    view: View,
    preferences: ArtifactRef | None,
) -> ArtifactRef:
    return pick_best_of_n(
        tuple((name, item.scores) for name, item in scored.items() if name != "offsets"),
        split.unseen.responses,
        BestOfNConfig(),
        ratings=sources.board.ratings,
        preferences=preferences,
        quality=sources.simulated.true_quality if sources.simulated else None,
        split=split.parts,
        view=view,
        compared=tuple((before, "calibrated") for before in BASELINES),
    )


def _report(
    run: CalibrationRun,
    sources: Sources,
    correction: Correction,
    trained: Mapping[VariantName, TrainedModel],
    domains: tuple[DomainParts, ...],
    used: Used,
    warnings: tuple[str, ...],
    truth: ArtifactRef | None,
    picked: tuple[ArtifactRef, ...],
    repeated: ArtifactRef | None,
) -> Report:
    models = {name: model.model for name, model in trained.items()}
    return compose_report(
        ReportParts(
            kind="calibrate",
            title=run.name,
            reward_model=sources.name,
            simulated=run.simulation is not None,
            board=sources.board,
            domains=domains,
            selection=correction.selection,
            offsets=correction.offsets,
            pairs=correction.pairs.summary,
            responses=sources.answers.rows,
            curves=tuple(CurveParts(variant=name, label=name, curve=model.curve) for name, model in trained.items()),
            benchmarks=run_benchmarks(run.benchmarks, {"untouched": sources.reward_model, **models}),
            truth=truth,
            best_of_n=picked,
            repeated_scores=repeated,
            gate=run.promotion.gate,
            warnings=warnings,
            notes=sources.answers.notes,
            provenance=describe_provenance("calibrate", run, used),
        )
    )


def _used(
    sources: Sources,
    split: Split,
    scored_seen: Scored,
    correction: Correction,
    trained: Mapping[VariantName, TrainedModel],
) -> Used:
    models = {f"{name} model": model.model.folder for name, model in trained.items()}
    return Used(
        inputs={
            "ratings": sources.board.ratings,
            "calibration responses": split.seen.responses,
            "held out responses": split.unseen.responses,
            "split": split.parts,
        },
        outputs={
            "scores": scored_seen.scores,
            "offsets": correction.offsets,
            "pairs": correction.pairs.pairs,
            "control pairs": correction.control_pairs.pairs,
            **{name: folder for name, folder in models.items() if folder is not None},
        },
    )


def _truth(
    run: CalibrationRun, sources: Sources, scored: Mapping[VariantName, Scored], mismatch: ArtifactRef, split: Split
) -> ArtifactRef | None:
    if run.simulation is None or sources.simulated is None:
        return None
    compared: tuple[VariantName, ...] = ("untouched", "control", "calibrated")
    return judge_truth(
        sources.simulated,
        run.simulation.arena,
        tuple((name, scored[name].scores) for name in compared),
        mismatch,
        split.parts,
        View(label="held-out prompts", parts=(HELD_OUT,)),
    )


def _warnings(scored: Scored, empty_responses: int) -> tuple[str, ...]:
    summary = scored.summary
    cut = [
        f"{count:,} of {summary.texts:,} texts had their {what} cut to fit {summary.max_length} tokens."
        for what, count in (("prompt", summary.prompts_cut), ("response", summary.responses_cut))
        if count
    ]
    empty = [f"{empty_responses:,} responses are empty; they are scored like any other."] if empty_responses else []
    return tuple(cut + empty)


def start(run: CalibrationRun) -> Outcome:
    """Check the servers and run the flow."""
    check_services()
    return calibrate(run)


if __name__ == "__main__":
    sys.exit(run_from_command_line("calibrate", CalibrationRun, CALIBRATE, start))
