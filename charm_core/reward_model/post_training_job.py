"""How a policy model is post-trained, and what such a process is asked to do, as data: importable without torch."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from charm_core.reward_model.generation_job import PolicyModelSpec


class PostTrainingConfig(BaseModel):
    """DPO of a policy model on preference pairs, by TRL's DPOTrainer. Dropout is always off."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    beta: float = Field(default=0.1, gt=0, description="DPO's β: how much leaving the untouched policy model costs.")
    loss: Literal["sigmoid", "ipo", "hinge", "robust"] = Field(default="sigmoid", description="TRL's loss_type.")
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=0.5, description="Loss robust only: assumed share of pairs with a wrong label."
    )
    epochs: float = Field(default=1.0, gt=0, description="Passes over the training pairs.")
    learning_rate: float = Field(default=5e-6, gt=0, description="Peak learning rate of AdamW.")
    schedule: Literal["cosine", "linear", "constant"] = Field(default="cosine", description="Decay after the warm-up.")
    warmup_ratio: float = Field(default=0.1, ge=0, lt=1, description="Share of the steps with a rising learning rate.")
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW weight decay.")
    max_grad_norm: float = Field(default=1.0, gt=0, description="Gradients are clipped to this global norm.")
    pairs_per_step: int = Field(default=64, ge=1, description="Pairs per optimiser step, over all ranks.")
    pairs_per_pass: int = Field(
        default=8,
        ge=1,
        description="Pairs per forward pass and rank; divides pairs_per_step. Decides speed and memory.",
    )
    max_length: int = Field(
        default=2048, ge=8, description="Most tokens of prompt and response; what is longer loses its end."
    )
    lora_rank: int | None = Field(
        default=16, ge=1, description="Rank of the LoRA adapter, which is merged at the end; none: train all weights."
    )
    lora_alpha: int | None = Field(default=None, ge=1, description="LoRA's α; default: twice the rank.")
    lora_targets: tuple[str, ...] = Field(
        default=(), description="Names of the layers that get an adapter; default: all linear ones but the output."
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="Arithmetic in training; auto is bfloat16 on a GPU."
    )
    gradient_checkpointing: bool = Field(
        default=False, description="Recompute activations in the backward pass to save memory."
    )
    zero_stage: int | None = Field(
        default=None, ge=0, le=3, description="DeepSpeed ZeRO stage; none: without DeepSpeed, in one process."
    )
    ranks: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default="auto", description="Processes under DeepSpeed; auto: one per GPU, or 2 on a CPU with two cores."
    )
    threads_per_rank: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default="auto", description="CPU threads per process."
    )
    seed: int = Field(default=0, ge=0, description="Seed of the adapter's first weights and of the order of the pairs.")

    @model_validator(mode="after")
    def _options_fit(self) -> Self:
        if self.label_smoothing and self.loss != "robust":
            raise ValueError(f"label_smoothing belongs to loss 'robust', not to {self.loss!r}: leave it out")
        if self.lora_rank is None and (self.lora_alpha is not None or self.lora_targets):
            raise ValueError("lora_alpha and lora_targets need lora_rank: set it, or leave them out")
        if self.zero_stage is None and self.ranks not in (1, "auto"):
            raise ValueError(f"ranks={self.ranks} needs DeepSpeed: set zero_stage to 0, 1, 2 or 3")
        return self


class PostTrainingJob(BaseModel):
    """One post-training, to be done by processes of their own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: PolicyModelSpec
    pairs_path: Path = Field(
        description="PAIRS as Parquet; rows whose split is train are trained on, others judged on."
    )
    output_dir: Path = Field(description="Where the finished model folder and, beside it, the outcome as JSON go.")
    config: PostTrainingConfig = PostTrainingConfig()

    @property
    def outcome_path(self) -> Path:
        """Where the outcome goes, last of all."""
        return self.output_dir.with_suffix(".json")


class PostTrainingOutcome(BaseModel):
    """What came out of a post-training."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int
    ranks: int
    train_pairs: int
    held_out_pairs: int
    cut: int = Field(description="Texts of training pairs that lost their end to max_length.")
    first_loss: float
    last_loss: float
    accuracy_after: float | None = Field(
        description="Share of held-out pairs whose chosen response has become more likely, relative to the untouched policy "
        "model, than the rejected one; none without such pairs."
    )
    curve: tuple[dict[str, float], ...] = Field(description="One record per logged step.")


class TinyPolicyConfig(BaseModel):
    """The policy model of a simulated arena: its size, and how long it is taught the writers' texts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    hidden_size: int = Field(default=64, ge=16, description="Width; a multiple of 16.")
    layers: int = Field(default=1, ge=1, description="Transformer layers.")
    max_length: int = Field(default=128, ge=8, description="Most tokens of prompt and response.")
    epochs: int = Field(default=6, ge=1, description="Passes over the writers' texts.")
    learning_rate: float = Field(default=5e-3, gt=0, description="Peak learning rate.")
    texts_per_step: int = Field(default=32, ge=1, description="Texts per optimiser step.")
    seed: int = Field(default=0, ge=0, description="Seed of its first weights and of the order of the texts.")


class TinyPolicyJob(BaseModel):
    """A tiny policy model to be taught by a process of its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    vocabulary: tuple[str, ...] = Field(description="Every word and punctuation mark of the texts.")
    prompts_path: Path = Field(description="PROMPTS as Parquet.")
    responses_path: Path = Field(description="RESPONSES as Parquet.")
    output_dir: Path = Field(description="Where the model folder goes.")
    config: TinyPolicyConfig = TinyPolicyConfig()
