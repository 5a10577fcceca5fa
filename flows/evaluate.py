"""How good is this reward model? Benchmarks and human alignment of any reward model; of two, whether they differ.

python -m flows.evaluate --config benchmarks/real/evaluate_minilm.toml
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from prefect import flow
from pydantic import BaseModel, ConfigDict, Field

from charm_core.responses import HELD_OUT, HELD_OUT_DOMAIN
from flows.calibration import decide_parts, judged_views
from flows.command_line import run_from_command_line
from flows.outcome import (
    Used,
    benchmark_metrics,
    describe_provenance,
    domain_metrics,
    metric_name,
    name_run,
    step_lines,
)
from flows.presets import EVALUATE, demo_evaluation
from flows.runs import EvaluationRun
from flows.session import Session, check_services, open_session
from flows.sources import Answers, gather_answers, simulated_sources
from flows.subjects import ScoredResponses, Subject, local_subjects
from tasks.benchmark_sources import StoredBenchmark, load_benchmarks
from tasks.benchmarking import judge_scored
from tasks.evaluation import View, compare_styles, compare_variants, evaluate_variant
from tasks.evidence import DomainParts
from tasks.pages.evaluation_page import (
    EvaluationPage,
    EvaluationParts,
    compose_evaluation_page,
    evaluation_figures_for_tracking,
)
from tasks.pages.evaluation_page_data import EvaluatedModel, EvaluationData
from tasks.pages.evaluation_text import evaluation_summary
from tasks.pages.report_data import VariantName
from tasks.preflight import check_before_run
from tasks.prompts import ResponseSet, select_responses
from tasks.publishing import publish_link, publish_markdown, publish_table
from tasks.scoring import RewardModelRef
from tasks.store import ArtifactRef
from tasks.text_scores import ScoredTexts

DEMO = demo_evaluation()
"""What a deployment runs if nothing else is asked for."""

FIRST: VariantName = "untouched"
SECOND: VariantName = "calibrated"
"""Places of the two reward models: colours and marks are those of before and after."""


class EvaluationOutcome(BaseModel):
    """What an evaluation leaves behind."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    page: ArtifactRef = Field(description="The HTML page.")
    data: ArtifactRef = Field(description="All of its numbers, as JSON.")
    tracking_url: str = Field(description="Page of the MLflow run.")
    summary: str = Field(description="The result in a few lines.")


@dataclass(frozen=True, kw_only=True)
class _Subjects:
    """The reward models by their place, and what human ratings there are to hold them against."""

    models: Mapping[VariantName, Subject]
    answers: Answers | None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Alignment:
    domains: tuple[DomainParts, ...] = ()
    used: Mapping[str, ArtifactRef]
    warnings: tuple[str, ...] = ()


@flow(name="evaluate", flow_run_name="evaluate {run.name}")
def evaluate(run: EvaluationRun = DEMO) -> EvaluationOutcome:
    """Put a reward model to benchmarks and hold it against the Arena's human ratings; with a baseline, compare the two."""
    with open_session("evaluate", run.name, run) as session:
        benchmarks = load_benchmarks(run.benchmarks)
        subjects = _subjects(session, run, benchmarks)
        both = {name: subject.score_benchmarks(benchmarks) for name, subject in subjects.models.items()}
        scored = {name: sets for name, (sets, _) in both.items()}
        tables = judge_scored(benchmarks, scored, run.benchmarks.resampling, ((FIRST, SECOND),))
        alignment = _align(run, subjects)
        board = subjects.answers.board if subjects.answers else None
        labels = " and ".join(one.label for one in subjects.models.values())
        name_run(session, labels, board, f"{len(tables)} benchmarks" if tables else "", page="evaluation.html")
        used = Used(
            inputs={f"{one.name} rows": one.rows for one in benchmarks} | dict(alignment.used),
            outputs=_outputs(scored, benchmarks),
        )
        page = compose_evaluation_page(
            EvaluationParts(
                title=run.name,
                simulated=run.simulation is not None,
                models=tuple(
                    EvaluatedModel(variant=name, label=one.label, path=one.path, digest=one.digest)
                    for name, one in subjects.models.items()
                ),
                benchmarks=tables,
                board=board,
                domains=alignment.domains,
                responses=subjects.answers.rows if subjects.answers else (),
                confidence=run.benchmarks.resampling.confidence,
                warnings=(
                    *subjects.warnings,
                    *(text for _, said in both.values() for text in said),
                    *alignment.warnings,
                ),
                notes=subjects.answers.notes if subjects.answers else (),
                provenance=describe_provenance("evaluate", run, used),
            )
        )
        return _finish(session, page, used)


def _subjects(session: Session, run: EvaluationRun, benchmarks: tuple[StoredBenchmark, ...]) -> _Subjects:
    if run.simulation is not None:
        sources = simulated_sources(run.simulation)
        return _Subjects(
            models={FIRST: Subject(label=sources.name, model=sources.reward_model)},
            answers=sources.answers,
            warnings=sources.warnings,
        )
    if run.scorer is not None:
        found: tuple[Subject, ...] = (Subject(label=run.scorer.endpoint.model, model=run.scorer),)
    else:
        # the baseline is what was before
        found = local_subjects(tuple(spec for spec in (run.baseline, run.reward_model) if spec is not None))
    local = [(one.label, one.model) for one in found if isinstance(one.model, RewardModelRef)]
    if run.sampling is not None:
        # nobody is asked for responses that cannot be scored
        for _, model in local:
            check_before_run(session.store, model).raise_on_errors()
    answers = gather_answers(run.arena, run.responses, run.sampling) if run.arena is not None else None
    texts = answers.responses if answers is not None else max(benchmarks, key=lambda one: one.items).texts
    warnings = [warning for label, model in local for warning in _checked(session, label, model, texts)]
    return _Subjects(
        models=dict(zip((FIRST, SECOND), found, strict=False)),
        answers=answers,
        warnings=(*warnings, *(answers.warnings if answers else ())),
    )


def _checked(session: Session, label: str, model: RewardModelRef, texts: ResponseSet) -> tuple[str, ...]:
    """Stop if the reward model cannot be used; otherwise what the pre-flight has to say."""
    found = check_before_run(session.store, model, texts)
    found.raise_on_errors()
    return tuple(f"{label}: {finding.message}" for finding in found.warnings)


def _align(run: EvaluationRun, subjects: _Subjects) -> _Alignment:
    """Every view of the responses with every reward model."""
    if subjects.answers is None:
        return _Alignment(used={})
    responses, ratings = subjects.answers.responses, subjects.answers.board.ratings
    split, views = _views(run, subjects.answers)
    if split is not None:
        responses = select_responses(responses, split, (HELD_OUT, HELD_OUT_DOMAIN), responses.policy_models)
    scored = {name: subject.score(responses) for name, subject in subjects.models.items()}
    domains = tuple(_judge(run, scored, responses, ratings, split, view) for view in views)
    used = {"ratings": ratings, "responses": responses.responses, **({"split": split} if split else {})}
    return _Alignment(
        domains=domains,
        used=used,
        warnings=tuple(warning for item in scored.values() for warning in item.warnings),
    )


def _views(run: EvaluationRun, answers: Answers) -> tuple[ArtifactRef | None, list[View]]:
    if run.split is None:
        return None, [View(label="all prompts")]
    parts, known = decide_parts(run.split, answers)
    return parts, judged_views(run.split, known)


def _judge(
    run: EvaluationRun,
    scored: Mapping[VariantName, ScoredResponses],
    responses: ResponseSet,
    ratings: ArtifactRef,
    split: ArtifactRef | None,
    view: View,
) -> DomainParts:
    texts, config = responses.responses, run.mismatch
    variants = tuple(
        evaluate_variant(name, item.scores, texts, ratings, split, view, config, item.summary)
        for name, item in scored.items()
    )
    if len(scored) < 2:
        return DomainParts(label=view.label, held_out_models=view.focus, variants=variants)
    before, after = ((name, scored[name].scores) for name in (FIRST, SECOND))
    return DomainParts(
        label=view.label,
        held_out_models=view.focus,
        variants=variants,
        comparisons=(compare_variants(before, after, ratings, split, view, config),),
        styles=(compare_styles(before, after, texts, split, view, config),),
    )


def _outputs(
    scored: Mapping[VariantName, tuple[ScoredTexts, ...]], benchmarks: tuple[StoredBenchmark, ...]
) -> dict[str, ArtifactRef]:
    return {
        f"{benchmark.name} scores, {'first' if name == FIRST else 'second'} reward model": one.scores
        for name, sets in scored.items()
        for one, benchmark in zip(sets, benchmarks, strict=True)
    }


def _finish(session: Session, page: EvaluationPage, used: Used) -> EvaluationOutcome:
    """Log the page and its numbers, link it in Prefect, and say what came out; runs on every run, cached steps or not."""
    data = session.store.read_record(page.data, EvaluationData)
    session.run.log_metrics(_metrics(data))
    session.run.log_datasets(used.inputs, "input")
    session.run.log_datasets(used.outputs, "output")
    session.run.log_text(session.store.read_bytes(page.html).decode(), "evaluation.html")
    session.run.log_text(data.model_dump_json(indent=1), "evaluation.json")
    for name, drawn in evaluation_figures_for_tracking(data).items():
        session.run.log_text(drawn.decode(), f"figures/{name}")
    summary = evaluation_summary(data)
    steps = step_lines(session)
    path = page.html.uri if not urlsplit(page.html.uri).scheme else None
    publish_link("evaluate-page", Path(path).as_uri() if path else page.html.uri, "Evaluation", summary.splitlines()[0])
    publish_table("evaluate-benchmarks", _benchmark_rows(data), "Benchmarks")
    publish_markdown("evaluate-summary", f"```\n{summary}\n```", "Summary")
    pages = [f"Page     {path or page.html.uri}", f"MLflow   {session.run.url}  (`make mlflow-ui` opens the pages)"]
    return EvaluationOutcome(
        page=page.html, data=page.data, tracking_url=session.run.url, summary="\n".join([summary, *steps, *pages])
    )


def _benchmark_rows(data: EvaluationData) -> list[dict[str, object]]:
    return [
        {
            "benchmark": row.benchmark,
            "subset": row.subset,
            "metric": row.metric,
            "items": row.items,
            **{data.label(value.variant): value.value.value for value in row.values},
            "length only": row.length_only,
        }
        for row in data.benchmarks
    ]


def _metrics(data: EvaluationData) -> dict[str, float | None]:
    metrics: dict[str, float | None] = {}
    for domain in data.domains:
        metrics.update(domain_metrics(domain))
    metrics.update(benchmark_metrics(data.benchmarks, data.reliability))
    return {metric_name(name): value for name, value in metrics.items()}


def start(run: EvaluationRun) -> EvaluationOutcome:
    """Check the servers and run the flow."""
    check_services()
    return evaluate(run)


if __name__ == "__main__":
    sys.exit(run_from_command_line("evaluate", EvaluationRun, EVALUATE, start))
