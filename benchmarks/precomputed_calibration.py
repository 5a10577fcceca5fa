"""A calibration at real size without its reward model: every other step, with its store, Prefect and MLflow.

    python -m benchmarks.precomputed_calibration --prompts 20000 --models 7 [--training 60]

Runs the flow ``calibrate`` itself. Only what a reward model computes is replaced: a score is drawn once per response, and training
waits, tells its loss twice a second, and leaves a folder of a few bytes whose scores are the drawn ones, changed a little. It tells
its loss as a training does, by its log and its curve, but while that is read and passed on to Prefect and MLflow it stands still.
A training would go on, in processes of its own, so that what is measured here is the most that it can be held up.
Responses are as long as the 57,885 of AlpacaEval and Arena-Hard in CHARM's test data: log-normal, median 1,677 characters. The
first call for a size only writes the inputs. Prints one JSON object: seconds and CPU seconds of the flow, of the bodies of steps
that compute (training does not), of the waiting of trainings and of all else in the steps of training; the seconds of each step,
and the peak memory of this process. ``benchmarks.orchestration`` starts it.
"""

import argparse
import json
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

import flows.calibrate as calibrate_flow
import tasks.promotion
import tasks.training
from charm_core.mismatch import own_ratings
from charm_core.reward_model.jobs import ScoringSummary, TrainingJob, TrainingOutcome
from charm_core.reward_model.spec import RewardModelSpec
from charm_core.reward_model.workdir import CURVE, append_curve
from charm_core.tables import SCORES
from flows.console import quiet_console
from flows.runs import CalibrationRun
from flows.settings import RuntimeSettings
from flows.sources import Sources, gather_answers
from tasks.arena import ArenaConfig
from tasks.caching import Step, current_store
from tasks.prompts import ResponsesConfig, ResponseSet
from tasks.scoring import RewardModelRef, Scored
from tasks.store import file_digest
from tasks.training_launch import CurveReader

MEDIAN_CHARACTERS = 1677
LOG_SPREAD = 0.76
"""Of response lengths: half of the distance between the logarithms of the quartiles, over that of the normal distribution."""
PROMPT_CHARACTERS = 160
TRAINING = "train_reward_model"
STEPS_PER_SECOND = 2
"""Of a training that only waits: so often it tells its loss."""


def write_inputs(folder: Path, prompts: int, models: int) -> None:
    """A table of responses, one of their scores, and a board that mostly agrees with them."""
    rng = np.random.default_rng(0)
    names = [f"policy-model-{number}" for number in range(models)]
    corpus = " ".join(f"word{number}" for number in rng.integers(0, 30_000, 2_000_000))
    texts = prompts * models
    lengths = np.exp(rng.normal(np.log(MEDIAN_CHARACTERS), LOG_SPREAD, texts)).astype(int).clip(1, 60_000)
    starts = rng.integers(0, len(corpus) - 60_000, texts)
    asked = [f"{number}: {corpus[at : at + PROMPT_CHARACTERS]}" for number, at in enumerate(starts[:prompts].tolist())]
    responses = pl.DataFrame(
        {
            "prompt_id": [f"p{number}" for number in range(prompts) for _ in names],
            "prompt": [text for text in asked for _ in names],
            "policy_model": names * prompts,
            "response": [corpus[at : at + size] for at, size in zip(starts.tolist(), lengths.tolist(), strict=True)],
        }
    )
    responses.write_parquet(folder / "responses.parquet")
    skill = np.linspace(0, 1.5, models)
    drawn = rng.gumbel(size=(prompts, models)) + skill
    worth = pl.DataFrame({"prompt_id": [f"p{n}" for n in range(prompts)]}).join(
        pl.DataFrame({"policy_model": names}), how="cross", maintain_order="left"
    )
    board = own_ratings(worth.with_columns(pl.Series("score", drawn.ravel())).head(2000 * models))
    board.with_columns(rating=pl.col("rating") + pl.Series(rng.normal(0, 40, models))).write_csv(folder / "board.csv")
    np.save(folder / "drawn.npy", drawn + 0.8 * np.isin(np.arange(models), (0, 1)))


class PrecomputedModel:
    """What stands in for scoring."""

    def __init__(self, drawn: np.ndarray, spec: RewardModelSpec) -> None:
        self._drawn, self._spec, self._table = drawn, spec, pl.DataFrame()
        self.untouched = RewardModelRef(spec=spec, digest="untouched")

    def know(self, responses: ResponseSet) -> None:
        """Say which responses the drawn scores belong to."""
        rows = current_store().read_frame(responses.responses).select("prompt_id", "policy_model")
        self._table = rows.with_columns(score=pl.Series(self._drawn.ravel()[: rows.height]))

    def score(self, model: RewardModelRef, responses: ResponseSet) -> Scored:
        """The drawn scores of these responses; of a trained model, the gaps between policy models made smaller."""
        store = current_store()
        share = 1.0 if model.digest == self.untouched.digest else 0.7 + int(model.digest[:2], 16) / 1000
        rows = store.read_frame(responses.responses).select("prompt_id", "policy_model")
        scores = rows.join(self._table, on=["prompt_id", "policy_model"], how="left", maintain_order="left")
        summary = ScoringSummary(
            texts=rows.height, distinct_texts=rows.height, tokens=rows.height, padding_share=0.0, max_length=1024,
            longest_text=1024, prompts_cut=0, responses_cut=0, empty_responses=0, tie_rate=0.0, smallest_gap=None,
        )  # fmt: skip
        table = scores.with_columns(score=pl.col("score") * share)
        return Scored(scores=store.write_table(table, SCORES), summary=summary)


def idle_training(seconds: float, spent: "Spent") -> Callable[..., TrainingOutcome]:
    """A training that waits and tells its loss."""

    def train(job: TrainingJob, on_step: Callable[[Any], None], log: Callable[[str], None]) -> TrainingOutcome:
        for folder in (job.output_dir, job.work_dir):
            folder.mkdir(parents=True, exist_ok=True)
        curve = CurveReader(job.work_dir / CURVE, on_step)
        steps = max(2, round(seconds * STEPS_PER_SECOND))
        for step in range(1, steps + 1):
            with spent.waited.counted():  # on a busy machine longer than asked for
                time.sleep(seconds / steps)
            loss = 0.7 - 0.1 * step / steps
            append_curve(job.work_dir, {"step": step, "loss": loss})
            log(f"step {step} of {steps}: loss {loss:.4f}, accuracy 0.500, 1000 tokens/s")
            curve.poll()
        (job.output_dir / "weights.txt").write_text(file_digest(job.pairs_path))
        return TrainingOutcome(
            model_dir=job.output_dir, steps=steps, ranks=1, train_pairs=1, train_prompts=1, held_out_pairs=0, texts=1,
            tokens_trained=1, tokens_if_pairwise=1, prompts_cut=0, responses_cut=0, margin_scale=None, first_loss=0.7,
            last_loss=0.6, evaluation_before=None, evaluation_after=None,
        )  # fmt: skip

    return train


@dataclass
class Cost:
    """Of some part of the run."""

    seconds: float = 0.0
    cpu: float = 0.0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Add what a ``with`` block takes."""
        started, busy = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - started
            self.cpu += time.process_time() - busy


@dataclass
class Spent:
    """What the run took, and its parts."""

    flow: Cost = field(default_factory=Cost)
    steps: dict[str, Cost] = field(default_factory=lambda: defaultdict(Cost))
    bodies: Cost = field(default_factory=Cost)
    """Of the steps, without training."""
    waited: Cost = field(default_factory=Cost)
    """What trainings only waited."""

    def watch(self) -> None:
        """Count every call of a step, and its body."""
        call: Callable[..., Any] = Step.__call__
        watched = {TRAINING}

        def counted(step: Step[..., Any], *args: Any, **kwargs: Any) -> Any:
            if step.name not in watched:
                watched.add(step.name)
                step._task.fn = self._body(step._task.fn)
            with self.steps[step.name].counted():
                return call(step, *args, **kwargs)

        Step.__call__ = counted  # type: ignore[method-assign]

    def _body(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            with self.bodies.counted():
                return function(*args, **kwargs)

        return counted

    def found(self) -> dict[str, Any]:
        """As plain values."""
        waited = Cost(self.waited.seconds)  # whatever computes meanwhile is none of the work
        trained = self.steps[TRAINING]
        training = Cost(trained.seconds - waited.seconds, trained.cpu)
        parts = {"flow": self.flow, "bodies": self.bodies, "waited": waited, "training": training}
        slowest = sorted(self.steps.items(), key=lambda item: -item[1].seconds)
        return {
            **{name: asdict(cost) for name, cost in parts.items()},
            "steps": {name: cost.seconds for name, cost in slowest},
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }


@contextmanager
def replaced(model: PrecomputedModel, training: float, spent: Spent) -> Iterator[None]:
    """Put the model in the flow's way."""

    def sources(run: CalibrationRun) -> Sources:
        answers = gather_answers(run.arena, run.responses, None)
        model.know(answers.responses)
        return Sources(name="precomputed", answers=answers, reward_model=model.untouched)

    calibrate_flow.calibration_sources = sources  # type: ignore[assignment]
    calibrate_flow.score_responses = tasks.promotion.score_responses = model.score  # type: ignore[assignment]
    tasks.training.run_training = idle_training(training / 2, spent)  # type: ignore[assignment] # there are two
    with quiet_console():
        yield


def main() -> None:
    """Run once, and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=20_000)
    parser.add_argument("--models", type=int, default=7)
    parser.add_argument("--training", type=float, default=0.0, help="seconds that the two trainings wait in all")
    options = parser.parse_args()
    folder = RuntimeSettings().home / f"inputs-{options.prompts}"
    if not folder.exists():  # in a process of its own, so that its memory does not count
        folder.mkdir(parents=True)
        write_inputs(folder, options.prompts, options.models)
        print(f"wrote {folder}; run again", file=sys.stderr)
        return
    spec = RewardModelSpec(path=str(folder), max_length=1024)
    run = CalibrationRun(
        name=f"precomputed {options.prompts}",
        arena=ArenaConfig(source=str(folder / "board.csv"), date="2026-09-13"),
        responses=ResponsesConfig(source=str(folder / "responses.parquet")),
        reward_model=spec,
    )
    spent = Spent()
    spent.watch()
    with replaced(PrecomputedModel(np.load(folder / "drawn.npy"), spec), options.training, spent), spent.flow.counted():
        calibrate_flow.calibrate(run)
    print(json.dumps(spent.found()))


if __name__ == "__main__":
    main()
