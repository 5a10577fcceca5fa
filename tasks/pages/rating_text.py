"""The words of the page about collected ratings: its answer in one sentence, and the summary for the terminal."""

from collections.abc import Sequence

from charm_core.leaderboards import DateKind
from charm_core.rating_history import BoardSeries
from charm_core.records import Estimate
from tasks.pages.rating_page_data import Comparison, RatingPageData
from tasks.pages.report_text import number, span

DATE_KINDS: dict[DateKind | str, str] = {
    "published": "date of publication",
    "committed": "date of a commit, not of publication",
    "collected": "date of collecting by the mirror, not of publication",
    "stated": "date as stated",
}
_NAMES_SHOWN = 12
_ROWS_SHOWN = 5


def rating_answer(data: RatingPageData) -> str:
    """Say in one sentence whether a re-calibration is due, and why."""
    verdict = {
        True: "A re-calibration is due",
        False: "No re-calibration is due",
        None: "Whether a re-calibration is due is open",
    }
    return f"{verdict[data.due]}: {data.why}."


def probability_change(change: Estimate, *, digits: int = 1) -> str:
    """A change of a win probability in percentage points, with its interval."""
    values = [None if value is None else 100 * value for value in (change.value, change.low, change.high)]
    points = Estimate(value=values[0], low=values[1], high=values[2])
    return f"{number(points.value, digits, signed=True)} {span(points, digits, signed=True)}".strip()


def percent(value: float | None, digits: int = 1) -> str:
    """A share in percent."""
    return "–" if value is None else f"{number(100 * value, digits)} %"


def counted(number_of: int, what: str) -> str:
    """A number of things."""
    return f"{number_of:,} {what}{'' if number_of == 1 else 's'}"


def p_value(value: float | None) -> str:
    """A p-value; a dash where it is not known."""
    return "< 0.001" if value is not None and value < 0.001 else number(value, 3)


def points(value: float | None) -> str:
    """A change of a share, in percentage points."""
    return number(None if value is None else 100 * value, 2)


def pair_sentence(item: Comparison) -> str:
    """How much the win probabilities moved."""
    pairs = item.pairs
    if not pairs.pairs:
        return "No pair of policy models is rated in both."
    chance = f" ({points(pairs.mean_by_chance)} by chance alone)" if pairs.mean_by_chance is not None else ""
    moved = (
        f"{len(pairs.moved)} moved beyond their joint interval after Holm's correction"
        if judged_pairs(item)
        else "without intervals none can be said to have moved"
    )
    return (
        f"Win probabilities of {counted(len(pairs.pairs), 'pair')} changed by {points(pairs.mean)} percentage points on average{chance}, "
        f"at most by {points(pairs.largest)}; {moved}."
    )


def board_sentence(item: Comparison) -> str:
    """What changed on the board as a whole."""
    board = item.movement
    judged = judged_models(item)
    beyond = sum(change.beyond_interval for change in board.changes)
    moved = (
        f"{beyond} of {counted(judged, 'model')} moved beyond their joint interval, {len(board.moved)} after Holm's correction"
        if judged
        else "no intervals, so no model can be said to have moved"
    )
    return (
        f"{counted(len(board.added), 'model')} added, {len(board.dropped)} dropped; the anchor shifted by "
        f"{number(board.shift, 1, signed=True)} Elo points; {moved}."
    )


def judged_models(item: Comparison) -> int:
    """Models of which the intervals say whether they moved."""
    return sum(change.p_value_holm is not None for change in item.movement.changes)


def judged_pairs(item: Comparison) -> int:
    """Pairs of which the intervals say whether they moved."""
    return sum(pair.p_value_holm is not None for pair in item.pairs.pairs)


def series_caption(series: BoardSeries) -> str:
    """How many dates a board has, and what kind of dates they are."""
    first, last = series.points[0].date, series.points[-1].date
    dates = f"{len(series.points)} dates, {first} to {last}" if len(series.points) > 1 else f"One date, {first}"
    return f"{dates} ({DATE_KINDS[series.date_kind]})."


def names_shown(names: Sequence[str]) -> str:
    """Names, shortened where there are many."""
    more = f", and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more


def rating_summary(data: RatingPageData) -> str:
    """The page in a few lines for a terminal."""
    parts = [rating_answer(data)]
    if data.date:
        state = "new" if data.new else "known already, nothing new"
        parts.append(
            f"{data.board}\n  {data.date} ({DATE_KINDS[data.date_kind]}), {data.models} models, "
            f"snapshot {data.digest[:12]} ({state})"
        )
    else:
        dates = sum(len(one.points) for one in data.history.series)
        state = f"{sum(row.new for row in data.snapshots)} snapshots are new"
        parts.append(f"{len(data.history.series)} boards with rated policy models, {dates} dates; {state}")
    for item in data.comparisons:
        lines = [f"{item.title}: {item.board}, {item.before} to {item.after}", f"  {board_sentence(item)}"]
        if data.date and item.movement.added:
            lines.append(f"  added: {names_shown(item.movement.added)}")
        if data.date and item.movement.dropped:
            lines.append(f"  dropped: {names_shown(item.movement.dropped)}")
        if data.policy_models:
            lines.append(f"  {pair_sentence(item)}")
        lines += [
            f"    {pair.model_a} over {pair.model_b}: {percent(pair.before)} to {percent(pair.after)}, "
            f"{probability_change(pair.change, digits=2)} points{' *' if pair.moved else ''}"
            for pair in item.pairs.pairs[:_ROWS_SHOWN]
        ]
        parts.append("\n".join(lines))
    parts += [f"note: {note}" for note in data.notes]
    return "\n\n".join(parts) + "\n"
