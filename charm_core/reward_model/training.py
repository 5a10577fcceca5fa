"""Fine-tuning on preference pairs: the loop, the same for plain PyTorch and for ZeRO over several ranks.

The loss of a step is exactly the mean over its pairs, however they are dealt out to ranks and micro-batches. Each distinct
response of a prompt is encoded once per step. Nothing is random but the order of the prompts, so that on CPU the same job
gives the same bytes, and a job that goes on from a checkpoint gives what an uninterrupted one gives.
"""

import logging
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import torch
import torch.distributed as dist
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from charm_core.errors import ArtifactError, ConfigError, TableError, TrainingError
from charm_core.reward_model.batching import PairGroup, share_out
from charm_core.reward_model.checkpoints import load_checkpoint, save_checkpoint
from charm_core.reward_model.engines import WEIGHT, Engine, PlainEngine, ZeroEngine
from charm_core.reward_model.jobs import CurveRecord, TrainingJob, TrainingOutcome
from charm_core.reward_model.loading import RewardModel, arithmetic_dtype, load_reward_model
from charm_core.reward_model.losses import PairTargets, pair_losses, root_mean_square
from charm_core.reward_model.network import RewardNetwork, collate
from charm_core.reward_model.plan import TrainingData, learning_rate_factor, plan_steps, prepare
from charm_core.reward_model.rendering import Rendered
from charm_core.reward_model.win_rates import WinRateTargets
from charm_core.reward_model.workdir import (
    CURVE,
    claim,
    curve_line,
    finished_outcome,
    mark_finished,
    read_curve,
    rewind,
)
from charm_core.tables import PAIRS, validate

logger = logging.getLogger(__name__)

EVALUATION_KEYS = ("loss", "accuracy", "margin_mean")


@dataclass(frozen=True, kw_only=True)
class Rank:
    """Which of the processes this is."""

    number: int
    world_size: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """Whether this rank writes the files."""
        return self.number == 0

    def barrier(self) -> None:
        """Wait for the other ranks."""
        if self.world_size > 1:
            dist.barrier()

    def total(self, values: Tensor) -> Tensor:
        """Sum over the ranks."""
        if self.world_size > 1:
            values = values.to(self.device)
            dist.all_reduce(values)
        return values.cpu()

    def gather(self, values: list[str]) -> list[str]:
        """The lists of all ranks, joined."""
        if self.world_size == 1:
            return values
        parts: list[Any] = [None] * self.world_size
        dist.all_gather_object(parts, values)
        return [value for part in parts for value in part]


@dataclass(kw_only=True)
class Totals:
    """Sums over pairs, and over tokens, of a step or an evaluation."""

    loss: float = 0.0
    accuracy: float = 0.0
    margin: float = 0.0
    score: float = 0.0
    pairs: float = 0.0
    tokens: float = 0.0
    wins: Tensor | None = None
    """For win_rate_matching, ``WinRateTargets.sums``."""

    def add(self, losses: Tensor, chosen: Tensor, rejected: Tensor, tokens: int) -> None:
        """Count one micro-batch. Equal scores count as half right."""
        losses, chosen, rejected = (part.detach().double().cpu() for part in (losses, chosen, rejected))
        self.loss += losses.sum().item()
        self.accuracy += ((chosen > rejected).double() + 0.5 * (chosen == rejected).double()).sum().item()
        self.margin += (chosen - rejected).sum().item()
        self.score += (0.5 * (chosen + rejected)).sum().item()
        self.pairs += len(losses)
        self.tokens += tokens

    def means(self, rank: Rank) -> dict[str, float]:
        """Over all ranks: means per pair, and the numbers of pairs and tokens."""
        sums = [self.loss, self.accuracy, self.margin, self.score, self.pairs, self.tokens]
        loss, accuracy, margin, score, pairs, tokens = rank.total(torch.tensor(sums, dtype=torch.float64)).tolist()
        return {
            "loss": loss / pairs,
            "accuracy": accuracy / pairs,
            "margin_mean": margin / pairs,
            "score_mean": score / pairs,
            "pairs": int(pairs),
            "tokens": int(tokens),
        }


def train(job: TrainingJob, rank: Rank) -> TrainingOutcome | None:
    """Do a training job, or the rest of it, in this process and, through the process group, its peers.

    Args:
        job: What to do. ``job.config.zero_stage`` None means plain PyTorch and one rank.
        rank: Which process this is; its process group is set up.

    Returns:
        The outcome on the leading rank, None on the others.

    Raises:
        ModelError, TableError: The input cannot be used.
        TrainingError: A loss or gradient is NaN or infinite, or the work folder belongs to another job.
        ArtifactError: A file cannot be written or read.
    """
    if rank.leads:
        claim(job)
    rank.barrier()
    finished = finished_outcome(job)
    if finished is not None:
        logger.info("%s is finished already", job.output_dir)
        return finished if rank.leads else None
    trainer = _Trainer(job, rank)
    trainer.run()
    return trainer.finish()


class _Trainer:
    """One run of a job on one rank."""

    def __init__(self, job: TrainingJob, rank: Rank) -> None:
        self.job, self.rank, self.config = job, rank, job.config
        torch.manual_seed(job.config.seed)
        self.done = rewind(job.work_dir) if rank.leads else 0
        self.done = int(rank.total(torch.tensor([float(self.done)], dtype=torch.float64)).item())
        self.model = load_reward_model(job.model, dtype=torch.float32, device=rank.device)
        self.data = prepare(_read_pairs(job), self.model.tokenizer, self.model.spec)
        self.steps = plan_steps(self.data.train, self.config)
        rows = [row for group in self.data.train for row in group.rows]
        self.win_rates = _win_rate_targets(job)
        self.scale = self.config.margin_scale or root_mean_square(torch.tensor(self.data.margins[rows]))
        self.filler = min(self.data.texts, key=lambda text: len(text.input_ids))
        self.engine = self._make_engine(self.model.network)
        # The engine's copy is the one that is trained; the rest of the model is not needed twice.
        logger.info(
            "%d training pairs of %d prompts, %d held out; %d steps, %d done before",
            len(rows),
            len(self.data.train),
            sum(len(group.pairs) for group in self.data.held_out),
            len(self.steps),
            self.done,
        )

    def run(self) -> None:
        """All steps that are not done yet, with evaluations and checkpoints."""
        if self.done == 0:
            self._record({"step": 0} | self._evaluate()) if self.data.held_out else None
        for index in range(self.done, len(self.steps)):
            started = time.monotonic()
            record = self._step(index)
            step = index + 1
            every = self.config.evaluate_every_steps
            if self.data.held_out and (step == len(self.steps) or (every and step % every == 0)):
                record |= self._evaluate()
            self._record(record)
            seconds = time.monotonic() - started
            logger.info(
                "step %d of %d: loss %.4f, accuracy %.3f, %.0f tokens/s",
                step,
                len(self.steps),
                record["loss"],
                record["accuracy"],
                record["tokens"] / seconds,
            )
            if step % self.config.checkpoint_every_steps == 0 and step < len(self.steps):
                self._checkpoint(step)

    def finish(self) -> TrainingOutcome | None:
        """Write the model folder and the finished marker."""
        trained = {name: tensor.to("cpu", copy=True) for name, kind, tensor in self.engine.state() if kind == WEIGHT}
        outcome = None
        if self.rank.leads:
            save_model(trained, self.job)
            outcome = self._outcome()
            mark_finished(self.job, outcome)
        self.rank.barrier()
        return outcome

    def _make_engine(self, network: RewardNetwork) -> Engine:
        moments = load_checkpoint(self.job.work_dir, self.done) if self.done else {}
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if (name, WEIGHT) in moments:
                    parameter.copy_(moments[name, WEIGHT])
        freeze(network, self.config.trainable_layers)
        lower = arithmetic_dtype(self.config.dtype, self.rank.device)
        network.autocast_dtype = None if lower == torch.float32 else lower
        if self.config.gradient_checkpointing:
            checkpoint_gradients(network)
        if self.config.zero_stage is None:
            engine: Engine = PlainEngine(network, self.config)
        else:
            engine = ZeroEngine(network, self.config, self.rank.world_size)
        if self.done:
            engine.load_moments(moments, self.done)
        return engine

    def _step(self, index: int) -> CurveRecord:
        groups = self.steps[index]
        pairs = sum(len(group.pairs) for group in groups)
        totals, broken = Totals(), []
        batches = self._share(groups)
        slopes = self._win_rate_slopes(batches, pairs)
        for number, batch in enumerate(batches):
            losses = self._losses(batch, totals, slopes)
            if not torch.isfinite(losses).all():
                broken.extend(group.prompt_id for group in batch)
            self.engine.backward(losses.sum() / pairs, last=number == len(batches) - 1)
        self._stop_if_broken(index + 1, broken)
        factor = learning_rate_factor(index, len(self.steps), self.config)
        norm = self.engine.step(factor)
        if not math.isfinite(norm):
            self._stop_if_broken(index + 1, [group.prompt_id for group in groups], what="gradient")
        means = self._means(totals)
        return {"step": index + 1, "learning_rate": self.config.learning_rate * factor, "gradient_norm": norm} | means

    def _win_rate_slopes(self, batches: Sequence[Sequence[PairGroup]], pairs: int) -> Tensor | None:
        """For win_rate_matching, a first pass over the step without gradients: its win rates are needed before any gradient."""
        if self.win_rates is None:
            return None
        totals = Totals()
        with torch.no_grad():
            for batch in batches:
                self._losses(batch, totals)
        # times the pairs, because the step's losses are divided by them
        return pairs * self.win_rates.slopes(self._win_sums(totals, self.win_rates))

    def _win_sums(self, totals: Totals, targets: WinRateTargets) -> Tensor:
        none = torch.zeros((2, targets.cells), dtype=torch.float64)
        return self.rank.total(none if totals.wins is None else totals.wins)

    def _means(self, totals: Totals) -> dict[str, float]:
        means = totals.means(self.rank)
        if self.win_rates is not None:
            means["loss"] += self.win_rates.loss(self._win_sums(totals, self.win_rates))
        return means

    def _losses(self, batch: Sequence[PairGroup], totals: Totals, slopes: Tensor | None = None) -> Tensor:
        """Losses of the pairs of one micro-batch. An empty one goes through the model all the same, with weight 0."""
        texts = [self.data.texts[text] for group in batch for text in group.texts]
        scores = self._scores(texts or [self.filler])
        if not batch:
            return 0.0 * scores
        chosen, rejected, rows = _pair_positions(batch)
        targets = PairTargets(
            margin=torch.tensor(self.data.margins[rows], dtype=torch.float32, device=scores.device),
            level=torch.tensor(self.data.levels[rows], dtype=torch.float32, device=scores.device),
        )
        losses = pair_losses(scores[chosen], scores[rejected], targets, self.config, self.scale)
        totals.add(losses, scores[chosen], scores[rejected], sum(len(text.input_ids) for text in texts))
        if self.win_rates is None:
            return losses
        wins = self.win_rates.wins(
            scores[chosen], scores[rejected], rows, self.config.win_rate_temperature * self.scale
        )
        sums = self.win_rates.sums(wins, rows)
        totals.wins = sums if totals.wins is None else totals.wins + sums
        return losses if slopes is None else losses + self.win_rates.linear_losses(wins, rows, slopes)

    def _scores(self, texts: Sequence[Rendered]) -> Tensor:
        return self.engine.score(collate(texts, self.model.pad_token_id, self.rank.device))

    def _share(self, groups: Sequence[PairGroup]) -> list[list[PairGroup]]:
        budget = self.config.micro_batch_tokens
        return share_out(groups, self.data.lengths, ranks=self.rank.world_size, budget=budget)[self.rank.number]

    def _evaluate(self) -> CurveRecord:
        totals = Totals()
        with torch.no_grad():
            for batch in self._share(self.data.held_out):
                self._losses(batch, totals)
        means = self._means(totals)
        return {f"eval_{key}": means[key] for key in EVALUATION_KEYS}

    def _record(self, record: CurveRecord) -> None:
        if self.rank.leads:
            with open(self.job.work_dir / CURVE, "a", encoding="utf-8") as curve:
                curve.write(curve_line(record))

    def _checkpoint(self, step: int) -> None:
        kept = self.config.checkpoints_kept
        save_checkpoint(self.engine.state(), step, self.job.work_dir, kept=kept, writes=self.rank.leads)
        self.rank.barrier()

    def _stop_if_broken(self, step: int, prompt_ids: list[str], *, what: str = "loss") -> None:
        everywhere = sorted(set(self.rank.gather(prompt_ids)))
        if everywhere:
            raise TrainingError(
                f"the {what} of step {step} is NaN or infinite; its {len(everywhere)} prompts are {', '.join(everywhere[:10])}"
                f"{', ...' if len(everywhere) > 10 else ''}. Look at their responses, lower the learning rate, or use dtype='float32'"
            )

    def _outcome(self) -> TrainingOutcome:
        curve = read_curve(self.job.work_dir)
        trained = [record for record in curve if record["step"] > 0]
        train_texts = [self.data.texts[text] for group in self.data.train for text in group.texts]
        return TrainingOutcome(
            model_dir=self.job.output_dir,
            steps=len(self.steps),
            ranks=self.rank.world_size,
            train_pairs=sum(len(group.pairs) for group in self.data.train),
            train_prompts=len(self.data.train),
            held_out_pairs=sum(len(group.pairs) for group in self.data.held_out),
            texts=len(train_texts),
            tokens_trained=sum(record["tokens"] for record in trained),
            tokens_if_pairwise=sum(_pairwise_tokens(group, self.data) for step in self.steps for group in step),
            prompts_cut=sum(text.prompt_cut for text in train_texts),
            responses_cut=sum(text.response_cut for text in train_texts),
            margin_scale=self.scale,
            first_loss=trained[0]["loss"],
            last_loss=trained[-1]["loss"],
            evaluation_before=_evaluation(curve[0]),
            evaluation_after=_evaluation(curve[-1]),
        )


def freeze(network: RewardNetwork, trainable_layers: int | None) -> None:
    """Leave only the last ``trainable_layers`` transformer layers and the head trainable.

    Raises:
        TrainingError: The network has fewer layers.
    """
    if trainable_layers is None:
        return
    stacks = [(name, module) for name, module in network.named_modules() if isinstance(module, torch.nn.ModuleList)]
    name, layers = max(stacks, key=lambda stack: len(stack[1]))
    if trainable_layers > len(layers):
        raise TrainingError(f"trainable_layers={trainable_layers}, but the model has {len(layers)} layers")
    network.requires_grad_(False)
    for layer in list(layers)[len(layers) - trainable_layers :]:
        layer.requires_grad_(True)
    network.classifier.get_submodule(network.head_name).requires_grad_(True)


def checkpoint_gradients(network: RewardNetwork) -> None:
    """Recompute layers in the backward pass.

    transformers does so only for layers in training mode; their children stay in evaluation mode, without dropout.
    """
    classifier: Any = network.classifier
    classifier.activation_checkpointing_enable()
    for module in network.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True


def save_model(trained: dict[str, Tensor], job: TrainingJob) -> None:
    """Write the fine-tuned model as a plain Hugging Face folder, under a temporary name that is renamed last.

    Everything that was not trained comes from the original folder; weights are float32.

    Raises:
        ArtifactError: The folder cannot be written.
    """
    original: RewardModel = load_reward_model(job.model, dtype=torch.float32, device=torch.device("cpu"))
    original.network.load_state_dict(trained, strict=False)
    partial = job.output_dir.with_name(f"{job.output_dir.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        classifier: Any = original.network.classifier
        classifier.save_pretrained(partial)
        original.tokenizer.save_pretrained(partial)
        shutil.rmtree(job.output_dir, ignore_errors=True)
        partial.replace(job.output_dir)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise ArtifactError(f"the trained model cannot be written to {job.output_dir}: {error}") from error


def _read_pairs(job: TrainingJob) -> pl.DataFrame:
    return _read_table(job.pairs_path, "pairs")


def _read_table(path: Path, name: str) -> pl.DataFrame:
    try:
        return pl.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise TableError(f"the {name} table {path} cannot be read as Parquet: {error}") from error


def _win_rate_targets(job: TrainingJob) -> WinRateTargets | None:
    if job.config.objective != "win_rate_matching":
        return None
    if job.ratings_path is None:
        raise ConfigError("objective 'win_rate_matching' needs the policy models' ratings; give the job a ratings_path")
    return WinRateTargets(validate(_read_pairs(job), PAIRS), _read_table(job.ratings_path, "ratings"))


def _pair_positions(batch: Sequence[PairGroup]) -> tuple[list[int], list[int], list[int]]:
    """Of a micro-batch's pairs: positions of chosen and of rejected among its texts, and rows of the pairs table."""
    chosen: list[int] = []
    rejected: list[int] = []
    rows: list[int] = []
    start = 0
    for group in batch:
        chosen.extend(start + pair[0] for pair in group.pairs)
        rejected.extend(start + pair[1] for pair in group.pairs)
        rows.extend(group.rows)
        start += len(group.texts)
    return chosen, rejected, rows


def _pairwise_tokens(group: PairGroup, data: TrainingData) -> int:
    return sum(data.lengths[group.texts[side]] for pair in group.pairs for side in pair)


def _evaluation(record: CurveRecord) -> dict[str, float] | None:
    if "eval_loss" not in record:
        return None
    return {key: record[f"eval_{key}"] for key in EVALUATION_KEYS}
