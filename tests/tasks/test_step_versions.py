"""Steps that compute something else need another version, or finished work of the old kind is served.

When a test here fails and the change is meant: raise the step's version, then write its new digest here.
"""

import hashlib
import json
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages

import polars as pl
import pytest

import tasks
from charm_core.best_of_n import BestOfNConfig
from charm_core.judging import JudgeRules, VerdictMarks
from charm_core.mismatch import MismatchConfig
from charm_core.offsets import OffsetConfig
from charm_core.policy_comparison import ComparisonConfig
from charm_core.preferences import PreferenceConfig
from charm_core.prompt_sets import SelectionRules
from charm_core.rating_movement import RecalibrationRule
from charm_core.replay_formats import ReplayRules
from charm_core.responses import CALIBRATION, SplitConfig
from charm_core.sampling import Answer, samples_table
from charm_core.selection import SelectionConfig
from charm_core.tables import PREFERENCES, PROMPTS, RATINGS, RESPONSES, SAMPLES, SCORES, WIN_RATES
from tasks.ablation import remove_length
from tasks.arena import ArenaConfig, collect_history, collect_ratings, fit_arena_ratings, match_ratings
from tasks.benchmark_sources import BenchmarkData, Resampling, identify_benchmark, load_benchmark
from tasks.benchmarking import compare_on_benchmark, judge_benchmark, tabulate_benchmark
from tasks.best_of_n import pick_best_of_n
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
from tasks.evaluation import (
    View,
    compare_styles,
    compare_variants,
    evaluate_preferences,
    evaluate_variant,
    evaluate_win_rates,
)
from tasks.gathering import join_samples
from tasks.judging import plan_judge_requests, plan_second_tries, weigh_judgements
from tasks.policy_comparison import compare_answers
from tasks.post_training import join_answers, number_samples, repeat_prompts
from tasks.prompt_sets import PromptSource, choose_prompts, read_prompt_source
from tasks.prompts import ResponsesConfig, load_responses, select_responses, split_responses
from tasks.ratings.changes import PolicyNames, compare_boards, trace_boards
from tasks.remote_scoring import ScoredShard, cut_responses, join_scores
from tasks.replay import replay_answers
from tasks.sampling import cut_prompts, join_shards
from tasks.store import ArtifactRef, ArtifactStore, SourceFile, source_file
from tasks.text_scores import ScoredTexts

GOLDEN = {
    "compare_answers v1": "f31452b8901e93f1",
    "join_answers v1": "b2fe2e770e986a67",
    "number_samples v1": "2a228943dc3dbb0f",
    "repeat_prompts v1": "7de399fd47bfa06f",
    "pick_best_of_n v1": "767a2cd1cb61eaa2",
    "remove_length v1": "8c0adb541ac8feb3",
    "compare_styles v1": "ebf23a7b784727c6",
    "tabulate_benchmark v1": "06658d207ea4b3bc",
    "compare_on_benchmark v1": "29993ea9f3c41edb",
    "judge_benchmark v1": "ddc7eaf8323e6e8a4fe54c272f66fb7e",
    "load_benchmark v1": "434d1f1fb70724ad",
    "load_responses v1": "c4ade4a467148cb3",
    "split_responses v1": "abd04d02dd7e932d",
    "select_responses v1": "ada6797929b6c0c1",
    "collect_ratings v1": "885c6d48d30d27a2",
    "match_ratings v1": "00aeb7e7cec7eac4",
    "evaluate_variant v2": "fc3a404fe2b8de1a",
    "compare_variants v1": "00147d283943439c",
    "evaluate_preferences v1": "ac067c96b679161a",
    "evaluate_win_rates v1": "2731ed54209e9281",
    "choose_models v1": "38d01814a8de31e7",
    "fit_model_offsets v1": "56ad9e60b4f922bc",
    "offset_scores v1": "649225753de6f15f",
    "rate_by_scores v2": "1ffd4c7c3ac78227",
    "build_pairs v1": "83015455e2fa88ca",
    "check_offsets v1": "9d0e2ba4ce7612c4",
    "fit_arena_ratings v1": "7f1f9479ba7a6daf",
    "collect_history v1": "7de7da0b7686c2aa",
    "compare_boards v1": "975deb1a2b3518fa",
    "trace_boards v1": "01e95fdb354600f9",
    "cut_prompts v1": "8105f5bd53b4eabd",
    "join_shards v1": "8d9017e9f18e5ffb",
    "join_samples v1": "b66de2162ed76102",
    "read_prompt_source v1": "b902bb396aa6c967",
    "choose_prompts v1": "031ab57443d93e0e",
    "replay_answers v1": "47681e63c595ccea",
    "plan_judge_requests v1": "4d4855d0e2641f74",
    "plan_second_tries v1": "9e50412cc03d0f97",
    "weigh_judgements v1": "48a1c7bbbca180b7",
    "cut_responses v1": "da18646a62ae75d6",
    "join_scores v1": "80aa984da778f3ae",
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
    check(rate_by_scores, content(store, rate_by_scores.function(store, scores)))
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


def prompt_lines(path: Path) -> PromptSource:
    rows = [
        {"prompt": text, "id": f"i{n}"}
        for n, text in enumerate(["one", "One ", "two", "three and four", "five", "six"])
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return PromptSource(source=str(path))


def test_prompt_sets_and_replay(store: ArtifactStore, tmp_path: Path):
    source = prompt_lines(tmp_path / "prompts.jsonl")
    found = read_prompt_source.function(store, source.identify(), source.reading())
    check(read_prompt_source, content(store, found.prompts))
    known = (
        ("it", found.model_copy(update={"prompts": store.write_frame(store.read_frame(found.prompts)[3:4], "x")})),
    )
    chosen = choose_prompts.function(store, found, SelectionRules(limit=3, seed=1), found, known)
    check(choose_prompts, content(store, chosen.prompts, chosen.removed))
    answers = tmp_path / "answers.jsonl"
    answers.write_text(
        "\n".join(json.dumps({"prompt": text, "response": f"to {text}"}) for text in ("two", "five", "x"))
    )
    replayed = replay_answers.function(store, chosen.prompts, "m", source_file(str(answers)), ReplayRules())
    check(replay_answers, content(store, replayed.samples))


def test_judging(store: ArtifactStore, tmp_path: Path):
    responses = load_responses.function(store, table(tmp_path), ResponsesConfig(source="x"), None)
    plan = plan_judge_requests.function(store, responses, JudgeRules(max_prompts=5))
    check(plan_judge_requests, content(store, plan.requests, plan.comparisons))
    requests = store.read_frame(plan.requests).get_column("prompt_id")
    answers = [
        Answer(prompt_id=name, response=("[[FIRST]]", "[[TIE]]", "none")[n % 3], status="complete")
        for n, name in enumerate(requests)
    ]
    samples = store.write_table(samples_table("judge", answers), SAMPLES)
    again = plan_second_tries.function(store, plan.requests, samples, VerdictMarks())
    check(plan_second_tries, content(store, again))
    weighed = weigh_judgements.function(store, plan.comparisons, (samples,), VerdictMarks(), None)
    check(weigh_judgements, content(store, weighed.preferences))


def test_remote_scores(store: ArtifactStore, tmp_path: Path):
    responses = load_responses.function(store, table(tmp_path), ResponsesConfig(source="x"), None)
    shards = cut_responses.function(store, responses, 4)
    check(cut_responses, content(store, *(ref for shard in shards for ref in (shard.prompts, shard.responses))))
    values = pl.DataFrame({"prompt_id": ["p1", "p2"], "policy_model": "a", "value": [0.25, 0.5]})
    shard = ScoredShard(
        values=store.write_frame(values, "values"), texts=2, prompts_cut=0, responses_cut=0, refused=0, reasons=()
    )
    check(join_scores, content(store, join_scores.function(store, (shard,), "sigmoid").scores))


def test_rating_changes(store: ArtifactStore, tmp_path: Path):
    lines = [
        f"2025-0{month}-28,{name},overall,false,{rating + month * step},{rating + month * step - 5},{rating + month * step + 5},7,p"
        for month in (1, 2)
        for name, rating, step in (("a", 1000.5, 3), ("b", 1100.5, 3), ("c", 1050.5, 40))
    ]
    many = tmp_path / "many.csv"
    many.write_text("date,model,category,style_control,rating,ci_low,ci_high,votes,source\n" + "\n".join(lines) + "\n")
    found = collect_history.function(store, source_file(str(many)), ArenaConfig(source="x")).boards
    check(collect_history, content(store, *(board.ratings for board in found)))
    names, rule = PolicyNames(policy_models=("a", "c")), RecalibrationRule()
    check(compare_boards, record(store, compare_boards.function(store, found[0], found[1], names, rule)))
    check(trace_boards, record(store, trace_boards.function(store, found, names, rule)))


def test_samples_are_cut_joined_and_made_responses(store: ArtifactStore):
    rows = [(f"p{n:02d}", "all", [{"role": "user", "content": f"question {n}"}]) for n in range(30)]
    asked = store.write_table(pl.DataFrame(rows, schema=dict(PROMPTS.columns), orient="row"), PROMPTS)
    shards = cut_prompts.function(store, asked, 10)
    check(cut_prompts, content(store, *shards))
    answers = [
        Answer(prompt_id=f"p{n:02d}", response=f"answer {n}", status="failed" if n % 7 == 0 else "complete")
        for n in range(30)
    ]
    parts = tuple(store.write_table(samples_table("m", answers[start::2]), SAMPLES) for start in (0, 1))
    joined = join_shards.function(store, parts)
    check(join_shards, content(store, joined.samples))
    gathered = join_samples.function(store, asked, (joined.samples,))
    check(join_samples, content(store, gathered.prompts, gathered.responses))


def test_benchmarks(store: ArtifactStore, tmp_path: Path):
    rows = [
        {
            "id": n,
            "subset": ("hep-go", "xstest-should-refuse")[n % 2],
            "prompt": f"p{n}",
            "chosen": str(n * 5 % 7),
            "rejected": str(n % 4),
        }
        for n in range(12)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    benchmark = load_benchmark.function(
        store, "rewardbench", identify_benchmark("rewardbench", BenchmarkData(source=str(path)))
    )
    check(load_benchmark, content(store, benchmark.texts.prompts, benchmark.texts.responses))
    responses = store.read_table(benchmark.texts.responses, RESPONSES)
    cut = store.write_frame(
        responses.select("prompt_id", "policy_model", prompt_cut=True, response_cut=False)[:3], "cut_texts"
    )
    scores = responses.select("prompt_id", "policy_model", score=pl.col("response").cast(pl.Float64) / 2)
    scored = ScoredTexts(
        scores=store.write_table(scores, SCORES), cut=cut, texts=scores.height, prompts_cut=3, responses_cut=0
    )
    resampling = Resampling(replicates=50)
    before = judge_benchmark.function(store, benchmark, scored, resampling)
    check(judge_benchmark, content(store, before.outcomes) + record(store, before.evidence))
    worse = scores.with_columns(-pl.col("score"))
    other = scored.model_copy(update={"scores": store.write_table(worse, SCORES)})
    after = judge_benchmark.function(store, benchmark, other, resampling)
    compared = compare_on_benchmark.function(store, benchmark, before.outcomes, after.outcomes, resampling)
    check(compare_on_benchmark, record(store, compared))
    table = tabulate_benchmark.function(
        store, (("untouched", before), ("calibrated", after)), (("untouched", "calibrated", compared),)
    )
    check(tabulate_benchmark, record(store, table))


def test_styles(store: ArtifactStore):
    scores, _ = scores_and_ratings(store)
    table = store.read_table(scores, SCORES)
    rows = [
        (prompt, model, "- item\n" * (n % 4) + "word " * (n % 11))
        for n, (prompt, model, _) in enumerate(table.iter_rows())
    ]
    responses = store.write_table(pl.DataFrame(rows, schema=dict(RESPONSES.columns), orient="row"), RESPONSES)
    turned = store.write_table(table.with_columns(-pl.col("score")), SCORES)
    compared = compare_styles.function(
        store,
        ("untouched", scores),
        ("calibrated", turned),
        responses,
        None,
        View(label="all prompts"),
        MismatchConfig(bootstrap_replicates=50),
    )
    check(compare_styles, record(store, compared))


def test_length_is_removed(store: ArtifactStore):
    scores, _ = scores_and_ratings(store)
    rows = [(name, model, "x" * (n * n % 50 + 1)) for n, (name, model, _) in enumerate(store.read_frame(scores).rows())]
    responses = store.write_table(pl.DataFrame(rows, schema=dict(RESPONSES.columns), orient="row"), RESPONSES)
    check(remove_length, content(store, remove_length.function(store, scores, responses, scores, responses)))


def test_best_of_n_and_post_training(store: ArtifactStore, tmp_path: Path):
    scores, ratings = scores_and_ratings(store)
    texts = [(f"p{n:02d}", model, model * (n % 5 + 1)) for n in range(40) for model in "abc"]
    responses = store.write_table(pl.DataFrame(texts, schema=dict(RESPONSES.columns), orient="row"), RESPONSES)
    config = BestOfNConfig(sizes=(1, 2, 3), bootstrap_replicates=50)
    picked = pick_best_of_n.function(
        store,
        (("x", scores), ("y", scores)),
        responses,
        config,
        ratings=ratings,
        quality=scores,
        compared=(("x", "y"),),
    )
    check(pick_best_of_n, record(store, picked))
    loaded = load_responses.function(store, table(tmp_path), ResponsesConfig(source="x"), None)
    repeated = repeat_prompts.function(store, loaded.prompts, 2)
    check(repeat_prompts, content(store, repeated))
    asked = store.read_frame(repeated).get_column("prompt_id")
    answers = [Answer(prompt_id=name, response=f"to {name}", status="complete") for name in asked]
    samples = store.write_table(samples_table("m", answers), SAMPLES)
    numbered = number_samples.function(store, loaded.prompts, samples, 2)
    check(number_samples, content(store, numbered.prompts, numbered.responses))
    own = [Answer(prompt_id=f"p{n}", response=f"to {n}", status="complete") for n in range(12)]
    joined = join_answers.function(store, loaded.prompts, (store.write_table(samples_table("m", own), SAMPLES),))
    check(join_answers, content(store, joined.prompts, joined.responses))
    compared = compare_answers.function(
        store, loaded, ("a", "b"), (("a", "b"),), ComparisonConfig(bootstrap_replicates=50)
    )
    check(compare_answers, record(store, compared))


def test_every_step_has_a_golden_or_a_reason():
    """Scoring, training, packaging and what is only layout are held by the tests of those parts."""
    held_elsewhere = {
        "choose_repeated",
        "compare_repeated",
        "compose_ablation",
        "compose_evaluation_page",
        "compose_rating_page",
        "compose_report",
        "draw_figures",
        "draw_prompts",
        "judge_truth",
        "load_preferences",
        "load_scores",
        "load_win_rates",
        "package_model",
        "post_train_policy",
        "sample_shard",
        "score_by_truth",
        "score_responses",
        "score_responses_shard",
        "score_shard",
        "score_texts",
        "simulate_sources",
        "teach_policy",
        "train_reward_model",
    }
    names = {name.split(" ")[0] for name in GOLDEN}
    modules = [import_module(found.name) for found in walk_packages(tasks.__path__, "tasks.")]
    steps = {value.name for module in modules for value in vars(module).values() if isinstance(value, Step)}
    assert steps == names | held_elsewhere
