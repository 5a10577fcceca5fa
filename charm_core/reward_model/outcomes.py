"""What is reported of a training run: read off its data and its curve, so that an interrupted run reports the same."""

from collections.abc import Sequence

from charm_core.reward_model.batching import PairGroup
from charm_core.reward_model.jobs import CurveRecord, TrainingJob, TrainingOutcome
from charm_core.reward_model.plan import TrainingData

EVALUATION_KEYS = ("loss", "accuracy", "margin_mean", "score_spread")


def training_outcome(
    job: TrainingJob,
    data: TrainingData,
    steps: Sequence[Sequence[PairGroup]],
    curve: Sequence[CurveRecord],
    *,
    ranks: int,
    saved_step: int,
    margin_scale: float,
) -> TrainingOutcome:
    """The outcome of a run.

    Args:
        job: What was asked for.
        data: The rendered pairs.
        steps: All planned steps; the curve may end before them.
        curve: One record per step, and one before the first where there is something to evaluate on.
        ranks: Number of processes.
        saved_step: After how many steps the saved model was as it is.
        margin_scale: Unit of the margins.
    """
    trained = [record for record in curve if record["step"] > 0]
    done = steps[: len(trained)]
    train_texts = [data.texts[text] for group in data.train for text in group.texts]
    return TrainingOutcome(
        model_dir=job.output_dir,
        steps=len(done),
        ranks=ranks,
        train_pairs=sum(len(group.pairs) for group in data.train),
        train_prompts=len(data.train),
        held_out_pairs=sum(len(group.pairs) for group in data.held_out),
        texts=len(train_texts),
        tokens_trained=sum(record["tokens"] for record in trained),
        tokens_if_pairwise=sum(_pairwise_tokens(group, data) for step in done for group in step),
        prompts_cut=sum(text.prompt_cut for text in train_texts),
        responses_cut=sum(text.response_cut for text in train_texts),
        margin_scale=margin_scale,
        first_loss=trained[0]["loss"],
        last_loss=trained[-1]["loss"],
        evaluation_before=_evaluation(curve[0]),
        evaluation_after=_evaluation(next(record for record in curve if record["step"] == saved_step)),
        saved_step=saved_step,
        stopped_early=len(done) < len(steps),
        first_loss_predicted=trained[0].get("loss_predicted"),
        score_difference=trained[0].get("score_difference"),
    )


def _pairwise_tokens(group: PairGroup, data: TrainingData) -> int:
    return sum(data.lengths[group.texts[side]] for pair in group.pairs for side in pair)


def _evaluation(record: CurveRecord) -> dict[str, float] | None:
    if "eval_loss" not in record:
        return None
    # a curve begun by an earlier version has fewer numbers
    return {key: record[f"eval_{key}"] for key in EVALUATION_KEYS if f"eval_{key}" in record}
