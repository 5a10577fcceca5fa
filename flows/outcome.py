"""How a flow ends: provenance, metrics, files in MLflow, links in Prefect, a summary for the terminal."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import polars as pl
from pydantic import BaseModel, ConfigDict, Field

from flows.command_line import settings_toml
from flows.session import Session
from tasks.arena import Board
from tasks.drawn_figures import draw_figures
from tasks.evidence import Report
from tasks.ledger import explain, reuse_lines
from tasks.origin import git_revision, package_versions
from tasks.pages.report_data import BenchmarkRow, InputDigest, Provenance, ReportData, ReportDomain, ReportReliability
from tasks.pages.report_text import summary_text
from tasks.publishing import publish_link, publish_markdown, publish_table, rename_flow_run
from tasks.store import ArtifactRef


class Outcome(BaseModel):
    """What a flow leaves behind."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    report: ArtifactRef = Field(description="The HTML report.")
    data: ArtifactRef = Field(description="All of its numbers, as JSON.")
    model: ArtifactRef | None = Field(default=None, description="The calibrated reward model's folder.")
    model_version: str | None = Field(default=None, description="Its version in the model registry.")
    tracking_url: str = Field(description="Page of the MLflow run.")
    summary: str = Field(description="The result in a few lines.")


@dataclass(frozen=True, kw_only=True)
class Used:
    """What a run read and what it made, by name."""

    inputs: Mapping[str, ArtifactRef]
    outputs: Mapping[str, ArtifactRef]


def describe_provenance(flow: str, run: BaseModel, used: Used) -> Provenance:
    """Everything that someone needs to get the same numbers again."""
    return Provenance(
        command=f"python -m flows.{flow} --config run.toml",
        settings_toml=settings_toml(run),
        git_revision=git_revision(),
        versions=tuple(package_versions().items()),
        digests=tuple(
            InputDigest(name=name, digest=ref.digest, rows=ref.rows)
            for name, ref in {**used.inputs, **used.outputs}.items()
        ),
    )


def name_run(
    session: Session, about: str, board: Board | None, found: str = "", *, page: str | None = "report.html"
) -> None:
    """Say in the run's name, in Prefect and in MLflow, what it is about, and link the two and the report in MLflow.

    Args:
        session: The open run.
        about: What it is about, for a run that was given no name.
        board: What is held against it.
        found: What came out, in two or three words.
        page: The report among the run's artifacts in MLflow; None where there is none.
    """
    dated = f"board {board.date}" if board is not None and board.date else ""
    given = session.name if session.named else about or session.name
    name = " · ".join(filter(None, (f"{session.kind.replace('_', ' ')} {given}", dated, found)))
    rename_flow_run(name)
    links = [f"[Prefect run]({session.flow_run_url})"]
    links += [f"[report]({session.run.url}/artifacts/{page})"] if page else []
    session.run.show(name, " · ".join(links))


def finish(
    session: Session,
    report: Report,
    used: Used,
    *,
    model: ArtifactRef | None = None,
    model_version: str | None = None,
    promotion: str = "",
) -> Outcome:
    """Log the report and its numbers, link it in Prefect, and say what came out.

    Runs on every flow run, cached steps or not: the numbers are read from what the steps returned.
    """
    data = session.store.read_record(report.data, ReportData)
    html = session.store.read_bytes(report.html).decode()
    session.run.log_metrics(_metrics(data))
    session.run.log_datasets(used.inputs, "input")
    session.run.log_datasets(used.outputs, "output")
    session.run.log_table(_overvaluation_table(data), "overvaluation.json")
    session.run.log_text(_with_links(session, html), "report.html")
    for name, figure in draw_figures(report.data).files.items():
        session.run.log_text(session.store.read_bytes(figure).decode(), f"figures/{name}")
    session.run.log_text(data.model_dump_json(indent=1), "report.json")
    path = _local_path(report.html.uri)
    summary = summary_text(data)
    steps = step_lines(session)
    registered = (
        [f"Model    {model.uri}", f"         registered as {model_version}", f"         {promotion}"] if model else []
    )
    publish_link(
        f"{data.kind}-report", Path(path).as_uri() if path else report.html.uri, "Report", summary.splitlines()[0]
    )
    publish_table(f"{data.kind}-variants", _variant_table(data), "Mismatch of every variant on every held-out domain")
    publish_markdown(f"{data.kind}-summary", f"```\n{summary}\n```", "Summary")
    return Outcome(
        report=report.html,
        data=report.data,
        tracking_url=session.run.url,
        model=model,
        model_version=model_version,
        summary="\n".join([summary, *steps, f"Report   {path or report.html.uri}", *registered, *_pages(session)]),
    )


def _with_links(session: Session, html: str) -> str:
    """MLflow's copy of a report, with links to the runs: the report itself is the same in every run that makes it."""
    links = ((session.run.url, "MLflow run"), (session.flow_run_url, "Prefect run"))
    line = " · ".join(f'<a href="{escape(url)}">{text}</a>' for url, text in links)
    return html.replace("</body>", f"<footer><p>{line}</p></footer>\n</body>", 1)


def _overvaluation_table(data: ReportData) -> pl.DataFrame:
    return pl.DataFrame(
        [
            {
                "domain": domain.label,
                "reward_model": variant.label,
                "policy_model": model.policy_model,
                "rating": model.rating,
                "overvaluation": model.overvaluation.value,
                "low": model.overvaluation.low,
                "high": model.overvaluation.high,
                "flagged": model.flagged,
            }
            for domain in data.domains
            for variant in domain.variants
            for model in variant.mismatch.models
        ],
        infer_schema_length=None,
    )


def _variant_table(data: ReportData) -> list[dict[str, Any]]:
    return [
        {
            "domain": domain.label,
            "reward model": variant.label,
            "mean |MD|": variant.mismatch.mean_absolute_mismatch.value,
            "overvaluation RMSE (Elo)": variant.mismatch.overvaluation_rmse.value,
            "Spearman with Elo": variant.agreement.spearman.value if variant.agreement else None,
        }
        for domain in data.domains
        for variant in domain.variants
    ]


def _metrics(data: ReportData) -> dict[str, float | None]:
    metrics: dict[str, float | None] = {}
    for domain in data.domains:
        metrics.update(domain_metrics(domain))
    metrics.update(benchmark_metrics(data.benchmarks, data.reliability))
    if data.truth is not None:
        for value in data.truth.accuracy:
            metrics[f"{value.variant}/accuracy against the truth"] = value.value.value
    if data.pairs is not None:
        metrics["flip rate"] = data.pairs.flip_rate
    return {metric_name(name): value for name, value in metrics.items()}


def benchmark_metrics(
    rows: Sequence[BenchmarkRow], reliability: Sequence[ReportReliability]
) -> dict[str, float | None]:
    """The numbers of the benchmarks that a tracker keeps."""
    metrics = {
        f"{value.variant}/{row.benchmark}/{row.subset}/{row.metric}": value.value.value
        for row in rows
        for value in row.values
    }
    for one in reliability:
        prefix = f"{one.variant}/{one.benchmark}"
        metrics[f"{prefix}/expected calibration error"] = one.as_scored.expected_calibration_error.value
        metrics[f"{prefix}/Brier score"] = one.as_scored.brier.value
    return metrics


def domain_metrics(domain: ReportDomain) -> dict[str, float | None]:
    """The numbers of one set of prompts and policy models that a tracker keeps."""
    metrics: dict[str, float | None] = {}
    for variant in domain.variants:
        prefix = f"{variant.name}/{domain.label}"
        metrics[f"{prefix}/mean absolute mismatch"] = variant.mismatch.mean_absolute_mismatch.value
        metrics[f"{prefix}/overvaluation rmse"] = variant.mismatch.overvaluation_rmse.value
        metrics[f"{prefix}/tie rate"] = variant.mismatch.tie_rate
        metrics[f"{prefix}/smallest score gap"] = variant.mismatch.smallest_score_gap
        metrics[f"{prefix}/spearman with elo"] = variant.agreement.spearman.value if variant.agreement else None
        metrics[f"{prefix}/score length correlation"] = variant.length_correlation
        if variant.style is not None:
            metrics[f"{prefix}/score length correlation within prompts"] = variant.style.length.within_prompt.value
            metrics[f"{prefix}/score markdown correlation within prompts"] = variant.style.markdown.within_prompt.value
    for item in domain.comparisons:
        metrics[f"{item.after} minus {item.before}/{domain.label}/mean absolute mismatch"] = (
            item.comparison.difference.value
        )
    return metrics


def metric_name(name: str) -> str:
    """A name that the tracker accepts."""
    # MLflow allows letters, digits, and _ - . : / and spaces
    return "".join(char if char.isalnum() or char in "_-.:/ " else "_" for char in name)


def _local_path(uri: str) -> str | None:
    return uri if not urlsplit(uri).scheme else None


def step_lines(session: Session) -> list[str]:
    """What this run reused, what it ran and why: published, and returned for the summary."""
    lines = reuse_lines(explain(session.ledger, session.last))
    session.run.log_text("\n".join(lines), "steps.txt")
    publish_markdown("steps", "\n".join(f"- {line}" for line in lines), "What was reused, what ran, and why")
    return _indented("Steps", lines)


def _indented(head: str, lines: list[str]) -> list[str]:
    return [f"{head if number == 0 else '':9}{line}" for number, line in enumerate(lines)]


def _pages(session: Session) -> tuple[str, ...]:
    return (
        f"MLflow   {session.run.url}  (`make mlflow-ui` opens the pages)",
        f"Prefect  {session.flow_run_url}  (`make prefect-ui` opens the pages)",
    )
