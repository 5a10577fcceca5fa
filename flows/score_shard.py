"""One shard of a large scoring, on a Prefect worker: started by a scoring whose CHARM_SCORING_DEPLOYMENT names it, not by people."""

import contextlib
from uuid import UUID

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Completed

from charm_core.errors import ConfigError
from flows.session import open_workplace
from flows.settings import RuntimeSettings
from tasks.abandoned_flow_runs import claim_flow_run
from tasks.scoring import RewardModelRef, ShardToScore, score_responses_shard
from tasks.scoring_settings import ScoringProcesses
from tasks.shard_runs import signs_of_life


@flow(name="score-shard")
def score_shard(store: str, model: RewardModelRef, shard: ShardToScore) -> State[None]:
    """Score a shard and record its scores in the store, where the scoring that asked for it looks for them.

    Args:
        store: Address of the asker's store.
        model: The reward model.
        shard: What to score with it.

    Raises:
        ArtifactError: The store cannot be written.
        ConfigError: The store of this worker is another one.
        ModelError: The reward model is another one here, or cannot be used.
        WorkerLostError: A process was killed three times.
    """
    runtime = RuntimeSettings()
    here = runtime.artifact_store().url
    if here != store:
        raise ConfigError(
            f"the store of this worker is {here}, that of the scoring is {store}: nobody would find the scores; give all workers "
            "of the shards the same CHARM_STORE"
        )
    with contextlib.ExitStack() as stack:
        if flow_run.id is not None:
            claim_flow_run(UUID(str(flow_run.id)))
            stack.enter_context(signs_of_life(UUID(str(flow_run.id))))
        stack.enter_context(open_workplace(runtime))
        scored = score_responses_shard(model, shard, ScoringProcesses(number=runtime.scoring_processes))
        return Completed(message=f"{scored.summary.texts:,} texts scored.")
