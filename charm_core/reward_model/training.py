"""Fine-tuning on preference pairs: the loop, the same for plain PyTorch and for ZeRO over several ranks.

The loss of a step is exactly the mean over its pairs, however they are dealt out to ranks and micro-batches. Each distinct
response of a prompt is encoded once per step. Nothing is random but the order of the prompts, so that on CPU the same job
gives the same bytes, and a job that goes on from a checkpoint gives what an uninterrupted one gives.
"""

import hashlib
import logging
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

import polars as pl
import torch
from torch import Tensor

from charm_core.errors import ConfigError, TableError, TrainingError
from charm_core.reward_model.adapters import add_adapters
from charm_core.reward_model.batching import PairGroup
from charm_core.reward_model.broken_steps import stop_if_broken
from charm_core.reward_model.checkpoints import load_best, load_checkpoint, save_best, save_checkpoint
from charm_core.reward_model.engines import WEIGHT, Engine, PlainEngine, ZeroEngine
from charm_core.reward_model.first_step import compare_with_raw_scores, predicted_loss
from charm_core.reward_model.jobs import CurveRecord, TrainingJob, TrainingOutcome
from charm_core.reward_model.loading import arithmetic_dtype, load_reward_model
from charm_core.reward_model.losses import PairTargets, pair_losses, root_mean_square
from charm_core.reward_model.micro_batches import MicroBatches
from charm_core.reward_model.network import TrainableNetwork, checkpoint_gradients, freeze, trainable
from charm_core.reward_model.outcomes import EVALUATION_KEYS, training_outcome
from charm_core.reward_model.plan import learning_rate_factor, plan_steps, prepare
from charm_core.reward_model.ranks import Rank, Totals
from charm_core.reward_model.saving import save_model
from charm_core.reward_model.spec import TrainingConfig
from charm_core.reward_model.stopping import (
    best_evaluation,
    bests_to_return_to,
    check_can_evaluate,
    collapse,
    is_out_of_patience,
    spread_left,
)
from charm_core.reward_model.win_rates import WinRateTargets
from charm_core.reward_model.workdir import (
    append_curve,
    broken_file,
    checkpoint_steps,
    claim,
    finished_outcome,
    mark_finished,
    read_curve,
    rewind,
)
from charm_core.tables import PAIRS, validate

logger = logging.getLogger(__name__)

MEMORY = ("win_rates", "sums")
"""Name and kind of the remembered win rates in a checkpoint."""


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
        self.job, self.rank, self.config = job, rank, _with_own_swap_folder(job)
        torch.manual_seed(job.config.seed)
        (done,) = rank.told([rewind(job.work_dir) if rank.leads else 0])
        self.done = int(done)
        """Steps that the weights have behind them."""
        self.curve: list[CurveRecord] = read_curve(job.work_dir) if rank.leads else []
        self.model = load_reward_model(job.model, dtype=torch.float32, device=rank.device)
        self.pairs = validate(_read_table(job.pairs_path, "pairs"), PAIRS)
        self.data = prepare(self.pairs, self.model.tokenizer, self.model.spec)
        check_can_evaluate(self.config, sum(len(group.pairs) for group in self.data.held_out))
        self.micro_batches = MicroBatches(self.model, self.data)
        self.steps = plan_steps(self.data.train, self.config, self.data.lengths)
        rows = [row for group in self.data.train for row in group.rows]
        self.win_rates = _win_rate_targets(job, self.pairs)
        self.scale = self.config.margin_scale or root_mean_square(torch.tensor(self.data.margins[rows]))
        stored = load_checkpoint(job.work_dir, self.done) if self.done else {}
        self.remembered = self._first_memory(stored)
        self.engine = self._make_engine(trainable(self.model.network, job.model.path), stored)
        logger.info(
            "%d training pairs of %d prompts, %d held out; %d steps, %d done before",
            len(rows),
            len(self.data.train),
            sum(len(group.pairs) for group in self.data.held_out),
            len(self.steps),
            self.done,
        )

    def run(self) -> None:
        """All steps that are not done yet, with evaluations and checkpoints, or those up to an early stop."""
        if self.done == 0 and self.data.held_out:
            self._record({"step": 0} | self._evaluate())
        for index in range(self.done, len(self.steps)):
            started = time.monotonic()
            record = self._step(index)
            step = index + 1
            every = self.config.evaluate_every_steps
            evaluated = bool(self.data.held_out) and (step == len(self.steps) or (every and step % every == 0))
            if evaluated:
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
            if evaluated and self._is_enough():
                break
            if step % self.config.checkpoint_every_steps == 0 and step < len(self.steps):
                self._checkpoint(step)

    def finish(self) -> TrainingOutcome | None:
        """Write the model folder and the finished marker."""
        best = self.config.keep == "best"
        (saved,) = self.rank.told([self._best_step() if best and self.rank.leads else self.done])
        trained = self._weights_after(int(saved))
        outcome = None
        if self.rank.leads:
            save_model(trained, self.job)
            outcome = training_outcome(
                self.job,
                self.data,
                self.steps,
                self.curve,
                ranks=self.rank.world_size,
                saved_step=int(saved),
                margin_scale=self.scale,
            )
            mark_finished(self.job, outcome)
        self.rank.barrier()
        if self.config.nvme_path is not None:
            shutil.rmtree(self.config.nvme_path, ignore_errors=True)
        return outcome

    def _weights_after(self, step: int) -> dict[str, Tensor]:
        """What was trained as it was after a step, on the leading rank; all ranks take part."""
        if step == self.done:
            state = self.engine.state(moments=False)
            return {name: tensor.to("cpu", copy=True) for name, _, tensor in state if self.rank.leads}
        # the untouched model is not kept anew
        return load_best(self.job.work_dir, step) if step and self.rank.leads else {}

    def _best_step(self) -> int:
        return int(best_evaluation(self.curve, self.config.best_metric)["step"])

    def _is_enough(self) -> bool:
        """What follows from an evaluation: the best weights are kept, a collapse is told, and maybe it is time to stop."""
        decisions = [0.0, 0.0, 0.0]
        if self.rank.leads:
            no_more = is_out_of_patience(self.curve, self.config)
            decisions = [self._best_step() == self.done, no_more, spread_left(self.curve)]
        is_best, out_of_patience, share = self.rank.told(decisions)
        collapsed = collapse(share, self.done, self.config)
        if collapsed and self.config.below_spread_floor == "stop":
            raise TrainingError(collapsed)
        if collapsed and self.rank.leads:
            logger.warning(collapsed)
        if is_best and self.config.keep == "best":
            self._keep_best()
        if out_of_patience and self.done < len(self.steps):
            patience = self.config.early_stopping_patience
            logger.info("stopped after step %d: %d evaluations without a better one", self.done, patience)
        return bool(out_of_patience)

    def _make_engine(self, network: TrainableNetwork, moments: dict[tuple[str, str], Tensor]) -> Engine:
        freeze(network, self.config.trainable_layers)
        add_adapters(network, self.config)
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if (name, WEIGHT) in moments:
                    parameter.copy_(moments[name, WEIGHT])
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
        totals = Totals()
        batches = self._share(groups)
        slopes = self._win_rate_slopes(groups, batches)
        for number, batch in enumerate(batches):
            losses = self._losses(batch, totals, slopes)
            self.engine.backward(losses.sum() / pairs, last=number == len(batches) - 1)
        self._stop_if_broken(f"the loss of step {index + 1}", batches, totals)
        if index == 0:
            compared = compare_with_raw_scores(self.job, self.pairs, batches, totals, self.rank)
            predicted = predicted_loss(self.pairs, groups, self.config, self.scale, self.win_rates)
            noted = {"score_difference": compared, "loss_predicted": predicted}
        else:
            noted = {}
        factor = learning_rate_factor(index, len(self.steps), self.config)
        norm = self.engine.step(factor)
        if not math.isfinite(norm):
            self._stop_if_broken(f"the gradient of step {index + 1}", batches, totals, everything=True)
        self.done = index + 1
        self._remember(totals, len(groups))
        means = self._means(totals)
        rate = self.config.learning_rate * factor
        return {"step": index + 1, "learning_rate": rate, "gradient_norm": norm} | means | noted

    def _win_rate_slopes(self, groups: Sequence[PairGroup], batches: Sequence[Sequence[PairGroup]]) -> Tensor | None:
        """For win_rate_matching: how the loss changes with each pair's share of the win rates, times the step's pairs."""
        if self.win_rates is None:
            return None
        sums = self.remembered
        if sums is None:
            totals = Totals()
            with torch.no_grad():
                for batch in batches:
                    self._losses(batch, totals)
            sums = self._win_sums(totals, self.win_rates)
        rows = [row for group in groups for row in group.rows]
        # times the pairs, because the step's losses are divided by them
        return len(rows) * self.win_rates.slopes(sums, self.win_rates.counts(rows))

    def _remember(self, totals: Totals, prompts: int) -> None:
        if self.win_rates is None or self.remembered is None or self.config.win_rate_memory is None:
            return
        kept = max(0.0, 1 - prompts / self.config.win_rate_memory)
        self.remembered = kept * self.remembered + self._win_sums(totals, self.win_rates)

    def _first_memory(self, stored: dict[tuple[str, str], Tensor]) -> Tensor | None:
        """The win rates of the untouched reward model, weighted as ``win_rate_memory`` prompts; or those of the checkpoint."""
        if self.win_rates is None or self.config.win_rate_memory is None:
            return None
        if MEMORY in stored:
            return stored[MEMORY]
        rows = [row for group in self.data.train for row in group.rows]
        scores = self.pairs.select("chosen_score", "rejected_score")[rows].to_torch(dtype=pl.Float64)
        wins = self.win_rates.wins(scores[:, 0], scores[:, 1], rows)
        return self.win_rates.sums(wins, rows) * self.config.win_rate_memory / len(self.data.train)

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
        inputs, texts = self.micro_batches.inputs(batch)
        scores = self.engine.score(inputs)
        if not batch:
            return 0.0 * scores
        chosen, rejected, rows = _pair_positions(batch, {text: place for place, text in enumerate(texts)})
        targets = PairTargets(
            margin=torch.tensor(self.data.margins[rows], dtype=torch.float32, device=scores.device),
            level=torch.tensor(self.data.levels[rows], dtype=torch.float32, device=scores.device),
        )
        losses = pair_losses(scores[chosen], scores[rejected], targets, self.config, self.scale)
        totals.add(losses, scores[chosen], scores[rejected], sum(self.data.lengths[text] for text in texts))
        if self.win_rates is None:
            return losses
        sums = self.win_rates.sums(self.win_rates.wins(scores[chosen], scores[rejected], rows), rows)
        totals.wins = sums if totals.wins is None else totals.wins + sums
        if slopes is None:
            return losses
        temperature = self.config.win_rate_temperature * self.scale
        wins = self.win_rates.smooth_wins(scores[chosen], scores[rejected], rows, temperature)
        return losses + self.win_rates.linear_losses(wins, rows, slopes)

    def _share(self, groups: Sequence[PairGroup]) -> list[list[PairGroup]]:
        ranks, budget = self.rank.world_size, self.config.micro_batch_tokens
        return self.micro_batches.share(groups, ranks=ranks, budget=budget)[self.rank.number]

    def _evaluate(self) -> CurveRecord:
        totals = Totals()
        batches = self._share(self.data.held_out)
        with torch.no_grad():
            for batch in batches:
                self._losses(batch, totals)
        self._stop_if_broken(f"the loss on held-out pairs after step {self.done}", batches, totals)
        means = self._means(totals)
        return {f"eval_{key}": means[key] for key in EVALUATION_KEYS}

    def _record(self, record: CurveRecord) -> None:
        if self.rank.leads:
            append_curve(self.job.work_dir, record)
            self.curve.append(record)

    def _checkpoint(self, step: int) -> None:
        kept = self.config.checkpoints_kept
        memory = [] if self.remembered is None else [(*MEMORY, self.remembered)]
        save_checkpoint(chain(memory, self.engine.state()), step, self.job.work_dir, kept=kept, writes=self.rank.leads)
        self.rank.barrier()

    def _keep_best(self) -> None:
        """Keep the weights of the evaluation just made, beside those to which a checkpoint leads back."""
        work_dir = self.job.work_dir
        needed = bests_to_return_to(self.curve, checkpoint_steps(work_dir), self.config.best_metric)
        weights = self.engine.state(moments=False)
        save_best(weights, self.done, work_dir, needed=needed, writes=self.rank.leads)
        self.rank.barrier()

    def _stop_if_broken(
        self, what: str, batches: Sequence[Sequence[PairGroup]], totals: Totals, *, everything: bool = False
    ) -> None:
        file = broken_file(self.job.work_dir, self.done + 1)
        stop_if_broken(what, batches, totals, self.data, self.rank, file, everything=everything)


def _with_own_swap_folder(job: TrainingJob) -> TrainingConfig:
    """The settings, with a folder on the fast disk that no other training uses; it is the same when the job goes on."""
    if job.config.nvme_path is None:
        return job.config
    name = hashlib.sha256(str(job.work_dir.resolve()).encode()).hexdigest()[:16]
    return job.config.model_copy(update={"nvme_path": str(Path(job.config.nvme_path) / f"charm-{name}")})


def _read_table(path: Path, name: str) -> pl.DataFrame:
    try:
        return pl.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise TableError(f"the {name} table {path} cannot be read as Parquet: {error}") from error


def _win_rate_targets(job: TrainingJob, pairs: pl.DataFrame) -> WinRateTargets | None:
    if job.config.objective != "win_rate_matching":
        return None
    if job.ratings_path is None:
        raise ConfigError("objective 'win_rate_matching' needs the policy models' ratings; give the job a ratings_path")
    return WinRateTargets(pairs, _read_table(job.ratings_path, "ratings"))


def _pair_positions(batch: Sequence[PairGroup], places: Mapping[int, int]) -> tuple[list[int], list[int], list[int]]:
    """Of a micro-batch's pairs: places of chosen and of rejected among its scores, and rows of the pairs table.

    Args:
        batch: The groups of the micro-batch.
        places: Of each text among the scores.
    """
    pairs = [(group.texts[chosen], group.texts[rejected]) for group in batch for chosen, rejected in group.pairs]
    return (
        [places[chosen] for chosen, _ in pairs],
        [places[rejected] for _, rejected in pairs],
        [row for group in batch for row in group.rows],
    )
