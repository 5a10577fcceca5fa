"""Calibrate real data from end to end: a raw leaderboard file, AlpacaEval files, a policy model that answers live, a real reward model.

Then ratings of another date: only what they touch is done again, nothing is sampled and no base score computed, and the run says why.
"""

import datetime
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pytest

from charm_core.mismatch import MismatchConfig
from charm_core.offsets import OffsetConfig
from charm_core.preferences import PreferenceConfig
from charm_core.responses import SplitConfig, prompt_content_id
from charm_core.reward_model.spec import RewardModelSpec, TrainingConfig
from charm_core.sampling import Decoding
from flows.calibrate import calibrate
from flows.outcome import Outcome
from flows.runs import CalibrationRun
from flows.settings import RuntimeSettings
from tasks.arena import ArenaConfig
from tasks.gathering import SamplingConfig
from tasks.ledger import StepCall, last_ledger
from tasks.pages.report_data import ReportData
from tasks.policy_models import OpenAIBackend, PolicyModel, ReplayBackend
from tasks.prompt_sets import PromptSetConfig
from tasks.scoring import identify_reward_model
from tests.endpoint_server import policy_model_server
from tests.tiny_policy_model import save_policy_model

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.usefixtures("prefect_session")]

REPLAYED = ("gpt-4-1106-preview", "gpt-4-0613", "llama-2-70b-chat", "gemma-2b-it", "chatglm2-6b")
LIVE = "house-model"
PROMPTS = 72
ALIASES = f"""
[[alias]]
policy_model = "{LIVE}"
arena_name = "dolly-v2-12b"
match = "near"
reason = "a stand-in for this test: a tiny model that writes nonsense is rated like the board's last"
"""


@dataclass(frozen=True)
class Prepared:
    """Files in the formats that people publish, made from the real data for this test."""

    folder: Path
    early: Path
    """A board of an earlier date, in arena-catalog's format."""
    late: Path
    """arena-catalog's own file."""
    model: Path


@pytest.fixture(scope="module")
def prepared(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("published")
    responses = pl.read_parquet(shared_data / "responses.parquet").filter(pl.col("benchmark") == "alpaca_eval")
    model = shared_data.parent / "models" / "minilm-judge-rm"
    trained = set((model / "training_prompt_ids.txt").read_text().split())
    asked = responses.select("prompt_id", "prompt", "prompt_source").unique("prompt_id").sort("prompt_id").head(PROMPTS)
    questions = [{"instruction": prompt, "dataset": source} for _, prompt, source in asked.iter_rows()]
    (folder / "alpaca_eval.json").write_text(json.dumps(questions))
    seen = [
        prompt_content_id([{"role": "user", "content": prompt}])
        for prompt_id, prompt, _ in asked.iter_rows()
        if prompt_id in trained
    ]
    (folder / "trained_on.txt").write_text("\n".join(seen))
    for name in REPLAYED:
        rows = responses.filter(pl.col("model") == name).join(asked.select("prompt_id"), on="prompt_id", how="semi")
        outputs = [
            {
                "instruction": row["prompt"],
                "output": row["response"],
                "generator": name,
                "dataset": row["prompt_source"],
            }
            for row in rows.iter_rows(named=True)
        ]
        (folder / f"{name}.json").write_text(json.dumps(outputs, ensure_ascii=False))
    (folder / "aliases.toml").write_text(ALIASES)
    early = folder / "early.json"
    early.write_text(json.dumps({"full": board_of(shared_data / "elo_snapshots.parquet", datetime.date(2025, 2, 28))}))
    late = shared_data / "leaderboards" / "arena-catalog_leaderboard-text.json"
    return Prepared(folder=folder, early=early, late=late, model=model)


def board_of(snapshots: Path, date: datetime.date) -> dict[str, dict[str, float]]:
    rows = pl.read_parquet(snapshots).filter(
        pl.col("date") == date,
        pl.col("category") == "overall",
        ~pl.col("style_control") & ~pl.col("relabelled"),
        pl.col("ci_low").is_not_null(),
    )
    fields = {"rating": "rating", "ci_low": "rating_q025", "ci_high": "rating_q975"}
    return {row["model"]: {new: row[old] for old, new in fields.items()} for row in rows.iter_rows(named=True)}


def settings(prepared: Prepared, board: Path, date: datetime.date, address: str) -> CalibrationRun:
    replayed = [
        PolicyModel(name=name, backend=ReplayBackend(source=str(prepared.folder / f"{name}.json"))) for name in REPLAYED
    ]
    live = PolicyModel(
        name=LIVE,
        backend=OpenAIBackend(base_url=address, model="tiny", deployment="tiny, seed 0", concurrency=4),
    )
    return CalibrationRun(
        name="real input",
        arena=ArenaConfig(
            source=str(board), date=date, aliases=str(prepared.folder / "aliases.toml"), accept_near=(LIVE,)
        ),
        sampling=SamplingConfig(
            prompts=PromptSetConfig(
                source=str(prepared.folder / "alpaca_eval.json"), trained_on=str(prepared.folder / "trained_on.txt")
            ),
            policy_models=(*replayed, live),
            decoding=Decoding(max_tokens=24),
            shard_prompts=40,
        ),
        # as it was trained
        reward_model=RewardModelSpec(
            path=str(prepared.model), max_length=256, max_prompt_characters=600, min_response_tokens=1
        ),
        split=SplitConfig(held_out_fraction=0.4),
        mismatch=MismatchConfig(bootstrap_replicates=200),
        calibration=OffsetConfig(bootstrap_replicates=50),
        preferences=PreferenceConfig(strategy="all_pairs", held_out_fraction=0.0),
        training=TrainingConfig(
            objective="win_rate_matching", win_rate_memory=32, learning_rate=2e-5, pairs_per_step=150, trainable_layers=1,
            ranks=2, zero_stage=3,
        ),
    )  # fmt: skip


@dataclass(frozen=True)
class Runs:
    """The same calibration with the ratings of two dates."""

    first: Outcome
    second: Outcome
    ran_second: set[str]
    asked: int
    """Requests that the endpoint got in the first run."""
    base_scorings: list[bool]
    """Of each scoring with the base model in the second run: whether it was reused."""
    trainings: list[StepCall]
    """Of the second run."""
    remembered: int
    """Files whose digests were remembered after it."""


@pytest.fixture(scope="module")
def runs(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CHARM_HOME", str(tmp_path_factory.mktemp("home")))
        folder = save_policy_model(tmp_path_factory.mktemp("policy model"), max_length=8192)
        with policy_model_server(folder, max_new_tokens=24) as server:
            address = server.url
            first = calibrate(settings(prepared, prepared.early, datetime.date(2025, 2, 28), address))
            asked = server.answered.total()
        # the endpoint is gone: whoever samples again, fails
        second = calibrate(settings(prepared, prepared.late, datetime.date(2025, 12, 11), address))
        ledger = last_ledger(RuntimeSettings().artifact_store(), "calibrate real input")
        base = identify_reward_model(RewardModelSpec(path=str(prepared.model))).digest
        yield Runs(
            first=first,
            second=second,
            ran_second={call.step for call in ledger.calls if not call.reused},
            asked=asked,
            base_scorings=[
                call.reused
                for call in ledger.calls
                if call.step == "score_responses" and call.inputs["model"]["digest"] == base
            ],
            trainings=[call for call in ledger.calls if call.step == "train_reward_model"],
            remembered=sum(path.is_file() for path in RuntimeSettings().digest_memo().rglob("*")),
        )


def report_of(outcome: Outcome) -> ReportData:
    return ReportData.model_validate_json(Path(outcome.data.uri).read_bytes())


def test_every_policy_model_is_there_replayed_or_live(runs: Runs):
    rows = {row.policy_model: row for row in report_of(runs.first).responses}
    assert set(rows) == {*REPLAYED, LIVE}
    assert runs.asked == rows[LIVE].counts.prompts == PROMPTS
    assert rows[LIVE].counts.truncated + rows[LIVE].counts.complete + rows[LIVE].counts.empty == PROMPTS
    assert rows[LIVE].source.startswith("sampled from tiny")
    assert rows["gemma-2b-it"].source == "replayed from gemma-2b-it.json"
    assert {row.missing for row in rows.values()} == {0}


def test_the_stand_in_rating_and_the_confound_of_decoding_are_said(runs: Runs):
    report = report_of(runs.first)
    assert f"{LIVE} has the rating of dolly-v2-12b (near" in report.board.note
    assert any("decoding of 5 replayed policy models is not known" in warning for warning in report.warnings)
    page = Path(runs.first.report.uri).read_text()
    assert "replayed from gemma-2b-it.json" in page


def test_both_runs_end_with_a_calibrated_model_and_their_own_board(runs: Runs):
    first, second = report_of(runs.first), report_of(runs.second)
    assert (first.board.date, second.board.date) == ("2025-02-28", "2025-12-11")
    for report in (first, second):
        assert [variant.name for variant in report.main.variants] == ["untouched", "offsets", "control", "calibrated"]
    ratings = [
        {model.policy_model: model.rating for model in r.main.variants[0].mismatch.models} for r in (first, second)
    ]
    assert ratings[0] != ratings[1]
    scores = [r.main.variants[0].score_quantiles for r in (first, second)]
    assert scores[0] == scores[1]
    assert runs.first.model.digest != runs.second.model.digest


def test_the_second_run_samples_nothing_and_scores_no_response_with_the_base_model_again(runs: Runs):
    untouched_by_ratings = {
        "load_prompts", "sample_shard", "replay_responses", "join_samples", "split_responses", "select_responses",
    }  # fmt: skip
    assert not runs.ran_second & untouched_by_ratings
    assert {"match_ratings", "fit_model_offsets", "train_reward_model"} <= runs.ran_second
    assert runs.base_scorings == [True, True]  # the seen and the held-out responses, both reused
    control = next(call for call in runs.trainings if call.inputs["name"] == "control")
    assert control.reused  # it never sees a rating


def test_the_second_run_says_why(runs: Runs):
    assert "no earlier run of this name" in runs.first.summary
    assert "arena.date 2025-02-28 → 2025-12-11" in runs.second.summary
    assert re.search(
        r"inputs have other content than then: \w+: file\.digest [0-9a-f]{12} → [0-9a-f]{12}", runs.second.summary
    )


def test_the_digests_of_the_base_models_files_are_remembered(runs: Runs, prepared: Prepared):
    """So that a cached run does not read all of its weights; the second run met them long after they were written."""
    assert runs.remembered == sum(path.is_file() for path in prepared.model.iterdir())
