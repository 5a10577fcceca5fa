"""Prompts and responses: read a table of them, and keep some prompts and policy models out of the calibration."""

from typing import Any

import polars as pl
from pydantic import BaseModel, ConfigDict, Field

from charm_core.errors import ConfigError
from charm_core.responses import ColumnNames, SplitConfig, ingest_responses, split_prompts
from charm_core.tables import PROMPTS, RESPONSES
from tasks.caching import step
from tasks.store import ArtifactRef, ArtifactStore, SourceFile, read_source


class ResponsesConfig(BaseModel):
    """A table with one row per response."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = Field(description="Parquet, CSV, JSON or JSON-lines file.")
    columns: ColumnNames = Field(default=ColumnNames(), description="What its columns are called.")
    where: dict[str, str] = Field(default={}, description="Keep rows whose column equals the value.")
    prompt_sets: tuple[str, ...] = Field(default=(), description="Keep these prompt sets; all if empty.")
    policy_models: tuple[str, ...] = Field(default=(), description="Keep these policy models; all if empty.")
    trained_on: str | None = Field(
        default=None,
        description="Text file of prompt ids, one a line, that the reward model was trained on: never held out.",
    )
    exclude_trained_on: bool = Field(
        default=False, description="Leave the prompts of trained_on out of the calibration too."
    )

    def identity(self) -> dict[str, Any]:
        """What goes into cache keys: the files come in by their content."""
        return self.model_dump(mode="json", exclude={"source", "trained_on"})


class ResponseSet(BaseModel):
    """Prompts and the responses to them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompts: ArtifactRef
    responses: ArtifactRef
    policy_models: tuple[str, ...]
    empty_responses: int = 0


@step(version=1)
def load_responses(
    store: ArtifactStore, file: SourceFile, config: ResponsesConfig, trained_on: SourceFile | None
) -> ResponseSet:
    """Read responses that exist already.

    Raises:
        ConfigError: No id in ``trained_on`` is the id of a prompt: then nothing that it is meant to keep apart would be.
    """
    known = _ids(store, trained_on)
    ingested = ingest_responses(
        read_source(file),
        config.columns,
        where=config.where,
        prompt_sets=config.prompt_sets,
        policy_models=config.policy_models,
        exclude_prompts=known if config.exclude_trained_on else (),
    )
    if known and ingested.excluded_prompts == 0 and not set(known) & set(ingested.prompts["prompt_id"]):
        raise ConfigError(
            f"none of the {len(known)} ids in responses.trained_on is the id of a prompt (the first is {known[0]!r}, that of a "
            f"prompt {ingested.prompts['prompt_id'][0]!r}); give the ids of the column responses.columns.prompt_id"
        )
    return ResponseSet(
        prompts=store.write_table(ingested.prompts, PROMPTS),
        responses=store.write_table(ingested.responses, RESPONSES),
        policy_models=_policy_models(ingested.responses),
        empty_responses=ingested.empty_responses,
    )


@step(version=1)
def split_responses(
    store: ArtifactStore, responses: ResponseSet, config: SplitConfig, trained_on: SourceFile | ArtifactRef | None
) -> ArtifactRef:
    """Decide which prompts are held out, before anything is fitted."""
    known = _ids(store, trained_on)
    split = split_prompts(store.read_table(responses.prompts, PROMPTS), config, never_held_out=known)
    return store.write_frame(split, "split")


@step(version=1)
def select_responses(
    store: ArtifactStore,
    responses: ResponseSet,
    split: ArtifactRef,
    parts: tuple[str, ...],
    policy_models: tuple[str, ...],
) -> ResponseSet:
    """The responses of some policy models to the prompts of some parts of the split."""
    chosen = store.read_frame(split).filter(pl.col("part").is_in(parts)).select("prompt_id")
    kept = (
        store.read_table(responses.responses, RESPONSES)
        .join(chosen, on="prompt_id", how="semi")
        .filter(pl.col("policy_model").is_in(policy_models))
    )
    prompts = store.read_table(responses.prompts, PROMPTS).join(kept, on="prompt_id", how="semi")
    return ResponseSet(
        prompts=store.write_table(prompts, PROMPTS),
        responses=store.write_table(kept, RESPONSES),
        policy_models=_policy_models(kept),
        empty_responses=kept.filter(pl.col("response").str.strip_chars() == "").height,
    )


def _policy_models(responses: pl.DataFrame) -> tuple[str, ...]:
    return tuple(responses.get_column("policy_model").unique().sort().to_list())


def _ids(store: ArtifactStore, listed: SourceFile | ArtifactRef | None) -> list[str]:
    """Prompt ids: of a text file one per line, of a stored frame its column ``prompt_id``."""
    if isinstance(listed, ArtifactRef):
        return list(store.read_frame(listed).get_column("prompt_id"))
    return [line.strip() for line in listed.read_text().splitlines() if line.strip()] if listed else []
