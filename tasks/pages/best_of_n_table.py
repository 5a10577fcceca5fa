"""Best-of-n in words: one table per measure, for the report, for Prefect and for a terminal. Pure functions."""

from charm_core.best_of_n import BestOfNReport, Measure
from charm_core.records import Estimate, Record

MEASURES: dict[Measure, tuple[str, int, float]] = {
    "rating": ("Elo of the picked model", 1, 1.0),
    "judge": ("Judge's preference (%)", 1, 100.0),
    "judge's best": ("Judge prefers no other (%)", 1, 100.0),
    "quality": ("True quality (logits)", 2, 1.0),
    "truly best": ("None is truly better (%)", 1, 100.0),
    "length": ("Characters", 0, 1.0),
}
"""Heading, digits and unit of each measure in a table, in the order in which they are shown."""


class PickedTable(Record):
    """One measure: a row per n, a column per reward model, then the differences."""

    heading: str
    digits: int
    columns: tuple[str, ...]
    differences: tuple[str, ...]
    rows: tuple["PickedRow", ...]


class PickedRow(Record):
    """One n."""

    n: int
    values: tuple[Estimate, ...]
    differences: tuple[Estimate, ...]
    best_possible: float | None


def best_of_n_tables(report: BestOfNReport, labels: dict[str, str] | None = None) -> tuple[PickedTable, ...]:
    """One table per measure, in its unit.

    Args:
        report: What was measured.
        labels: How reward models are called; default: by their names.
    """
    measured = {value.measure for value in report.values}
    return tuple(_table(report, measure, labels or {}) for measure in MEASURES if measure in measured)


def best_of_n_sentence(report: BestOfNReport) -> str:
    """What was picked from."""
    left_out = report.prompts_left_out
    head = f"{report.candidates} responses to each of {report.prompts:,} prompts"
    return head + (f"; {left_out:,} prompts lack a score of one and are left out." if left_out else ".")


def best_of_n_markdown(report: BestOfNReport, labels: dict[str, str] | None = None) -> str:
    """All tables as Markdown."""
    return "\n\n".join([best_of_n_sentence(report), *map(_markdown, best_of_n_tables(report, labels))])


def _table(report: BestOfNReport, measure: Measure, labels: dict[str, str]) -> PickedTable:
    heading, digits, unit = MEASURES[measure]
    values = [value for value in report.values if value.measure == measure]
    gains = [item for item in report.differences if item.measure == measure]
    pairs = dict.fromkeys((item.before, item.after) for item in gains)
    limits = {value.n: value.best_possible * unit for value in values if value.best_possible is not None}
    return PickedTable(
        heading=heading,
        digits=digits,
        columns=tuple(labels.get(name, name) for name in dict.fromkeys(value.scorer for value in values)),
        differences=tuple(f"{labels.get(after, after)} − {labels.get(before, before)}" for before, after in pairs),
        rows=tuple(
            PickedRow(
                n=n,
                values=tuple(_in_unit(item.value, unit) for item in values if item.n == n),
                differences=tuple(_in_unit(item.difference, unit) for item in gains if item.n == n),
                best_possible=limits.get(n),
            )
            for n in dict.fromkeys(value.n for value in values)
        ),
    )


def _in_unit(estimate: Estimate, unit: float) -> Estimate:
    value, low, high = (None if end is None else end * unit for end in (estimate.value, estimate.low, estimate.high))
    return Estimate(value=value, low=low, high=high)


def _markdown(table: PickedTable) -> str:
    limited = any(row.best_possible is not None for row in table.rows)
    head = ["n", *table.columns, *table.differences, *(["best possible"] if limited else [])]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in table.rows:
        cells = [_cell(estimate, table.digits) for estimate in (*row.values, *row.differences)]
        cells += [f"{row.best_possible:.{table.digits}f}"] if row.best_possible is not None else []
        lines.append(f"| {row.n} | {' | '.join(cells)} |")
    return f"**{table.heading}**\n\n" + "\n".join(lines)


def _cell(estimate: Estimate, digits: int) -> str:
    ends = (estimate.value, estimate.low, estimate.high)
    value, low, high = ("?" if end is None else f"{end:.{digits}f}" for end in ends)
    return f"{value} [{low}, {high}]"
