"""Mismatch report with 1,000 bootstrap replicates, and its memory; beside resampling rows replicate by replicate.

    python -m benchmarks.mismatch [--replicates 1000] [--repeat 3]

Prints one table. The plain bootstrap draws rows of the score matrix and compares them anew in every replicate; it is run
for 20 replicates and scaled, and it has no Bradley-Terry fit in it. Peak memory is that of the whole process.
"""

import argparse
import resource
from functools import partial
from itertools import combinations

import numpy as np
import polars as pl

from benchmarks.bradley_terry import best_seconds
from charm_core.mismatch import MismatchConfig, measure_mismatch
from charm_core.scores import score_matrix

PLAIN_REPLICATES = 20
SIZES = ((20_000, 7), (1_300, 40))


def drawn_tables(prompts: int, models: int, missing: float = 0.0, seed: int = 0) -> tuple[pl.DataFrame, pl.DataFrame]:
    """SCORES of a reward model with one overvalued policy model, and RATINGS."""
    rng = np.random.default_rng(seed)
    ratings = np.linspace(1000.0, 1250.0, models)
    values = rng.normal(size=(prompts, 1)) + rng.normal(size=(prompts, models)) + ratings / 200.0
    values[:, 0] += 0.5
    names = [f"model-{index:02d}" for index in range(models)]
    scores = pl.DataFrame(
        {
            "prompt_id": np.repeat([f"prompt-{index:06d}" for index in range(prompts)], models),
            "policy_model": names * prompts,
            "score": values.ravel(),
        }
    ).filter(pl.Series(rng.random(values.size) >= missing))
    board = pl.DataFrame(
        {
            "policy_model": names,
            "rating": ratings,
            "rating_low": ratings - 5.0,
            "rating_high": ratings + 5.0,
            "votes": [10_000] * models,
        }
    )
    return scores, board


def plain_bootstrap(scores: pl.DataFrame, replicates: int) -> list[list[float]]:
    """Win rates of all pairs in each replicate, the obvious way."""
    values = score_matrix(scores).values
    rng = np.random.default_rng(0)
    rates = []
    for _ in range(replicates):
        drawn = values[rng.integers(len(values), size=len(values))]
        rates.append(
            [
                float(np.mean(0.5 + 0.5 * np.sign(drawn[:, j] - drawn[:, k])))
                for j, k in combinations(range(values.shape[1]), 2)
            ]
        )
    return rates


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicates", type=int, default=1000)
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    config = MismatchConfig(bootstrap_replicates=arguments.replicates)
    print(f"{arguments.replicates} replicates, best of {arguments.repeat}")
    print(f"{'prompts × models':20}{'missing':>9}{'seconds':>9}{'plain, s':>10}{'ratio':>7}{'peak, MB':>10}")
    for prompts, models in SIZES:
        for missing in (0.0, 0.05):
            scores, board = drawn_tables(prompts, models, missing)
            ours = best_seconds(partial(measure_mismatch, scores, board, config), arguments.repeat)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            plain = best_seconds(partial(plain_bootstrap, scores, PLAIN_REPLICATES), 1)
            plain *= arguments.replicates / PLAIN_REPLICATES
            print(
                f"{f'{prompts:,} × {models}':20}{missing:9.0%}{ours:9.2f}{plain:10.1f}{plain / ours:7.0f}{peak:10.0f}"
            )


if __name__ == "__main__":
    main()
