"""Where a run's ratings, responses and reward model come from: real sources or the simulated arena, in one shape."""

from dataclasses import dataclass
from pathlib import Path

from charm_core.errors import ConfigError
from charm_core.reward_model.spec import RewardModelSpec
from tasks.arena import ArenaConfig, Board, collect_ratings, fit_arena_ratings, match_ratings
from tasks.prompts import ResponsesConfig, ResponseSet, load_responses
from tasks.scoring import RewardModelRef, identify_reward_model
from tasks.simulation import SimulatedSources, SimulatedWorld, simulate_sources
from tasks.store import SourceFile, source_file
from tasks.training import TrainedModel, train_reward_model


@dataclass(frozen=True, kw_only=True)
class Sources:
    """What a calibration starts from."""

    name: str
    """What the reward model is called in the report."""
    board: Board
    responses: ResponseSet
    reward_model: RewardModelRef
    trained_on: SourceFile | None = None
    """Prompt ids that the reward model was trained on."""
    simulated: SimulatedSources | None = None
    base_training: TrainedModel | None = None


def gather_sources(
    simulation: SimulatedWorld | None,
    arena: ArenaConfig | None,
    responses: ResponsesConfig | None,
    reward_model: RewardModelSpec | None,
) -> Sources:
    """The simulation's sources if there is one, else the real ones.

    Raises:
        ConfigError: Something is missing, or the settings contradict each other.
        RatingsError: A policy model has no rating.
        ModelError: The reward model cannot be used.
    """
    if simulation is not None:
        return _simulated_sources(simulation)
    if arena is None or responses is None or reward_model is None:
        raise ConfigError("arena, responses and reward_model are all needed where nothing is simulated")
    return _real_sources(arena, responses, reward_model)


def rated(arena: ArenaConfig, policy_models: tuple[str, ...]) -> Board:
    """The board's ratings of the given policy models."""
    aliases = source_file(arena.aliases) if arena.aliases else None
    board = collect_ratings(source_file(arena.source), arena)
    return match_ratings(board, policy_models, aliases, arena.accept_near)


def _real_sources(arena: ArenaConfig, responses: ResponsesConfig, reward_model: RewardModelSpec) -> Sources:
    trained_on = source_file(responses.trained_on) if responses.trained_on else None
    if responses.exclude_trained_on and trained_on is None:
        raise ConfigError("responses.exclude_trained_on needs responses.trained_on, the file that lists those prompts")
    model = identify_reward_model(reward_model)
    found = load_responses(source_file(responses.source), responses, trained_on)
    return Sources(
        name=Path(reward_model.path).name,
        board=rated(arena, found.policy_models),
        responses=found,
        reward_model=model,
        trained_on=trained_on,
    )


def _simulated_sources(world: SimulatedWorld) -> Sources:
    """Draw a simulated arena, fit its ratings and train its biased reward model."""
    drawn = simulate_sources(world.arena, world.max_length)
    trained = train_reward_model(
        "simulated reward model", drawn.untrained, drawn.biased_pairs, None, world.base_training
    )
    return Sources(
        name="simulated reward model",
        board=fit_arena_ratings(drawn.battles, f"simulation, seed {world.arena.seed}"),
        responses=drawn.responses,
        reward_model=trained.model,
        simulated=drawn,
        base_training=trained,
    )
