"""The words of a report: its answer in one sentence, the terminal summary, tables in Markdown, the model card.

Pure functions: the same ``ReportData`` gives the same text, byte for byte.
"""

import json
import math
from collections.abc import Sequence
from functools import partial

from charm_core.agreement import MismatchComparison
from charm_core.mismatch import MismatchReport, ModelMismatch
from charm_core.records import Estimate
from tasks.pages.report_data import ReportData, ReportDomain, ReportVariant


def answer(data: ReportData) -> str:
    """Say in one sentence what was found, no more than the intervals allow."""
    text = _audit_answer(data) if data.kind == "audit" else _calibration_answer(data)
    return f"In this simulation, {text}." if data.simulated else f"{text[0].upper()}{text[1:]}."


def _audit_answer(data: ReportData) -> str:
    report = data.main.variants[0].mismatch
    top = max(report.models, key=_overvaluation)
    flagged = [model for model in report.models if model.flagged]
    over = sum(_overvaluation(model) > 0 for model in flagged)
    overvalued = top.flagged and _overvaluation(top) > 0
    range_ = f"{data.main.coverage} {interval(top.overvaluation, 0, signed=not overvalued)}"
    by = f"{number(top.overvaluation.value, 0, signed=not overvalued)} Elo points ({range_})"
    count = (
        f"{len(flagged)} of {len(report.models)} policy models are flagged after Holm's correction "
        f"({over} overvalued, {len(flagged) - over} undervalued)"
    )
    if overvalued:
        return f"the reward model {data.reward_model} overvalues {top.policy_model} the most, by {by}; {count}"
    return (
        f"no policy model is significantly overvalued by the reward model {data.reward_model}: the largest estimate is "
        f"{by} for {top.policy_model}; {count}"
    )


def _calibration_answer(data: ReportData) -> str:
    where = f"on {data.main.label}, calibration"
    whose = f"the mean absolute mismatch of {data.reward_model}"
    change = data.main.comparison("untouched", "calibrated")
    if change is None:
        return f"{where} of {data.reward_model} was not compared with the untouched reward model"
    direction = _direction(change.difference)
    before, after = number(change.before.value, 3), number(change.after.value, 3)
    verb = {-1: "lowered", 0: "did not clearly change", 1: "raised"}[direction]
    numbers = (
        f"from {before} to {after}" if direction else f"({before} before, {after} after; {_difference(data, change)})"
    )
    control = data.main.comparison("control", "calibrated")
    if control is None:
        return f"{where} {verb} {whose} {numbers}; without a control, what training alone does is not known"
    beyond = {-1: "better than", 0: "no better than", 1: "worse than"}[_direction(control.difference)]
    joint = "and" if (direction < 0) == (beyond == "better than") else "but"
    return f"{where} {verb} {whose} {numbers} {joint} is {beyond} the δ = 0 control ({_difference(data, control)})"


def _difference(data: ReportData, comparison: MismatchComparison) -> str:
    value, range_ = comparison.difference.value, interval(comparison.difference, 3, signed=True)
    return f"difference {number(value, 3, signed=True)}, {data.main.coverage} {range_}"


def _direction(difference: Estimate) -> int:
    """-1 or 1 where the interval lies on one side of zero; 0 where it does not, or is not known."""
    if difference.low is None or difference.high is None:
        return 0
    return -1 if difference.high < 0 else int(difference.low > 0)


def number(value: float | None, digits: int, *, signed: bool = False) -> str:
    """A number with a true minus sign; a dash where it is missing."""
    if value is None:
        return "–"
    text = f"{value:+,.{digits}f}" if signed else f"{value:,.{digits}f}"
    if not any(digit in text for digit in "123456789"):
        text = text.lstrip("+-")
    return text.replace("-", "−")


def p_value(value: float | None) -> str:
    """A p-value to three digits."""
    return "< 0.001" if value is not None and value < 0.001 else number(value, 3)


elo = partial(number, digits=0, signed=True)


def interval(estimate: Estimate, digits: int, *, signed: bool = False) -> str:
    """The interval in words."""
    if estimate.low is None or estimate.high is None:
        return "interval open or not known"
    return f"interval {number(estimate.low, digits, signed=signed)} to {number(estimate.high, digits, signed=signed)}"


def span(estimate: Estimate | None, digits: int, *, signed: bool = False) -> str:
    """The interval for a table cell: [low, high], or nothing."""
    if estimate is None or (estimate.low is None and estimate.high is None):
        return ""
    return f"[{number(estimate.low, digits, signed=signed)}, {number(estimate.high, digits, signed=signed)}]"


def by_overvaluation(domain: ReportDomain) -> list[ModelMismatch]:
    """The policy models of the first variant, the most overvalued first."""
    return sorted(domain.variants[0].mismatch.models, key=_overvaluation, reverse=True)


def _overvaluation(model: ModelMismatch) -> float:
    return -math.inf if model.overvaluation.value is None else model.overvaluation.value


def _estimate(estimate: Estimate | None, digits: int, *, signed: bool = False) -> str:
    if estimate is None:
        return "–"
    return f"{number(estimate.value, digits, signed=signed)} {span(estimate, digits, signed=signed)}".strip()


def _variant_rows(domain: ReportDomain) -> list[list[str]]:
    return [
        [
            variant.label,
            _estimate(variant.mismatch.mean_absolute_mismatch, 3),
            _estimate(variant.mismatch.overvaluation_rmse, 0),
            _estimate(variant.agreement.spearman if variant.agreement else None, 2),
        ]
        for variant in domain.variants
    ]


_MEAN_MISMATCH = "Mean |MD| is 0 where the reward model's win rates are what the Elo ratings predict."
_VARIANT_HEADER = ["reward model", "mean |MD|", "overvaluation RMSE (Elo)", "Spearman with Elo"]


def summary_text(data: ReportData, top: int = 5) -> str:
    """The report in a few lines for a terminal: the answer, the variants, the most overvalued policy models."""
    parts = [answer(data)]
    for domain in data.domains:
        parts.append(
            f"{domain.label} ({domain.variants[0].mismatch.prompts:,} prompts), with {domain.coverage} intervals"
        )
        parts.append(aligned([_VARIANT_HEADER, *_variant_rows(domain)]))
    first = data.main.variants[0]
    rows = [
        [model.policy_model, _estimate(model.overvaluation, 0, signed=True), "flagged" if model.flagged else ""]
        for model in by_overvaluation(data.main)[:top]
    ]
    parts.append(f"most overvalued by the {first.name} reward model, in Elo points")
    parts.append(aligned([["policy model", "overvaluation", ""], *rows]))
    if data.truth is not None:
        accuracy = [[value.variant, _estimate(value.value, 3)] for value in data.truth.accuracy]
        parts.append("accuracy against the simulation's truth, held-out prompts")
        parts.append(aligned([["reward model", "right"], *accuracy]))
    parts.extend(data.notes)
    parts.extend(f"warning: {warning}" for warning in data.warnings)
    return "\n\n".join(parts) + "\n"


def mismatch_markdown(report: MismatchReport) -> str:
    """A mismatch report as a Markdown table, the most overvalued policy model first."""
    rows = [
        [
            model.policy_model,
            number(model.rating, 0),
            _estimate(model.overvaluation, 0, signed=True),
            _estimate(model.mismatch_degree, 3, signed=True),
            "yes" if model.flagged else "",
        ]
        for model in sorted(report.models, key=_overvaluation, reverse=True)
    ]
    header = ["policy model", "Arena rating", "overvaluation (Elo points)", "mean mismatch degree", "flagged"]
    return _markdown([header, *rows])


def model_card(data: ReportData) -> str:
    """The model card of the calibrated reward model: Hugging Face front matter, then the evidence."""
    front: dict[str, object] = {"library_name": "transformers", "pipeline_tag": "text-classification"}
    if data.base_model:
        front["base_model"] = data.base_model
    if data.model_licence:
        front["license"] = data.model_licence
    front["tags"] = ["reward-model", "calibration", "chatbot-arena", "charm"]
    board = data.board
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---", "", f"# {data.title}", ""]
    lines += [answer(data), ""]
    for domain in data.domains:
        heading = f"## {domain.label[0].upper()}{domain.label[1:]}"
        lines += [heading, "", domain.description, "", _markdown([_VARIANT_HEADER, *_variant_rows(domain)]), ""]
    lines += [f"Intervals are {data.main.coverage}. {_MEAN_MISMATCH}", ""]
    lines += ["## Overvaluation after calibration", "", mismatch_markdown(_latest(data.main).mismatch), ""]
    lines += [
        "## Made from",
        "",
        f"- Board: {board.name} {board.category} {board.date}, {board.source} {board.licence}".rstrip(),
    ]
    lines += [f"- Code: {data.provenance.git_revision}", "", "```sh", data.provenance.command, "```", ""]
    lines += ["```toml", data.provenance.settings_toml.strip(), "```", ""]
    if data.warnings:
        lines += ["## Warnings", "", *(f"- {warning}" for warning in data.warnings), ""]
    return "\n".join(lines)


def _latest(domain: ReportDomain) -> ReportVariant:
    return domain.variant("calibrated") or domain.variants[0]


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines of text, in columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    header, *body = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *body))
