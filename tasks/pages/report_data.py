"""What a report is made of: one frozen record, small enough to be kept as JSON beside the report."""

from typing import Literal

from pydantic import Field

from charm_core.agreement import EloAgreement, MismatchComparison
from charm_core.benchmarks.comparison import PairedTest
from charm_core.best_of_n import BestOfNReport
from charm_core.mismatch import MismatchReport
from charm_core.offsets import OffsetFit
from charm_core.preferences import PairSummary
from charm_core.probability_calibration import ProbabilityCalibration
from charm_core.promotion import Verdict
from charm_core.promotion_evidence import RepeatedScores
from charm_core.records import Estimate, Record
from charm_core.sampling import SampleCounts
from charm_core.selection import Selection
from charm_core.style_bias import StyleCorrelations, StyleDifferences

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
    batch_drift: float | None = None
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
    style: StyleCorrelations | None = None
    """Correlations of score with length and Markdown, within prompts too."""


class ReportComparison(Record):
    """A paired comparison of mean |MD| between two variants; ``after`` is the one that is claimed to be better."""

    before: VariantName
    after: VariantName
    comparison: MismatchComparison


class ReportStyleComparison(Record):
    """A paired comparison of what style is worth to two variants."""

    before: VariantName
    after: VariantName
    differences: StyleDifferences


class ReportDomain(Record):
    """Variants on one set of prompts and policy models."""

    label: str
    """Within a sentence: "held-out prompts"."""
    description: str = ""
    held_out_models: tuple[str, ...] = ()
    """Policy models of this domain that the calibration never saw."""
    variants: tuple[ReportVariant, ...] = Field(min_length=1)
    comparisons: tuple[ReportComparison, ...] = ()
    styles: tuple[ReportStyleComparison, ...] = ()

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
    tie_rate: float | None = None
    """Benchmarks: share of the decisive comparisons with equal scores."""
    truncated: int | None = None
    """Benchmarks: items with a text that was cut to be scored."""


class BenchmarkTest(Record):
    """Whether two variants differ in one line of the benchmark table."""

    before: VariantName
    after: VariantName
    difference: Estimate
    """After minus before, paired."""
    test: PairedTest


class BenchmarkRow(Record):
    """One line of the benchmark table, with a number for each variant that has one."""

    benchmark: str
    subset: str
    metric: str
    items: int
    values: tuple[VariantValue, ...]
    length_only: float | None = None
    """What a scorer that only knows the length would get."""
    tests: tuple[BenchmarkTest, ...] = ()
    note: str = ""


class ReportReliability(Record):
    """Whether one variant's probabilities are true on the pairs of one benchmark."""

    benchmark: str
    variant: VariantName
    as_scored: ProbabilityCalibration
    """With sigmoid(score difference), as Bradley-Terry has it."""
    score_temperature: float | None = None
    """What fits these pairs best; None where none does."""
    rescaled: ProbabilityCalibration | None = None
    """With that temperature: what is left is the shape."""


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


class PolicyModelResponses(Record):
    """Where one policy model's responses come from, and how they ended."""

    policy_model: str
    source: str
    decoding: str = ""
    counts: SampleCounts
    missing: int = 0
    """Prompts of the set without a response."""


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
    reliability: tuple[ReportReliability, ...] = ()
    responses: tuple[PolicyModelResponses, ...] = ()
    truth: TruthReport | None = None
    best_of_n: tuple[BestOfNReport, ...] = ()
    repeated_scores: RepeatedScores | None = None
    verdict: Verdict | None = None
    """Of the promotion gate, without the rule that depends on who is champion."""
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    """Further findings, in sentences."""
    provenance: Provenance

    @property
    def main(self) -> ReportDomain:
        """The domain that carries the answer."""
        return self.domains[0]
