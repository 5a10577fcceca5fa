"""Which prompts of a source are used: each content once, none from a benchmark, and a sample that later additions do not change.

Every row that is left out is counted with its reason and listed.
"""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import polars as pl
from pydantic import Field

from charm_core.conversations import layout_key, users_text
from charm_core.errors import ConfigError, TableError
from charm_core.ngram_overlap import OverlapConfig, find_overlaps
from charm_core.prompt_formats import PromptRows, Unusable
from charm_core.records import Record
from charm_core.responses import prompt_content_id
from charm_core.tables import PROMPTS, validate

_EXAMPLES = 5

REMOVED_SCHEMA = {"row": pl.Int64, "prompt_id": pl.String, "reason": pl.String}


class SelectionRules(Record):
    """Which of the prompts that were read are kept."""

    prompt_sets: tuple[str, ...] = Field(default=(), description="Keep these prompt sets; all if empty.")
    unusable: Literal["error", "skip"] = Field(
        default="error", description="What to do about rows without a usable prompt; skipped ones are counted."
    )
    exclude_trained_on: bool = Field(default=False, description="Leave out what the reward model was trained on.")
    limit: int | None = Field(default=None, ge=1, description="At most so many prompts, drawn by seed.")
    seed: int = Field(default=0, ge=0, description="Seed of that draw.")
    overlap: OverlapConfig = Field(default=OverlapConfig(), description="When a prompt is known from a benchmark.")


class BenchmarkOverlap(Record):
    """Prompts that one benchmark knows."""

    benchmark: str
    texts: int = Field(description="Texts of the benchmark that prompts were held against.")
    prompts: int
    examples: tuple[str, ...] = Field(description="Ids of the first of them.")


class PromptCounts(Record):
    """What became of the rows of a prompt source; each row is in exactly one count that is not part of another."""

    rows: int
    filtered: int = Field(description="Left out by where or prompt_sets.")
    unusable: tuple[Unusable, ...] = Field(default=(), description="Rows without a usable prompt, by reason.")
    repeated: int = Field(description="The same content as an earlier row.")
    repeated_but_for_layout: int = Field(description="The same but for case and white space.")
    trained_on: int = Field(description="Different prompts that the reward model was trained on, left out or not.")
    trained_on_left_out: int
    overlapping: int = Field(description="Left out because a benchmark knows them.")
    overlaps: tuple[BenchmarkOverlap, ...] = Field(default=(), description="By benchmark; a prompt can be in several.")
    over_limit: int = Field(description="Not drawn.")
    prompts: int = Field(description="Kept.")

    def sentences(self) -> tuple[str, ...]:
        """What was left out, in words; nothing where nothing was."""
        left_out = (
            (self.filtered, "filtered"),
            *((unusable.rows, f"unusable ({unusable.reason})") for unusable in self.unusable),
            (self.repeated, "the same as another"),
            (self.repeated_but_for_layout, "the same as another but for case and white space"),
            (self.trained_on_left_out, "left out because the reward model was trained on them"),
            (self.overlapping, "left out because a benchmark knows them"),
            (self.over_limit, "not drawn"),
        )
        parts = [f"{count:,} {what}" for count, what in left_out if count]
        removed = [f"Prompts: {self.prompts:,} of {self.rows:,} rows are used; {', '.join(parts)}."] if parts else []
        return (*removed, *(_overlap_sentence(overlap) for overlap in self.overlaps if overlap.prompts))


@dataclass(frozen=True, kw_only=True)
class TrainedOn:
    """What the reward model was trained on: prompts by their ids, or by their content."""

    ids: frozenset[str] = frozenset()
    keys: frozenset[str] = frozenset()
    """``layout_key`` of each prompt."""


@dataclass(frozen=True, kw_only=True)
class SelectedPrompts:
    """The prompts that are used, and those that are not."""

    prompts: pl.DataFrame
    """PROMPTS."""
    trained_on: pl.DataFrame
    """prompt_id: those of ``prompts`` that the reward model was trained on."""
    removed: pl.DataFrame
    """row, prompt_id, reason: every other row that held a prompt."""
    counts: PromptCounts


def select_prompts(
    found: PromptRows,
    rules: SelectionRules,
    *,
    trained_on: TrainedOn | None = None,
    benchmarks: Mapping[str, Sequence[str]] | None = None,
) -> SelectedPrompts:
    """Choose the prompts to be used.

    In this order: prompt sets; the first of those with the same content; the first of those that differ in case and white
    space only; what the reward model was trained on; overlap with benchmarks; the sample. The sample takes the prompts with the
    lowest digest of seed and content: it does not depend on order or ids, and adding prompts to the source moves none in or out
    except by rank.

    Args:
        found: What was read.
        rules: What is wanted.
        trained_on: What the reward model was trained on, if known.
        benchmarks: Name of a benchmark to its texts; prompts that overlap with them are left out.

    Raises:
        TableError: Rows without a usable prompt, unless they are to be skipped; a prompt id with two contents; nothing left.
        ConfigError: An unknown prompt set, or a ``trained_on`` that none of the prompts is in.
    """
    if rules.unusable == "error":
        _check_all_usable(found)
    rows = _keyed(found.frame)
    _check_one_content_per_id(rows)
    known = _known(rows, trained_on)
    left = _Remaining(_of_sets(rows, rules.prompt_sets))
    left.keep(pl.col("content").is_first_distinct(), "repeated")
    left.keep(pl.col("key").is_first_distinct(), "repeated but for case and white space")
    distinct_known = left.frame.filter(pl.col("key").is_in(known)).height
    if rules.exclude_trained_on:
        left.keep(~pl.col("key").is_in(known), "trained on")
    overlaps = _overlapping(left.frame, benchmarks or {}, rules.overlap)
    left.keep(~pl.col("prompt_id").is_in(sorted(set().union(*overlaps.values()))), "overlap with a benchmark")
    left.keep(_drawn(left.frame, rules), "not drawn")
    counts = _counted(found, left, overlaps, benchmarks or {}, known_prompts=distinct_known)
    if left.frame.is_empty():
        raise TableError(f"no prompt is left. {' '.join(counts.sentences())} Check the settings of the prompt set")
    return SelectedPrompts(
        prompts=validate(left.frame.select(list(PROMPTS.columns)), PROMPTS),
        trained_on=left.frame.filter(pl.col("key").is_in(known)).select("prompt_id").sort("prompt_id"),
        removed=left.removed(),
        counts=counts,
    )


def _counted(
    found: PromptRows,
    left: "_Remaining",
    overlaps: Mapping[str, Sequence[str]],
    benchmarks: Mapping[str, Sequence[str]],
    *,
    known_prompts: int,
) -> PromptCounts:
    """What became of all rows, once nothing more is left out."""
    return PromptCounts(
        rows=found.rows,
        filtered=found.filtered + found.frame.height - left.begun_with,
        unusable=found.unusable,
        repeated=left.count("repeated"),
        repeated_but_for_layout=left.count("repeated but for case and white space"),
        trained_on=known_prompts,
        trained_on_left_out=left.count("trained on"),
        overlapping=left.count("overlap with a benchmark"),
        overlaps=tuple(
            BenchmarkOverlap(
                benchmark=name, texts=len(benchmarks[name]), prompts=len(ids), examples=tuple(ids[:_EXAMPLES])
            )
            for name, ids in overlaps.items()
        ),
        over_limit=left.count("not drawn"),
        prompts=left.frame.height,
    )


class _Remaining:
    """The rows that are left, and by reason those that are not."""

    def __init__(self, frame: pl.DataFrame) -> None:
        self.frame = frame
        self.begun_with = frame.height
        self._removed: dict[str, pl.DataFrame] = {}

    def keep(self, kept: pl.Expr, reason: str) -> None:
        marked = self.frame.with_columns(kept=kept)
        self.frame = marked.filter("kept").drop("kept")
        self._removed[reason] = marked.filter(~pl.col("kept"))

    def count(self, reason: str) -> int:
        return self._removed[reason].height if reason in self._removed else 0

    def removed(self) -> pl.DataFrame:
        listed = [frame.select("row", "prompt_id", reason=pl.lit(reason)) for reason, frame in self._removed.items()]
        return pl.concat([pl.DataFrame(schema=REMOVED_SCHEMA), *listed]).sort("row")


def _keyed(rows: pl.DataFrame) -> pl.DataFrame:
    conversations = rows.get_column("messages").to_list()
    return rows.with_columns(
        content=pl.Series([prompt_content_id(messages) for messages in conversations], dtype=pl.String),
        key=pl.Series([layout_key(messages) for messages in conversations], dtype=pl.String),
    )


def _check_all_usable(found: PromptRows) -> None:
    if found.unusable:
        reasons = "; ".join(
            f"{unusable.rows} because of: {unusable.reason} (first row {unusable.first_row})"
            for unusable in found.unusable
        )
        raise TableError(
            f"{sum(unusable.rows for unusable in found.unusable)} of {found.rows} rows cannot be asked: {reasons}; correct them, "
            "or set unusable = 'skip' to leave them out and have them counted"
        )


def _check_one_content_per_id(rows: pl.DataFrame) -> None:
    several = (
        rows.group_by("prompt_id", maintain_order=True)
        .agg(pl.col("content").n_unique().alias("contents"), "row")
        .filter(pl.col("contents") > 1)
    )
    if not several.is_empty():
        first = several.row(0, named=True)
        raise TableError(
            f"{several.height} prompt ids have several contents, first {first['prompt_id']!r} in the rows "
            f"{first['row'][:_EXAMPLES]}; give each prompt its own id, or none to make ids from the content"
        )


def _of_sets(rows: pl.DataFrame, prompt_sets: Collection[str]) -> pl.DataFrame:
    if not prompt_sets:
        return rows
    there = rows.get_column("prompt_set").unique().sort().to_list()
    missing = sorted(set(prompt_sets) - set(there))
    if missing:
        raise ConfigError(f"prompt sets {missing} are not in the source, which has {there[:40]}; correct the name")
    return rows.filter(pl.col("prompt_set").is_in(list(prompt_sets)))


def _known(rows: pl.DataFrame, trained_on: TrainedOn | None) -> list[str]:
    """The keys of the prompts that the reward model was trained on.

    Raises:
        ConfigError: None of the prompts is among them: then nothing that this is meant to keep apart would be.
    """
    if trained_on is None:
        return []
    hit = pl.col("prompt_id").is_in(list(trained_on.ids)) | pl.col("key").is_in(list(trained_on.keys))
    known = rows.filter(hit).get_column("key").unique().sort().to_list()
    if not known:
        given = f"{len(trained_on.ids):,} ids" if trained_on.ids else f"{len(trained_on.keys):,} prompts"
        raise ConfigError(
            f"none of the {rows.height:,} prompts is among the {given} of trained_on (the first prompt is "
            f"{rows.get_column('prompt_id')[0]!r}); give the list that belongs to this source, or leave it out"
        )
    return known


def _overlapping(
    rows: pl.DataFrame, benchmarks: Mapping[str, Sequence[str]], config: OverlapConfig
) -> dict[str, list[str]]:
    """Benchmark to the ids of the prompts that it knows, in their order."""
    if not benchmarks:
        return {}
    asked = [users_text(messages) for messages in rows.get_column("messages").to_list()]
    found = find_overlaps(asked, benchmarks, config)
    ids = rows.get_column("prompt_id")
    return {
        name: ids[found.filter(pl.col("benchmark") == name).get_column("prompt")].to_list()
        for name in sorted(benchmarks)
    }


def _drawn(rows: pl.DataFrame, rules: SelectionRules) -> pl.Expr:
    """Whether a prompt is among the ``limit`` of lowest rank."""
    if rules.limit is None or rows.height <= rules.limit:
        return pl.lit(value=True)
    ranks = [_rank(rules.seed, content) for content in rows.get_column("content")]
    return pl.lit(pl.Series(ranks)).rank("ordinal") <= rules.limit


def _rank(seed: int, content: str) -> str:
    # not the digest that splits prompts: of a sample by that one, all prompts would fall into one part
    return hashlib.sha256(f"sample:{seed}:{content}".encode()).hexdigest()


def _overlap_sentence(overlap: BenchmarkOverlap) -> str:
    shown = ", ".join(overlap.examples) + (" and others" if overlap.prompts > len(overlap.examples) else "")
    return f"{overlap.prompts:,} prompts overlap with {overlap.benchmark} ({overlap.texts:,} texts): {shown}."
