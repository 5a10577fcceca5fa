"""Benchmarks of a reward model, before and after: their texts are scored like any other responses."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from charm_core.benchmarks.rm_bench import (
    File,
    RmBenchItem,
    RmBenchResult,
    parse_rm_bench,
    rm_bench_length_baseline,
    rm_bench_replicates,
    rm_bench_texts,
    score_rm_bench,
)
from charm_core.errors import TableError
from charm_core.records import Estimate
from charm_core.tables import PROMPTS, RESPONSES, SCORES
from tasks.caching import step
from tasks.evidence import BenchmarkRows
from tasks.prompts import ResponseSet
from tasks.report_data import BenchmarkRow, VariantName, VariantValue
from tasks.scoring import RewardModelRef, score_responses
from tasks.store import ArtifactRef, ArtifactStore, SourceFile, source_file

_FIGURES = ("hard", "normal", "easy", "total")
_BOOTSTRAP_REPLICATES = 1000


class BenchmarksConfig(BaseModel):
    """Which benchmarks the untouched, the control and the calibrated reward model are put to."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rm_bench: dict[File, str] = Field(
        default={}, description="RM-Bench files in the official JSON format, such as chat = 'chat_filtered.json'."
    )


def run_benchmarks(config: BenchmarksConfig, models: Mapping[VariantName, RewardModelRef]) -> tuple[ArtifactRef, ...]:
    """Score all benchmark texts with every model and tabulate."""
    if not config.rm_bench:
        return ()
    files = tuple((name, source_file(path)) for name, path in sorted(config.rm_bench.items()))
    texts = load_rm_bench(files)
    scores = tuple((name, score_responses(model, texts).scores) for name, model in models.items())
    return (tabulate_rm_bench(files, scores),)


@step(version=1)
def load_rm_bench(store: ArtifactStore, files: tuple[tuple[File, SourceFile], ...]) -> ResponseSet:
    """The texts of RM-Bench that a reward model has to score."""
    prompts, responses = rm_bench_texts(_items(files))
    return ResponseSet(
        prompts=store.write_table(prompts, PROMPTS),
        responses=store.write_table(responses, RESPONSES),
        policy_models=tuple(responses.get_column("policy_model").unique().sort().to_list()),
    )


@step(version=1)
def tabulate_rm_bench(
    store: ArtifactStore,
    files: tuple[tuple[File, SourceFile], ...],
    scores: tuple[tuple[VariantName, ArtifactRef], ...],
) -> ArtifactRef:
    """RM-Bench figures of every model, with intervals over items and the length-only baseline."""
    items = _items(files)
    results = {name: _with_replicates(store, items, ref) for name, ref in scores}
    baseline = rm_bench_length_baseline(items)
    note = next(iter(results.values()))[0].note
    rows = tuple(
        BenchmarkRow(
            benchmark="RM-Bench",
            subset=", ".join(name for name, _ in files),
            metric=figure,
            items=len(items),
            values=tuple(
                VariantValue(variant=name, value=_estimate(result, replicates, figure))
                for name, (result, replicates) in results.items()
            ),
            length_only=getattr(baseline, figure),
            note=note,
        )
        for figure in _FIGURES
    )
    return store.write_record(BenchmarkRows(rows=rows), "benchmark")


def _items(files: tuple[tuple[File, SourceFile], ...]) -> tuple[RmBenchItem, ...]:
    items: list[RmBenchItem] = []
    for name, file in files:
        try:
            document = json.loads(Path(file.path).read_text())
        except ValueError as error:
            raise TableError(f"{file.path} is not JSON: {error}") from None
        items.extend(parse_rm_bench(document, name))
    return tuple(items)


def _with_replicates(
    store: ArtifactStore, items: tuple[RmBenchItem, ...], scores: ArtifactRef
) -> tuple[RmBenchResult, dict[str, list[float]]]:
    table = store.read_table(scores, SCORES)
    result = score_rm_bench(items, table)
    replicates = rm_bench_replicates(items, table, _BOOTSTRAP_REPLICATES)
    return result, replicates


def _estimate(result: RmBenchResult, replicates: dict[str, list[float]], figure: str) -> Estimate:
    low, high = np.quantile(replicates[figure], [0.025, 0.975])
    return Estimate(value=getattr(result, figure), low=float(low), high=float(high))
