"""Benchmarks and human alignment end to end: real files, real tiny reward models, a real store."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from pydantic import ValidationError

from charm_core.agreement import elo_agreement
from charm_core.mismatch import MismatchConfig
from charm_core.responses import SplitConfig
from charm_core.reward_model.scoring import score_responses
from charm_core.reward_model.spec import RewardModelSpec, TrainingConfig
from charm_core.reward_model.tiny import build_tiny_reward_model
from charm_core.simulation import HELD_OUT_WRITERS, SimulationConfig
from charm_core.tables import PROMPTS, RESPONSES, SCORES
from flows.command_line import run_from_command_line, settings_toml
from flows.evaluate import EvaluationOutcome, evaluate, start
from flows.presets import EVALUATE
from flows.runs import EvaluationRun
from tasks.arena import ArenaConfig
from tasks.benchmark_sources import BenchmarkData, BenchmarksConfig, Resampling
from tasks.endpoint import Endpoint
from tasks.pages.evaluation_page_data import EvaluationData
from tasks.prompts import ResponsesConfig
from tasks.remote_scoring import RemoteScorerConfig
from tasks.simulation import SimulatedWorld
from tests.charm_core.benchmarks.made_up import best_of_four, pair
from tests.endpoint_server import Asked, EndpointServer, Reply

WORDS = [f"w{number}" for number in range(30)]
MODELS = ("moon", "sand", "sea", "sky", "sun")
PROMPTS_ASKED = 24
QUICK = MismatchConfig(bootstrap_replicates=50)
FEW = Resampling(replicates=50)
SCORER = {"endpoint": {"base_url": "http://127.0.0.1:1/v1", "model": "rm"}, "route": "vllm_score"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, prefect_session: None):
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CHARM_HOME", str(folder / "home"))
        for seed in (1, 2):
            build_tiny_reward_model(WORDS, folder / f"rm-{seed}", seed=seed, hidden_size=16, layers=1)
        yield folder


def reward_model(home: Path, seed: int) -> RewardModelSpec:
    return RewardModelSpec(path=str(home / f"rm-{seed}"), max_length=128, min_response_tokens=1)


def text(rng: np.random.Generator) -> str:
    return " ".join(rng.choice(WORDS, int(rng.integers(2, 9))))


def benchmarks(home: Path, *, items: int = 20) -> BenchmarksConfig:
    rng = np.random.default_rng(0)
    pairs = [pair(n, "hep-go" if n % 2 else "llmbar-natural", text(rng), text(rng)) for n in range(30)][:items]
    fours = [best_of_four(str(n), "Math", *(text(rng) for _ in range(4))) for n in range(12)]
    for name, rows in {"rewardbench": pairs, "rewardbench_2": fours}.items():
        (home / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return BenchmarksConfig(
        rewardbench=BenchmarkData(source=str(home / "rewardbench.jsonl")),
        rewardbench_2=BenchmarkData(source=str(home / "rewardbench_2.jsonl")),
        resampling=FEW,
    )


def human_ratings(home: Path) -> dict[str, object]:
    rng = np.random.default_rng(1)
    rows = [
        (f"p{n:02d}", f"w{n} w{n + 1}", model, f"{text(rng)}\n- {text(rng)}" if n % 3 else text(rng))
        for n in range(PROMPTS_ASKED)
        for model in MODELS
    ]
    frame = pl.DataFrame(rows, schema=["prompt_id", "prompt", "policy_model", "response"], orient="row")
    frame.write_parquet(home / "responses.parquet")
    ratings = "\n".join(f"{model},{1000 + 30 * n},{990 + 30 * n},{1010 + 30 * n}" for n, model in enumerate(MODELS))
    (home / "board.csv").write_text(f"policy_model,rating,rating_low,rating_high\n{ratings}\n")
    return {
        "arena": ArenaConfig(source=str(home / "board.csv")),
        "responses": ResponsesConfig(source=str(home / "responses.parquet")),
    }


def data_of(outcome: EvaluationOutcome) -> EvaluationData:
    return EvaluationData.model_validate_json(Path(outcome.data.uri).read_bytes())


@pytest.fixture(scope="module")
def both(home: Path) -> EvaluationOutcome:
    return evaluate(
        EvaluationRun(
            name="both",
            baseline=reward_model(home, 1),
            reward_model=reward_model(home, 2),
            benchmarks=benchmarks(home),
            split=SplitConfig(held_out_policy_models=("sun",), held_out_fraction=0.5),
            mismatch=QUICK,
            **human_ratings(home),
        )
    )


def test_two_reward_models_on_benchmarks_and_people(both: EvaluationOutcome):
    data = data_of(both)
    assert [(model.variant, model.label) for model in data.models] == [("untouched", "rm-1"), ("calibrated", "rm-2")]
    assert next(row.benchmark for row in data.benchmarks if row.subset == "overall") == "RewardBench"
    assert {row.benchmark for row in data.benchmarks} == {"RewardBench", "RewardBench 2"}
    assert all(len(row.values) == 2 and len(row.tests) == 1 for row in data.benchmarks)
    assert len(data.reliability) == 4
    assert [domain.label for domain in data.domains] == ["held-out prompts", "held-out policy models"]
    for domain in data.domains:
        assert [variant.label for variant in domain.variants] == ["rm-1", "rm-2"]
        assert all(variant.style is not None for variant in domain.variants)
        assert len(domain.comparisons) == len(domain.styles) == 1
    assert {model.policy_model for model in data.domains[0].variants[0].mismatch.models} == set(MODELS) - {"sun"}
    assert data.domains[0].variants[0].mismatch.prompts == PROMPTS_ASKED / 2
    page = Path(both.page.uri).read_text()
    assert '<h2 id="benchmarks">' in page
    assert "http" not in page.replace("http://www.w3.org", "").partition("<pre>")[0]
    assert "rm-2" in both.summary


def test_the_second_is_compared_with_the_first_and_not_the_other_way_round(both: EvaluationOutcome):
    for row in data_of(both).benchmarks:
        values = {value.variant: value.value.value for value in row.values}
        (test,) = row.tests
        assert (test.before, test.after) == ("untouched", "calibrated")
        assert test.difference.value == pytest.approx(values["calibrated"] - values["untouched"])


def test_alignment_is_what_the_pure_functions_say(home: Path):
    given = human_ratings(home)
    run = EvaluationRun(name="people", reward_model=reward_model(home, 1), mismatch=QUICK, **given)
    data = data_of(evaluate(run))
    (domain,) = data.domains
    table = pl.read_parquet(home / "responses.parquet")
    prompts = table.select(
        "prompt_id",
        prompt_set=pl.lit("x"),
        messages=pl.concat_list(pl.struct(role=pl.lit("user"), content=pl.col("prompt"))),
    ).unique("prompt_id")
    scores = score_responses(
        reward_model(home, 1), prompts.select(list(PROMPTS.columns)), table.select(list(RESPONSES.columns))
    ).scores
    board = pl.read_csv(home / "board.csv").with_columns(votes=pl.lit(None, dtype=pl.Int64))
    ratings = board.with_columns(pl.col(pl.Int64).exclude("votes").cast(pl.Float64))
    expected = elo_agreement(scores.select(list(SCORES.columns)), ratings, QUICK)
    (variant,) = domain.variants
    assert variant.agreement is not None
    for name in ("pearson", "spearman", "kendall", "rating_rmse"):
        assert getattr(variant.agreement, name).value == pytest.approx(getattr(expected, name).value, rel=1e-4)
    assert domain.label == "all prompts"
    assert (data.benchmarks, data.reliability, domain.comparisons) == ((), (), ())


def stored_texts(home: Path) -> int:
    """Texts that were ever scored for benchmarks."""
    return sum(pl.read_parquet(path).height for path in (home / "home" / "store" / "text_scores").rglob("*.parquet"))


def test_a_second_run_scores_nothing_and_an_item_more_only_that(home: Path, both: EvaluationOutcome):
    def run(items: int) -> EvaluationOutcome:
        return evaluate(
            EvaluationRun(name="again", reward_model=reward_model(home, 1), benchmarks=benchmarks(home, items=items))
        )

    def numbers(outcome: EvaluationOutcome) -> EvaluationData:
        return data_of(outcome).model_copy(update={"provenance": None})

    known = stored_texts(home)
    first = run(20)
    assert stored_texts(home) == known
    again = run(20)
    assert numbers(again) == numbers(first)
    assert "ran: compose_evaluation_page\n" in again.summary or ", 0 ran" in again.summary  # it has the commit on it
    more = run(22)
    assert stored_texts(home) == known + 4
    items = {row.benchmark: row.items for row in reversed(data_of(more).benchmarks)}
    assert items == {"RewardBench": 22, "RewardBench 2": 12}


def length_of_second(asked: Asked) -> Reply:
    values = [float(len(text)) for text in asked.body["text_2"]]
    return Reply({"object": "list", "model": "rm", "data": [{"index": n, "score": v} for n, v in enumerate(values)]})


def test_a_reward_model_behind_a_server_that_knows_only_the_length(home: Path):
    with EndpointServer(length_of_second) as server:
        scorer = RemoteScorerConfig(
            endpoint=Endpoint(base_url=server.url, model="by-length", max_tries=2), route="vllm_score"
        )
        run = EvaluationRun(
            name="remote", scorer=scorer, benchmarks=benchmarks(home), mismatch=QUICK, **human_ratings(home)
        )
        outcome = evaluate(run)
    data = data_of(outcome)
    assert [model.label for model in data.models] == ["by-length"]
    for row in data.benchmarks:
        (value,) = row.values
        assert value.value.value == row.length_only
        assert value.truncated is None
    style = data.domains[0].variants[0].style
    assert style is not None
    assert style.length.overall == pytest.approx(1.0)


def test_the_simulated_arena(home: Path):
    world = SimulatedWorld(
        arena=SimulationConfig(prompts=40, label_prompts=30, battles=2000),
        base_training=TrainingConfig(epochs=1, learning_rate=1e-3, pairs_per_step=90, zero_stage=None),
    )
    split = SplitConfig(held_out_policy_models=HELD_OUT_WRITERS)
    outcome = evaluate(EvaluationRun(name="world", simulation=world, split=split, mismatch=QUICK))
    data = data_of(outcome)
    assert data.simulated
    assert [domain.label for domain in data.domains] == ["held-out prompts", "held-out policy models"]
    assert outcome.summary.startswith(
        "In this simulation, the simulated reward model's mean absolute mismatch on held-out"
    )
    assert "This is a simulation" in Path(outcome.page.uri).read_text()


def test_from_a_settings_file_on_the_command_line(home: Path, capsys: pytest.CaptureFixture[str]):
    run = EvaluationRun(name="again", reward_model=reward_model(home, 1), benchmarks=benchmarks(home))
    (home / "run.toml").write_text(settings_toml(run))
    argv = ["--config", str(home / "run.toml")]
    assert run_from_command_line("evaluate", EvaluationRun, EVALUATE, start, [*argv, "--show-config"]) == 0
    assert capsys.readouterr().out.strip() == settings_toml(run).strip()
    assert run_from_command_line("evaluate", EvaluationRun, EVALUATE, start, argv) == 0
    said = capsys.readouterr().out
    assert said.startswith("rm-1 gets ")
    assert "RewardBench, overall accuracy" in said


def test_wrong_settings_on_the_command_line(home: Path, capsys: pytest.CaptureFixture[str]):
    (home / "wrong.toml").write_text('[reward_model]\npath = "x"\n')
    assert (
        run_from_command_line("evaluate", EvaluationRun, EVALUATE, start, ["--config", str(home / "wrong.toml")]) == 2
    )
    assert "nothing to evaluate on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "reward_model is missing"),
        ({"reward_model": {"path": "x"}}, "nothing to evaluate on"),
        ({"reward_model": {"path": "x"}, "arena": {"source": "x"}}, "needs both arena and responses or sampling"),
        ({"reward_model": {"path": "x"}, "responses": {"source": "x"}}, "needs both arena and responses or sampling"),
        ({"simulation": {}, "reward_model": {"path": "x"}}, "leave out reward_model"),
        ({"simulation": {}, "baseline": {"path": "x"}}, "leave out reward_model"),
        ({"reward_model": {"path": "x"}, "scorer": SCORER}, "a scorer is evaluated by itself"),
    ],
)
def test_settings_that_do_not_go_together(given: dict[str, object], message: str):
    with pytest.raises(ValidationError, match=message):
        EvaluationRun.model_validate(given)
