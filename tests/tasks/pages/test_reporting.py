"""The report says what the numbers say, in every width and theme, and asks nothing of the network."""

import html
import json
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import polars as pl
import pytest
import yaml

from charm_core.agreement import EloAgreement, MismatchComparison
from charm_core.best_of_n import BestOfNConfig, Known, measure_best_of_n
from charm_core.mismatch import MismatchConfig, MismatchReport, measure_mismatch
from charm_core.offsets import OffsetConfig, fit_offsets
from charm_core.preferences import PairSummary
from charm_core.records import Estimate
from charm_core.selection import ModelChoice, Selection
from tasks.pages.report_data import (
    BenchmarkRow,
    BoardInfo,
    CurvePoint,
    InputDigest,
    PlantedBias,
    Provenance,
    ReportComparison,
    ReportData,
    ReportDomain,
    ReportVariant,
    ScoreQuantiles,
    ScoringNotes,
    TrainingCurve,
    TruthReport,
    VariantName,
    VariantValue,
)
from tasks.pages.report_figures import _pair_point, heat_map, page_figures
from tasks.pages.report_text import answer, mismatch_markdown, model_card, number, span, summary_text
from tasks.pages.reporting import figures_for_tracking, render_report

LABELS: dict[VariantName, str] = {"untouched": "untouched", "control": "control (δ = 0)", "calibrated": "calibrated"}
BIAS: dict[VariantName, float] = {"untouched": 1.0, "control": 1.1, "calibrated": 0.2}


def model_names(count: int) -> list[str]:
    return ["<b>odd & name</b>", "a|b", *(f"policy-model-{i:02d}-instruct-20240620" for i in range(count - 2))]


def tables(count: int, bias: float) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Scores on 60 prompts in which the last policy model gets ``bias`` too much, and ratings 10 points apart."""
    names, draws = model_names(count), np.random.default_rng(0)
    quality = np.linspace(1.0, 0.0, count)
    quality[-1] += 2 * bias
    scores = quality + draws.normal(0, 1, (60, count))
    frame = pl.DataFrame(
        {
            "prompt_id": [f"p{i:02d}" for i in range(60) for _ in names],
            "policy_model": names * 60,
            "score": scores.ravel(),
        }
    )
    rating = [1300.0 - 10 * i for i in range(count)]
    ratings = pl.DataFrame(
        {
            "policy_model": names,
            "rating": rating,
            "rating_low": [value - 5 for value in rating],
            "rating_high": [value + 5 for value in rating],
            "votes": [1000] * count,
        }
    )
    return frame, ratings


def mismatch(count: int, bias: float) -> MismatchReport:
    return measure_mismatch(*tables(count, bias), MismatchConfig(bootstrap_replicates=200))


def variant(name: VariantName, count: int) -> ReportVariant:
    report = mismatch(count, BIAS[name])
    near_one = Estimate(value=0.9, low=0.8, high=0.95)
    return ReportVariant(
        name=name,
        label=LABELS[name],
        mismatch=report,
        agreement=EloAgreement(
            pearson=near_one,
            spearman=near_one,
            kendall=near_one,
            rating_rmse=report.overvaluation_rmse,
            policy_models=count,
            prompts=60,
        ),
        score_quantiles=tuple(
            ScoreQuantiles(
                policy_model=model.policy_model,
                quantile_05=-2.0,
                quantile_25=-1.0,
                median=0.0,
                quantile_75=1.0,
                quantile_95=2.0,
            )
            for model in report.models
        ),
        scoring=ScoringNotes(texts=60 * count, responses_cut=41, max_length=512),
    )


def comparison(before: VariantName, low: float, high: float) -> ReportComparison:
    difference = Estimate(value=(low + high) / 2, low=low, high=high)
    return ReportComparison(
        before=before,
        after="calibrated",
        comparison=MismatchComparison(
            before=Estimate(value=0.3),
            after=Estimate(value=0.3 + (low + high) / 2),
            difference=difference,
            ratio=Estimate(value=0.5),
            p_value=0.01,
            rating_rmse_difference=Estimate(value=-20.0),
            spearman_difference=Estimate(value=0.1),
            policy_models=4,
            prompts=60,
        ),
    )


BOARD = BoardInfo(name="text", category="overall", style_control=False, date="2025-02-28", source="arena-catalog")
PROVENANCE = Provenance(
    command="python -m flows.calibrate --preset demo",
    settings_toml='[arena]\nboard = "text"\n',
    git_revision="0123abc",
    versions=(("torch", "2.13.0"),),
    digests=(InputDigest(name="ratings", digest="f" * 64, rows=7),),
)


def audit(count: int = 4) -> ReportData:
    domain = ReportDomain(label="all prompts", variants=(variant("untouched", count),))
    return ReportData(
        kind="audit", title="Audit", reward_model="an RM", board=BOARD, domains=(domain,), provenance=PROVENANCE
    )


def calibration(count: int = 4, control: tuple[float, float] | None = (-0.2, -0.1)) -> ReportData:
    names = model_names(count)
    comparisons = [comparison("untouched", -0.25, -0.15)]
    if control:
        comparisons.append(comparison("control", *control))
    domain = ReportDomain(
        label="held-out prompts",
        held_out_models=(names[2],),
        variants=tuple(variant(name, count) for name in LABELS),
        comparisons=tuple(comparisons),
    )
    values = tuple(VariantValue(variant=name, value=Estimate(value=0.7, low=0.6, high=0.8)) for name in LABELS)
    points = tuple(CurvePoint(step=step, loss=1 / step, accuracy=0.5) for step in range(1, 20))
    return ReportData(
        kind="calibrate",
        title="Calibration",
        reward_model="an RM",
        simulated=True,
        board=BOARD,
        domains=(domain, domain.model_copy(update={"label": "second prompts"})),
        selection=Selection(
            overvalued=(ModelChoice(policy_model=names[-1], reason="the largest"),),
            references=(ModelChoice(policy_model=names[0], reason="the most votes"),),
        ),
        offsets=fit_offsets(*tables(count, 1.0), OffsetConfig(bootstrap_replicates=20), [names[0]]),
        pairs=PairSummary(
            strategy="all_pairs",
            pairs=1000,
            train=900,
            held_out=100,
            train_prompts=54,
            held_out_prompts=6,
            flipped=124,
            flip_rate=0.124,
            ties_dropped=1,
            identical_dropped=2,
            small_margin_dropped=3,
            over_limit_dropped=4,
            median_margin=0.5,
        ),
        curves=(TrainingCurve(variant="calibrated", label="calibrated", points=points),),
        benchmarks=(BenchmarkRow(benchmark="RM-Bench", subset="chat", metric="accuracy", items=387, values=values),),
        truth=TruthReport(
            planted=tuple(
                PlantedBias(policy_model=model.policy_model, planted=0.0, estimated=model.overvaluation)
                for model in domain.variants[0].mismatch.models
            ),
            accuracy=values,
        ),
        warnings=("mind the gap",),
        provenance=PROVENANCE,
    )


@pytest.fixture(scope="module")
def calibrated() -> ReportData:
    return calibration()


@pytest.fixture(scope="module")
def page(calibrated: ReportData) -> str:
    return render_report(calibrated)


@pytest.mark.parametrize(
    ("control", "said"),
    [
        ((-0.2, -0.1), "and is better than the δ = 0 control (difference −0.150, 95 % interval −0.200 to −0.100)"),
        ((-0.2, 0.1), "but is no better than the δ = 0 control (difference −0.050, 95 % interval −0.200 to +0.100)"),
        ((-0.2, 0.0), "but is no better than the δ = 0 control"),
        ((0.1, 0.2), "but is worse than the δ = 0 control"),
        (None, "without a control, what training alone does is not known"),
    ],
)
def test_a_gain_is_claimed_only_beyond_the_control(control: tuple[float, float] | None, said: str) -> None:
    text = answer(calibration(control=control))
    assert text.startswith("In this simulation, on held-out prompts, calibration lowered")
    assert "from 0.300 to 0.100" in text
    assert said in text


def test_a_change_within_the_noise_is_not_called_a_change(calibrated: ReportData) -> None:
    unclear = comparison("untouched", -0.1, 0.05)
    domain = calibrated.main.model_copy(update={"comparisons": (unclear, comparison("control", -0.1, 0.05))})
    text = answer(calibrated.model_copy(update={"domains": (domain,)}))
    assert "calibration did not clearly change" in text
    assert "and is no better than the δ = 0 control" in text


def test_an_unknown_interval_proves_nothing(calibrated: ReportData) -> None:
    unknown = comparison("untouched", -0.1, 0.05).comparison.model_copy(update={"difference": Estimate(value=-0.2)})
    item = ReportComparison(before="untouched", after="calibrated", comparison=unknown)
    domain = calibrated.main.model_copy(update={"comparisons": (item,)})
    assert "did not clearly change" in answer(calibrated.model_copy(update={"domains": (domain,)}))


def test_an_audit_names_the_most_overvalued_policy_model() -> None:
    data = audit()
    last = data.main.variants[0].mismatch.models[-1]
    assert last.flagged
    text = answer(data)
    assert f"overvalues {last.policy_model} the most, by {number(last.overvaluation.value, 0)} Elo points" in text
    assert "of 4 policy models are flagged" in text


def test_an_audit_without_flags_says_so() -> None:
    data = audit()
    report = data.main.variants[0].mismatch
    models = tuple(model.model_copy(update={"flagged": False}) for model in report.models)
    one = data.main.variants[0].model_copy(update={"mismatch": report.model_copy(update={"models": models})})
    data = data.model_copy(update={"domains": (data.main.model_copy(update={"variants": (one,)}),)})
    assert answer(data).startswith("No policy model is significantly overvalued by the reward model an RM")
    assert "0 of 4 policy models are flagged" in answer(data)


def test_numbers_have_a_true_minus_and_no_negative_zero() -> None:
    assert number(-1234.5, 1) == "−1,234.5"
    assert number(-0.0001, 2, signed=True) == "0.00"
    assert number(0.5, 2, signed=True) == "+0.50"
    assert number(None, 2) == "–"
    assert span(Estimate(value=1.0, low=None, high=2.0), 0) == "[–, 2]"
    assert span(Estimate(value=1.0), 0) == ""


def test_the_heat_map_is_antisymmetric_and_sorted_by_rating() -> None:
    rows = heat_map(mismatch(4, 1.0))
    assert [name for name, _ in rows] == model_names(4)
    for i, (_, cells) in enumerate(rows):
        assert cells[i] is None
        for j in range(i):
            ours, theirs = cells[j], rows[j][1][i]
            assert ours is not None
            assert theirs is not None
            assert ours[1] == -theirs[1]
    assert rows[3][1][0][0].startswith("+")


def test_a_pair_is_seen_from_its_higher_rated_model() -> None:
    pair = (
        mismatch(4, 1.0)
        .pairs[0]
        .model_copy(update={"win_probability": 0.3, "win_rate": Estimate(value=0.2, low=0.1, high=0.25)})
    )
    point = _pair_point(pair)
    assert (point.x, point.y, point.low, point.high) == pytest.approx((70, 80, 75, 90))


def test_the_same_numbers_give_the_same_bytes(calibrated: ReportData, page: str) -> None:
    again = ReportData.model_validate_json(calibrated.model_dump_json())
    assert render_report(again) == page


def test_the_page_asks_nothing_of_the_network(page: str) -> None:
    links = re.findall(r'(?:src|href|srcset|action|data)="([^"]*)"', page)
    assert links
    assert [link for link in links if not link.startswith("#")] == []
    assert re.findall(r"@import|url\((?!#)", page) == []


def test_the_page_is_sound(page: str) -> None:
    assert [name for name, times in Counter(re.findall(r'\bid="([^"]*)"', page)).items() if times > 1] == []
    identifiers = set(re.findall(r'\bid="([^"]*)"', page))
    used = re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)|aria-labelledby="([^"]*)"', page)
    assert {"".join(one) for one in used} <= identifiers
    assert page.count("<svg") == page.count('role="img" aria-label="')
    assert page.count("<table") == page.count("<caption")
    assert page.count("<figure") == page.count("<figcaption")
    assert re.findall(r"#00000\d", page) == []
    assert "<b>odd" not in page
    assert html.escape("<b>odd & name</b>") in page


def test_every_part_is_on_the_page(calibrated: ReportData, page: str) -> None:
    assert page.index("This is a simulation") < page.index(html.escape(answer(calibrated), quote=False))
    for said in ("the most votes", "12.4 %", "mind the gap", "held out", "2025-02-28", "0123abc", "f" * 64, "RM-Bench"):
        assert said in page
    assert "python -m flows.calibrate --preset demo" in page


def test_what_is_picked_of_n_is_on_the_page() -> None:
    scores, ratings = tables(3, 0.0)
    by_rating = scores.drop("score").join(
        ratings.select("policy_model", score=pl.col("rating")), on="policy_model", how="left", maintain_order="left"
    )
    report = measure_best_of_n(
        {"untouched": scores, "calibrated": by_rating},
        scores.select("prompt_id", "policy_model", response=pl.lit("text")),
        Known(ratings=ratings),
        BestOfNConfig(sizes=(1, 3), bootstrap_replicates=10),
        [("untouched", "calibrated")],
    )
    text = render_report(calibration().model_copy(update={"best_of_n": (report,)}))
    section = text.partition('id="best-of-n"')[2].partition("</section>")[0]
    assert "3 responses to each of 60 prompts." in section
    assert html.escape("<b>odd & name</b>") in section
    row = section.partition("Elo of the picked model")[2].partition('<th scope="row">3</th>')[2].partition("</tr>")[0]
    assert row.count("1,300.0") == 4  # what the calibrated one picks, both ends of its interval, and the best possible


def test_missing_parts_leave_no_trace() -> None:
    text = render_report(audit())
    for heading in ("simulation", "Benchmarks", "The correction", "Against the truth", "Other domains", "Mind this"):
        assert heading not in text
    assert set(page_figures(audit())) == {"overvaluation", "win-rate", "mean-score", "distribution"}


def test_estimates_without_a_value_are_drawn_around() -> None:
    data = audit()
    report = data.main.variants[0].mismatch
    first = report.models[0].model_copy(
        update={"overvaluation": Estimate(value=None), "reward_model_rating": None, "mean_score": None}
    )
    pair = report.pairs[0].model_copy(update={"mismatch_degree": Estimate(value=None)})
    changed = report.model_copy(update={"models": (first, *report.models[1:]), "pairs": (pair, *report.pairs[1:])})
    one = data.main.variants[0].model_copy(update={"mismatch": changed, "score_quantiles": (), "agreement": None})
    data = data.model_copy(update={"domains": (data.main.model_copy(update={"variants": (one,)}),)})
    assert "nan" not in render_report(data).lower().replace("nano", "")
    assert "–" in summary_text(data)


def test_the_summary_is_aligned_and_starts_with_the_answer(calibrated: ReportData) -> None:
    text = summary_text(calibrated)
    assert text.startswith(answer(calibrated))
    table = text.split("\n\n")[2].splitlines()
    column = table[0].index("mean |MD|")
    assert [line[column - 1] for line in table] == [" "] * 4
    assert all(line[column] in "0123456789" for line in table[1:])


def test_the_model_card_has_front_matter_and_evidence(calibrated: ReportData) -> None:
    card = model_card(calibrated.model_copy(update={"base_model": "someone/an-rm: it's", "model_licence": "mit"}))
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["base_model"] == "someone/an-rm: it's"
    assert front["license"] == "mit"
    assert answer(calibrated) in card
    assert "```toml\n[arena]" in card


def test_markdown_cells_keep_their_columns() -> None:
    lines = mismatch_markdown(mismatch(4, 1.0)).splitlines()
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {6}
    assert lines[2].startswith(f"| {model_names(4)[-1]} |")


def test_tracked_figures_are_files_of_their_own(calibrated: ReportData) -> None:
    drawn = figures_for_tracking(calibrated)
    assert "overvaluation.svg" in drawn
    for content in drawn.values():
        assert ElementTree.fromstring(content).tag == "{http://www.w3.org/2000/svg}svg"
        assert b"var(" not in content


MEASURE = """
const page = document.querySelector("iframe").contentDocument;
const view = page.defaultView, small = [];
page.querySelectorAll("details").forEach(one => { one.open = true; });
const walker = page.createTreeWalker(page.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const parent = walker.currentNode.parentElement, text = walker.currentNode.textContent.trim();
  if (!text || !parent.getClientRects().length || parent.closest("style, script")) continue;
  const svg = parent.closest("svg"), scale = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
  const size = parseFloat(view.getComputedStyle(parent).fontSize) * scale;
  if (size < 11.9) small.push([text, size]);
}
document.body.textContent = JSON.stringify({
  width: page.documentElement.scrollWidth,
  drawings: [...page.querySelectorAll("svg")].filter(one => one.getClientRects().length).length,
  small,
});
"""


@pytest.mark.parametrize(("width", "count"), [(360, 4), (360, 40), (768, 4), (1200, 4)])
def test_the_page_fits_every_screen_with_readable_text(tmp_path: Path, width: int, count: int) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    text = render_report(calibration(count) if count == 4 else audit(count))
    frame = f'<iframe srcdoc="{html.escape(text)}" style="width:{width}px;height:900px;border:0"></iframe>'
    host = tmp_path / "host.html"
    host.write_text(f'<meta charset="utf-8">{frame}<script>onload = () => {{ {MEASURE} }};</script>')
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--virtual-time-budget=9000",
    ]
    done = subprocess.run(
        [browser, *flags, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", host.as_uri()],
        capture_output=True,
        text=True,
        timeout=180,
        check=True,
    )
    found = json.loads(html.unescape(re.search(r"<body>(.*)</body>", done.stdout, re.DOTALL)[1]))
    assert found["width"] <= width
    assert found["small"] == []
    assert found["drawings"] == text.count("<figure")
