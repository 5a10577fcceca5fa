"""Made-up benchmarks whose responses are numbers, scored by a reward model that reads them."""

from typing import Any

import polars as pl

from charm_core.benchmarks.benchmark import Benchmark, benchmark_outcomes, benchmark_texts
from charm_core.benchmarks.results import BenchmarkResult, benchmark_result


def scores_as_written(*benchmarks: Benchmark) -> pl.DataFrame:
    """SCORES in which the response "2.5" scores 2.5."""
    _, responses = benchmark_texts(benchmarks)
    return responses.select("prompt_id", "policy_model", score=pl.col("response").cast(pl.Float64))


def outcomes_as_written(benchmark: Benchmark) -> pl.DataFrame:
    return benchmark_outcomes(benchmark, scores_as_written(benchmark))


def result_as_written(benchmark: Benchmark) -> BenchmarkResult:
    return benchmark_result(benchmark, outcomes_as_written(benchmark), replicates=20)


def values(result: BenchmarkResult) -> dict[tuple[str, str], float | None]:
    return {(figure.subset, figure.metric): figure.value.value for figure in result.figures}


def pair(number: Any, subset: str, chosen: str, rejected: str) -> dict[str, Any]:
    """A row of RewardBench v1."""
    return {"id": number, "subset": subset, "prompt": f"{subset} {number}", "chosen": chosen, "rejected": rejected}


def best_of_four(number: Any, subset: str, chosen: str, *rejected: str) -> dict[str, Any]:
    """A row of RewardBench 2."""
    return {
        "id": number,
        "subset": subset,
        "prompt": f"{subset} {number}",
        "chosen": [chosen],
        "rejected": list(rejected),
    }


def ties_question(kind: str, number: int, chosen: list[str], rejected: list[str]) -> dict[str, Any]:
    """A row of the Ties of RewardBench 2."""
    return {
        "id": f"{kind}:{number}",
        "subset": "Ties",
        "prompt": f"{kind} {number}",
        "chosen": chosen,
        "rejected": rejected,
    }
