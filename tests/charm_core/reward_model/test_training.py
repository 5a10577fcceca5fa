from pathlib import Path

import polars as pl
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from charm_core.errors import ArtifactError, TrainingError
from charm_core.reward_model.engines import deepspeed_config, parameter_groups
from charm_core.reward_model.jobs import TrainingJob
from charm_core.reward_model.loading import load_reward_model
from charm_core.reward_model.plan import learning_rate_factor, plan_steps, prepare
from charm_core.reward_model.ranks import Rank
from charm_core.reward_model.scoring import score_responses
from charm_core.reward_model.spec import RewardModelSpec, TrainingConfig
from charm_core.reward_model.training import train
from charm_core.reward_model.workdir import read_curve
from tests.charm_core.reward_model.tiny import pairs_table, save_model

HERE = Rank(number=0, world_size=1, device=torch.device("cpu"))
PLAIN = {
    "zero_stage": None,
    "learning_rate": 3e-3,
    "pairs_per_step": 8,
    "micro_batch_tokens": 150,
    "checkpoint_every_steps": 4,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: save_model(root / name, name) for name in ("qwen3", "bert")}


@pytest.fixture
def job_of(models, tmp_path):
    def make(name="run", *, architecture="qwen3", pairs=None, **changes):
        pairs_path = tmp_path / f"{name}.parquet"
        (pairs_table() if pairs is None else pairs).write_parquet(pairs_path)
        return TrainingJob(
            model=RewardModelSpec(path=str(models[architecture]), max_length=64),
            pairs_path=pairs_path,
            output_dir=tmp_path / f"{name}-model",
            work_dir=tmp_path / f"{name}-work",
            config=TrainingConfig(**(PLAIN | changes)),
        )

    return make


def run(job):
    outcome = train(job, HERE)
    return outcome, read_curve(job.work_dir)


def losses(curve):
    return [record["loss"] for record in curve if record["step"] > 0]


def naive_losses(job):
    """Bradley-Terry with every response of every pair encoded anew and alone, by plain transformers and PyTorch."""
    torch.manual_seed(0)
    model = load_reward_model(job.model)
    data = prepare(pl.read_parquet(job.pairs_path), model.tokenizer, model.spec)
    classifier = AutoModelForSequenceClassification.from_pretrained(job.model.path).eval()
    matrices = [parameter for parameter in classifier.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in classifier.parameters() if parameter.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": job.config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    )

    def score(text):
        inputs = {"input_ids": torch.tensor([text.input_ids])}
        if text.token_type_ids is None:
            return classifier.score(classifier.model(**inputs).last_hidden_state[0, -1])[0]
        return classifier(**inputs, token_type_ids=torch.tensor([text.token_type_ids])).logits[0, 0]

    steps = plan_steps(data.train, job.config, data.lengths)
    found = []
    for number, step in enumerate(steps):
        each = [
            -torch.nn.functional.logsigmoid(
                score(data.texts[group.texts[chosen]]) - score(data.texts[group.texts[rejected]])
            )
            for group in step
            for chosen, rejected in group.pairs
        ]
        loss = torch.stack(each).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(classifier.parameters(), job.config.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = job.config.learning_rate * learning_rate_factor(number, len(steps), job.config)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("architecture", ["qwen3", "bert"])
def test_the_curve_is_that_of_a_naive_loop(job_of, architecture):
    job = job_of(architecture=architecture, epochs=1.5)
    outcome, curve = run(job)
    assert outcome.steps == len(losses(curve)) == 7
    assert {record["pairs"] for record in curve[1:]} == {6, 3}
    assert losses(curve) == pytest.approx(naive_losses(job), abs=2e-5)


def test_encoding_a_response_once_or_in_every_pair_gives_the_same_curve(job_of):
    table = pairs_table(prompts=8, models="abcd", held_out=0)
    apart = table.with_columns(prompt_id=pl.col("prompt_id") + pl.int_range(pl.len()).cast(pl.String))
    together, curve_together = run(job_of("together", pairs=table, pairs_per_step=10**6, epochs=6))
    separate, curve_apart = run(job_of("apart", pairs=apart, pairs_per_step=10**6, epochs=6))
    assert losses(curve_together) == pytest.approx(losses(curve_apart), abs=1e-5)
    assert [r["gradient_norm"] for r in curve_together] == pytest.approx(
        [r["gradient_norm"] for r in curve_apart], rel=1e-3
    )
    assert together.tokens_if_pairwise == separate.tokens_trained == 3 * together.tokens_trained


@pytest.mark.parametrize(
    "changes", [{"micro_batch_tokens": 1}, {"micro_batch_tokens": 10**6}, {"gradient_checkpointing": True}]
)
def test_how_a_step_is_cut_up_does_not_change_the_curve(job_of, changes):
    _, expected = run(job_of("plain"))
    _, found = run(job_of("cut", **changes))
    assert losses(found) == pytest.approx(losses(expected), abs=1e-5)


@pytest.mark.parametrize("architecture", ["qwen3", "bert"])
def test_packed_rows_give_the_curve_of_padded_batches(job_of, architecture):
    packed = job_of("packed", architecture=architecture, epochs=2)
    padded = job_of("padded", architecture=architecture, epochs=2)
    padded = padded.model_copy(update={"model": padded.model.model_copy(update={"batching": "padded"})})
    _, found = run(packed)
    _, expected = run(padded)
    assert losses(found) == pytest.approx(losses(expected), abs=1e-5)
    norms = [[record.get("gradient_norm", 0) for record in curve] for curve in (found, expected)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_a_step_of_so_many_tokens_has_the_mean_loss_of_its_pairs(job_of):
    job = job_of(tokens_per_step=120, epochs=1.5)
    outcome, curve = run(job)
    assert {record["tokens"] <= 120 for record in curve[1:]} == {True}
    assert len({record["pairs"] for record in curve[1:]}) > 1
    assert outcome.steps == len(curve) - 1
    assert losses(curve) == pytest.approx(naive_losses(job), abs=2e-5)


def test_the_same_job_twice_gives_the_same_bytes(job_of):
    first, second = job_of("first", architecture="bert"), job_of("second", architecture="bert")
    assert run(first)[1] == run(second)[1]
    for file in sorted(path.name for path in first.output_dir.iterdir()):
        assert (first.output_dir / file).read_bytes() == (second.output_dir / file).read_bytes()
    other = job_of("other", architecture="bert", seed=1)
    assert losses(run(other)[1]) != losses(read_curve(first.work_dir))


@pytest.mark.parametrize("objective", ["bradley_terry", "margin_regression"])
def test_training_learns_what_the_pairs_say(job_of, objective):
    pairs = pairs_table(prompts=40, held_out=0)
    outcome, curve = run(job_of(pairs=pairs, objective=objective, epochs=6))
    early, late = curve[:10], curve[-10:]
    assert sum(record["loss"] for record in late) < 0.5 * sum(record["loss"] for record in early)
    assert sum(record["accuracy"] for record in late) > 8.5
    assert outcome.held_out_pairs == 0
    assert outcome.evaluation_after is None


def test_the_saved_folder_is_plain_and_scores_as_the_trained_network(job_of):
    pairs = pairs_table()
    outcome, curve = run(job_of(pairs=pairs, evaluate_every_steps=2))
    assert [record["step"] for record in curve if "eval_loss" in record] == [0, 2, 4, 5]
    assert outcome.evaluation_before != outcome.evaluation_after
    held_out = pairs.filter(split="held_out")
    sides = [
        held_out.select(
            "prompt_id", policy_model=f"{side}_model", response=pl.col(side).list.first().struct.field("content")
        )
        for side in ("chosen", "rejected")
    ]
    prompts = held_out.unique("prompt_id").select("prompt_id", prompt_set=pl.lit("x"), messages="prompt")
    spec = RewardModelSpec(path=str(outcome.model_dir), max_length=64)
    scores = score_responses(spec, prompts, pl.concat(sides).unique()).scores
    joined = held_out.select("prompt_id", "chosen_model", "rejected_model")
    for side in ("chosen", "rejected"):
        renamed = scores.rename({"policy_model": f"{side}_model", "score": side})
        joined = joined.join(renamed, on=["prompt_id", f"{side}_model"])
    assert joined.height == outcome.held_out_pairs == 9
    assert (joined["chosen"] - joined["rejected"]).mean() == pytest.approx(
        outcome.evaluation_after["margin_mean"], abs=1e-5
    )
    classifier, report = AutoModelForSequenceClassification.from_pretrained(outcome.model_dir, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert classifier.config.num_labels == 1
    assert classifier.config.attention_dropout == 0.3
    assert not list(outcome.model_dir.parent.glob("*.partial"))


def test_a_finished_job_is_not_run_again(job_of):
    job = job_of()
    outcome, curve = run(job)
    touched = {path: path.stat().st_mtime_ns for path in job.output_dir.iterdir()}
    assert train(job, HERE) == outcome
    assert {path: path.stat().st_mtime_ns for path in job.output_dir.iterdir()} == touched
    assert read_curve(job.work_dir) == curve
    assert not (job.work_dir / "checkpoints").exists()


def test_a_lost_model_folder_is_made_again(job_of):
    job = job_of()
    outcome, _ = run(job)
    before = (job.output_dir / "model.safetensors").read_bytes()
    for path in job.output_dir.iterdir():
        path.unlink()
    assert train(job, HERE) == outcome
    assert (job.output_dir / "model.safetensors").read_bytes() == before


def test_a_work_folder_belongs_to_one_job(job_of):
    job = job_of()
    run(job)
    other = job.model_copy(update={"config": job.config.model_copy(update={"learning_rate": 1e-5})})
    with pytest.raises(TrainingError, match="another training job, which differs in config"):
        train(other, HERE)


def test_only_the_last_layers_and_the_head_are_trained_if_asked(job_of):
    job = job_of(trainable_layers=1)
    outcome, _ = run(job)
    before, after = (load_reward_model(RewardModelSpec(path=str(path))) for path in (job.model.path, outcome.model_dir))
    old = dict(before.network.classifier.named_parameters())
    changed = {name for name, new in after.network.classifier.named_parameters() if not torch.equal(new, old[name])}
    assert "score.weight" in changed
    assert {name for name in changed if not name.startswith("model.layers.1.")} == {"score.weight"}
    with pytest.raises(TrainingError, match="the model has 2 layers"):
        train(job_of("deeper", trainable_layers=3), HERE)


def test_the_head_may_learn_at_its_own_rate(models):
    network = load_reward_model(RewardModelSpec(path=str(models["bert"]))).network
    groups = parameter_groups(network, TrainingConfig(learning_rate=1e-5, head_learning_rate=1e-3, weight_decay=0.1))
    assert [(group["peak"], group["weight_decay"]) for group in groups] == [
        (1e-5, 0.1),
        (1e-5, 0),
        (1e-3, 0.1),
        (1e-3, 0),
    ]
    assert [parameter.shape for group in groups[2:] for parameter in group["params"]] == [(1, 32), (1,)]
    assert sum(len(group["params"]) for group in groups) == len(list(network.parameters()))


def test_deepspeed_is_told_what_is_kept_where(models, monkeypatch):
    network = load_reward_model(RewardModelSpec(path=str(models["bert"]))).network
    parts = ("offload_optimizer", "offload_param")

    def places(**settings):
        zero = deepspeed_config(network, TrainingConfig(**settings), 2)["zero_optimization"]
        return [zero.get(part, {}).get("device") for part in parts], zero.get(parts[0], {}).get("nvme_path")

    assert places() == ([None, None], None)
    assert places(offload="cpu", zero_stage=2) == (["cpu", None], None)
    assert places(offload="cpu", zero_stage=3) == (["cpu", "cpu"], None)
    # DeepSpeed on a CPU would round weights on disk to bfloat16
    assert places(offload="nvme", nvme_path="/disk") == (["nvme", "cpu"], "/disk")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert places(offload="nvme", nvme_path="/disk") == (["nvme", "nvme"], "/disk")
    on_gpu = deepspeed_config(network, TrainingConfig(offload="nvme", nvme_path="/disk"), 2)["zero_optimization"]
    largest = max(parameter.numel() for parameter in network.parameters())
    assert on_gpu["offload_param"]["buffer_size"] >= largest / 2
    assert on_gpu["overlap_comm"]


def test_bfloat16_arithmetic_stays_close(job_of):
    _, expected = run(job_of("float32"))
    _, found = run(job_of("bfloat16", dtype="bfloat16"))
    assert losses(found) != losses(expected)
    assert losses(found)[0] == pytest.approx(losses(expected)[0], abs=0.02)


def test_a_loss_that_is_not_a_number_stops_with_step_and_prompts(job_of):
    job = job_of(learning_rate=1e30, warmup_ratio=0)
    with pytest.raises(TrainingError, match=r"of step 2 is NaN or infinite; its \d prompts are p0\d\d"):
        train(job, HERE)
    assert not job.output_dir.exists()
    assert [record["step"] for record in read_curve(job.work_dir)] == [0, 1]
    assert not (job.work_dir / "checkpoints").exists()


def test_one_broken_prompt_is_named(job_of):
    table = pairs_table()
    infinite = pl.when(prompt_id="p007").then(1e200).otherwise(pl.col("chosen_calibrated"))
    job = job_of(
        pairs=table.with_columns(chosen_calibrated=infinite),
        objective="margin_regression",
        margin_scale=1.0,
        pairs_per_step=1,
    )
    with pytest.raises(TrainingError, match="its 1 prompts are p007"):
        train(job, HERE)


def test_folders_that_cannot_be_written_are_errors(job_of, tmp_path):
    (tmp_path / "file").write_text("")
    job = job_of()
    with pytest.raises(ArtifactError, match=r"work folder .* cannot be made"):
        train(job.model_copy(update={"work_dir": tmp_path / "file" / "work"}), HERE)
    with pytest.raises(ArtifactError, match="cannot be written"):
        train(job.model_copy(update={"output_dir": tmp_path / "file" / "model"}), HERE)
    assert Path(tmp_path / "file").read_text() == ""


def test_both_splits_keep_their_prompts(job_of):
    table = pairs_table(prompts=5, held_out=2)
    outcome, _ = run(job_of(pairs=table))
    assert (outcome.train_prompts, outcome.train_pairs, outcome.held_out_pairs) == (3, 9, 6)
