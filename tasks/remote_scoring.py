"""Scores of a reward model that runs behind vLLM or SGLang.

Texts are sent as token ids that are made here, by the same rendering as for scoring on this machine, so that neither the
server's chat template nor a second BOS can change a score. Where that is not possible the server is sent messages, or pairs of
prompt and response.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any, Self

import polars as pl
from pydantic import BaseModel, ConfigDict, Field, model_validator

from charm_core.errors import ServiceError, TableError
from charm_core.remote_scores import Activation, Route, undo_activation
from charm_core.reward_model.rendering import joined_prompt
from charm_core.reward_model.spec import RewardModelSpec
from charm_core.sampling import shard_numbers
from charm_core.tables import PROMPTS, RESPONSES, SCORES
from tasks.caching import current_store, step
from tasks.endpoint import Endpoint
from tasks.prompts import ResponseSet
from tasks.publishing import report_progress
from tasks.remote_requests import Send, ask_values
from tasks.scoring import RewardModelRef, ShardToScore, identify_reward_model
from tasks.store import ArtifactRef, ArtifactStore

_SENDS: dict[Route, tuple[Send, ...]] = {
    "vllm_classify": ("tokens", "messages"),
    "vllm_pooling": ("tokens", "messages"),
    "vllm_score": ("pairs",),
    "sglang_classify": ("tokens",),
    "sglang_v1_classify": ("tokens",),
}


class RemoteScorerConfig(BaseModel):
    """A reward model behind a server."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    endpoint: Endpoint = Field(description="The server.")
    route: Route = Field(
        default="vllm_classify",
        description="How it is asked: vLLM's /classify, /pooling or /score (pairs, for cross-encoders), SGLang's /classify or "
        "/v1/classify.",
    )
    send: Send | None = Field(
        default=None,
        description="tokens: rendered here; messages: rendered by the server's chat template; pairs: prompt and response as two "
        "texts. Default: the first that the route takes.",
    )
    reward_model: RewardModelSpec | None = Field(
        default=None,
        description="tokens only: folder or hub id whose config and tokenizer the texts are rendered with; its weights are not read.",
    )
    activation: Activation = Field(
        default="auto",
        description="Whether the server squashes scores with a sigmoid (sigmoid: undo that; off: no; auto: no, and an error if it "
        "looks as if it did).",
    )
    batch_size: int = Field(default=16, ge=1, description="Texts per request; messages go one by one.")
    shard_prompts: int = Field(
        default=500,
        ge=1,
        description="Prompts per shard, about: what is stored at once, and lost by an interruption at most.",
    )
    max_failed_share: float = Field(
        default=0.0, ge=0, le=1, description="Most texts that the server may refuse; they get no score and are counted."
    )

    @model_validator(mode="after")
    def _route_takes_it(self) -> Self:
        if self.sends not in _SENDS[self.route]:
            raise ValueError(f"route {self.route!r} is sent {' or '.join(_SENDS[self.route])}, not {self.send}")
        if (self.sends == "tokens") != (self.reward_model is not None):
            raise ValueError(
                "give reward_model, whose tokenizer renders the texts"
                if self.sends == "tokens"
                else f"reward_model renders tokens, but {self.sends} are sent: leave it out"
            )
        return self

    @property
    def sends(self) -> Send:
        """What is sent."""
        return self.send or _SENDS[self.route][0]


class RemoteScorer(BaseModel):
    """A reward model behind a server, identified by what decides its scores."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    config: RemoteScorerConfig
    rendering: RewardModelRef | None = Field(description="Whose tokenizer makes the tokens.")

    def identity(self) -> dict[str, Any]:
        """What goes into cache keys: not how fast it is asked, nor what is made of its answers."""
        rendering = self.rendering.identity() if self.rendering else None
        return {
            "endpoint": self.config.endpoint.identity(),
            "route": self.config.route,
            "send": self.config.sends,
            "rendering": rendering,
        }


class ScoredShard(BaseModel):
    """What a server made of some responses."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    values: ArtifactRef = Field(description="prompt_id, policy_model, value: as they came.")
    texts: int
    prompts_cut: int
    responses_cut: int
    refused: int
    reasons: tuple[str, ...]


class RemoteScores(BaseModel):
    """Scores of a reward model behind a server, and what scoring met."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    scores: ArtifactRef = Field(description="SCORES; a response that the server refuses has no row.")
    texts: int = Field(description="Responses that were to be scored.")
    refused: int = Field(description="Of them, those that the server refused.")
    prompts_cut: int = Field(description="Texts whose prompt was cut here; where the server renders, it may cut too.")
    responses_cut: int
    lowest: float
    highest: float
    warnings: tuple[str, ...] = ()


def score_remotely(responses: ResponseSet, config: RemoteScorerConfig) -> RemoteScores:
    """Score responses with a reward model behind a server, in the current flow.

    Raises:
        ConfigError: Settings that contradict each other, a rejected key, an unknown model or route, squashed scores.
        ModelError: The files that texts are rendered with cannot be used, or the model is no reward model with one score.
        ServiceError: The server answers nobody, or refuses too many texts. Finished shards are kept.
    """
    rendering = identify_reward_model(config.reward_model) if config.reward_model else None
    scorer = RemoteScorer(config=config, rendering=rendering)
    shards: list[ScoredShard] = []
    with report_progress("scoring", "texts") as progress:
        for shard in cut_responses(responses, config.shard_prompts):
            shards.append(score_shard(shard, scorer))
            _check_refused(shards, responses, config)
            if len(shards) == 1:  # a server that squashes its scores does so from the first
                _scores(current_store(), shards, config.activation)
            progress(sum(done.texts for done in shards), responses.responses.rows or 0)
    return join_scores(tuple(shards), config.activation)


@step(version=1)
def cut_responses(store: ArtifactStore, responses: ResponseSet, shard_prompts: int) -> tuple[ShardToScore, ...]:
    """Cut responses into shards, by the ids of their prompts."""
    answered = store.read_table(responses.responses, RESPONSES)
    asked = store.read_table(responses.prompts, PROMPTS)
    without = answered.join(asked, on="prompt_id", how="anti")
    if not without.is_empty():
        raise TableError(
            f"{without.height} responses are to prompts that are not in the prompts table, first {without.row(0)[0]!r}; give the "
            "prompts that were answered"
        )
    prompts = asked.join(answered, on="prompt_id", how="semi")
    numbers = shard_numbers(prompts.get_column("prompt_id").to_list(), shard_prompts)
    parts = prompts.with_columns(shard=pl.Series(numbers)).partition_by("shard", include_key=False, as_dict=True)
    return tuple(
        ShardToScore(
            prompts=store.write_table(part, PROMPTS),
            responses=store.write_table(answered.join(part, on="prompt_id", how="semi"), RESPONSES),
        )
        for _, part in sorted(parts.items())
    )


@step(version=1)
def score_shard(store: ArtifactStore, shard: ShardToScore, scorer: RemoteScorer) -> ScoredShard:
    """Have the server score the responses of a shard; equal texts are sent once."""
    texts = _texts(store, shard, scorer)
    contents = texts.get_column("content").to_list()
    config = scorer.config
    values, reasons = ask_values(
        config.endpoint, config.route, config.sends, list(dict.fromkeys(contents)), config.batch_size
    )
    scored = texts.with_columns(value=pl.Series([values.get(content) for content in contents], dtype=pl.Float64))
    return ScoredShard(
        values=store.write_frame(scored.select("prompt_id", "policy_model", "value").drop_nulls(), "remote_values"),
        texts=scored.height,
        prompts_cut=int(scored.get_column("prompt_cut").sum()),
        responses_cut=int(scored.get_column("response_cut").sum()),
        refused=scored.get_column("value").null_count(),
        reasons=reasons,
    )


@step(version=1)
def join_scores(store: ArtifactStore, shards: tuple[ScoredShard, ...], activation: Activation) -> RemoteScores:
    """All scores in one table, as the reward model gave them."""
    scores, warnings = _scores(store, shards, activation)
    refused = sum(shard.refused for shard in shards)
    reasons = "; ".join(dict.fromkeys(reason for shard in shards for reason in shard.reasons))
    said = (f"The server refused {refused:,} texts, which have no score: {reasons}.",) if refused else ()
    return RemoteScores(
        scores=store.write_table(scores, SCORES),
        texts=sum(shard.texts for shard in shards),
        refused=refused,
        prompts_cut=sum(shard.prompts_cut for shard in shards),
        responses_cut=sum(shard.responses_cut for shard in shards),
        lowest=float(scores.get_column("score").to_numpy().min()),
        highest=float(scores.get_column("score").to_numpy().max()),
        warnings=(*warnings, *said),
    )


def _scores(
    store: ArtifactStore, shards: Sequence[ScoredShard], activation: Activation
) -> tuple[pl.DataFrame, tuple[str, ...]]:
    values = pl.concat([store.read_frame(shard.values) for shard in shards])
    if values.is_empty():
        raise ServiceError("the server refused every text; see the log of the server")
    scores, warnings = undo_activation(values.get_column("value").to_numpy(), activation)
    return values.select("prompt_id", "policy_model").with_columns(score=pl.Series(scores)), warnings


def _check_refused(shards: Sequence[ScoredShard], responses: ResponseSet, config: RemoteScorerConfig) -> None:
    refused, texts = sum(shard.refused for shard in shards), responses.responses.rows or 0
    if refused > config.max_failed_share * texts:
        reasons = "; ".join(dict.fromkeys(reason for shard in shards for reason in shard.reasons))
        raise ServiceError(
            f"{config.endpoint.base_url} refused {refused} of {texts} texts, and max_failed_share allows "
            f"{int(config.max_failed_share * texts)}: {reasons}; where texts are too long, lower reward_model.max_length"
        )


def _texts(store: ArtifactStore, shard: ShardToScore, scorer: RemoteScorer) -> pl.DataFrame:
    """prompt_id, policy_model, content (what is sent, as JSON), prompt_cut, response_cut."""
    prompts, responses = store.read_table(shard.prompts, PROMPTS), store.read_table(shard.responses, RESPONSES)
    if scorer.rendering is not None:
        from charm_core.reward_model.rendered_texts import render_texts  # transformers takes seconds to import

        with scorer.rendering.local_spec(store) as spec:
            rendered = render_texts(spec, prompts, responses).frame
        return rendered.with_columns(content=_as_json(rendered.get_column("input_ids")))
    asked = responses.join(prompts, on="prompt_id", maintain_order="left")
    pairs = scorer.config.sends == "pairs"
    contents = [
        [joined_prompt(messages), response] if pairs else [*messages, {"role": "assistant", "content": response}]
        for messages, response in asked.select("messages", "response").iter_rows()
    ]
    cut = pl.lit(value=False)
    return asked.select("prompt_id", "policy_model", content=_as_json(contents), prompt_cut=cut, response_cut=cut)


def _as_json(contents: Iterable[Any]) -> pl.Series:
    texts = [json.dumps(list(content), ensure_ascii=False, separators=(",", ":")) for content in contents]
    return pl.Series(texts, dtype=pl.String)
