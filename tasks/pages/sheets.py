"""What figures are drawn on: sizes, colours, axes, a legend, and the SVG text that comes of it.

A figure is drawn in CSS pixels and in one of two widths, ``WIDE`` for a desk and ``NARROW`` for a phone, so that its
text is never scaled below a readable size. Colours are placeholders until ``themed`` turns them into CSS variables
(both themes work) or ``standalone`` into plain colours. The same numbers give the same bytes: no date, ids with a fixed
salt.
"""

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from io import BytesIO
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # matplotlib is imported where it draws: the command line's help must not wait for it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

WIDE = 912
NARROW = 320

# placeholder, plain colour on white; the name is the CSS variable's; Okabe and Ito's hues are safe for colour blindness
_COLOURS = {
    "ink": ("#000001", "#1a1d21"),
    "muted": ("#000002", "#5a626c"),
    "grid": ("#000003", "#e2e5e9"),
    "band": ("#000004", "#f1f3f5"),
    "surface": ("#000005", "#ffffff"),
    "untouched": ("#000006", "#d55e00"),
    "control": ("#000007", "#6f7680"),
    "calibrated": ("#000008", "#0072b2"),
    "offsets": ("#000009", "#009e73"),
}
INK, MUTED, GRID, BAND, SURFACE = (placeholder for placeholder, _ in list(_COLOURS.values())[:5])
MARKERS = {"untouched": "o", "control": "s", "calibrated": "D", "offsets": "^"}
_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 12,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.labelcolor": MUTED,
    "axes.axisbelow": True,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.color": GRID,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "lines.solid_capstyle": "butt",
}
CHARACTER = 7.0  # width that is reserved for a character of 12 px, whatever sans-serif face the browser has


@dataclass(frozen=True, kw_only=True)
class Frame:
    """What every figure has."""

    name: str
    """Prefix of the ids in the SVG, unique within a page."""
    width: int
    """``WIDE`` or ``NARROW``."""
    description: str
    """What the figure shows, for those who do not see it."""

    @property
    def narrow(self) -> bool:
        """Whether it is the figure for a phone."""
        return self.width < WIDE


def themed(svg: str) -> str:
    """Replace the placeholder colours by CSS variables, for inlining in the report."""
    for name, (placeholder, _) in _COLOURS.items():
        svg = svg.replace(placeholder, f"var(--{name})")
    return svg


def standalone(svg: str) -> bytes:
    """Replace the placeholder colours by plain ones on white: an SVG file of its own."""
    for placeholder, plain in _COLOURS.values():
        svg = svg.replace(placeholder, plain)
    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return svg.replace("<svg ", f'<svg {namespaces} style="background:#ffffff" ', 1).encode()


def new_sheet(width: float, height: float) -> "Figure":
    """An empty sheet of this size in pixels."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width / 72, height / 72), dpi=72, facecolor="none")  # at 72 dpi a point is a pixel


def add_axes(sheet: "Figure", left: float, top: float, width: float, height: float) -> "Axes":
    """Axes at a place in pixels from the top left corner."""
    full_width, full_height = sheet.get_size_inches() * 72
    place = (left / full_width, 1 - (top + height) / full_height, width / full_width, height / full_height)
    axes = sheet.add_axes(place, facecolor="none")
    axes.tick_params(length=0, pad=5)
    return axes


def label_values(axes: "Axes", unit: str, ticks: int) -> None:
    """Label the axis of the values, with at most so many ticks."""
    axes.set_xlabel(unit)
    axes.margins(x=0.04)
    axes.xaxis.set_major_locator(tick_places(ticks))


def tick_places(most: int, *, integer: bool = False) -> "MaxNLocator":
    """At most so many ticks at round numbers."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(most, integer=True) if integer else MaxNLocator(most, steps=[1, 2, 5, 10])


def add_legend(sheet: "Figure", entries: Sequence[tuple[str, str]], columns: int) -> None:
    """A legend at the top: variant and label of each; none for one entry alone."""
    if len(entries) > 1:
        from matplotlib.lines import Line2D

        handles = [
            Line2D(
                [],
                [],
                color=colour_of(variant),
                marker=MARKERS[variant],
                ls="--" if variant == "control" else "-",
                label=label,
            )
            for variant, label in entries
        ]
        sheet.legend(
            handles=handles, loc="upper left", bbox_to_anchor=(0, 1), ncols=columns, handlelength=2, columnspacing=1.6
        )


def colour_of(variant: str) -> str:
    """Placeholder of a variant's colour."""
    return _COLOURS[variant][0]


@contextmanager
def styled(frame: Frame) -> Iterator[None]:
    """What is drawn inside looks like ours."""
    import matplotlib

    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": frame.name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # the browser's fonts draw the text
        yield


def svg_of(sheet: "Figure", frame: Frame) -> str:
    """The sheet as an SVG element, sized by what it is put into."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = BytesIO()
    FigureCanvasSVG(sheet).print_svg(buffer, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = buffer.getvalue().decode()
    svg = re.sub(r"<!--.*?-->\s*|<metadata>.*?</metadata>\s*", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(
        r'<svg [^>]*?viewBox="([^"]+)"[^>]*>',
        lambda match: f'<svg viewBox="{match[1]}" role="img" aria-label="{escape(frame.description)}">',
        svg,
        count=1,
    )
    svg = re.sub(r"font: ([^;\"]*?)(\d+(?:\.\d+)?px) '[^;\"]*", r"font: \1\2 sans-serif", svg)
    return re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>{frame.name}-", svg)
