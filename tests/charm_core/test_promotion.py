"""The promotion gate: each rule passes, fails and says what it could not measure."""

from typing import Any

import polars as pl
import pytest

from charm_core.errors import TableError
from charm_core.promotion import GateConfig, Result, RuleName, compare_with_champion, judge_evidence
from charm_core.promotion_evidence import (
    BiasChange,
    MeasuredChange,
    PromotionEvidence,
    RepeatedScores,
    SpreadChange,
    repeated_scores,
)
from charm_core.records import Estimate


def change(low: float | None, high: float | None, *, before: Estimate | None = None) -> MeasuredChange:
    middle = None if low is None or high is None else (low + high) / 2
    return MeasuredChange(
        what="held-out prompts",
        before=before or Estimate(value=0.3),
        after=Estimate(value=0.2),
        difference=Estimate(value=middle, low=low, high=high),
    )


def benchmark(after: float | None, before: Estimate, difference: Estimate | None = None) -> MeasuredChange:
    return MeasuredChange(what="RM-Bench", before=before, after=Estimate(value=after), difference=difference)


REPEATED = RepeatedScores(texts=100, largest_difference=0.001, standard_deviation=1.0, reordered=0.0)
SPREAD = SpreadChange(
    what="held-out prompts", tie_rate_before=0.001, tie_rate_after=0.002, spread_before=2.0, spread_after=1.5
)
INTERVAL = Estimate(value=0.70, low=0.67, high=0.73)
GOOD = PromotionEvidence(
    mismatch_untouched=change(-0.15, -0.05),
    mismatch_control=change(-0.12, -0.01),
    mismatch_elsewhere=(change(-0.1, 0.1),),
    benchmarks=(benchmark(0.69, INTERVAL),),
    length_bias=(BiasChange(what="held-out prompts", before=0.30, after=0.20),),
    markdown_bias=(BiasChange(what="held-out prompts", before=-0.10, after=0.10),),
    spread=(SPREAD,),
    repeated=REPEATED,
)


def judged(**changed: Any) -> dict[RuleName, Result]:
    verdict = judge_evidence(GOOD.model_copy(update=changed))
    return {rule.rule: rule.result for rule in verdict.rules}


def test_good_evidence_passes_every_rule():
    verdict = judge_evidence(GOOD)
    assert verdict.passed
    assert {rule.result for rule in verdict.rules} == {"passed"}
    assert verdict.sentence().startswith("the gate passes (passed: mismatch_untouched, mismatch_control")


@pytest.mark.parametrize("rule", ["mismatch_untouched", "mismatch_control"])
@pytest.mark.parametrize(
    ("low", "high", "result"),
    [
        (-0.2, -0.0001, "passed"),
        (-0.2, 0.0, "failed"),  # an interval that touches 0 is not clear of it
        (-0.2, 0.1, "failed"),
        (0.1, 0.2, "failed"),
        (-0.2, None, "not measured"),
        (None, -0.1, "passed"),  # an interval that is open below still lies below 0
    ],
)
def test_mismatch_must_be_down_with_its_interval_clear_of_0(
    rule: RuleName, low: float | None, high: float | None, result: Result
):
    results = judged(**{rule: change(low, high)})
    assert results.pop(rule) == result
    assert set(results.values()) == {"passed"}


def test_no_gain_over_the_control_is_no_gain():
    verdict = judge_evidence(GOOD.model_copy(update={"mismatch_control": change(-0.02, 0.03)}))
    assert not verdict.passed
    assert verdict.named("failed") == ("mismatch_control",)
    (finding,) = verdict.rule("mismatch_control").findings
    assert finding.difference is not None
    assert (finding.difference.low, finding.difference.high) == (-0.02, 0.03)


@pytest.mark.parametrize(
    ("changes", "result"),
    [
        ((), "not applicable"),
        ((change(-0.1, 0.2),), "passed"),
        ((change(-0.1, 0.2), change(0.01, 0.2)), "failed"),
        ((change(None, 0.2),), "not measured"),
    ],
)
def test_another_domain_may_not_get_worse(changes: tuple[MeasuredChange, ...], result: Result):
    assert judged(mismatch_elsewhere=changes)["mismatch_elsewhere"] == result


def test_without_another_domain_the_gate_can_pass():
    assert judge_evidence(GOOD.model_copy(update={"mismatch_elsewhere": ()})).passed


@pytest.mark.parametrize(
    ("row", "result"),
    [
        (benchmark(0.72, INTERVAL), "passed"),
        (benchmark(0.67, INTERVAL), "passed"),  # down, but not by more than its interval
        (benchmark(0.669, INTERVAL), "failed"),
        (
            benchmark(0.60, INTERVAL, Estimate(value=-0.10, low=-0.21, high=0.01)),
            "passed",
        ),  # the paired interval decides
        (benchmark(0.69, INTERVAL, Estimate(value=-0.01, low=-0.015, high=-0.005)), "failed"),
        (benchmark(0.69, INTERVAL, Estimate(value=-0.01)), "passed"),  # a difference without interval says nothing
        (benchmark(0.60, Estimate(value=0.70)), "not measured"),
        (benchmark(0.70, Estimate(value=0.70)), "passed"),  # what is not down needs no interval
        (benchmark(None, INTERVAL), "not measured"),
        (benchmark(0.60, Estimate(value=None)), "not measured"),
    ],
)
def test_a_benchmark_may_not_be_down_by_more_than_its_interval(row: MeasuredChange, result: Result):
    assert judged(benchmarks=(row,))["benchmarks"] == result
    good = benchmark(0.72, INTERVAL)
    assert judged(benchmarks=(good, row, good))["benchmarks"] == result  # one is enough


@pytest.mark.parametrize("rule", ["length_bias", "markdown_bias"])
@pytest.mark.parametrize(
    ("before", "after", "result"),
    [
        (0.30, 0.35, "passed"),
        (0.30, 0.36, "failed"),
        (-0.30, 0.34, "passed"),  # as far from 0 as before, on the other side
        (0.02, -0.20, "failed"),  # a new bias for short responses is one too
        (0.50, 0.00, "passed"),
        (None, 0.1, "not measured"),
        (0.1, None, "not measured"),
    ],
)
def test_a_bias_may_not_be_traded_for_another(
    rule: RuleName, before: float | None, after: float | None, result: Result
):
    assert judged(**{rule: (BiasChange(what="x", before=before, after=after),)})[rule] == result


@pytest.mark.parametrize(
    ("update", "result"),
    [
        ({"tie_rate_after": 0.0109}, "passed"),
        ({"tie_rate_after": 0.02}, "failed"),
        ({"spread_after": 0.4}, "passed"),
        ({"spread_after": 0.39}, "failed"),
        ({"spread_after": 10.1}, "failed"),
        ({"spread_after": None}, "not measured"),
        ({"spread_before": 0.0, "spread_after": 0.0}, "failed"),
    ],
)
def test_scores_may_not_collapse(update: dict[str, float | None], result: Result):
    assert judged(spread=(SPREAD.model_copy(update=update),))["score_stability"] == result


@pytest.mark.parametrize(
    ("update", "result"),
    [
        ({"largest_difference": 0.05}, "passed"),
        ({"largest_difference": 0.051}, "failed"),
        ({"largest_difference": 0.051, "standard_deviation": 2.0}, "passed"),
        ({"largest_difference": 0.0, "standard_deviation": 0.0}, "failed"),
    ],
)
def test_scores_must_repeat(update: dict[str, float], result: Result):
    assert judged(repeated=REPEATED.model_copy(update=update))["score_stability"] == result


NOT_MEASURED: dict[RuleName, dict[str, Any]] = {
    "mismatch_untouched": {"mismatch_untouched": None},
    "mismatch_control": {"mismatch_control": None},
    "benchmarks": {"benchmarks": ()},
    "length_bias": {"length_bias": ()},
    "markdown_bias": {"markdown_bias": ()},
    "score_stability": {"repeated": None},
}


@pytest.mark.parametrize("rule", NOT_MEASURED)
def test_what_was_not_measured_does_not_pass_silently(rule: RuleName):
    evidence = GOOD.model_copy(update=NOT_MEASURED[rule])
    strict = judge_evidence(evidence)
    assert not strict.passed
    assert strict.named("not measured") == (rule,)
    lenient = judge_evidence(evidence, GateConfig(may_be_unmeasured=(rule,)))
    assert lenient.passed
    assert f"not measured, which is allowed: {rule};" in lenient.sentence()
    others = tuple(other for other in NOT_MEASURED if other != rule)
    assert not judge_evidence(evidence, GateConfig(may_be_unmeasured=others)).passed


def test_a_rule_that_may_be_unmeasured_can_still_fail():
    evidence = GOOD.model_copy(update={"benchmarks": (benchmark(0.5, INTERVAL), benchmark(None, INTERVAL))})
    verdict = judge_evidence(evidence, GateConfig(may_be_unmeasured=("benchmarks",)))
    assert not verdict.passed
    assert verdict.named("failed") == ("benchmarks",)


def test_no_evidence_at_all_passes_nothing():
    verdict = judge_evidence(PromotionEvidence())
    assert not verdict.passed
    assert verdict.named("passed") == ()


class TestChampion:
    @pytest.mark.parametrize(("after", "result"), [(0.2, "passed"), (0.33, "passed"), (0.34, "failed")])
    def test_a_candidate_may_not_be_clearly_worse(self, after: float, result: Result):
        beside = MeasuredChange(what="x", before=Estimate(value=0.3, low=0.27, high=0.33), after=Estimate(value=after))
        verdict = judge_evidence(GOOD).joined(compare_with_champion(beside, ""))
        assert verdict.rule("champion").result == result
        assert verdict.passed == (result == "passed")

    def test_one_that_cannot_be_compared_stops_nothing_and_is_explained(self):
        verdict = judge_evidence(GOOD).joined(compare_with_champion(None, "it was measured on other ratings"))
        assert verdict.passed
        assert verdict.rule("champion").result == "not applicable"
        assert verdict.rule("champion").note == "it was measured on other ratings"

    def test_a_rule_that_is_asked_again_replaces_its_answer(self):
        verdict = judge_evidence(GOOD).joined(compare_with_champion(None, "one"))
        again = verdict.joined(compare_with_champion(None, "two"))
        assert len(again.rules) == len(verdict.rules)
        assert again.rule("champion").note == "two"


def scores(*rows: tuple[str, str, float]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=["prompt_id", "policy_model", "score"], orient="row")


class TestRepeatedScores:
    FIRST = scores(("p", "a", 0.0), ("p", "b", 1.0), ("p", "c", 2.0), ("q", "a", 3.0), ("q", "b", 3.0))

    def test_the_same_scores_differ_by_nothing(self):
        found = repeated_scores(self.FIRST, self.FIRST.reverse())
        assert (found.texts, found.largest_difference, found.reordered) == (5, 0.0, 0.0)
        assert found.standard_deviation == pytest.approx(1.16619, abs=1e-5)

    def test_the_largest_difference_and_the_changed_orders_are_counted(self):
        again = scores(("p", "a", 1.5), ("p", "b", 1.0), ("p", "c", 2.0), ("q", "a", 3.0), ("q", "b", 3.1))
        found = repeated_scores(self.FIRST, again)
        assert found.largest_difference == pytest.approx(1.5)
        assert found.reordered == pytest.approx(2 / 4)  # a and b of p changed places, a and b of q are no tie any more

    def test_a_part_of_the_texts_is_enough(self):
        assert repeated_scores(self.FIRST, self.FIRST.head(2)).texts == 2

    def test_a_text_without_a_first_score_is_refused(self):
        with pytest.raises(TableError, match="1 of 2 texts that were scored again have no first score"):
            repeated_scores(self.FIRST, scores(("p", "a", 0.0), ("r", "a", 0.0)))
