"""The figures of a report as files of their own, for MLflow: drawn once, because drawing takes longer than all that a cached run does."""

from pydantic import BaseModel, ConfigDict

from tasks.caching import step
from tasks.pages.report_data import ReportData
from tasks.pages.reporting import figures_for_tracking
from tasks.store import ArtifactRef, ArtifactStore


class DrawnFigures(BaseModel):
    """SVG files by name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    files: dict[str, ArtifactRef]


@step(version=1)
def draw_figures(store: ArtifactStore, data: ArtifactRef) -> DrawnFigures:
    """Draw the figures of a report.

    Args:
        store: Where the numbers are and the figures go.
        data: ReportData.
    """
    drawn = figures_for_tracking(store.read_record(data, ReportData))
    return DrawnFigures(files={name: store.write_bytes(figure, "figure", ".svg") for name, figure in drawn.items()})
