"""What to score and how to train, as data: importable without torch.

Fields carry their own description, which is also the command line's help and the Prefect form.
"""

from collections.abc import Collection
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from charm_core.reward_model.heads.catalogue import KINDS

_ABOUT_KINDS = ", ".join(f"{name} ({kind.about})" for name, kind in KINDS.items())


class RewardModelSpec(BaseModel):
    """A reward model and everything that decides which number a (prompt, response) gets."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str = Field(description="Folder of the reward model (Hugging Face format, safetensors), or a hub id.")
    revision: str | None = Field(default=None, description="Hub revision; use a commit hash. Ignored for a folder.")
    max_length: int = Field(
        default=4096, ge=8, description="Most tokens per text, template included; the model's own limit may be lower."
    )
    max_prompt_characters: int | None = Field(
        default=None,
        ge=1,
        description="Each message of the prompt is first cut to this many characters, keeping its start "
        "(its end where truncation_side is left).",
    )
    min_response_tokens: int = Field(
        default=64,
        ge=1,
        description="The prompt is cut only where the response would keep fewer tokens than this (truncation_side right).",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Arithmetic of the backbone; auto is bfloat16 on a GPU, float32 on CPU. The head is float32.",
    )
    batch_tokens: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default="auto",
        description="Most tokens in one scoring batch, padding included; auto: what the memory allows. Does not change a score.",
    )
    batching: Literal["auto", "packed", "padded"] = Field(
        default="auto",
        description="packed: texts side by side without padding, and what responses to one prompt share is computed once; padded: "
        "sorted by length and filled up; auto: packed where a trial gives the same scores.",
    )
    compile: bool = Field(
        default=False,
        description="Compile the layers for scoring, with packed rows of a few fixed sizes: takes a minute or more before the first score, "
        "and a C++ compiler. Not with strict, nor with a batching or attention of one's own.",
    )
    strict: bool = Field(
        default=False,
        description="Score every text alone, so that not a bit of its score depends on the others; slower. Else scores in float32 "
        "move by less than 1e-5, in bfloat16 by what the summary reports.",
    )
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = Field(
        default="auto",
        description="Attention kernel, as transformers names it; auto is sdpa where the model supports it.",
    )
    trust_remote_code: bool = Field(
        default=False, description="Run Python code that comes with this model. Only for a model that you have read."
    )
    kind: Literal["auto", *KINDS] = Field(  # type: ignore[valid-type] # the choices are the catalogue's
        default="auto", description=f"How the score comes about: {_ABOUT_KINDS}; auto tells it from the files."
    )
    truncation_side: Literal["right", "left"] = Field(
        default="right",
        description="Which end of a text that is too long is cut: right keeps starts; left keeps ends, so that the prompt "
        "loses its beginning.",
    )
    chat_template: str | None = Field(
        default=None,
        description="Jinja text, or a file of it, in place of the chat template that comes with the model.",
    )
    system_prompt: str | None = Field(
        default=None, description="System message put before prompts that have none; part of every text."
    )
    base_model: str | None = Field(
        default=None, description="lora: folder or hub id of the base model; default: the one that the adapter names."
    )
    base_revision: str | None = Field(default=None, description="Hub revision of base_model; use a commit hash.")
    reference_model: str | None = Field(
        default=None,
        description="dpo: folder or hub id of the model that training began with, whose probabilities count against.",
    )
    reference_revision: str | None = Field(
        default=None, description="Hub revision of reference_model; use a commit hash."
    )
    dpo_beta: float = Field(default=0.1, gt=0, description="dpo: factor of the difference of log-probabilities.")

    @model_validator(mode="after")
    def _options_belong_to_the_kind(self) -> Self:
        if self.reference_model is not None and self.kind not in ("auto", "dpo"):
            raise ValueError(f"reference_model belongs to kind 'dpo', not to {self.kind!r}: leave it out")
        if self.kind == "dpo" and self.reference_model is None:
            raise ValueError("kind 'dpo' needs reference_model, the model that DPO training began with")
        if self.base_model is not None and self.kind not in ("auto", "lora"):
            raise ValueError(f"base_model belongs to kind 'lora', not to {self.kind!r}: leave it out")
        if self.base_model is not None and self.reference_model is not None:
            raise ValueError("base_model is for a LoRA adapter and reference_model for DPO: give one of them")
        return self

    @model_validator(mode="after")
    def _what_is_compiled_is_packed(self) -> Self:
        if self.compile and (self.strict or self.batching == "padded" or self.attention != "auto"):
            raise ValueError(
                f"compile needs packed rows, which strict={self.strict}, batching={self.batching!r}, "
                f"attention={self.attention!r} do not allow: leave those at their defaults, or leave compile out"
            )
        return self

    def settings(self, exclude: Collection[str] = ()) -> dict[str, Any]:
        """The fields as JSON-able data, for identities.

        Fields that came later are left out where they have their default, so that what was done before they came is
        still recognised.
        """
        return _without_later_defaults(self, self.model_dump(mode="json", exclude=set(exclude)), _LATER_FIELDS)

    def saved_at(self, path: str) -> Self:
        """The spec of what fine-tuning makes of this reward model: a folder that needs no base model any more."""
        kind = "auto" if self.kind == "lora" else self.kind
        changes = {"path": path, "revision": None, "kind": kind, "base_model": None, "base_revision": None}
        return self.model_copy(update=changes)


_LATER_FIELDS = {
    "batching",
    "compile",
    "strict",
    "kind",
    "truncation_side",
    "chat_template",
    "system_prompt",
    "base_model",
    "base_revision",
    "reference_model",
    "reference_revision",
    "dpo_beta",
}


BestMetric = Literal["eval_loss", "eval_accuracy", "eval_margin_mean"]
"""By what evaluations on held-out pairs are compared; see ``TrainingConfig.best_metric``."""


class TrainingConfig(BaseModel):
    """How a reward model is fine-tuned. Dropout is always off, so that training sees the scores that scoring gives."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    objective: Literal["bradley_terry", "margin_regression", "win_rate_matching"] = Field(
        default="bradley_terry",
        description="bradley_terry learns the calibrated order; margin_regression the calibrated score differences; "
        "win_rate_matching the win rates between policy models that the ratings predict.",
    )
    epochs: float = Field(
        default=1.0, gt=0, description="Passes over the training pairs; a fraction takes that share of prompts."
    )
    learning_rate: float = Field(default=2e-6, ge=0, description="Peak learning rate of AdamW.")
    head_learning_rate: float | None = Field(
        default=None, ge=0, description="Peak learning rate of the head alone; default: the same as the rest."
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="Decay of the learning rate to zero after the warm-up (constant: none)."
    )
    warmup_ratio: float = Field(
        default=0.03, ge=0, lt=1, description="Share of the steps in which the learning rate rises linearly."
    )
    weight_decay: float = Field(
        default=0.001, ge=0, description="AdamW weight decay of matrices; vectors (biases, norms) get none."
    )
    adam_betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=(0.9, 0.999), description="AdamW's decay rates of the two moments."
    )
    max_grad_norm: float = Field(default=1.0, gt=0, description="Gradients are clipped to this global norm.")
    pairs_per_step: int = Field(
        default=64,
        ge=1,
        description="Most pairs per optimiser step, over all ranks. Pairs of one prompt stay together, even if they are more.",
    )
    tokens_per_step: int | None = Field(
        default=None,
        ge=1,
        description="Most tokens per optimiser step, over all ranks and without padding, in place of pairs_per_step, which then "
        "does not count. A prompt that has more by itself is a step of its own.",
    )
    micro_batch_tokens: int = Field(
        default=8192,
        ge=1,
        description="Most tokens per forward pass and rank, padding included; one prompt is never split.",
    )
    use_margin: bool = Field(
        default=False,
        description="bradley_terry only: ask for score differences above the calibrated margin, not above 0.",
    )
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=0.5, description="bradley_terry only: assumed share of pairs with a wrong label."
    )
    centering: float = Field(
        default=0.0, ge=0, description="Weight of (r_chosen + r_rejected)², which pulls the scores' mean to 0."
    )
    anchor: float = Field(
        default=0.0,
        ge=0,
        description="Weight of the squared distance between a pair's mean score and its mean calibrated score, in margin scales.",
    )
    margin_scale: float | None = Field(
        default=None,
        gt=0,
        description="Unit in which margins are compared; default: root mean square of the training margins.",
    )
    win_rate_temperature: float = Field(
        default=0.3,
        gt=0,
        description="win_rate_matching only: temperature of the derivative of a win, in margin scales.",
    )
    win_rate_memory: int | None = Field(
        default=None,
        ge=1,
        description="win_rate_matching only: prompts over which win rates are remembered, for small steps; "
        "default: each step measures its own in a first pass.",
    )
    regression_weight: float = Field(
        default=0.1,
        ge=0,
        description="win_rate_matching only: weight of margin_regression beside it, which keeps single scores in place.",
    )
    trainable_layers: int | None = Field(
        default=None,
        ge=0,
        description="Train only the last so many transformer layers and the head; default: everything.",
    )
    lora_rank: int | None = Field(
        default=None,
        ge=1,
        description="Rank of LoRA adapters, which alone are trained, with the head, and merged at the end; none: train the weights "
        "themselves.",
    )
    lora_alpha: int | None = Field(default=None, ge=1, description="LoRA's α; default: twice the rank.")
    lora_targets: tuple[str, ...] = Field(
        default=(),
        description="Names of the layers that get an adapter, such as q_proj; default: all linear ones of the transformer layers.",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="Arithmetic in training; auto is bfloat16 on a GPU. Master weights are always float32.",
    )
    gradient_checkpointing: bool = Field(
        default=False, description="Recompute activations in the backward pass to save memory."
    )
    zero_stage: int | None = Field(
        default=3,
        ge=0,
        le=3,
        description="DeepSpeed ZeRO stage; none: plain PyTorch in one process, without DeepSpeed.",
    )
    offload: Literal["none", "cpu", "nvme"] = Field(
        default="none",
        description="Where ZeRO-2 keeps the optimiser's state, and ZeRO-3 also the weights: on the GPU, in main memory, or on a fast "
        "disk (zero_stage 3, nvme_path).",
    )
    nvme_path: str | None = Field(
        default=None,
        description="Folder on the fast disk; needed by offload 'nvme'. Each training makes a folder of its own in it, and "
        "removes it when it is done.",
    )
    ranks: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default="auto",
        description="Processes; auto: one per GPU, or 2 on a CPU with at least two cores. Plain training uses 1.",
    )
    threads_per_rank: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default="auto", description="CPU threads per process; auto: the cores shared evenly."
    )
    evaluate_every_steps: int | None = Field(
        default=None,
        ge=1,
        description="Steps between evaluations on held-out pairs; default: before the first and after the last.",
    )
    best_metric: BestMetric = Field(
        default="eval_loss",
        description="What makes one evaluation better than another: a lower eval_loss, a higher eval_accuracy or a higher "
        "eval_margin_mean.",
    )
    early_stopping_patience: int | None = Field(
        default=None,
        ge=1,
        description="Stop after so many evaluations in a row without a new best; needs evaluate_every_steps. Default: never.",
    )
    keep: Literal["last", "best"] = Field(
        default="last",
        description="Which model is saved: that of the last step, or that of the best evaluation, which may be the untouched one.",
    )
    score_spread_floor: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="Share of the score spread before training (standard deviation of scores within held-out prompts) below which "
        "the reward model counts as collapsed; 0: never.",
    )
    below_spread_floor: Literal["warn", "stop"] = Field(
        default="warn",
        description="What an evaluation below score_spread_floor does. Calibrated scores in a much smaller unit than the reward "
        "model's can lower the spread rightly.",
    )
    raw_scores_of: Literal["this_model", "another_model", "unknown"] = Field(
        default="unknown",
        description="Whose the raw scores of the pairs are. this_model: it is an error if the first step finds others, as it does with "
        "a wrong template, head or revision; unknown: a warning; another_model: nothing.",
    )
    checkpoint_every_steps: int = Field(default=50, ge=1, description="Steps between checkpoints.")
    checkpoints_kept: int = Field(default=2, ge=1, description="Checkpoints kept on disk while training runs.")
    seed: int = Field(
        default=0, ge=0, description="Seed of the order of the prompts, and of the first weights of LoRA adapters."
    )

    @model_validator(mode="after")
    def _options_belong_to_the_objective(self) -> Self:
        if self.objective != "bradley_terry" and (self.use_margin or self.label_smoothing):
            raise ValueError(
                f"use_margin and label_smoothing belong to objective 'bradley_terry', not to {self.objective!r}: leave them out"
            )
        if self.zero_stage is None and self.ranks not in (1, "auto"):
            raise ValueError(f"ranks={self.ranks} needs DeepSpeed: set zero_stage to 0, 1, 2 or 3")
        return self

    @model_validator(mode="after")
    def _options_have_what_they_need(self) -> Self:
        if self.lora_rank is None and (self.lora_alpha is not None or self.lora_targets):
            raise ValueError("lora_alpha and lora_targets need lora_rank: set it, or leave them out")
        if self.early_stopping_patience is not None and self.evaluate_every_steps is None:
            raise ValueError(
                f"early_stopping_patience={self.early_stopping_patience} counts evaluations: set evaluate_every_steps too"
            )
        return self

    @model_validator(mode="after")
    def _offload_has_what_it_needs(self) -> Self:
        stages = {"none": (None, 0, 1, 2, 3), "cpu": (2, 3), "nvme": (3,)}[self.offload]
        if self.zero_stage not in stages:
            raise ValueError(
                f"offload={self.offload!r} needs zero_stage {' or '.join(map(str, stages))}, not {self.zero_stage}: change one of them"
            )
        if (self.nvme_path is None) == (self.offload == "nvme"):
            raise ValueError(
                "offload 'nvme' needs nvme_path, a folder on the fast disk"
                if self.offload == "nvme"
                else f"nvme_path={self.nvme_path!r} belongs to offload 'nvme', not to {self.offload!r}: leave it out"
            )
        return self

    def identity(self) -> dict[str, Any]:
        """What of it goes into cache keys."""
        return self.settings(exclude=_LATER_AND_NO_MATTER)

    def settings(self, exclude: Collection[str] = ()) -> dict[str, Any]:
        """The fields as JSON-able data, for identities; see ``RewardModelSpec.settings``."""
        dumped = self.model_dump(mode="json", exclude=set(exclude))
        return _without_later_defaults(self, dumped, _LATER_TRAINING_FIELDS)


_LATER_AND_NO_MATTER = {"offload", "nvme_path", "raw_scores_of"}
"""Later fields of ``TrainingConfig`` that decide where and how carefully, not what is learnt. Earlier ones of that sort stay in
cache keys, so that these do not change."""
_LATER_TRAINING_FIELDS = _LATER_AND_NO_MATTER | {
    "tokens_per_step",
    "lora_rank",
    "lora_alpha",
    "lora_targets",
    "best_metric",
    "early_stopping_patience",
    "keep",
    "score_spread_floor",
    "below_spread_floor",
}


def _without_later_defaults(settings: BaseModel, dumped: dict[str, Any], later: Collection[str]) -> dict[str, Any]:
    defaults = {name: type(settings).model_fields[name].default for name in later}
    return {
        name: value
        for name, value in dumped.items()
        # a tuple is dumped as a list
        if name not in later or (tuple(value) if isinstance(value, list) else value) != defaults[name]
    }
