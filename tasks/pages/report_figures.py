"""Which figures a report has, and what they show; ``figures`` draws them."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from charm_core.mismatch import MismatchReport, PairMismatch
from charm_core.records import Estimate, Record
from tasks.pages import figures
from tasks.pages.figures import BoxPanel, Panel, Point, Series
from tasks.pages.report_data import (
    VARIANTS,
    BenchmarkRow,
    CurvePoint,
    ReportData,
    ReportDomain,
    ReportReliability,
    VariantName,
)
from tasks.pages.report_text import by_overvaluation, number
from tasks.pages.sheets import NARROW, WIDE, Frame


class PageFigure(Record):
    """One figure of the page: drawn for a phone, and for a desk too where it can use the width."""

    name: str
    caption: str
    narrow: str
    wide: str | None = None


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
        *reliability_figures(data.reliability, dict(benchmark_columns(data))),
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


def _mean_score_figure(domain: ReportDomain, name: str = "mean-score") -> PageFigure | None:
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
    return _page_figure(name, caption + "Names where there is room.", draw, wide=len(panels) > 1)


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
        Series(variant=row.variant, label="", estimates={variant_label(data, row.variant): scaled(row.value, 100)})
        for row in data.truth.accuracy
    ]
    rows = [label for one in series for label in one.estimates]
    caption = "Share of response pairs in which the truly better response gets the higher score; 50 % is chance."
    draw = partial(figures.forest, series=series, rows=rows, unit="Accuracy (%)", origin=50)
    return _page_figure("truth-accuracy", caption, draw, wide=False)


def first_of_each(rows: Sequence[BenchmarkRow]) -> list[BenchmarkRow]:
    """The first figure of every benchmark, which is the overall one where there is one."""
    first: dict[str, BenchmarkRow] = {}
    for row in rows:
        first.setdefault(row.benchmark, row)
    return list(first.values())


def alignment_figures(domain: ReportDomain, suffix: str = "") -> list[PageFigure]:
    """Overvaluation per policy model and mean score against rating, with a suffix to the figures' names."""
    scores = _mean_score_figure(domain, f"mean-score{suffix}")
    return [_overvaluation_figure(domain, f"overvaluation{suffix}"), *([scores] if scores else [])]


def reliability_figures(rows: Sequence[ReportReliability], labels: Mapping[VariantName, str]) -> list[PageFigure]:
    """For each benchmark, how often the favoured response is the right one, against how sure the reward model is.

    Args:
        rows: Of some benchmarks and variants.
        labels: What the variants are called, in the order in which they are shown.
    """
    drawn = []
    for place, benchmark in enumerate(dict.fromkeys(row.benchmark for row in rows)):
        of_variant = {row.variant: row for row in rows if row.benchmark == benchmark}
        panels = [_reliability_panel(of_variant[name], label) for name, label in labels.items() if name in of_variant]
        pairs = next(iter(of_variant.values())).as_scored.pairs
        caption = (
            f"{benchmark}: how often the response with the higher score is the right one, against the probability that the "
            f"reward model gives it, sigmoid of the score difference. {pairs:,} pairs, in bins of equal width; the number of "
            f"pairs beside each dot. Below the dashed line the reward model is surer than it is right."
        )
        draw = partial(
            figures.scatter,
            panels=panels,
            labels=("Probability (%)", "Right (%)"),
            diagonal=True,
            y_limits=(-4, 104),  # room for dots at either end
        )
        drawn.append(_page_figure(f"reliability-{place}", caption, draw, wide=len(panels) > 1))
    return drawn


def _reliability_panel(row: ReportReliability, label: str) -> Panel:
    points = tuple(
        Point(
            x=100 * one.mean_probability,
            y=100 * one.win_rate,
            label=f"{one.pairs:,}",
            priority=one.pairs,
        )
        for one in row.as_scored.bins
        if one.mean_probability is not None and one.win_rate is not None
    )
    error = f"ECE {number(row.as_scored.expected_calibration_error.value, 3)}"
    return Panel(variant=row.variant, title=f"{label} · {error}", points=points)


def variant_label(data: ReportData, name: VariantName) -> str:
    """What a variant is called in the main domain."""
    variant = data.main.variant(name)
    return variant.label if variant else name


def benchmark_columns(data: ReportData) -> list[tuple[VariantName, str]]:
    """Variants that the benchmark table has numbers for, with what they are called, in the order in which they are shown."""
    known = {value.variant for row in data.benchmarks for value in row.values}
    return [(name, variant_label(data, name)) for name in VARIANTS if name in known]


def scaled(estimate: Estimate, factor: float) -> Estimate:
    """An estimate in another unit."""
    low, value, high = (None if x is None else x * factor for x in (estimate.low, estimate.value, estimate.high))
    return Estimate(value=value, low=low, high=high)


def _pair_point(pair: PairMismatch) -> Point:
    """A pair in percent, seen from its higher-rated model."""
    rate, expected = scaled(pair.win_rate, 100), 100 * pair.win_probability
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
