"""Steps that compute something else need another version, or finished work of the old kind is served.

When a test here fails and the change is meant: raise the step's version, then write its new digest here.
"""

import hashlib
import json
from pathlib import Path

import polars as pl
import pytest

from charm_core.mismatch import MismatchConfig
from charm_core.offsets import OffsetConfig
from charm_core.preferences import PreferenceConfig
from charm_core.responses import CALIBRATION, SplitConfig
from charm_core.selection import SelectionConfig
from charm_core.tables import PREFERENCES, RATINGS, SCORES, WIN_RATES
from tasks import arena, benchmarking, debiasing, evaluation, evidence, prompts, registry, scoring, simulation, training
from tasks.arena import ArenaConfig, collect_ratings, fit_arena_ratings, match_ratings
from tasks.caching import Step
from tasks.debiasing import (
    ChosenModels,
    build_pairs,
    check_offsets,
    choose_models,
    fit_model_offsets,
    offset_scores,
    rate_by_scores,
)
from tasks.evaluation import View, compare_variants, evaluate_preferences, evaluate_variant, evaluate_win_rates
from tasks.prompts import ResponsesConfig, load_responses, select_responses, split_responses
from tasks.store import ArtifactRef, ArtifactStore, SourceFile, source_file

MODULES = (
    arena, benchmarking, debiasing, evaluation, evidence, prompts, registry, scoring, simulation, training,
)  # fmt: skip

GOLDEN = {
    "load_responses v1": "c4ade4a467148cb3",
    "split_responses v1": "abd04d02dd7e932d",
    "select_responses v1": "ada6797929b6c0c1",
    "collect_ratings v1": "885c6d48d30d27a2",
    "match_ratings v1": "00aeb7e7cec7eac4",
    "evaluate_variant v1": "5c71a938b872532d",
    "compare_variants v1": "00147d283943439c",
    "evaluate_preferences v1": "22497b93908df744",
    "evaluate_win_rates v1": "d305ee18c0d11a3b",
    "choose_models v1": "38d01814a8de31e7",
    "fit_model_offsets v1": "56ad9e60b4f922bc",
    "offset_scores v1": "649225753de6f15f",
    "rate_by_scores v1": "6d8c3dbf57f7f362",
    "build_pairs v1": "83015455e2fa88ca",
    "check_offsets v1": "9d0e2ba4ce7612c4",
    "fit_arena_ratings v1": "7f1f9479ba7a6daf",
}


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(url=str(tmp_path / "store"), work_folder=str(tmp_path))


def content(store: ArtifactStore, *refs: ArtifactRef) -> str:
    """Digest of what tables hold, whatever the version of Polars that wrote them; ratings to six digits."""
    texts = (store.read_frame(ref).with_columns(pl.col(pl.Float64).round(6)).write_ndjson() for ref in refs)
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def rounded(value: object) -> object:
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return round(value, 4) + 0.0 if isinstance(value, float) else value


def record(store: ArtifactStore, *refs: ArtifactRef) -> str:
    """Digest of what records hold, numbers to four digits."""
    texts = (json.dumps(rounded(json.loads(store.read_bytes(ref))), sort_keys=True) for ref in refs)
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def check(step: Step[..., object], digest: str) -> None:
    name = f"{step.name} v{step.version}"
    assert GOLDEN.get(name) == digest, f"see the top of this file: {name} gives {digest}"


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


def scores_and_ratings(store: ArtifactStore) -> tuple[ArtifactRef, ArtifactRef]:
    """Three models whose scores, without any generator of random numbers, rank them otherwise than their ratings do."""
    scores = [
        (f"p{n:02d}", model, float((n * step) % 17) + lift)
        for n in range(40)
        for model, step, lift in (("a", 3, 4.0), ("b", 5, 0.0), ("c", 7, 1.5))
    ]
    ratings = [("a", 1000.0, 990.0, 1010.0, 9), ("b", 1100.0, 1095.0, 1105.0, 9), ("c", 1050.0, None, None, None)]
    return (
        store.write_table(pl.DataFrame(scores, schema=dict(SCORES.columns), orient="row"), SCORES),
        store.write_table(pl.DataFrame(ratings, schema=dict(RATINGS.columns), orient="row"), RATINGS),
    )


def test_evaluation(store: ArtifactStore):
    scores, ratings = scores_and_ratings(store)
    view, config = View(label="all prompts"), MismatchConfig(bootstrap_replicates=50)
    evidence = evaluate_variant.function(store, "untouched", scores, None, ratings, None, view, config)
    check(evaluate_variant, record(store, evidence))
    compared = compare_variants.function(
        store, ("untouched", scores), ("calibrated", scores), ratings, None, view, config
    )
    check(compare_variants, record(store, compared))
    preferences = [(f"p{n}", "a", "b", n % 5 / 4) for n in range(20)]
    judged = evaluate_preferences.function(
        store, store.write_table(pl.DataFrame(preferences, schema=dict(PREFERENCES.columns), orient="row"), PREFERENCES),
        ratings, config,
    )  # fmt: skip
    check(evaluate_preferences, record(store, judged))
    published = pl.DataFrame([("a", "b", 0.6, 0.02, 100)], schema=dict(WIN_RATES.columns), orient="row")
    rated = evaluate_win_rates.function(store, store.write_table(published, WIN_RATES), ratings, config)
    check(evaluate_win_rates, record(store, rated))


def test_debiasing(store: ArtifactStore, tmp_path: Path):
    scores, ratings = scores_and_ratings(store)
    evidence = evaluate_variant.function(
        store, "untouched", scores, None, ratings, None, View(label="x"), MismatchConfig(bootstrap_replicates=50)
    )
    selection = choose_models.function(store, evidence, SelectionConfig())
    assert selection.overvalued_models == ("a",)
    check(choose_models, hashlib.sha256(selection.model_dump_json().encode()).hexdigest()[:16])
    offsets = fit_model_offsets.function(
        store, scores, ratings, selection.reference_models, OffsetConfig(bootstrap_replicates=0)
    )
    check(fit_model_offsets, record(store, offsets))
    check(offset_scores, content(store, offset_scores.function(store, scores, offsets)))
    check(rate_by_scores, content(store, rate_by_scores.function(store, scores, ratings)))
    rows = [(f"p{n:02d}", f"question {n}", model, f"{model} {n}") for n in range(40) for model in "abc"]
    asked = tmp_path / "asked.parquet"
    pl.DataFrame(rows, schema=["prompt_id", "prompt", "policy_model", "response"], orient="row").write_parquet(asked)
    responses = load_responses.function(store, source_file(str(asked)), ResponsesConfig(source="x"), None)
    config = PreferenceConfig(strategy="all_pairs")
    check(
        build_pairs,
        content(
            store, build_pairs.function(store, responses, scores, offsets, ChosenModels.of(selection), config).pairs
        ),
    )
    checked = check_offsets.function(store, scores, ratings, OffsetConfig(reference_model="c"), 3)
    check(check_offsets, hashlib.sha256(json.dumps(rounded(checked.model_dump())).encode()).hexdigest()[:16])


def test_every_step_has_a_golden_or_a_reason():
    """Scoring, training, packaging and what is only layout are held by the tests of those parts."""
    held_elsewhere = {
        "score_responses", "load_scores", "load_preferences", "load_win_rates", "train_reward_model", "package_model",
        "compose_report", "simulate_sources", "judge_truth", "load_rm_bench", "tabulate_rm_bench",
    }  # fmt: skip
    names = {name.split(" ")[0] for name in GOLDEN}
    steps = {value.name for module in MODULES for value in vars(module).values() if isinstance(value, Step)}
    assert steps == names | held_elsewhere
