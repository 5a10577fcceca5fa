"""Where a run's ratings, responses and reward model come from: real sources or the simulated arena, in one shape."""

from dataclasses import dataclass
from pathlib import Path

from charm_core.errors import ConfigError
from charm_core.reward_model.spec import RewardModelSpec, TrainingConfig
from tasks.arena import ArenaConfig, Board, fit_arena_ratings, match_ratings, obtain_board
from tasks.caching import current_store
from tasks.gathering import SamplingConfig, gather_responses
from tasks.pages.report_data import PolicyModelResponses
from tasks.preflight import check_before_run
from tasks.prompts import ResponsesConfig, ResponseSet, load_responses
from tasks.publishing import run_logger
from tasks.scoring import RewardModelRef, identify_reward_model
from tasks.simulation import SimulatedSources, SimulatedWorld, simulate_sources
from tasks.store import ArtifactRef, SourceFile, source_file
from tasks.training import TrainedModel, train_reward_model


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Rated policy models and their responses."""

    board: Board
    responses: ResponseSet
    rows: tuple[PolicyModelResponses, ...] = ()
    """Where each policy model's responses come from, if they were gathered one by one."""
    trained_on: SourceFile | ArtifactRef | None = None
    """Prompt ids that the reward model was trained on."""
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Sources:
    """What a calibration starts from."""

    name: str
    """What the reward model is called in the report."""
    answers: Answers
    reward_model: RewardModelRef
    simulated: SimulatedSources | None = None
    base_training: TrainedModel | None = None
    warnings: tuple[str, ...] = ()
    """Of the pre-flight checks."""

    @property
    def board(self) -> Board:
        """The ratings."""
        return self.answers.board

    @property
    def responses(self) -> ResponseSet:
        """The responses."""
        return self.answers.responses


def real_sources(
    arena: ArenaConfig | None,
    responses: ResponsesConfig | None,
    sampling: SamplingConfig | None,
    reward_model: RewardModelSpec | None,
    training: TrainingConfig | None,
) -> Sources:
    """Ratings, responses and a reward model; what can be wrong with the reward model is found before anything is sampled.

    Raises:
        ConfigError: Something is missing, or the settings contradict each other.
        RatingsError: A policy model has no rating.
        ModelError: The reward model cannot be used.
    """
    if reward_model is None:
        raise ConfigError("reward_model is needed where nothing is simulated")
    model, store = identify_reward_model(reward_model), current_store()
    if sampling is not None:
        # nobody is asked for responses that cannot be scored
        check_before_run(store, model, None, training).raise_on_errors()
    answers = gather_answers(arena, responses, sampling)
    found = check_before_run(store, model, answers.responses, training)
    for finding in found.findings:
        run_logger().info("pre-flight, %s: %s", finding.severity, finding.message)
    found.raise_on_errors()
    return Sources(
        name=Path(reward_model.path).name,
        answers=answers,
        reward_model=model,
        warnings=tuple(f"{finding.message[0].upper()}{finding.message[1:]}" for finding in found.warnings),
    )


def gather_answers(
    arena: ArenaConfig | None, responses: ResponsesConfig | None, sampling: SamplingConfig | None
) -> Answers:
    """Ratings and responses: from a table that exists, or gathered policy model by policy model.

    Raises:
        ConfigError: Something is missing, or the settings contradict each other.
        RatingsError: A policy model has no rating.
    """
    if arena is None or (responses is None) == (sampling is None):
        raise ConfigError("arena and one of responses and sampling are needed where nothing is simulated")
    return _loaded(arena, responses) if responses is not None else _gathered(arena, sampling)


def rated(arena: ArenaConfig, policy_models: tuple[str, ...]) -> Board:
    """The board's ratings of the given policy models."""
    aliases = source_file(arena.aliases) if arena.aliases else None
    return match_ratings(obtain_board(arena), policy_models, aliases, arena.accept_near)


def _loaded(arena: ArenaConfig, responses: ResponsesConfig) -> Answers:
    trained_on = source_file(responses.trained_on) if responses.trained_on else None
    if responses.exclude_trained_on and trained_on is None:
        raise ConfigError("responses.exclude_trained_on needs responses.trained_on, the file that lists those prompts")
    found = load_responses(source_file(responses.source), responses, trained_on)
    return Answers(board=rated(arena, found.policy_models), responses=found, trained_on=trained_on)


def _gathered(arena: ArenaConfig, sampling: SamplingConfig | None) -> Answers:
    if sampling is None:
        raise ConfigError("sampling is missing")
    # before anybody is asked: a policy model without a rating is of no use
    board = rated(arena, tuple(sorted(model.name for model in sampling.policy_models)))
    gathered = gather_responses(sampling)
    return Answers(
        board=board,
        responses=gathered.responses,
        rows=gathered.rows,
        trained_on=gathered.prompts.trained_on,
        warnings=gathered.warnings,
        notes=gathered.prompts.sentences(),
    )


def simulated_sources(world: SimulatedWorld) -> Sources:
    """Draw a simulated arena, fit its ratings and train its biased reward model."""
    drawn = simulate_sources(world.arena, world.max_length)
    # its pairs are ordered by the simulated taste, not by scores of the untrained model
    training = world.base_training.model_copy(update={"raw_scores_of": "another_model"})
    trained = train_reward_model("simulated reward model", drawn.untrained, drawn.biased_pairs, None, training)
    board = fit_arena_ratings(drawn.battles, f"simulation, seed {world.arena.seed}")
    return Sources(
        name="simulated reward model",
        answers=Answers(board=board, responses=drawn.responses),
        reward_model=trained.model,
        simulated=drawn,
        base_training=trained,
    )
