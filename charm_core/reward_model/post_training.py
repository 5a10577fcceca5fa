"""DPO of a policy model with TRL's DPOTrainer: preference pairs in, a plain Hugging Face folder out.

What is trained is a LoRA adapter, unless all weights are asked for. The untouched policy model is the reference. In the end the
adapter is merged into the original in float32 and saved in the type that the original is stored in, so that the result is
sampled, and post-trained again, like any other policy model.
"""

import logging
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import polars as pl
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from charm_core.errors import ArtifactError, ConfigError, ModelError, TrainingError
from charm_core.reward_model.generation_job import PolicyModelSpec
from charm_core.reward_model.loading import arithmetic_dtype
from charm_core.reward_model.post_training_job import PostTrainingConfig, PostTrainingJob, PostTrainingOutcome
from charm_core.reward_model.ranks import Rank
from charm_core.reward_model.templates import chat_ids, fixed_template, uses_chat_template
from charm_core.reward_model.workdir import sync_folder, write_text
from charm_core.tables import PAIRS, validate

logger = logging.getLogger(__name__)

_SIDES = ("prompt", "chosen", "rejected")


def post_train(job: PostTrainingJob, rank: Rank) -> PostTrainingOutcome:
    """Train a policy model to prefer what the pairs prefer.

    Args:
        job: What to train on what, and where the result goes.
        rank: Which process this is.

    Returns:
        What was done; the leading rank has written the model folder, and the outcome last.

    Raises:
        ModelError: The policy model cannot be used.
        ConfigError: TRL is not installed, or settings do not fit each other.
        TrainingError: No pairs to train on, or a loss that is not finite.
        ArtifactError: The result cannot be written.
    """
    pairs = validate(pl.read_parquet(job.pairs_path), PAIRS)
    train, held_out = pairs.filter(pl.col("split") == "train"), pairs.filter(pl.col("split") != "train")
    if train.is_empty():
        raise TrainingError(
            f"none of the {pairs.height} pairs is in the training split, so there is nothing to train on"
        )
    dtype = training_dtype(job, rank)
    network, tokenizer = load_for_training(job.model, dtype)
    tokenizer.chat_template = fixed_template(tokenizer)  # TRL renders as scoring and sampling do, whatever day it is
    cut = _count_cut(tokenizer, train, job.config.max_length)
    trainer = _trainer(job, rank, network, tokenizer, train, held_out)
    trainer.train()
    after = trainer.evaluate() if held_out.height else {}
    trained = _trained_weights(trainer)
    outcome = _outcome(trainer, rank, after, cut=cut, pairs=(train.height, held_out.height))
    # under ZeRO-3 transformers would share out whatever is loaded from now on, and wait for ranks that load nothing
    unset_hf_deepspeed_config()
    if rank.leads:
        _save(job, trained)
        write_text(job.outcome_path, outcome.model_dump_json(indent=1))
    rank.barrier()
    return outcome


def training_dtype(job: PostTrainingJob, rank: Rank) -> torch.dtype:
    """Type of the weights: float32 where all are trained, for bfloat16 would lose small steps; else that of the arithmetic."""
    if job.config.lora_rank is None:
        return torch.float32
    return arithmetic_dtype(job.config.dtype, rank.device)


def load_for_training(spec: PolicyModelSpec, dtype: torch.dtype) -> tuple[Any, Any]:
    """Network and tokenizer of a policy model; the device is the trainer's business.

    Raises:
        ModelError: Not a causal language model in safetensors, or one without a chat template.
    """
    options = {"revision": spec.revision, "trust_remote_code": spec.trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(spec.path, **options)
        network = AutoModelForCausalLM.from_pretrained(spec.path, dtype=dtype, use_safetensors=True, **options)
    except Exception as error:
        raise ModelError(f"the policy model {spec.path!r} cannot be loaded: {error}") from error
    if not uses_chat_template(tokenizer):
        raise ModelError(
            f"the tokenizer of the policy model {spec.path!r} has no chat template, so what it is asked and answers cannot be told "
            "apart; put a chat_template.jinja into its folder"
        )
    return network, tokenizer


def steps_per_update(config: PostTrainingConfig, ranks: int) -> int:
    """Forward passes per rank and optimiser step.

    Raises:
        ConfigError: The pairs of a step cannot be shared evenly.
    """
    passes, rest = divmod(config.pairs_per_step, config.pairs_per_pass * ranks)
    if rest or not passes:
        raise ConfigError(
            f"pairs_per_step={config.pairs_per_step} is not a multiple of pairs_per_pass={config.pairs_per_pass} times {ranks} "
            "ranks; change one of them"
        )
    return passes


def _trainer(
    job: PostTrainingJob, rank: Rank, network: Any, tokenizer: Any, train: pl.DataFrame, held_out: pl.DataFrame
) -> Any:
    try:
        from datasets import Dataset  # type: ignore[import-untyped]
        from trl import DPOTrainer  # type: ignore[attr-defined] # exported late
    except ImportError as error:
        raise ConfigError(
            f"post-training needs TRL, which is not installed ({error}): pip install 'charm-rm[post-training]'"
        ) from error
    sides = [Dataset.from_list(part.select(_SIDES).to_dicts()) if part.height else None for part in (train, held_out)]
    return DPOTrainer(
        model=network,
        args=_arguments(job, rank),
        train_dataset=sides[0],
        eval_dataset=sides[1],
        processing_class=tokenizer,
        peft_config=_adapter(job.config),
    )


def _arguments(job: PostTrainingJob, rank: Rank) -> Any:
    from trl import DPOConfig  # type: ignore[attr-defined] # exported late

    config = job.config
    on_gpu = rank.device.type == "cuda"
    half = on_gpu and arithmetic_dtype(config.dtype, rank.device) is torch.bfloat16
    return DPOConfig(
        output_dir=str(_scratch(job)),
        beta=config.beta,
        loss_type=[config.loss],
        label_smoothing=config.label_smoothing,
        max_length=config.max_length,
        num_train_epochs=config.epochs,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule if config.schedule != "constant" else "constant_with_warmup",
        warmup_steps=config.warmup_ratio,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim="adamw_torch",
        per_device_train_batch_size=config.pairs_per_pass,
        per_device_eval_batch_size=config.pairs_per_pass,
        gradient_accumulation_steps=steps_per_update(config, rank.world_size),
        gradient_checkpointing=config.gradient_checkpointing,
        seed=config.seed,
        bf16=half,
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        deepspeed=None if config.zero_stage is None else deepspeed_settings(config, half=half),
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )


def deepspeed_settings(config: PostTrainingConfig, *, half: bool) -> dict[str, Any]:
    """DeepSpeed's settings; what the trainer knows better is ``auto``."""
    return {
        "zero_optimization": {"stage": config.zero_stage, "stage3_gather_16bit_weights_on_model_save": False},
        "bf16": {"enabled": half},
        "gradient_clipping": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }


def _adapter(config: PostTrainingConfig) -> Any:
    if config.lora_rank is None:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha or 2 * config.lora_rank,
        lora_dropout=0.0,
        target_modules=list(config.lora_targets) or "all-linear",
        task_type="CAUSAL_LM",
    )


def _count_cut(tokenizer: Any, pairs: pl.DataFrame, max_length: int) -> int:
    texts = {
        (_key(prompt), _key(answer)): [*prompt, *answer]
        for *_, prompt, chosen, rejected in pairs.select(_SIDES).iter_rows()
        for answer in (chosen, rejected)
    }
    return sum(len(chat_ids(tokenizer, text)) > max_length for text in texts.values())


def _key(messages: list[dict[str, str]]) -> tuple[tuple[str, str], ...]:
    return tuple((message["role"], message["content"]) for message in messages)


def _trained_weights(trainer: Any) -> dict[str, Tensor]:
    """What was trained, whole and on the CPU in float32; under ZeRO-3 every rank takes part."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with _gathered(parameters):
        return {name: parameter.detach().to("cpu", torch.float32, copy=True) for name, parameter in parameters.items()}


@contextmanager
def _gathered(parameters: Mapping[str, Tensor]) -> Iterator[None]:
    sharded = [parameter for parameter in parameters.values() if hasattr(parameter, "ds_id")]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded):
        yield


def _outcome(
    trainer: Any, rank: Rank, after: Mapping[str, float], *, cut: int, pairs: tuple[int, int]
) -> PostTrainingOutcome:
    curve = tuple(_numbers(record) for record in trainer.state.log_history if "loss" in record)
    losses = [record.get("loss", math.nan) for record in curve]
    if not losses or not all(math.isfinite(loss) for loss in losses):
        raise TrainingError(f"a loss of the {len(losses)} steps is not finite; use a lower learning_rate")
    return PostTrainingOutcome(
        steps=trainer.state.global_step,
        ranks=rank.world_size,
        train_pairs=pairs[0],
        held_out_pairs=pairs[1],
        cut=cut,
        first_loss=losses[0],
        last_loss=losses[-1],
        accuracy_after=after.get("eval_rewards/accuracies"),
        curve=curve,
    )


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: float(value) for name, value in record.items() if isinstance(value, (int, float)) and math.isfinite(value)
    }


def _save(job: PostTrainingJob, trained: dict[str, Tensor]) -> None:
    """Write the original with what was trained, under a temporary name that is renamed last."""
    partial = job.output_dir.with_name(f"{job.output_dir.name}.partial")
    network, tokenizer = load_for_training(job.model, torch.float32)
    merged = _with_trained(network, job.config, trained)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        merged.to(_stored_dtype(job.model) or torch.float32).save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        sync_folder(partial)
        shutil.rmtree(job.output_dir, ignore_errors=True)
        partial.replace(job.output_dir)
        shutil.rmtree(_scratch(job), ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise ArtifactError(f"the trained policy model cannot be written to {job.output_dir}: {error}") from error


def _stored_dtype(spec: PolicyModelSpec) -> torch.dtype | None:
    """The type that the original's weights are stored in, as its config says."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(spec.path, revision=spec.revision, trust_remote_code=spec.trust_remote_code)
    found = getattr(config, "dtype", None)
    return found if isinstance(found, torch.dtype) else None


def _with_trained(network: Any, config: PostTrainingConfig, trained: dict[str, Tensor]) -> Any:
    """The original network with the trained weights in it; an adapter is merged."""
    adapter = _adapter(config)
    if adapter is None:
        _load(network, trained)
        return network
    from peft import get_peft_model

    with_adapter = get_peft_model(network, adapter)
    _load(with_adapter, trained)
    return with_adapter.merge_and_unload()


def _load(network: Any, trained: dict[str, Tensor]) -> None:
    unknown = network.load_state_dict(trained, strict=False).unexpected_keys
    if unknown:
        raise TrainingError(f"the trained weights {unknown[:3]} are not in the policy model; this is a bug, report it")


def _scratch(job: PostTrainingJob) -> Any:
    """Where the trainer may write."""
    return job.output_dir.with_name(f"{job.output_dir.name}.scratch")
