"""The effect report says which recipe is best, and no more than the seeds show."""

from pathlib import Path

import pytest

from charm_core.ablation import CellMeasures
from tasks.ablation import compose_ablation
from tasks.pages.ablation_page import AblationPage, ablation_answer, ablation_text
from tasks.pages.report_data import Provenance
from tasks.store import ArtifactStore

RECIPES = ("untouched", "control", "BT", "margin", "matching")


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(url=str(tmp_path / "store"), work_folder=str(tmp_path / "work"))


def composed(store: ArtifactStore, values: dict[str, tuple[float, ...]], skipped: tuple[str, ...] = ()) -> AblationPage:
    cells = tuple(
        CellMeasures(
            cell=cell,
            seed=seed,
            values={"mismatch": value} | ({} if cell == "untouched" else {"pairs": 10.0}) | {"RM-Bench overall": 0.5},
        )
        for cell, row in values.items()
        for seed, value in enumerate(row)
    )
    report = compose_ablation.function(
        store, "title", "an RM", "a board", False, cells, "control", RECIPES, skipped,
        Provenance(command="python -m flows.ablate", settings_toml=""),
    )  # fmt: skip
    assert "an RM" in store.read_bytes(report.html).decode()
    return store.read_record(report.data, AblationPage)


CONTROL = {"untouched": (0.30, 0.31, 0.30), "control": (0.30, 0.31, 0.30)}


def test_the_best_recipe_is_named_with_what_it_is_better_than(store: ArtifactStore):
    page = composed(
        store, CONTROL | {"BT": (0.20, 0.21, 0.20), "matching": (0.05, 0.061, 0.05), "200 pairs": (0.01, 0.02, 0.01)}
    )
    assert (page.best, page.runner_up.cell) == ("matching", "BT")  # fewer pairs are no recipe of their own
    assert page.runner_up.difference.value == pytest.approx(0.15, abs=0.001)
    assert "matching has the lowest mean |MD|" in ablation_answer(page)
    assert "The next, BT, is worse by 0.150 [" in ablation_answer(page)
    assert [measure.name for measure in page.measures] == ["mismatch", "pairs", "RM-Bench overall"]


def test_a_lead_within_the_noise_is_no_lead(store: ArtifactStore):
    page = composed(store, CONTROL | {"BT": (0.10, 0.12, 0.08), "margin": (0.09, 0.08, 0.12)})
    assert "That it is better than the next, BT, is not shown" in ablation_answer(page)


def test_nothing_is_best_if_nothing_is_better_than_the_control(store: ArtifactStore):
    page = composed(store, CONTROL | {"BT": (0.20, 0.40, 0.30)})
    assert (page.best, page.runner_up) == (None, None)
    assert "No trained recipe is clearly better than the control" in ablation_answer(page)


def test_what_is_left_out_is_said(store: ArtifactStore):
    page = composed(store, CONTROL | {"BT": (0.20, 0.21, 0.20)}, skipped=("20,000 pairs: left out (only 4,704).",))
    assert "20,000 pairs: left out (only 4,704)." in ablation_text(page)
