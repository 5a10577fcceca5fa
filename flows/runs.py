"""The settings of each flow: the form in the Prefect UI, the TOML file and the command line at once."""

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from charm_core.mismatch import MismatchConfig
from charm_core.offsets import OffsetConfig
from charm_core.preferences import PreferenceConfig
from charm_core.responses import SplitConfig
from charm_core.reward_model.spec import RewardModelSpec, TrainingConfig
from charm_core.selection import SelectionConfig
from tasks.arena import ArenaConfig
from tasks.benchmarking import BenchmarksConfig
from tasks.prompts import ResponsesConfig
from tasks.scoring import ScoresConfig
from tasks.simulation import SimulatedWorld


class _Run(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class AuditRun(_Run):
    """Is this reward model biased? Ratings and scores in, a mismatch report out; nothing is trained.

    Say where the ratings come from (arena) and give one of: scores; preferences; win_rates; responses with a reward_model.
    """

    name: str = Field(
        default="audit", min_length=1, description="What this run is called in Prefect, MLflow and the report."
    )
    simulation: SimulatedWorld | None = Field(default=None, description="A simulated arena instead of real sources.")
    arena: ArenaConfig | None = Field(default=None, description="Where the ratings come from.")
    scores: ScoresConfig | None = Field(default=None, description="Scores that exist already.")
    preferences: ScoresConfig | None = Field(default=None, description="A judge's pairwise preferences.")
    win_rates: ScoresConfig | None = Field(
        default=None, description="Published win rates, one row per policy model and opponent, without single prompts."
    )
    responses: ResponsesConfig | None = Field(default=None, description="Responses to score.")
    reward_model: RewardModelSpec | None = Field(default=None, description="The reward model to score them with.")
    mismatch: MismatchConfig = Field(default=MismatchConfig(), description="How mismatch is measured.")
    selection: SelectionConfig = Field(
        default=SelectionConfig(), description="Which models a calibration would choose."
    )
    calibration: OffsetConfig = Field(default=OffsetConfig(), description="How offsets are fitted.")
    offset_splits: int = Field(
        default=20, ge=0, le=1000,
        description="Scores only: seeded half splits on which offsets are fitted on one half and judged on the other.",
    )  # fmt: skip

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [
            name
            for name, value in (
                ("simulation", self.simulation),
                ("scores", self.scores),
                ("preferences", self.preferences),
                ("win_rates", self.win_rates),
                ("responses", self.responses),
            )
            if value is not None
        ]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of simulation, scores, preferences, win_rates or responses, not {given}"
            )
        if (self.responses is None) != (self.reward_model is None):
            raise ValueError("responses need a reward_model to score them with, and only they do")
        if (self.simulation is None) == (self.arena is None):
            raise ValueError("give arena, unless it is simulated")
        return self


class CalibrationRun(_Run):
    """The main job: measure where a reward model disagrees with people, correct it, and show whether that worked.

    Say where ratings (arena) and responses come from and which reward_model is meant, or use a simulation.
    """

    name: str = Field(
        default="calibrate", min_length=1, description="What this run is called in Prefect, MLflow and the report."
    )
    simulation: SimulatedWorld | None = Field(default=None, description="A simulated arena instead of real sources.")
    arena: ArenaConfig | None = Field(default=None, description="Where the ratings come from.")
    responses: ResponsesConfig | None = Field(default=None, description="Responses of the policy models.")
    reward_model: RewardModelSpec | None = Field(default=None, description="The reward model to calibrate.")
    split: SplitConfig = Field(default=SplitConfig(), description="What the calibration never sees.")
    mismatch: MismatchConfig = Field(default=MismatchConfig(), description="How mismatch is measured.")
    selection: SelectionConfig = Field(default=SelectionConfig(), description="Overvalued and reference models.")
    calibration: OffsetConfig = Field(default=OffsetConfig(), description="How offsets are fitted.")
    preferences: PreferenceConfig = Field(default=PreferenceConfig(), description="How debiased pairs are built.")
    training: TrainingConfig = Field(default=TrainingConfig(), description="How the reward model is fine-tuned.")
    benchmarks: BenchmarksConfig = Field(default=BenchmarksConfig(), description="Further tests, before and after.")
    register_as: str | None = Field(
        default=None, description="Name in the MLflow model registry; default: 'charm-' and the run's name."
    )

    @model_validator(mode="after")
    def _sources(self) -> Self:
        real = {"arena": self.arena, "responses": self.responses, "reward_model": self.reward_model}
        missing = [name for name, value in real.items() if value is None]
        if self.simulation is None and missing:
            raise ValueError(f"{', '.join(missing)} missing: give them, or a simulation")
        if self.simulation is not None and len(missing) < len(real):
            raise ValueError("a simulation brings its own arena, responses and reward_model; leave them out")
        return self
