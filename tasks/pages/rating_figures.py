"""Ratings and win probabilities over time: numbers in, SVG text out.

A line joins dates of one board only. It has a gap where the board has a date without the model, and where the board has no
date for two months: nothing is known there, so nothing is drawn. Colours are CSS variables, so that both themes work;
``standalone`` puts plain ones in their place. The same numbers give the same bytes.
"""

import datetime
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from charm_core.rating_history import BoardSeries, DatePoint
from charm_core.records import Estimate
from tasks.pages.report_text import number, span
from tasks.pages.sheets import WIDE

LONGEST_JOINED = datetime.timedelta(days=60)
"""Dates of a board that are further apart are not joined by a line."""
COLOURS = 8
MOST_PAIRS = 24
"""Most pairs that are drawn."""

_PLAIN = {
    "ink": "#1a1d21", "muted": "#5a626c", "grid": "#e2e5e9", "surface": "#ffffff",
    "line0": "#0072b2", "line1": "#d55e00", "line2": "#009e73", "line3": "#b5548c",
    "line4": "#8a6d00", "line5": "#56358a", "line6": "#6f7680", "line7": "#a01c1c",
}  # fmt: skip
_SHOWN_SHIFT = 5.0
_MOST_MARKERS = 40
_CHARACTER = 6.6
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_MONTH_STEPS = (1, 2, 3, 6, 12, 24)
_SMALLEST_SPAN = 0.04


@dataclass(frozen=True, kw_only=True)
class _Line:
    """One model, or one board, through time; None where the board has a date but no value."""

    label: str
    style: int
    points: tuple[tuple[datetime.date, Estimate | None], ...]

    @property
    def colour(self) -> str:
        return f"var(--line{self.style % COLOURS})"

    @property
    def dashes(self) -> str:
        """Another dash for every round through the colours."""
        return ("", ' stroke-dasharray="6 3"', ' stroke-dasharray="2 3"')[self.style // COLOURS % 3]

    def known(self) -> list[tuple[datetime.date, Estimate]]:
        return [(date, one) for date, one in self.points if one is not None and one.value is not None]

    def segments(self) -> list[list[tuple[datetime.date, Estimate]]]:
        """Runs of dates that may be joined."""
        runs: list[list[tuple[datetime.date, Estimate]]] = [[]]
        for date, one in self.points:
            if one is None or one.value is None:
                runs.append([])
                continue
            if runs[-1] and date - runs[-1][-1][0] > LONGEST_JOINED:
                runs.append([])
            runs[-1].append((date, one))
        return [run for run in runs if run]


@dataclass(frozen=True, kw_only=True)
class _Area:
    """Where a plot lies, in pixels, and what it shows."""

    left: float
    top: float
    width: float
    height: float
    first: datetime.date
    last: datetime.date
    low: float
    high: float

    def x(self, date: datetime.date) -> float:
        days = (self.last - self.first).days
        return self.left + self.width * ((date - self.first).days / days if days else 0.5)

    def y(self, value: float) -> float:
        return self.top + self.height * (self.high - value) / (self.high - self.low)


def rating_chart(series: BoardSeries, models: Sequence[str], width: int, description: str) -> str:
    """Ratings of policy models on one board, on the scale of its last date.

    Args:
        series: The board.
        models: Policy models in order of their colours.
        width: ``WIDE`` or ``NARROW``.
        description: For those who do not see it.
    """
    lines = [
        _Line(label=model, style=style, points=tuple((point.date, _rating(point, model)) for point in series.points))
        for style, model in enumerate(models)
    ]
    lines = [line for line in lines if line.known()]
    narrow = width < WIDE
    legend = 20 * len(lines) + 10 if narrow else 0
    labels = 0 if narrow else 16 + max(len(_short(line.label, 30)) for line in lines) * _CHARACTER
    area = _area(lines, left=46, top=legend + 36, width=width - 46 - max(labels, 16), height=300 if not narrow else 240)
    shifts = [(point.date, point.shift) for point in series.points if abs(point.shift or 0.0) >= _SHOWN_SHIFT]
    parts = [
        _grid(area, _tick_text(0), 40),
        _months(area, 70),
        *_shifts(area, shifts),
    ]
    parts += [_drawn(area, line, _elo_text) for line in lines]
    parts += _legend(lines, 8, width) if narrow else _end_labels(area, lines)
    return _svg(parts, width, area.top + area.height + 30, description)


def pair_chart(series: Sequence[BoardSeries], pairs: Sequence[tuple[str, str]], width: int, description: str) -> str:
    """Win probabilities of pairs, a small panel each; boards are lines of their own. All panels have one scale.

    Args:
        series: The boards in order of their colours.
        pairs: (model, opponent): the probability that people prefer the first.
        width: ``WIDE`` or ``NARROW``.
        description: For those who do not see it.
    """
    narrow = width < WIDE
    columns = 1 if narrow else 3
    panels = [(pair, _pair_lines(series, pair)) for pair in pairs]
    spread = max(max(_extent(lines)) - min(_extent(lines)) for _, lines in panels)
    spread = max(1.1 * spread, _SMALLEST_SPAN)
    dates = [date for _, lines in panels for line in lines for date, _ in line.known()]
    legend = [_Line(label=one.board, style=style, points=()) for style, one in enumerate(series)]
    head = 20 * len(legend) + 12 if len(legend) > 1 else 0
    pitch, panel = width / columns, 150
    parts = _legend(legend, 8, width) if head else []
    for index, ((model, opponent), lines) in enumerate(panels):
        row, column = divmod(index, columns)
        middle = (min(_extent(lines)) + max(_extent(lines))) / 2
        area = _Area(
            left=column * pitch + 40, top=head + row * panel + 40, width=pitch - 56, height=panel - 66,
            first=min(dates), last=max(dates), low=middle - spread / 2, high=middle + spread / 2,
        )  # fmt: skip
        room = int((pitch - 20) / _CHARACTER)
        parts += [
            _text(area.left - 32, area.top - 22, _short(model, room), "name"),
            _text(area.left - 32, area.top - 8, _short(f"over {opponent}", room), "small"),
            _grid(area, _percent_text(spread), 16),
            _months(area, 56),
            *(_drawn(area, line, _percent_tip) for line in lines),
        ]
    return _svg(parts, width, head + panel * -(-len(panels) // columns), description)


def ordered_pairs(series: Sequence[BoardSeries]) -> tuple[list[tuple[str, str]], int]:
    """Pairs to draw, those that moved most first chosen, the higher-rated model first; and how many there are."""
    ranges: dict[tuple[str, str], list[list[float]]] = {}
    for one in series:
        seen: dict[tuple[str, str], list[float]] = {}
        for point in one.points:
            for pair in point.pairs:
                seen.setdefault((pair.model_a, pair.model_b), []).append(pair.win_probability.value or 0.5)
        for names, values in seen.items():
            ranges.setdefault(names, []).append(values)
    movement = {names: max(max(values) - min(values) for values in boards) for names, boards in ranges.items()}
    chosen = sorted(sorted(movement), key=lambda names: -movement[names])[:MOST_PAIRS]
    higher = [names if ranges[names][-1][-1] >= 0.5 else names[::-1] for names in chosen]
    strength: dict[str, int] = {}
    for names in ranges:
        winner = names[0] if ranges[names][-1][-1] >= 0.5 else names[1]
        strength[winner] = strength.get(winner, 0) + 1
    higher.sort(key=lambda names: (-strength.get(names[0], 0), names[0], -strength.get(names[1], 0), names[1]))
    return higher, len(ranges)


def standalone(svg: str) -> bytes:
    """An SVG file of its own, with plain colours on white."""
    plain = re.sub(r"var\(--(\w+)\)", lambda match: _PLAIN[match[1]], svg)
    style = "<style>text{font:12px sans-serif;fill:#5a626c}.name{fill:#1a1d21;font-weight:600}.small{font-size:11px}</style>"
    plain = plain.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" style="background:#ffffff" ', 1)
    return plain.replace(">", f">{style}", 1).encode()


def _rating(point: DatePoint, model: str) -> Estimate | None:
    return next((one.rating for one in point.rated if one.policy_model == model), None)


def _chance(point: DatePoint, model: str, opponent: str) -> Estimate | None:
    for pair in point.pairs:
        if (pair.model_a, pair.model_b) == (model, opponent):
            return pair.win_probability
        if (pair.model_a, pair.model_b) == (opponent, model):
            low, value, high = pair.win_probability.low, pair.win_probability.value, pair.win_probability.high
            flipped = [None if one is None else 1.0 - one for one in (high, value, low)]
            return Estimate(low=flipped[0], value=flipped[1], high=flipped[2])
    return None


def _pair_lines(series: Sequence[BoardSeries], pair: tuple[str, str]) -> list[_Line]:
    lines = [
        _Line(label=one.board, style=style, points=tuple((point.date, _chance(point, *pair)) for point in one.points))
        for style, one in enumerate(series)
    ]
    return [line for line in lines if line.known()]


def _extent(lines: Sequence[_Line]) -> list[float]:
    everything = [one for line in lines for _, one in line.known()]
    return [value for one in everything for value in (one.low, one.value, one.high) if value is not None]


def _area(lines: Sequence[_Line], *, left: float, top: float, width: float, height: float) -> _Area:
    values, dates = _extent(lines), [date for line in lines for date, _ in line.known()]
    margin = 0.06 * (max(values) - min(values)) or 1.0
    return _Area(
        left=left, top=top, width=width, height=height, first=min(dates), last=max(dates),
        low=min(values) - margin, high=max(values) + margin,
    )  # fmt: skip


def _drawn(area: _Area, line: _Line, tip: Callable[[Estimate], str]) -> str:
    """Band, line and markers of every run."""
    few = len(line.known()) <= _MOST_MARKERS
    parts = []
    for run in line.segments():
        parts.append(_band(area, run, line.colour))
        if len(run) > 1:
            path = " ".join(f"{area.x(date):.1f},{area.y(one.value or 0.0):.1f}" for date, one in run)
            stroke = f'stroke="{line.colour}" stroke-width="1.6"{line.dashes}'
            parts.append(f'<polyline points="{path}" fill="none" {stroke}/>')
        for date, one in run:
            if few or len(run) == 1:
                title = escape(f"{line.label}, {date}: {tip(one)}")
                place = f'cx="{area.x(date):.1f}" cy="{area.y(one.value or 0.0):.1f}"'
                parts.append(f'<circle {place} r="2.4" fill="{line.colour}"><title>{title}</title></circle>')
    return "".join(parts)


def _band(area: _Area, run: Sequence[tuple[datetime.date, Estimate]], colour: str) -> str:
    known = [(area.x(date), area.y(one.low), area.y(one.high)) for date, one in run if None not in (one.low, one.high)]  # type: ignore[arg-type]
    if len(known) == 1:
        x, low, high = known[0]
        return f'<path d="M{x:.1f} {low:.1f}V{high:.1f}" stroke="{colour}" stroke-width="1.6"/>'
    upper = " ".join(f"{x:.1f},{high:.1f}" for x, _, high in known)
    lower = " ".join(f"{x:.1f},{low:.1f}" for x, low, _ in reversed(known))
    return f'<polygon points="{upper} {lower}" fill="{colour}" fill-opacity="0.14"/>' if known else ""


def _grid(area: _Area, text: Callable[[float], str], room: float) -> str:
    parts = []
    for value in _ticks(area.low, area.high, max(2, int(area.height // room))):
        y = area.y(value)
        parts.append(f'<path d="M{area.left:.1f} {y:.1f}h{area.width:.1f}" stroke="var(--grid)"/>')
        parts.append(_text(area.left - 6, y + 4, text(value), "tick", anchor="end"))
    return "".join(parts)


def _months(area: _Area, room: float) -> str:
    """Ticks at the beginning of months, as many as have room."""
    months = [
        datetime.date(area.first.year + index // 12, index % 12 + 1, 1)
        for index in range(area.first.month - 1, (area.last.year - area.first.year) * 12 + area.last.month)
    ]
    inside = [date for date in months if area.first <= date <= area.last]
    most = max(1, int(area.width // room))
    step = next((step for step in _MONTH_STEPS if len(inside) <= most * step), _MONTH_STEPS[-1])
    shown = [date for date in inside if (date.year * 12 + date.month - 1) % step == 0]
    bottom = area.top + area.height
    ticks = [(date, _month(date) if step < 12 else str(date.year)) for date in shown] or _ends(area)
    parts = []
    for date, text in ticks:
        x, edge = area.x(date), area.left + area.width + 14
        beyond = x + len(text) * _CHARACTER / 2 > edge
        parts.append(f'<path d="M{x:.1f} {bottom:.1f}v4" stroke="var(--muted)"/>')
        parts.append(_text(edge if beyond else x, bottom + 17, text, "tick", anchor="end" if beyond else "middle"))
    return "".join(parts)


def _ends(area: _Area) -> list[tuple[datetime.date, str]]:
    dates = [area.first] if area.first == area.last else [area.first, area.last]
    return [(date, f"{date.day} {_month(date)}") for date in dates]


def _month(date: datetime.date) -> str:
    return f"{_MONTHS[date.month - 1]} {date.year}"


def _shifts(area: _Area, shifts: Sequence[tuple[datetime.date, float | None]]) -> list[str]:
    """Where the anchor moved; marks that would touch lie one above the other."""
    parts, right, level = [], -math.inf, 0
    for date, shift in shifts:
        x, text = area.x(date), f"anchor {number(shift, 0, signed=True)}"
        level = (level + 1) % 2 if x - right < len(text) * _CHARACTER else 0
        right = x
        parts.append(
            f'<path d="M{x:.1f} {area.top:.1f}v{area.height:.1f}" stroke="var(--muted)" stroke-dasharray="2 3"/>'
        )
        parts.append(_text(x, area.top - 5 - 16 * level, text, "tick", anchor="middle"))
    return parts


def _legend(lines: Sequence[_Line], top: float, width: float) -> list[str]:
    parts, room = [], int((width - 30) / _CHARACTER)
    for index, line in enumerate(lines):
        y = top + 20 * index
        parts.append(f'<path d="M0 {y:.1f}h22" stroke="{line.colour}" stroke-width="2.4"{line.dashes}/>')
        parts.append(_text(30, y + 4, _short(line.label, room), "label"))
    return parts


def _end_labels(area: _Area, lines: Sequence[_Line]) -> list[str]:
    """Names beside the ends of their lines, pushed apart where they would touch."""
    ends = sorted((area.y(line.known()[-1][1].value or 0.0), index) for index, line in enumerate(lines))
    places: list[float] = []
    for y, _ in ends:
        places.append(max(y, places[-1] + 16) if places else y)
    overflow = max(0.0, places[-1] - (area.top + area.height)) if places else 0.0
    for index in range(len(places) - 1, -1, -1):
        limit = places[index + 1] - 16 if index + 1 < len(places) else places[index] - overflow
        places[index] = min(places[index], limit)
    parts = []
    right = area.left + area.width
    for place, (y, index) in zip(places, ends, strict=True):
        line = lines[index]
        x = area.x(line.known()[-1][0])
        path = f"M{x + 4:.1f} {y:.1f}L{right + 4:.1f} {y:.1f}L{right + 12:.1f} {place:.1f}"
        parts.append(f'<path d="{path}" fill="none" stroke="{line.colour}" stroke-width="0.8" stroke-opacity="0.6"/>')
        parts.append(_text(right + 15, place + 4, _short(line.label, 30), "label"))
    return parts


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Round values inside a range, at most so many."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [step * index for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _tick_text(digits: int) -> Callable[[float], str]:
    return lambda value: f"{value:.{digits}f}".replace("-", "−")


def _percent_text(spread: float) -> Callable[[float], str]:
    digits = 0 if spread > 0.03 else 1
    return lambda value: f"{100 * value:.{digits}f} %"


def _elo_text(one: Estimate) -> str:
    return f"{number(one.value, 1)} {span(one, 1)}".strip()


def _percent_tip(one: Estimate) -> str:
    values = [None if value is None else 100 * value for value in (one.value, one.low, one.high)]
    percent = Estimate(value=values[0], low=values[1], high=values[2])
    return f"{number(percent.value, 1)} % {span(percent, 1)}".strip()


def _text(x: float, y: float, text: str, kind: str, *, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _short(text: str, length: int) -> str:
    tail = max(length // 2 - 1, 1)
    return text if len(text) <= length else f"{text[: length - tail - 1]}…{text[-tail:]}"


def _svg(parts: Sequence[str], width: float, height: float, description: str) -> str:
    view = f'viewBox="0 0 {width:.0f} {height:.0f}"'
    return f'<svg {view} role="img" aria-label="{escape(description)}">{"".join(parts)}</svg>'
