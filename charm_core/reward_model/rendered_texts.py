"""Token ids of prompts and responses for a reward model that runs elsewhere: the same ids that scoring here would see.

Only the model's config and tokenizer are read, not its weights.
"""

from dataclasses import dataclass

import polars as pl

from charm_core.errors import ModelError, TableError
from charm_core.reward_model.pretrained import fit_to_model, load_config, load_tokenizer
from charm_core.reward_model.rendering import Rendered, render
from charm_core.reward_model.spec import RewardModelSpec
from charm_core.reward_model.stored.kinds import open_files
from charm_core.reward_model.templates import check_can_render
from charm_core.tables import PROMPTS, RESPONSES, validate


@dataclass(frozen=True, kw_only=True)
class RenderedTexts:
    """Texts as a reward model's tokens."""

    frame: pl.DataFrame
    """prompt_id, policy_model, input_ids, prompt_cut, response_cut: one row per response."""
    max_length: int
    """The limit in tokens that was in force."""


def render_texts(spec: RewardModelSpec, prompts: pl.DataFrame, responses: pl.DataFrame) -> RenderedTexts:
    """Turn prompts and responses into token ids.

    Args:
        spec: The reward model; of its folder or hub repository only config and tokenizer are needed.
        prompts: PROMPTS.
        responses: RESPONSES.

    Raises:
        ModelError: Its files cannot be used, or its texts need segment ids beside the token ids.
        TableError: A bad table, or a response whose prompt is missing.
    """
    files = open_files(spec, weights=False)
    tokenizer = load_tokenizer(files, spec)
    check_can_render(tokenizer)
    fitted = fit_to_model(spec, load_config(files.backbone, spec), tokenizer)
    asked = validate(responses, RESPONSES).join(
        validate(prompts, PROMPTS).select("prompt_id", "messages"), on="prompt_id", how="left", maintain_order="left"
    )
    without = asked.filter(pl.col("messages").is_null())
    if not without.is_empty():
        raise TableError(
            f"{without.height} responses are to prompts that are not in the prompts table, first {without.row(0)[0]!r}; give the "
            "prompts that were answered"
        )
    rendered = [
        render(tokenizer, messages, response, fitted)
        for messages, response in asked.select("messages", "response").iter_rows()
    ]
    _check_no_segments(rendered, spec)
    frame = asked.select("prompt_id", "policy_model").with_columns(
        pl.Series("input_ids", [text.input_ids for text in rendered], dtype=pl.List(pl.Int64)),
        pl.Series("prompt_cut", [text.prompt_cut for text in rendered], dtype=pl.Boolean),
        pl.Series("response_cut", [text.response_cut for text in rendered], dtype=pl.Boolean),
    )
    return RenderedTexts(frame=frame, max_length=fitted.max_length)


def _check_no_segments(rendered: list[Rendered], spec: RewardModelSpec) -> None:
    """A server is sent token ids alone: for it all of them are of the first segment."""
    if any(any(text.token_type_ids or ()) for text in rendered):
        raise ModelError(
            f"the texts of {spec.path!r} are pairs whose two parts are told apart by segment ids, which a server cannot be sent; "
            "use route 'vllm_score', where the server puts the pairs together"
        )
