"""What a pre-flight found, as data: importable without torch."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from charm_core.errors import ModelError
from charm_core.reward_model.spec import RewardModelSpec, TrainingConfig

Severity = Literal["error", "warning", "info"]


class Finding(BaseModel):
    """One thing that a rule of the pre-flight has to say."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rule: str = Field(description="Name of the rule.")
    severity: Severity = Field(
        description="error: scores would be wrong or there would be none, so the run stops; warning: look at it; info: harmless "
        "here, but not in every tool."
    )
    message: str = Field(description="What is found, and what to do.")


class PreflightReport(BaseModel):
    """All findings about one reward model, the worst first."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str | None = Field(default=None, description="Kind of the reward model, where its files could be read.")
    texts: int = Field(default=0, description="Texts that were looked at.")
    texts_in_all: int = Field(default=0, description="Texts that they are a sample of.")
    findings: tuple[Finding, ...] = ()

    @property
    def errors(self) -> tuple[Finding, ...]:
        """What stops a run."""
        return tuple(finding for finding in self.findings if finding.severity == "error")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """What somebody should look at."""
        return tuple(finding for finding in self.findings if finding.severity == "warning")

    def raise_on_errors(self) -> None:
        """Raise ModelError with all errors, if there are any."""
        if self.errors:
            raise ModelError("\n".join(finding.message for finding in self.errors))


class PreflightJob(BaseModel):
    """A reward model to be looked at by a process of its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: RewardModelSpec
    texts_path: Path | None = Field(default=None, description="Parquet with messages and response, a sample.")
    texts_in_all: int = Field(default=0, description="Texts that the sample stands for.")
    training: TrainingConfig | None = Field(default=None, description="How it is to be fine-tuned, if it is.")
    machines: int = Field(default=1, ge=1, description="Over how many machines like this one.")
    report_path: Path = Field(description="Where the report goes as JSON.")
