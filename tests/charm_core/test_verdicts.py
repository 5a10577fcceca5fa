"""From verdicts to preferences: exact on small cases, and planted leanings are found."""

import numpy as np
import polars as pl
import pytest

from charm_core.errors import TableError
from charm_core.judging import COMPARISON_SCHEMA, Verdict
from charm_core.verdicts import Weighed, weigh_verdicts


def comparisons(rows: list[tuple[str, str, str, bool, str | None]]) -> pl.DataFrame:
    """prompt, model a, model b, whether their responses are identical, whose is longer."""
    return pl.DataFrame(
        [
            (prompt, a, b, None if same else f"{prompt}{a}{b}1", None if same else f"{prompt}{a}{b}2", longer)
            for prompt, a, b, same, longer in rows
        ],
        schema=COMPARISON_SCHEMA,
        orient="row",
    )


def verdicts(**said: str) -> dict[str, Verdict]:
    """``p1ab="fs"``: first where a is shown first, second where b is."""
    names: dict[str, Verdict] = {"f": "first", "s": "second", "t": "tie"}
    return {
        f"{key}{place}": names[mark]
        for key, marks in said.items()
        for place, mark in enumerate(marks, 1)
        if mark in names
    }


def preferences(weighed: Weighed) -> dict[tuple[str, str, str], float]:
    return {tuple(row[:3]): row[3] for row in weighed.preferences.iter_rows()}


def test_both_orders_count_the_same():
    rows = [(f"p{n}", "a", "b", False, None) for n in range(8)]
    weighed = weigh_verdicts(
        comparisons(rows),
        verdicts(p0ab="fs", p1ab="sf", p2ab="ff", p3ab="ss", p4ab="tt", p5ab="ft", p6ab="tf", p7ab="st"),
    )
    expected = {"p0": 1, "p1": 0, "p2": 0.5, "p3": 0.5, "p4": 0.5, "p5": 0.75, "p6": 0.25, "p7": 0.25}
    assert preferences(weighed) == {(prompt, "a", "b"): value for prompt, value in expected.items()}
    report = weighed.report
    assert (report.comparisons, report.judged, report.consistent, report.reversed) == (8, 8, 3, 2)
    assert report.tie_share == 5 / 16
    assert report.first_share.value == pytest.approx(6 / 11)
    assert report.first_of_reversed.value == 0.5


def test_nothing_unread_becomes_a_tie():
    rows = [
        ("p0", "a", "b", False, None),
        ("p1", "a", "b", False, None),
        ("p2", "a", "b", False, None),
        ("p3", "a", "b", True, None),
    ]
    weighed = weigh_verdicts(
        comparisons(rows), verdicts(p0ab="fs", p1ab="f-", p2ab="-s"), failed=["p2ab1"], asked_again=4
    )
    assert preferences(weighed) == {("p0", "a", "b"): 1.0, ("p3", "a", "b"): 0.5}
    report = weighed.report
    assert (report.judged, report.identical, report.failed, report.unreadable, report.asked_again) == (1, 1, 1, 1, 4)
    assert report.judged + report.identical + report.failed + report.unreadable == report.comparisons
    assert report.sentences("the judge")[0] == (
        "the judge judged 1 of 4 comparisons on 4 prompts, each in both orders; 1 are of identical responses and count as ties, "
        "1 are left out because a request failed, 1 are left out because an answer had no verdict."
    )
    with pytest.raises(
        TableError, match=r"no verdict on any of 4 comparisons \(1 requests failed, the others could not be read\)"
    ):
        weigh_verdicts(comparisons(rows), {}, failed=["p2ab1"])


def test_order_of_rows_does_not_matter():
    rows = [(f"p{n}", "a", "b", False, "a") for n in range(30)]
    said = verdicts(**{f"p{n}ab": "fs" if n % 3 else "ft" for n in range(30)})
    one, other = (weigh_verdicts(comparisons(given), said) for given in (rows, rows[::-1]))
    assert one.preferences.equals(other.preferences)
    assert one.report == other.report


def drawn(
    prompts: int, rng: np.random.Generator, *, first: float, longer: float
) -> tuple[pl.DataFrame, dict[str, Verdict]]:
    """A judge that looks at the place with one probability, at the length with another, else at nothing."""
    rows, said = [], {}
    for n in range(prompts):
        for a, b in (("a", "b"), ("a", "c"), ("b", "c")):
            rows.append((f"p{n:04d}", a, b, False, rng.choice([a, b])))
            for place in (1, 2):
                shown_first = (a, b)[place - 1]
                draw = rng.random()
                choice = "first" if draw < first else None
                if draw >= first and draw < first + longer:
                    choice = "first" if rows[-1][4] == shown_first else "second"
                said[f"p{n:04d}{a}{b}{place}"] = choice or rng.choice(["first", "second"])
    return comparisons(rows), said


def test_planted_leanings_are_found_and_absent_ones_are_not():
    rng = np.random.default_rng(3)
    leaning = weigh_verdicts(*drawn(400, rng, first=0.2, longer=0.3)).report
    assert leaning.first_share.low is not None
    assert leaning.longer_share.low is not None
    assert 0.5 < leaning.first_share.low < 0.6 < (leaning.first_share.high or 0)
    assert leaning.longer_share.low > 0.6
    assert leaning.first_of_reversed.low is not None
    assert leaning.first_of_reversed.low > 0.5
    assert "so it leans towards a place" in leaning.sentences("the judge")[1]
    fair = weigh_verdicts(*drawn(400, rng, first=0.0, longer=0.0)).report
    assert (fair.first_share.low or 1) < 0.5 < (fair.first_share.high or 0)
    assert (fair.longer_share.low or 1) < 0.5 < (fair.longer_share.high or 0)
    assert "leans" not in fair.sentences("the judge")[1]


def test_intervals_know_that_verdicts_on_one_prompt_go_together():
    # every verdict of a prompt is the same: as much information as one verdict per prompt
    rows = [(f"p{n}", a, b, False, None) for n in range(40) for a, b in (("a", "b"), ("a", "c"), ("b", "c"))]
    said = verdicts(**{f"{p}{a}{b}": "ff" if int(p[1:]) % 2 else "ss" for p, a, b, _, _ in rows})
    share = weigh_verdicts(comparisons(rows), said).report.first_share
    assert share.value == 0.5
    width = (share.high or 0) - (share.low or 0)
    assert width == pytest.approx(2 * 1.96 * 0.5 / np.sqrt(40), rel=0.15)


def test_length_and_the_judges_own_responses():
    rows = [
        ("p0", "a", "b", False, "a"),
        ("p1", "a", "b", False, "b"),
        ("p2", "a", "b", False, "b"),
        ("p3", "a", "b", False, None),
        ("p4", "a", "b", False, "a"),
        ("p0", "b", "c", False, "c"),
    ]
    said = verdicts(p0ab="fs", p1ab="fs", p2ab="sf", p3ab="fs", p4ab="tt", p0bc="sf")
    report = weigh_verdicts(comparisons(rows), said, own="b").report
    assert report.longer_share.value == pytest.approx(3 / 4)
    assert report.own_share is not None
    assert report.own_share.value == pytest.approx((0 + 0 + 1 + 0 + 0.5 + 0) / 6)
    assert report.sentences("it")[-1].startswith("Where one of the responses is its own, it prefers that by 25.0% (")
    assert weigh_verdicts(comparisons(rows), said, own="z").report.own_share is None
    assert weigh_verdicts(comparisons(rows), said).report.own_share is None


def test_shares_of_nothing_are_unknown():
    report = weigh_verdicts(comparisons([("p0", "a", "b", False, None)]), verdicts(p0ab="tt")).report
    assert (report.first_share.value, report.longer_share.value, report.first_of_reversed.value) == (None, None, None)
    assert "an unknown share" in report.sentences("it")[2]
