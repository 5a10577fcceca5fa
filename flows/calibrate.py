"""The main job, end to end: measure where a reward model disagrees with people, correct it, show whether that worked.

python -m flows.calibrate --preset demo
python -m flows.calibrate --config benchmarks/real/calibrate_minilm.toml
"""

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from prefect import flow

from charm_core.errors import ConfigError
from charm_core.responses import CALIBRATION, HELD_OUT, HELD_OUT_DOMAIN
from charm_core.selection import Selection
from flows.command_line import run_from_command_line
from flows.outcome import Outcome, Used, describe_provenance, finish
from flows.presets import CALIBRATE, demo
from flows.runs import CalibrationRun
from flows.session import Session, check_services, open_session
from flows.sources import Sources, gather_sources
from tasks.benchmarking import run_benchmarks
from tasks.debiasing import (
    ChosenModels,
    PairSet,
    build_pairs,
    choose_models,
    fit_model_offsets,
    offset_scores,
    rate_by_scores,
)
from tasks.evaluation import View, compare_variants, evaluate_variant, judge_truth
from tasks.evidence import CurveParts, DomainParts, Report, ReportParts, compose_report
from tasks.prompts import ResponseSet, select_responses, split_responses
from tasks.publishing import publish_markdown
from tasks.registry import package_model, register_model
from tasks.report_data import ReportVariant, VariantName
from tasks.report_text import mismatch_markdown
from tasks.scoring import Scored, score_responses
from tasks.store import ArtifactRef
from tasks.training import TrainedModel, log_training, ratings_for, train_reward_model

DEMO = demo()
"""What a deployment runs if nothing else is asked for."""

COMPARED: tuple[tuple[VariantName, VariantName], ...] = (
    ("untouched", "calibrated"),
    ("control", "calibrated"),
    ("untouched", "offsets"),
)
"""Every claimed gain is against the control as well as against the untouched reward model."""


@dataclass(frozen=True, kw_only=True)
class _Split:
    """What the calibration sees, and what only the final comparison sees. Nothing is fitted on ``unseen``."""

    parts: ArtifactRef
    seen: ResponseSet
    unseen: ResponseSet


@dataclass(frozen=True, kw_only=True)
class _Correction:
    """What was measured on the seen responses, and what follows from it."""

    mismatch: ArtifactRef
    selection: Selection
    offsets: ArtifactRef
    pairs: PairSet
    control_pairs: PairSet


@flow(name="calibrate", flow_run_name="calibrate {run.name}")
def calibrate(run: CalibrationRun = DEMO) -> Outcome:
    """Calibrate a reward model with the Arena's human ratings, and prove what it did."""
    with open_session("calibrate", run.name, run) as session:
        sources = gather_sources(run.simulation, run.arena, run.responses, run.reward_model)
        split = _hold_out(run, sources)
        scored_seen = score_responses(sources.reward_model, split.seen)
        correction = _correct(session, run, sources, split, scored_seen)
        calibrated, control = _fine_tune(session, run, sources, scored_seen, correction)
        untouched = score_responses(sources.reward_model, split.unseen)
        scored: dict[VariantName, Scored] = {
            "untouched": untouched,
            "offsets": Scored(scores=offset_scores(untouched.scores, correction.offsets), summary=untouched.summary),
            "control": score_responses(control.model, split.unseen),
            "calibrated": score_responses(calibrated.model, split.unseen),
        }
        domains = tuple(_judge(run, sources, scored, split, view) for view in _judged_views(run, split))
        trained: dict[VariantName, TrainedModel] = {"calibrated": calibrated, "control": control}
        used = _used(sources, split, scored_seen, correction, trained)
        warnings = _warnings(scored_seen, split.seen.empty_responses)
        truth = _truth(run, sources, scored, correction.mismatch, split)
        report = _report(run, sources, correction, trained, domains, used, warnings, truth)
        released = package_model(calibrated.model, report.card)
        version = register_model(
            session.run, session.store, run.register_as or _registry_name(run.name), released, report
        )
        return finish(session, report, used, model=released, model_version=version)


def _hold_out(run: CalibrationRun, sources: Sources) -> _Split:
    everyone, held_out = sources.responses.policy_models, run.split.held_out_policy_models
    unknown = sorted(set(held_out) - set(everyone))
    if unknown:
        raise ConfigError(f"split.held_out_policy_models {unknown} have no responses; there are {list(everyone)}")
    known = tuple(model for model in everyone if model not in held_out)
    parts = split_responses(sources.responses, run.split, sources.trained_on)
    return _Split(
        parts=parts,
        seen=select_responses(sources.responses, parts, (CALIBRATION,), known),
        unseen=select_responses(sources.responses, parts, (HELD_OUT, HELD_OUT_DOMAIN), everyone),
    )


def _correct(session: Session, run: CalibrationRun, sources: Sources, split: _Split, scored: Scored) -> _Correction:
    ratings = sources.board.ratings
    view = View(label="calibration prompts")
    mismatch = evaluate_variant("untouched", scored.scores, None, ratings, None, view, run.mismatch, scored.summary)
    report = session.store.read_record(mismatch, ReportVariant).mismatch
    publish_markdown(
        "mismatch", mismatch_markdown(report), "Mismatch of the untouched reward model, calibration prompts"
    )
    selection = choose_models(mismatch, run.selection)
    chosen = ChosenModels.of(selection)
    offsets = fit_model_offsets(scored.scores, ratings, chosen.references, run.calibration)
    return _Correction(
        mismatch=mismatch,
        selection=selection,
        offsets=offsets,
        pairs=build_pairs(split.seen, scored.scores, offsets, chosen, run.preferences),
        control_pairs=build_pairs(split.seen, scored.scores, None, chosen, run.preferences),
    )


def _fine_tune(
    session: Session, run: CalibrationRun, sources: Sources, scored: Scored, correction: _Correction
) -> tuple[TrainedModel, TrainedModel]:
    base, ratings = sources.reward_model, sources.board.ratings
    calibrated = train_reward_model(
        "calibrated", base, correction.pairs.pairs, ratings_for(run.training, ratings), run.training
    )
    # everything but the correction: the same pairs without offsets, and the reward model's own Elo instead of people's
    own = rate_by_scores(scored.scores, ratings)
    control = train_reward_model(
        "control", base, correction.control_pairs.pairs, ratings_for(run.training, own), run.training
    )
    log_training(session.store, session.run, {"calibrated": calibrated, "control": control})
    return calibrated, control


def _judged_views(run: CalibrationRun, split: _Split) -> list[View]:
    held_out, domain = run.split.held_out_policy_models, run.split.held_out_prompt_sets
    known = split.seen.policy_models
    views = [View(label="held-out prompts", parts=(HELD_OUT,), policy_models=known)]
    if held_out:
        views.append(View(label="held-out policy models", parts=(HELD_OUT,), focus=held_out))
    if domain:
        views.append(View(label=f"{', '.join(domain)} prompts", parts=(HELD_OUT_DOMAIN,), policy_models=known))
    return views


def _judge(
    run: CalibrationRun, sources: Sources, scored: Mapping[VariantName, Scored], split: _Split, view: View
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
    )


def _report(
    run: CalibrationRun,
    sources: Sources,
    correction: _Correction,
    trained: Mapping[VariantName, TrainedModel],
    domains: tuple[DomainParts, ...],
    used: Used,
    warnings: tuple[str, ...],
    truth: ArtifactRef | None,
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
            curves=tuple(CurveParts(variant=name, label=name, curve=model.curve) for name, model in trained.items()),
            benchmarks=run_benchmarks(run.benchmarks, {"untouched": sources.reward_model, **models}),
            truth=truth,
            warnings=warnings,
            provenance=describe_provenance("calibrate", run, used),
        )
    )


def _used(
    sources: Sources,
    split: _Split,
    scored_seen: Scored,
    correction: _Correction,
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
    run: CalibrationRun, sources: Sources, scored: Mapping[VariantName, Scored], mismatch: ArtifactRef, split: _Split
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


def _registry_name(name: str) -> str:
    return f"charm-{re.sub(r'[^A-Za-z0-9._-]+', '-', name).strip('-')}"


def start(run: CalibrationRun) -> str:
    """Run the flow and return its summary."""
    check_services()
    return calibrate(run).summary


if __name__ == "__main__":
    sys.exit(run_from_command_line("calibrate", CalibrationRun, CALIBRATE, start))
