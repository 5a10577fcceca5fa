"""The simulated arena as sources for a flow: prompts, responses, votes, a reward model that really has the bias, the truth."""

from pydantic import BaseModel, ConfigDict, Field

from charm_core.reward_model.spec import RewardModelSpec, TrainingConfig
from charm_core.simulation import SimulationConfig, simulate_arena
from charm_core.tables import BATTLES, PAIRS, PROMPTS, RESPONSES, SCORES
from tasks.caching import step
from tasks.prompts import ResponseSet
from tasks.scoring import RewardModelRef
from tasks.scratch import scratch_folder
from tasks.store import ArtifactRef, ArtifactStore


class SimulatedWorld(BaseModel):
    """A simulated arena, and how its biased reward model is trained."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    arena: SimulationConfig = Field(default=SimulationConfig(), description="Prompts, writers, votes and labels.")
    base_training: TrainingConfig = Field(default=TrainingConfig(), description="Training of the biased reward model.")
    max_length: int = Field(default=128, ge=8, description="Most tokens per text of its tiny reward model.")


class SimulatedSources(BaseModel):
    """What the simulation provides."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    responses: ResponseSet
    battles: ArtifactRef
    biased_pairs: ArtifactRef
    true_quality: ArtifactRef
    writers: ArtifactRef
    untrained: RewardModelRef


@step(version=1)
def simulate_sources(store: ArtifactStore, config: SimulationConfig, max_length: int) -> SimulatedSources:
    """Draw a simulated arena and an untrained tiny reward model that can read it."""
    from charm_core.reward_model.tiny import build_tiny_reward_model  # torch takes seconds to import

    arena = simulate_arena(config)
    with scratch_folder("tiny") as scratch:
        folder = scratch / "model"
        build_tiny_reward_model(arena.vocabulary, folder, seed=config.seed)
        untrained = store.write_folder(folder, "reward_model")
    return SimulatedSources(
        responses=ResponseSet(
            prompts=store.write_table(arena.prompts, PROMPTS),
            responses=store.write_table(arena.responses, RESPONSES),
            policy_models=tuple(arena.writers.get_column("policy_model").sort().to_list()),
        ),
        battles=store.write_table(arena.battles, BATTLES),
        biased_pairs=store.write_table(arena.biased_pairs, PAIRS),
        true_quality=store.write_table(arena.true_quality, SCORES),
        writers=store.write_frame(arena.writers, "writers"),
        untrained=RewardModelRef(
            spec=RewardModelSpec(path=untrained.uri, max_length=max_length), digest=untrained.digest, folder=untrained
        ),
    )
