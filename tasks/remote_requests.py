"""Requests to a server of reward models, and its numbers for texts."""

import json
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Literal

from charm_core.remote_scores import Route, read_scores, request_body
from tasks.answering.endpoints import Failure, MalformedAnswerError, call_endpoint
from tasks.endpoint import Endpoint

if TYPE_CHECKING:
    from openai import AsyncOpenAI

Send = Literal["tokens", "messages", "pairs"]

_PATHS: dict[Route, str] = {
    "vllm_classify": "/classify",
    "vllm_pooling": "/pooling",
    "vllm_score": "/score",
    "sglang_classify": "/classify",
    "sglang_v1_classify": "/v1/classify",
}
_REASONS_SHOWN = 3


def ask_values(
    endpoint: Endpoint, route: Route, send: Send, contents: Sequence[str], batch_size: int
) -> tuple[dict[str, float], tuple[str, ...]]:
    """What a server says about texts. Of a batch that it refuses, each text is sent again by itself.

    Args:
        endpoint: The server.
        route: How it is asked.
        send: What the contents are.
        contents: What is sent for each text, as JSON.
        batch_size: Texts per request; messages go one by one.

    Returns:
        Content to number, without those that are refused; and the most frequent reasons of refusals.

    Raises:
        ConfigError, ServiceError: Nobody is answered.
        ModelError: The model does not give one number per text.
    """
    values: dict[str, float] = {}
    reasons: Counter[str] = Counter()
    alone: list[tuple[str, ...]] = []

    def on_done(batch: tuple[str, ...], result: list[float] | Failure) -> None:
        if isinstance(result, list):
            values.update(zip(batch, result, strict=True))
        elif len(batch) > 1:
            alone.extend((content,) for content in batch)
        else:
            reasons[f"{result.status or 'no status'}: {result.message}"] += 1

    size = 1 if send == "messages" else batch_size
    batches = [tuple(contents[start : start + size]) for start in range(0, len(contents), size)]
    call = _call(endpoint, route, send)
    call_endpoint(endpoint, batches, call, on_done)
    if alone:
        call_endpoint(endpoint, alone, call, on_done, answered_before=bool(values))
    return values, tuple(reason for reason, _ in reasons.most_common(_REASONS_SHOWN))


def _call(
    endpoint: Endpoint, route: Route, send: Send
) -> "Callable[[AsyncOpenAI, tuple[str, ...]], Awaitable[list[float]]]":
    url = endpoint.base_url.rstrip("/").removesuffix("/v1") + _PATHS[route]

    async def call(client: "AsyncOpenAI", batch: tuple[str, ...]) -> list[float]:
        parsed = [json.loads(content) for content in batch]
        content = list(zip(*parsed, strict=True)) if send == "pairs" else parsed[0] if send == "messages" else parsed
        answer = await client.post(url, cast_to=object, body=request_body(route, endpoint.model, {send: content}))
        try:
            return read_scores(route, answer, len(batch))
        except ValueError as error:
            raise MalformedAnswerError(str(error)) from None

    return call
