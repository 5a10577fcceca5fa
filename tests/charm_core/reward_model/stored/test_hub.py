"""Against a hub on loopback, in processes of their own, because huggingface_hub reads its settings when it is imported."""

import json
from pathlib import Path

import polars as pl
import pytest

from charm_core.errors import ModelError, ServiceError
from charm_core.reward_model.findings import PreflightJob
from charm_core.reward_model.jobs import ScoringJob
from charm_core.reward_model.scoring import score_responses
from charm_core.reward_model.spec import RewardModelSpec
from tasks.launching import run_preflight
from tasks.scoring_launch import run_scoring
from tests.charm_core.reward_model.hub_server import COMMIT, serve
from tests.charm_core.reward_model.kinds import save_adapter, save_causal, save_classifier, save_value_head
from tests.charm_core.reward_model.tiny import prompts_and_responses


@pytest.fixture
def hub(tmp_path, monkeypatch):
    base = save_causal(tmp_path / "base")
    models = {
        "org/rm": save_value_head(tmp_path / "rm", hidden=(2000,)),
        "org/base": base,
        "org/lora": save_adapter(tmp_path / "lora", base),
    }
    (models["org/rm"] / "pytorch_model.bin").write_bytes(b"pickled")
    with serve(models) as running:
        for name, value in running.environment(tmp_path / "cache").items():
            monkeypatch.setenv(name, value)
        yield running


def look(tmp_path, **settings):
    spec = RewardModelSpec(**({"path": "org/rm", "revision": COMMIT} | settings))
    return run_preflight(PreflightJob(model=spec, report_path=tmp_path / "report.json"))


def score(tmp_path, **settings):
    prompts, responses = prompts_and_responses(4)
    prompts.write_parquet(tmp_path / "prompts.parquet")
    responses.write_parquet(tmp_path / "responses.parquet")
    run_scoring(
        ScoringJob(
            model=RewardModelSpec(**({"path": "org/rm", "revision": COMMIT} | settings)),
            prompts_path=tmp_path / "prompts.parquet",
            responses_path=tmp_path / "responses.parquet",
            scores_path=tmp_path / "scores.parquet",
        )
    )
    return pl.read_parquet(tmp_path / "scores.parquet")


def test_a_pre_flight_fetches_no_weights_and_scoring_no_pickles(hub, tmp_path, monkeypatch):
    report = look(tmp_path)
    assert (report.kind, report.errors, report.warnings) == ("value_head", (), ())
    cached = {path.name for path in (tmp_path / "cache").rglob("snapshots/*/*")}
    assert {"config.json", "tokenizer.json"} <= cached
    assert not {"model.safetensors", "pytorch_model.bin"} & cached
    assert 0 < hub.served["model.safetensors"] < (hub.models["org/rm"] / "model.safetensors").stat().st_size / 2

    scores = score(tmp_path)
    expected = score_responses(RewardModelSpec(path=str(hub.models["org/rm"])), *prompts_and_responses(4)).scores
    assert scores.equals(expected)
    assert "pytorch_model.bin" not in hub.served

    served = dict(hub.served)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert look(tmp_path) == report
    assert score(tmp_path).equals(expected)
    assert hub.served == served


def test_an_adapter_and_its_base_model_come_from_the_hub(hub, tmp_path):
    adapter = {"path": "org/lora", "base_model": "org/base", "base_revision": COMMIT}
    assert look(tmp_path, **adapter).kind == "lora"
    scores = score(tmp_path, **adapter)
    expected = score_responses(RewardModelSpec(path=str(hub.models["org/lora"])), *prompts_and_responses(4)).scores
    assert scores.equals(expected)


def test_models_that_cannot_be_had_are_named(hub, tmp_path, monkeypatch):
    (absent,) = look(tmp_path, path="org/absent").errors
    assert "there is no reward model 'org/absent' with revision" in absent.message
    with pytest.raises(ModelError, match=f"there is no reward model 'org/rm' with revision '{'f' * 40}'"):
        score(tmp_path, revision="f" * 40)
    hub.gated.add("org/rm")
    (closed,) = look(tmp_path).errors
    assert "open only to those who accepted its terms" in closed.message
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ServiceError, match="'org/base' cannot be had from the hub now"):
        look(tmp_path, path="org/base")


def test_pickled_weights_on_the_hub_are_refused_before_anything_is_fetched(hub, tmp_path):
    (Path(hub.models["org/rm"]) / "model.safetensors").unlink()
    (finding,) = look(tmp_path).errors
    assert "only ['pytorch_model.bin'], which is never unpickled" in finding.message
    assert "pytorch_model.bin" not in hub.served


def test_a_classifier_without_head_on_the_hub_is_refused_by_its_header(hub, tmp_path):
    hub.models["org/headless"] = save_classifier(tmp_path / "headless")
    config = tmp_path / "headless" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"id2label": {"0": "a", "1": "b"}}))
    (finding,) = look(tmp_path, path="org/headless").errors
    assert "has 2 labels" in finding.message
    assert not list((tmp_path / "cache").rglob("snapshots/*/model.safetensors"))
