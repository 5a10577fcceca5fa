"""A small calibration's report, measured on made-up scores: good enough for the promotion gate."""

from functools import cache
from typing import Any

import numpy as np
import polars as pl

from charm_core.agreement import compare_mismatch, elo_agreement
from charm_core.mismatch import MismatchConfig, measure_mismatch
from charm_core.promotion_evidence import RepeatedScores
from charm_core.records import Estimate
from charm_core.style_bias import compare_style_correlations, style_correlations
from tasks.pages.report_data import (
    BenchmarkRow,
    BoardInfo,
    InputDigest,
    Provenance,
    ReportComparison,
    ReportData,
    ReportDomain,
    ReportStyleComparison,
    ReportVariant,
    ScoreQuantiles,
    VariantName,
    VariantValue,
)

MODELS = ("terse", "plain", "lively", "flattering")
RATINGS = pl.DataFrame(
    {
        "policy_model": MODELS,
        "rating": [1300.0, 1290.0, 1280.0, 1270.0],
        "rating_low": [1295.0, 1285.0, 1275.0, 1265.0],
        "rating_high": [1305.0, 1295.0, 1285.0, 1275.0],
        "votes": [1000] * 4,
    }
)
CONFIG = MismatchConfig(bootstrap_replicates=100)
REPEATED = RepeatedScores(texts=80, largest_difference=1e-6, standard_deviation=1.0, reordered=0.0)
COMPARED: tuple[tuple[VariantName, VariantName], ...] = (("untouched", "calibrated"), ("control", "calibrated"))


def scores(bias: float) -> pl.DataFrame:
    """Scores that give the last policy model ``bias`` too much."""
    draws = np.random.default_rng(0).normal(0, 1, (60, 4))
    draws[:, -1] += bias
    return pl.DataFrame(
        {
            "prompt_id": [f"p{number:02d}" for number in range(60) for _ in MODELS],
            "policy_model": list(MODELS) * 60,
            "score": draws.ravel(),
        }
    )


def responses() -> pl.DataFrame:
    """Texts whose length and Markdown have nothing to do with their scores."""
    draws = np.random.default_rng(1)
    cells = scores(0.0).select("prompt_id", "policy_model")
    texts = [
        "word " * int(draws.integers(3, 60)) + "**bold** " * int(draws.integers(0, 4)) for _ in range(cells.height)
    ]
    return cells.with_columns(response=pl.Series(texts))


def variant(name: VariantName, bias: float) -> ReportVariant:
    table = scores(bias)
    style = style_correlations(table, responses(), replicates=100)
    quantiles = table.group_by("policy_model").agg(
        **{
            field: pl.col("score").quantile(level, "linear")
            for field, level in [
                ("quantile_05", 0.05),
                ("quantile_25", 0.25),
                ("quantile_75", 0.75),
                ("quantile_95", 0.95),
            ]
        },
        median=pl.col("score").median(),
    )
    return ReportVariant(
        name=name,
        label=name,
        mismatch=measure_mismatch(table, RATINGS, CONFIG),
        agreement=elo_agreement(table, RATINGS, CONFIG),
        score_quantiles=tuple(ScoreQuantiles.model_validate(row) for row in quantiles.to_dicts()),
        length_correlation=style.length.overall,
        style=style,
    )


@cache
def report(calibrated_bias: float = 0.1, untouched_bias: float = 1.5) -> ReportData:
    """A report whose untouched and control reward model have a bias that the calibrated one has lost."""
    biases: dict[VariantName, float] = {
        "untouched": untouched_bias, "control": untouched_bias + 0.1, "calibrated": calibrated_bias,
    }  # fmt: skip
    tables = {name: scores(bias) for name, bias in biases.items()}
    domain = ReportDomain(
        label="held-out prompts",
        variants=tuple(variant(name, bias) for name, bias in biases.items()),
        comparisons=tuple(
            ReportComparison(
                before=before,
                after=after,
                comparison=compare_mismatch(tables[before], tables[after], RATINGS, CONFIG),
            )
            for before, after in COMPARED
        ),
        styles=tuple(
            ReportStyleComparison(
                before=before,
                after=after,
                differences=compare_style_correlations(tables[before], tables[after], responses(), replicates=100),
            )
            for before, after in COMPARED
        ),
    )
    return ReportData(
        kind="calibrate",
        title="sample",
        reward_model="an RM",
        board=BoardInfo(name="text"),
        domains=(domain,),
        benchmarks=(benchmark_row("overall", 0.69, 0.70), benchmark_row("chat", 0.50, 0.70)),
        repeated_scores=REPEATED,
        provenance=Provenance(
            command="python -m flows.calibrate",
            settings_toml="",
            digests=tuple(
                InputDigest(name=name, digest=digit * 64)
                for name, digit in (("ratings", "a"), ("held out responses", "b"))
            ),
        ),
    )


def benchmark_row(subset: str, after: float, before: float) -> BenchmarkRow:
    values = {"untouched": before, "calibrated": after}
    return BenchmarkRow(
        benchmark="RM-Bench",
        subset=subset,
        metric="accuracy",
        items=100,
        values=tuple(
            VariantValue(variant=name, value=Estimate(value=value, low=value - 0.03, high=value + 0.03))
            for name, value in values.items()
        ),
    )


def with_domain(data: ReportData, **changed: Any) -> ReportData:
    """The report with something else in its domain."""
    return data.model_copy(update={"domains": (data.main.model_copy(update=changed), *data.domains[1:])})
