"""Offsets, with and without intervals, beside the reference implementation's way of fitting them.

    python -m benchmarks.offsets [--repeat 3]

Prints one table. The reference (HexagonStar/CHARM, ``src/calibrate.py``) takes 100 Adam steps through a sigmoid over all
comparisons in blocks of 1,000 prompts; here two such steps are timed with torch for two models, and scaled.
"""

import argparse
from functools import partial

import numpy as np

from benchmarks.bradley_terry import best_seconds
from benchmarks.mismatch import drawn_tables
from charm_core.offsets import OffsetConfig, fit_offsets
from charm_core.paired_offsets import exact_offset
from charm_core.scores import score_matrix

PROMPTS = 20_000
REFERENCE_STEPS = 100
TIMED_STEPS = 2


def reference_steps(values: np.ndarray, steps: int) -> float:
    """Adam on a cross-prompt sigmoid loss for two models, in the reference's shape; returns the offset reached."""
    import torch

    scores = torch.tensor(values, dtype=torch.float32)
    offset = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.Adam([offset], lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        rates = []
        # the reference fits both orders of the pair
        for one, other, sign in ((0, 1, 1.0), (1, 0, -1.0)):
            blocks = zip(scores[:, one].split(1000), scores[:, other].split(1000), strict=True)
            won = [torch.sigmoid((a[:, None] + sign * offset - b[None, :]) / 0.1).mean() * len(a) for a, b in blocks]
            rates.append(torch.stack(won).sum() / len(scores))
        loss = (rates[0] - 0.4) ** 2 + (rates[1] - 0.6) ** 2
        loss.backward()
        optimizer.step()
    return float(offset.detach())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3)
    repeat = parser.parse_args().repeat
    two, two_board = drawn_tables(PROMPTS, 2)
    seven, seven_board = drawn_tables(PROMPTS, 7)
    values = score_matrix(two).values
    point, interval = OffsetConfig(bootstrap_replicates=0), OffsetConfig(bootstrap_replicates=200)
    crossed = OffsetConfig(bootstrap_replicates=0, estimator="cross_prompt")
    hard = crossed.model_copy(update={"score_temperature": 0.0})
    reference = best_seconds(partial(reference_steps, values, TIMED_STEPS), 1) * REFERENCE_STEPS / TIMED_STEPS
    of_two = partial(fit_offsets, two, two_board, reference_models=["model-00"])
    of_seven = partial(fit_offsets, seven, seven_board, reference_models=["model-00"])
    rows = [
        ("2 models: exact, arrays in", partial(exact_offset, values[:, 0], values[:, 1], 0.4)),
        ("2 models: paired, table in", partial(of_two, config=point)),
        ("2 models: cross_prompt, sigmoid", partial(of_two, config=crossed)),
        ("2 models: cross_prompt, hard", partial(of_two, config=hard)),
        ("7 models: paired", partial(of_seven, config=point)),
        ("7 models: paired, 200 replicates", partial(of_seven, config=interval)),
        ("7 models: cross_prompt, sigmoid", partial(of_seven, config=crossed)),
    ]
    print(f"{PROMPTS:,} prompts, best of {repeat}")
    print(f"{'':36}{'seconds':>10}{'× faster than the reference on 2':>36}")
    print(f"{'2 models: reference, 100 Adam steps':36}{reference:10.1f}{1:36}")
    for name, run in rows:
        seconds = best_seconds(run, repeat)
        print(f"{name:36}{seconds:10.4f}{reference / seconds:36,.0f}")


if __name__ == "__main__":
    main()
