"""The settings of each flow: the form in the Prefect UI, the TOML file and the command line at once."""

import re
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from charm_core.best_of_n import BestOfNConfig
from charm_core.mismatch import MismatchConfig
from charm_core.offsets import OffsetConfig
from charm_core.policy_comparison import ComparisonConfig
from charm_core.preferences import PreferenceConfig
from charm_core.rating_movement import RecalibrationRule
from charm_core.responses import SplitConfig
from charm_core.reward_model.post_training_job import PostTrainingConfig, TinyPolicyConfig
from charm_core.reward_model.spec import RewardModelSpec, TrainingConfig
from charm_core.sampling import Decoding
from charm_core.selection import SelectionConfig
from flows.forms import Form
from tasks.answering.generation import TransformersBackend, VllmBackend
from tasks.arena import ArenaConfig
from tasks.benchmark_sources import BenchmarksConfig
from tasks.gathering import SamplingConfig
from tasks.judging import JudgeConfig
from tasks.prompt_sets import PromptSetConfig
from tasks.prompts import ResponsesConfig
from tasks.registry import PromotionConfig
from tasks.remote_scoring import RemoteScorerConfig
from tasks.scoring import ScoresConfig
from tasks.simulation import SimulatedWorld

Count = Annotated[int, Field(ge=1)]


class AuditRun(Form):
    """Is this reward model biased? Ratings and scores in, a mismatch report out; nothing is trained.

    Say where the ratings come from (arena) and give one of: scores; preferences; win_rates; or responses (a table of them, or
    sampling) with one of reward_model, scorer and judge.
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
    responses: ResponsesConfig | None = Field(default=None, description="A table of responses to score.")
    sampling: SamplingConfig | None = Field(
        default=None,
        description="Prompts and policy models whose responses are sampled or replayed, instead of responses.",
    )
    reward_model: RewardModelSpec | None = Field(default=None, description="The reward model to score them with.")
    scorer: RemoteScorerConfig | None = Field(default=None, description="A server that scores them instead.")
    judge: JudgeConfig | None = Field(default=None, description="A language model that compares them instead.")
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
        sources = ("simulation", "scores", "preferences", "win_rates", "responses", "sampling")
        given = [name for name in sources if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(sources)}, not {given}")
        scorers = ("reward_model", "scorer", "judge")
        by = [name for name in scorers if getattr(self, name) is not None]
        needed = int(given[0] in ("responses", "sampling"))
        if len(by) != needed:
            raise ValueError(
                f"responses need exactly one of {', '.join(scorers)}, not {by}"
                if needed
                else f"{given[0]} leaves no use for {by}"
            )
        if (self.simulation is None) == (self.arena is None):
            raise ValueError("give arena, unless it is simulated")
        return self


class CalibrationRun(Form):
    """The main job: measure where a reward model disagrees with people, correct it, and show whether that worked.

    Say where ratings (arena) and responses come from and which reward_model is meant, or use a simulation.
    """

    name: str = Field(
        default="calibrate", min_length=1, description="What this run is called in Prefect, MLflow and the report."
    )
    simulation: SimulatedWorld | None = Field(default=None, description="A simulated arena instead of real sources.")
    arena: ArenaConfig | None = Field(default=None, description="Where the ratings come from.")
    responses: ResponsesConfig | None = Field(default=None, description="A table of the policy models' responses.")
    sampling: SamplingConfig | None = Field(
        default=None,
        description="Prompts and policy models whose responses are sampled or replayed, instead of responses.",
    )
    reward_model: RewardModelSpec | None = Field(default=None, description="The reward model to calibrate.")
    split: SplitConfig = Field(default=SplitConfig(), description="What the calibration never sees.")
    mismatch: MismatchConfig = Field(default=MismatchConfig(), description="How mismatch is measured.")
    selection: SelectionConfig = Field(default=SelectionConfig(), description="Overvalued and reference models.")
    calibration: OffsetConfig = Field(default=OffsetConfig(), description="How offsets are fitted.")
    preferences: PreferenceConfig = Field(default=PreferenceConfig(), description="How debiased pairs are built.")
    training: TrainingConfig = Field(default=TrainingConfig(), description="How the reward model is fine-tuned.")
    benchmarks: BenchmarksConfig = Field(default=BenchmarksConfig(), description="Further tests, before and after.")
    judge_preferences: ScoresConfig | None = Field(
        default=None,
        description="A judge's pairwise preferences among these responses, or against one opponent: best of n is held against them.",
    )
    promotion: PromotionConfig = Field(
        default=PromotionConfig(), description="Whether the registered version becomes the champion."
    )
    register_as: str | None = Field(
        default=None, description="Name in the MLflow model registry; default: 'charm-' and the run's name."
    )

    @model_validator(mode="after")
    def _sources(self) -> Self:
        real = {
            "arena": self.arena,
            "responses or sampling": self.responses or self.sampling,
            "reward_model": self.reward_model,
        }
        missing = [name for name, value in real.items() if value is None]
        if self.simulation is None and missing:
            raise ValueError(f"{', '.join(missing)} missing: give them, or a simulation")
        if self.simulation is not None and len(missing) < len(real):
            raise ValueError("a simulation brings its own arena, responses and reward_model; leave them out")
        if self.responses is not None and self.sampling is not None:
            raise ValueError("give responses or sampling, not both")
        return self

    @property
    def registered_name(self) -> str:
        """Name of the calibrated reward model in the model registry."""
        return self.register_as or f"charm-{re.sub(r'[^A-Za-z0-9._-]+', '-', self.name).strip('-')}"


class RecalibrationRun(CalibrationRun):
    """Calibrate again, if there are other ratings than those that the registered model is calibrated to.

    The settings are those of the calibration; the same file does. The ratings are those that the event names; without an event the
    latest snapshot in the store of the board that arena names, or exactly arena.snapshot.
    """


class CollectRatingsRun(Form):
    """Collect Arena ratings, keep them as snapshots, and say whether the win probabilities that matter have moved.

    Say where the ratings come from (arena), and whose win probabilities to watch (policy_models, or recalibrates).
    """

    name: str = Field(
        default="Arena ratings", min_length=1, description="What this run is called in Prefect, MLflow and the page."
    )
    arena: ArenaConfig = Field(description="Where the ratings come from.")
    policy_models: tuple[str, ...] = Field(
        default=(), description="Policy models whose ratings and win probabilities are watched."
    )
    history: bool = Field(
        default=False,
        description="Collect all dates of the source instead of one; of every publisher, if none is named.",
    )
    both_styles: bool = Field(
        default=False, description="History only: boards with and without style control, each by itself."
    )
    since: str | None = Field(
        default=None,
        description="Compare with this snapshot, by date or digest; default: the one that the model of recalibrates is calibrated "
        "to, otherwise the one before.",
    )
    recalibrates: str | None = Field(
        default=None,
        min_length=1,
        description="A calibrated reward model, by its name in the model registry: ratings are compared with those that it is "
        "calibrated to, its policy models are watched unless others are named, and Prefect is told when it is due again.",
    )
    recalibration: RecalibrationRule = Field(
        default=RecalibrationRule(), description="When new ratings call for a new calibration."
    )

    @model_validator(mode="after")
    def _one_board_is_watched(self) -> Self:
        if self.recalibrates is not None and self.history:
            raise ValueError("recalibrates watches one board: collect the history in a run of its own")
        return self


class EvaluationRun(Form):
    """Benchmarks and human alignment of any reward model; of two, whether they differ beyond chance.

    Say which reward_model is meant, and what it is put to: benchmarks; or, to hold it against the Arena's human ratings, arena
    with responses or sampling; or both. With baseline, another reward model, all of it is done with both and compared.
    """

    name: str = Field(
        default="evaluate", min_length=1, description="What this run is called in Prefect, MLflow and the page."
    )
    simulation: SimulatedWorld | None = Field(
        default=None, description="A simulated arena and its biased reward model instead of real sources."
    )
    reward_model: RewardModelSpec | None = Field(default=None, description="The reward model to evaluate.")
    scorer: RemoteScorerConfig | None = Field(
        default=None, description="A server that scores, instead of reward_model."
    )
    baseline: RewardModelSpec | None = Field(
        default=None, description="Another one that it is compared with, for example itself before its calibration."
    )
    benchmarks: BenchmarksConfig = Field(default=BenchmarksConfig(), description="Which benchmarks.")
    arena: ArenaConfig | None = Field(default=None, description="Where the human ratings come from.")
    responses: ResponsesConfig | None = Field(default=None, description="A table of rated policy models' responses.")
    sampling: SamplingConfig | None = Field(
        default=None,
        description="Prompts and policy models whose responses are sampled or replayed, instead of responses.",
    )
    split: SplitConfig | None = Field(
        default=None,
        description="The split of the calibration: then only prompts and policy models count that it never saw; default: all.",
    )
    mismatch: MismatchConfig = Field(default=MismatchConfig(), description="How mismatch is measured.")

    @model_validator(mode="after")
    def _something_to_do(self) -> Self:
        model = self.reward_model or self.scorer
        real = {"reward_model": model or self.baseline, "arena": self.arena, "responses or sampling": self._answers}
        if self.simulation is not None:
            given = [name for name, value in real.items() if value is not None]
            if given:
                raise ValueError(f"a simulation brings its own {', '.join(real)}; leave out {', '.join(given)}")
            return self
        if model is None:
            raise ValueError("reward_model is missing: give one, a scorer, or a simulation")
        if self.scorer is not None and (self.reward_model or self.baseline):
            raise ValueError("a scorer is evaluated by itself: leave reward_model and baseline out")
        if (self.arena is None) != (self._answers is None):
            raise ValueError("human alignment needs both arena and responses or sampling")
        if self.responses is not None and self.sampling is not None:
            raise ValueError("give responses or sampling, not both")
        if self.arena is None and not self.benchmarks.chosen():
            raise ValueError("nothing to evaluate on: give benchmarks, or arena with responses or sampling")
        return self

    @property
    def _answers(self) -> ResponsesConfig | SamplingConfig | None:
        return self.responses or self.sampling


class AblationRun(Form):
    """Which recipe corrects a reward model best: many of them, several seeds, one table.

    Say which calibration they are variants of. Finished cells are cached: an interrupted ablation goes on.
    """

    name: str = Field(
        default="ablation", min_length=1, description="What this run is called in Prefect, MLflow and the page."
    )
    calibration: CalibrationRun = Field(description="The calibration that all recipes are changes of.")
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        default=(0, 1, 2),
        min_length=1,
        description="Seeds of the split, the training and, in a simulation, the world; intervals need at least two.",
    )
    style_control: bool = Field(default=True, description="Also correct towards the style-controlled board.")
    overvalued: tuple[Count, ...] = Field(default=(1, 2, 4), description="How many overvalued models take part.")
    references: tuple[Count, ...] = Field(default=(1, 2, 4), description="How many reference models take part.")
    pairs: tuple[Count, ...] = Field(
        default=(200, 2000, 20000),
        description="How many pairs are trained on; sizes beyond what there is are left out.",
    )

    @model_validator(mode="after")
    def _different_seeds(self) -> Self:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be different numbers, not {list(self.seeds)}")
        return self


class SimulatedPolicy(BaseModel):
    """The policy model of a simulated arena, and how much it is asked."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    calibration: CalibrationRun = Field(
        description="The simulated arena, and how its base, control and calibrated reward models come about."
    )
    teaching: TinyPolicyConfig = Field(
        default=TinyPolicyConfig(), description="The policy model, and how long it is taught the writers' texts."
    )
    writers_prompts: int = Field(default=500, ge=10, description="Prompts whose answers it is taught.")
    prompts: int = Field(default=300, ge=2, description="Further prompts, on whose responses it is post-trained.")
    exam_prompts: int = Field(default=300, ge=2, description="Further prompts, on which all policies are judged.")
    label_by_truth: bool = Field(
        default=True, description="Also label by the true quality: the most that any reward model could bring."
    )

    @model_validator(mode="after")
    def _simulated(self) -> Self:
        if self.calibration.simulation is None:
            raise ValueError("calibration must be of a simulation: give it one, or leave out simulation here")
        return self


class PostTrainRun(Form):
    """What is a calibrated reward model good for? Label a policy model's own responses with it, train the policy model, compare.

    Say which policy_model is post-trained on prompts, by which reward_models its responses are labelled, and which judge decides
    on exam_prompts who answers better; or use a simulation, whose truth decides.
    """

    name: str = Field(
        default="post-training", min_length=1, description="What this run is called in Prefect, MLflow and its summary."
    )
    simulation: SimulatedPolicy | None = Field(default=None, description="A simulated arena instead of real sources.")
    policy_model: TransformersBackend | VllmBackend | None = Field(
        default=None, discriminator="kind", description="The policy model to post-train: a folder or a hub id."
    )
    prompts: PromptSetConfig | None = Field(default=None, description="Prompts on whose responses it is post-trained.")
    exam_prompts: PromptSetConfig | None = Field(default=None, description="Prompts on which all policies are judged.")
    reward_models: dict[str, RewardModelSpec] = Field(
        default={}, description="Reward models by name, the one to be judged last: base, control, calibrated."
    )
    judge: JudgeConfig | None = Field(default=None, description="A language model that decides who answers better.")
    responses_per_prompt: int = Field(
        default=4, ge=2, description="Responses of its own that each pair is chosen from."
    )
    decoding: Decoding = Field(
        default=Decoding(sampling_temperature=1.0),
        description="How the responses to label, and the exam's, are sampled.",
    )
    preferences: PreferenceConfig = Field(
        default=PreferenceConfig(strategy="extremes"), description="Which pairs are formed of a prompt's responses."
    )
    training: PostTrainingConfig = Field(default=PostTrainingConfig(), description="How the policy model is trained.")
    best_of_n: BestOfNConfig = Field(default=BestOfNConfig(), description="Best-of-n of the labelled responses.")
    comparison: ComparisonConfig = Field(default=ComparisonConfig(), description="How policies are compared.")

    @model_validator(mode="after")
    def _one_world(self) -> Self:
        real = {
            "policy_model": self.policy_model,
            "prompts": self.prompts,
            "exam_prompts": self.exam_prompts,
            "reward_models": self.reward_models or None,
        }
        missing = [name for name, value in real.items() if value is None]
        if self.simulation is None and missing:
            raise ValueError(f"{', '.join(missing)} missing: give them, or a simulation")
        if self.simulation is not None and len(missing) < len(real):
            raise ValueError(f"a simulation brings its own {', '.join(real)}; leave them out")
        if self.preferences.strategy == "overvalued_vs_reference":
            raise ValueError(
                "the responses of one policy model have no reference model: use strategy extremes or all_pairs"
            )
        reserved = sorted({"untouched", "truth"} & set(self.reward_models))
        if reserved:
            raise ValueError(f"reward_models may not be called {reserved}: those names are taken")
        return self
