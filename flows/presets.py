"""Named, complete settings, as functions: ``demo`` needs no data, ``paper`` is the CHARM paper's recipe, ``recommended`` ours."""

from charm_core.offsets import OffsetConfig
from charm_core.preferences import PreferenceConfig
from charm_core.promotion import GateConfig
from charm_core.responses import SplitConfig
from charm_core.reward_model.post_training_job import PostTrainingConfig
from charm_core.reward_model.spec import TrainingConfig
from charm_core.sampling import Decoding
from charm_core.simulation import HELD_OUT_WRITERS
from flows.runs import (
    AblationRun,
    AuditRun,
    CalibrationRun,
    CollectRatingsRun,
    EvaluationRun,
    PostTrainRun,
    RecalibrationRun,
    SimulatedPolicy,
)
from tasks.arena import ArenaConfig
from tasks.ratings.sources import OFFICIAL_DATASET
from tasks.registry import PromotionConfig
from tasks.simulation import SimulatedWorld

SIMULATED_GATE = PromotionConfig(gate=GateConfig(may_be_unmeasured=("benchmarks", "markdown_bias")))
"""There are no benchmarks in the simulated arena, and its texts hold no Markdown."""


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
        promotion=SIMULATED_GATE,
    )


def demo_recalibration() -> RecalibrationRun:
    """The demo's calibration, of whose simulated arena there are no other ratings: nothing to do."""
    run = demo()
    return RecalibrationRun(**{name: getattr(run, name) for name in run.model_fields_set})


def demo_ablation() -> AblationRun:
    """The demo's calibration against its alternatives, in worlds that nothing was tuned on."""
    return AblationRun(name="simulated arena", calibration=demo(), seeds=(3, 4, 5))


def paper() -> CalibrationRun:
    """The paper's recipe, on the simulated arena until arena, responses and reward_model are given."""
    return CalibrationRun(
        name="paper recipe",
        simulation=simulated_world(),
        split=SplitConfig(held_out_policy_models=HELD_OUT_WRITERS),
        calibration=OffsetConfig(estimator="cross_prompt"),
        preferences=PreferenceConfig(strategy="overvalued_vs_reference"),
        training=TrainingConfig(),
        promotion=SIMULATED_GATE,
    )


def recommended() -> CalibrationRun:
    """The recipe that came out best in the effect report, for reward models of ordinary size; simulated until sources are given.

    Its learning rate is too small for the simulated arena's tiny reward model, as the paper's is.
    """
    return CalibrationRun(
        name="recommended recipe",
        simulation=simulated_world(),
        split=SplitConfig(held_out_policy_models=HELD_OUT_WRITERS),
        preferences=PreferenceConfig(strategy="all_pairs"),
        training=TrainingConfig(
            objective="win_rate_matching",
            pairs_per_step=256,
            win_rate_memory=256,
            win_rate_temperature=0.15,
            regression_weight=0.15,
        ),
        promotion=SIMULATED_GATE,
    )


def demo_evaluation() -> EvaluationRun:
    """Human alignment of a simulated reward model, on the prompts and writers that the demo's calibration holds out."""
    return EvaluationRun(
        name="simulated arena",
        simulation=simulated_world(),
        split=SplitConfig(held_out_policy_models=HELD_OUT_WRITERS),
    )


def official_ratings() -> CollectRatingsRun:
    """The latest overall board of the Arena's own dataset, without style control; name policy_models to watch them."""
    return CollectRatingsRun(arena=ArenaConfig(source=OFFICIAL_DATASET))


def demo_post_training() -> PostTrainRun:
    """DPO of a tiny policy model in a simulated arena, its responses labelled by the base, control and calibrated reward models.

    The arena has fewer topics than the calibration's demo: a policy model this small learns what belongs to six of them.
    """
    run = demo()
    world = simulated_world()
    arena = world.arena.model_copy(update={"topics": 6, "facts_per_topic": 6})
    return PostTrainRun(
        name="simulated arena",
        simulation=SimulatedPolicy(
            calibration=run.model_copy(update={"simulation": world.model_copy(update={"arena": arena})})
        ),
        decoding=Decoding(sampling_temperature=1.0, max_tokens=80),
        training=PostTrainingConfig(
            epochs=3,
            learning_rate=1e-3,
            pairs_per_step=32,
            pairs_per_pass=32,
            max_length=128,
            threads_per_rank=1,  # its matrices are too small for two
        ),
    )


AUDIT = {"demo": demo_audit}
ABLATE = {"demo": demo_ablation}
CALIBRATE = {"demo": demo, "recommended": recommended, "paper": paper}
RECALIBRATE = {"demo": demo_recalibration}
EVALUATE = {"demo": demo_evaluation}
COLLECT_RATINGS = {"official": official_ratings}
POST_TRAIN = {"demo": demo_post_training}
