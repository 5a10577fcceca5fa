"""From a published table of responses, scores or preferences to ours, and which prompts are held out.

Nothing is dropped in silence: what the filters leave is counted, and a prompt id with two texts is an error.
"""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence

import polars as pl
from pydantic import BaseModel, ConfigDict, Field

from charm_core.errors import ConfigError, TableError
from charm_core.tables import MESSAGES, PREFERENCES, PROMPTS, RESPONSES, SCORES, WIN_RATES, validate

CALIBRATION = "calibration"
HELD_OUT = "held_out"
HELD_OUT_DOMAIN = "held_out_domain"
_ID_LENGTH = 16


class ColumnNames(BaseModel):
    """What the columns of a table are called."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt_id: str | None = Field(default="prompt_id", description="Prompt ids; none: made from the prompt's content.")
    prompt: str = Field(default="prompt", description="Prompts: text, or a list of {role, content} messages.")
    prompt_set: str | None = Field(default=None, description="Where a prompt comes from (its domain), if there is one.")
    policy_model: str = Field(default="policy_model", description="Policy models.")
    response: str = Field(default="response", description="Responses.")
    score: str = Field(default="score", description="Scores.")
    opponent: str = Field(default="opponent", description="The other policy model of a pairwise preference.")
    preference: str = Field(default="preference", description="How much the policy model is preferred, in [0, 1].")
    win_rate: str = Field(default="win_rate", description="Published win rate of the policy model.")
    standard_error: str = Field(default="standard_error", description="Standard error of the win rate.")
    prompts: str = Field(default="prompts", description="How many prompts a win rate comes from.")


class SplitConfig(BaseModel):
    """Which prompts and policy models the calibration never sees. The split is by content, not by row order."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    held_out_fraction: float = Field(default=0.5, gt=0, lt=1, description="Share of the prompts that is held out.")
    held_out_policy_models: tuple[str, ...] = Field(
        default=(), description="Policy models that only the final comparison sees."
    )
    held_out_prompt_sets: tuple[str, ...] = Field(
        default=(), description="Prompt sets that are a second held-out domain, judged apart."
    )
    max_calibration_prompts: int | None = Field(default=None, ge=1, description="At most so many calibration prompts.")
    max_held_out_prompts: int | None = Field(default=None, ge=1, description="At most so many held-out prompts.")
    max_domain_prompts: int | None = Field(default=None, ge=1, description="At most so many of the second domain.")
    seed: int = Field(default=0, ge=0, description="Seed of the split.")


class Ingested(BaseModel):
    """What came out of a table of responses."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    prompts: pl.DataFrame = Field(description="PROMPTS.")
    responses: pl.DataFrame = Field(description="RESPONSES.")
    empty_responses: int = Field(description="Responses without a visible character; they are kept and scored.")
    rows_filtered: int = Field(description="Rows that the filters left out.")
    excluded_prompts: int = Field(description="Prompts that were left out by their ids.")


def ingest_responses(
    table: pl.DataFrame,
    columns: ColumnNames,
    *,
    where: Mapping[str, str] | None = None,
    prompt_sets: Collection[str] = (),
    policy_models: Collection[str] = (),
    exclude_prompts: Collection[str] = (),
) -> Ingested:
    """Prompts and responses from a table with one row per response.

    Args:
        table: Any frame.
        columns: Its column names.
        where: Keep rows whose column (key) equals the text (value).
        prompt_sets: Keep these prompt sets; all if empty.
        policy_models: Keep these policy models; all if empty.
        exclude_prompts: Prompt ids to leave out.

    Raises:
        TableError: Missing columns or wrong types, a prompt id with two texts, nothing left after the filters.
    """
    rows = _filtered(table, where or {})
    needed = [columns.prompt, columns.policy_model, columns.response]
    _need(rows, [*needed, *(name for name in (columns.prompt_id, columns.prompt_set) if name)])
    messages = _messages(rows.get_column(columns.prompt))
    flat = pl.DataFrame(
        {
            "prompt_id": _prompt_ids(rows, columns, messages),
            "prompt_set": _text(rows, columns.prompt_set) if columns.prompt_set else pl.Series(["all"] * rows.height),
            "messages": messages,
            "policy_model": _text(rows, columns.policy_model),
            "response": _text(rows, columns.response),
        }
    )
    wanted = flat.filter(
        pl.col("prompt_set").is_in(list(prompt_sets)) if prompt_sets else pl.lit(True),
        pl.col("policy_model").is_in(list(policy_models)) if policy_models else pl.lit(True),
    )
    kept = wanted.filter(~pl.col("prompt_id").is_in(list(exclude_prompts)))
    _check_wanted(flat, "policy_model", policy_models)
    _check_wanted(flat, "prompt_set", prompt_sets)
    if kept.is_empty():
        raise TableError(f"no response is left of {table.height} rows after the filters; check where, prompt_sets, ...")
    return Ingested(
        prompts=validate(_one_text_per_prompt(kept), PROMPTS),
        responses=validate(kept.select(list(RESPONSES.columns)), RESPONSES),
        empty_responses=kept.filter(pl.col("response").str.strip_chars() == "").height,
        rows_filtered=table.height - kept.height,
        excluded_prompts=wanted.get_column("prompt_id").n_unique() - kept.get_column("prompt_id").n_unique(),
    )


def ingest_scores(table: pl.DataFrame, columns: ColumnNames, *, where: Mapping[str, str] | None = None) -> pl.DataFrame:
    """A SCORES frame from a table of any column names.

    Raises:
        TableError: Missing columns, wrong types, NaN or infinite scores, duplicates.
    """
    rows = _filtered(table, where or {})
    _need(rows, [columns.prompt_id or columns.prompt, columns.policy_model, columns.score])
    return validate(
        pl.DataFrame(
            {
                "prompt_id": _prompt_ids(rows, columns, None),
                "policy_model": _text(rows, columns.policy_model),
                "score": rows.get_column(columns.score),
            }
        ),
        SCORES,
    )


def ingest_preferences(
    table: pl.DataFrame, columns: ColumnNames, *, where: Mapping[str, str] | None = None
) -> pl.DataFrame:
    """A PREFERENCES frame from a table of any column names; a model compared with itself says nothing and is left out.

    Raises:
        TableError: Missing columns, wrong types, values outside of [0, 1] or missing.
    """
    rows = _filtered(table, where or {})
    _need(rows, [columns.prompt_id or columns.prompt, columns.policy_model, columns.opponent, columns.preference])
    preferences = validate(
        pl.DataFrame(
            {
                "prompt_id": _prompt_ids(rows, columns, None),
                "model_a": _text(rows, columns.policy_model),
                "model_b": _text(rows, columns.opponent),
                "preference_a": rows.get_column(columns.preference),
            }
        ).filter(pl.col("model_a") != pl.col("model_b")),
        PREFERENCES,
    )
    outside = preferences.filter(~pl.col("preference_a").is_between(0, 1))
    if not outside.is_empty():
        raise TableError(f"a preference must be in [0, 1]: {outside.row(0, named=True)}; rescale the column")
    return preferences


def ingest_win_rates(
    table: pl.DataFrame,
    columns: ColumnNames,
    *,
    where: Mapping[str, str] | None = None,
    opponent: str | None = None,
    percent: bool = False,
) -> pl.DataFrame:
    """A WIN_RATES frame from a table of published win rates; rows without one are left out.

    Args:
        table: Any frame.
        columns: Its column names.
        where: Keep rows whose column equals the text.
        opponent: The one opponent of all rows, where no column names it.
        percent: Whether win rates and standard errors are in percent.

    Raises:
        TableError: Missing columns, wrong types, a win rate outside of [0, 1].
    """
    rows = _filtered(table, where or {})
    needed = [columns.policy_model, columns.win_rate, columns.standard_error, columns.prompts]
    _need(rows, needed if opponent else [*needed, columns.opponent])
    published = rows.filter(pl.col(columns.win_rate).is_not_null())
    unit = 100.0 if percent else 1.0
    win_rates = validate(
        pl.DataFrame(
            {
                "model_a": _text(published, columns.policy_model),
                "model_b": pl.Series([opponent] * published.height) if opponent else _text(published, columns.opponent),
                "win_rate": _number(published, columns.win_rate) / unit,
                "standard_error": _number(published, columns.standard_error) / unit,
                "prompts": published.get_column(columns.prompts),
            }
        ).filter(pl.col("model_a") != pl.col("model_b")),
        WIN_RATES,
    )
    outside = win_rates.filter(~pl.col("win_rate").is_between(0, 1))
    if not outside.is_empty():
        raise TableError(f"a win rate must be in [0, 1]: {outside.row(0, named=True)}; if they are in percent, say so")
    return win_rates


def split_prompts(prompts: pl.DataFrame, config: SplitConfig, *, never_held_out: Collection[str] = ()) -> pl.DataFrame:
    """Assign every prompt to calibration, held-out or the second held-out domain.

    Which part a prompt falls into depends on its text and the seed and on nothing else: adding prompts moves no other
    prompt, and a text that occurs under two ids is on one side only. So the held-out share is met on average, not
    exactly.

    Args:
        prompts: PROMPTS.
        config: Shares, domains and limits.
        never_held_out: Prompt ids that the reward model was trained on: they, and prompts with the same text, may serve
            the calibration only.

    Returns:
        Columns prompt_id and part (``calibration``, ``held_out``, ``held_out_domain``). Prompts beyond the limits are
        not in it, nor those of the second domain that the reward model was trained on or that occur outside of it.

    Raises:
        ConfigError: A part would be empty, or a held-out prompt set does not exist.
    """
    _check_wanted(prompts, "prompt_set", config.held_out_prompt_sets)
    content = [prompt_content_id(messages) for messages in prompts.get_column("messages").to_list()]
    ranked = prompts.select("prompt_id", "prompt_set", content=pl.Series(content, dtype=pl.String)).with_columns(
        rank=pl.Series([_rank(config.seed, text) for text in content], dtype=pl.Float64)
    )
    in_domain = pl.col("prompt_set").is_in(list(config.held_out_prompt_sets))
    trained_on = ranked.filter(pl.col("prompt_id").is_in(list(never_held_out))).get_column("content").to_list()
    seen = pl.col("content").is_in(trained_on)
    elsewhere = ranked.filter(~in_domain).get_column("content").to_list()
    low = pl.col("rank") < config.held_out_fraction
    parts = {
        # the limit falls on prompts that the reward model was trained on first
        CALIBRATION: (
            ranked.filter(~in_domain, seen | ~low).sort(seen, "rank", "prompt_id"),
            config.max_calibration_prompts,
        ),
        HELD_OUT: (ranked.filter(~in_domain, ~seen, low).sort("rank", "prompt_id"), config.max_held_out_prompts),
        HELD_OUT_DOMAIN: (
            ranked.filter(in_domain, ~seen, ~pl.col("content").is_in(elsewhere)).sort("rank", "prompt_id"),
            config.max_domain_prompts,
        ),
    }
    for part, (members, _) in parts.items():
        if members.is_empty() and (part != HELD_OUT_DOMAIN or config.held_out_prompt_sets):
            raise ConfigError(f"no prompt is left for {part} out of {prompts.height}; change the split settings")
    return pl.concat(
        members.head(members.height if limit is None else limit).select("prompt_id", part=pl.lit(part))
        for part, (members, limit) in parts.items()
    ).sort("prompt_id")


def _rank(seed: int, content: str) -> float:
    """A number in [0, 1) that looks random, from the first 52 bits of a digest."""
    return int(hashlib.sha256(f"{seed}:{content}".encode()).hexdigest()[:13], 16) / 16**13


def prompt_content_id(messages: Sequence[Mapping[str, str]]) -> str:
    """Stable id of a prompt: a digest of its messages."""
    content = json.dumps([[message["role"], message["content"]] for message in messages], ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()[:_ID_LENGTH]


def _filtered(table: pl.DataFrame, where: Mapping[str, str]) -> pl.DataFrame:
    _need(table, list(where))
    for name, value in where.items():
        table = table.filter(pl.col(name).cast(pl.String) == value)
        if table.is_empty():
            raise TableError(f"no row has {name} = {value!r}; check the value")
    return table


def _need(table: pl.DataFrame, names: Sequence[str]) -> None:
    missing = [name for name in names if name not in table.columns]
    if missing:
        raise TableError(
            f"the table lacks the columns {missing}; it has {table.columns}; name them in the columns setting"
        )
    if table.is_empty():
        raise TableError("the table has no rows; check the file")


def _text(table: pl.DataFrame, name: str) -> pl.Series:
    column = table.get_column(name)
    named = column.dtype == pl.String or isinstance(column.dtype, (pl.Categorical, pl.Enum))
    if not (named or column.dtype.is_integer()):
        raise TableError(f"column {name!r} must be text, not {column.dtype}")
    if column.null_count():
        raise TableError(f"column {name!r} has {column.null_count()} empty cells; leave those rows out or fill them")
    return column.cast(pl.String)


def _number(table: pl.DataFrame, name: str) -> pl.Series:
    column = table.get_column(name)
    if not (column.dtype.is_numeric() or column.dtype == pl.Null):
        raise TableError(f"column {name!r} must be numbers, not {column.dtype}; convert it")
    return column.cast(pl.Float64)


def _messages(column: pl.Series) -> pl.Series:
    if isinstance(column.dtype, pl.List) and isinstance(column.dtype.inner, pl.Struct):
        fields = {field.name: field.dtype for field in column.dtype.inner.fields}
        if fields == {"role": pl.String, "content": pl.String}:
            ordered = pl.struct(pl.element().struct.field("role"), pl.element().struct.field("content"))
            return column.list.eval(ordered)
    if column.dtype != pl.String:
        raise TableError(
            f"column {column.name!r} must be text or a list of {{role, content}} messages, not {column.dtype}"
        )
    if column.null_count():
        raise TableError(
            f"column {column.name!r} has {column.null_count()} empty cells; leave those rows out or fill them"
        )
    return pl.select(
        pl.concat_list(pl.struct(role=pl.lit("user"), content=column.rename("content")).cast(MESSAGES.inner))
    ).to_series()


def _prompt_ids(table: pl.DataFrame, columns: ColumnNames, messages: pl.Series | None) -> pl.Series:
    if columns.prompt_id is not None:
        return _text(table, columns.prompt_id)
    found = _messages(table.get_column(columns.prompt)) if messages is None else messages
    return pl.Series([prompt_content_id(row) for row in found.to_list()], dtype=pl.String)


def _one_text_per_prompt(rows: pl.DataFrame) -> pl.DataFrame:
    keyed = rows.select("prompt_id", "prompt_set", "messages").with_columns(
        content=pl.Series([prompt_content_id(row) for row in rows.get_column("messages").to_list()])
    )
    unique = keyed.unique(subset=["prompt_id", "prompt_set", "content"], keep="first", maintain_order=True)
    twice = unique.filter(unique.get_column("prompt_id").is_duplicated())
    if not twice.is_empty():
        first = twice.get_column("prompt_id")[0]
        same = twice.filter(pl.col("prompt_id") == first)
        if same.get_column("content").n_unique() == 1:
            sets = same.get_column("prompt_set").sort().to_list()
            raise TableError(f"prompt id {first!r} is in several prompt sets: {sets}; keep it in one")
        texts = same.get_column("messages").to_list()
        shown = " / ".join(repr(text[-1]["content"][:60]) for text in texts[:2])
        raise TableError(f"prompt id {first!r} has {len(texts)} different texts: {shown}; give each prompt its own id")
    return unique.select(list(PROMPTS.columns))


def _check_wanted(table: pl.DataFrame, name: str, wanted: Collection[str]) -> None:
    there = table.get_column(name).unique().sort().to_list()
    missing = sorted(set(wanted) - set(there))
    if missing:
        raise ConfigError(f"{name} {missing} not in the data, which has {there[:40]}; correct the name")
