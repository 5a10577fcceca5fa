"""Fine-tuning of every architecture and kind of reward model, plain; GRM and LoRA adapters also under ZeRO-3."""

from pathlib import Path

import polars as pl
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from charm_core.errors import TrainingError
from charm_core.reward_model.jobs import TrainingJob
from charm_core.reward_model.loading import load_reward_model
from charm_core.reward_model.plan import learning_rate_factor, plan_steps, prepare
from charm_core.reward_model.preflight.run import preflight
from charm_core.reward_model.ranks import Rank
from charm_core.reward_model.spec import RewardModelSpec, TrainingConfig
from charm_core.reward_model.text_scoring import score_texts
from charm_core.reward_model.training import train
from charm_core.reward_model.workdir import read_curve
from tasks.training_launch import run_training
from tests.charm_core.reward_model.kinds import (
    change_json,
    save_adapter,
    save_causal,
    save_classifier,
    save_gated,
    save_value_head,
    stored_body,
)
from tests.charm_core.reward_model.tiny import ARCHITECTURES, held_out_margin, pairs_table, save_model

HERE = Rank(number=0, world_size=1, device=torch.device("cpu"))
PLAIN = {
    "zero_stage": None,
    "learning_rate": 3e-3,
    "pairs_per_step": 8,
    "micro_batch_tokens": 150,
    "checkpoint_every_steps": 4,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        "value_head": save_value_head(root / "grm", auto_map={"AutoModel": "modeling_grm.GRM"}),
        "lora": save_adapter(root / "lora", save_causal(root / "base")),
        "gated": save_gated(root / "gated"),
        "classifier": save_classifier(root / "classifier"),
        **{name: save_model(root / name, name) for name in ARCHITECTURES},
    }


@pytest.fixture
def job_of(folders, tmp_path):
    def make(kind, name="run", spec=(), **changes):
        pairs_path = tmp_path / "pairs.parquet"
        pairs_table().write_parquet(pairs_path)
        return TrainingJob(
            model=RewardModelSpec(path=str(folders[kind]), max_length=64, **dict(spec)),
            pairs_path=pairs_path,
            output_dir=tmp_path / f"{name}-model",
            work_dir=tmp_path / f"{name}-work",
            config=TrainingConfig(**(PLAIN | changes)),
        )

    return make


def losses(job):
    return [record["loss"] for record in read_curve(job.work_dir) if record["step"] > 0]


def naive_losses(job):
    """Bradley-Terry with every response of every pair scored alone, on a GRM put together by hand."""
    model = load_reward_model(job.model)
    data = prepare(pl.read_parquet(job.pairs_path), model.tokenizer, model.spec)
    body = stored_body(Path(job.model.path))
    weights = load_file(Path(job.model.path) / "model.safetensors")
    head = torch.nn.Sequential(torch.nn.Linear(32, 24), torch.nn.ReLU(), torch.nn.Linear(24, 1))
    head.load_state_dict({name.removeprefix("v_head.summary."): weights[name] for name in weights if "v_head" in name})
    parameters = [*body.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": job.config.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
    )

    def score(text):
        return head(body(input_ids=torch.tensor([text.input_ids])).last_hidden_state[0, -1])[0]

    steps = plan_steps(data.train, job.config)
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
        torch.nn.utils.clip_grad_norm_(parameters, job.config.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = job.config.learning_rate * learning_rate_factor(number, len(steps), job.config)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def test_the_curve_of_a_value_head_is_that_of_a_naive_loop(job_of):
    job = job_of("value_head")
    train(job, HERE)
    assert losses(job) == pytest.approx(list(naive_losses(job)), abs=2e-5)


def matrix_products(job):
    """Train, and count how often a linear layer was computed for a gradient."""
    computed = []

    def note(module, taken, made):
        if isinstance(module, nn.Linear) and torch.is_grad_enabled():
            computed.append(module)

    hook = register_module_forward_hook(note)
    try:
        outcome = train(job, HERE)
    finally:
        hook.remove()
    return outcome, len(computed)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_and_recomputed_every_architecture_trains_as_padded(job_of, architecture):
    """Of DeBERTa no rows can be packed, so that its batches are padded both times."""
    settings = {"pairs_per_step": 12, "learning_rate": 1e-3, "micro_batch_tokens": 10**6}
    plain = job_of(architecture, "plain", spec={"batching": "padded"}.items(), **settings)
    batching = "padded" if architecture == "deberta" else "packed"
    frugal = job_of(
        architecture, "frugal", spec={"batching": batching}.items(), **settings, gradient_checkpointing=True
    )
    _, least = matrix_products(plain)
    outcome, found = matrix_products(frugal)
    assert found > 1.5 * least, "nothing was recomputed"
    assert len(losses(frugal)) == 3
    assert losses(frugal) == pytest.approx(losses(plain), abs=1e-5)
    norms = [[record.get("gradient_norm", 0) for record in read_curve(job.work_dir)] for job in (frugal, plain)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    assert held_out_margin(outcome.model_dir, frugal) == pytest.approx(
        outcome.evaluation_after["margin_mean"], abs=1e-5
    )
    assert abs(outcome.evaluation_after["margin_mean"] - outcome.evaluation_before["margin_mean"]) > 1e-3


@pytest.mark.parametrize(("kind", "becomes"), [("value_head", "value_head"), ("lora", "classifier")])
def test_what_is_saved_is_loaded_again_and_scores_as_the_trained_network(job_of, kind, becomes):
    job = job_of(kind, epochs=3)
    outcome = train(job, HERE)
    assert losses(job)[-1] < losses(job)[0]
    assert outcome.evaluation_before != outcome.evaluation_after
    spec = job.model.saved_at(str(outcome.model_dir))
    assert preflight(spec, training=job.config).findings == ()
    model = load_reward_model(spec)
    assert model.spec.kind == becomes
    held_out = pl.read_parquet(job.pairs_path).filter(split="held_out")
    data = prepare(pl.read_parquet(job.pairs_path), model.tokenizer, model.spec)
    scores = score_texts(model, list(data.texts))
    margins = [scores[group.texts[c]] - scores[group.texts[r]] for group in data.held_out for c, r in group.pairs]
    assert len(margins) == held_out.height
    assert sum(margins) / len(margins) == pytest.approx(outcome.evaluation_after["margin_mean"], abs=1e-5)
    assert not list(outcome.model_dir.glob("adapter*"))


def test_a_trained_adapter_needs_its_base_model_no_more(job_of, folders):
    job = job_of("lora")
    outcome = train(job, HERE)
    base = folders["lora"].with_name("base")
    hidden = base.rename(base.with_name("hidden"))
    try:
        assert load_reward_model(job.model.saved_at(str(outcome.model_dir))).spec.kind == "classifier"
    finally:
        hidden.rename(base)


@pytest.mark.parametrize("kind", ["value_head", "lora"])
def test_two_zero_3_ranks_give_the_curve_and_model_of_plain_training(job_of, kind):
    plain = job_of(kind, "plain")
    zero = job_of(kind, "zero", zero_stage=3, ranks=2, threads_per_rank=1)
    outcome = run_training(zero)
    assert outcome.ranks == 2
    train(plain, HERE)
    assert losses(zero) == pytest.approx(losses(plain), abs=2e-4)
    ours, theirs = (load_file(job.output_dir / "model.safetensors") for job in (zero, plain))
    assert ours.keys() == theirs.keys()
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 1e-2
    assert preflight(zero.model.saved_at(str(zero.output_dir))).kind == {"lora": "classifier"}.get(kind, kind)


def test_only_the_last_layers_and_the_value_head_are_trained_if_asked(job_of):
    job = job_of("value_head", trainable_layers=1, gradient_checkpointing=True)
    outcome = train(job, HERE)
    before, after = (load_file(Path(path) / "model.safetensors") for path in (job.model.path, outcome.model_dir))
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert {name.split(".")[0] for name in changed} == {"v_head", "model"}
    assert {name for name in changed if not name.startswith(("v_head.", "model.layers.1."))} == set()


def test_recomputing_activations_does_not_change_the_curve(job_of):
    plain, recomputed = job_of("value_head", "plain"), job_of("value_head", "again", gradient_checkpointing=True)
    train(plain, HERE)
    train(recomputed, HERE)
    assert losses(recomputed) == pytest.approx(losses(plain), abs=1e-5)


def test_a_value_head_trains_in_bfloat16_close_to_float32(job_of):
    exact, lower = job_of("value_head", "float32"), job_of("value_head", "bfloat16", dtype="bfloat16")
    train(exact, HERE)
    train(lower, HERE)
    assert losses(lower) != losses(exact)
    assert losses(lower)[0] == pytest.approx(losses(exact)[0], abs=0.03)


def test_a_gated_model_is_refused(job_of):
    with pytest.raises(TrainingError, match="is of a kind that cannot be fine-tuned"):
        train(job_of("gated"), HERE)


def test_how_texts_were_rendered_is_noted_where_it_is_not_the_default(job_of):
    settings = {"system_prompt": "w1 w2", "truncation_side": "left"}
    outcome = train(job_of("classifier", spec=settings.items()), HERE)
    plainly = RewardModelSpec(path=str(outcome.model_dir), max_length=64)
    assert [one.rule for one in preflight(plainly).findings] == ["rendering", "rendering"]
    assert preflight(plainly.model_copy(update=settings)).findings == ()
    without = train(job_of("classifier", "default"), HERE)
    assert not (without.model_dir / "charm_rendering.json").exists()


def test_a_template_override_is_saved_with_the_trained_model(job_of):
    template = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}<eos>"
    outcome = train(job_of("classifier", spec={"chat_template": template}.items()), HERE)
    assert load_reward_model(RewardModelSpec(path=str(outcome.model_dir))).tokenizer.chat_template == template


def test_a_half_finished_job_of_an_earlier_version_goes_on(job_of):
    """Its work folder's identity has none of the settings that came later."""
    job = job_of("classifier")
    train(job, HERE)
    (job.work_dir / "finished.json").unlink()
    change_json(job.work_dir / "identity.json")
    assert train(job, HERE).steps == len(losses(job))
    assert "kind" not in (job.work_dir / "identity.json").read_text()
