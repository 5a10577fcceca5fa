"""Named, complete settings, as functions. ``demo`` needs no data; ``paper`` is the recipe of the CHARM paper, for real sources."""

from charm_core.offsets import OffsetConfig
from charm_core.preferences import PreferenceConfig
from charm_core.responses import SplitConfig
from charm_core.reward_model.spec import TrainingConfig
from charm_core.selection import SelectionConfig
from charm_core.simulation import HELD_OUT_WRITERS
from flows.runs import AuditRun, CalibrationRun
from tasks.simulation import SimulatedWorld


def demo_audit() -> AuditRun:
    """Audit of a simulated reward model that really has a bias."""
    return AuditRun(name="simulated arena", simulation=SimulatedWorld())


def demo() -> CalibrationRun:
    """The whole job on a simulated arena with known truth; two writers are held out of the calibration."""
    return CalibrationRun(
        name="simulated arena",
        simulation=SimulatedWorld(),
        split=SplitConfig(held_out_fraction=0.4, held_out_policy_models=HELD_OUT_WRITERS),
        preferences=PreferenceConfig(strategy="all_pairs"),
        training=TrainingConfig(objective="margin_regression", learning_rate=1e-3),
    )


def paper() -> CalibrationRun:
    """The paper's recipe, on the simulated arena until arena, responses and reward_model are given."""
    return CalibrationRun(
        name="paper recipe",
        simulation=SimulatedWorld(),
        split=SplitConfig(held_out_policy_models=HELD_OUT_WRITERS),
        selection=SelectionConfig(),
        calibration=OffsetConfig(estimator="cross_prompt"),
        preferences=PreferenceConfig(strategy="overvalued_vs_reference"),
        training=TrainingConfig(),
    )


AUDIT = {"demo": demo_audit}
CALIBRATE = {"demo": demo, "paper": paper}
