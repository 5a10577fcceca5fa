"""What is a calibrated reward model good for? Label a policy model's own responses with it, train the policy model, compare.

python -m flows.post_train --preset demo
python -m flows.post_train --config post_train.toml
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from prefect import flow
from pydantic import BaseModel, ConfigDict, Field

from charm_core.best_of_n import BestOfNReport
from charm_core.errors import ConfigError
from charm_core.policy_comparison import PolicyComparison
from charm_core.simulation import SimulationConfig
from flows.calibration import calibration_sources, correct, hold_out, knowing_scores, measure_untouched
from flows.command_line import run_from_command_line
from flows.outcome import name_run
from flows.presets import POST_TRAIN, demo_post_training
from flows.runs import CalibrationRun, PostTrainRun, SimulatedPolicy
from flows.session import Session, check_services, open_session
from tasks.best_of_n import best_of_n_metrics, pick_best_of_n
from tasks.debiasing import ChosenModels, PairSet, build_pairs, rate_by_scores
from tasks.judging import Judged, judge_responses
from tasks.ledger import explain, reuse_lines
from tasks.pages.best_of_n_table import best_of_n_markdown
from tasks.policy_comparison import compare_answers, comparison_markdown, comparison_metrics, comparison_summary
from tasks.post_training import (
    UNTOUCHED,
    PolicyFolder,
    PostTrainedPolicy,
    answer_prompts,
    check_apart,
    draw_prompts,
    identify_policy,
    post_train_policy,
    sample_candidates,
    score_by_truth,
    teach_policy,
)
from tasks.prompt_sets import load_prompt_set
from tasks.prompts import ResponseSet
from tasks.publishing import publish_markdown
from tasks.scoring import RewardModelRef, identify_reward_model, score_responses
from tasks.store import ArtifactRef
from tasks.training import ratings_for, train_reward_model

DEMO = demo_post_training()
"""What a deployment runs if nothing else is asked for."""

TRUTH = "truth"
NOBODY = ChosenModels(overvalued=(), references=())


class PostTrainOutcome(BaseModel):
    """What the flow leaves behind."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    comparison: ArtifactRef = Field(description="PolicyComparison of all policies on the exam prompts.")
    best_of_n: ArtifactRef = Field(description="BestOfNReport of the labelled responses.")
    policies: dict[str, PolicyFolder] = Field(description="The untouched policy model and the post-trained ones.")
    tracking_url: str = Field(description="Page of the MLflow run.")
    summary: str = Field(description="The result in a few lines.")


@dataclass(frozen=True, kw_only=True)
class _Start:
    policy: PolicyFolder
    prompts: ArtifactRef
    exam: ArtifactRef
    reward_models: Mapping[str, RewardModelRef]
    world: SimulationConfig | None = None
    label_by_truth: bool = False


@dataclass(frozen=True, kw_only=True)
class _Labelled:
    """The policy model's own responses, and how each labeller scores them."""

    candidates: ResponseSet
    scores: Mapping[str, ArtifactRef]
    best_of_n: ArtifactRef


@dataclass(frozen=True, kw_only=True)
class _Results:
    comparison: ArtifactRef
    best_of_n: ArtifactRef
    pairs: Mapping[str, PairSet]
    trained: Mapping[str, PostTrainedPolicy]


@flow(name="post-train", flow_run_name="post-train {run.name}")
def post_train(run: PostTrainRun = DEMO) -> PostTrainOutcome:
    """Post-train a policy model on its own responses as several reward models label them, and see who answers better."""
    with open_session("post-train", run.name, run) as session:
        start = _simulated(run.simulation) if run.simulation is not None else _real(session, run)
        labelled = _label(session, run, start)
        pairs = {
            name: build_pairs(labelled.candidates, scores, None, NOBODY, run.preferences)
            for name, scores in labelled.scores.items()
        }
        trained = {name: post_train_policy(start.policy, made.pairs, run.training) for name, made in pairs.items()}
        policies = {UNTOUCHED: start.policy, **{policy_name(name): done.model for name, done in trained.items()}}
        answers = answer_prompts(session.store, start.exam, policies, run.decoding)
        judged = judge_responses(answers, run.judge) if run.judge is not None else None
        comparison = compare_answers(
            answers,
            tuple(policies),
            _compared(tuple(start.reward_models), tuple(trained)),
            run.comparison,
            start.world,
            tuple((name, score_responses(model, answers).scores) for name, model in start.reward_models.items()),
            () if judged is None else ((judged.judge, judged.preferences),),
        )
        results = _Results(comparison=comparison, best_of_n=labelled.best_of_n, pairs=pairs, trained=trained)
        return _finish(session, run, results, policies, judged)


def policy_name(labeller: str) -> str:
    """What the policy is called that was trained on a labeller's pairs."""
    return f"{labeller}-labelled"


def _simulated(simulation: SimulatedPolicy) -> _Start:
    calibration = simulation.calibration
    if calibration.simulation is None:
        raise ConfigError("simulation.calibration must be of a simulation")
    world = calibration.simulation.arena
    return _Start(
        policy=teach_policy(world, simulation.writers_prompts, simulation.teaching),
        prompts=draw_prompts(world, simulation.prompts, "practice"),
        exam=draw_prompts(world, simulation.exam_prompts, "exam"),
        reward_models=_calibrated(calibration),
        world=world,
        label_by_truth=simulation.label_by_truth,
    )


def _calibrated(run: CalibrationRun) -> dict[str, RewardModelRef]:
    """The reward models that ``flows.calibrate`` makes of the same settings; what it has made already is reused."""
    sources = calibration_sources(run)
    split = hold_out(run, sources)
    scored = score_responses(sources.reward_model, split.seen)
    correction = correct(run, sources.board.ratings, split, scored, measure_untouched(run, sources, scored))
    base = sources.reward_model
    training = knowing_scores(run.training, base.spec, scored)
    sides = {
        "control": (correction.control_pairs, rate_by_scores(scored.scores)),
        "calibrated": (correction.pairs, sources.board.ratings),
    }
    trained = {
        name: train_reward_model(name, base, pairs.pairs, ratings_for(training, ratings), training).model
        for name, (pairs, ratings) in sides.items()
    }
    return {"base": base, **trained}


def _real(session: Session, run: PostTrainRun) -> _Start:
    if run.policy_model is None or run.prompts is None or run.exam_prompts is None:
        raise ConfigError("policy_model, prompts and exam_prompts are needed where nothing is simulated")
    reward_models = {name: identify_reward_model(spec) for name, spec in run.reward_models.items()}
    policy = identify_policy(run.policy_model)
    prompts, exam = load_prompt_set(run.prompts).prompts, load_prompt_set(run.exam_prompts).prompts
    check_apart(session.store, prompts, exam)
    return _Start(policy=policy, prompts=prompts, exam=exam, reward_models=reward_models)


def _label(session: Session, run: PostTrainRun, start: _Start) -> _Labelled:
    candidates = sample_candidates(session.store, start.prompts, start.policy, run.decoding, run.responses_per_prompt)
    truth = score_by_truth(start.world, candidates) if start.world is not None else None
    scores = {name: score_responses(model, candidates).scores for name, model in start.reward_models.items()}
    names = tuple(scores)
    best_of_n = pick_best_of_n(
        tuple(scores.items()),
        candidates.responses,
        run.best_of_n,
        quality=truth,
        compared=tuple((name, names[-1]) for name in names[:-1]),
    )
    by_truth = {TRUTH: truth} if truth is not None and start.label_by_truth else {}
    return _Labelled(candidates=candidates, scores={**scores, **by_truth}, best_of_n=best_of_n)


def _compared(reward_models: tuple[str, ...], labellers: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Each labeller's policy with the untouched one, and the last reward model's with those of the others."""
    last = policy_name(reward_models[-1])
    return (
        *((UNTOUCHED, policy_name(name)) for name in labellers),
        *((policy_name(name), last) for name in reward_models[:-1]),
    )


def _finish(
    session: Session,
    run: PostTrainRun,
    results: _Results,
    policies: dict[str, PolicyFolder],
    judged: Judged | None,
) -> PostTrainOutcome:
    """Log the numbers and say what came out; runs on every run, cached steps or not."""
    found = session.store.read_record(results.comparison, PolicyComparison)
    picked = session.store.read_record(results.best_of_n, BestOfNReport)
    about = "" if run.policy_model is None else Path(run.policy_model.path).name
    name_run(session, about, None, f"{len(policies)} policies", page="post_training.md")
    _log(session, results, found, picked)
    reuse = reuse_lines(explain(session.ledger, session.last))
    session.run.log_text("\n".join(reuse), "steps.txt")
    notes = (*judged.sentences(), *judged.warnings) if judged else ()
    lines = [
        *comparison_summary(found, run.name, simulated=run.simulation is not None),
        *(f"         {note}" for note in notes),
        *(f"{'Steps' if number == 0 else '':9}{line}" for number, line in enumerate(reuse)),
        *(f"Policy   {name}: {policy.spec.path}" for name, policy in policies.items()),
        f"MLflow   {session.run.url}  (`make mlflow-ui` opens the pages)",
    ]
    return PostTrainOutcome(
        comparison=results.comparison,
        best_of_n=results.best_of_n,
        policies=policies,
        tracking_url=session.run.url,
        summary="\n".join(lines),
    )


def _log(session: Session, results: _Results, found: PolicyComparison, picked: BestOfNReport) -> None:
    policies, best = comparison_markdown(found), best_of_n_markdown(picked)
    session.run.log_metrics({**comparison_metrics(found), **best_of_n_metrics(picked), **_training_metrics(results)})
    for name, done in results.trained.items():
        with session.run.nested(policy_name(name)) as nested:
            nested.log_curve([dict(record) for record in done.outcome.curve])
    session.run.log_text(f"# Policies\n\n{policies}\n\n# Best of n\n\n{best}\n", "post_training.md")
    session.run.log_text(found.model_dump_json(indent=1), "post_training.json")
    session.run.log_text(picked.model_dump_json(indent=1), "best_of_n.json")
    publish_markdown("post-train-policies", policies, "Policies on the exam prompts")
    publish_markdown("post-train-best-of-n", best, "Best of n of the labelled responses")


def _training_metrics(results: _Results) -> dict[str, float | None]:
    metrics: dict[str, float | None] = {}
    for name, done in results.trained.items():
        metrics[f"training/{name}/pairs"] = float(results.pairs[name].summary.pairs)
        metrics[f"training/{name}/last loss"] = done.outcome.last_loss
        metrics[f"training/{name}/held-out accuracy"] = done.outcome.accuracy_after
    return metrics


def start(run: PostTrainRun) -> PostTrainOutcome:
    """Check the servers and run the flow."""
    check_services()
    return post_train(run)


if __name__ == "__main__":
    sys.exit(run_from_command_line("post_train", PostTrainRun, POST_TRAIN, start))
