"""A tiny reward model and what it scores, for tests of the steps around scoring."""

from collections.abc import Callable
from pathlib import Path

import polars as pl

from charm_core.reward_model import worker
from charm_core.reward_model.jobs import ScoringJob, ScoringSummary
from charm_core.reward_model.spec import RewardModelSpec
from charm_core.tables import PROMPTS, RESPONSES
from tasks.prompts import ResponseSet
from tasks.scoring import RewardModelRef, identify_reward_model
from tasks.store import ArtifactStore
from tasks.worker_processes import OnLine
from tests.charm_core.reward_model import tiny

RunScoring = Callable[[ScoringJob, Callable[[int, int], None], OnLine], ScoringSummary]

WARNED = "WARNING charm_core.reward_model.text_scoring: out of memory with 900 tokens at once; going on with 450"
"""A line that every process of ``scoring_here`` prints."""


def reward_model(folder: Path) -> RewardModelRef:
    """Of what ``tiny.save_model`` has saved."""
    return identify_reward_model(RewardModelSpec(path=str(folder), max_length=64, min_response_tokens=8))


def response_set(store: ArtifactStore, number: int) -> ResponseSet:
    """Responses of three policy models to so many prompts."""
    prompts, responses = tiny.prompts_and_responses(number)
    return ResponseSet(
        prompts=store.write_table(prompts, PROMPTS),
        responses=store.write_table(responses, RESPONSES),
        policy_models=("a", "b", "c"),
    )


def scoring_here(counts: list[int]) -> RunScoring:
    """In place of ``run_scoring``: what a process does is done in this one, for starting it takes seconds.

    Args:
        counts: Texts of every call are added to it.
    """

    def run_scoring(job: ScoringJob, _progress: Callable[[int, int], None], log: OnLine) -> ScoringSummary:
        counts.append(pl.read_parquet(job.responses_path).height)
        log(WARNED)
        worker._score(job)
        return ScoringSummary.model_validate_json(job.scores_path.with_suffix(".json").read_text())

    return run_scoring
