"""Is one scoring process with all cores faster, or several with a share of the cores each? Starting them is included.

    python -m benchmarks.scoring_processes [--processes 1 2] [--texts 2000] [--rounds 2]

Scores the same texts, responses of seven policy models to real prompts, with every number of processes in turn, ``--rounds`` times. Prints
one table: the seconds of every round, texts a second in the fastest, and how far a score is from that of the first line at most (rounding).
On a machine with GPUs a process has one GPU, and the threads are all cores.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import polars as pl

from charm_core.reward_model.jobs import ScoringJob
from charm_core.reward_model.spec import RewardModelSpec
from charm_core.tables import PROMPTS, RESPONSES
from tasks import scoring_launch
from tasks.scoring_launch import run_scoring
from tasks.scoring_settings import ScoringProcesses, ScoringSettings, use_scoring

SHARED = Path(__file__).resolve().parents[2] / "shared"
CELL = ["prompt_id", "policy_model"]


def texts(source: Path, count: int) -> tuple[pl.DataFrame, pl.DataFrame]:
    """PROMPTS and RESPONSES: so many texts, responses of seven policy models to each prompt."""
    table = pl.read_parquet(source).filter(~pl.col("is_bad")).unique(["prompt", "model"], keep="first")
    models = table.get_column("model").value_counts(sort=True).sort("count", "model", descending=True)["model"].head(7)
    answered = table.filter(pl.col("model").is_in(models.implode())).with_columns(n=pl.len().over("prompt"))
    answered = answered.filter(pl.col("n") == models.len()).sort("prompt", "model").head(count)
    ids = pl.col("prompt").rank("dense").cast(pl.String).alias("prompt_id")
    asked = [[{"role": "user", "content": prompt}] for prompt in answered["prompt"]]
    named = answered.select(ids, "response", policy_model="model", prompt_set="benchmark").with_columns(
        messages=pl.Series(asked)
    )
    return named.unique("prompt_id").select(list(PROMPTS.columns)), named.select(list(RESPONSES.columns))


def measure(job: ScoringJob, processes: int) -> tuple[float, pl.DataFrame]:
    """Seconds, and SCORES."""
    with use_scoring(ScoringSettings(processes=ScoringProcesses(number=processes))):
        started = time.perf_counter()
        run_scoring(job)
        return time.perf_counter() - started, pl.read_parquet(job.scores_path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--responses", type=Path, default=SHARED / "data" / "responses.parquet")
    parser.add_argument("--reward-model", type=Path, default=SHARED / "models" / "minilm-judge-rm")
    options = parser.parse_args(arguments)
    scoring_launch.TEXTS_PER_PROCESS = 1  # what is asked for is measured, worth it or not
    prompts, responses = texts(options.responses, options.texts)
    with TemporaryDirectory() as folder:
        paths = {name: Path(folder, f"{name}.parquet") for name in ("prompts_path", "responses_path", "scores_path")}
        prompts.write_parquet(paths["prompts_path"])
        responses.write_parquet(paths["responses_path"])
        job = ScoringJob(model=RewardModelSpec(path=str(options.reward_model), max_length=512), **paths)
        seconds: dict[int, list[float]] = {count: [] for count in options.processes}
        scores: dict[int, pl.DataFrame] = {}
        for _ in range(options.rounds):
            for count in options.processes:
                took, scores[count] = measure(job, count)
                seconds[count].append(took)
    print(f"{responses.height} texts\n{'processes':>9} {'seconds':>20} {'texts/s':>8} {'largest difference':>19}")
    for count, times in seconds.items():
        both = scores[options.processes[0]].join(scores[count], on=CELL)
        moved = (both["score"] - both["score_right"]).abs().max()
        rounds = " ".join(f"{took:.1f}" for took in times)
        print(f"{count:>9} {rounds:>20} {responses.height / min(times):>8.0f} {moved:>19.1e}")


if __name__ == "__main__":
    main()
