"""Post-training a policy model: responses of its own, pairs as a reward model orders them, DPO, and who answers better."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl
from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import Task
from pydantic import BaseModel, ConfigDict, Field

from charm_core.best_of_n import sample_name
from charm_core.errors import ConfigError, SamplingError, WorkerLostError
from charm_core.reward_model.generation_job import PolicyModelSpec
from charm_core.reward_model.post_training_job import (
    PostTrainingConfig,
    PostTrainingJob,
    PostTrainingOutcome,
    TinyPolicyConfig,
    TinyPolicyJob,
)
from charm_core.sampling import Decoding
from charm_core.simulated_reading import fresh_prompts, quality_of, read_texts
from charm_core.simulation import SimulationConfig, simulate_arena
from charm_core.tables import PAIRS, PROMPTS, RESPONSES, SAMPLES, SCORES
from tasks.answering.generation import TransformersBackend, VllmBackend
from tasks.answering.policy_model_refs import identify_policy_model
from tasks.caching import step
from tasks.launching import run_post_training, run_tiny_policy
from tasks.policy_models import PolicyModel
from tasks.prompts import ResponseSet
from tasks.publishing import run_logger
from tasks.sampling import sample_responses
from tasks.scratch import scratch_folder
from tasks.store import ArtifactRef, ArtifactStore

UNTOUCHED = "untouched"
"""What the policy model is called that was not post-trained."""

_NOT_WEIGHTS = {"path", "revision", "batch_size"}


class PolicyFolder(BaseModel):
    """A policy model that runs on this machine, identified by its weights: not by where they lie."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    spec: PolicyModelSpec
    digest: str
    folder: ArtifactRef | None = Field(default=None, description="Where it is one of ours.")

    def identity(self) -> dict[str, Any]:
        """What goes into cache keys."""
        return {"digest": self.digest, "spec": self.spec.model_dump(mode="json", exclude=_NOT_WEIGHTS)}

    @contextmanager
    def local_spec(self, store: ArtifactStore) -> Iterator[PolicyModelSpec]:
        """The spec with a path that exists on this machine, its content verified."""
        if self.folder is None:
            yield self.spec
            return
        with store.local_folder(self.folder) as path:
            yield self.spec.model_copy(update={"path": str(path), "revision": None})

    def trained(self, folder: ArtifactRef) -> "PolicyFolder":
        """The same with other weights."""
        spec = self.spec.model_copy(update={"path": folder.uri, "revision": None})
        return PolicyFolder(spec=spec, digest=folder.digest, folder=folder)


class PostTrainedPolicy(BaseModel):
    """A post-trained policy model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: PolicyFolder
    outcome: PostTrainingOutcome


def identify_policy(backend: TransformersBackend | VllmBackend) -> PolicyFolder:
    """A policy model of the user's, by a digest of its folder or its hub revision.

    Raises:
        ConfigError: There is no such folder, or a hub id comes without a commit hash.
    """
    ref = identify_policy_model(PolicyModel(name=UNTOUCHED, backend=backend))
    spec = PolicyModelSpec(engine=backend.kind, **ref.backend.model_dump(exclude={"kind"}))
    return PolicyFolder(spec=spec, digest=str(ref.weights))


def check_apart(store: ArtifactStore, training: ArtifactRef, exam: ArtifactRef) -> None:
    """See to it that no prompt is both trained on and judged on.

    Raises:
        ConfigError: Some are.
    """
    both = store.read_table(training, PROMPTS).join(store.read_table(exam, PROMPTS), on="messages", how="semi")
    if both.height:
        raise ConfigError(
            f"{both.height} prompts are in both prompts and exam_prompts, the first is {both.row(0)[0]!r}; post-training must not "
            "see what it is judged on: leave them out of one"
        )


@step(version=1)
def draw_prompts(store: ArtifactStore, world: SimulationConfig, count: int, name: str) -> ArtifactRef:
    """Prompts about a simulated arena that are not among its own."""
    return store.write_table(fresh_prompts(world, count, name), PROMPTS)


@step(version=1)
def teach_policy(store: ArtifactStore, world: SimulationConfig, prompts: int, config: TinyPolicyConfig) -> PolicyFolder:
    """Teach a tiny policy model to write as the simulated writers do.

    Args:
        store: Where the model goes.
        world: The arena.
        prompts: How many prompts the writers answer for it.
        config: Its size, and how long it is taught.
    """
    arena = simulate_arena(world.model_copy(update={"prompts": prompts}))
    with scratch_folder("tiny-policy") as folder:
        job = TinyPolicyJob(
            vocabulary=arena.vocabulary,
            prompts_path=Path(folder, "prompts.parquet"),
            responses_path=Path(folder, "responses.parquet"),
            output_dir=Path(folder, "model"),
            config=config,
        )
        arena.prompts.write_parquet(job.prompts_path)
        arena.responses.write_parquet(job.responses_path)
        run_tiny_policy(job, run_logger().info)
        written = store.write_folder(job.output_dir, "policy_model")
    spec = PolicyModelSpec(path=written.uri, dtype="float32", batch_size=64)
    return PolicyFolder(spec=spec, digest=written.digest, folder=written)


def sample_candidates(
    store: ArtifactStore, prompts: ArtifactRef, policy: PolicyFolder, decoding: Decoding, count: int
) -> ResponseSet:
    """Several responses of one policy model to each prompt, in the current flow; they are ``sample#1``, ``sample#2``, ...

    Raises:
        ModelError: The policy model cannot be used.
        SamplingError: It failed, or answered nothing.
    """
    asked = repeat_prompts(prompts, count)
    with policy.local_spec(store) as spec:
        sampled = sample_responses(asked, _policy_model("sample", spec), decoding)
    return number_samples(prompts, sampled.samples, count)


def answer_prompts(
    store: ArtifactStore, prompts: ArtifactRef, policies: Mapping[str, PolicyFolder], decoding: Decoding
) -> ResponseSet:
    """One response of each policy model to each prompt, in the current flow.

    Raises:
        ModelError: A policy model cannot be used.
        SamplingError: One failed, or answered nothing.
    """
    samples = []
    for name, policy in policies.items():
        with policy.local_spec(store) as spec:
            samples.append(sample_responses(prompts, _policy_model(name, spec), decoding).samples)
    return join_answers(prompts, tuple(samples))


@step(version=1)
def repeat_prompts(store: ArtifactStore, prompts: ArtifactRef, count: int) -> ArtifactRef:
    """Each prompt several times under ids of its own, so that one process draws several responses to it."""
    table = store.read_table(prompts, PROMPTS)
    copies = [
        table.with_columns(pl.format("{}#{}", "prompt_id", pl.lit(number)).alias("prompt_id"))
        for number in range(1, count + 1)
    ]
    return store.write_table(pl.concat(copies), PROMPTS)


@step(version=1)
def number_samples(store: ArtifactStore, prompts: ArtifactRef, samples: ArtifactRef, count: int) -> ResponseSet:
    """The responses to repeated prompts as responses of several candidates to one prompt."""
    known = store.read_table(prompts, PROMPTS).select("prompt_id")
    answered = store.read_table(samples, SAMPLES).filter(pl.col("status") != "failed")
    parts = [
        known.with_columns(
            pl.format("{}#{}", "prompt_id", pl.lit(number)).alias("asked"),
            pl.lit(sample_name("sample", number)).alias("policy_model"),
        )
        for number in range(1, count + 1)
    ]
    responses = (
        pl.concat(parts)
        .join(answered.select(asked="prompt_id", response="response"), on="asked")
        .select(list(RESPONSES.columns))
    )
    return _response_set(store, store.read_table(prompts, PROMPTS), responses)


@step(version=1)
def join_answers(store: ArtifactStore, prompts: ArtifactRef, samples: tuple[ArtifactRef, ...]) -> ResponseSet:
    """The responses of several policy models in one table; a request that failed has none."""
    answered = pl.concat([store.read_table(ref, SAMPLES) for ref in samples]).filter(pl.col("status") != "failed")
    return _response_set(store, store.read_table(prompts, PROMPTS), answered.select(list(RESPONSES.columns)))


@step(version=1)
def score_by_truth(store: ArtifactStore, world: SimulationConfig, responses: ResponseSet) -> ArtifactRef:
    """SCORES with the true quality of texts about a simulated arena, whoever wrote them."""
    read = read_texts(
        world, store.read_table(responses.prompts, PROMPTS), store.read_table(responses.responses, RESPONSES)
    )
    return store.write_table(quality_of(world, read), SCORES)


def _worker_was_lost(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    return isinstance(state.result(raise_on_failure=False), WorkerLostError)


@step(version=1, retries=1, retry_delay_seconds=5, retry_condition_fn=_worker_was_lost)
def post_train_policy(
    store: ArtifactStore, policy: PolicyFolder, pairs: ArtifactRef, config: PostTrainingConfig
) -> PostTrainedPolicy:
    """DPO of a policy model on preference pairs, in processes of their own.

    Args:
        store: Where the pairs are and the result goes.
        policy: Where training starts, and the reference of DPO.
        pairs: PAIRS.
        config: How.
    """
    with scratch_folder("post-training") as folder, policy.local_spec(store) as spec:
        job = PostTrainingJob(
            model=spec, pairs_path=Path(folder, "pairs.parquet"), output_dir=Path(folder, "model"), config=config
        )
        store.read_table(pairs, PAIRS).write_parquet(job.pairs_path)
        outcome = run_post_training(job, run_logger().info)
        written = store.write_folder(job.output_dir, "policy_model")
    return PostTrainedPolicy(model=policy.trained(written), outcome=outcome)


def _policy_model(name: str, spec: PolicyModelSpec) -> PolicyModel:
    if spec.engine == "vllm":
        known = VllmBackend.model_fields
        return PolicyModel(name=name, backend=VllmBackend(**_settings(spec, known)))
    return PolicyModel(name=name, backend=TransformersBackend(**_settings(spec, TransformersBackend.model_fields)))


def _settings(spec: PolicyModelSpec, known: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in spec.model_dump().items() if name in known}


def _response_set(store: ArtifactStore, prompts: pl.DataFrame, responses: pl.DataFrame) -> ResponseSet:
    if responses.is_empty():
        raise SamplingError("the policy model answered none of the prompts; check its folder and the decoding")
    return ResponseSet(
        prompts=store.write_table(prompts.join(responses, on="prompt_id", how="semi"), PROMPTS),
        responses=store.write_table(responses, RESPONSES),
        policy_models=tuple(responses.get_column("policy_model").unique().sort().to_list()),
        empty_responses=responses.filter(pl.col("response").str.strip_chars() == "").height,
    )
