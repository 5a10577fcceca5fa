"""Best-of-n as a step: what is in the store goes in, a report comes out, and a table that says the same."""

from pathlib import Path

import polars as pl
import pytest
from prefect import flow

from charm_core.best_of_n import BestOfNConfig, BestOfNReport, Known, measure_best_of_n
from charm_core.bradley_terry import ratings_from_battles
from charm_core.responses import SplitConfig, split_prompts
from charm_core.simulation import SimulationConfig, simulate_arena
from charm_core.tables import RATINGS, RESPONSES, SCORES
from tasks.best_of_n import best_of_n_metrics, pick_best_of_n
from tasks.caching import use_store
from tasks.evaluation import View
from tasks.pages.best_of_n_table import best_of_n_markdown
from tasks.store import ArtifactRef, ArtifactStore

CONFIG = BestOfNConfig(sizes=(1, 2, 4), bootstrap_replicates=50)
VIEW = View(
    label="held-out prompts", parts=("held_out",), policy_models=("sim-amber", "sim-coral", "sim-dune", "sim-fjord")
)


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(url=str(tmp_path / "store"), work_folder=str(tmp_path / "work"))


@pytest.fixture(scope="module")
def arena():
    return simulate_arena(SimulationConfig(prompts=60, label_prompts=10, battles=500))


def worse(quality: pl.DataFrame) -> pl.DataFrame:
    return quality.with_columns(score=pl.col("score") * 0 + pl.col("policy_model").str.len_chars())


def test_only_what_the_view_shows_is_picked_from(store: ArtifactStore, arena):
    split = split_prompts(arena.prompts, SplitConfig(held_out_fraction=0.5))
    ratings = ratings_from_battles(arena.battles)
    scores = {"truth": arena.true_quality, "names": worse(arena.true_quality)}
    ref = pick_best_of_n.function(
        store,
        tuple((name, store.write_table(table, SCORES)) for name, table in scores.items()),
        store.write_table(arena.responses, RESPONSES),
        CONFIG,
        ratings=store.write_table(ratings, RATINGS),
        quality=store.write_table(arena.true_quality, SCORES),
        split=store.write_frame(split, "split"),
        view=VIEW,
        compared=(("names", "truth"),),
    )
    report = store.read_record(ref, BestOfNReport)
    held_out = split.filter(part="held_out")
    assert (report.candidates, report.prompts) == (4, held_out.height)
    assert report.policy_models == VIEW.policy_models
    seen = {
        name: table.join(held_out, on="prompt_id", how="semi").filter(pl.col("policy_model").is_in(VIEW.policy_models))
        for name, table in scores.items()
    }
    known = Known(ratings=ratings, quality=arena.true_quality)
    assert report == measure_best_of_n(seen, arena.responses, known, CONFIG, [("names", "truth")])
    gain = next(item.difference for item in report.differences if (item.measure, item.n) == ("quality", 4))
    assert gain.low > 0


def test_the_table_says_what_was_measured(arena):
    known = Known(quality=arena.true_quality)
    scores = {"truth": arena.true_quality, "names": worse(arena.true_quality)}
    report = measure_best_of_n(scores, arena.responses, known, CONFIG, [("names", "truth")])
    text = best_of_n_markdown(report, {"truth": "Truth", "names": "Names"})
    assert "9 responses to each of 60 prompts." in text
    assert "| n | Truth | Names | Truth − Names | best possible |" in text
    (value,) = [item for item in report.values if (item.scorer, item.n, item.measure) == ("truth", 4, "quality")]
    row = text.partition("True quality")[2].partition("| 4 |")[2].splitlines()[0]
    assert row.startswith(f" {value.value.value:.2f} [{value.value.low:.2f}, {value.value.high:.2f}] |")
    assert row.endswith(f"| {value.best_possible:.2f} |")
    assert best_of_n_metrics(report)["truth/best of 4/quality"] == value.value.value


@flow
def picked(scores: ArtifactRef, responses: ArtifactRef, config: BestOfNConfig) -> ArtifactRef:
    return pick_best_of_n((("rm", scores),), responses, config)


@pytest.mark.usefixtures("prefect_session")
def test_it_is_cached_by_what_is_picked_from(store: ArtifactStore, arena):
    with use_store(store):
        scores, responses = store.write_table(arena.true_quality, SCORES), store.write_table(arena.responses, RESPONSES)
        first = picked(scores, responses, CONFIG)
        Path(first.uri).write_bytes(b"damaged")
        assert picked(scores, responses, CONFIG) == first
        assert store.read_record(first, BestOfNReport).candidates == 9
        other = picked(scores, responses, CONFIG.model_copy(update={"sizes": (1,)}))
        assert {item.n for item in store.read_record(other, BestOfNReport).values} == {1}
