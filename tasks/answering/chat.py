"""Prompts to answers through an OpenAI-compatible endpoint: what is sent, and what is read out of what comes back.

The name that the server gives its model is kept with every answer and not checked: servers of open weights repeat what they
were asked for, hosted ones answer with a dated snapshot. A model that the server does not have is its 404.
"""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, JsonValue

from charm_core.sampling import Answer, Decoding, conversation, request_seed, status_of
from tasks.answering.back_end import BackEnd, Prompt
from tasks.answering.endpoints import Failure, MalformedAnswerError, ask_endpoint
from tasks.answering.pacing import Pacing
from tasks.endpoint import Endpoint

if TYPE_CHECKING:
    from openai import AsyncOpenAI

CONTENT_FILTER = "content_filter"
_POLL_SECONDS = 0.1


class OpenAIBackend(Endpoint, BackEnd):
    """Sample through an OpenAI-compatible endpoint."""

    side_by_side = True

    kind: Literal["openai"] = "openai"
    token_limit: Literal["max_tokens", "max_completion_tokens"] = Field(
        default="max_tokens", description="What the server calls the limit; OpenAI's reasoning models want the second."
    )
    leave_out: tuple[Literal["temperature", "top_p", "seed", "stop"], ...] = Field(
        default=(), description="Decoding parameters that this server refuses; they are not sent."
    )
    extra_body: dict[str, JsonValue] = Field(
        default={},
        description="Further fields of every request, for example {chat_template_kwargs = {enable_thinking = false}}.",
    )
    cost_per_million_prompt_tokens: float | None = Field(default=None, ge=0, description="For the cost estimate.")
    cost_per_million_response_tokens: float | None = Field(default=None, ge=0, description="For the cost estimate.")

    def cost(self, prompt_tokens: int | None, response_tokens: int | None) -> float | None:
        """What so many tokens cost, in the unit of the prices; None where a price or a number is not known."""
        parts = (
            (prompt_tokens, self.cost_per_million_prompt_tokens),
            (response_tokens, self.cost_per_million_response_tokens),
        )
        known = [tokens * price / 1e6 for tokens, price in parts if tokens is not None and price is not None]
        return sum(known) if len(known) == len(parts) else None

    def identity(self) -> dict[str, Any]:
        """What decides the answers beside the decoding."""
        return {"kind": self.kind, **super().identity(), "leave_out": sorted(self.leave_out), "extra": self.extra_body}

    def described(self) -> str:
        """Where the answers come from, for the report."""
        return f"sampled from {self.model} at {self.deployment or urlsplit(self.base_url).netloc}"

    def secret_name(self) -> str | None:
        """The secret with its key, if it needs one."""
        return self.api_key

    def ask(
        self,
        decoding: Decoding,
        prompts: Iterable[Prompt],
        on_answer: Callable[[Answer], None],
        stop: threading.Event,
        *,
        answered_before: bool = False,
    ) -> None:
        """See ``ask_chat``."""
        ask_chat(self, decoding, prompts, on_answer, stop, answered_before=answered_before)


def ask_chat(
    backend: OpenAIBackend,
    decoding: Decoding,
    prompts: Iterable[Prompt],
    on_answer: Callable[[Answer], None],
    stop: threading.Event,
    *,
    answered_before: bool = False,
    pacing: Pacing = Pacing(),  # noqa: B008 - frozen
) -> None:
    """Ask every prompt once, until all are answered or ``stop`` is set.

    Args:
        backend: Whom to ask.
        decoding: How.
        prompts: What; taken as they are needed.
        on_answer: Called once per prompt as its end comes, in this thread.
        stop: Requests under way are dropped soon after it is set.
        answered_before: See ``call_endpoint``.
        pacing: Waits and limits.

    Raises:
        ConfigError, ServiceError: Nobody is answered.
    """

    async def call(client: "AsyncOpenAI", prompt: Prompt) -> Answer:
        # as plain JSON: the client's own classes would let a wrong type pass
        body = request_body(backend, decoding, prompt)
        return read_answer(prompt.prompt_id, await client.post("/chat/completions", cast_to=object, body=body))

    def on_done(prompt: Prompt, result: Answer | Failure) -> None:
        on_answer(failed_answer(prompt.prompt_id, result) if isinstance(result, Failure) else result)

    asking = ask_endpoint(backend, prompts, call, on_done, answered_before=answered_before, pacing=pacing)
    asyncio.run(_until_stopped(asking, stop))


def request_body(backend: OpenAIBackend, decoding: Decoding, prompt: Prompt) -> dict[str, Any]:
    """What is sent for a prompt."""
    parameters: dict[str, Any] = {
        "temperature": decoding.sampling_temperature,
        "top_p": decoding.top_p,
        "seed": request_seed(decoding.seed, prompt.prompt_id),
        "stop": list(decoding.stop) or None,
    }
    return {
        "model": backend.model,
        "messages": conversation(prompt.messages, decoding.system_prompt),
        backend.token_limit: decoding.max_tokens,
        **{name: value for name, value in parameters.items() if value is not None and name not in backend.leave_out},
        **backend.extra_body,
    }


def read_answer(prompt_id: str, completion: object) -> Answer:
    """The answer in the body of a chat completion.

    A content of null is an empty answer, such as that of a model which used up its tokens in thinking; a refusal that the
    server marks as such is the answer's text.

    Raises:
        MalformedAnswerError: There is no message where the protocol has one, or it is no text.
    """
    choice = _first(_get(completion, "choices"))
    message = _get(choice, "message")
    if not isinstance(message, Mapping):
        error = _get(completion, "error")  # some routers answer 200 and then this
        raise MalformedAnswerError(f"an error: {error}" if error else "it has no choices[0].message")
    content, refusal = message.get("content"), message.get("refusal")
    finish_reason, usage = _get(choice, "finish_reason"), _get(completion, "usage")
    text = refusal or "" if content is None else content
    if not isinstance(text, str) or not isinstance(finish_reason, str | None):
        raise MalformedAnswerError("its content or its finish_reason is no text")
    served_as = _get(completion, "model")
    return Answer(
        prompt_id=prompt_id,
        response=_encodable(text),
        status="refused" if refusal else status_of(text, finish_reason),
        finish_reason=finish_reason,
        prompt_tokens=_count(_get(usage, "prompt_tokens")),
        response_tokens=_count(_get(usage, "completion_tokens")),
        served_as=served_as if isinstance(served_as, str) else None,
    )


def failed_answer(prompt_id: str, failure: Failure) -> Answer:
    """The row of a request that failed: refused if a content filter did it, which is the server's answer to that prompt."""
    filtered = failure.code == CONTENT_FILTER
    return Answer(
        prompt_id=prompt_id,
        response="",
        status="refused" if filtered else "failed",
        finish_reason=CONTENT_FILTER if filtered else None,
        reason=f"{failure.status or 'no status'}: {failure.message}",
    )


async def _until_stopped(work: Coroutine[Any, Any, None], stop: threading.Event) -> None:
    """Run to the end, or drop it when another thread says so."""
    task = asyncio.ensure_future(work)
    try:
        while not task.done() and not stop.is_set():
            await asyncio.wait([task], timeout=_POLL_SECONDS)
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait([task])
    if not task.cancelled():
        task.result()


def _get(value: object, name: str) -> Any:
    return value.get(name) if isinstance(value, Mapping) else None


def _first(value: object) -> object:
    return value[0] if isinstance(value, list) and value else None


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _encodable(text: str) -> str:
    """The text without halves of surrogate pairs, which JSON can hold and no file can."""
    return text.encode("utf-8", "replace").decode()
