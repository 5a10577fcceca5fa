"""Responses that exist already, in place of sampling: AlpacaEval outputs, Arena-Hard answers, tables and datasets."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from charm_core.errors import ConfigError
from charm_core.replay import ReplayCounts, match_answers
from charm_core.replay_formats import ReplayRules, read_answers
from charm_core.sampling import SampleCounts, count_samples
from charm_core.tables import PROMPTS, SAMPLES
from tasks.caching import step
from tasks.policy_models import PolicyModel, ReplayBackend
from tasks.sampling import SampledModel
from tasks.store import ArtifactRef, ArtifactStore
from tasks.user_tables import Source, identify_source, read_rows


class ReplayedModel(SampledModel):
    """The responses of one policy model, and what became of the rows of their file."""

    replay: ReplayCounts


class MatchedAnswers(BaseModel):
    """Responses that were found for the prompts of a set."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    samples: ArtifactRef = Field(description="SAMPLES; a prompt without a response has no row.")
    counts: SampleCounts
    replay: ReplayCounts


def replay_responses(prompts: ArtifactRef, model: PolicyModel) -> ReplayedModel:
    """Take the responses of a policy model from a file.

    Args:
        prompts: PROMPTS. Arena-Hard's answers name their questions by id: for them, the prompts of its question file.
        model: Whose responses, and where they lie.

    Raises:
        ConfigError: A back end that is no replay, a source that does not exist, several policy models in it and none of this name.
        TableError: A file that cannot be read, no response to any of the prompts, two different ones to the same.
        ServiceError: The Hugging Face hub does not answer.
    """
    backend = model.backend
    if not isinstance(backend, ReplayBackend):
        raise ConfigError(f"the policy model {model.name!r} is not replayed but has the back end {backend.kind!r}")
    rules = ReplayRules.model_validate(backend.model_dump(include=set(ReplayRules.model_fields)))
    found = replay_answers(prompts, model.name, _source(backend, model.name), rules)
    return ReplayedModel(
        name=model.name,
        samples=found.samples,
        counts=found.counts,
        decoding=model.decoding,
        warnings=found.replay.sentences(model.name),
        replay=found.replay,
    )


@step(version=1)
def replay_answers(
    store: ArtifactStore, prompts: ArtifactRef, policy_model: str, source: Source, rules: ReplayRules
) -> MatchedAnswers:
    """Match the responses of a file to prompts."""
    answers = read_answers(read_rows(source), rules)
    replayed = match_answers(answers, store.read_table(prompts, PROMPTS), policy_model, rules)
    return MatchedAnswers(
        samples=store.write_table(replayed.samples, SAMPLES),
        counts=count_samples(replayed.samples),
        replay=replayed.counts,
    )


def _source(backend: ReplayBackend, policy_model: str) -> Source:
    """The source; of a folder with a file for this policy model, that file.

    Arena-Hard's ``model_answer`` has one ``<policy model>.jsonl`` each, AlpacaEval's ``results/<policy model>`` has
    ``model_outputs.json``.

    Raises:
        ConfigError: It does not exist.
    """
    folder = Path(backend.source).expanduser()
    for name in (f"{policy_model}.jsonl", "model_outputs.json"):
        if (folder / name).is_file():
            return identify_source(str(folder / name))
    if folder.is_dir() and backend.format in ("arena_hard", "alpaca_eval"):
        there = ", ".join(path.name for path in sorted(folder.iterdir())[:40])
        raise ConfigError(
            f"the folder {folder} has no {policy_model}.jsonl and no model_outputs.json, only {there}; give the file as source"
        )
    return identify_source(backend.source, split=backend.split, config=backend.config, revision=backend.revision)
