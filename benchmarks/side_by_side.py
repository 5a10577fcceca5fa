"""Scorings at once on one machine: threads that wait by spinning for long, as OpenMP's do by themselves, or briefly, as CHARM's.

    python -m benchmarks.side_by_side [--texts 100] [--repeat 3]

The same texts and the same encoder as in ``benchmarks.scoring``, all cores for each process. Ways take turns; the table has the median
of the seconds that one job takes, alone and beside its like, and the ratio of the two ways.
"""

import argparse
import os
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.scoring import drawn_texts, run
from benchmarks.training_inputs import RESPONSES, build_model, made_up_responses, real_responses
from charm_core.reward_model.spec import RewardModelSpec
from flows.settings import CHECKOUT
from tasks.worker_processes import WAITING

MAX_LENGTH = 512
SPINNING = {"GOMP_SPINCOUNT": "300000"}
"""What libgomp takes by itself; where nothing is set, workers get CHARM's."""


def seconds(spec: RewardModelSpec, table: Path, jobs: int, waiting: dict[str, str]) -> float:
    """Of the slowest of so many jobs at once."""
    os.environ.update(waiting)
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        took = list(pool.map(lambda _: run("shared", spec, table, 1), range(jobs)))
    return max(each for each, _ in took)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=100)
    parser.add_argument("--jobs", type=int, nargs="+", default=[1, 2], help="how many at once")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--shared", type=Path, default=CHECKOUT.parent / "shared")
    options = parser.parse_args()
    shared: Path = options.shared
    real = (shared / RESPONSES).is_file()
    responses = real_responses(shared) if real else made_up_responses(options.texts * 2, 1, 0)
    with TemporaryDirectory(prefix="charm-side-by-side-") as name:
        table, model = Path(name, "texts.parquet"), Path(name, "model")
        drawn_texts(responses, prompts=options.texts, policy_models=1, long_prompts=False, seed=0).write_parquet(table)
        build_model("encoder", model, shared, layers=None, max_length=MAX_LENGTH)
        spec = RewardModelSpec(path=str(model), max_length=MAX_LENGTH, dtype="float32")
        taken: dict[int, list[tuple[float, float]]] = {jobs: [] for jobs in options.jobs}
        for _ in range(options.repeat):
            for jobs, pairs in taken.items():
                pairs.append((seconds(spec, table, jobs, SPINNING), seconds(spec, table, jobs, WAITING)))
    print(f"{'real' if real else 'made-up'} texts: {options.texts}, {len(os.sched_getaffinity(0))} cores")
    print(f"{'jobs at once':14}{'spinning':>10}{'briefly':>10}{'ratio':>8}")
    for jobs, pairs in taken.items():
        spinning, briefly = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"{jobs:<14}{spinning:>8.1f} s{briefly:>8.1f} s{spinning / briefly:>7.2f}x")


if __name__ == "__main__":
    main()
