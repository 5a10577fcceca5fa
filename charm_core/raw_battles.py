"""Published tables of votes to BATTLES, with the style of the two responses where it is wanted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field

from charm_core.errors import RatingsError, TableError
from charm_core.leaderboards import TableFormat
from charm_core.records import Record
from charm_core.style_control import looks_encoded, style_counts
from charm_core.tables import BATTLES, validate

Covariates = Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]]

VOTES = TableFormat(columns=("model_a", "model_b", "winner"), read=None)

_OUTCOMES = {
    "model_a": "model_a",
    "model_b": "model_b",
    "tie": "tie",
    "tie (bothbad)": "tie (bothbad)",
    "both_bad": "tie (bothbad)",
    "bothbad": "tie (bothbad)",
}
_ONE_HOT = {"winner_model_a": "model_a", "winner_model_b": "model_b", "winner_tie": "tie"}
_ARENA_METADATA = {
    "length": ("sum_assistant_a_tokens", "sum_assistant_b_tokens"),
    "headers": ("header_count_a", "header_count_b"),
    "bold": ("bold_count_a", "bold_count_b"),
    "lists": ("list_count_a", "list_count_b"),
}
_TEXTS = (("response_a", "response_b"), ("conversation_a", "conversation_b"))


class CovariateColumns(Record):
    """A style covariate that the table of votes has counted already."""

    name: str = Field(min_length=1, description="What it is called.")
    a: str = Field(description="Column with its value for model_a's response.")
    b: str = Field(description="Column with its value for model_b's response.")


class BattleTable(Record):
    """What a table of votes looks like."""

    model_a: str = Field("model_a", description="Column of the first model.")
    model_b: str = Field("model_b", description="Column of the second model.")
    winner: str = Field("winner", description="Column of the outcome.")
    outcomes: dict[str, str] = Field(
        {}, description="The table's words for model_a, model_b, tie and 'tie (bothbad)', where it has others."
    )
    where: dict[str, str] = Field({}, description="Keep rows whose column equals the value.")
    anonymous_only: bool = Field(
        True, description="Leave out votes that were cast with the names in sight, where the table says so (anony)."
    )
    deduplicated_only: bool = Field(
        True, description="Leave out votes on over-represented prompts, where the table marks them (dedup_tag.sampled)."
    )
    covariates: tuple[CovariateColumns, ...] = Field(
        (), description="Style covariates as columns; else from conv_metadata or from the texts, where they are there."
    )
    response_a: str | None = Field(None, description="Column with the text, or messages, of model_a's response.")
    response_b: str | None = Field(None, description="Column with the text, or messages, of model_b's response.")
    responses: str | None = Field(
        None, description="File with the responses, where the table of votes has none: one row per prompt and model."
    )
    prompt_id: str = Field(
        "prompt_id", description="Column of the prompt in the table of votes, to find its responses."
    )
    responses_prompt_id: str = Field("prompt_id", description="Column of the prompt in the file with the responses.")
    responses_policy_model: str = Field(
        "policy_model", description="Column of the model in the file with the responses."
    )
    responses_text: str = Field("response", description="Column of the text in the file with the responses.")


@dataclass(frozen=True, kw_only=True, eq=False)
class RawBattles:
    """Votes, and the rows of the published table that they come from, in the same order."""

    battles: pl.DataFrame
    """A BATTLES frame."""
    rows: pl.DataFrame
    notes: tuple[str, ...]


def is_table_of_votes(columns: Sequence[str], config: BattleTable) -> bool:
    """Whether a table has the columns of votes, as the settings or the Arena's releases call them."""
    return {config.model_a, config.model_b} <= set(columns) and (
        config.winner in columns or set(_ONE_HOT) <= set(columns)
    )


def read_battles(table: pl.DataFrame, config: BattleTable) -> RawBattles:
    """Votes from a published table; what is left out is counted.

    Raises:
        RatingsError: A column is missing (expected and found ones are shown), or nothing is left.
        TableError: An outcome that the table's words do not explain, or a vote without a model.
    """
    named = _with_winner(table, config)
    columns = {"model_a": config.model_a, "model_b": config.model_b, "winner": config.winner}
    missing = [name for name in (*columns.values(), *config.where) if name not in named.columns]
    if missing:
        raise RatingsError(
            f"a table of votes needs the columns {[*columns.values(), *config.where]} but lacks {missing}; it has "
            f"{table.columns}; say what they are called in arena.battles"
        )
    kept, notes = _kept(named, config)
    words = _OUTCOMES | config.outcomes
    outcomes = kept.get_column(config.winner).cast(pl.String)
    unknown = sorted(set(outcomes.drop_nulls().to_list()) - words.keys())
    if unknown or outcomes.null_count():
        raise TableError(
            f"the outcomes {unknown[:10]} are not known and {outcomes.null_count()} votes have none; explain them in "
            f"arena.battles.outcomes or leave them out with arena.battles.where"
        )
    battles = kept.select(
        pl.int_range(pl.len(), dtype=pl.Int64).alias("battle_id"),
        pl.col(config.model_a).cast(pl.String).alias("model_a"),
        pl.col(config.model_b).cast(pl.String).alias("model_b"),
        outcomes.replace_strict(words, return_dtype=pl.String).alias("winner"),
    )
    return RawBattles(battles=validate(battles, BATTLES), rows=kept, notes=notes)


def style_covariates(votes: RawBattles, config: BattleTable, responses: pl.DataFrame | None) -> Covariates:
    """Style of the responses to each vote: from named columns, from the Arena's own metadata, or counted in the texts.

    Args:
        votes: What ``read_battles`` returned.
        config: What the table looks like.
        responses: Another table with the responses, if the votes have none.

    Raises:
        RatingsError: Nothing to take it from, or a column that is missing.
        TableError: A vote without its response, or texts that are encoded.
    """
    rows = votes.rows
    if config.covariates:
        _need(rows, [name for entry in config.covariates for name in (entry.a, entry.b)])
        return {entry.name: (_counted(rows, entry.a), _counted(rows, entry.b)) for entry in config.covariates}
    if responses is not None:
        return _from_texts(*_joined(votes, config, responses))
    if config.response_a and config.response_b:
        _need(rows, [config.response_a, config.response_b])
        return _from_texts(rows.get_column(config.response_a), rows.get_column(config.response_b))
    if isinstance(rows.schema.get("conv_metadata"), pl.Struct):
        metadata = rows.get_column("conv_metadata").struct.unnest()
        _need(metadata, [name for sides in _ARENA_METADATA.values() for name in sides])
        return {name: (_counted(metadata, a), _counted(metadata, b)) for name, (a, b) in _ARENA_METADATA.items()}
    for first, second in _TEXTS:
        if {first, second} <= set(rows.columns):
            return _from_texts(rows.get_column(first), rows.get_column(second))
    raise RatingsError(
        f"style-controlled ratings need the style of the responses, but the votes have only {rows.columns}; give "
        f"arena.battles.covariates, response_a and response_b, or responses; or set arena.style_control = false"
    )


def _with_winner(table: pl.DataFrame, config: BattleTable) -> pl.DataFrame:
    """One of the Arena's releases has a column of zeros and ones for each outcome."""
    if config.winner in table.columns or not set(_ONE_HOT) <= set(table.columns):
        return table
    if table.select((pl.sum_horizontal(list(_ONE_HOT)) != 1).any()).item():
        raise TableError(f"exactly one of {list(_ONE_HOT)} must be 1 in every vote; leave the others out")
    chosen = pl.coalesce(pl.when(pl.col(column) == 1).then(pl.lit(word)) for column, word in _ONE_HOT.items())
    return table.with_columns(chosen.alias(config.winner))


def _kept(table: pl.DataFrame, config: BattleTable) -> tuple[pl.DataFrame, tuple[str, ...]]:
    rows, notes = table, []
    for column, value in config.where.items():
        rows = rows.filter(pl.col(column).cast(pl.String) == value)
    if config.anonymous_only and rows.schema.get("anony") == pl.Boolean:
        left = rows.filter(pl.col("anony").fill_null(value=False))
        notes.append(f"{rows.height - left.height:,} votes with the models' names in sight are left out")
        rows = left
    tag = rows.schema.get("dedup_tag")
    if config.deduplicated_only and isinstance(tag, pl.Struct) and "sampled" in {field.name for field in tag.fields}:
        left = rows.filter(pl.col("dedup_tag").struct.field("sampled").fill_null(value=False))
        notes.append(f"{rows.height - left.height:,} votes on over-represented prompts are left out")
        rows = left
    if rows.is_empty():
        raise RatingsError(f"no vote of {table.height} is left; check arena.battles.where, which is {config.where}")
    return rows, tuple(note for note in notes if not note.startswith("0 "))


def _joined(votes: RawBattles, config: BattleTable, responses: pl.DataFrame) -> tuple[pl.Series, pl.Series]:
    _need(votes.rows, [config.prompt_id])
    _need(responses, [config.responses_prompt_id, config.responses_policy_model, config.responses_text])
    texts = responses.select(
        prompt=pl.col(config.responses_prompt_id).cast(pl.String),
        model=pl.col(config.responses_policy_model).cast(pl.String),
        text=pl.col(config.responses_text),
    )
    twice = texts.filter(pl.struct("prompt", "model").is_duplicated())
    if not twice.is_empty():
        raise TableError(
            f"{twice.row(0, named=True)['model']!r} has several responses to the prompt {twice['prompt'][0]!r}; keep one"
        )
    prompts = votes.rows.get_column(config.prompt_id).cast(pl.String).alias("prompt")
    found = []
    for side in ("model_a", "model_b"):
        wanted = pl.DataFrame([prompts, votes.battles.get_column(side).alias("model")])
        joined = wanted.join(texts, on=["prompt", "model"], how="left", maintain_order="left")
        found.append(joined.get_column("text"))
        if joined["text"].null_count():
            first = joined.filter(pl.col("text").is_null()).row(0, named=True)
            raise TableError(
                f"{joined['text'].null_count()} votes lack a response, first that of {first['model']!r} to the prompt "
                f"{first['prompt']!r}; check the columns in arena.battles or leave those votes out"
            )
    return found[0], found[1]


def _from_texts(first: pl.Series, second: pl.Series) -> Covariates:
    sides = []
    for series in (first, second):
        texts = _plain(series)
        if texts.null_count():
            raise TableError(f"{texts.null_count()} votes have no text in the column {series.name!r}; leave them out")
        if looks_encoded(texts):
            raise TableError(f"the texts of the column {series.name!r} are JSON lists; decode them to text or messages")
        sides.append(style_counts(texts))
    return {name: (sides[0][name].to_numpy(), sides[1][name].to_numpy()) for name in sides[0].columns}


def _plain(series: pl.Series) -> pl.Series:
    """Text; of a list of messages, what the assistant said."""
    if series.dtype == pl.String:
        return series
    if not (isinstance(series.dtype, pl.List) and isinstance(series.dtype.inner, pl.Struct)):
        raise TableError(f"the column {series.name!r} must hold texts or lists of messages, not {series.dtype}")
    said = pl.element().filter(pl.element().struct.field("role") == "assistant").struct.field("content")
    return series.to_frame().select(pl.col(series.name).list.eval(said).list.join("\n")).get_column(series.name)


def _counted(rows: pl.DataFrame, column: str) -> NDArray[np.float64]:
    """Counts as numbers; the Arena's metadata has some by kind, such as h1 to h6."""
    counts = rows.get_column(column)
    if isinstance(counts.dtype, pl.Struct):
        counts = counts.struct.unnest().fill_null(0).sum_horizontal()
    if not counts.dtype.is_numeric() or counts.null_count():
        raise TableError(
            f"the style covariate {column!r} must be a number in every vote, not {counts.dtype} with "
            f"{counts.null_count()} gaps; leave those votes out"
        )
    return counts.cast(pl.Float64).to_numpy()


def _need(table: pl.DataFrame, columns: list[str]) -> None:
    missing = [name for name in columns if name not in table.columns]
    if missing:
        raise RatingsError(f"the columns {missing} are missing; the table has {table.columns}; correct arena.battles")
