"""A generative judge behind an OpenAI-compatible endpoint: from responses to its pairwise preferences.

Each question to the judge is a prompt like any other, asked by the sampling engine: stored shard by shard, gone on with after a
break, and never asked twice.
"""

from collections.abc import Iterable

import polars as pl
from pydantic import BaseModel, ConfigDict, Field

from charm_core.judging import JudgeRules, VerdictMarks, plan_judgements, read_verdict, second_tries
from charm_core.sampling import Decoding
from charm_core.tables import PREFERENCES, PROMPTS, RESPONSES, SAMPLES
from charm_core.verdicts import JudgeReport, weigh_verdicts
from tasks.answering.chat import OpenAIBackend
from tasks.caching import step
from tasks.policy_models import PolicyModel
from tasks.prompts import ResponseSet
from tasks.sampling import SampledModel, sample_responses
from tasks.store import ArtifactRef, ArtifactStore


class JudgeConfig(JudgeRules):
    """A language model that compares responses two by two, each pair in both orders."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    backend: OpenAIBackend = Field(description="The judge.")
    max_tokens: int = Field(default=2048, ge=1, description="Most tokens of an answer, its reasons included.")
    policy_model: str | None = Field(
        default=None,
        description="Which policy model the judge itself is, if one: its liking for its own responses is shown.",
    )
    shard_requests: int = Field(
        default=2000, ge=1, description="Questions to the judge that are stored together, about."
    )
    max_failed_share: float = Field(
        default=0.02,
        ge=0,
        le=1,
        description="Most requests that may fail for good; more are an error.",
    )

    def rules(self) -> JudgeRules:
        """What it is shown."""
        return JudgeRules(**{name: getattr(self, name) for name in JudgeRules.model_fields})

    def decoding(self) -> Decoding:
        """How it answers: the likeliest words, so that a verdict can be repeated."""
        return Decoding(sampling_temperature=0.0, max_tokens=self.max_tokens)


class PlannedJudgements(BaseModel):
    """What a judge is asked."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    requests: ArtifactRef = Field(description="PROMPTS.")
    comparisons: ArtifactRef


class WeighedJudgements(BaseModel):
    """What a judge prefers, and how it leans."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    preferences: ArtifactRef = Field(description="PREFERENCES.")
    report: JudgeReport


class Judged(BaseModel):
    """A judge's preferences among the responses of policy models."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    judge: str
    preferences: ArtifactRef = Field(description="PREFERENCES.")
    policy_models: tuple[str, ...] = Field(description="Whom they are about.")
    report: JudgeReport
    cost: float | None = Field(default=None, description="Of all answers, at the prices that the back end states.")
    warnings: tuple[str, ...] = Field(default=(), description="What somebody should look at.")

    def sentences(self) -> tuple[str, ...]:
        """What the reader of a report should know about the judge."""
        return self.report.sentences(self.judge)


def judge_responses(responses: ResponseSet, config: JudgeConfig) -> Judged:
    """Have a judge compare the responses of policy models, two by two, in the current flow.

    Raises:
        ConfigError: Settings that contradict each other, a rejected key, an unknown model.
        ServiceError: The endpoint answers nobody. What was answered is kept, here and below.
        SamplingError: Too many requests failed.
        TableError: Nothing to compare, or no verdict at all.
    """
    plan = plan_judge_requests(responses, config.rules())
    asked = [_ask(plan.requests, config, config.max_failed_share)]
    again = plan_second_tries(plan.requests, asked[0].samples, config.marks)
    if again.rows:
        # of a few second tries all may fail: they have no verdict then, as before
        asked.append(_ask(again, config, 1.0))
    weighed = weigh_judgements(
        plan.comparisons, tuple(answers.samples for answers in asked), config.marks, config.policy_model
    )
    return Judged(
        judge=config.backend.model,
        preferences=weighed.preferences,
        policy_models=responses.policy_models,
        report=weighed.report,
        cost=_sum(answers.cost for answers in asked),
        warnings=tuple(warning for answers in asked for warning in answers.warnings),
    )


@step(version=1)
def plan_judge_requests(store: ArtifactStore, responses: ResponseSet, rules: JudgeRules) -> PlannedJudgements:
    """Choose what the judge compares, and write what it is asked."""
    plan = plan_judgements(
        store.read_table(responses.prompts, PROMPTS), store.read_table(responses.responses, RESPONSES), rules
    )
    return PlannedJudgements(
        requests=store.write_table(plan.requests, PROMPTS),
        comparisons=store.write_frame(plan.comparisons, "comparisons"),
    )


@step(version=1)
def plan_second_tries(
    store: ArtifactStore, requests: ArtifactRef, samples: ArtifactRef, marks: VerdictMarks
) -> ArtifactRef:
    """What the judge is asked again because its answer had no verdict; often nothing."""
    again = second_tries(store.read_table(requests, PROMPTS), _answers(store, samples), marks)
    return store.write_frame(again, "prompts")


@step(version=1)
def weigh_judgements(
    store: ArtifactStore,
    comparisons: ArtifactRef,
    samples: tuple[ArtifactRef, ...],
    marks: VerdictMarks,
    own: str | None,
) -> WeighedJudgements:
    """From the judge's answers, first tries before second ones, to its preferences."""
    tries = [_answers(store, ref) for ref in samples]
    verdicts = {
        request: verdict
        for answers in tries  # a second try is made only where the first has no verdict
        for request, answer in answers.items()
        if (verdict := read_verdict(answer, marks)) is not None
    }
    failed = store.read_table(samples[0], SAMPLES).filter(pl.col("status") == "failed").get_column("prompt_id")
    weighed = weigh_verdicts(
        store.read_frame(comparisons),
        verdicts,
        failed=failed.to_list(),
        asked_again=samples[1].rows or 0 if len(samples) > 1 else 0,
        own=own,
    )
    return WeighedJudgements(preferences=store.write_table(weighed.preferences, PREFERENCES), report=weighed.report)


def _ask(requests: ArtifactRef, config: JudgeConfig, max_failed_share: float) -> SampledModel:
    judge = PolicyModel(name=config.backend.model, backend=config.backend)
    return sample_responses(
        requests, judge, config.decoding(), config.shard_requests, max_failed_share=max_failed_share
    )


def _answers(store: ArtifactStore, samples: ArtifactRef) -> dict[str, str]:
    """Request id to answer, without those that failed."""
    answered = store.read_table(samples, SAMPLES).filter(pl.col("status") != "failed")
    return dict(answered.select("prompt_id", "response").iter_rows())


def _sum(costs: Iterable[float | None]) -> float | None:
    known = list(costs)
    return None if None in known else sum(cost for cost in known if cost is not None)
