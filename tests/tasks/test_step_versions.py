"""Steps that compute something else need another version, or finished work of the old kind is served.

When a test here fails and the change is meant: raise the step's version, then write its new digest here.
"""

import hashlib
from pathlib import Path

import polars as pl
import pytest

from charm_core.responses import CALIBRATION, SplitConfig
from tasks.arena import ArenaConfig, collect_ratings, fit_arena_ratings, match_ratings
from tasks.caching import Step
from tasks.prompts import ResponsesConfig, load_responses, select_responses, split_responses
from tasks.store import ArtifactRef, ArtifactStore, SourceFile, source_file

GOLDEN = {
    "load_responses v1": "c4ade4a467148cb3",
    "split_responses v1": "abd04d02dd7e932d",
    "select_responses v1": "ada6797929b6c0c1",
    "collect_ratings v1": "885c6d48d30d27a2",
    "match_ratings v1": "00aeb7e7cec7eac4",
    "fit_arena_ratings v1": "7f1f9479ba7a6daf",
}


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(url=str(tmp_path / "store"), work_folder=str(tmp_path))


def content(store: ArtifactStore, *refs: ArtifactRef) -> str:
    """Digest of what tables hold, whatever the version of Polars that wrote them; ratings to six digits."""
    texts = (store.read_frame(ref).with_columns(pl.col(pl.Float64).round(6)).write_ndjson() for ref in refs)
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def check(step: Step[..., object], digest: str) -> None:
    assert {f"{step.name} v{step.version}": digest}.items() <= GOLDEN.items(), "see the top of this file"


def table(folder: Path) -> SourceFile:
    rows = [
        {"prompt_id": f"p{n}", "prompt": f"question {n}?", "policy_model": model, "response": f" {model} {n}\n"}
        for n in range(12)
        for model in ("b", "a")
    ]
    path = folder / "responses.parquet"
    pl.DataFrame(rows).write_parquet(path)
    return source_file(str(path))


def test_responses(store: ArtifactStore, tmp_path: Path):
    loaded = load_responses.function(store, table(tmp_path), ResponsesConfig(source="x"), None)
    check(load_responses, content(store, loaded.prompts, loaded.responses))
    split = split_responses.function(store, loaded, SplitConfig(held_out_fraction=0.4, seed=1), None)
    check(split_responses, content(store, split))
    chosen = select_responses.function(store, loaded, split, (CALIBRATION,), ("a",))
    check(select_responses, content(store, chosen.prompts, chosen.responses))


def test_ratings(store: ArtifactStore, tmp_path: Path):
    board_file = tmp_path / "board.csv"
    board_file.write_text("policy_model,rating,rating_low,rating_high,votes\nb,1200.5,1190,1210,7\na,1000,,,\n")
    alias_file = tmp_path / "aliases.toml"
    alias_file.write_text('[[alias]]\npolicy_model = "mine"\narena_name = "b"\nmatch = "exact"\nreason = "renamed"\n')
    board = collect_ratings.function(store, source_file(str(board_file)), ArenaConfig(source="x"))
    check(collect_ratings, content(store, board.ratings))
    matched = match_ratings.function(store, board, ("mine", "a"), source_file(str(alias_file)), ())
    check(match_ratings, content(store, matched.ratings))


def test_ratings_from_votes(store: ArtifactStore):
    rows = [(n, "abc"[n % 3], "bca"[n % 3], ("model_a", "model_b", "tie")[n * n % 7 % 3]) for n in range(210)]
    votes = pl.DataFrame(rows, schema=["battle_id", "model_a", "model_b", "winner"], orient="row")
    board = fit_arena_ratings.function(store, store.write_frame(votes, "battles"), "made up")
    check(fit_arena_ratings, content(store, board.ratings))
