"""Responses of policy models that answer live: asked once per prompt, stored shard by shard, gone on with after a break.

The prompts are cut into shards by their ids (see ``shard_numbers``). A shard of one policy model is a cached step, keyed by
its prompts, the policy model and the decoding; what is not in the cache is asked for, answer by answer into a journal. So

- a run that was killed goes on with the prompts that have no answer yet;
- another prompt more or less makes one shard anew, for which only that prompt is asked;
- a shard in which a request failed for good is used as it is, but never counts as done: the next run asks for it again.
"""

import math
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl
from pydantic import BaseModel, ConfigDict, Field

from charm_core.errors import ArtifactError, ConfigError
from charm_core.sampling import Decoding, SampleCounts, count_samples, samples_table, shard_numbers
from charm_core.tables import PROMPTS, SAMPLES
from tasks.answering.asking import REASONS_SHOWN, Asking, Shard, ask_all
from tasks.answering.chat import OpenAIBackend
from tasks.answering.earlier_answers import AnsweredShard, earlier_answers, remember_shard
from tasks.answering.journal import Journal
from tasks.answering.policy_model_refs import PolicyModelRef, identify_policy_model
from tasks.answering.sampling_progress import SamplingProgress, rates
from tasks.caching import content_key, current_store, step
from tasks.policy_models import PolicyModel
from tasks.publishing import run_logger
from tasks.store import ArtifactRef, ArtifactStore

JOURNALS = "sampling"
"""Folder of the work folder."""


class SampledShard(BaseModel):
    """The answers of one policy model to some of the prompts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    samples: ArtifactRef
    served_as: tuple[str, ...] = Field(description="What the server calls the model that answered.")


class JoinedSamples(BaseModel):
    """All shards of a policy model together."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    samples: ArtifactRef
    counts: SampleCounts


class SampledModel(BaseModel):
    """All answers of one policy model, and how they were had."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    samples: ArtifactRef = Field(description="SAMPLES.")
    counts: SampleCounts
    decoding: Decoding | None = Field(default=None, description="How it was sampled; none: not known (replayed).")
    served_as: tuple[str, ...] = Field(default=(), description="What the server calls the model that answered.")
    asked: int = Field(default=0, description="Requests of this run.")
    seconds: float | None = Field(default=None, description="From the first request of this run to the last answer.")
    tokens_per_second: float | None = Field(default=None, description="Response tokens a second in this run.")
    cost: float | None = Field(default=None, description="Of all its answers, at the prices that the back end states.")
    reasons: tuple[str, ...] = Field(default=(), description="Why requests failed, most frequent first.")
    warnings: tuple[str, ...] = Field(default=(), description="What somebody should look at.")


def sample_responses(
    prompts: ArtifactRef,
    model: PolicyModel,
    decoding: Decoding,
    shard_prompts: int = 1000,
    *,
    max_failed_share: float = 0.02,
) -> SampledModel:
    """``sample_policy_models`` for one."""
    return sample_policy_models(prompts, [model], decoding, shard_prompts, max_failed_share=max_failed_share)[0]


def sample_policy_models(
    prompts: ArtifactRef,
    models: Sequence[PolicyModel],
    decoding: Decoding,
    shard_prompts: int = 1000,
    *,
    max_failed_share: float = 0.02,
) -> tuple[SampledModel, ...]:
    """Have every policy model answer every prompt, in the current flow. Endpoints are asked side by side.

    Args:
        prompts: PROMPTS.
        models: Who answers; not one that replays.
        decoding: How, where a policy model has no decoding of its own.
        shard_prompts: Prompts per shard, about; decides what is stored at once and not what is lost by an interruption,
            which is at most the requests under way.
        max_failed_share: Most requests that may fail for good, as a share of the prompts; more are an error. Failed
            requests are rows with status ``failed``.

    Returns:
        One record per policy model, in their order.

    Raises:
        ConfigError: Settings that contradict each other, a rejected key, an unknown model.
        ServiceError: An endpoint answers nobody. What was answered is kept, here and below.
        SamplingError: Too many requests failed, or a local model did.
        ModelError: A local policy model cannot be used.
    """
    _check(models)
    store = current_store()
    shards = cut_prompts(prompts, shard_prompts)
    allowed = math.floor(max_failed_share * (prompts.rows or 0) + 1e-9)
    runs = [
        _Run(store=store, ref=identify_policy_model(model), decoding=model.decoding or decoding, prompts=shards)
        for model in models
    ]
    with ExitStack() as held:
        _hold(runs, held)
        run_of = {run.open(allowed): run for run in runs}
        for asking in run_of:
            asking.check_secret()
        with SamplingProgress(run_of) as progress, closing(ask_all(store, run_of)) as answers:
            for told in answers:
                progress.update(told.asking)
                if told.finished is not None and not told.finished.failed:
                    run_of[told.asking].keep(told.finished)
        return tuple(run.result() for run in runs)


def _check(models: Sequence[PolicyModel]) -> None:
    names = [model.name for model in models]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"the policy models {twice} are named more than once; give each one once")


def _hold(runs: "Sequence[_Run]", held: ExitStack) -> None:
    """Take the journals of all shards that are not done, so that no other run asks for the same answers."""
    pending = {run.key(prompts): run.journal(prompts) for run in runs for prompts in run.pending()}
    # in one order: two runs never wait for each other
    for _, journal in sorted(pending.items()):
        held.enter_context(journal.held())


@dataclass(kw_only=True)
class _Run:
    """One policy model in this run."""

    store: ArtifactStore
    ref: PolicyModelRef
    decoding: Decoding
    prompts: tuple[ArtifactRef, ...]
    """All shards."""
    asking: Asking = field(init=False)
    kept: dict[str, SampledShard] = field(default_factory=dict)
    """What was stored in this run, by the digest of its prompts."""

    def key(self, prompts: ArtifactRef) -> str:
        """Cache key of a shard, and the name of its journal."""
        return sample_shard.key(prompts, self.ref, self.decoding)

    def journal(self, prompts: ArtifactRef) -> Journal:
        """The journal of a shard."""
        return _journal(self.store, self.key(prompts))

    def pending(self) -> list[ArtifactRef]:
        """The shards that are not done."""
        return [prompts for prompts in self.prompts if not sample_shard.is_recorded(prompts, self.ref, self.decoding)]

    def open(self, allowed_failures: int) -> Asking:
        """Find out what is missing, take what is known, and store what that completes."""
        pending = self.pending()
        shards = [Shard(prompts=prompts, key=self.key(prompts), journal=self.journal(prompts)) for prompts in pending]
        known = self._fill(shards)
        for shard in shards:
            shard.journal.close()
        self.asking = Asking(
            model=self.ref,
            decoding=self.decoding,
            shards=shards,
            allowed_failures=allowed_failures,
            answered_before=known or len(pending) < len(self.prompts),
        )
        for shard in shards:
            if not shard.missing:
                self.keep(shard)
        if self.asking.missing:
            total = sum(prompts.rows or 0 for prompts in self.prompts)
            run_logger().info("%s: %d of %d prompts are to be asked", self.ref.name, self.asking.missing, total)
        return self.asking

    def keep(self, shard: Shard) -> None:
        """Store a shard whose prompts are all answered; its journal has done its work."""
        kept = self.kept[shard.prompts.digest] = sample_shard(shard.prompts, self.ref, self.decoding)
        answered = AnsweredShard(prompts=shard.prompts, samples=kept.samples, served_as=kept.served_as)
        remember_shard(self.store, self._asked, answered)
        shard.journal.remove()

    def result(self) -> SampledModel:
        """All shards together."""
        shards = [self._shard(prompts) for prompts in self.prompts]
        joined = join_shards(tuple(shard.samples for shard in shards))
        asking = self.asking
        tokens = (joined.counts.prompt_tokens, joined.counts.response_tokens)
        served_as = tuple(sorted({name for shard in shards for name in shard.served_as}))
        result = SampledModel(
            name=self.ref.name,
            samples=joined.samples,
            counts=joined.counts,
            decoding=self.decoding,
            served_as=served_as,
            asked=asking.asked,
            seconds=asking.seconds or None,
            tokens_per_second=asking.tokens_per_second,
            cost=self.ref.backend.cost(*tokens),
            reasons=tuple(f"{reason} ({count} times)" for reason, count in asking.reasons.most_common(REASONS_SHOWN)),
            warnings=_served_otherwise(self.ref, served_as),
        )
        if asking.asked:
            run_logger().info("%s: %d answers in %.0f s; %s", result.name, asking.asked, asking.seconds, rates(asking))
        for warning in result.warnings:
            run_logger().warning("%s", warning)
        return result

    def _shard(self, prompts: ArtifactRef) -> SampledShard:
        if prompts.digest in self.kept:
            return self.kept[prompts.digest]
        if any(shard.prompts == prompts for shard in self.asking.shards):
            # a request failed: used, but not recorded, so that it is not done
            return sample_shard.function(self.store, prompts, self.ref, self.decoding)
        return sample_shard(prompts, self.ref, self.decoding)

    @property
    def _asked(self) -> str:
        """Who is asked, and how."""
        return content_key("answers", sample_shard.version, {"model": self.ref, "decoding": self.decoding})

    def _fill(self, shards: Sequence[Shard]) -> bool:
        """Find what is missing of each shard, and write into its journal what an earlier run has; whether there is any."""
        wanted: dict[str, tuple[Shard, list[dict[str, str]]]] = {}
        known = False
        for shard in shards:
            answers = shard.journal.read()
            table = self.store.read_table(shard.prompts, PROMPTS)
            for prompt_id, messages in table.select("prompt_id", "messages").iter_rows():
                answer = answers.get(prompt_id)
                if answer is None or answer.status == "failed":
                    shard.missing.add(prompt_id)
                    wanted[prompt_id] = (shard, messages)
                else:
                    known = True
        for answer in earlier_answers(
            self.store, self._asked, {name: messages for name, (_, messages) in wanted.items()}
        ):
            shard, _ = wanted[answer.prompt_id]
            shard.journal.append(answer)
            shard.missing.discard(answer.prompt_id)
            known = True
        return known


def _served_otherwise(model: PolicyModelRef, served_as: Sequence[str]) -> tuple[str, ...]:
    """What to say where the server does not repeat the name that it was asked for."""
    if not isinstance(model.backend, OpenAIBackend) or set(served_as) <= {model.backend.model}:
        return ()
    return (
        f"{model.name} was asked for as {model.backend.model!r}, and the server says that it was answered by "
        f"{', '.join(map(repr, served_as))}: make sure that this is the policy model whose rating is used",
    )


def _journal(store: ArtifactStore, key: str) -> Journal:
    return Journal(Path(store.work_folder, JOURNALS), key)


@step(version=1)
def cut_prompts(store: ArtifactStore, prompts: ArtifactRef, shard_prompts: int) -> tuple[ArtifactRef, ...]:
    """Cut prompts into shards, by their ids; which prompt set one belongs to plays no part in what is asked."""
    table = store.read_table(prompts, PROMPTS).with_columns(prompt_set=pl.lit(""))
    numbers = shard_numbers(table.get_column("prompt_id").to_list(), shard_prompts)
    shards = table.with_columns(shard=pl.Series(numbers)).partition_by("shard", include_key=False, as_dict=True)
    return tuple(store.write_table(shard, PROMPTS) for _, shard in sorted(shards.items()))


@step(version=1)
def sample_shard(store: ArtifactStore, prompts: ArtifactRef, model: PolicyModelRef, decoding: Decoding) -> SampledShard:
    """Store the answers of a policy model to some prompts, which are in the journal."""
    answers = _journal(store, sample_shard.key(prompts, model, decoding)).read()
    asked = store.read_table(prompts, PROMPTS).get_column("prompt_id").to_list()
    missing = [prompt_id for prompt_id in asked if prompt_id not in answers]
    if missing:
        raise ArtifactError(f"{len(missing)} answers of {model.name!r} are gone from the work folder; run again")
    samples = samples_table(model.name, [answers[prompt_id] for prompt_id in asked])
    served_as = {answer.served_as for answer in answers.values() if answer.served_as}
    return SampledShard(samples=store.write_table(samples, SAMPLES), served_as=tuple(sorted(served_as)))


@step(version=1)
def join_shards(store: ArtifactStore, shards: tuple[ArtifactRef, ...]) -> JoinedSamples:
    """All answers of a policy model in one table."""
    samples = pl.concat([store.read_table(shard, SAMPLES) for shard in shards])
    return JoinedSamples(samples=store.write_table(samples, SAMPLES), counts=count_samples(samples))
