"""What goes into identities, and combinations of settings that cannot be meant."""

import pytest
from pydantic import ValidationError

from charm_core.reward_model.jobs import TrainingJob
from charm_core.reward_model.spec import RewardModelSpec, TrainingConfig
from charm_core.reward_model.workdir import identity
from tasks.caching import content_key

FIRST_FIELDS = {
    "objective", "epochs", "learning_rate", "head_learning_rate", "schedule", "warmup_ratio", "weight_decay", "adam_betas",
    "max_grad_norm", "pairs_per_step", "micro_batch_tokens", "use_margin", "label_smoothing", "centering", "anchor", "margin_scale",
    "win_rate_temperature", "win_rate_memory", "regression_weight", "trainable_layers", "dtype", "gradient_checkpointing",
    "zero_stage", "ranks", "threads_per_rank", "evaluate_every_steps", "checkpoint_every_steps", "checkpoints_kept", "seed",
}  # fmt: skip
"""Those that cache keys were made of before there were others."""


def test_what_was_trained_before_there_were_more_settings_is_recognised():
    assert TrainingConfig().identity().keys() == FIRST_FIELDS
    # written by the version before
    assert content_key("t", 1, {"c": TrainingConfig()}) == (
        "t-v1-e8c18e6bab4ac2a9246b0026607f7537ebb03a442a01cfcff706a23add1cffce"
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"tokens_per_step": 4096},
        {"lora_rank": 8},
        {"lora_rank": 8, "lora_targets": ("q_proj",)},
        {"keep": "best"},
        {"early_stopping_patience": 3, "evaluate_every_steps": 5},
    ],
)
def test_what_decides_what_is_learnt_makes_another_key(settings):
    keys = {content_key("t", 1, {"c": TrainingConfig(**changed)}) for changed in ({}, settings)}
    assert len(keys) == 2


@pytest.mark.parametrize(
    "settings",
    [{"offload": "cpu"}, {"offload": "nvme", "nvme_path": "/disk"}, {"raw_scores_of": "this_model"}],
)
def test_where_and_how_carefully_makes_no_other_key(settings, tmp_path):
    keys = {content_key("t", 1, {"c": TrainingConfig(**changed)}) for changed in ({}, settings)}
    assert len(keys) == 1
    pairs = tmp_path / "pairs.parquet"
    pairs.write_bytes(b"")
    jobs = [
        TrainingJob(
            model=RewardModelSpec(path="m"),
            pairs_path=pairs,
            output_dir=tmp_path,
            work_dir=tmp_path,
            config=TrainingConfig(**changed),
        )
        for changed in ({}, settings)
    ]
    assert identity(jobs[0]) == identity(jobs[1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"offload": "cpu", "zero_stage": None}, "offload='cpu' needs zero_stage 2 or 3, not None"),
        ({"offload": "cpu", "zero_stage": 1}, "offload='cpu' needs zero_stage 2 or 3, not 1"),
        ({"offload": "nvme", "zero_stage": 2, "nvme_path": "/disk"}, "offload='nvme' needs zero_stage 3, not 2"),
        ({"offload": "nvme"}, "offload 'nvme' needs nvme_path"),
        ({"nvme_path": "/disk"}, "belongs to offload 'nvme', not to 'none'"),
        ({"tokens_per_step": 0}, "tokens_per_step"),
        ({"best_metric": "loss"}, "best_metric"),
    ],
)
def test_combinations_that_cannot_be_meant_are_errors(settings, message):
    with pytest.raises(ValidationError, match=message):
        TrainingConfig(**settings)
