"""What a scoring or training process is asked to do and what it reports, as data: importable without torch."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from charm_core.reward_model.findings import PreflightJob
from charm_core.reward_model.generation_job import GenerationJob
from charm_core.reward_model.post_training_job import PostTrainingJob, TinyPolicyJob
from charm_core.reward_model.spec import RewardModelSpec, TrainingConfig


class ScoringSummary(BaseModel):
    """What scoring met."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    texts: int = Field(description="Responses scored.")
    distinct_texts: int = Field(description="Different token sequences of a prompt among them; each is scored once.")
    tokens: int = Field(description="Tokens of the distinct texts.")
    computed_tokens: int | None = Field(
        default=None, description="Tokens that went through the model: padding included, what texts share once."
    )
    padding_share: float = Field(description="Share of padding in what went through the model.")
    batching: str = Field(default="padded", description="packed or padded; see ``RewardModelSpec.batching``.")
    batch_drift: float | None = Field(
        default=None, description="Largest difference between a score in a batch and alone, among some of the texts."
    )
    max_length: int = Field(description="The limit in tokens that was in force.")
    longest_text: int = Field(description="Tokens of the longest text, after cutting.")
    prompts_cut: int = Field(description="Texts whose prompt was cut.")
    responses_cut: int = Field(description="Texts whose response was cut.")
    empty_responses: int = Field(description="Responses without text; they are scored like any other.")
    tie_rate: float | None = Field(description="Share of equal scores among pairs of responses to one prompt.")
    smallest_gap: float | None = Field(description="Smallest difference, not 0, of two scores of one prompt.")


class ScoringJob(BaseModel):
    """Responses to be scored by a process of their own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: RewardModelSpec
    prompts_path: Path = Field(description="PROMPTS as Parquet.")
    responses_path: Path = Field(description="RESPONSES as Parquet.")
    scores_path: Path = Field(
        description="Where SCORES go as Parquet; the summary lies beside it with the suffix .json."
    )
    cuts_path: Path | None = Field(
        default=None, description="Where it goes which texts were cut, as Parquet; none: not written."
    )


class TrainingJob(BaseModel):
    """One fine-tuning, to be done by processes of their own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: RewardModelSpec
    pairs_path: Path = Field(
        description="PAIRS as Parquet; rows whose split is train are trained on, held_out evaluated on."
    )
    ratings_path: Path | None = Field(default=None, description="RATINGS as Parquet; needed by win_rate_matching.")
    output_dir: Path = Field(description="Where the finished model folder goes.")
    work_dir: Path = Field(
        description="Curve, log and checkpoints of this job; a job that finds them goes on from there."
    )
    config: TrainingConfig = TrainingConfig()


class TrainingOutcome(BaseModel):
    """What came out of a fine-tuning. The same for every run of the same job, interrupted or not."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model_dir: Path
    steps: int
    ranks: int
    train_pairs: int = Field(description="Pairs in the training split.")
    train_prompts: int
    held_out_pairs: int
    texts: int = Field(description="Distinct (prompt, response) texts in the training split.")
    tokens_trained: int = Field(description="Tokens that went through the model in training, without padding.")
    tokens_if_pairwise: int = Field(description="The same if both responses of every pair were encoded anew.")
    prompts_cut: int
    responses_cut: int
    margin_scale: float | None = Field(
        description="Unit of the margins, in the scores' unit; none without training pairs."
    )
    first_loss: float
    last_loss: float
    evaluation_before: dict[str, float] | None = Field(
        description="Loss, accuracy, mean margin on held-out pairs, before."
    )
    evaluation_after: dict[str, float] | None = Field(description="The same of the saved model.")
    saved_step: int | None = Field(default=None, description="Steps after which the saved model was as it is.")
    stopped_early: bool = Field(default=False, description="Whether early_stopping_patience ended it before its time.")
    first_loss_predicted: float | None = Field(
        default=None, description="First loss if the scores were the raw scores in the pairs table."
    )
    score_difference: float | None = Field(
        default=None,
        description="Largest difference between a score of the first step, before any change, and the raw score in the pairs table.",
    )


def automatic_ranks(gpus: int, cores: int) -> int:
    """What ``ranks = "auto"`` means on a machine."""
    return gpus or min(2, cores)


class ProcessIdentity(BaseModel):
    """A process, told apart from a later one with the same number by its start time."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pid: int
    started: float = Field(description="Seconds after the machine was started.")


class Launch(BaseModel):
    """What a worker process reads: a job, and the process without which it must not live on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    training: TrainingJob | None = None
    scoring: ScoringJob | None = None
    preflight: PreflightJob | None = None
    generation: GenerationJob | None = None
    post_training: PostTrainingJob | None = None
    tiny_policy: TinyPolicyJob | None = None
    parent: ProcessIdentity | None = Field(
        default=None, description="Workers end when this process has ended; none: never."
    )


CurveRecord = dict[str, Any]
"""One line of ``curve.jsonl``: step, loss, learning_rate, pairs, ... ; evaluation results under ``eval_*``."""
