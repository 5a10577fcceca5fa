"""Scores: identify a reward model by its weights, score responses with it, or read scores and preferences that exist."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl
from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import Task
from pydantic import BaseModel, ConfigDict, Field

from charm_core.errors import ConfigError, ModelError, TrainingError, WorkerLostError
from charm_core.responses import ColumnNames, ingest_preferences, ingest_scores, ingest_win_rates
from charm_core.reward_model.jobs import ScoringJob, ScoringSummary
from charm_core.reward_model.scoring_shares import cut_into_shards, merge_summaries
from charm_core.reward_model.spec import RewardModelSpec
from charm_core.reward_model.stored.files import COMMIT, read_json
from charm_core.reward_model.stored.kinds import base_of
from charm_core.reward_model.templates import template_text
from charm_core.tables import PREFERENCES, PROMPTS, RESPONSES, SCORES, WIN_RATES
from tasks.caching import step, use_store
from tasks.prompts import ResponseSet
from tasks.publishing import report_progress
from tasks.scoring_launch import run_scoring
from tasks.scoring_lines import log_scoring, pass_warnings_on
from tasks.scoring_settings import ScoringProcesses, ScoringSettings, scoring_settings, use_scoring
from tasks.scratch import scratch_folder
from tasks.shards import run_shards
from tasks.source_digests import weights_digest
from tasks.store import ArtifactRef, ArtifactStore, SourceFile, read_source

_WHERE = {"path", "revision", "base_model", "base_revision", "reference_model", "reference_revision"}


class ScoresConfig(BaseModel):
    """A table of scores, or of pairwise preferences, that exists already."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = Field(description="Parquet, CSV, JSON or JSON-lines file.")
    columns: ColumnNames = Field(default=ColumnNames(), description="What its columns are called.")
    where: dict[str, str] = Field(default={}, description="Keep rows whose column equals the value.")
    policy_models: tuple[str, ...] = Field(default=(), description="Keep these policy models; all if empty.")
    opponent: str | None = Field(
        default=None, description="Win rates only: the one opponent, where no column names it."
    )
    percent: bool = Field(default=False, description="Win rates only: they and their standard errors are in percent.")

    def identity(self) -> dict[str, Any]:
        """What goes into cache keys: the file comes in by its content."""
        return self.model_dump(mode="json", exclude={"source"})


class RewardModelRef(BaseModel):
    """A reward model, identified by its weights: not by where they lie."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    spec: RewardModelSpec
    digest: str
    folder: ArtifactRef | None = Field(default=None, description="Where it is one of ours.")

    def identity(self) -> dict[str, Any]:
        """What goes into cache keys: where the files lie does not, what they hold is in the digest."""
        return {"digest": self.digest, "spec": self.spec.settings(exclude=_WHERE)}

    @contextmanager
    def local_spec(self, store: ArtifactStore) -> Iterator[RewardModelSpec]:
        """The spec with a path that exists on this machine, its content verified."""
        if self.folder is None:
            yield self.spec
            return
        with store.local_folder(self.folder) as path:
            yield self.spec.model_copy(update={"path": str(path)})


class ShardToScore(BaseModel):
    """Some of the prompts, and the responses to them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompts: ArtifactRef
    responses: ArtifactRef


class Scored(BaseModel):
    """Scores, and what scoring met."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    scores: ArtifactRef
    summary: ScoringSummary


class LoadedTable(BaseModel):
    """Scores, preferences or win rates that exist already, and whom they are about."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    table: ArtifactRef
    policy_models: tuple[str, ...]


def identify_reward_model(spec: RewardModelSpec) -> RewardModelRef:
    """Identify a reward model by all that decides its scores.

    Those are its folder's content or its hub revision; of a LoRA adapter also the base model's, of a DPO model the
    reference's; and the text of a chat template that is given as a file.

    Raises:
        ModelError: There is no such folder or file.
        ConfigError: A hub id without a commit hash: what it stands for could change between two runs.
    """
    changes: dict[str, Any] = {}
    path, digest = _identify("", spec.path, spec.revision)
    changes["path"] = path
    others: dict[str, str] = {}
    for role, (other, revision) in _other_models(spec, Path(path)).items():
        found, others[role] = _identify(f"{role}_", other, revision)
        changes |= {f"{role}_model": found, f"{role}_revision": revision}
    if others:
        digest = hashlib.sha256(json.dumps({"model": digest, **others}, sort_keys=True).encode()).hexdigest()
    if spec.chat_template is not None:
        changes["chat_template"] = template_text(spec.chat_template)
    return RewardModelRef(spec=spec.model_copy(update=changes), digest=digest)


def _other_models(spec: RewardModelSpec, folder: Path) -> dict[str, tuple[str, str | None]]:
    """Path and revision of the base model of an adapter and of the reference of a DPO model."""
    others: dict[str, tuple[str, str | None]] = {}
    adapter = read_json(folder / "adapter_config.json")
    if adapter is not None or spec.base_model is not None:
        others["base"] = base_of(spec, adapter or {})
    if spec.reference_model is not None:
        others["reference"] = (spec.reference_model, spec.reference_revision)
    return others


def _identify(role: str, path: str, revision: str | None) -> tuple[str, str]:
    """Where a model lies, absolutely if on this machine, and what identifies it.

    Args:
        role: What the names of its settings begin with.
        path: Folder or hub id.
        revision: Hub revision.
    """
    setting = f"reward_model.{role}model" if role else "reward_model.path"
    folder = Path(path).expanduser()
    if folder.is_dir():
        return str(folder.resolve()), weights_digest(folder)
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise ModelError(f"there is no reward model folder {path!r}; correct {setting}")
    if not COMMIT.fullmatch(revision or ""):
        raise ConfigError(
            f"reward model {path!r} is a hub id: set reward_model.{role}revision to the commit hash of the version you mean, "
            f"not {revision!r}"
        )
    return path, f"hub:{path}@{revision}"


def worker_was_lost(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    """Only a process that was killed from outside is worth another try; a training goes on from its last checkpoint."""
    return isinstance(state.result(raise_on_failure=False), WorkerLostError)


@step(version=2, retries=2, retry_delay_seconds=5, retry_condition_fn=worker_was_lost)
def score_responses(store: ArtifactStore, model: RewardModelRef, responses: ResponseSet) -> Scored:
    """Score responses in processes of their own; many of them shard by shard, wherever the settings say.

    Raises:
        ModelError, TableError: They cannot be scored as they are.
        WorkerLostError: A process was killed.
        TrainingError: The processes of one shard were killed again and again; the others are kept.
    """
    shards = _cut(store, responses, scoring_settings().shard_texts)
    if len(shards) == 1:
        return _score(store, model, shards[0])
    with use_store(store), report_progress("scoring in shards", "shards") as progress:
        try:
            scored = run_shards(
                score_responses_shard, [(model, shard) for shard in shards], lambda done: progress(done, len(shards))
            )
        except WorkerLostError as error:  # each was tried three times: this step is not to do that again
            raise TrainingError(f"a shard was lost three times: {error}") from error
    return _joined(store, scored)


@step(version=2, retries=2, retry_delay_seconds=5, retry_condition_fn=worker_was_lost)
def score_responses_shard(
    store: ArtifactStore, model: RewardModelRef, shard: ShardToScore, processes: ScoringProcesses
) -> Scored:
    """Score a shard, on whatever machine this runs.

    Raises:
        ModelError: The reward model is another one here, or cannot be used.
        WorkerLostError: A process was killed.
    """
    if model.folder is None and (found := identify_reward_model(model.spec).digest) != model.digest:
        raise ModelError(
            f"the reward model {model.spec.path!r} is not what it was when this run began: its files now have the digest {found}, not "
            f"{model.digest}; leave them alone while a run lasts, and give every machine the same files"
        )
    with use_scoring(ScoringSettings(processes=processes)):
        return _score(store, model, shard)


def _cut(store: ArtifactStore, responses: ResponseSet, texts: int) -> list[ShardToScore]:
    if (responses.responses.rows or 0) <= texts:
        return [ShardToScore(prompts=responses.prompts, responses=responses.responses)]
    shards = cut_into_shards(
        store.read_table(responses.prompts, PROMPTS), store.read_table(responses.responses, RESPONSES), texts
    )
    return [
        ShardToScore(
            prompts=store.write_table(shard.prompts, PROMPTS), responses=store.write_table(shard.responses, RESPONSES)
        )
        for shard in shards
    ]


def _score(store: ArtifactStore, model: RewardModelRef, shard: ShardToScore) -> Scored:
    with scratch_folder("scoring") as folder, model.local_spec(store) as spec:
        job = ScoringJob(
            model=spec,
            prompts_path=Path(folder, "prompts.parquet"),
            responses_path=Path(folder, "responses.parquet"),
            scores_path=Path(folder, "scores.parquet"),
        )
        store.read_table(shard.prompts, PROMPTS).write_parquet(job.prompts_path)
        store.read_table(shard.responses, RESPONSES).write_parquet(job.responses_path)
        with report_progress("scoring", "texts") as progress:
            summary = run_scoring(job, progress, pass_warnings_on())
        log_scoring(summary)
        return Scored(scores=store.write_table(pl.read_parquet(job.scores_path), SCORES), summary=summary)


def _joined(store: ArtifactStore, shards: Sequence[Scored]) -> Scored:
    scores = pl.concat([store.read_table(shard.scores, SCORES) for shard in shards])
    summary = merge_summaries([shard.summary for shard in shards], scores)
    log_scoring(summary)
    return Scored(scores=store.write_table(scores, SCORES), summary=summary)


@step(version=1)
def load_scores(store: ArtifactStore, file: SourceFile, config: ScoresConfig) -> LoadedTable:
    """Read scores that exist already."""
    scores = ingest_scores(read_source(file), config.columns, where=config.where)
    if config.policy_models:
        scores = scores.filter(pl.col("policy_model").is_in(config.policy_models))
    return LoadedTable(table=store.write_table(scores, SCORES), policy_models=_names(scores, "policy_model"))


@step(version=1)
def load_preferences(store: ArtifactStore, file: SourceFile, config: ScoresConfig) -> LoadedTable:
    """Read a judge's pairwise preferences."""
    preferences = _among(ingest_preferences(read_source(file), config.columns, where=config.where), config)
    return LoadedTable(
        table=store.write_table(preferences, PREFERENCES), policy_models=_names(preferences, "model_a", "model_b")
    )


@step(version=1)
def load_win_rates(store: ArtifactStore, file: SourceFile, config: ScoresConfig) -> LoadedTable:
    """Read published win rates, one row per pair of policy models."""
    published = ingest_win_rates(
        read_source(file), config.columns, where=config.where, opponent=config.opponent, percent=config.percent
    )
    win_rates = _among(published, config)
    return LoadedTable(
        table=store.write_table(win_rates, WIN_RATES), policy_models=_names(win_rates, "model_a", "model_b")
    )


def _among(pairs: pl.DataFrame, config: ScoresConfig) -> pl.DataFrame:
    if not config.policy_models:
        return pairs
    return pairs.filter(pl.col("model_a").is_in(config.policy_models) & pl.col("model_b").is_in(config.policy_models))


def _names(table: pl.DataFrame, *columns: str) -> tuple[str, ...]:
    return tuple(pl.concat([table.get_column(column) for column in columns]).unique().sort().to_list())
