"""The page about an evaluation says what the numbers say, and no more."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from charm_core.benchmarks.comparison import PairedTest
from charm_core.probability_calibration import probability_calibration
from charm_core.records import Estimate
from charm_core.style_bias import StyleCorrelation, StyleCorrelations, StyleDifferences
from tasks.pages.evaluation_page import evaluation_figures, evaluation_figures_for_tracking, render_evaluation_page
from tasks.pages.evaluation_page_data import EvaluatedModel, EvaluationData
from tasks.pages.evaluation_text import evaluation_answer, evaluation_summary, verdict
from tasks.pages.report_data import (
    BenchmarkRow,
    BenchmarkTest,
    ReportReliability,
    ReportStyleComparison,
    VariantName,
    VariantValue,
)
from tasks.pages.reporting import render_report
from tests.tasks.pages.test_reporting import BOARD, MEASURE, PROVENANCE, calibration

MODELS = (
    EvaluatedModel(variant="untouched", label="<b>old & rm</b>", path="org/old", digest="0" * 64),
    EvaluatedModel(variant="calibrated", label="new-rm", path="org/new", digest="1" * 64),
)


def row(benchmark: str, difference: tuple[float, float] | None, **changes: object) -> BenchmarkRow:
    variants: tuple[VariantName, ...] = ("untouched", "calibrated") if difference else ("untouched",)
    tests = ()
    if difference:
        estimate = Estimate(value=sum(difference) / 2, low=difference[0], high=difference[1])
        test = PairedTest(
            name="McNemar", only_before=3, only_after=9, p_value=0.00001, p_value_sidak=0.2, p_value_holm=0.3
        )
        tests = (BenchmarkTest(before="untouched", after="calibrated", difference=estimate, test=test),)
    fields = {
        "benchmark": benchmark,
        "subset": "overall",
        "metric": "accuracy",
        "items": 1234,
        "values": tuple(
            VariantValue(variant=name, value=Estimate(value=0.7, low=0.6, high=0.8), tie_rate=0.012, truncated=17)
            for name in variants
        ),
        "length_only": 0.456,
        "tests": tests,
    }
    return BenchmarkRow.model_validate(fields | changes)


RELIABILITY = probability_calibration([0.9, 0.8, 0.7, 0.6], [1, 1, 0, 1], replicates=20)


def data(**changes: object) -> EvaluationData:
    reliability = tuple(
        ReportReliability(benchmark="RewardBench", variant=model.variant, as_scored=RELIABILITY) for model in MODELS
    )
    fields = {
        "title": "Evaluation",
        "models": MODELS,
        "benchmarks": (
            row("RewardBench", (0.01, 0.05)),
            row("RewardBench", (-0.1, 0.1), subset="Chat"),
            row("RM-Bench", (-0.05, -0.01)),
            row("JudgeBench", (-0.01, 0.02)),
        ),
        "reliability": reliability,
        "confidence": 0.95,
        "provenance": PROVENANCE,
    }
    return EvaluationData(**(fields | changes))


def aligned() -> EvaluationData:
    """With human ratings: those of the calibration report's tests."""
    domain = calibration().domains[0]
    style = StyleCorrelation(overall=0.3, within_prompt=Estimate(value=0.21, low=0.11, high=0.31))
    found = StyleCorrelations(length=style, markdown=style, prompts=60, responses=240)
    variants = tuple(
        domain.variant(model.variant).model_copy(update={"label": model.label, "style": found}) for model in MODELS
    )
    differences = StyleDifferences(
        length=Estimate(value=0.123, low=0.1, high=0.2), markdown=Estimate(value=-0.234), prompts=60, responses=240
    )
    styles = (ReportStyleComparison(before="untouched", after="calibrated", differences=differences),)
    domain = domain.model_copy(update={"variants": variants, "comparisons": domain.comparisons[:1], "styles": styles})
    return data(board=BOARD, domains=(domain, domain.model_copy(update={"label": "other prompts"})))


@pytest.mark.parametrize(
    ("low", "high", "said"), [(0.01, 0.02, 1), (-0.02, -0.01, -1), (-0.01, 0.01, 0), (0.0, 0.1, 0), (None, 0.1, 0)]
)
def test_a_difference_is_one_where_its_interval_is_clear_of_0(low: float | None, high: float, said: int):
    (test,) = row("x", (0.0, 0.1)).tests
    assert verdict(test.model_copy(update={"difference": Estimate(value=0.0, low=low, high=high)})) == said


def test_the_answer_counts_what_is_clear_of_0():
    assert evaluation_answer(data()) == (
        "Of 3 benchmarks new-rm does better than <b>old & rm</b> on 1 (RewardBench) and worse on 1 (RM-Bench); where not said, "
        "the interval of the difference includes 0."
    )


def test_the_answer_about_one_reward_model():
    alone = data(models=MODELS[1:], benchmarks=(row("RewardBench", None), row("RM-Bench", None)), reliability=())
    assert evaluation_answer(alone) == (
        "new-rm gets 0.700 [0.600, 0.800] on RewardBench (length only 0.456), 0.700 [0.600, 0.800] on RM-Bench (length only "
        "0.456)."
    )


def test_the_page_holds_every_number_and_escapes_names():
    page = render_evaluation_page(aligned())
    assert "<b>old & rm</b>" not in page
    assert page.count("&lt;b&gt;old &amp; rm&lt;/b&gt;") > 5
    for shown in ("1,234", "ties 1.2 %, 17 cut", "0.456", "+0.030", "&lt; 0.001", "0.200", "0.300", "+0.123", "−0.234"):
        assert shown in page, shown
    assert {"benchmarks", "reliability", "alignment", "repeat"} <= set(re.findall(r'<h2 id="([a-z]+)"', page))
    assert len(re.findall('href="#([a-z]+)"', page)) == len(re.findall('<h2 id="', page))
    assert not re.search(r'(src|href)="(?!#)', page)


def test_what_is_not_measured_leaves_its_section_out():
    page = render_evaluation_page(data(benchmarks=(), reliability=()))
    assert 'id="benchmarks"' not in page
    assert 'id="alignment"' not in page
    page = render_evaluation_page(data())
    assert 'id="alignment"' not in page
    assert "Board" not in page


def test_the_same_numbers_are_the_same_page():
    assert render_evaluation_page(aligned()) == render_evaluation_page(aligned())


def test_reliability_is_drawn_for_each_benchmark_with_a_panel_for_each_reward_model():
    drawn = evaluation_figures(aligned())
    assert {"reliability-0", "overvaluation", "overvaluation-1", "mean-score", "mean-score-1"} == set(drawn)
    assert "ECE" in drawn["reliability-0"].narrow
    assert drawn["reliability-0"].wide is not None
    for content in evaluation_figures_for_tracking(aligned()).values():
        assert b"var(" not in content


def test_the_summary_has_a_line_for_every_benchmark_and_reward_model():
    text = evaluation_summary(aligned())
    assert text.startswith(evaluation_answer(aligned()))
    for name in ("RewardBench, overall accuracy", "RM-Bench", "JudgeBench", "held-out prompts", "+0.21 [+0.11, +0.31]"):
        assert name in text, name
    assert "Chat" not in text


def test_a_calibration_report_shows_the_same_tables():
    domain = aligned().domains[0]
    report = calibration().model_copy(
        update={"benchmarks": data().benchmarks, "reliability": data().reliability, "domains": (domain,)}
    )
    page = render_report(report)
    for shown in ("ties 1.2 %, 17 cut", "&lt; 0.001", "reliability-0", "+0.123"):
        assert shown in page, shown


@pytest.mark.parametrize("width", [360, 1200])
def test_the_page_fits_every_screen_with_readable_text(tmp_path: Path, width: int):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    text = render_evaluation_page(aligned())
    frame = f'<iframe srcdoc="{html.escape(text)}" style="width:{width}px;height:900px;border:0"></iframe>'
    host = tmp_path / "host.html"
    host.write_text(f'<meta charset="utf-8">{frame}<script>onload = () => {{ {MEASURE} }};</script>')
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=9000", "--dump-dom"]
    done = subprocess.run(
        [browser, *flags, f"--user-data-dir={tmp_path / 'profile'}", host.as_uri()],
        capture_output=True,
        text=True,
        timeout=180,
        check=True,
    )
    found = json.loads(html.unescape(re.search(r"<body>(.*)</body>", done.stdout, re.DOTALL)[1]))
    assert found["width"] <= width
    assert found["small"] == []
    assert found["drawings"] == text.count("<figure")
