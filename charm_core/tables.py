"""The Parquet tables: one schema each, one way to validate them.

A table is a Polars frame with exactly the columns of its schema, in that order, sorted by its key, so that the same
content always gives the same bytes. ``validate`` is the only gate: what comes out of it needs no further checks.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import polars as pl

from charm_core.errors import TableError

MESSAGES = pl.List(pl.Struct({"role": pl.String, "content": pl.String}))


@dataclass(frozen=True, kw_only=True)
class TableSchema:
    """What a table must look like."""

    name: str
    """Its name in error messages and in the store."""
    columns: Mapping[str, pl.DataType]
    """Column name to type. A column of another numeric type is cast if no value changes."""
    key: tuple[str, ...]
    """Columns that identify a row; rows are unique and sorted by it."""
    nullable: frozenset[str] = field(default_factory=frozenset)
    """Columns in which nulls are allowed."""
    non_empty: bool = True
    """Whether a table without rows is an error."""


PROMPTS = TableSchema(
    name="prompts",
    columns={"prompt_id": pl.String(), "prompt_set": pl.String(), "messages": MESSAGES},
    key=("prompt_id",),
)
"""One row per prompt. ``messages`` is the conversation up to the response; ``prompt_set`` names its domain."""

RESPONSES = TableSchema(
    name="responses",
    columns={"prompt_id": pl.String(), "policy_model": pl.String(), "response": pl.String()},
    key=("prompt_id", "policy_model"),
)
"""One row per (prompt, policy model). A missing cell is a missing row."""

SAMPLES = TableSchema(
    name="samples",
    columns={
        "prompt_id": pl.String(),
        "policy_model": pl.String(),
        "response": pl.String(),
        "status": pl.String(),
        "finish_reason": pl.String(),
        "prompt_tokens": pl.Int64(),
        "response_tokens": pl.Int64(),
    },
    key=("prompt_id", "policy_model"),
    nullable=frozenset({"finish_reason", "prompt_tokens", "response_tokens"}),
)
"""What a policy model answered, and how it ended; ``status`` is one of ``charm_core.sampling.STATUSES``.

A request that failed for good is a row with status ``failed`` and an empty response: counted, but never scored.
"""

SCORES = TableSchema(
    name="scores",
    columns={"prompt_id": pl.String(), "policy_model": pl.String(), "score": pl.Float64()},
    key=("prompt_id", "policy_model"),
)
"""One row per scored response. Scores are finite; a missing cell is a missing row."""

PREFERENCES = TableSchema(
    name="preferences",
    columns={
        "prompt_id": pl.String(),
        "model_a": pl.String(),
        "model_b": pl.String(),
        "preference_a": pl.Float64(),
    },
    key=("prompt_id", "model_a", "model_b"),
)
"""A judge's pairwise preferences: ``preference_a`` in [0, 1] is how much ``model_a`` is preferred, a tie is 0.5."""

WIN_RATES = TableSchema(
    name="win rates",
    columns={
        "model_a": pl.String(),
        "model_b": pl.String(),
        "win_rate": pl.Float64(),
        "standard_error": pl.Float64(),
        "prompts": pl.Int64(),
    },
    key=("model_a", "model_b"),
)
"""Published win rates: ``win_rate`` in [0, 1] of ``model_a`` over ``prompts`` prompts, with its standard error."""

RATINGS = TableSchema(
    name="ratings",
    columns={
        "policy_model": pl.String(),
        "rating": pl.Float64(),
        "rating_low": pl.Float64(),
        "rating_high": pl.Float64(),
        "votes": pl.Int64(),
    },
    key=("policy_model",),
    nullable=frozenset({"rating_low", "rating_high", "votes"}),
)
"""One snapshot of one board, in Elo points; ``rating_low`` and ``rating_high`` are a 95 % interval where known."""

BATTLES = TableSchema(
    name="battles",
    columns={"battle_id": pl.Int64(), "model_a": pl.String(), "model_b": pl.String(), "winner": pl.String()},
    key=("battle_id",),
)
"""One human vote per row; ``winner`` is ``model_a``, ``model_b``, ``tie`` or ``tie (bothbad)``."""

PAIRS = TableSchema(
    name="preference pairs",
    columns={
        "prompt_id": pl.String(),
        "split": pl.String(),
        "prompt": MESSAGES,
        "chosen": MESSAGES,
        "rejected": MESSAGES,
        "chosen_model": pl.String(),
        "rejected_model": pl.String(),
        "chosen_score": pl.Float64(),
        "rejected_score": pl.Float64(),
        "chosen_calibrated": pl.Float64(),
        "rejected_calibrated": pl.Float64(),
        "margin": pl.Float64(),
        "flipped": pl.Boolean(),
    },
    key=("prompt_id", "chosen_model", "rejected_model"),
    non_empty=False,
)
"""Preference pairs in the conversational format; ``margin`` is calibrated chosen minus rejected, always positive."""


def validate(frame: pl.DataFrame, schema: TableSchema) -> pl.DataFrame:
    """Check a frame against its schema and bring it into canonical form.

    Args:
        frame: Any frame. Columns that the schema does not name are an error, so that nothing is dropped in silence.
        schema: What it must look like.

    Returns:
        The frame with the schema's column order and types, sorted by key.

    Raises:
        TableError: Wrong columns or types, no rows, nulls, NaN or infinite numbers, duplicate keys.
    """
    _check_columns(frame, schema)
    if schema.non_empty and frame.is_empty():
        raise TableError(f"the {schema.name} table has no rows; check the file and the filters that made it")
    typed = frame.select([_cast(frame, name, dtype, schema) for name, dtype in schema.columns.items()])
    _check_values(typed, schema)
    ordered = typed.sort(schema.key)
    repeated = ordered.select(schema.key).filter(ordered.select(schema.key).is_duplicated())
    if not repeated.is_empty():
        raise TableError(
            f"the {schema.name} table has {repeated.height} rows whose {', '.join(schema.key)} occur more than once, "
            f"first {dict(repeated.row(0, named=True))}; keep one row of each"
        )
    return ordered


def _check_columns(frame: pl.DataFrame, schema: TableSchema) -> None:
    missing = [name for name in schema.columns if name not in frame.columns]
    unknown = [name for name in frame.columns if name not in schema.columns]
    if missing or unknown:
        raise TableError(
            f"the {schema.name} table needs the columns {list(schema.columns)} but has {frame.columns}"
            + (f"; missing {missing}" if missing else "")
            + (f"; not expected {unknown}" if unknown else "")
        )


def _cast(frame: pl.DataFrame, name: str, dtype: pl.DataType, schema: TableSchema) -> pl.Series:
    column = frame.get_column(name)
    if column.dtype == dtype:
        return column
    numeric = column.dtype.is_numeric() and dtype.is_numeric()
    empty = 0 < column.len() == column.null_count()  # a CSV column without any value is read as text
    if not (numeric or empty or column.dtype == pl.Null):
        raise TableError(f"column {name!r} of the {schema.name} table must be {dtype}, not {column.dtype}; convert it")
    cast = column.cast(dtype, strict=False)
    if numeric and not cast.cast(column.dtype, strict=False).equals(column):
        raise TableError(f"column {name!r} of the {schema.name} table has values that {dtype} cannot hold")
    return cast


def _check_values(frame: pl.DataFrame, schema: TableSchema) -> None:
    for name in schema.columns:
        column = frame.get_column(name)
        if name not in schema.nullable and column.null_count():
            where = frame.filter(column.is_null()).select(schema.key).row(0, named=True)
            raise TableError(
                f"column {name!r} of the {schema.name} table has {column.null_count()} nulls, first at {where}"
            )
        if column.dtype == MESSAGES:
            _check_messages(frame, name, schema)
        if column.dtype.is_float():
            bad = column.is_not_null() & ~column.is_finite()
            if bad.any():
                first = frame.filter(bad).row(0, named=True)
                where = {key: first[key] for key in schema.key}
                raise TableError(
                    f"column {name!r} of the {schema.name} table has {bad.sum()} values that are NaN or infinite, "
                    f"first {first[name]} at {where}; score these again or leave their rows out"
                )


def _check_messages(frame: pl.DataFrame, name: str, schema: TableSchema) -> None:
    message = pl.element().struct
    incomplete = pl.col(name).list.eval(message.field("role").is_null() | message.field("content").is_null()).list.any()
    bad = frame.filter((pl.col(name).list.len() == 0) | incomplete)
    if not bad.is_empty():
        where = bad.select(schema.key).row(0, named=True)
        raise TableError(
            f"column {name!r} of the {schema.name} table has {bad.height} conversations without messages or with a "
            f"message that lacks its role or content, first at {where}; leave those rows out"
        )
