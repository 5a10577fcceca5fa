"""The step that fine-tunes, for reward models that are not plain classifiers: store in, store out."""

import logging

import pytest

from charm_core.reward_model.spec import RewardModelSpec, TrainingConfig
from charm_core.tables import PAIRS, PROMPTS, RESPONSES, SCORES
from tasks.preflight import check_before_run
from tasks.prompts import ResponseSet
from tasks.scoring import identify_reward_model, score_responses
from tasks.store import ArtifactStore
from tasks.training import _shown_steps, train_reward_model
from tests.charm_core.reward_model.kinds import save_adapter, save_causal, save_value_head
from tests.charm_core.reward_model.tiny import pairs_table, prompts_and_responses


@pytest.mark.parametrize(
    ("kind", "becomes", "zero_stage"),
    [("value_head", "value_head", 3), ("lora", "classifier", None)],
    ids=["GRM under ZeRO-3", "LoRA, plainly"],
)
def test_a_reward_model_is_checked_trained_stored_and_scored_with(tmp_path, kind, becomes, zero_stage):
    store = ArtifactStore(url=str(tmp_path / "store"), work_folder=str(tmp_path / "work"))
    base = save_causal(tmp_path / "base")
    folder = save_value_head(tmp_path / "rm") if kind == "value_head" else save_adapter(tmp_path / "rm", base)
    model = identify_reward_model(RewardModelSpec(path=str(folder), max_length=64))
    ranks = {} if zero_stage is None else {"ranks": 2, "threads_per_rank": 1}
    config = TrainingConfig(
        zero_stage=zero_stage, learning_rate=3e-3, pairs_per_step=8, micro_batch_tokens=150, **ranks
    )
    assert [one.rule for one in check_before_run(store, model, None, config).findings] == ["memory"]

    pairs = store.write_table(pairs_table(), PAIRS)
    trained = train_reward_model.function(store, "tiny", model, pairs, None, config)
    assert trained.summary.ranks == (2 if zero_stage else 1)
    assert trained.summary.last_loss < trained.summary.first_loss
    assert (trained.model.spec.base_model, trained.model.spec.kind) == (None, "auto")
    assert trained.model.digest != model.digest

    base.rename(tmp_path / "gone")
    prompts, responses = prompts_and_responses(4)
    asked = ResponseSet(
        prompts=store.write_table(prompts, PROMPTS), responses=store.write_table(responses, RESPONSES), policy_models=("a", "b", "c")
    )  # fmt: skip
    report = check_before_run(store, trained.model, asked, config)
    assert (report.kind, [one.rule for one in report.findings]) == (becomes, ["memory"])
    scored = score_responses.function(store, trained.model, asked)
    assert store.read_table(scored.scores, SCORES).height == responses.height


def test_lines_are_logged_but_of_fast_steps_only_some(caplog: pytest.LogCaptureFixture):
    """A run in Prefect has what a person reads, not a line for each of many thousand steps."""
    told = []
    line = _shown_steps(lambda done, total, note="": told.append((done, total, note)))
    with caplog.at_level(logging.INFO):
        line("rank 0: step 7 of 90: loss 0.6931, accuracy 0.500, 1000 tokens/s")
        line("rank 0: step 8 of 90: loss 0.6930, accuracy 0.500, 1000 tokens/s")
        line("evaluated: accuracy 75% of pairs")
    assert told == [(7, 90, "loss 0.6931"), (8, 90, "loss 0.6930")]
    assert [record.getMessage().partition(",")[0] for record in caplog.records] == [
        "rank 0: step 7 of 90: loss 0.6931",
        "evaluated: accuracy 75% of pairs",
    ]


def test_what_the_processes_print_is_logged_line_by_line_while_they_work(tmp_path):
    store = ArtifactStore(url=str(tmp_path / "store"), work_folder=str(tmp_path / "work"))
    model = identify_reward_model(RewardModelSpec(path=str(save_value_head(tmp_path / "rm")), max_length=64))
    config = TrainingConfig(zero_stage=None, pairs_per_step=8, micro_batch_tokens=150, threads_per_rank=1)
    lines: dict[str, bool] = {}

    class Seen(logging.Handler):
        """Which lines came, and whether the training was over by then."""

        def emit(self, record):
            over = any((tmp_path / "work").glob("train-*/progress/finished.json"))
            lines[record.getMessage().partition(": loss")[0]] = over

    # outside of a Prefect run; within one it is the run's own logger, see tasks.publishing.run_logger
    logger, handler = logging.getLogger("charm"), Seen()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        trained = train_reward_model.function(
            store, "tiny", model, store.write_table(pairs_table(), PAIRS), None, config
        )
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    steps = [line for line in lines if " step " in line]
    assert steps[0].rpartition(": ")[2] == f"step 1 of {trained.summary.steps}"
    assert next(lines[line] for line in steps) is False
