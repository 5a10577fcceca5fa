"""What the gate reads from a report, and how its verdict is told."""

import re
from pathlib import Path

import polars as pl
import pytest
from prefect import flow

from charm_core.promotion import GateConfig
from charm_core.promotion_evidence import RepeatedScores
from charm_core.records import Estimate
from charm_core.reward_model.spec import RewardModelSpec
from charm_core.tables import PROMPTS, RESPONSES, SCORES
from charm_core.tables import RATINGS as RATINGS_TABLE
from tasks.arena import Board
from tasks.caching import use_store
from tasks.evidence import BenchmarkRows, DomainParts, ReportParts, compose_report
from tasks.pages.report_data import BenchmarkTest, ReportData
from tasks.pages.reporting import render_report
from tasks.promotion import (
    Repetition,
    choose_repeated,
    compare_repeated,
    evidence_of,
    gate_section,
    judge_report,
    score_again,
    verdict_markdown,
)
from tasks.prompts import ResponseSet
from tasks.scoring import identify_reward_model, score_responses
from tasks.store import ArtifactRef, ArtifactStore
from tests.charm_core.reward_model.kinds import save_classifier
from tests.promotion_samples import RATINGS, REPEATED, benchmark_row, report, scores, with_domain


class TestEvidence:
    def test_a_good_report_passes(self):
        verdict = judge_report(report(), GateConfig())
        assert verdict.passed, verdict.sentence()
        assert verdict.named("not measured") == ()

    def test_numbers_are_those_of_the_report(self):
        data = report()
        evidence = evidence_of(data)
        assert evidence.mismatch_untouched is not None
        compared = data.main.comparison("untouched", "calibrated")
        assert compared is not None
        assert evidence.mismatch_untouched.difference == compared.difference
        (length,), calibrated = evidence.length_bias, data.main.variant("calibrated")
        assert calibrated is not None
        assert calibrated.style is not None
        assert length.after == calibrated.style.length.within_prompt.value
        assert length.difference == data.main.styles[0].differences.length
        (spread,) = evidence.spread
        assert spread.spread_before == pytest.approx(3.3, abs=0.4)  # 5 to 95 % of a standard normal

    def test_a_calibration_that_does_nothing_does_not_pass(self):
        verdict = judge_report(report(1.5), GateConfig())
        assert not verdict.passed
        assert verdict.named("failed") == ("mismatch_untouched",)  # the control alone got worse

    def test_overall_figures_decide_unless_all_are_asked_for(self):
        (change,) = evidence_of(report()).benchmarks
        assert change.what == "RM-Bench, overall, accuracy"
        assert judge_report(report(), GateConfig()).rule("benchmarks").result == "passed"
        assert judge_report(report(), GateConfig(benchmark_parts=True)).rule("benchmarks").result == "failed"

    def test_a_benchmark_without_overall_figure_is_judged_by_all(self):
        rows = (benchmark_row("chat", 0.70, 0.70), benchmark_row("code", 0.50, 0.70))
        data = report().model_copy(update={"benchmarks": rows})
        assert [change.what for change in evidence_of(data).benchmarks] == [
            "RM-Bench, chat, accuracy",
            "RM-Bench, code, accuracy",
        ]

    def test_the_paired_difference_is_preferred_and_that_of_the_control_ignored(self):
        down, up = Estimate(value=-0.01, low=-0.02, high=-0.005), Estimate(value=0.01, low=0.0, high=0.02)
        row = benchmark_row("overall", 0.69, 0.70)
        tested = [
            BenchmarkTest.model_validate(
                {
                    "before": before,
                    "after": "calibrated",
                    "difference": difference,
                    "test": {"name": "sign", "p_value": 1.0},
                }
            )
            for before, difference in (("control", up), ("untouched", down))
        ]
        data = report().model_copy(update={"benchmarks": (row.model_copy(update={"tests": tuple(tested)}),)})
        assert evidence_of(data).benchmarks[0].difference == down
        assert judge_report(data, GateConfig()).named("failed") == ("benchmarks",)

    def test_without_style_the_length_correlation_serves_and_markdown_is_not_measured(self):
        plain = with_domain(
            report(),
            variants=tuple(one.model_copy(update={"style": None}) for one in report().main.variants),
            styles=(),
        )
        verdict = judge_report(plain, GateConfig())
        assert verdict.named("not measured") == ("markdown_bias",)
        assert verdict.rule("length_bias").result == "passed"
        assert not verdict.passed

    def test_a_report_of_another_kind_measures_nothing_that_counts(self):
        audit = with_domain(report(), variants=report().main.variants[:1], comparisons=(), styles=())
        assert judge_report(audit.model_copy(update={"benchmarks": ()}), GateConfig()).named("passed") == ()

    def test_other_domains_must_not_get_worse(self):
        worse = report(1.5, 0.1).main.model_copy(update={"label": "other prompts"})
        data = report().model_copy(update={"domains": (report().main, worse)})
        assert judge_report(data, GateConfig()).named("failed") == ("mismatch_elsewhere",)


class TestWords:
    def test_markdown_names_every_rule_with_its_numbers(self):
        data = report().model_copy(update={"benchmarks": (), "repeated_scores": None})
        verdict = judge_report(data, GateConfig(may_be_unmeasured=("benchmarks",)))
        text = verdict_markdown(verdict)
        assert text.startswith(
            "**The gate does not pass (not measured: score_stability; not measured, which is allowed: benchmarks).**"
        )
        cells = [re.split(r"(?<!\\)\|", line) for line in text.splitlines() if line.startswith("|")]
        rows = {row[1].strip().replace("\\", ""): [cell.strip() for cell in row[2:-1]] for row in cells}
        assert rows["No benchmark is down by more than its interval"][0] == "? not measured, which is allowed"
        assert rows["Scores are as stable as before"][0] == "? not measured"
        compared = data.main.comparison("untouched", "calibrated")
        assert compared is not None
        assert compared.before.value is not None
        row = rows["Held-out mean |MD| is lower than the untouched reward model's"]
        assert row[:3] == ["✓ passed", "held-out prompts", f"{compared.before.value:.3f}"]

    def test_the_report_and_the_card_show_the_verdict(self):
        judged = report().model_copy(update={"verdict": judge_report(report(), GateConfig())})
        page = render_report(judged)
        assert 'id="promotion"' in page
        assert "the gate passes" in page
        assert "Scores do not depend more on markdown" in page
        assert "## Promotion gate" in gate_section(judged)

    def test_what_was_not_judged_shows_nothing(self):
        assert 'id="promotion"' not in render_report(report())
        assert gate_section(report()) == ""

    def test_a_report_with_a_verdict_can_be_read_back(self):
        judged = report().model_copy(update={"verdict": judge_report(report(), GateConfig())})
        assert ReportData.model_validate_json(judged.model_dump_json()) == judged


class TestComposedReport:
    def test_it_carries_the_verdict_in_page_numbers_and_card(self, tmp_path: Path):
        store = ArtifactStore(url=str(tmp_path / "store"), work_folder=str(tmp_path))
        data = report()
        board = Board(
            ratings=store.write_table(RATINGS, RATINGS_TABLE), category="overall", style_control=False, date=None
        )
        parts = ReportParts(
            kind="calibrate",
            title="sample",
            reward_model="an RM",
            board=board,
            domains=(
                DomainParts(
                    label=data.main.label,
                    variants=tuple(store.write_record(one, "evidence") for one in data.main.variants),
                    comparisons=tuple(store.write_record(one, "comparison") for one in data.main.comparisons),
                    styles=tuple(store.write_record(one, "style_comparison") for one in data.main.styles),
                ),
            ),
            benchmarks=(store.write_record(BenchmarkRows(rows=data.benchmarks), "benchmark"),),
            repeated_scores=store.write_record(REPEATED, "repeated_scores"),
            gate=GateConfig(),
            provenance=data.provenance,
        )
        composed = compose_report.function(store, parts)
        verdict = store.read_record(composed.data, ReportData).verdict
        assert verdict == judge_report(data, GateConfig())
        assert "the gate passes" in store.read_bytes(composed.html).decode()
        assert "## Promotion gate\n\n**The gate passes" in store.read_bytes(composed.card).decode()
        silent = compose_report.function(store, parts.model_copy(update={"gate": None}))
        assert store.read_record(silent.data, ReportData).verdict is None
        assert "Promotion gate" not in store.read_bytes(silent.card).decode()


class TestRepetition:
    @pytest.fixture
    def store(self, tmp_path: Path) -> ArtifactStore:
        return ArtifactStore(url=str(tmp_path / "store"), work_folder=str(tmp_path))

    def responses(self, store: ArtifactStore, count: int) -> ResponseSet:
        ids = [f"p{number}" for number in range(count)]
        prompts = pl.DataFrame(
            {
                "prompt_id": ids,
                "prompt_set": ["s"] * count,
                "messages": [[{"role": "user", "content": f"w{number}"}] for number in range(count)],
            }
        )
        texts = pl.DataFrame(
            {
                "prompt_id": [one for one in ids for _ in "ab"],
                "policy_model": ["a", "b"] * count,
                "response": [f"w{number} w{10 + place}" for number in range(count) for place in range(2)],
            }
        )
        return ResponseSet(
            prompts=store.write_table(prompts, PROMPTS),
            responses=store.write_table(texts, RESPONSES),
            policy_models=("a", "b"),
        )

    def test_a_seeded_choice_of_prompts_with_all_their_responses(self, store: ArtifactStore):
        everything = self.responses(store, 20)
        one, same, other = (
            choose_repeated.function(store, everything, Repetition(prompts=5, seed=seed)) for seed in (0, 0, 1)
        )
        assert one == same
        assert one != other
        texts = store.read_table(one.responses, RESPONSES)
        assert texts.height == 10
        assert set(texts["prompt_id"]) == set(store.read_table(one.prompts, PROMPTS)["prompt_id"])

    def test_more_prompts_than_there_are_takes_all(self, store: ArtifactStore):
        everything = self.responses(store, 3)
        assert choose_repeated.function(store, everything, Repetition(prompts=50)).responses == everything.responses

    @pytest.mark.usefixtures("prefect_session")
    def test_a_stored_model_gives_its_texts_the_same_scores_again(self, store: ArtifactStore, tmp_path: Path):
        everything = self.responses(store, 6)
        model, other = (
            identify_reward_model(
                RewardModelSpec(path=str(save_classifier(tmp_path / str(seed), seed=seed)), max_length=64)
            )
            for seed in (0, 1)
        )

        @flow
        def score_twice() -> list[ArtifactRef | None]:
            config = GateConfig(repeat_prompts=4)
            scores = [score_responses(one, everything).scores for one in (model, other)]
            none = score_again(model, everything, scores[0], GateConfig(repeat_prompts=0))
            return [none, *(score_again(model, everything, one, config) for one in scores)]

        with use_store(store):
            none, same, another = score_twice()
        assert none is None
        assert same is not None
        assert another is not None
        repeated = store.read_record(same, RepeatedScores)
        assert repeated.texts == 8
        assert repeated.standard_deviation > 0
        assert repeated.largest_difference <= 1e-5 * repeated.standard_deviation
        stable = report().model_copy(update={"repeated_scores": repeated})
        assert judge_report(stable, GateConfig()).passed
        # another model's scores stand for a folder that does not hold what was trained
        swapped = stable.model_copy(update={"repeated_scores": store.read_record(another, RepeatedScores)})
        assert judge_report(swapped, GateConfig()).named("failed") == ("score_stability",)

    def test_both_scorings_are_compared(self, store: ArtifactStore):
        first = store.write_table(scores(0.0), SCORES)
        again = store.write_table(scores(0.0).head(8).with_columns(pl.col("score") + 0.25), SCORES)
        found = store.read_record(compare_repeated.function(store, first, again), RepeatedScores)
        assert (found.texts, found.reordered) == (8, 0.0)
        assert found.largest_difference == pytest.approx(0.25)
