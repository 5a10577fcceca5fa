"""Does calibration work where the truth is known? The simulated arena of ``make demo`` over several seeds.

Every seed draws its own writers, words, texts, votes and labels, trains its own biased reward model and calibrates it with
the real parts: our Bradley-Terry ratings, offsets, preference pairs, ZeRO-3 training on two ranks. Judged on prompts that
the calibration never saw, on all nine writers and on the pairs with one of the two held-out writers.

    python -m benchmarks.simulated_arena                        # three seeds, about 4 minutes on 2 cores
    python -m benchmarks.simulated_arena --seeds 0 1 2 3 4 --recipes calibrated "margin regression" paper
    python -m benchmarks.simulated_arena --style-variation 1    # styles that are less a trait of the writer

Columns, on held-out prompts: mean |MD|, RMSE of the overvaluation in Elo points, Spearman correlation of mean scores with
the ratings, accuracy against the true quality, mean |MD| of the pairs with a held-out writer. ``control`` is trained in the
same way as ``calibrated`` without any offset and towards the reward model's own win rates.
"""

import argparse
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl
from scipy.stats import t as student

from charm_core.agreement import compare_mismatch, elo_agreement
from charm_core.bradley_terry import ratings_from_battles
from charm_core.mismatch import MismatchConfig, measure_mismatch, own_ratings
from charm_core.offsets import apply_offsets, fit_offsets
from charm_core.preferences import PreferenceConfig, build_preference_pairs
from charm_core.records import Estimate
from charm_core.responses import split_prompts
from charm_core.reward_model.jobs import TrainingJob
from charm_core.reward_model.scoring import score_responses
from charm_core.reward_model.spec import RewardModelSpec, TrainingConfig
from charm_core.reward_model.tiny import build_tiny_reward_model
from charm_core.selection import Selection, select_models
from charm_core.simulation import SimulatedArena, planted_overvaluation, simulate_arena, truth_accuracy
from flows.presets import demo, paper
from flows.runs import CalibrationRun
from tasks.training_launch import run_training

COLUMNS = ("mean |MD|", "RMSE", "Spearman", "accuracy", "held-out writers |MD|")
CONTROL = "control"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a reward model is retrained."""

    preferences: PreferenceConfig
    training: TrainingConfig
    debiased: bool = True


@dataclass(frozen=True, kw_only=True)
class World:
    """One seed's arena, biased reward model and what the calibration may see of it."""

    seed: int
    run: CalibrationRun
    arena: SimulatedArena
    ratings: pl.DataFrame
    base: RewardModelSpec
    scores: pl.DataFrame
    calibration: pl.DataFrame
    """SCORES of the calibration prompts and writers."""
    held_out: pl.DataFrame
    """prompt_id of the held-out prompts."""
    folder: Path


@dataclass(kw_only=True)
class Results:
    """Numbers of every variant, seed by seed."""

    estimates: dict[tuple[str, int], tuple[Estimate, ...]] = field(default_factory=dict)
    against_control: dict[tuple[str, int], Estimate] = field(default_factory=dict)
    planted: list[tuple[float, float]] = field(default_factory=list)
    """Planted and estimated overvaluation of every writer of every seed."""


def recipes(run: CalibrationRun) -> dict[str, Recipe]:
    """The demo's recipe, its control, and what else could be done."""
    same = run.training.model_copy
    return {
        CONTROL: Recipe(preferences=run.preferences, training=run.training, debiased=False),
        "calibrated": Recipe(preferences=run.preferences, training=run.training),
        "margin regression": Recipe(
            preferences=run.preferences, training=same(update={"objective": "margin_regression"})
        ),
        "Bradley-Terry": Recipe(preferences=run.preferences, training=same(update={"objective": "bradley_terry"})),
        "paper": Recipe(preferences=paper().preferences, training=paper().training),
        "paper, our rate": Recipe(
            preferences=paper().preferences, training=same(update={"objective": "bradley_terry", "pairs_per_step": 32})
        ),
    }


def prepare(run: CalibrationRun, seed: int, folder: Path) -> World:
    """Draw an arena and train the biased reward model."""
    if run.simulation is None:
        raise ValueError("the preset must be a simulation")
    arena = simulate_arena(run.simulation.arena)
    build_tiny_reward_model(arena.vocabulary, folder / "untrained", seed=seed)
    untrained = RewardModelSpec(path=str(folder / "untrained"), max_length=run.simulation.max_length)
    base = train(untrained, arena.biased_pairs, None, run.simulation.base_training, folder / "base")
    scores = score_responses(base, arena.prompts, arena.responses).scores
    split = split_prompts(arena.prompts, run.split)
    parts = {name: split.filter(pl.col("part") == name) for name in ("calibration", "held_out")}
    seen = ~pl.col("policy_model").is_in(run.split.held_out_policy_models)
    return World(
        seed=seed,
        run=run,
        arena=arena,
        ratings=ratings_from_battles(arena.battles),
        base=base,
        scores=scores,
        calibration=scores.join(parts["calibration"], on="prompt_id", how="semi").filter(seen),
        held_out=parts["held_out"].select("prompt_id"),
        folder=folder,
    )


def retrain(world: World, name: str, recipe: Recipe, offsets: dict[str, float], selection: Selection) -> pl.DataFrame:
    """SCORES after fine-tuning."""
    models = world.calibration.get_column("policy_model").unique()
    pairs = build_preference_pairs(
        world.arena.prompts,
        world.arena.responses,
        world.calibration,
        {model: offsets[model] if recipe.debiased else 0.0 for model in models},
        recipe.preferences,
        selection,
    )
    board = world.ratings if recipe.debiased else own_ratings(world.calibration)
    targets = board if recipe.training.objective == "win_rate_matching" else None
    spec = train(world.base, pairs.frame, targets, recipe.training, world.folder / name)
    return score_responses(spec, world.arena.prompts, world.arena.responses).scores


def train(
    base: RewardModelSpec, pairs: pl.DataFrame, ratings: pl.DataFrame | None, config: TrainingConfig, folder: Path
) -> RewardModelSpec:
    """Train in processes of their own, as the flow does."""
    folder.mkdir()
    pairs.write_parquet(folder / "pairs.parquet")
    if ratings is not None:
        ratings.write_parquet(folder / "ratings.parquet")
    job = TrainingJob(
        model=base,
        pairs_path=folder / "pairs.parquet",
        ratings_path=None if ratings is None else folder / "ratings.parquet",
        output_dir=folder / "model",
        work_dir=folder / "progress",
        config=config,
    )
    started = time.perf_counter()
    outcome = run_training(job)
    print(
        f"  {folder.name}: {outcome.steps} steps on {outcome.ranks} ranks, {outcome.train_pairs} pairs, loss "
        f"{outcome.first_loss:.3f} to {outcome.last_loss:.3f}, {time.perf_counter() - started:.0f} s",
        flush=True,
    )
    return base.model_copy(update={"path": str(outcome.model_dir)})


def judge(world: World, scores: pl.DataFrame) -> tuple[Estimate, ...]:
    """The columns, on held-out prompts."""
    unseen = scores.join(world.held_out, on="prompt_id", how="semi")
    config, strangers = world.run.mismatch, world.run.split.held_out_policy_models
    report = measure_mismatch(unseen, world.ratings, config)
    return (
        report.mean_absolute_mismatch,
        report.overvaluation_rmse,
        elo_agreement(unseen, world.ratings, config).spearman,
        truth_accuracy(unseen, world.arena.true_quality),
        measure_mismatch(unseen, world.ratings, config, strangers).mean_absolute_mismatch,
    )


def run_seed(world: World, chosen: dict[str, Recipe], results: Results) -> None:
    """Measure every variant of one seed."""
    report = measure_mismatch(world.calibration, world.ratings, world.run.mismatch)
    selection = select_models(report, world.run.selection)
    fit = fit_offsets(
        world.calibration,
        world.ratings,
        world.run.calibration,
        [choice.policy_model for choice in selection.references],
    )
    # nothing is known about the held-out writers, so their scores stay as they are
    offsets = dict.fromkeys(world.run.split.held_out_policy_models, 0.0) | {
        fitted.policy_model: fitted.offset.value for fitted in fit.offsets if fitted.offset.value is not None
    }
    scored = {"untouched": world.scores, "offsets": apply_offsets(world.scores, offsets)}
    for name, recipe in chosen.items():
        scored[name] = retrain(world, name, recipe, offsets, selection)
    for name, scores in scored.items():
        results.estimates[name, world.seed] = judge(world, scores)
        results.against_control[name, world.seed] = compare_mismatch(
            scored[CONTROL].join(world.held_out, on="prompt_id", how="semi"),
            scores.join(world.held_out, on="prompt_id", how="semi"),
            world.ratings,
            MismatchConfig(),
        ).difference
    record_planted(world, results)


def record_planted(world: World, results: Results) -> None:
    """Planted against estimated overvaluation of the untouched reward model."""
    if world.run.simulation is None:
        return
    planted = planted_overvaluation(world.run.simulation.arena)
    for model in measure_mismatch(world.scores, world.ratings, world.run.mismatch).models:
        if model.overvaluation.value is not None:
            results.planted.append((planted[model.policy_model], model.overvaluation.value))


def print_table(results: Results, seeds: list[int]) -> None:
    """One line per variant and seed, then means over seeds with 95 % t intervals, then gains over the control."""
    names = list(dict.fromkeys(name for name, _ in results.estimates))
    print(f"\n{'':22s}" + "".join(f"{column:>24s}" for column in COLUMNS) + f"{'|MD| minus control':>24s}")
    for seed in seeds:
        for name in names:
            cells = (*results.estimates[name, seed], results.against_control[name, seed])
            print(f"{name:18s} s{seed:<3d}" + "".join(f"{_interval(cell):>24s}" for cell in cells))
    values = {
        name: np.array([[cell.value for cell in results.estimates[name, seed]] for seed in seeds], dtype=np.float64)
        for name in names
    }
    print("\nmean over seeds [95 % t interval]")
    for name in names:
        print(f"{name:22s}" + "".join(f"{_over_seeds(column):>24s}" for column in values[name].T))
    print("\ndifference to control, paired by seed")
    for name in names:
        if name != CONTROL:
            differences = (values[name] - values[CONTROL]).T
            print(f"{name:22s}" + "".join(f"{_over_seeds(column):>24s}" for column in differences))
    planted, estimated = np.array(results.planted).T
    print(
        f"\nplanted against estimated overvaluation, {planted.size} writers: correlation "
        f"{np.corrcoef(planted, estimated)[0, 1]:.3f}, slope {np.polyfit(planted, estimated, 1)[0]:.2f}, "
        f"RMS difference {np.sqrt(np.mean((planted - estimated) ** 2)):.0f} Elo points"
    )


def _interval(cell: Estimate) -> str:
    digits = 0 if cell.value is not None and abs(cell.value) > 2 else 3
    low, high = ("?" if end is None else f"{end:.{digits}f}" for end in (cell.low, cell.high))
    return f"{cell.value:.{digits}f} [{low}, {high}]"


def _over_seeds(values: np.ndarray) -> str:
    half = (
        student.ppf(0.975, values.size - 1) * values.std(ddof=1) / np.sqrt(values.size) if values.size > 1 else np.nan
    )
    digits = 0 if np.abs(values).max() > 2 else 3
    return f"{values.mean():.{digits}f} [{values.mean() - half:.{digits}f}, {values.mean() + half:.{digits}f}]"


def seeded(run: CalibrationRun, seed: int, style_variation: float | None) -> CalibrationRun:
    """The preset with another seed everywhere."""
    if run.simulation is None:
        raise ValueError("the preset must be a simulation")
    changes = {"seed": seed} | ({} if style_variation is None else {"style_variation": style_variation})
    simulation = run.simulation.model_copy(
        update={
            "arena": run.simulation.arena.model_copy(update=changes),
            "base_training": run.simulation.base_training.model_copy(update={"seed": seed}),
        }
    )
    return run.model_copy(
        update={
            "simulation": simulation,
            "split": run.split.model_copy(update={"seed": seed}),
            "training": run.training.model_copy(update={"seed": seed}),
        }
    )


def main(arguments: Iterable[str] | None = None) -> None:
    """Run the benchmark."""
    names = list(recipes(demo()))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipes", nargs="+", default=["calibrated"], choices=names, help="besides the control")
    parser.add_argument("--style-variation", type=float, default=None, help="default: the preset's")
    options = parser.parse_args(None if arguments is None else list(arguments))
    results = Results()
    for seed in options.seeds:
        print(f"seed {seed}", flush=True)
        run = seeded(demo(), seed, options.style_variation)
        chosen = {name: recipe for name, recipe in recipes(run).items() if name in (CONTROL, *options.recipes)}
        with tempfile.TemporaryDirectory(prefix="charm-simulated-") as folder:
            run_seed(prepare(run, seed, Path(folder)), chosen, results)
    print_table(results, options.seeds)


if __name__ == "__main__":
    main()
