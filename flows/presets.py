"""Named, complete settings, as functions. ``demo`` needs no data; ``paper`` is the CHARM paper's recipe."""

from charm_core.offsets import OffsetConfig
from charm_core.preferences import PreferenceConfig
from charm_core.responses import SplitConfig
from charm_core.reward_model.spec import TrainingConfig
from charm_core.simulation import HELD_OUT_WRITERS
from flows.runs import AuditRun, CalibrationRun
from tasks.simulation import SimulatedWorld


def simulated_world() -> SimulatedWorld:
    """A simulated arena and the training that gives its reward model the bias of its labellers."""
    return SimulatedWorld(
        base_training=TrainingConfig(
            objective="bradley_terry",
            epochs=4,
            learning_rate=1e-3,
            warmup_ratio=0.05,
            weight_decay=0.01,
            pairs_per_step=272,
            zero_stage=None,
            threads_per_rank=1,  # its matrices are too small for two
        )
    )


def demo_audit() -> AuditRun:
    """Audit of a simulated reward model that really has a bias."""
    return AuditRun(name="simulated arena", simulation=simulated_world())


def demo() -> CalibrationRun:
    """The whole job on a simulated arena with known truth; two writers are held out of the calibration."""
    return CalibrationRun(
        name="simulated arena",
        simulation=simulated_world(),
        split=SplitConfig(held_out_policy_models=HELD_OUT_WRITERS),
        preferences=PreferenceConfig(strategy="all_pairs"),
        training=TrainingConfig(objective="win_rate_matching", epochs=3, learning_rate=5e-4, pairs_per_step=672),
    )


def paper() -> CalibrationRun:
    """The paper's recipe, on the simulated arena until arena, responses and reward_model are given."""
    return CalibrationRun(
        name="paper recipe",
        simulation=simulated_world(),
        split=SplitConfig(held_out_policy_models=HELD_OUT_WRITERS),
        calibration=OffsetConfig(estimator="cross_prompt"),
        preferences=PreferenceConfig(strategy="overvalued_vs_reference"),
        training=TrainingConfig(),
    )


AUDIT = {"demo": demo_audit}
CALIBRATE = {"demo": demo, "paper": paper}
