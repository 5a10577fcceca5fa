"""Which benchmarks there are; what each is, and where its data is, stands in its own file."""

from collections.abc import Mapping

from charm_core.benchmarks import judgebench, ppe, rewardbench, rewardbench_2, rm_bench, rmb
from charm_core.benchmarks.benchmark import BenchmarkSource

BENCHMARKS: Mapping[str, BenchmarkSource] = {
    "rm_bench": rm_bench.SOURCE,
    "rewardbench": rewardbench.SOURCE,
    "rewardbench_2": rewardbench_2.SOURCE,
    "judgebench": judgebench.SOURCE,
    "ppe_human_preference": ppe.SOURCE,
    "rmb": rmb.SOURCE,
}
"""By the name that settings use."""
