"""What follows from the evaluations of a training run, read off its curve alone: the best one, when to stop, a collapse.

A run that goes on from a checkpoint has the curve up to there, so it decides as an uninterrupted one does.
"""

from collections.abc import Sequence

from charm_core.errors import ConfigError
from charm_core.reward_model.jobs import CurveRecord
from charm_core.reward_model.spec import BestMetric, TrainingConfig

LOWER_IS_BETTER: frozenset[BestMetric] = frozenset({"eval_loss"})


def evaluations(curve: Sequence[CurveRecord]) -> list[CurveRecord]:
    """The records that have an evaluation, in order."""
    return [record for record in curve if "eval_loss" in record]


def best_evaluation(curve: Sequence[CurveRecord], metric: BestMetric) -> CurveRecord:
    """The best evaluation, that before training included; of equal ones the first.

    Args:
        curve: At least one evaluation.
        metric: What they are compared by.
    """
    sign = 1 if metric in LOWER_IS_BETTER else -1
    return min(evaluations(curve), key=lambda record: sign * record[metric])


def is_out_of_patience(curve: Sequence[CurveRecord], config: TrainingConfig) -> bool:
    """Whether ``early_stopping_patience`` evaluations in a row brought no new best."""
    if config.early_stopping_patience is None:
        return False
    best = best_evaluation(curve, config.best_metric)["step"]
    since = [record for record in evaluations(curve) if record["step"] > best]
    return len(since) >= config.early_stopping_patience


def bests_to_return_to(curve: Sequence[CurveRecord], checkpoints: Sequence[int], metric: BestMetric) -> set[int]:
    """Steps of what a run that goes on from one of the checkpoints takes for the best evaluation so far."""
    before = [[record for record in evaluations(curve) if record["step"] <= step] for step in checkpoints]
    return {int(best_evaluation(part, metric)["step"]) for part in before if part}


def spread_left(curve: Sequence[CurveRecord]) -> float:
    """Score spread of the latest evaluation as a share of that before training; 1 where there was none to lose."""
    first, last = (record.get("eval_score_spread") for record in (evaluations(curve)[0], evaluations(curve)[-1]))
    # a curve begun by an earlier version has none
    return float(last / first) if first and last is not None else 1.0


def collapse(share: float, step: int, config: TrainingConfig) -> str | None:
    """What there is to say if the score spread has fallen to a share of that before training; None if nothing."""
    if share >= config.score_spread_floor:
        return None
    return (
        f"the score spread on held-out pairs at step {step} is {share:.3f} of that before training, below "
        f"score_spread_floor={config.score_spread_floor}: the reward model hardly tells responses apart any more. Lower the learning "
        "rate, train for fewer steps, or raise regression_weight where the objective is win_rate_matching; if the calibrated scores are "
        "meant to be so close, lower score_spread_floor"
    )


def check_can_evaluate(config: TrainingConfig, held_out_pairs: int) -> None:
    """Settings that look at evaluations have pairs to evaluate on.

    Raises:
        ConfigError: They have none.
    """
    wanting = [
        name
        for name, asked in (
            ("early_stopping_patience", config.early_stopping_patience is not None),
            ("keep='best'", config.keep == "best"),
            ("below_spread_floor='stop'", config.below_spread_floor == "stop"),
        )
        if asked
    ]
    if wanting and not held_out_pairs:
        raise ConfigError(
            f"{wanting[0]} needs held-out pairs to evaluate on, and the pairs table has none whose split is 'held_out': hold some "
            "prompts out, or leave the setting out"
        )
