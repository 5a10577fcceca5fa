"""Bradley-Terry from 2 million battles of 150 models, end to end, beside Evalica.

    python -m benchmarks.bradley_terry [--battles 2000000] [--models 150] [--repeat 3]

Prints one table. Both start from the same Polars frame with model names as strings; the fit includes checks, counts and
sandwich intervals. The best of the repeats counts; the ratio is within this run, on this machine.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import polars as pl

from charm_core.bradley_terry import bootstrap_ratings, counts_from_battles, fit_bradley_terry, ratings_from_battles


def drawn_battles(battles: int, models: int, seed: int = 0) -> pl.DataFrame:
    """Battles of a Bradley-Terry world with a quarter of ties."""
    rng = np.random.default_rng(seed)
    strengths = rng.normal(size=models)
    first = rng.integers(models, size=battles)
    second = (first + rng.integers(1, models, size=battles)) % models
    won = rng.random(battles) < 1.0 / (1.0 + np.exp(strengths[second] - strengths[first]))
    tied = rng.random(battles) < 0.25
    names = pl.Series([f"model-{index:03d}-instruct" for index in range(models)])
    return pl.DataFrame(
        {
            "battle_id": np.arange(battles),
            "model_a": names.gather(first),
            "model_b": names.gather(second),
            "winner": np.where(tied, "tie", np.where(won, "model_a", "model_b")),
        }
    )


def evalica_ratings(battles: pl.DataFrame) -> dict[str, float]:
    """The same with Evalica, from the same frame."""
    from evalica import Winner, bradley_terry

    winners = {"model_a": Winner.X, "model_b": Winner.Y, "tie": Winner.Draw}
    outcomes = [winners[winner] for winner in battles["winner"].to_list()]
    result = bradley_terry(battles["model_a"].to_list(), battles["model_b"].to_list(), outcomes, tolerance=1e-8)
    return dict(result.scores)


def best_seconds(run: Callable[[], object], repeat: int) -> float:
    """Seconds of the fastest of several runs."""
    seconds = []
    for _ in range(repeat):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--battles", type=int, default=2_000_000)
    parser.add_argument("--models", type=int, default=150)
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    battles = drawn_battles(arguments.battles, arguments.models)
    counts = counts_from_battles(battles)
    rows = [
        ("ratings_from_battles, end to end", best_seconds(partial(ratings_from_battles, battles), arguments.repeat)),
        ("  of which counts", best_seconds(partial(counts_from_battles, battles), arguments.repeat)),
        ("  of which fit with intervals", best_seconds(partial(fit_bradley_terry, counts), arguments.repeat)),
        (
            "100 bootstrap replicates",
            best_seconds(partial(bootstrap_ratings, counts, replicates=100), arguments.repeat),
        ),
        ("Evalica, end to end, no intervals", best_seconds(partial(evalica_ratings, battles), 1)),
    ]
    print(f"{arguments.battles:,} battles, {arguments.models} models, best of {arguments.repeat}")
    print(f"{'':36}{'seconds':>9}{'× ours':>9}")
    for name, seconds in rows:
        print(f"{name:36}{seconds:9.3f}{seconds / rows[0][1]:9.2f}")


if __name__ == "__main__":
    main()
