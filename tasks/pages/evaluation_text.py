"""The words of an evaluation: its answer in one sentence, and the summary for the terminal."""

from collections.abc import Sequence

from charm_core.records import Estimate
from tasks.pages.evaluation_page_data import EvaluationData
from tasks.pages.report_data import BenchmarkRow, BenchmarkTest
from tasks.pages.report_figures import first_of_each
from tasks.pages.report_text import aligned, number, span

_LISTED = 4


def evaluation_answer(data: EvaluationData) -> str:
    """Say in one sentence what was found, no more than the intervals allow."""
    parts = _compared(data) if len(data.models) == 2 else _alone(data)
    text = f"{'; '.join(parts)}."
    return f"In this simulation, {text}" if data.simulated else text


def verdict(test: BenchmarkTest) -> int:
    """1 or -1 where the second does better or worse beyond the interval of the difference, otherwise 0."""
    low, high = test.difference.low, test.difference.high
    if low is None or high is None:
        return 0
    return int(low > 0) - int(high < 0)


def _alone(data: EvaluationData) -> list[str]:
    (model,) = data.models
    parts = []
    rows = first_of_each(data.benchmarks)
    if rows:
        shown = ", ".join(
            f"{_estimate(row.values[0].value)} on {row.benchmark} (length only {number(row.length_only, 3)})"
            for row in rows[:_LISTED]
        )
        more = f" and {len(rows) - _LISTED} more benchmarks" if len(rows) > _LISTED else ""
        parts.append(f"{model.label} gets {shown}{more}")
    if data.domains:
        domain, variant = data.domains[0], data.domains[0].variants[0]
        spearman = variant.agreement.spearman if variant.agreement else None
        rank = f", Spearman of mean score with Elo {_estimate(spearman, 2)}" if spearman else ""
        subject = "its" if parts else f"the {model.label}'s" if data.simulated else f"{model.label}'s"
        parts.append(
            f"{subject} mean absolute mismatch on {domain.label} is {_estimate(variant.mismatch.mean_absolute_mismatch)}, its "
            f"Elo is off by {_estimate(variant.mismatch.overvaluation_rmse, 0)} points (RMSE){rank}"
        )
    return parts


def _compared(data: EvaluationData) -> list[str]:
    before, after = data.models
    parts = []
    rows = [row for row in first_of_each(data.benchmarks) if row.tests]
    if rows:
        verdicts = {row.benchmark: verdict(row.tests[0]) for row in rows}
        better = [name for name, value in verdicts.items() if value > 0]
        worse = [name for name, value in verdicts.items() if value < 0]
        parts.append(
            f"of {len(rows)} benchmarks {after.label} does better than {before.label} on {_counted(better)} and worse on "
            f"{_counted(worse)}; where not said, the interval of the difference includes 0"
        )
    if data.domains:
        domain = data.domains[0]
        change = domain.comparison(before.variant, after.variant)
        if change is not None:
            parts.append(
                f"on {domain.label} mean absolute mismatch is {number(change.before.value, 3)} with {before.label} and "
                f"{number(change.after.value, 3)} with {after.label} (difference {_estimate(change.difference, signed=True)})"
            )
    return [
        f"{part[0].upper()}{part[1:]}" if index == 0 and not data.simulated else part
        for index, part in enumerate(parts)
    ]


def _counted(names: Sequence[str]) -> str:
    return f"{len(names)} ({', '.join(names)})" if names else "none"


def _estimate(estimate: Estimate | None, digits: int = 3, *, signed: bool = False) -> str:
    if estimate is None:
        return "–"
    return f"{number(estimate.value, digits, signed=signed)} {span(estimate, digits, signed=signed)}".strip()


def evaluation_summary(data: EvaluationData) -> str:
    """The evaluation in a few lines for a terminal."""
    parts = [evaluation_answer(data)]
    labels = [model.label for model in data.models]
    rows = first_of_each(data.benchmarks)
    if rows:
        header = ["benchmark", "items", *labels, "length only", *(["difference"] if len(labels) == 2 else [])]
        parts.append(f"benchmarks, with {100 * data.confidence:g} % intervals")
        parts.append(aligned([header, *(_benchmark_line(data, row) for row in rows)]))
    for domain in data.domains:
        parts.append(
            f"{domain.label} ({domain.variants[0].mismatch.prompts:,} prompts), with {domain.coverage} intervals"
        )
        lines = [
            [
                variant.label,
                _estimate(variant.mismatch.mean_absolute_mismatch),
                _estimate(variant.mismatch.overvaluation_rmse, 0),
                _estimate(variant.agreement.spearman if variant.agreement else None, 2),
                _estimate(variant.style.length.within_prompt if variant.style else None, 2, signed=True),
                _estimate(variant.style.markdown.within_prompt if variant.style else None, 2, signed=True),
            ]
            for variant in domain.variants
        ]
        header = ["reward model", "mean |MD|", "RMSE (Elo)", "Spearman with Elo", "score–length", "score–Markdown"]
        parts.append(aligned([header, *lines]))
    parts.extend(data.notes)
    parts.extend(f"warning: {warning}" for warning in data.warnings)
    return "\n\n".join(parts) + "\n"


def _benchmark_line(data: EvaluationData, row: BenchmarkRow) -> list[str]:
    values = {value.variant: value.value for value in row.values}
    cells = [_estimate(values.get(model.variant)) for model in data.models]
    difference = [_estimate(row.tests[0].difference, signed=True) if row.tests else "–"] if len(cells) == 2 else []
    return [
        f"{row.benchmark}, {row.subset} {row.metric}",
        f"{row.items:,}",
        *cells,
        number(row.length_only, 3),
        *difference,
    ]
