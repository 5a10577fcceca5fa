"""The promotion gate: may a calibrated reward model become the champion? Rules over evidence, each answered with its numbers.

Every rule is a test of "it is safe to say so", not of "nothing was found": where a number or its interval is missing, the rule
is not measured, and by default that stops a promotion as a failure does. All rules have to pass at once, so their number makes
a wrong promotion rarer, never more frequent, and no correction for multiple tests is due.
"""

from collections.abc import Iterable, Sequence
from typing import Literal, Self

from pydantic import Field

from charm_core.promotion_evidence import BiasChange, MeasuredChange, PromotionEvidence, RepeatedScores, SpreadChange
from charm_core.records import Estimate, Record

RuleName = Literal[
    "mismatch_untouched",
    "mismatch_control",
    "mismatch_elsewhere",
    "benchmarks",
    "length_bias",
    "markdown_bias",
    "score_stability",
    "champion",
]
Result = Literal["passed", "failed", "not measured", "not applicable"]

TITLES: dict[RuleName, str] = {
    "mismatch_untouched": "Held-out mean |MD| is lower than the untouched reward model's",
    "mismatch_control": "Held-out mean |MD| is lower than the δ = 0 control's",
    "mismatch_elsewhere": "Mean |MD| is not higher on any other held-out domain",
    "benchmarks": "No benchmark is down by more than its interval",
    "length_bias": "Scores do not depend more on length",
    "markdown_bias": "Scores do not depend more on markdown",
    "score_stability": "Scores are as stable as before",
    "champion": "Held-out mean |MD| is not higher than the present champion's",
}
"""What a rule demands, as a heading."""


class GateConfig(Record):
    """What the promotion gate demands."""

    may_be_unmeasured: tuple[RuleName, ...] = Field(
        default=(), description="Rules that stop no promotion where they could not be measured; the verdict names them."
    )
    benchmark_parts: bool = Field(
        default=False, description="Hold every figure of a benchmark against the rule, not only the overall ones."
    )
    bias_tolerance: float = Field(
        default=0.05, ge=0, lt=1,
        description="How much further from 0 the correlation of score with length or markdown may be than before.",
    )  # fmt: skip
    tie_tolerance: float = Field(
        default=0.01, ge=0, lt=1, description="How much the share of tied comparisons may rise."
    )
    spread_factor: float = Field(
        default=5.0, gt=1, description="The spread of scores may grow or shrink by at most this factor."
    )
    repeat_tolerance: float = Field(
        default=0.05, ge=0,
        description="Largest difference between two scorings of one text, in standard deviations of the scores.",
    )  # fmt: skip
    repeat_prompts: int = Field(
        default=50, ge=0, description="Held-out prompts whose responses are scored a second time; 0 for none."
    )


class Finding(Record):
    """One number held against a rule."""

    what: str
    before: float | None = None
    after: float | None = None
    difference: Estimate | None = None
    demand: str = Field(description="What it was held against, such as 'interval below 0'.")
    result: Result


class RuleResult(Record):
    """How one rule was answered."""

    rule: RuleName
    result: Result
    stops: bool = Field(description="Whether this result stops the promotion.")
    findings: tuple[Finding, ...] = ()
    note: str = ""

    @property
    def title(self) -> str:
        """What the rule demands."""
        return TITLES[self.rule]


class Verdict(Record):
    """The gate's answer, rule by rule."""

    rules: tuple[RuleResult, ...] = Field(min_length=1)
    config: GateConfig

    @property
    def passed(self) -> bool:
        """Whether no rule stops the promotion."""
        return not any(rule.stops for rule in self.rules)

    def rule(self, name: RuleName) -> RuleResult:
        """The answer of one rule.

        Raises:
            KeyError: The rule was not asked.
        """
        return {rule.rule: rule for rule in self.rules}[name]

    def named(self, result: Result) -> tuple[RuleName, ...]:
        """The rules with that result."""
        return tuple(rule.rule for rule in self.rules if rule.result == result)

    def joined(self, rule: RuleResult) -> Self:
        """The verdict with one more rule, or that rule's answer replaced."""
        kept = tuple(one for one in self.rules if one.rule != rule.rule)
        return self.model_copy(update={"rules": (*kept, rule)})

    def sentence(self) -> str:
        """The verdict in one sentence; what was not measured is always named."""
        unmeasured = [rule for rule in self.rules if rule.result == "not measured"]
        told = {
            "failed": self.named("failed"),
            "not measured": tuple(rule.rule for rule in unmeasured if rule.stops),
            "not measured, which is allowed": tuple(rule.rule for rule in unmeasured if not rule.stops),
            "passed": self.named("passed") if self.passed else (),
        }
        details = "; ".join(f"{what}: {', '.join(rules)}" for what, rules in told.items() if rules)
        return f"the gate {'passes' if self.passed else 'does not pass'} ({details})"


def judge_evidence(evidence: PromotionEvidence, config: GateConfig | None = None) -> Verdict:
    """Hold the evidence against every rule that needs nothing but this run.

    Args:
        evidence: What was measured.
        config: What is demanded.

    Returns:
        The verdict; ``compare_with_champion`` adds the one rule that depends on who is champion.
    """
    settings = config or GateConfig()
    tolerance = settings.bias_tolerance
    findings: dict[RuleName, list[Finding]] = {
        "mismatch_untouched": [_lowered(one) for one in _given(evidence.mismatch_untouched)],
        "mismatch_control": [_lowered(one) for one in _given(evidence.mismatch_control)],
        "mismatch_elsewhere": [_not_raised(one) for one in evidence.mismatch_elsewhere],
        "benchmarks": [_not_down(one) for one in evidence.benchmarks],
        "length_bias": [_no_new_bias(one, tolerance) for one in evidence.length_bias],
        "markdown_bias": [_no_new_bias(one, tolerance) for one in evidence.markdown_bias],
        "score_stability": _stability(evidence, settings),
    }
    return Verdict(rules=tuple(_answer(rule, found, settings) for rule, found in findings.items()), config=settings)


def compare_with_champion(
    candidate: MeasuredChange | None, why_not: str, config: GateConfig | None = None
) -> RuleResult:
    """Hold a candidate against the present champion, where both were measured on the same responses and ratings.

    Args:
        candidate: Held-out mean |MD| of the champion (before) and the candidate (after); None where they cannot be compared.
        why_not: Why they cannot be compared.
        config: What is demanded.

    Returns:
        Failed where the candidate's value lies above the champion's interval. Not applicable where they cannot be compared: new
        ratings or prompts are the usual reason for a new version.
    """
    if candidate is None:
        return RuleResult(rule="champion", result="not applicable", stops=False, note=why_not)
    return _answer("champion", [_within(candidate)], config or GateConfig())


def _given(change: MeasuredChange | None) -> tuple[MeasuredChange, ...]:
    return () if change is None else (change,)


def _finding(change: MeasuredChange, demand: str, result: Result) -> Finding:
    return Finding(
        what=change.what,
        before=change.before.value,
        after=change.after.value,
        difference=change.difference,
        demand=demand,
        result=result,
    )


def _lowered(change: MeasuredChange) -> Finding:
    high = change.difference.high if change.difference else None
    result: Result = "not measured" if high is None else "passed" if high < 0 else "failed"
    return _finding(change, "the difference's interval lies below 0", result)


def _not_raised(change: MeasuredChange) -> Finding:
    low = change.difference.low if change.difference else None
    result: Result = "not measured" if low is None else "failed" if low > 0 else "passed"
    return _finding(change, "the difference's interval does not lie above 0", result)


def _not_down(change: MeasuredChange) -> Finding:
    """Paired where the difference's interval is known, else against the interval of the number before."""
    if change.difference is not None and change.difference.high is not None:
        down = change.difference.high < 0
        return _finding(change, "the difference's interval does not lie below 0", "failed" if down else "passed")
    before, after = change.before, change.after.value
    demand = "not below the interval before"
    if after is None or before.value is None or (before.low is None and after < before.value):
        return _finding(change, demand, "not measured")
    least = before.value if before.low is None else before.low
    return _finding(change, f"{demand}, which begins at {least:.4g}", "passed" if after >= least else "failed")


def _no_new_bias(change: BiasChange, tolerance: float) -> Finding:
    """By the value alone: that a large change may be chance does not make it safe."""
    result: Result = "not measured"
    if change.before is not None and change.after is not None:
        result = "passed" if abs(change.after) <= abs(change.before) + tolerance else "failed"
    return Finding(
        what=change.what,
        before=change.before,
        after=change.after,
        difference=change.difference,
        demand=f"at most {tolerance:g} further from 0",
        result=result,
    )


def _within(change: MeasuredChange) -> Finding:
    after, high = change.after.value, change.before.high
    result: Result = "not measured" if after is None or high is None else "passed" if after <= high else "failed"
    return _finding(change, "not above the champion's interval", result)


def _stability(evidence: PromotionEvidence, config: GateConfig) -> list[Finding]:
    found = [_repeat(evidence.repeated, config.repeat_tolerance)]
    if not evidence.spread:
        found.append(Finding(what="ties and spread of scores", demand="as before", result="not measured"))
    for change in evidence.spread:
        found += [_ties(change, config.tie_tolerance), _spread(change, config.spread_factor)]
    return found


def _repeat(repeated: RepeatedScores | None, tolerance: float) -> Finding:
    demand = f"at most {tolerance:g} standard deviations apart"
    if repeated is None:
        return Finding(what="the same texts scored twice", demand=demand, result="not measured")
    largest, unit = repeated.largest_difference, repeated.standard_deviation
    return Finding(
        what=f"largest difference between two scores of one text, {repeated.texts:,} texts",
        after=largest,
        demand=f"{demand}, which is {tolerance * unit:.3g}",
        # scores that are all the same say nothing, however well they repeat
        result="passed" if unit > 0 and largest <= tolerance * unit else "failed",
    )


def _ties(change: SpreadChange, tolerance: float) -> Finding:
    before, after = change.tie_rate_before, change.tie_rate_after
    return Finding(
        what=f"share of tied comparisons, {change.what}",
        before=before,
        after=after,
        demand=f"at most {tolerance:g} more",
        result="passed" if after <= before + tolerance else "failed",
    )


def _spread(change: SpreadChange, factor: float) -> Finding:
    before, after = change.spread_before, change.spread_after
    result: Result = "not measured"
    if before is not None and after is not None:
        result = "passed" if before / factor <= after <= before * factor and after > 0 else "failed"
    return Finding(
        what=f"spread of scores, {change.what}",
        before=before,
        after=after,
        demand=f"within a factor of {factor:g}",
        result=result,
    )


def _answer(rule: RuleName, findings: Sequence[Finding], config: GateConfig) -> RuleResult:
    result = _together(rule, [finding.result for finding in findings])
    stops = result == "failed" or (result == "not measured" and rule not in config.may_be_unmeasured)
    return RuleResult(rule=rule, result=result, stops=stops, findings=tuple(findings))


def _together(rule: RuleName, results: Iterable[Result]) -> Result:
    found = set(results)
    if "failed" in found:
        return "failed"
    if not found:  # there need not be another domain
        return "not applicable" if rule == "mismatch_elsewhere" else "not measured"
    return "not measured" if "not measured" in found else "passed"
