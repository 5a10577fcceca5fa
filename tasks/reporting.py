"""The report: all numbers of a run in, one self-contained HTML file out; also its terminal summary and model card.

Pure functions: the same ``ReportData`` gives the same text, byte for byte. Figures are drawn in ``figures``, the page
is laid out in ``report.html.j2``; here are the records that both read and the sentences that say what the numbers mean.
"""

import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pydantic import Field

from charm_core.agreement import EloAgreement, MismatchComparison
from charm_core.mismatch import MismatchReport, ModelMismatch, PairMismatch
from charm_core.offsets import OffsetFit
from charm_core.preferences import PairSummary
from charm_core.records import Estimate, Record
from charm_core.selection import Selection
from tasks import figures
from tasks.figures import NARROW, WIDE, BoxPanel, Frame, Panel, Point, Series

VariantName = Literal["untouched", "control", "calibrated", "offsets"]
VARIANTS: tuple[VariantName, ...] = ("untouched", "control", "calibrated", "offsets")
"""The order in which variants are shown everywhere."""


class BoardInfo(Record):
    """The snapshot of the Arena that the reward model is held against."""

    name: str
    category: str = ""
    style_control: bool | None = None
    date: str = ""
    source: str = ""
    licence: str = ""
    digest: str = ""
    note: str = ""


class ScoreQuantiles(Record):
    """How one policy model's scores are spread, in the reward model's own unit."""

    policy_model: str
    quantile_05: float
    quantile_25: float
    median: float
    quantile_75: float
    quantile_95: float


class ScoringNotes(Record):
    """What happened to the texts on their way into the reward model."""

    texts: int
    prompts_cut: int = 0
    responses_cut: int = 0
    max_length: int | None = None


class ReportVariant(Record):
    """One state of the reward model, measured on one domain."""

    name: VariantName
    label: str
    mismatch: MismatchReport
    agreement: EloAgreement | None = None
    score_quantiles: tuple[ScoreQuantiles, ...] = ()
    scoring: ScoringNotes | None = None
    length_correlation: float | None = None
    """Spearman correlation of score with response length."""


class ReportComparison(Record):
    """A paired comparison of mean |MD| between two variants; ``after`` is the one that is claimed to be better."""

    before: VariantName
    after: VariantName
    comparison: MismatchComparison


class ReportDomain(Record):
    """Variants on one set of prompts and policy models."""

    label: str
    """Within a sentence: "held-out prompts"."""
    description: str = ""
    held_out_models: tuple[str, ...] = ()
    """Policy models of this domain that the calibration never saw."""
    variants: tuple[ReportVariant, ...] = Field(min_length=1)
    comparisons: tuple[ReportComparison, ...] = ()

    @property
    def coverage(self) -> str:
        """What share of cases the intervals cover, in percent."""
        return f"{100 * self.variants[0].mismatch.config.confidence:g} %"

    def variant(self, name: VariantName) -> ReportVariant | None:
        """The variant of that name, or None."""
        return next((variant for variant in self.variants if variant.name == name), None)

    def comparison(self, before: VariantName, after: VariantName) -> MismatchComparison | None:
        """The comparison of two variants, or None."""
        found = (item.comparison for item in self.comparisons if (item.before, item.after) == (before, after))
        return next(found, None)


class CurvePoint(Record):
    """One optimiser step."""

    step: int
    loss: float
    learning_rate: float | None = None
    accuracy: float | None = None
    margin_mean: float | None = None
    held_out_loss: float | None = None
    held_out_accuracy: float | None = None


class TrainingCurve(Record):
    """One training run."""

    variant: VariantName
    label: str
    points: tuple[CurvePoint, ...] = Field(min_length=1)


class VariantValue(Record):
    """One variant's number."""

    variant: VariantName
    value: Estimate


class BenchmarkRow(Record):
    """One line of the benchmark table, with a number for each variant that has one."""

    benchmark: str
    subset: str
    metric: str
    items: int
    values: tuple[VariantValue, ...]
    length_only: float | None = None
    """What a scorer that only knows the length would get."""
    note: str = ""


class PlantedBias(Record):
    """What a simulation put in, and what was found, in Elo points."""

    policy_model: str
    planted: float
    estimated: Estimate
    held_out: bool = False


class TruthReport(Record):
    """What only a simulation can know."""

    planted: tuple[PlantedBias, ...] = ()
    accuracy: tuple[VariantValue, ...] = ()
    """Share of response pairs in which the truly better one gets the higher score."""
    note: str = ""


class InputDigest(Record):
    """One input or output, by its content."""

    name: str
    digest: str
    rows: int | None = None
    note: str = ""


class Provenance(Record):
    """Everything that someone needs to get the same numbers."""

    command: str
    settings_toml: str
    git_revision: str = ""
    versions: tuple[tuple[str, str], ...] = ()
    """(package, version) in the order to show."""
    digests: tuple[InputDigest, ...] = ()
    licences: tuple[tuple[str, str], ...] = ()
    """(what, licence)."""


class ReportData(Record):
    """All numbers of one report. What is None or empty leaves its section out."""

    kind: Literal["audit", "calibrate"]
    title: str
    reward_model: str
    simulated: bool = False
    base_model: str = ""
    """Hub id of the untouched reward model, for the model card; empty where it has none."""
    model_licence: str = ""
    board: BoardInfo
    domains: tuple[ReportDomain, ...] = Field(min_length=1)
    """The first carries the answer; then others, such as a second held-out domain or held-out policy models."""
    selection: Selection | None = None
    offsets: OffsetFit | None = None
    pairs: PairSummary | None = None
    curves: tuple[TrainingCurve, ...] = ()
    benchmarks: tuple[BenchmarkRow, ...] = ()
    truth: TruthReport | None = None
    warnings: tuple[str, ...] = ()
    provenance: Provenance

    @property
    def main(self) -> ReportDomain:
        """The domain that carries the answer."""
        return self.domains[0]


class PageFigure(Record):
    """One figure of the page: drawn for a phone, and for a desk too where it can use the width."""

    name: str
    caption: str
    narrow: str
    wide: str | None = None


def answer(data: ReportData) -> str:
    """Say in one sentence what was found, no more than the intervals allow."""
    text = _audit_answer(data) if data.kind == "audit" else _calibration_answer(data)
    return f"In this simulation, {text}." if data.simulated else f"{text[0].upper()}{text[1:]}."


def _audit_answer(data: ReportData) -> str:
    report = data.main.variants[0].mismatch
    top = max(report.models, key=_overvaluation)
    flagged = [model for model in report.models if model.flagged]
    over = sum(_overvaluation(model) > 0 for model in flagged)
    overvalued = top.flagged and _overvaluation(top) > 0
    range_ = f"{data.main.coverage} {interval(top.overvaluation, 0, signed=not overvalued)}"
    by = f"{number(top.overvaluation.value, 0, signed=not overvalued)} Elo points ({range_})"
    count = (
        f"{len(flagged)} of {len(report.models)} policy models are flagged after Holm's correction "
        f"({over} overvalued, {len(flagged) - over} undervalued)"
    )
    if overvalued:
        return f"the reward model {data.reward_model} overvalues {top.policy_model} the most, by {by}; {count}"
    return (
        f"no policy model is significantly overvalued by the reward model {data.reward_model}: the largest estimate is "
        f"{by} for {top.policy_model}; {count}"
    )


def _calibration_answer(data: ReportData) -> str:
    where = f"on {data.main.label}, calibration"
    whose = f"the mean absolute mismatch of {data.reward_model}"
    change = data.main.comparison("untouched", "calibrated")
    if change is None:
        return f"{where} of {data.reward_model} was not compared with the untouched reward model"
    direction = _direction(change.difference)
    before, after = number(change.before.value, 3), number(change.after.value, 3)
    verb = {-1: "lowered", 0: "did not clearly change", 1: "raised"}[direction]
    numbers = (
        f"from {before} to {after}" if direction else f"({before} before, {after} after; {_difference(data, change)})"
    )
    control = data.main.comparison("control", "calibrated")
    if control is None:
        return f"{where} {verb} {whose} {numbers}; without a control, what training alone does is not known"
    beyond = {-1: "better than", 0: "no better than", 1: "worse than"}[_direction(control.difference)]
    joint = "and" if (direction < 0) == (beyond == "better than") else "but"
    return f"{where} {verb} {whose} {numbers} {joint} is {beyond} the δ = 0 control ({_difference(data, control)})"


def _difference(data: ReportData, comparison: MismatchComparison) -> str:
    value, range_ = comparison.difference.value, interval(comparison.difference, 3, signed=True)
    return f"difference {number(value, 3, signed=True)}, {data.main.coverage} {range_}"


def _direction(difference: Estimate) -> int:
    """-1 or 1 where the interval lies on one side of zero; 0 where it does not, or is not known."""
    if difference.low is None or difference.high is None:
        return 0
    return -1 if difference.high < 0 else int(difference.low > 0)


def number(value: float | None, digits: int, *, signed: bool = False) -> str:
    """A number with a true minus sign; a dash where it is missing."""
    if value is None:
        return "–"
    text = f"{value:+,.{digits}f}" if signed else f"{value:,.{digits}f}"
    if not any(digit in text for digit in "123456789"):
        text = text.lstrip("+-")
    return text.replace("-", "−")


elo = partial(number, digits=0, signed=True)


def interval(estimate: Estimate, digits: int, *, signed: bool = False) -> str:
    """The interval in words."""
    if estimate.low is None or estimate.high is None:
        return "interval open or not known"
    return f"interval {number(estimate.low, digits, signed=signed)} to {number(estimate.high, digits, signed=signed)}"


def span(estimate: Estimate | None, digits: int, *, signed: bool = False) -> str:
    """The interval for a table cell: [low, high], or nothing."""
    if estimate is None or (estimate.low is None and estimate.high is None):
        return ""
    return f"[{number(estimate.low, digits, signed=signed)}, {number(estimate.high, digits, signed=signed)}]"


def page_figures(data: ReportData) -> dict[str, PageFigure]:
    """Draw every figure that the data has numbers for, by name."""
    drawn = [
        _overvaluation_figure(data.main, "overvaluation"),
        *(_overvaluation_figure(domain, f"overvaluation-{i}") for i, domain in enumerate(data.domains[1:], 1)),
        _win_rate_figure(data.main),
        _mean_score_figure(data.main),
        _distribution_figure(data.main),
        _offset_figure(data),
        _curve_figure(data, "loss", "Training loss", lambda point: point.loss),
        _curve_figure(data, "accuracy", "Share of pairs ordered as labelled", lambda point: point.accuracy),
        _planted_figure(data),
        _truth_accuracy_figure(data),
    ]
    return {figure.name: figure for figure in drawn if figure is not None}


def _page_figure(name: str, caption: str, draw: Callable[[Frame], str], *, wide: bool = True) -> PageFigure:
    """Draw for both widths; the ids of the two drawings differ, because both are in the page."""
    narrow = draw(Frame(name=f"{name}-narrow", width=NARROW, description=caption))
    return PageFigure(
        name=name,
        caption=caption,
        narrow=narrow,
        wide=draw(Frame(name=f"{name}-wide", width=WIDE, description=caption)) if wide else None,
    )


def by_overvaluation(domain: ReportDomain) -> list[ModelMismatch]:
    """The policy models of the first variant, the most overvalued first."""
    return sorted(domain.variants[0].mismatch.models, key=_overvaluation, reverse=True)


def _overvaluation(model: ModelMismatch) -> float:
    return -math.inf if model.overvaluation.value is None else model.overvaluation.value


def _held_out_marks(domain: ReportDomain) -> dict[str, str]:
    return dict.fromkeys(domain.held_out_models, "held out")


def _overvaluation_figure(domain: ReportDomain, name: str) -> PageFigure:
    series = [
        Series(
            variant=variant.name,
            label=variant.label,
            estimates={model.policy_model: model.overvaluation for model in variant.mismatch.models},
            hollow=frozenset(model.policy_model for model in variant.mismatch.models if not model.flagged),
        )
        for variant in domain.variants
    ]
    rows = [model.policy_model for model in by_overvaluation(domain)]
    caption = (
        f"Overvaluation per policy model on {domain.label}, in Elo points: right of 0 the reward model ranks it above "
        f"what people think. Largest for the {domain.variants[0].name} reward model: {rows[0]}. "
        f"Lines are {domain.coverage} intervals; filled: significant after Holm's correction, hollow: not."
    )
    unit = "Overvaluation (Elo points)"
    return _page_figure(
        name, caption, lambda frame: figures.forest(frame, series, rows, unit, marks=_held_out_marks(domain))
    )


def _win_rate_figure(domain: ReportDomain) -> PageFigure:
    panels = []
    for variant in domain.variants:
        points = [_pair_point(pair) for pair in variant.mismatch.pairs if pair.win_rate.value is not None]
        panels.append(Panel(variant=variant.name, title=variant.label, points=tuple(points)))
    caption = (
        "Each dot is a pair of policy models, seen from the higher-rated one: how often the reward model prefers it, "
        "against how often people are expected to. On the dashed line both agree; below it the reward model favours "
        "the lower-rated model. Filled dots are significant after Holm's correction."
    )
    labels = ("Expected from Elo (% wins)", "Reward model (% wins)")
    draw = partial(figures.scatter, panels=panels, labels=labels, diagonal=True, y_limits=(0, 100))
    return _page_figure("win-rate", caption, draw, wide=len(panels) > 1)


def _mean_score_figure(domain: ReportDomain) -> PageFigure | None:
    panels = []
    for variant in domain.variants:
        points = tuple(
            Point(
                x=model.rating,
                y=model.mean_score,
                label=model.policy_model,
                priority=abs(model.overvaluation.value or 0.0),
                hollow=model.policy_model in domain.held_out_models,
            )
            for model in variant.mismatch.models
            if model.mean_score is not None
        )
        agreement = f" · Spearman {number(variant.agreement.spearman.value, 2)}" if variant.agreement else ""
        if points:
            panels.append(Panel(variant=variant.name, title=f"{variant.label}{agreement}", points=points))
    if not panels:
        return None
    caption = "Mean score of each policy model against its Arena rating. Each reward model has its own unit. " + (
        "Hollow: policy models held out of the calibration. " if domain.held_out_models else ""
    )
    draw = partial(figures.scatter, panels=panels, labels=("Arena rating (Elo points)", "Mean score"))
    return _page_figure("mean-score", caption + "Names where there is room.", draw, wide=len(panels) > 1)


def _distribution_figure(domain: ReportDomain) -> PageFigure | None:
    ratings = {model.policy_model: model.rating for model in domain.variants[0].mismatch.models}
    panels = [
        BoxPanel(
            variant=variant.name,
            title=variant.label,
            quantiles={
                row.policy_model: (row.quantile_05, row.quantile_25, row.median, row.quantile_75, row.quantile_95)
                for row in sorted(variant.score_quantiles, key=lambda row: -ratings.get(row.policy_model, 0.0))
            },
        )
        for variant in domain.variants
        if variant.score_quantiles
    ]
    if not panels:
        return None
    caption = "Scores per policy model, the highest-rated on top: line 5 to 95 %, bar 25 to 75 %, gap at the median."
    return _page_figure("distribution", caption, partial(figures.boxes, panels=panels, unit="Score"))


def _offset_figure(data: ReportData) -> PageFigure | None:
    if data.offsets is None:
        return None
    estimates = {row.policy_model: row.offset for row in data.offsets.offsets}
    rows = sorted(estimates, key=lambda name: estimates[name].value or 0.0)
    marks = dict.fromkeys(data.offsets.reference_models, "reference")
    series = [Series(variant="offsets", label="offset", estimates=estimates)]
    caption = "Offset added to each policy model's scores, with intervals; the mean over the reference models is 0."
    return _page_figure(
        "offsets", caption, lambda frame: figures.forest(frame, series, rows, "Offset (score units)", marks=marks)
    )


def _curve_figure(
    data: ReportData, name: str, label: str, value: Callable[[CurvePoint], float | None]
) -> PageFigure | None:
    panels = []
    for curve in data.curves:
        drawn = [(point.step, value(point)) for point in curve.points]
        points = tuple(Point(x=step, y=y) for step, y in drawn if y is not None)
        if points:
            panels.append(Panel(variant=curve.variant, title=curve.label, points=points))
    if not panels:
        return None
    draw = partial(figures.curves, panels=panels, labels=("Optimiser step", label))
    return _page_figure(f"training-{name}", f"{label}, at each step of the fine-tuning.", draw, wide=False)


def _planted_figure(data: ReportData) -> PageFigure | None:
    if data.truth is None or not data.truth.planted:
        return None
    points = tuple(
        Point(
            x=row.planted,
            y=row.estimated.value,
            low=row.estimated.low,
            high=row.estimated.high,
            label=row.policy_model,
            priority=abs(row.planted),
            hollow=row.held_out,
        )
        for row in data.truth.planted
        if row.estimated.value is not None
    )
    panels = [Panel(variant="untouched", title="", points=points)]
    caption = "Estimated against planted overvaluation, with intervals. On the dashed line the estimate is right. "
    labels = ("Planted (Elo points)", "Estimated (Elo points)")
    draw = partial(figures.scatter, panels=panels, labels=labels, diagonal=True)
    return _page_figure("planted", caption + "Hollow: held-out policy models.", draw, wide=False)


def _truth_accuracy_figure(data: ReportData) -> PageFigure | None:
    if data.truth is None or not data.truth.accuracy:
        return None
    series = [
        Series(variant=row.variant, label="", estimates={_variant_label(data, row.variant): _scaled(row.value, 100)})
        for row in data.truth.accuracy
    ]
    rows = [label for one in series for label in one.estimates]
    caption = "Share of response pairs in which the truly better response gets the higher score; 50 % is chance."
    draw = partial(figures.forest, series=series, rows=rows, unit="Accuracy (%)", origin=50)
    return _page_figure("truth-accuracy", caption, draw, wide=False)


def _variant_label(data: ReportData, name: VariantName) -> str:
    variant = data.main.variant(name)
    return variant.label if variant else name


def _benchmark_variants(data: ReportData) -> set[str]:
    return {value.variant for row in data.benchmarks for value in row.values}


def _scaled(estimate: Estimate, factor: float) -> Estimate:
    low, value, high = (None if x is None else x * factor for x in (estimate.low, estimate.value, estimate.high))
    return Estimate(value=value, low=low, high=high)


def _pair_point(pair: PairMismatch) -> Point:
    """A pair in percent, seen from its higher-rated model."""
    rate, expected = _scaled(pair.win_rate, 100), 100 * pair.win_probability
    low, middle, high = rate.low, rate.value or 0.0, rate.high
    if expected < 50:
        expected, middle = 100 - expected, 100 - middle
        low, high = (None if bound is None else 100 - bound for bound in (high, low))
    return Point(x=expected, y=middle, low=low, high=high, hollow=not pair.flagged)


def heat_map(report: MismatchReport) -> list[tuple[str, list[tuple[str, int, bool] | None]]]:
    """The mismatch degrees as rows of cells, the highest-rated policy model first.

    Returns:
        Per row its policy model and its cells: (text, step from -4 to 4 of the colour scale, flagged); None where there
        is no pair.
    """
    degrees: dict[tuple[str, str], tuple[float, bool]] = {}
    for pair in report.pairs:
        if pair.mismatch_degree.value is not None:
            degrees[pair.model_a, pair.model_b] = (pair.mismatch_degree.value, pair.flagged)
            degrees[pair.model_b, pair.model_a] = (-pair.mismatch_degree.value, pair.flagged)
    names = [model.policy_model for model in sorted(report.models, key=lambda model: -model.rating)]

    def cell(row: str, column: str) -> tuple[str, int, bool] | None:
        if (row, column) not in degrees:
            return None
        degree, flagged = degrees[row, column]
        step = sum(abs(degree) >= edge for edge in HEAT_EDGES)
        return number(degree, 2, signed=True).replace("0.", "."), step if degree > 0 else -step, flagged

    return [(row, [cell(row, column) for column in names]) for row in names]


HEAT_EDGES = (0.05, 0.15, 0.3, 0.5)
"""Where the colour of the heat map changes, in mismatch degree."""


def render_report(data: ReportData) -> str:
    """Render the report: one HTML page without any request to the outside.

    Args:
        data: All numbers.

    Returns:
        The page. The same data and versions give the same text, so it can be stored by its content.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=number, elo=elo, span=span, scaled=_scaled, themed=figures.themed, heat_map=heat_map
    )
    environment.globals.update(
        by_overvaluation=by_overvaluation,
        shown_variants=_benchmark_variants,
        variant_label=_variant_label,
        variant_names=VARIANTS,
    )
    template = environment.get_template("report.html.j2")
    return template.render(data=data, answer=answer(data), figures=page_figures(data))


def figures_for_tracking(data: ReportData) -> dict[str, bytes]:
    """The figures as SVG files of their own, for a tracker's artifacts: file name to content."""
    return {
        f"{name}.svg": figures.standalone(figure.wide or figure.narrow) for name, figure in page_figures(data).items()
    }


def _estimate(estimate: Estimate | None, digits: int, *, signed: bool = False) -> str:
    if estimate is None:
        return "–"
    return f"{number(estimate.value, digits, signed=signed)} {span(estimate, digits, signed=signed)}".strip()


def _variant_rows(domain: ReportDomain) -> list[list[str]]:
    return [
        [
            variant.label,
            _estimate(variant.mismatch.mean_absolute_mismatch, 3),
            _estimate(variant.mismatch.overvaluation_rmse, 0),
            _estimate(variant.agreement.spearman if variant.agreement else None, 2),
        ]
        for variant in domain.variants
    ]


_MEAN_MISMATCH = "Mean |MD| is 0 where the reward model's win rates are what the Elo ratings predict."
_VARIANT_HEADER = ["reward model", "mean |MD|", "overvaluation RMSE (Elo)", "Spearman with Elo"]


def summary_text(data: ReportData, top: int = 5) -> str:
    """The report in a few lines for a terminal: the answer, the variants, the most overvalued policy models."""
    parts = [answer(data)]
    for domain in data.domains:
        parts.append(
            f"{domain.label} ({domain.variants[0].mismatch.prompts:,} prompts), with {domain.coverage} intervals"
        )
        parts.append(_aligned([_VARIANT_HEADER, *_variant_rows(domain)]))
    first = data.main.variants[0]
    rows = [
        [model.policy_model, _estimate(model.overvaluation, 0, signed=True), "flagged" if model.flagged else ""]
        for model in by_overvaluation(data.main)[:top]
    ]
    parts.append(f"most overvalued by the {first.name} reward model, in Elo points")
    parts.append(_aligned([["policy model", "overvaluation", ""], *rows]))
    parts.extend(f"warning: {warning}" for warning in data.warnings)
    return "\n\n".join(parts) + "\n"


def mismatch_markdown(report: MismatchReport) -> str:
    """A mismatch report as a Markdown table, the most overvalued policy model first."""
    rows = [
        [
            model.policy_model,
            number(model.rating, 0),
            _estimate(model.overvaluation, 0, signed=True),
            _estimate(model.mismatch_degree, 3, signed=True),
            "yes" if model.flagged else "",
        ]
        for model in sorted(report.models, key=_overvaluation, reverse=True)
    ]
    header = ["policy model", "Arena rating", "overvaluation (Elo points)", "mean mismatch degree", "flagged"]
    return _markdown([header, *rows])


def model_card(data: ReportData) -> str:
    """The model card of the calibrated reward model: Hugging Face front matter, then the evidence."""
    front: dict[str, object] = {"library_name": "transformers", "pipeline_tag": "text-classification"}
    if data.base_model:
        front["base_model"] = data.base_model
    if data.model_licence:
        front["license"] = data.model_licence
    front["tags"] = ["reward-model", "calibration", "chatbot-arena", "charm"]
    board = data.board
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---", "", f"# {data.title}", ""]
    lines += [answer(data), ""]
    for domain in data.domains:
        heading = f"## {domain.label[0].upper()}{domain.label[1:]}"
        lines += [heading, "", domain.description, "", _markdown([_VARIANT_HEADER, *_variant_rows(domain)]), ""]
    lines += [f"Intervals are {data.main.coverage}. {_MEAN_MISMATCH}", ""]
    lines += ["## Overvaluation after calibration", "", mismatch_markdown(_latest(data.main).mismatch), ""]
    lines += [
        "## Made from",
        "",
        f"- Board: {board.name} {board.category} {board.date}, {board.source} {board.licence}".rstrip(),
    ]
    lines += [f"- Code: {data.provenance.git_revision}", "", "```sh", data.provenance.command, "```", ""]
    lines += ["```toml", data.provenance.settings_toml.strip(), "```", ""]
    if data.warnings:
        lines += ["## Warnings", "", *(f"- {warning}" for warning in data.warnings), ""]
    return "\n".join(lines)


def _latest(domain: ReportDomain) -> ReportVariant:
    return domain.variant("calibrated") or domain.variants[0]


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    header, *body = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *body))
