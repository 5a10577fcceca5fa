"""Which benchmarks there are, where their official data is, and what reads it."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from charm_core.benchmarks.benchmark import Benchmark
from charm_core.benchmarks.items import Row
from charm_core.benchmarks.judgebench import judgebench
from charm_core.benchmarks.ppe import ppe
from charm_core.benchmarks.rewardbench import rewardbench
from charm_core.benchmarks.rewardbench_2 import rewardbench_2
from charm_core.benchmarks.rm_bench import parse_rm_bench, rm_bench
from charm_core.benchmarks.rmb import rmb


@dataclass(frozen=True, kw_only=True)
class BenchmarkSource:
    """Where a benchmark's official data is."""

    read: Callable[[Iterable[Row]], Benchmark]
    """From the rows of the hub's dataset, or of local files in the official format, to the benchmark."""
    hub: str | None
    """Dataset on the hub; None where the official data is not there."""
    splits: tuple[str, ...] = ()
    """Splits of the hub's dataset that belong to the benchmark, in the order in which their rows are read."""
    local: str
    """What local files in the official format are."""


def _rm_bench(rows: Iterable[Row]) -> Benchmark:
    return rm_bench(parse_rm_bench(tuple(rows)))


BENCHMARKS: Mapping[str, BenchmarkSource] = {
    "rm_bench": BenchmarkSource(
        read=_rm_bench,
        hub="THU-KEG/RM-Bench",
        splits=("train",),
        local="total_dataset.json, or {domain}_filtered.json with the domain added to each row as 'domain'",
    ),
    "rewardbench": BenchmarkSource(
        read=rewardbench, hub="allenai/reward-bench", splits=("filtered",), local="a Parquet, JSON or JSON-lines file"
    ),
    "rewardbench_2": BenchmarkSource(
        read=rewardbench_2, hub="allenai/reward-bench-2", splits=("test",), local="a Parquet or JSON-lines file"
    ),
    "judgebench": BenchmarkSource(
        read=judgebench, hub="ScalerLab/JudgeBench", splits=("gpt",), local="the JSON-lines files of its repository"
    ),
    "ppe_human_preference": BenchmarkSource(
        read=ppe, hub="lmarena-ai/PPE-Human-Preference-V1", splits=("test",), local="a Parquet or JSON-lines file"
    ),
    "rmb": BenchmarkSource(
        read=rmb, hub=None, local="the JSON files under RMB_dataset of Zhou-Zoey/RMB-Reward-Model-Benchmark"
    ),
}
"""By the name that settings use."""
