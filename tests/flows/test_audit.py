"""The audit flow on small files: every kind of input, and the mistakes that people make."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from pydantic import ValidationError

from charm_core.errors import RatingsError, TableError
from charm_core.mismatch import MismatchConfig
from charm_core.responses import ColumnNames
from flows.audit import audit
from flows.outcome import Outcome
from flows.runs import AuditRun
from tasks.arena import ArenaConfig
from tasks.pages.report_data import ReportData
from tasks.scoring import ScoresConfig

MODELS = {"sky": 1100.0, "sea": 1050.0, "sand": 1000.0, "salt": 950.0}
QUICK = MismatchConfig(bootstrap_replicates=100)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefect_session: None) -> Path:
    monkeypatch.setenv("CHARM_HOME", str(tmp_path / "home"))
    return tmp_path


def board(folder: Path) -> ArenaConfig:
    path = folder / "board.csv"
    rows = [f"{name},{rating},{rating - 5},{rating + 5},1000" for name, rating in MODELS.items()]
    path.write_text("policy_model,rating,rating_low,rating_high,votes\n" + "\n".join(rows))
    return ArenaConfig(source=str(path))


def scores_of(folder: Path, liked: str, *, name: str = "scores.parquet", **changes: object) -> ScoresConfig:
    """Scores that follow the ratings, but for one model that is liked too much."""
    rng = np.random.default_rng(0)
    table = pl.DataFrame(
        [
            (f"p{n}", model, float(rng.gumbel() + rating * np.log(10) / 400 + 1.5 * (model == liked)))
            for n in range(200)
            for model, rating in MODELS.items()
        ],
        schema=["prompt_id", "policy_model", "score"],
        orient="row",
    ).with_columns(**{column: pl.lit(value) for column, value in changes.items()})
    table.write_parquet(folder / name)
    return ScoresConfig(source=str(folder / name))


def data_of(outcome: Outcome, home: Path) -> ReportData:
    return ReportData.model_validate_json(Path(outcome.data.uri).read_bytes())


def test_scores(home: Path):
    outcome = audit(AuditRun(name="t", arena=board(home), scores=scores_of(home, "salt"), mismatch=QUICK))
    data = data_of(outcome, home)
    assert data.selection is not None
    assert data.selection.overvalued_models == ("salt",)
    planted = {model.policy_model: model.overvaluation.value or 0 for model in data.main.variants[0].mismatch.models}
    # 1.5 logits in favour of one of four models, and the anchor is their mean
    assert planted["salt"] == pytest.approx(1.5 * 400 / np.log(10) * 3 / 4, abs=40)
    assert "overvalues salt the most" in outcome.summary
    assert "Offsets alone" in outcome.summary
    page = Path(outcome.report.uri).read_text()
    assert page.count("<html") == 1
    assert "salt" in page


def test_the_same_audit_again_is_the_same_report_from_the_cache(home: Path):
    run = AuditRun(name="t", arena=board(home), scores=scores_of(home, "sea"), mismatch=QUICK)
    first = audit(run)
    moved = home / "elsewhere.parquet"
    moved.write_bytes((home / "scores.parquet").read_bytes())
    states = audit(run, return_state=True)
    assert states.result().report == first.report
    again = audit(run.model_copy(update={"scores": ScoresConfig(source=str(moved)), "name": "t"}))
    assert again.data.digest != first.data.digest  # the settings that the report shows name another file
    assert data_of(again, home).domains == data_of(first, home).domains


def test_pairwise_preferences(home: Path):
    rng = np.random.default_rng(1)
    rows = [(f"p{n}", name, "sky", float(rng.random() < 0.5)) for n in range(150) for name in MODELS if name != "sky"]
    table = pl.DataFrame(rows, schema=["prompt_id", "policy_model", "opponent", "preference"], orient="row")
    table.write_csv(home / "judge.csv")
    run = AuditRun(
        name="judge", arena=board(home), preferences=ScoresConfig(source=str(home / "judge.csv")), mismatch=QUICK
    )
    report = data_of(audit(run), home).main.variants[0].mismatch
    assert {model.policy_model for model in report.models} == set(MODELS)
    assert len(report.pairs) == 3
    over = {model.policy_model: model.overvaluation.value or 0.0 for model in report.models}
    assert over["salt"] > over["sand"] > over["sea"] > over["sky"]


def test_published_win_rates(home: Path):
    pl.DataFrame(
        {
            "m": ["sky", "sea", "sand", "salt"],
            "rate": [50.0, 43.0, 36.0, 80.0],
            "se": [0.0, 1.5, 1.5, 1.4],
            "n": [805] * 4,
        }
    ).write_csv(home / "published.csv")
    columns = ColumnNames(policy_model="m", win_rate="rate", standard_error="se", prompts="n")
    source = ScoresConfig(source=str(home / "published.csv"), columns=columns, opponent="sky", percent=True)
    report = data_of(audit(AuditRun(name="p", arena=board(home), win_rates=source, mismatch=QUICK)), home)
    models = {model.policy_model: model for model in report.main.variants[0].mismatch.models}
    assert models["salt"].flagged
    assert models["salt"].overvaluation.value == max(model.overvaluation.value for model in models.values())
    pair = next(pair for pair in report.main.variants[0].mismatch.pairs if pair.model_a == "salt")
    assert pair.win_rate.value == pytest.approx(0.8, abs=1e-6)
    # the published standard error, not that of 805 yes-or-no answers, decides the interval
    assert pair.win_rate.high - pair.win_rate.low == pytest.approx(2 * 1.96 * 0.014, rel=0.25)


def test_a_policy_model_without_rating_is_named_with_its_nearest(home: Path):
    source = scores_of(home, "salt")
    table = pl.read_parquet(source.source).with_columns(pl.col("policy_model").replace("salt", "salty"))
    table.write_parquet(source.source)
    with pytest.raises(RatingsError, match=r"'salty' has no rating.*nearest names: salt"):
        audit(AuditRun(name="t", arena=board(home), scores=source, mismatch=QUICK))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda table: table.with_columns(score=float("nan")), "NaN or infinite"),
        (lambda table: pl.concat([table, table]), "more than once"),
        (lambda table: table.drop("score"), "lacks the columns"),
        (lambda table: table.filter(pl.col("policy_model") == "sky"), "at least two"),
        (lambda table: table.head(0), "no rows"),
    ],
)
def test_bad_scores_are_clear_errors(home: Path, break_it, message: str):
    source = scores_of(home, "salt")
    break_it(pl.read_parquet(source.source)).write_parquet(source.source)
    with pytest.raises(TableError, match=message):
        audit(AuditRun(name="t", arena=board(home), scores=source, mismatch=QUICK))


def test_a_file_that_is_no_parquet(home: Path):
    (home / "scores.parquet").write_text("not parquet")
    with pytest.raises(TableError, match="not a readable"):
        audit(AuditRun(name="t", arena=board(home), scores=ScoresConfig(source=str(home / "scores.parquet"))))


@pytest.mark.parametrize("given", [{}, {"scores": 1, "preferences": 1}, {"responses": 1}])
def test_exactly_one_source(given: dict[str, int]):
    sources = {
        "scores": ScoresConfig(source="a"),
        "preferences": ScoresConfig(source="b"),
        "responses": {"source": "c"},
    }
    with pytest.raises(ValidationError, match=r"exactly one|need a reward_model"):
        AuditRun(arena=ArenaConfig(source="x"), **{name: sources[name] for name in given})
