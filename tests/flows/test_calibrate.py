"""The main job end to end, on real parts, in a simulated arena that is as small as it can be."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit
from uuid import UUID

import polars as pl
import psutil
import pytest
from mlflow import MlflowClient
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId

from charm_core.errors import ConfigError
from charm_core.mismatch import MismatchConfig
from charm_core.offsets import OffsetConfig
from charm_core.preferences import PreferenceConfig
from charm_core.responses import SplitConfig
from charm_core.reward_model.loading import load_reward_model
from charm_core.reward_model.scoring import score_responses
from charm_core.reward_model.spec import RewardModelSpec, TrainingConfig
from charm_core.simulation import HELD_OUT_WRITERS, SimulationConfig, simulate_arena
from charm_core.tables import PROMPTS, RESPONSES
from flows.calibrate import calibrate
from flows.command_line import settings_toml
from flows.outcome import Outcome
from flows.runs import CalibrationRun
from flows.settings import CHECKOUT, RuntimeSettings
from tasks.ledger import last_ledger
from tasks.pages.report_data import ReportData
from tasks.scoring import ScoresConfig
from tasks.simulation import SimulatedWorld

TINY = CalibrationRun(
    name="tiny",
    simulation=SimulatedWorld(
        arena=SimulationConfig(prompts=40, label_prompts=30, battles=2000),
        base_training=TrainingConfig(
            epochs=1, learning_rate=1e-3, pairs_per_step=90, zero_stage=None, threads_per_rank=1
        ),
    ),
    split=SplitConfig(held_out_policy_models=HELD_OUT_WRITERS),
    mismatch=MismatchConfig(bootstrap_replicates=100),
    calibration=OffsetConfig(bootstrap_replicates=20),
    preferences=PreferenceConfig(strategy="all_pairs"),
    training=TrainingConfig(
        objective="win_rate_matching", learning_rate=5e-4, pairs_per_step=200, ranks=2, zero_stage=3
    ),
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, prefect_session: None) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CHARM_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def first(home: Path) -> Outcome:
    return calibrate(TINY)


def ran(run: CalibrationRun) -> tuple[Outcome, set[str]]:
    """Run and say which steps did not come from the cache: by the run's own ledger, for Prefect's API lags behind."""
    outcome = calibrate(run)
    ledger = last_ledger(RuntimeSettings().artifact_store(), f"calibrate {run.name}")
    return outcome, {call.step for call in ledger.calls if not call.reused}


def mlflow_runs(home: Path) -> list:
    client = MlflowClient(RuntimeSettings().tracking().uri)
    experiment = client.get_experiment_by_name("charm")
    return client.search_runs([experiment.experiment_id])


def test_it_ends_with_a_report_a_model_and_a_registered_version(first: Outcome, home: Path):
    data = ReportData.model_validate_json(Path(first.data.uri).read_bytes())
    assert [domain.label for domain in data.domains] == ["held-out prompts", "held-out policy models"]
    assert [variant.name for variant in data.main.variants] == ["untouched", "offsets", "control", "calibrated"]
    assert {model.policy_model for model in data.main.variants[0].mismatch.models}.isdisjoint(HELD_OUT_WRITERS)
    pairs = data.domains[1].variants[0].mismatch.pairs
    assert all({pair.model_a, pair.model_b} & set(HELD_OUT_WRITERS) for pair in pairs)
    assert data.truth is not None
    assert data.pairs is not None
    assert data.pairs.flipped > 0
    assert "This is a simulation" in Path(first.report.uri).read_text()
    assert first.model_version == "models:/charm-tiny/1"


def test_the_released_folder_is_plain_hugging_face_and_scores_the_same(first: Outcome, home: Path):
    assert first.model is not None
    folder = Path(first.model.uri)
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= {
        path.name for path in folder.iterdir()
    }
    assert not list(folder.glob("*.bin"))
    assert "held-out prompts" in (folder / "README.md").read_text()
    spec = RewardModelSpec(path=str(folder), max_length=TINY.simulation.max_length)
    assert load_reward_model(spec).network is not None
    data = ReportData.model_validate_json(Path(first.data.uri).read_bytes())
    held_out = next(item.digest for item in data.provenance.digests if item.name == "held out responses")
    responses = pl.read_parquet(next((home / "store" / "responses").rglob(f"{held_out}.parquet")))
    prompts = pl.concat([pl.read_parquet(path) for path in (home / "store" / "prompts").rglob("*.parquet")]).unique(
        subset="prompt_id"
    )
    again = score_responses(
        spec, prompts.select(list(PROMPTS.columns)), responses.select(list(RESPONSES.columns))
    ).scores
    quantiles = {row.policy_model: row.median for row in data.domains[1].variants[-1].score_quantiles}
    medians = dict(again.group_by("policy_model").agg(pl.col("score").median()).iter_rows())
    assert quantiles == pytest.approx(medians, abs=1e-5)


def test_a_second_run_is_cached_in_every_step_and_has_its_metrics_all_the_same(first: Outcome, home: Path):
    before = mlflow_runs(home)
    again, fresh = ran(TINY)
    assert fresh == set()
    assert again.report == first.report
    assert again.model_version == first.model_version
    runs = [run for run in mlflow_runs(home) if run.info.run_id not in {old.info.run_id for old in before}]
    parent = next(run for run in runs if "mlflow.parentRunId" not in run.data.tags)
    original = next(run for run in before if "mlflow.parentRunId" not in run.data.tags)
    assert parent.info.status == original.info.status == "FINISHED"
    assert parent.data.metrics == original.data.metrics
    assert len(parent.data.metrics) > 30
    untouched = ReportData.model_validate_json(Path(again.data.uri).read_bytes()).main.variants[0].mismatch
    found = {
        name: parent.data.metrics[f"untouched_held-out prompts_{name}"] for name in ("tie rate", "smallest score gap")
    }
    assert found == {"tie rate": untouched.tie_rate, "smallest score gap": untouched.smallest_score_gap}
    nested = {run.info.run_name: run for run in runs if "mlflow.parentRunId" in run.data.tags}
    assert {"calibrated", "control"} <= set(nested)
    assert nested["calibrated"].data.metrics["loss"] == pytest.approx(
        next(run for run in before if run.info.run_name == "calibrated").data.metrics["loss"]
    )


def test_one_changed_setting_runs_only_what_depends_on_it(first: Outcome, home: Path):
    changed = TINY.model_copy(update={"mismatch": MismatchConfig(bootstrap_replicates=120)})
    _, fresh = ran(changed)
    measured = {"evaluate_variant", "compare_variants", "compare_styles", "choose_models", "judge_truth"}
    assert fresh == {*measured, "compose_report", "draw_figures", "package_model"}


def test_best_of_n_is_held_against_a_judge_that_knows_some_of_the_policy_models(first: Outcome, tmp_path: Path):
    arena = simulate_arena(TINY.simulation.arena)
    writers = arena.responses.get_column("policy_model").unique().sort().to_list()[:3]
    lengths = arena.responses.filter(pl.col("policy_model").is_in(writers)).with_columns(
        pl.col("response").str.len_chars().alias("length")
    )
    pairs = lengths.join(lengths, on="prompt_id", suffix="_other").filter(
        pl.col("policy_model") < pl.col("policy_model_other")
    )
    path = tmp_path / "judge.parquet"
    pairs.select(
        "prompt_id",
        "policy_model",
        pl.col("policy_model_other").alias("opponent"),
        (pl.col("length") > pl.col("length_other")).cast(pl.Float64).alias("preference"),
    ).write_parquet(path)
    run = TINY.model_copy(update={"judge_preferences": ScoresConfig(source=str(path))})
    outcome, fresh = ran(run)
    assert fresh == {"load_preferences", "pick_best_of_n", "compose_report", "draw_figures", "package_model"}
    data = ReportData.model_validate_json(Path(outcome.data.uri).read_bytes())
    everybody, judged = data.best_of_n
    assert (everybody.candidates, judged.candidates) == (9, 3)
    assert "judge" not in {value.measure for value in everybody.values}
    judge = [value for value in judged.values if (value.measure, value.n) == ("judge", 2)]
    assert {value.scorer for value in judge} == {"untouched", "control", "calibrated"}
    assert all(value.prompts == judged.prompts for value in judge)
    assert "Judge&#39;s preference (%)" in Path(outcome.report.uri).read_text()

    stranger = tmp_path / "strangers.parquet"
    one_each = pl.read_parquet(path).unique("prompt_id")
    one_each.with_columns(policy_model=pl.lit("nobody"), opponent=pl.lit("noone")).write_parquet(stranger)
    with pytest.raises(ConfigError, match=r"judge_preferences are about \['nobody', 'noone'\]"):
        calibrate(TINY.model_copy(update={"judge_preferences": ScoresConfig(source=str(stranger))}))


def test_its_runs_say_what_they_found_and_lead_to_each_other(first: Outcome, home: Path):
    run = next(run for run in mlflow_runs(home) if first.tracking_url.endswith(run.info.run_id))
    selection = ReportData.model_validate_json(Path(first.data.uri).read_bytes()).selection
    name = f"calibrate tiny · {len(selection.overvalued)} overvalued"
    flow_run = UUID(run.data.tags["prefect.flow_run_id"])
    with get_client(sync_client=True) as prefect:
        assert prefect.read_flow_run(flow_run).name == run.info.run_name == name
        published = prefect.read_artifacts(
            artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run])), limit=100
        )
    links = {one.key: one.data for one in published if one.type == "markdown" and "](" in str(one.data)}
    assert first.tracking_url in links["calibrate-mlflow"]
    assert first.report.uri in links["calibrate-report"]
    stages = {"sources", "offsets", "pairs", "training", "variants", "summary"}
    assert {f"calibrate-{stage}" for stage in stages} | {"mismatch", "best-of-n", "promotion", "steps"} <= {
        one.key for one in published
    }
    page = run.data.tags["prefect.flow_run_url"]
    assert str(flow_run) in page
    assert page in run.data.tags["mlflow.note.content"]
    logged = Path(urlsplit(run.info.artifact_uri).path, "report.html").read_text()
    assert f'<a href="{page}">' in logged
    assert f'<a href="{first.tracking_url}">' in logged
    assert page not in Path(first.report.uri).read_text()  # the same report in every run that makes it
    assert page in first.summary


def test_a_model_that_is_registered_is_not_copied_again(first: Outcome, home: Path):
    client = MlflowClient(RuntimeSettings().tracking().uri)
    again, _ = ran(TINY)
    assert again.model_version == first.model_version
    kept = {url.rsplit("/", 1)[1] for url in (first.tracking_url, again.tracking_url)}
    assert [bool(client.list_artifacts(run, "model")) for run in sorted(kept, key=first.tracking_url.endswith)] == [
        False,
        True,
    ]


@pytest.mark.parametrize("damage", ["delete", "corrupt"])
def test_a_lost_file_is_made_again_by_its_step_and_no_other(first: Outcome, home: Path, damage: str):
    data = ReportData.model_validate_json(Path(first.data.uri).read_bytes())
    digest = next(item.digest for item in data.provenance.digests if item.name == "offsets")
    path = next((home / "store" / "offsets").rglob(f"{digest}.json"))
    good = path.read_bytes()
    path.unlink() if damage == "delete" else path.write_bytes(good[: len(good) // 2])
    again, fresh = ran(TINY)
    assert fresh == {"fit_model_offsets"}
    assert path.read_bytes() == good
    assert again.report == first.report


def test_ctrl_c_ends_the_training_processes_and_closes_the_run(first: Outcome, home: Path, tmp_path: Path):
    # what comes before the training is in the store
    environment = {**os.environ, "CHARM_EXPERIMENT": "interrupted", "PREFECT_HOME": str(tmp_path / "prefect")}
    environment.pop("PREFECT_API_URL", None)
    settings = tmp_path / "run.toml"
    training = TINY.training.model_copy(update={"epochs": 500.0})
    long = TINY.model_copy(update={"name": "interrupted", "training": training})
    settings.write_text(settings_toml(long))
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.calibrate", "--config", str(settings), "--verbose"],
        cwd=CHECKOUT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if "train_reward_model" in line and re.search(r"step \d+ of \d+", line):
            break
    children = psutil.Process(process.pid).children(recursive=True)
    assert any("charm_core.reward_model.worker" in " ".join(child.cmdline()) for child in children)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output[-2000:]
    deadline = time.monotonic() + 20
    while any(child.is_running() for child in children) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not [child for child in children if child.is_running()]
    client = MlflowClient(RuntimeSettings().tracking().uri)
    runs = client.search_runs([client.get_experiment_by_name("interrupted").experiment_id])
    assert {run.info.status for run in runs if "mlflow.parentRunId" not in run.data.tags} == {"KILLED"}
    assert "RUNNING" not in {run.info.status for run in runs}
