"""The page about collected ratings: gaps that are seen, boards that are never joined, one self-contained file."""

import datetime
import re
import xml.etree.ElementTree as ET

import pytest

from charm_core.rating_history import BoardSeries, DatePoint, ModelPoint, PairPoint
from charm_core.rating_movement import BoardMovement, PairChange, PairMovement, RatingChange
from charm_core.records import Estimate
from tasks.pages.rating_figures import MOST_PAIRS, ordered_pairs, pair_chart, rating_chart, standalone
from tasks.pages.rating_page import board_labels, rating_figures_for_tracking, render_rating_page
from tasks.pages.rating_page_data import Comparison, RatingHistory, RatingPageData, SnapshotRow
from tasks.pages.rating_text import board_sentence, pair_sentence, rating_answer, rating_summary
from tasks.pages.report_data import Provenance
from tasks.pages.sheets import NARROW, WIDE

START = datetime.date(2025, 1, 6)


def day(week: int) -> datetime.date:
    return START + datetime.timedelta(weeks=week)


def point(week: int, ratings: dict[str, float], **changes: object) -> DatePoint:
    names = sorted(ratings)
    rated = tuple(
        ModelPoint(
            policy_model=name,
            published=ratings[name],
            rating=Estimate(value=ratings[name], low=ratings[name] - 5, high=ratings[name] + 5),
        )
        for name in names
    )
    pairs = tuple(
        PairPoint(
            model_a=a,
            model_b=b,
            win_probability=Estimate(value=0.5 + (ratings[a] - ratings[b]) / 1000, low=0.4, high=0.6),
        )
        for index, a in enumerate(names)
        for b in names[index + 1 :]
    )
    return DatePoint(date=day(week), models=9, rated=rated, pairs=pairs, **changes)  # type: ignore[arg-type]


def series(board: str = "p, text, overall, without style control", *points: DatePoint) -> BoardSeries:
    some = points or (point(0, {"a": 1100.0, "b": 1050.0}), point(1, {"a": 1101.0, "b": 1049.0}, shift=0.0, due=False))
    return BoardSeries(board=board, date_kind="published", points=some)


def drawn(*points: DatePoint, models: tuple[str, ...] = ("a", "b"), width: int = WIDE) -> ET.Element:
    return ET.fromstring(rating_chart(series("x", *points), models, width, "what it shows"))


def lines(svg: ET.Element, colour: str) -> list[int]:
    """Points of each line of that colour."""
    found = svg.iterfind(".//polyline")
    return [len(line.attrib["points"].split()) for line in found if line.attrib["stroke"] == f"var(--{colour})"]


class TestFigures:
    def test_a_line_joins_dates_of_one_model(self):
        svg = drawn(*(point(week, {"a": 1100.0 + week, "b": 1050.0}) for week in range(4)))
        assert (lines(svg, "line0"), lines(svg, "line1")) == ([4], [4])
        assert svg.attrib["aria-label"] == "what it shows"

    def test_a_date_without_the_model_is_a_gap(self):
        weeks = [point(week, {"a": 1100.0} if week == 2 else {"a": 1100.0, "b": 1050.0}) for week in range(5)]
        svg = drawn(*weeks)
        assert (lines(svg, "line0"), lines(svg, "line1")) == ([5], [2, 2])

    def test_months_without_any_date_are_a_gap(self):
        svg = drawn(*(point(week, {"a": 1100.0, "b": 1050.0}) for week in (0, 1, 8, 40, 41)))
        assert lines(svg, "line0") == [3, 2]

    def test_a_date_all_by_itself_is_still_seen_with_its_interval(self):
        svg = drawn(point(0, {"a": 1100.0, "b": 1050.0}))
        assert lines(svg, "line0") == []
        assert len(list(svg.iterfind(".//circle"))) == 2
        assert "a, 2025-01-06: 1,100.0 [1,095.0, 1,105.0]" in {one.text for one in svg.iterfind(".//title")}

    def test_shifts_of_the_anchor_are_marked(self):
        moved = [point(0, {"a": 1100.0}), point(1, {"a": 1100.0}, shift=59.9), point(2, {"a": 1100.0}, shift=-0.4)]
        texts = [one.text for one in drawn(*moved).iterfind(".//text")]
        assert texts.count("anchor +60") == 1
        assert not any("0.4" in (text or "") for text in texts)

    def test_many_models_get_other_dashes(self):
        ratings = {f"m{index:02d}": 1000.0 + 10 * index for index in range(10)}
        svg = drawn(*(point(week, ratings) for week in range(3)), models=tuple(ratings))
        strokes = {(line.attrib["stroke"], line.attrib.get("stroke-dasharray")) for line in svg.iterfind(".//polyline")}
        assert len(strokes) == 10

    @pytest.mark.parametrize("width", [WIDE, NARROW])
    def test_nothing_is_drawn_outside_of_the_figure(self, width: int):
        ratings = {f"a-model-with-a-name-that-is-rather-long-{index}": 1000.0 + index for index in range(8)}
        svg = drawn(*(point(week, ratings) for week in range(60)), models=tuple(ratings), width=width)
        height = float(svg.attrib["viewBox"].split()[3])
        for text in svg.iterfind(".//text"):
            x, y = float(text.attrib["x"]), float(text.attrib["y"])
            length = 6.6 * len(text.text or "")
            left = {"start": x, "middle": x - length / 2, "end": x - length}[text.attrib["text-anchor"]]
            assert left >= -8
            assert left + length <= width + 8
            assert 0 <= y <= height

    def test_boards_are_lines_of_their_own(self):
        plain = series("x", *(point(week, {"a": 1100.0, "b": 1050.0}) for week in range(3)))
        styled = series("y", *(point(week, {"a": 1080.0, "b": 1050.0}) for week in range(2, 6)))
        svg = ET.fromstring(pair_chart([plain, styled], [("a", "b")], WIDE, "d"))
        assert (lines(svg, "line0"), lines(svg, "line1")) == ([3], [4])

    def test_pairs_are_seen_from_the_higher_rated_model(self):
        pairs, number = ordered_pairs([series("x", point(0, {"a": 1000.0, "b": 1100.0, "c": 1050.0}))])
        assert (pairs, number) == ([("b", "c"), ("b", "a"), ("c", "a")], 3)
        svg = ET.fromstring(pair_chart([series("x", point(0, {"a": 1000.0, "b": 1100.0}))], [("b", "a")], WIDE, "d"))
        assert any("60.0 %" in (one.text or "") for one in svg.iterfind(".//title"))

    def test_of_many_pairs_those_that_moved_most_are_drawn(self):
        names = {f"m{index}": 1000.0 for index in range(10)}
        pairs, number = ordered_pairs([series("x", point(0, names), point(1, names | {"m7": 1100.0}))])
        assert (len(pairs), number) == (MOST_PAIRS, 45)
        assert sum("m7" in pair for pair in pairs) == 9

    def test_files_of_their_own_have_plain_colours(self):
        svg = standalone(rating_chart(series(), ("a", "b"), WIDE, "d")).decode()
        assert "var(--" not in svg
        assert ET.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"


def comparison(*, moved: bool = False, intervals: bool = True) -> Comparison:
    change = Estimate(value=-0.05, low=-0.08, high=-0.02) if intervals else Estimate(value=-0.05)
    p_value = 0.001 if intervals else None
    pair = PairChange(
        model_a="a", model_b="b", before=0.6, after=0.55, change=change, p_value_holm=p_value, moved=moved
    )
    rating = RatingChange(
        policy_model="<a>",
        before=1100,
        after=1080,
        change=Estimate(value=-20, low=-28, high=-12),
        p_value_holm=p_value,
        beyond_interval=intervals,
        moved=moved,
    )
    pairs = PairMovement(
        pairs=(pair,),
        largest=0.05,
        mean=0.05,
        mean_by_chance=0.004 if intervals else None,
        newly_rated=(),
        no_longer_rated=(),
        due=moved,
        why="1 of 1 moved",
    )
    board = BoardMovement(added=("new",), dropped=("old",), shift=3.2, changes=(rating,))
    return Comparison(
        title="Since the date before",
        board="x",
        before="2025-01-06 (0123456789ab)",
        after="2025-01-13 (ba9876543210)",
        movement=board,
        pairs=pairs,
    )


def page(**changes: object) -> RatingPageData:
    usual: dict[str, object] = {
        "title": "Ratings",
        "board": "p, text, overall, without style control",
        "date": "2025-01-13",
        "date_kind": "committed",
        "digest": "ba9876543210" + "0" * 52,
        "models": 9,
        "new": True,
        "policy_models": ("a", "b"),
        "due": False,
        "why": "since 2025-01-06 none moved",
        "comparisons": (comparison(),),
        "history": RatingHistory(series=(series(),)),
        "snapshots": (
            SnapshotRow(
                board="p",
                date="2025-01-13",
                date_kind="committed",
                digest="f" * 64,
                models=9,
                source="https://x",
                revision="e" * 40,
                licence="CC BY 4.0",
                attribution="Arena",
                new=True,
            ),
        ),
        "provenance": Provenance(
            command="python -m flows.collect_ratings",
            settings_toml="name = 'x'",
            git_revision="abc",
            versions=(("python", "3"),),
            digests=(),
        ),
    }
    return RatingPageData.model_validate(usual | changes)


class TestPage:
    def test_it_asks_nobody_for_anything(self):
        html = render_rating_page(page())
        assert html.count("<html") == 1
        assert not re.search(r"<(?:link|img|iframe|script src)|url\(|@import", html)
        assert not re.search(r"""(?:src|href)=["'](?!#)""", html)

    def test_the_same_numbers_give_the_same_page(self):
        assert render_rating_page(page()) == render_rating_page(page())

    def test_every_colour_is_defined_for_both_themes(self):
        html = render_rating_page(page())
        used, defined = (
            set(re.findall(r"var\(--(\w[\w-]*)\)", html)),
            set(re.findall(r"--(\w[\w-]*): light-dark", html)),
        )
        assert used <= defined

    def test_names_are_escaped(self):
        html = render_rating_page(
            page(
                policy_models=("<script>", "b"),
                history=RatingHistory(
                    series=(series("x", point(0, {"<script>": 1.0, "b": 2.0}), point(1, {"<script>": 1.0, "b": 2.0})),)
                ),
            )
        )
        assert "<script>" not in html.replace("<script>addEventListener", "")
        assert "&lt;a&gt;" in html

    def test_what_a_date_is_and_what_a_snapshot_is_called_are_shown(self):
        html = render_rating_page(page())
        assert "2025-01-13 (date of a commit, not of publication)" in html
        for shown in ("ba9876543210", "f" * 12, "at " + "e" * 12, "CC BY 4.0", "Arena", "new in the store"):
            assert shown in html
        assert "nothing new" in render_rating_page(page(new=False))

    def test_boards_of_a_history_are_called_by_what_tells_them_apart(self):
        plain, styled = "p, text, overall, without style control", "q, text, overall, with style control"
        data = page(
            date="",
            history=RatingHistory(
                series=(series(plain), series(styled)), without_policy_models=("r, text, overall, with style control",)
            ),
        )
        labels, shared = board_labels(data)
        assert (labels[plain], shared) == ("p, without style control", "text, overall")
        html = render_rating_page(data)
        assert "r, with style control: none of the policy models is rated." in html
        assert "2 boards with rated policy models, 4 dates" in html

    def test_without_policy_models_there_are_ratings_but_no_pairs(self):
        html = render_rating_page(page(policy_models=(), comparisons=()))
        assert "Win probabilities over time" not in html
        assert "each board&#39;s highest-rated models" in html

    def test_figures_for_the_tracker(self):
        assert sorted(rating_figures_for_tracking(page())) == ["ratings-0.svg", "win-probabilities.svg"]


class TestWords:
    @pytest.mark.parametrize(
        ("due", "text"),
        [(True, "A re-calibration is due: "), (False, "No re-calibration is due: "), (None, "is due is open: ")],
    )
    def test_the_answer(self, due: bool | None, text: str):
        assert text in rating_answer(page(due=due))

    def test_what_changed(self):
        assert board_sentence(comparison(moved=True)) == (
            "1 model added, 1 dropped; the anchor shifted by +3.2 Elo points; 1 of 1 model moved beyond their joint interval, "
            "1 after Holm's correction."
        )
        assert pair_sentence(comparison(moved=True)) == (
            "Win probabilities of 1 pair changed by 5.00 percentage points on average (0.40 by chance alone), at most by 5.00; "
            "1 moved beyond their joint interval after Holm's correction."
        )

    def test_without_intervals_nothing_is_claimed(self):
        assert "no model can be said to have moved" in board_sentence(comparison(intervals=False))
        assert "without intervals none can be said to have moved" in pair_sentence(comparison(intervals=False))

    def test_the_summary(self):
        summary = rating_summary(page(comparisons=(comparison(moved=True),), notes=("mind this",)))
        for text in (
            "snapshot ba9876543210 (new)",
            "added: new",
            "dropped: old",
            "a over b: 60.0 % to 55.0 %, −5.00 [−8.00, −2.00] points *",
            "note: mind this",
        ):
            assert text in summary
