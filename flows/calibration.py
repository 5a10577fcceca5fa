"""What a calibration and an ablation of it have in common: hold out, measure, correct, and where to judge."""

from dataclasses import dataclass

from charm_core.errors import ConfigError
from charm_core.responses import CALIBRATION, HELD_OUT, HELD_OUT_DOMAIN, SplitConfig
from charm_core.reward_model.spec import RewardModelSpec, TrainingConfig
from charm_core.selection import Selection
from flows.runs import CalibrationRun
from flows.sources import Answers, Sources, real_sources, simulated_sources
from tasks.debiasing import ChosenModels, PairSet, build_pairs, choose_models, fit_model_offsets
from tasks.evaluation import View, evaluate_variant
from tasks.prompts import ResponseSet, select_responses, split_responses
from tasks.scoring import Scored
from tasks.store import ArtifactRef

MOST_EXACT_DRIFT = 1e-4
"""Scores that move less with their batch were computed in float32. There it is below 1e-5, in bfloat16 some hundredths."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """What the calibration sees, and what only the final comparison sees. Nothing is fitted on ``unseen``."""

    parts: ArtifactRef
    seen: ResponseSet
    unseen: ResponseSet


@dataclass(frozen=True, kw_only=True)
class Correction:
    """What was measured on the seen responses, and what follows from it."""

    mismatch: ArtifactRef
    selection: Selection
    offsets: ArtifactRef
    pairs: PairSet
    control_pairs: PairSet


def calibration_sources(run: CalibrationRun) -> Sources:
    """What the run starts from."""
    if run.simulation is not None:
        return simulated_sources(run.simulation)
    return real_sources(run.arena, run.responses, run.sampling, run.reward_model, run.training)


def hold_out(run: CalibrationRun, sources: Sources) -> Split:
    """Decide what only the final comparison sees, before anything is fitted.

    Raises:
        ConfigError: A held-out policy model without responses.
    """
    parts, known = decide_parts(run.split, sources.answers)
    return Split(
        parts=parts,
        seen=select_responses(sources.responses, parts, (CALIBRATION,), known),
        unseen=select_responses(sources.responses, parts, (HELD_OUT, HELD_OUT_DOMAIN), sources.responses.policy_models),
    )


def decide_parts(config: SplitConfig, answers: Answers) -> tuple[ArtifactRef, tuple[str, ...]]:
    """Which prompt belongs to which part, and the policy models that are not held out.

    Raises:
        ConfigError: A held-out policy model without responses.
    """
    everyone, held_out = answers.responses.policy_models, config.held_out_policy_models
    unknown = sorted(set(held_out) - set(everyone))
    if unknown:
        raise ConfigError(f"split.held_out_policy_models {unknown} have no responses; there are {list(everyone)}")
    known = tuple(model for model in everyone if model not in held_out)
    return split_responses(answers.responses, config, answers.trained_on), known


def measure_untouched(run: CalibrationRun, sources: Sources, scored: Scored) -> ArtifactRef:
    """Mismatch of the untouched reward model on the calibration prompts."""
    view = View(label="calibration prompts")
    return evaluate_variant(
        "untouched", scored.scores, None, sources.board.ratings, None, view, run.mismatch, scored.summary
    )


def correct(
    run: CalibrationRun, ratings: ArtifactRef, split: Split, scored: Scored, mismatch: ArtifactRef
) -> Correction:
    """Choose models, fit offsets, and build the pairs, with the offsets and without."""
    selection = choose_models(mismatch, run.selection)
    chosen = ChosenModels.of(selection)
    offsets = fit_model_offsets(scored.scores, ratings, chosen.references, run.calibration)
    return Correction(
        mismatch=mismatch,
        selection=selection,
        offsets=offsets,
        pairs=build_pairs(split.seen, scored.scores, offsets, chosen, run.preferences),
        control_pairs=build_pairs(split.seen, scored.scores, None, chosen, run.preferences),
    )


def knowing_scores(training: TrainingConfig, model: RewardModelSpec, scored: Scored) -> TrainingConfig:
    """The training, told that the raw scores are those of the very reward model that is trained, so that others are an error.

    Only where scoring and training compute in float32. What bfloat16 makes of scores is not measured on GPUs, and a false alarm
    would end a run for nothing: there it stays a warning with the number, as where the settings say whose the scores are.

    Args:
        training: As set.
        model: What is trained.
        scored: What it made of the responses that the pairs are built from.
    """
    if training.raw_scores_of != "unknown" or not _is_exact(training, model, scored.summary.batch_drift):
        return training
    return training.model_copy(update={"raw_scores_of": "this_model"})


def _is_exact(training: TrainingConfig, model: RewardModelSpec, drift: float | None) -> bool:
    """Whether scoring was in float32, and training is, on the machine that scored or by its settings."""
    if model.dtype == "auto":
        # what it meant depends on the machine, and scores from the cache may be another's; strict has no drift in any type
        scored = drift is not None and drift <= MOST_EXACT_DRIFT and not model.strict
        return scored and training.dtype in ("auto", "float32")
    return model.dtype == training.dtype == "float32"


def judged_views(config: SplitConfig, known: tuple[str, ...]) -> list[View]:
    """Held-out prompts; then, if there are any, held-out policy models and the second domain."""
    held_out, domain = config.held_out_policy_models, config.held_out_prompt_sets
    views = [View(label="held-out prompts", parts=(HELD_OUT,), policy_models=known)]
    if held_out:
        views.append(View(label="held-out policy models", parts=(HELD_OUT,), focus=held_out))
    if domain:
        views.append(View(label=f"{', '.join(domain)} prompts", parts=(HELD_OUT_DOMAIN,), policy_models=known))
    return views
