"""The main job, end to end: measure where a reward model disagrees with people, correct it, show whether that worked.

python -m flows.calibrate --preset demo
python -m flows.calibrate --config benchmarks/real/calibrate_minilm.toml
"""

import sys
from collections.abc import Mapping

from prefect import flow

from charm_core.errors import ConfigError
from charm_core.responses import CALIBRATION, HELD_OUT, HELD_OUT_DOMAIN
from flows.command_line import run_from_command_line
from flows.outcome import Outcome, describe_provenance, finish
from flows.runs import CalibrationRun
from flows.session import Session, check_services, open_session
from flows.sources import Sources, gather_sources
from tasks.benchmarking import run_benchmarks
from tasks.debiasing import View, build_pairs, choose_models, fit_model_offsets, offset_scores, rate_by_scores
from tasks.evaluation import compare_variants, evaluate_variant, judge_truth
from tasks.evidence import CurveParts, DomainParts, ReportParts, compose_report
from tasks.prompts import select_responses, split_responses
from tasks.publishing import publish_markdown
from tasks.registry import package_model, register_model
from tasks.report_data import ReportVariant, VariantName
from tasks.report_text import mismatch_markdown
from tasks.scoring import Scored, score_responses
from tasks.store import ArtifactRef
from tasks.training import TrainedModel, log_training, ratings_for, train_reward_model

COMPARED: tuple[tuple[VariantName, VariantName], ...] = (
    ("untouched", "calibrated"),
    ("control", "calibrated"),
    ("untouched", "offsets"),
)
"""Every claimed gain is against the control as well as against the untouched reward model."""


@flow(name="calibrate", flow_run_name="calibrate {run.name}")
def calibrate(run: CalibrationRun) -> Outcome:
    """Calibrate a reward model with the Arena's human ratings, and prove what it did."""
    with open_session("calibrate", run.name, run) as session:
        sources = gather_sources(run.simulation, run.arena, run.responses, run.reward_model)
        ratings = sources.board.ratings
        split = split_responses(sources.responses, run.split, sources.trained_on)
        responses = select_responses(sources.responses, split, (CALIBRATION, HELD_OUT, HELD_OUT_DOMAIN))
        unseen = select_responses(sources.responses, split, (HELD_OUT, HELD_OUT_DOMAIN))
        seen = _calibration_view(run, sources)

        untouched = score_responses(sources.reward_model, responses)
        mismatch = evaluate_variant("untouched", untouched.scores, None, ratings, split, seen, run.mismatch)
        _show_mismatch(session, mismatch)
        selection = choose_models(mismatch, run.selection)
        offsets = fit_model_offsets(untouched.scores, ratings, split, seen, selection, run.calibration)
        pairs, control_pairs = (
            build_pairs(responses, untouched.scores, fit, split, seen, selection, run.preferences)
            for fit in (offsets, None)
        )
        own = rate_by_scores(untouched.scores, ratings, split, seen)
        calibrated = train_reward_model(
            "calibrated", sources.reward_model, pairs.pairs, ratings_for(run.training, ratings), run.training
        )
        control = train_reward_model(
            "control", sources.reward_model, control_pairs.pairs, ratings_for(run.training, own), run.training
        )
        log_training(session.store, session.run, {"calibrated": calibrated, "control": control})

        scored: dict[VariantName, Scored] = {
            "untouched": untouched,
            "offsets": Scored(scores=offset_scores(untouched.scores, offsets), summary=untouched.summary),
            "control": score_responses(control.model, unseen),
            "calibrated": score_responses(calibrated.model, unseen),
        }
        views = _judged_views(run, seen)
        domains = tuple(_judge(run, sources, scored, split, view) for view in views)
        report = compose_report(
            ReportParts(
                kind="calibrate",
                title=run.name,
                reward_model=sources.name,
                simulated=run.simulation is not None,
                board=sources.board,
                domains=domains,
                selection=selection,
                offsets=offsets,
                pairs=pairs.summary,
                curves=(_curve("calibrated", calibrated), _curve("control", control)),
                benchmarks=run_benchmarks(
                    run.benchmarks,
                    {"untouched": sources.reward_model, "control": control.model, "calibrated": calibrated.model},
                ),
                truth=_truth(run, sources, scored, mismatch, split),
                warnings=_warnings(untouched, responses.empty_responses),
                provenance=describe_provenance(
                    "calibrate",
                    run,
                    ratings=ratings,
                    prompts=responses.prompts,
                    responses=responses.responses,
                    split=split,
                    scores=untouched.scores,
                    offsets=offsets,
                    pairs=pairs.pairs,
                    control_pairs=control_pairs.pairs,
                    calibrated_model=calibrated.model.folder,
                    control_model=control.model.folder,
                ),
            )
        )
        released = package_model(calibrated.model, report.card)
        version = register_model(session.run, session.store, run.register_as or f"charm-{run.name}", released, report)
        return finish(session, report, model=released, model_version=version)


def _calibration_view(run: CalibrationRun, sources: Sources) -> View:
    held_out = run.split.held_out_policy_models
    unknown = sorted(set(held_out) - set(sources.responses.policy_models))
    if unknown:
        raise ConfigError(
            f"split.held_out_policy_models {unknown} have no responses; there are {list(sources.responses.policy_models)}"
        )
    known = tuple(model for model in sources.responses.policy_models if model not in held_out)
    return View(label="calibration prompts", parts=(CALIBRATION,), policy_models=known)


def _judged_views(run: CalibrationRun, seen: View) -> list[View]:
    held_out, domain = run.split.held_out_policy_models, run.split.held_out_prompt_sets
    views = [seen.model_copy(update={"label": "held-out prompts", "parts": (HELD_OUT,)})]
    if held_out:
        views.append(View(label="held-out policy models", parts=(HELD_OUT,), focus=held_out))
    if domain:
        views.append(seen.model_copy(update={"label": f"{', '.join(domain)} prompts", "parts": (HELD_OUT_DOMAIN,)}))
    return views


def _judge(
    run: CalibrationRun, sources: Sources, scored: Mapping[VariantName, Scored], split: ArtifactRef, view: View
) -> DomainParts:
    # an offset belongs to a policy model: one that the calibration never saw has none
    judged = {name: item for name, item in scored.items() if not (name == "offsets" and view.focus)}
    ratings = sources.board.ratings
    return DomainParts(
        label=view.label,
        held_out_models=view.focus,
        variants=tuple(
            evaluate_variant(
                name, item.scores, sources.responses.responses, ratings, split, view, run.mismatch, item.summary
            )
            for name, item in judged.items()
        ),
        comparisons=tuple(
            compare_variants(
                (before, judged[before].scores), (after, judged[after].scores), ratings, split, view, run.mismatch
            )
            for before, after in COMPARED
            if before in judged and after in judged
        ),
    )


def _truth(
    run: CalibrationRun,
    sources: Sources,
    scored: Mapping[VariantName, Scored],
    mismatch: ArtifactRef,
    split: ArtifactRef,
) -> ArtifactRef | None:
    if run.simulation is None or sources.simulated is None:
        return None
    compared: tuple[VariantName, ...] = ("untouched", "control", "calibrated")
    return judge_truth(
        sources.simulated,
        run.simulation.arena,
        tuple((name, scored[name].scores) for name in compared),
        mismatch,
        split,
        View(label="held-out prompts", parts=(HELD_OUT,)),
    )


def _curve(variant: VariantName, trained: TrainedModel) -> CurveParts:
    return CurveParts(variant=variant, label=variant, curve=trained.curve)


def _warnings(scored: Scored, empty_responses: int) -> tuple[str, ...]:
    summary = scored.summary
    cut = [
        f"{count:,} of {summary.texts:,} texts had their {what} cut to fit {summary.max_length} tokens."
        for what, count in (("prompt", summary.prompts_cut), ("response", summary.responses_cut))
        if count
    ]
    empty = [f"{empty_responses:,} responses are empty; they are scored like any other."] if empty_responses else []
    return tuple(cut + empty)


def _show_mismatch(session: Session, evidence: ArtifactRef) -> None:
    report = session.store.read_record(evidence, ReportVariant).mismatch
    publish_markdown(
        "mismatch", mismatch_markdown(report), "Mismatch of the untouched reward model, calibration prompts"
    )


def start(run: CalibrationRun) -> str:
    """Run the flow and return its summary."""
    check_services()
    return calibrate(run).summary


if __name__ == "__main__":
    from flows.presets import CALIBRATE

    sys.exit(run_from_command_line("calibrate", CalibrationRun, CALIBRATE, start))
