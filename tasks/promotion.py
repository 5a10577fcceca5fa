"""From a report to the gate's evidence, and from the gate's verdict to words."""

from collections.abc import Iterator, Mapping
from typing import Literal

import numpy as np
from pydantic import Field

from charm_core.promotion import Finding, GateConfig, Result, Verdict, judge_evidence
from charm_core.promotion_evidence import BiasChange, MeasuredChange, PromotionEvidence, SpreadChange, repeated_scores
from charm_core.records import Estimate, Record
from charm_core.style_bias import StyleCorrelation
from charm_core.tables import PROMPTS, RESPONSES, SCORES
from tasks.caching import step
from tasks.pages.report_data import BenchmarkRow, ReportData, ReportDomain, ReportVariant, VariantName
from tasks.pages.report_text import number, span
from tasks.prompts import ResponseSet
from tasks.scoring import RewardModelRef, score_responses
from tasks.store import ArtifactRef, ArtifactStore

BEFORE: VariantName = "untouched"
AFTER: VariantName = "calibrated"

_OVERALL_METRICS = ("total", "overall")
_OTHER_BATCH_TOKENS = 1024
_MARKS: dict[Result, str] = {
    "passed": "✓ passed",
    "failed": "✗ failed",
    "not measured": "? not measured",
    "not applicable": "– not applicable",
}


class Repetition(Record):
    """Which texts are scored a second time."""

    prompts: int = Field(ge=1)
    seed: int = 0


def score_again(
    model: RewardModelRef, responses: ResponseSet, scores: ArtifactRef, config: GateConfig
) -> ArtifactRef | None:
    """Score some of the responses a second time, in other batches with other neighbours, from the stored weights.

    Args:
        model: The calibrated reward model.
        responses: Those that were scored.
        scores: What they got.
        config: How many prompts.

    Returns:
        A RepeatedScores record; None where the configuration asks for none.
    """
    if not config.repeat_prompts:
        return None
    some = choose_repeated(responses, Repetition(prompts=config.repeat_prompts))
    otherwise = model.spec.model_copy(update={"batch_tokens": _OTHER_BATCH_TOKENS, "batching": "padded"})
    again = score_responses(model.model_copy(update={"spec": otherwise}), some)
    return compare_repeated(scores, again.scores)


@step(version=1)
def choose_repeated(store: ArtifactStore, responses: ResponseSet, config: Repetition) -> ResponseSet:
    """All responses to a seeded choice of prompts."""
    prompts = store.read_table(responses.prompts, PROMPTS).sort("prompt_id")
    chosen = np.random.default_rng(config.seed).permutation(prompts.height)[: config.prompts]
    kept = prompts[np.sort(chosen).tolist()]
    texts = store.read_table(responses.responses, RESPONSES).join(kept, on="prompt_id", how="semi")
    return ResponseSet(
        prompts=store.write_table(kept, PROMPTS),
        responses=store.write_table(texts, RESPONSES),
        policy_models=tuple(texts.get_column("policy_model").unique().sort().to_list()),
    )


@step(version=1)
def compare_repeated(store: ArtifactStore, first: ArtifactRef, again: ArtifactRef) -> ArtifactRef:
    """How far two scorings of the same texts lie apart."""
    repeated = repeated_scores(store.read_table(first, SCORES), store.read_table(again, SCORES))
    return store.write_record(repeated, "repeated_scores")


def judge_report(data: ReportData, config: GateConfig) -> Verdict:
    """The gate's verdict on a report, without the one rule that depends on who is champion."""
    return judge_evidence(evidence_of(data, parts=config.benchmark_parts), config)


def evidence_of(data: ReportData, *, parts: bool = False) -> PromotionEvidence:
    """What the gate looks at.

    Args:
        data: A report with the untouched, the control and the calibrated reward model.
        parts: Every figure of a benchmark, not only the overall ones.
    """
    return PromotionEvidence(
        mismatch_untouched=mismatch_change(data.main, BEFORE),
        mismatch_control=mismatch_change(data.main, "control"),
        mismatch_elsewhere=tuple(
            change for domain in data.domains[1:] if (change := mismatch_change(domain, BEFORE)) is not None
        ),
        benchmarks=tuple(_benchmark_change(row) for row in _judged_rows(data, parts=parts)),
        length_bias=tuple(_bias_changes(data, "length")),
        markdown_bias=tuple(_bias_changes(data, "markdown")),
        spread=tuple(_spread_changes(data)),
        repeated=data.repeated_scores,
    )


def mismatch_change(domain: ReportDomain, before: VariantName) -> MeasuredChange | None:
    """Mean |MD| of the calibrated reward model against another variant; None where they were not compared."""
    comparison = domain.comparison(before, AFTER)
    if comparison is None:
        return None
    return MeasuredChange(
        what=domain.label, before=comparison.before, after=comparison.after, difference=comparison.difference
    )


def _judged_rows(data: ReportData, *, parts: bool) -> Iterator[BenchmarkRow]:
    """The overall figures of a benchmark, or all of its figures where none is called overall."""
    for benchmark in dict.fromkeys(row.benchmark for row in data.benchmarks):
        rows = [row for row in data.benchmarks if row.benchmark == benchmark]
        overall = [row for row in rows if row.subset.startswith("overall") or row.metric in _OVERALL_METRICS]
        yield from rows if parts or not overall else overall


def _benchmark_change(row: BenchmarkRow) -> MeasuredChange:
    values = {one.variant: one.value for one in row.values}
    paired = (test.difference for test in row.tests if (test.before, test.after) == (BEFORE, AFTER))
    return MeasuredChange(
        what=", ".join(filter(None, (row.benchmark, row.subset, row.metric))),
        before=values.get(BEFORE, Estimate(value=None)),
        after=values.get(AFTER, Estimate(value=None)),
        difference=next(paired, None),
    )


def _both(data: ReportData) -> Iterator[tuple[ReportDomain, ReportVariant, ReportVariant]]:
    for domain in data.domains:
        before, after = domain.variant(BEFORE), domain.variant(AFTER)
        if before is not None and after is not None:
            yield domain, before, after


def _bias_changes(data: ReportData, style: Literal["length", "markdown"]) -> Iterator[BiasChange]:
    """The main domain in any case, so that a missing number shows; another one where it has numbers."""
    for domain, before, after in _both(data):
        first, second = (_bias(variant, style) for variant in (before, after))
        if domain is data.main or first is not None or second is not None:
            paired = (one.differences for one in domain.styles if (one.before, one.after) == (BEFORE, AFTER))
            differences = next(paired, None)
            yield BiasChange(
                what=domain.label,
                before=first,
                after=second,
                difference=getattr(differences, style) if differences is not None else None,
            )


def _bias(variant: ReportVariant, style: Literal["length", "markdown"]) -> float | None:
    """Within prompts: between prompts a correlation also says which prompts have long answers."""
    if variant.style is not None:
        correlation: StyleCorrelation = getattr(variant.style, style)
        return correlation.within_prompt.value
    return variant.length_correlation if style == "length" else None


def _spread_changes(data: ReportData) -> Iterator[SpreadChange]:
    for domain, before, after in _both(data):
        yield SpreadChange(
            what=domain.label,
            tie_rate_before=before.mismatch.tie_rate,
            tie_rate_after=after.mismatch.tie_rate,
            spread_before=_typical_spread(before),
            spread_after=_typical_spread(after),
        )


def _typical_spread(variant: ReportVariant) -> float | None:
    """Median over policy models, so that one with an odd spread does not decide."""
    spreads = [one.quantile_95 - one.quantile_05 for one in variant.score_quantiles]
    return float(np.median(spreads)) if spreads else None


def gate_section(data: ReportData) -> str:
    """The verdict as the last section of a model card; empty where nothing was judged."""
    if data.verdict is None:
        return ""
    return f"\n## Promotion gate\n\n{verdict_markdown(data.verdict)}\n"


def verdict_markdown(verdict: Verdict) -> str:
    """The verdict as Markdown: one sentence, and one line per number that was held against a rule."""
    sentence = verdict.sentence()
    lines = [f"**{sentence[0].upper()}{sentence[1:]}.**", ""]
    lines += ["| rule | answer | measured on | before | after | difference | demand |"]
    lines += ["| --- | --- | --- | ---: | ---: | --- | --- |"]
    for rule in verdict.rules:
        mark = _MARKS[rule.result] + ("" if rule.stops or rule.result != "not measured" else ", which is allowed")
        shown = rule.findings or (Finding(what=rule.note, demand="", result=rule.result),)
        for place, finding in enumerate(shown):
            head = (rule.title, mark) if place == 0 else ("", "")
            cells = (*head, *finding_cells(finding).values(), _demand(finding, alone=len(shown) == 1))
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def finding_cells(finding: Finding) -> Mapping[str, str]:
    """The numbers of a finding as text."""
    difference = finding.difference
    change = f"{number(difference.value, 3, signed=True)} {span(difference, 3, signed=True)}" if difference else "–"
    return {
        "what": finding.what,
        "before": number(finding.before, 3),
        "after": number(finding.after, 3),
        "difference": change.strip(),
    }


def _demand(finding: Finding, *, alone: bool) -> str:
    return finding.demand if alone or finding.result == "passed" else f"{finding.demand}: {_MARKS[finding.result]}"
