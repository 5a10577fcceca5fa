"""Benchmarks of a reward model, before and after: RM-Bench items, scored like any other responses."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from charm_core.benchmarks.rm_bench import read_items, rm_bench_texts, score_rm_bench
from charm_core.tables import PROMPTS, RESPONSES, SCORES
from tasks.caching import step
from tasks.evidence import BenchmarkRows
from tasks.prompts import ResponseSet
from tasks.reporting import BenchmarkRow, VariantName, VariantValue
from tasks.store import ArtifactRef, ArtifactStore, SourceFile


class BenchmarksConfig(BaseModel):
    """Which benchmarks are run on the untouched, the control and the calibrated reward model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rm_bench: dict[str, str] = Field(
        default={}, description="RM-Bench files in the official JSON format, by domain, such as chat = 'chat_filtered.json'."
    )
