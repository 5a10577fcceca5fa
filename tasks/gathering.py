"""Responses of several policy models to one set of prompts, sampled or replayed, as one table."""

from collections.abc import Sequence
from typing import Self

import polars as pl
from pydantic import BaseModel, ConfigDict, Field, model_validator

from charm_core.errors import SamplingError
from charm_core.sampling import Decoding, decoding_differences
from charm_core.tables import PROMPTS, RESPONSES, SAMPLES
from tasks.caching import step
from tasks.pages.report_data import PolicyModelResponses
from tasks.policy_models import PolicyModel, ReplayBackend
from tasks.prompt_sets import PromptSet, PromptSetConfig, load_prompt_set
from tasks.prompts import ResponseSet
from tasks.replay import replay_responses
from tasks.sampling import SampledModel, sample_policy_models
from tasks.store import ArtifactRef, ArtifactStore


class SamplingConfig(BaseModel):
    """Prompts, and the policy models that answer them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompts: PromptSetConfig = Field(description="Which prompts.")
    policy_models: tuple[PolicyModel, ...] = Field(min_length=1, description="Who answers them, and through what.")
    decoding: Decoding = Field(default=Decoding(), description="How responses are sampled, where nothing else is said.")
    shard_prompts: int = Field(default=1000, ge=1, description="Prompts per shard, about: what is stored at once.")
    max_failed_share: float = Field(
        default=0.02,
        ge=0,
        le=1,
        description="Most requests to a policy model that may fail for good, as a share of the prompts.",
    )

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        names = [model.name for model in self.policy_models]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"policy_models names {twice} more than once; give each policy model once")
        return self


class Gathered(BaseModel):
    """Responses to be scored, and how they were had."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    responses: ResponseSet
    prompts: PromptSet
    models: tuple[SampledModel, ...]
    rows: tuple[PolicyModelResponses, ...] = Field(description="For the report.")
    warnings: tuple[str, ...]


def gather_responses(config: SamplingConfig) -> Gathered:
    """Have every policy model answer every prompt, or take the answers that exist.

    Raises:
        ConfigError: Settings that contradict each other.
        SamplingError: A policy model has no response to any prompt.
        ServiceError: An endpoint does not answer; what it answered before is kept.
    """
    prompts = load_prompt_set(config.prompts)
    models = _answers(prompts.prompts, config)
    silent = [model.name for model in models if model.counts.prompts == model.counts.failed]
    if silent:
        raise SamplingError(f"{silent} answered none of the {prompts.prompts.rows} prompts; check their back end")
    return Gathered(
        responses=join_samples(prompts.prompts, tuple(model.samples for model in models)),
        prompts=prompts,
        models=models,
        rows=tuple(
            _row(model, settings, prompts) for model, settings in zip(models, config.policy_models, strict=True)
        ),
        warnings=_warnings(models),
    )


@step(version=1)
def join_samples(store: ArtifactStore, prompts: ArtifactRef, samples: tuple[ArtifactRef, ...]) -> ResponseSet:
    """All answers in one table of responses; a request that failed has none."""
    answered = pl.concat([store.read_table(ref, SAMPLES) for ref in samples]).filter(pl.col("status") != "failed")
    responses = answered.select(list(RESPONSES.columns))
    return ResponseSet(
        prompts=store.write_table(
            store.read_table(prompts, PROMPTS).join(responses, on="prompt_id", how="semi"), PROMPTS
        ),
        responses=store.write_table(responses, RESPONSES),
        policy_models=tuple(responses.get_column("policy_model").unique().sort().to_list()),
        empty_responses=answered.filter(pl.col("response").str.strip_chars() == "").height,
    )


def _answers(prompts: ArtifactRef, config: SamplingConfig) -> tuple[SampledModel, ...]:
    """Replayed first: a file that does not fit is found before anybody is asked."""
    replayed = [model for model in config.policy_models if isinstance(model.backend, ReplayBackend)]
    live = [model for model in config.policy_models if model not in replayed]
    answers: dict[str, SampledModel] = {model.name: replay_responses(prompts, model) for model in replayed}
    if live:
        sampled = sample_policy_models(
            prompts, live, config.decoding, config.shard_prompts, max_failed_share=config.max_failed_share
        )
        answers.update({model.name: model for model in sampled})
    return tuple(answers[model.name] for model in config.policy_models)


def _row(model: SampledModel, settings: PolicyModel, prompts: PromptSet) -> PolicyModelResponses:
    decoding = model.decoding
    return PolicyModelResponses(
        policy_model=model.name,
        source=settings.backend.described(),
        decoding="" if decoding is None else _decoding(decoding),
        counts=model.counts,
        missing=(prompts.prompts.rows or 0) - model.counts.prompts,
    )


def _decoding(decoding: Decoding) -> str:
    """What was set, in one line."""
    values = decoding.model_dump(exclude_none=True)
    shown = {name.replace("_", " "): value for name, value in values.items() if value != ()}
    return ", ".join(f"{name} {value}" for name, value in shown.items())


def _warnings(models: Sequence[SampledModel]) -> tuple[str, ...]:
    differences = decoding_differences([(model.name, model.decoding) for model in models])
    return (*differences, *(warning for model in models for warning in model.warnings))
