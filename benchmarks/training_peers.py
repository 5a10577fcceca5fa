"""The others of benchmarks.training, each in a process of its own: ``python -m benchmarks.training_peers JOB.json``.

``trl`` is TRL's RewardTrainer with what ``arguments`` sets for all ways alike, in place of its own defaults, such as gradient checkpointing
and bfloat16, both on. ``script`` is written the way public reward-modelling scripts are: transformers' Trainer with a loss of its own, both
texts of a pair one after the other, padded to the longest of the batch. Both train ``AutoModelForSequenceClassification`` from the pairs in
the order given, without dropout.
"""

import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from pydantic import BaseModel
from torch.nn.functional import logsigmoid
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from benchmarks.training_inputs import Pair


class PeerJob(BaseModel):
    """What a peer trains, and how."""

    peer: str
    model_dir: Path
    work_dir: Path
    steps: list[list[Pair]]
    micro_batch_pairs: int
    learning_rate: float
    weight_decay: float
    max_grad_norm: float
    bfloat16: bool
    gradient_checkpointing: bool


class Course(BaseModel):
    """What a training went through, step by step."""

    losses: list[float]
    ends: list[float]
    """When each step ended, in seconds."""
    cpu: list[float]
    """CPU seconds of the training's processes until then."""
    packed: bool = False
    """Whether texts went through the model in packed rows."""


class Watch(TrainerCallback):
    """Notes losses and the ends of steps."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.ends: list[float] = []
        self.cpu: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Take the time."""
        self.ends.append(time.perf_counter())
        self.cpu.append(time.process_time())

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        """Take the loss of the step; the last log, of the whole training, has none."""
        if "loss" in logs:
            self.losses.append(logs["loss"])


class PairTrainer(Trainer):
    """Bradley-Terry on rows that are chosen, rejected, chosen, rejected, ..."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        """Mean over the pairs."""
        scores = model(**inputs).logits[:, 0]
        loss = -logsigmoid(scores[0::2] - scores[1::2]).mean()
        return (loss, {"scores": scores}) if return_outputs else loss


class PairCollator:
    """Pads the texts of pairs, chosen and rejected in turn, to the longest."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, pairs: list[Pair]) -> Any:
        """Tensors of a batch."""
        texts = [text for pair in pairs for text in (features(pair, "chosen"), features(pair, "rejected"))]
        return self.tokenizer.pad(texts, padding="longest", return_tensors="pt")


def features(pair: Pair, side: str) -> dict[str, list[int]]:
    """One text of a pair, named as a tokenizer names it."""
    ids = pair[f"{side}_ids"]
    types = {"token_type_ids": pair[f"{side}_types"]} if f"{side}_types" in pair else {}
    return {"input_ids": ids, "attention_mask": [1] * len(ids), **types}


def arguments(job: PeerJob) -> dict[str, Any]:
    """What both are told alike."""
    return {
        "output_dir": str(job.work_dir),
        "num_train_epochs": 1,
        "per_device_train_batch_size": job.micro_batch_pairs,
        "gradient_accumulation_steps": len(job.steps[0]) // job.micro_batch_pairs,
        "learning_rate": job.learning_rate,
        "lr_scheduler_type": "constant",
        "weight_decay": job.weight_decay,
        "max_grad_norm": job.max_grad_norm,
        "bf16": job.bfloat16,
        "gradient_checkpointing": job.gradient_checkpointing,
        "train_sampling_strategy": "sequential",
        "remove_unused_columns": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
    }


def trl_trainer(job: PeerJob, pairs: Dataset) -> Trainer:
    """TRL's; it leaves out segments, which a BERT needs to give the same scores, so its collator is extended by them."""
    from trl import RewardConfig, RewardTrainer
    from trl.trainer.reward_trainer import DataCollatorForPreference

    class WithSegments(DataCollatorForPreference):
        def torch_call(self, examples: list[Pair]) -> dict[str, Any]:
            batch: dict[str, Any] = super().torch_call(examples)
            types = torch.zeros_like(batch["input_ids"])
            sides = [example[f"{side}_types"] for side in ("chosen", "rejected") for example in examples]
            for row, side in enumerate(sides):
                types[row, : len(side)] = torch.tensor(side)
            return {**batch, "token_type_ids": types}

    pad = AutoTokenizer.from_pretrained(job.model_dir).pad_token_id
    return RewardTrainer(
        model=str(job.model_dir),
        args=RewardConfig(**arguments(job), max_length=None),
        train_dataset=pairs,
        data_collator=WithSegments(pad_token_id=pad) if "chosen_types" in pairs.column_names else None,
    )


def script_trainer(job: PeerJob, pairs: Dataset) -> Trainer:
    """As a script has it."""
    model = AutoModelForSequenceClassification.from_pretrained(job.model_dir, num_labels=1, dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.config.use_cache = False
    tokenizer = AutoTokenizer.from_pretrained(job.model_dir)
    return PairTrainer(
        model=model,
        args=TrainingArguments(**arguments(job)),
        train_dataset=pairs,
        data_collator=PairCollator(tokenizer),
    )


def main(job_file: Path) -> None:
    """Train, and write the course beside the job's file."""
    job = PeerJob.model_validate_json(job_file.read_text())
    pairs = Dataset.from_list([pair for step in job.steps for pair in step])
    trainer = {"trl": trl_trainer, "script": script_trainer}[job.peer](job, pairs)
    watch = Watch()
    trainer.add_callback(watch)
    trainer.train()
    course = Course(losses=watch.losses, ends=watch.ends, cpu=watch.cpu)
    job_file.with_suffix(".course.json").write_text(course.model_dump_json())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
