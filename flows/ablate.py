"""Which recipe corrects a reward model best? Many recipes, several seeds, held-out prompts and policy models, one table.

python -m flows.ablate --preset demo
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

from prefect import flow

from charm_core.ablation import CellMeasures
from charm_core.errors import ArtifactError, ConfigError
from charm_core.responses import HELD_OUT
from flows.ablation_cells import Cell, cells_of, compared_cells, skipped_cells
from flows.calibration import (
    Correction,
    Split,
    calibration_sources,
    correct,
    hold_out,
    knowing_scores,
    measure_untouched,
)
from flows.command_line import run_from_command_line
from flows.outcome import Outcome, Used, describe_provenance, name_run, step_lines
from flows.presets import ABLATE, demo_ablation
from flows.runs import AblationRun, CalibrationRun
from flows.session import Session, check_services, open_session
from flows.sources import Sources, rated
from tasks.ablation import compose_ablation, headline_figures, measures_of, remove_length
from tasks.benchmarking import run_benchmarks
from tasks.debiasing import PairSet, offset_scores, rate_by_scores
from tasks.evaluation import View, evaluate_variant, judge_truth
from tasks.pages.ablation_page import AblationPage, ablation_answer, ablation_text
from tasks.pages.report_data import VariantName
from tasks.publishing import publish_link, publish_markdown, run_logger
from tasks.scoring import RewardModelRef, Scored, score_responses
from tasks.store import ArtifactRef
from tasks.training import TrainedModel, ratings_for, train_reward_model

CONTROL = "control, δ = 0"

DEMO = demo_ablation()
"""What a deployment runs if nothing else is asked for."""


@dataclass(frozen=True, kw_only=True)
class _Seed:
    """What all recipes of one seed share."""

    number: int
    run: CalibrationRun
    sources: Sources
    split: Split
    seen: Scored
    unseen: Scored
    mismatch: ArtifactRef


@flow(name="ablate", flow_run_name="ablate {run.name}")
def ablate(run: AblationRun = DEMO) -> Outcome:
    """Compare recipes of calibration with one another and with their control, over several seeds."""
    with open_session("ablate", run.name, run) as session:
        measured: list[CellMeasures] = []
        left_out: dict[tuple[str, str], list[int]] = {}
        for number in run.seeds:
            seed = _prepare(number, seeded(run.calibration, number))
            measured.extend(_measure_all(session, run, seed, left_out))
        name, board = seed.sources.name, seed.sources.board
        recipes = len({one.cell for one in measured})
        name_run(session, name, board, f"{recipes} recipes, {len(run.seeds)} seeds", page="ablation.html")
        report = compose_ablation(
            run.name,
            name,
            f"{board.name} {board.category} {board.date or ''}".strip(),
            run.calibration.simulation is not None,
            tuple(measured),
            CONTROL,
            compared_cells(run),
            (*skipped_cells(run), *map(_left_out, left_out.items())),
            describe_provenance("ablate", run, Used(inputs={"ratings": board.ratings}, outputs={})),
        )
        page = session.store.read_record(report.data, AblationPage)
        session.run.log_metrics(
            {
                f"{_plain(cell.cell)}/{name}": estimate.value
                for cell in page.cells
                for name, estimate in cell.means.items()
            }
        )
        session.run.log_text(session.store.read_bytes(report.html).decode(), "ablation.html")
        publish_link("ablation-page", report.html.uri, "Effect report", ablation_answer(page))
        publish_markdown("ablation-table", f"```\n{ablation_text(page)}\n```", "Recipes over all seeds")
        return Outcome(
            report=report.html,
            data=report.data,
            tracking_url=session.run.url,
            summary="\n".join([ablation_text(page), "", *step_lines(session), f"Report   {report.html.uri}"]),
        )


def seeded(run: CalibrationRun, seed: int) -> CalibrationRun:
    """The calibration with another seed everywhere: of the split, the pairs, the training and, simulated, the world."""
    changes: dict[str, object] = {
        "split": run.split.model_copy(update={"seed": seed}),
        "preferences": run.preferences.model_copy(update={"seed": seed}),
        "training": run.training.model_copy(update={"seed": seed}),
    }
    if run.simulation is not None:
        arena = run.simulation.arena.model_copy(update={"seed": seed})
        changes["simulation"] = run.simulation.model_copy(update={"arena": arena})
    return run.model_copy(update=changes)


def _left_out(item: tuple[tuple[str, str], list[int]]) -> str:
    (name, why), seeds = item
    return f"{name}: left out with seed {', '.join(map(str, seeds))} ({why})."


def _prepare(number: int, run: CalibrationRun) -> _Seed:
    sources = calibration_sources(run)
    split = hold_out(run, sources)
    seen = score_responses(sources.reward_model, split.seen)
    return _Seed(
        number=number,
        run=run,
        sources=sources,
        split=split,
        seen=seen,
        unseen=score_responses(sources.reward_model, split.unseen),
        mismatch=measure_untouched(run, sources, seen),
    )


def _measure_all(
    session: Session, run: AblationRun, seed: _Seed, left_out: dict[tuple[str, str], list[int]]
) -> Iterator[CellMeasures]:
    for cell in cells_of(run):
        try:
            values = _measure(session, cell, seed)
        except ConfigError as error:
            # a recipe that this seed does not allow, such as one overvalued model where none is flagged
            run_logger().info("seed %d, %s: left out: %s", seed.number, cell.name, error)
            left_out.setdefault((cell.name, str(error)), []).append(seed.number)
            continue
        yield CellMeasures(cell=cell.name, seed=seed.number, values=values)


def _measure(session: Session, cell: Cell, seed: _Seed) -> dict[str, float]:
    run = cell.applied(seed.run)
    if cell.kind == "untouched":
        untouched = _judged(session, seed, "untouched", seed.unseen.scores)
        return untouched | _benchmarked(session, run, "untouched", seed.sources.reward_model)
    if cell.kind == "length_regression":
        split = seed.split
        scores = remove_length(seed.seen.scores, split.seen.responses, seed.unseen.scores, split.unseen.responses)
        return _judged(session, seed, "offsets", scores)
    correction = correct(run, _target_ratings(cell, seed), seed.split, seed.seen, seed.mismatch)
    _check_size(cell, correction)
    if cell.kind == "offsets":
        scores = offset_scores(seed.unseen.scores, correction.offsets)
        return _judged(session, seed, "offsets", scores, new_models=False)
    if cell.kind == "control":
        own = rate_by_scores(seed.seen.scores)
        return _trained(session, seed, run, "control", correction.control_pairs, own)
    return _trained(session, seed, run, "calibrated", correction.pairs, _target_ratings(cell, seed))


def _check_size(cell: Cell, correction: Correction) -> None:
    """A recipe that asks for more than there is would be another one under its name.

    Raises:
        ConfigError: It does.
    """
    there = {
        ("selection", "max_overvalued"): len(correction.selection.overvalued),
        ("selection", "auto_references"): len(correction.selection.references),
        ("preferences", "max_pairs"): correction.pairs.summary.pairs,
    }
    for (section, name), count in there.items():
        asked = cell.changes.get(section, {}).get(name)
        if asked is not None and count < asked:
            # without the number, which may differ from seed to seed
            raise ConfigError(f"{section}.{name} {asked:,} is more than there are")


def _target_ratings(cell: Cell, seed: _Seed) -> ArtifactRef:
    arena = seed.run.arena
    if not cell.style_controlled or arena is None:
        return seed.sources.board.ratings
    return rated(arena.model_copy(update={"style_control": True}), seed.sources.responses.policy_models).ratings


def _trained(
    session: Session, seed: _Seed, run: CalibrationRun, name: VariantName, pairs: PairSet, ratings: ArtifactRef
) -> dict[str, float]:
    started = time.monotonic()
    base = seed.sources.reward_model
    training = knowing_scores(run.training, base.spec, seed.seen)
    model = train_reward_model(name, base, pairs.pairs, ratings_for(training, ratings), training)
    seconds = _seconds(session, model, time.monotonic() - started)
    scored = score_responses(model.model, seed.split.unseen)
    return {
        **_judged(session, seed, name, scored.scores),
        **_benchmarked(session, run, name, model.model),
        "pairs": float(model.summary.train_pairs),
        **({"seconds": seconds} if seconds is not None else {}),
    }


def _benchmarked(session: Session, run: CalibrationRun, name: VariantName, model: RewardModelRef) -> dict[str, float]:
    return headline_figures(session.store, run_benchmarks(run.benchmarks, {name: model}, ()))


def _judged(
    session: Session, seed: _Seed, name: VariantName, scores: ArtifactRef, *, new_models: bool = True
) -> dict[str, float]:
    split, board, config = seed.split, seed.sources.board, seed.run.mismatch
    known = View(label="held-out prompts", parts=(HELD_OUT,), policy_models=split.seen.policy_models)
    evidence = evaluate_variant(name, scores, split.unseen.responses, board.ratings, split.parts, known, config)
    held_out = seed.run.split.held_out_policy_models
    new = None
    if held_out and new_models:
        view = View(label="held-out policy models", parts=(HELD_OUT,), focus=held_out)
        new = evaluate_variant(name, scores, split.unseen.responses, board.ratings, split.parts, view, config)
    return measures_of(session.store, evidence, new, _truth(seed, name, scores))


def _truth(seed: _Seed, name: VariantName, scores: ArtifactRef) -> ArtifactRef | None:
    if seed.run.simulation is None or seed.sources.simulated is None:
        return None
    view = View(label="held-out prompts", parts=(HELD_OUT,))
    compared = ((name, scores),)
    return judge_truth(
        seed.sources.simulated, seed.run.simulation.arena, compared, seed.mismatch, seed.split.parts, view
    )


def _seconds(session: Session, model: TrainedModel, took: float) -> float | None:
    """How long the training took when it ran: noted then, for a cached step takes no time."""
    name = f"seconds of training {model.model.digest}"
    call = session.ledger.calls[-1]
    if not call.reused:
        session.store.write_note(name, f"{took:.1f}".encode())
    try:
        return float(session.store.read_note(name))
    except ArtifactError:
        return None


def _plain(text: str) -> str:
    return text.replace("δ", "delta").replace("=", "").replace(",", "")


def start(run: AblationRun) -> Outcome:
    """Check the servers and run the flow."""
    check_services()
    return ablate(run)


if __name__ == "__main__":
    sys.exit(run_from_command_line("ablate", AblationRun, ABLATE, start))
