"""The ablation: every recipe is what it says, and a finished cell costs nothing."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from pydantic import ValidationError

from charm_core.mismatch import MismatchConfig
from charm_core.offsets import OffsetConfig
from charm_core.preferences import PreferenceConfig
from charm_core.responses import SplitConfig
from charm_core.reward_model.spec import TrainingConfig
from charm_core.simulation import HELD_OUT_WRITERS, SimulationConfig
from flows.ablate import CONTROL, ablate, seeded
from flows.ablation_cells import cells_of, compared_cells, skipped_cells
from flows.outcome import Outcome
from flows.runs import AblationRun, CalibrationRun
from flows.settings import RuntimeSettings
from tasks.ledger import last_ledger
from tasks.pages.ablation_page import AblationPage
from tasks.simulation import SimulatedWorld

PLAIN = {"zero_stage": None, "threads_per_rank": 1, "learning_rate": 1e-3}
TINY = CalibrationRun(
    name="tiny",
    simulation=SimulatedWorld(
        arena=SimulationConfig(prompts=40, label_prompts=30, battles=2000),
        base_training=TrainingConfig(epochs=1, pairs_per_step=90, **PLAIN),
    ),
    split=SplitConfig(held_out_policy_models=HELD_OUT_WRITERS),
    mismatch=MismatchConfig(bootstrap_replicates=100),
    calibration=OffsetConfig(bootstrap_replicates=0),
    preferences=PreferenceConfig(strategy="all_pairs"),
    training=TrainingConfig(objective="win_rate_matching", pairs_per_step=200, win_rate_memory=8, **PLAIN),
)
RUN = AblationRun(name="tiny", calibration=TINY, seeds=(0, 1), overvalued=(), references=(), pairs=(50, 10**6))


class TestCells:
    def test_each_changes_what_its_name_says(self):
        run = RUN.model_copy(update={"overvalued": (1,), "references": (2,)})
        applied = {cell.name: cell.applied(TINY) for cell in cells_of(run)}
        assert applied["no calibration"] == applied[CONTROL] == TINY
        reference = applied["Bradley-Terry, cross-prompt offsets (the reference)"]
        assert (reference.calibration.estimator, reference.training.objective) == ("cross_prompt", "bradley_terry")
        assert applied["Bradley-Terry"].calibration == TINY.calibration
        assert applied["Bradley-Terry"].training.win_rate_memory is None
        assert applied["Bradley-Terry"].training.learning_rate == 1e-3
        assert applied["margin regression"].training.objective == "margin_regression"
        assert applied["win-rate matching"] == TINY
        assert applied["1 overvalued policy model"].selection.max_overvalued == 1
        assert applied["2 reference policy models"].selection.auto_references == 2
        assert applied["2 reference policy models"].preferences.strategy == "overvalued_vs_reference"
        assert applied["50 pairs"].preferences.max_pairs == 50
        assert not {"50 pairs", "1 overvalued policy model"} & set(compared_cells(run))

    def test_style_control_needs_a_board_that_has_it(self):
        assert "style-controlled Elo" not in [cell.name for cell in cells_of(RUN)]
        assert skipped_cells(RUN) == ("Style-controlled ratings: the simulated arena has no such board.",)
        real = TINY.model_dump(exclude_unset=True) | {
            "simulation": None, "arena": {"source": "x"}, "responses": {"source": "x"}, "reward_model": {"path": "x"}
        }  # fmt: skip
        run = RUN.model_copy(update={"calibration": CalibrationRun.model_validate(real)})
        assert [cell.style_controlled for cell in cells_of(run) if cell.name == "style-controlled Elo"] == [True]
        assert skipped_cells(run) == ()

    def test_a_seed_is_a_seed_everywhere(self):
        run = seeded(TINY, 5)
        assert (run.split.seed, run.preferences.seed, run.training.seed, run.simulation.arena.seed) == (5, 5, 5, 5)

    @pytest.mark.parametrize("wrong", [{"seeds": (1, 1)}, {"seeds": (-1,)}, {"pairs": (0,)}, {"seeds": ()}])
    def test_settings_that_cannot_be_meant(self, wrong: dict[str, object]):
        with pytest.raises(ValidationError):
            AblationRun.model_validate(RUN.model_dump() | wrong)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, prefect_session: None) -> Iterator[Outcome]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CHARM_HOME", str(tmp_path_factory.mktemp("home")))
        yield ablate(RUN)


def page_of(outcome: Outcome) -> AblationPage:
    return AblationPage.model_validate_json(Path(outcome.data.uri).read_bytes())


@pytest.mark.slow
def test_every_recipe_is_measured_with_every_seed(first: Outcome):
    page = page_of(first)
    run = MlflowClient(RuntimeSettings().tracking().uri).get_run(first.tracking_url.rsplit("/", 1)[-1])
    assert run.info.run_name == f"ablate tiny · {len(page.cells)} recipes, 2 seeds"
    too_many = "1,000,000 pairs"
    assert {cell.cell: cell.seeds for cell in page.cells} == {c.name: 2 for c in cells_of(RUN) if c.name != too_many}
    (left_out,) = (sentence for sentence in page.skipped if sentence.startswith(too_many))
    assert left_out.endswith("left out with seed 0, 1 (preferences.max_pairs 1,000,000 is more than there are).")
    by_name = {cell.cell: cell.means for cell in page.cells}
    for name in ("no calibration", CONTROL, "win-rate matching", "50 pairs"):
        assert {"mismatch", "mismatch_new", "rmse", "spearman", "kendall", "truth", "length"} <= set(by_name[name])
    assert "mismatch_new" not in by_name["offsets at inference only"]  # nobody fitted an offset for them
    assert by_name["50 pairs"]["pairs"].value <= 50 < by_name["win-rate matching"]["pairs"].value
    assert by_name["no calibration"]["mismatch"].value != by_name["length regression, post hoc"]["mismatch"].value
    assert by_name["offsets at inference only"]["mismatch"].value < by_name["no calibration"]["mismatch"].value
    text = Path(first.report.uri).read_text()
    assert "This is a simulation" in text
    assert "Bradley-Terry, cross-prompt offsets (the reference)" in text


@pytest.mark.slow
def test_a_finished_cell_costs_nothing_and_keeps_its_time(first: Outcome):
    again = ablate(RUN)
    assert again.report == first.report
    calls = last_ledger(RuntimeSettings().artifact_store(), "ablate tiny").calls
    assert {call.reused for call in calls} == {True}
    assert all("seconds" in cell.means for cell in page_of(again).cells if "pairs" in cell.means)


@pytest.mark.slow
def test_one_more_seed_runs_only_that_seed(first: Outcome):
    page = page_of(ablate(RUN.model_copy(update={"seeds": (0, 1, 2), "pairs": ()})))
    assert page.seeds == (0, 1, 2)
    calls = last_ledger(RuntimeSettings().artifact_store(), "ablate tiny").calls
    trained = [call for call in calls if call.step == "train_reward_model"]
    assert [call.reused for call in trained] == [True] * 12 + [False] * 6
