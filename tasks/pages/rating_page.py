"""The page about collected ratings: all numbers of a run in, one self-contained HTML file out.

Pure functions: the same ``RatingPageData`` gives the same text, byte for byte.
"""

from collections.abc import Callable
from functools import partial

from charm_core.rating_history import BoardSeries
from charm_core.records import Record
from tasks.pages import rating_figures
from tasks.pages.rating_figures import LONGEST_JOINED, MOST_PAIRS
from tasks.pages.rating_page_data import RatingPageData
from tasks.pages.rating_text import (
    DATE_KINDS,
    board_sentence,
    counted,
    judged_models,
    judged_pairs,
    p_value,
    pair_sentence,
    percent,
    points,
    probability_change,
    rating_answer,
    series_caption,
)
from tasks.pages.report_text import number, span
from tasks.pages.sheets import NARROW, WIDE
from tasks.pages.templates import template_environment

_GAPS = f"A line has a gap where the board lacks the model, and where its dates are more than {LONGEST_JOINED.days} days apart."


class DrawnFigure(Record):
    """One figure for a desk and for a phone."""

    caption: str
    narrow: str
    wide: str


def render_rating_page(data: RatingPageData) -> str:
    """Render the page: HTML without any request to the outside."""
    environment = template_environment()
    environment.filters.update(
        number=number,
        span=span,
        percent=percent,
        probability_change=probability_change,
        pair_sentence=pair_sentence,
        board_sentence=board_sentence,
        judged_models=judged_models,
        judged_pairs=judged_pairs,
        points=points,
        counted=counted,
        p_value=p_value,
    )
    labels, shared = board_labels(data)
    template = environment.get_template("rating_page.html.j2")
    return template.render(
        data=data,
        answer=rating_answer(data),
        date_kinds=DATE_KINDS,
        coverage=f"{100 * (1 - data.significance):g} %",
        pair_figure=_pair_figure(data),
        rating_figures=[(labels[one.board], _rating_figure(data, one)) for one in data.history.series],
        label=lambda board: labels.get(board, board),
        shared=shared,
        rating_lead=_rating_lead(data),
    )


def rating_figures_for_tracking(data: RatingPageData) -> dict[str, bytes]:
    """The figures as SVG files of their own: file name to content."""
    drawn = {f"ratings-{index}": _rating_figure(data, one) for index, one in enumerate(data.history.series)}
    pairs = _pair_figure(data)
    if pairs is not None:
        drawn["win-probabilities"] = pairs
    return {f"{name}.svg": rating_figures.standalone(figure.wide) for name, figure in drawn.items()}


def board_labels(data: RatingPageData) -> tuple[dict[str, str], str]:
    """Boards by publisher and style control alone where all are of one arena and category; and what they share."""
    names = [*(one.board for one in data.history.series), *data.history.without_policy_models]
    parts = {name: name.split(", ") for name in names}
    middles = {", ".join(part[1:-1]) for part in parts.values()}
    if len(middles) != 1 or len(names) < 2:
        return {name: name for name in names}, ""
    return {name: f"{part[0]}, {part[-1]}" for name, part in parts.items()}, middles.pop()


def _rating_lead(data: RatingPageData) -> str:
    whose = "the policy models" if data.policy_models else "each board's highest-rated models"
    return (
        f"Ratings of {whose} in Elo points with 95 % intervals as published, on the scale of each board's last date: the common "
        f"shifts of the anchor are taken out, and marked where they are 5 points or more. Boards are never joined. {_GAPS}"
    )


def _rating_figure(data: RatingPageData, series: BoardSeries) -> DrawnFigure:
    last: dict[str, float] = {}
    for point in series.points:
        last.update({one.policy_model: one.rating.value or 0.0 for one in point.rated})
    # a model has the same colour on every board
    models = data.policy_models or tuple(sorted(last, key=lambda name: -last[name]))
    return _drawn(partial(rating_figures.rating_chart, series, models), f"{series.board}: {series_caption(series)}")


def _pair_figure(data: RatingPageData) -> DrawnFigure | None:
    pairs, everything = rating_figures.ordered_pairs(data.history.series)
    if not data.policy_models or not pairs:
        return None
    which = "" if len(pairs) == everything else f" The {MOST_PAIRS} of {everything} pairs that moved most are shown."
    boards = " Every board is a line of its own." if len(data.history.series) > 1 else ""
    caption = (
        f"Probability that people prefer the upper policy model to the lower one, with 95 % intervals; the same scale in all "
        f"panels.{boards} {_GAPS}{which}"
    )
    labels, _ = board_labels(data)
    series = [one.model_copy(update={"board": labels[one.board]}) for one in data.history.series]
    return _drawn(partial(rating_figures.pair_chart, series, pairs), caption)


def _drawn(draw: Callable[[int, str], str], caption: str) -> DrawnFigure:
    return DrawnFigure(caption=caption, narrow=draw(NARROW, caption), wide=draw(WIDE, caption))
