"""Prompt sets: read them wherever they lie, leave out what must not be asked, and say what was left out."""

from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from charm_core.conversations import layout_key, users_text
from charm_core.errors import ConfigError
from charm_core.prompt_formats import PromptReading, PromptRows, Unusable, read_prompts
from charm_core.prompt_sets import (
    PromptCounts,
    SelectionRules,
    TrainedOn,
    select_prompts,
)
from charm_core.tables import PROMPTS
from tasks.caching import step
from tasks.store import ArtifactRef, ArtifactStore, SourceFile, source_file
from tasks.user_tables import Source, identify_source, read_rows


class PromptSource(PromptReading):
    """Where prompts lie, and how they are read."""

    source: str = Field(
        description="File (Parquet, CSV, JSON, JSONL; AlpacaEval and Arena-Hard too), folder of the datasets library, or hub id."
    )
    split: str = Field(default="train", description="Datasets only: the split.")
    config: str | None = Field(default=None, description="Datasets only: the configuration, if there are several.")
    revision: str | None = Field(default=None, description="Hub datasets only: a commit hash.")

    def identify(self) -> Source:
        """The source, by its content.

        Raises:
            ConfigError: It does not exist, or is a hub id without a commit.
        """
        return identify_source(self.source, split=self.split, config=self.config, revision=self.revision)

    def label(self) -> str:
        """What it is called in a report."""
        return self.name or Path(self.source).stem

    def reading(self) -> PromptReading:
        """How it is read, without where it lies."""
        return PromptReading(**{name: getattr(self, name) for name in PromptReading.model_fields})


class PromptSetConfig(SelectionRules, PromptSource):
    """Which prompts the policy models are asked."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    trained_on: str | PromptSource | None = Field(
        default=None,
        description="What the reward model was trained on, never held out: a .txt file of prompt ids, one a line, or a source of "
        "prompts, which are recognised by their content.",
    )
    avoid_benchmarks: tuple[PromptSource, ...] = Field(
        default=(), description="Benchmarks, by name: prompts that overlap with their texts are left out."
    )

    @model_validator(mode="after")
    def _known_before_excluded(self) -> Self:
        if self.exclude_trained_on and self.trained_on is None:
            raise ValueError("exclude_trained_on needs trained_on, which says what the reward model was trained on")
        return self

    def rules(self) -> SelectionRules:
        """Which of the prompts are kept."""
        return SelectionRules(**{name: getattr(self, name) for name in SelectionRules.model_fields})


class PromptSet(BaseModel):
    """Prompts to be asked, and what became of all others."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompts: ArtifactRef = Field(description="PROMPTS.")
    trained_on: ArtifactRef | None = Field(
        default=None, description="prompt_id: those of them that the reward model was trained on; none where not said."
    )
    removed: ArtifactRef = Field(description="row, prompt_id, reason: those that are not asked.")
    counts: PromptCounts

    def sentences(self) -> tuple[str, ...]:
        """What was left out and what is special, for the report."""
        held_back = (
            f"{self.counts.trained_on - self.counts.trained_on_left_out:,} different prompts are known to the reward model from its "
            "training: they serve the calibration only."
        )
        known = self.trained_on is not None and self.counts.trained_on > self.counts.trained_on_left_out
        return (*self.counts.sentences(), *((held_back,) if known else ()))


class ReadPrompts(BaseModel):
    """The prompts of a source as they were read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompts: ArtifactRef = Field(description="row, prompt_id, prompt_set, messages.")
    rows: int
    filtered: int
    unusable: tuple[Unusable, ...]

    def load(self, store: ArtifactStore) -> PromptRows:
        """Them."""
        return PromptRows(
            frame=store.read_frame(self.prompts), rows=self.rows, filtered=self.filtered, unusable=self.unusable
        )


def load_prompt_set(config: PromptSetConfig) -> PromptSet:
    """Read a prompt set and choose the prompts that are asked.

    Raises:
        ConfigError: A source that does not exist, a hub id without a commit, a ``trained_on`` that matches nothing.
        TableError: A source that cannot be read, or rows that cannot be asked.
        ServiceError: The Hugging Face hub does not answer.
    """
    labels = [benchmark.label() for benchmark in config.avoid_benchmarks]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ConfigError(f"avoid_benchmarks has {twice} more than once; give each benchmark a name of its own")
    found = read_prompt_source(config.identify(), config.reading())
    benchmarks = tuple(
        (benchmark.label(), read_prompt_source(benchmark.identify(), benchmark.reading()))
        for benchmark in config.avoid_benchmarks
    )
    return choose_prompts(found, config.rules(), _trained_on(config.trained_on), benchmarks)


@step(version=1)
def read_prompt_source(store: ArtifactStore, source: Source, reading: PromptReading) -> ReadPrompts:
    """Read all prompts of a source."""
    found = read_prompts(read_rows(source), reading)
    return ReadPrompts(
        prompts=store.write_frame(found.frame, "prompt_rows"),
        rows=found.rows,
        filtered=found.filtered,
        unusable=found.unusable,
    )


@step(version=1)
def choose_prompts(
    store: ArtifactStore,
    found: ReadPrompts,
    rules: SelectionRules,
    trained_on: ReadPrompts | SourceFile | None,
    benchmarks: tuple[tuple[str, ReadPrompts], ...],
) -> PromptSet:
    """Leave out what is repeated, known to the reward model or to a benchmark, and draw a sample."""
    selected = select_prompts(
        found.load(store),
        rules,
        trained_on=_known(store, trained_on),
        benchmarks={name: _texts(store, texts) for name, texts in benchmarks},
    )
    return PromptSet(
        prompts=store.write_table(selected.prompts, PROMPTS),
        trained_on=None if trained_on is None else store.write_frame(selected.trained_on, "prompt_ids"),
        removed=store.write_frame(selected.removed, "removed_prompts"),
        counts=selected.counts,
    )


def _trained_on(given: str | PromptSource | None) -> ReadPrompts | SourceFile | None:
    if given is None:
        return None
    if isinstance(given, str) and Path(given).suffix == ".txt":
        return source_file(given)
    source = PromptSource(source=given) if isinstance(given, str) else given
    return read_prompt_source(source.identify(), source.reading())


def _known(store: ArtifactStore, trained_on: ReadPrompts | SourceFile | None) -> TrainedOn | None:
    if trained_on is None:
        return None
    if isinstance(trained_on, SourceFile):
        return TrainedOn(ids=frozenset(line.strip() for line in trained_on.read_text().splitlines() if line.strip()))
    conversations = store.read_frame(trained_on.prompts).get_column("messages").to_list()
    return TrainedOn(keys=frozenset(layout_key(messages) for messages in conversations))


def _texts(store: ArtifactStore, texts: ReadPrompts) -> list[str]:
    return [users_text(messages) for messages in store.read_frame(texts.prompts).get_column("messages").to_list()]
