"""Which of several policy models answers better: by the truth of a simulation, by a judge, by reward models; and how it is said."""

import polars as pl

from charm_core.policy_comparison import ComparisonConfig, PolicyComparison, compare_policies
from charm_core.records import Estimate
from charm_core.simulated_reading import quality_of, read_texts
from charm_core.simulation import SimulationConfig
from charm_core.tables import PREFERENCES, PROMPTS, RESPONSES, SCORES
from tasks.caching import step
from tasks.prompts import ResponseSet
from tasks.store import ArtifactRef, ArtifactStore


@step(version=1)
def compare_answers(
    store: ArtifactStore,
    responses: ResponseSet,
    policy_models: tuple[str, ...],
    compared: tuple[tuple[str, str], ...],
    config: ComparisonConfig,
    world: SimulationConfig | None = None,
    scores: tuple[tuple[str, ArtifactRef], ...] = (),
    preferences: tuple[tuple[str, ArtifactRef], ...] = (),
) -> ArtifactRef:
    """Which policy models answer better.

    Args:
        store: Where everything is.
        responses: Of all of them to the same prompts.
        policy_models: Their names, in the order of a table.
        compared: (before, after).
        config: Intervals.
        world: The simulated arena that they write about, if one: then its truth decides.
        scores: Reward model and its SCORES of these responses, to see what it believes.
        preferences: Judge and its PREFERENCES.

    Returns:
        A PolicyComparison.
    """
    texts = store.read_table(responses.responses, RESPONSES)
    measures = {"characters": _scored(texts, pl.col("response").str.len_chars())}
    measures |= {f"score of {name}": store.read_table(ref, SCORES) for name, ref in scores}
    if world is not None:
        read = read_texts(world, store.read_table(responses.prompts, PROMPTS), texts)
        measures = {
            "true quality": quality_of(world, read),
            "right words": _scored(read, pl.col("right")),
            "wrong words": _scored(read, pl.col("myth") + pl.col("beside")),
            "flourishes": _scored(read, pl.col("flourish")),
            "words": _scored(read, pl.col("words")),
            **measures,
        }
    comparison = compare_policies(
        measures,
        policy_models,
        compared,
        config,
        decided_by={"truth": "true quality"} if world is not None else {},
        preferences={name: store.read_table(ref, PREFERENCES) for name, ref in preferences},
    )
    return store.write_record(comparison, "policy_comparison")


def comparison_markdown(comparison: PolicyComparison) -> str:
    """A table of means, and one of differences and win rates."""
    measures = list(dict.fromkeys(mean.measure for mean in comparison.means))
    lines = [f"| policy model | {' | '.join(measures)} |", f"|---{'|---' * len(measures)}|"]
    for name in comparison.policy_models:
        cells = [_cell(mean.value) for mean in comparison.means if mean.policy_model == name]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    pairs = list(dict.fromkeys((item.before, item.after) for item in comparison.differences))
    judges = list(dict.fromkeys(win.judge for win in comparison.win_rates))
    lines += ["", f"| after − before | {' | '.join([*measures, *(f'win rate by {judge}' for judge in judges)])} |"]
    lines += [f"|---{'|---' * (len(measures) + len(judges))}|"]
    for before, after in pairs:
        gains = [
            _cell(item.difference) for item in comparison.differences if (item.before, item.after) == (before, after)
        ]
        wins = {
            win.judge: win.win_rate
            for win in comparison.win_rates
            if (win.opponent, win.policy_model) == (before, after)
        }
        gains += [_cell(wins[judge]) if judge in wins else "" for judge in judges]
        lines.append(f"| {after} − {before} | {' | '.join(gains)} |")
    return "\n".join(lines)


def comparison_summary(comparison: PolicyComparison, title: str, *, simulated: bool) -> list[str]:
    """The result in a few lines for the terminal."""
    lines = [f"{title}: {len(comparison.policy_models)} policies on {comparison.prompts:,} exam prompts"]
    if simulated:
        lines.append(
            "         This is a simulation: it shows that the parts work together, not the size of a real gain."
        )
    for measure in dict.fromkeys(mean.measure for mean in comparison.means):
        cells = [f"{mean.policy_model} {_cell(mean.value)}" for mean in comparison.means if mean.measure == measure]
        lines.append(f"         {measure}: {', '.join(cells)}")
    lines += [
        f"         {win.policy_model} beats {win.opponent} by {win.judge} on {_cell(win.win_rate)} of {win.prompts:,} prompts"
        for win in comparison.win_rates
    ]
    return lines


def comparison_metrics(comparison: PolicyComparison) -> dict[str, float | None]:
    """Numbers for MLflow."""
    metrics = {f"{mean.policy_model}/{mean.measure}": mean.value.value for mean in comparison.means}
    metrics |= {
        f"{item.after} minus {item.before}/{item.measure}": item.difference.value for item in comparison.differences
    }
    return metrics | {
        f"{win.policy_model} over {win.opponent}/win rate by {_plain(win.judge)}": win.win_rate.value
        for win in comparison.win_rates
    }


def _plain(name: str) -> str:
    # MLflow allows letters, digits, and _ - . : / and spaces
    return "".join(char if char.isalnum() or char in "_-.: " else "_" for char in name)


def _cell(estimate: Estimate) -> str:
    ends = (estimate.value, estimate.low, estimate.high)
    value, low, high = ("?" if end is None else f"{end:.2f}" for end in ends)
    return f"{value} [{low}, {high}]"


def _scored(table: pl.DataFrame, value: pl.Expr) -> pl.DataFrame:
    return table.select("prompt_id", "policy_model", value.cast(pl.Float64).alias("score"))
