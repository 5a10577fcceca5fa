"""The kinds of figures of the report: numbers in, SVG text out.

Estimates without a value are left out; an interval that is open at one end is drawn up to the value.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

from charm_core.records import Estimate
from tasks.pages.sheets import (
    BAND,
    CHARACTER,
    GRID,
    INK,
    MARKERS,
    SURFACE,
    Frame,
    add_axes,
    add_legend,
    colour_of,
    label_values,
    new_sheet,
    styled,
    svg_of,
    tick_places,
)

if TYPE_CHECKING:  # matplotlib is imported where it draws: the command line's help must not wait for it
    from matplotlib.axes import Axes


@dataclass(frozen=True, kw_only=True)
class Series:
    """One variant's estimates by row; rows in ``hollow`` (not significant) get an empty marker. No label, no legend."""

    variant: str
    label: str
    estimates: Mapping[str, Estimate]
    hollow: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Point:
    """A dot of a scatter panel. Points with a higher priority get their label first, as far as there is room."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    label: str = ""
    priority: float = 0.0
    hollow: bool = False


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One variant's scatter plot or curve."""

    variant: str
    title: str
    points: tuple[Point, ...]


@dataclass(frozen=True, kw_only=True)
class BoxPanel:
    """One variant's distributions, from top to bottom: label to the 5, 25, 50, 75 and 95 % quantiles."""

    variant: str
    title: str
    quantiles: Mapping[str, tuple[float, float, float, float, float]]


def forest(
    frame: Frame,
    series: Sequence[Series],
    rows: Sequence[str],
    unit: str,
    *,
    marks: Mapping[str, str] | None = None,
    origin: float = 0.0,
) -> str:
    """Draw dots with intervals: one band per row, the variants one under the other within it.

    Args:
        frame: Name, width and description.
        series: One or more variants; a variant need not have every row.
        rows: Row names from top to bottom.
        unit: Label of the value axis.
        marks: Row name to a remark behind it ("held out"); such rows are shaded.
        origin: Where the line is that values are read against.
    """
    marks = marks or {}
    labels = [
        _shorten(row, 36 - len(marks.get(row, ""))) + (f" ({marks[row]})" if row in marks else "") for row in rows
    ]
    label_lane, lane = 18 if frame.narrow else 0, 13 if len(rows) <= 15 else 10
    pitch = label_lane + max(lane * len(series) + lane, 24)
    columns = 2 if frame.narrow else 4
    entries = [(one.variant, one.label) for one in series if one.label]
    legend = 24 * -(-len(entries) // columns) if len(entries) > 1 else 0
    left = 22 if frame.narrow else 12 + max(len(label) for label in labels) * CHARACTER
    with styled(frame):
        sheet = new_sheet(frame.width, legend + pitch * len(rows) + 76)
        axes = add_axes(sheet, left, legend + 26, frame.width - left - 14, pitch * len(rows))
        axes.set(ylim=(pitch * len(rows), 0), yticks=[])
        axes.grid(axis="x")
        tops = [index * pitch + label_lane for index in range(len(rows))]
        axes.vlines([origin] * len(rows), tops, [top + pitch - label_lane for top in tops], color=INK, linewidth=1)
        axes.tick_params(axis="x", labeltop=True)
        label_values(axes, unit, 5 if frame.narrow else 9)
        for index, (row, label) in enumerate(zip(rows, labels, strict=True)):
            _row_frame(axes, label, index * pitch, pitch, frame.narrow, row in marks)
        for index, one in enumerate(series):
            first = (pitch - label_lane - lane * (len(series) - 1)) / 2 + lane * index
            _dots(axes, one, {row: top + first for row, top in zip(rows, tops, strict=True)})
        add_legend(sheet, entries, columns)
        return svg_of(sheet, frame)


def scatter(
    frame: Frame,
    panels: Sequence[Panel],
    labels: tuple[str, str],
    *,
    diagonal: bool = False,
    y_limits: tuple[float, float] | None = None,
) -> str:
    """Draw one scatter panel per variant: two by two on a desk, one under the other on a phone.

    Args:
        frame: Name, width and description.
        panels: The panels; they share the x axis.
        labels: Labels of the x and the y axis, with units.
        diagonal: Draw the line y = x.
        y_limits: One y range for all panels; each its own where None.
    """
    columns = 1 if frame.narrow else 2
    width = (frame.width - 70 * columns - 12) / columns
    height = width if frame.narrow else min(width, 330)
    everything = [point for panel in panels for point in panel.points]
    with styled(frame):
        sheet = new_sheet(frame.width, (height + 92) * -(-len(panels) // columns))
        for index, panel in enumerate(panels):
            row, column = divmod(index, columns)
            axes = add_axes(sheet, 62 + column * (width + 70), 34 + row * (height + 92), width, height)
            axes.set(title=panel.title, xlabel=labels[0], ylabel=labels[1])
            axes.set_xlim(*_range([point.x for point in everything]))
            own = [y for point in panel.points for y in _extent(point.low, point.y, point.high)]
            axes.set_ylim(*(y_limits or _range(own)))
            axes.grid()
            axes.xaxis.set_major_locator(tick_places(5))
            axes.yaxis.set_major_locator(tick_places(6))
            if diagonal:
                axes.axline((0, 0), slope=1, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=2)
            _points(axes, panel, width, height)
        return svg_of(sheet, frame)


def boxes(frame: Frame, panels: Sequence[BoxPanel], unit: str) -> str:
    """Draw distributions: a line from 5 to 95 %, a bar from 25 to 75 %, a gap at the median; one panel per variant.

    Args:
        frame: Name, width and description.
        panels: The panels, each with its own axis: reward models differ in scale.
        unit: Label of the value axis.
    """
    longest = max(len(label) for panel in panels for label in panel.quantiles)
    left = 12 + min(longest * CHARACTER, 146 if frame.narrow else 230)
    columns = 1 if frame.narrow else min(len(panels), 2)
    width = (frame.width - (left + 14) * columns) / columns
    height = 20 * max(len(panel.quantiles) for panel in panels)
    with styled(frame):
        sheet = new_sheet(frame.width, (height + 84) * -(-len(panels) // columns))
        for index, panel in enumerate(panels):
            row, column = divmod(index, columns)
            axes = add_axes(sheet, left + column * (width + left + 14), 30 + row * (height + 84), width, height)
            axes.set(title=panel.title, ylim=(height, 0))
            axes.grid(axis="x")
            names = [_shorten(label, int((left - 8) / CHARACTER)) for label in panel.quantiles]
            axes.set_yticks([20 * i + 10 for i in range(len(names))], names, color=INK)
            for i, quantiles in enumerate(panel.quantiles.values()):
                _box(axes, panel.variant, 20 * i + 10, quantiles)
            label_values(axes, unit, max(3, int(width // 60)))
        return svg_of(sheet, frame)


def curves(frame: Frame, panels: Sequence[Panel], labels: tuple[str, str]) -> str:
    """Draw curves over each other, with a legend above.

    Args:
        frame: Name, width and description.
        panels: One curve each, points in order of x; the title goes into the legend.
        labels: Labels of the x and the y axis, with units.
    """
    with styled(frame):
        sheet = new_sheet(frame.width, 300)
        axes = add_axes(sheet, 62, 36, frame.width - 76, 210)
        axes.set(xlabel=labels[0], ylabel=labels[1])
        axes.grid()
        for panel in panels:
            axes.plot(
                [point.x for point in panel.points],
                [point.y for point in panel.points],
                color=colour_of(panel.variant),
                linewidth=1.8,
                linestyle="--" if panel.variant == "control" else "-",
                zorder=4 if panel.variant == "control" else 3,
                marker=MARKERS[panel.variant] if len(panel.points) < 12 else None,
            )
        axes.xaxis.set_major_locator(tick_places(5, integer=True))
        axes.yaxis.set_major_locator(tick_places(6))
        add_legend(sheet, [(panel.variant, panel.title) for panel in panels], 2)
        return svg_of(sheet, frame)


def _row_frame(axes: "Axes", label: str, y: float, pitch: float, narrow: bool, shaded: bool) -> None:
    if shaded:
        axes.axhspan(y, y + pitch, color=BAND, linewidth=0, zorder=0)
    axes.axhline(y + pitch, color=GRID, linewidth=0.8)
    where = (0, y + 14 if narrow else y + pitch / 2)
    align = ("left", "baseline") if narrow else ("right", "center")
    axes.annotate(
        label, where, xycoords=("axes fraction", "data"), xytext=(-14 if narrow else -8, 0), textcoords="offset points",
        ha=align[0], va=align[1], zorder=5,
    )  # fmt: skip


def _dots(axes: "Axes", series: Series, heights: Mapping[str, float]) -> None:
    known = {row: one for row, one in series.estimates.items() if row in heights and one.value is not None}
    y = [heights[row] for row in known]
    extents = [_extent(one.low, one.value, one.high) for one in known.values()]
    low, high = [min(extent) for extent in extents], [max(extent) for extent in extents]
    axes.hlines(y, low, high, color=colour_of(series.variant), linewidth=2, zorder=3)
    for hollow in (False, True):
        rows = [row for row in known if (row in series.hollow) == hollow]
        places = [(value, heights[row]) for row in rows for value in _extent(known[row].value)]
        _markers(axes, series.variant, places, hollow=hollow, size=6.5)


def _markers(axes: "Axes", variant: str, places: Sequence[tuple[float, float]], *, hollow: bool, size: float) -> None:
    fill, edge = (SURFACE if hollow else colour_of(variant)), colour_of(variant)
    x, y = [x for x, _ in places], [y for _, y in places]
    axes.plot(x, y, MARKERS[variant], ms=size, mfc=fill, mec=edge, mew=1.4, zorder=4)


def _box(axes: "Axes", variant: str, y: float, quantiles: tuple[float, float, float, float, float]) -> None:
    low, lower, median, upper, high = quantiles
    axes.plot([low, high], [y, y], color=colour_of(variant), linewidth=1.4, zorder=3)
    axes.plot([lower, upper], [y, y], color=colour_of(variant), linewidth=10, zorder=3)
    axes.plot([median, median], [y - 5, y + 5], color=SURFACE, linewidth=2.4, zorder=4)


def _points(axes: "Axes", panel: Panel, width: float, height: float) -> None:
    crowded = len(panel.points) > 150
    extents = {point: _extent(point.low, point.y, point.high) for point in panel.points}
    if not crowded:
        low, high = [min(extent) for extent in extents.values()], [max(extent) for extent in extents.values()]
        axes.vlines(
            [point.x for point in extents], low, high, color=colour_of(panel.variant), lw=1, alpha=0.5, zorder=3
        )
    for hollow in (False, True):
        places = [(point.x, point.y) for point in panel.points if point.hollow == hollow]
        _markers(axes, panel.variant, places, hollow=hollow, size=3 if crowded else 5.5)
    _point_labels(axes, extents, width, height)


def _point_labels(axes: "Axes", extents: Mapping[Point, Sequence[float]], width: float, height: float) -> None:
    (x_low, x_high), (y_low, y_high) = axes.get_xlim(), axes.get_ylim()
    x_scale, y_scale = width / (x_high - x_low), height / (y_high - y_low)
    taken = []
    for point, extent in extents.items():
        x, low, high = (
            (value - start) * scale
            for value, start, scale in (
                (point.x, x_low, x_scale),
                (min(extent), y_low, y_scale),
                (max(extent), y_low, y_scale),
            )
        )
        taken.append((x - 5, low - 5, x + 5, high + 5))
    for point in sorted(extents, key=lambda point: -point.priority):
        x, y = (point.x - x_low) * x_scale, (point.y - y_low) * y_scale
        text = _shorten(point.label, 30)
        spot = _free_spot(x, y, len(text) * CHARACTER, taken, (width, height)) if text else None
        if spot is not None:
            taken.append(spot)
            axes.annotate(text, (spot[0] / width, (spot[1] + 3.5) / height), xycoords="axes fraction", zorder=5)


_Rectangle = tuple[float, float, float, float]


def _free_spot(
    x: float, y: float, length: float, taken: Sequence[_Rectangle], area: tuple[float, float]
) -> _Rectangle | None:
    """Where a label fits beside its point without touching a point or another label; None where it fits nowhere."""
    beside = [(x + 8, y - 7), (x - 8 - length, y - 7)]
    for left, bottom in beside + list(product((x - length / 2, x - 4, x + 4 - length), (y + 6, y - 20))):
        spot = (left, bottom, left + length, bottom + 14)
        inside = spot[0] >= 2 and spot[1] >= 0 and spot[2] <= area[0] and spot[3] <= area[1]
        if inside and not any(spot[0] < t[2] and t[0] < spot[2] and spot[1] < t[3] and t[1] < spot[3] for t in taken):
            return spot
    return None


def _shorten(text: str, length: int) -> str:
    """Cut the middle out: the ends of model names tell them apart."""
    tail = max(length // 2 - 1, 1)
    return text if len(text) <= length else f"{text[: length - tail - 1]}…{text[-tail:]}"


def _extent(*values: float | None) -> list[float]:
    return [value for value in values if value is not None]


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = (high - low) * 0.08 or 1.0
    return low - margin, high + margin
