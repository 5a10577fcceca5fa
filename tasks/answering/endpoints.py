"""Requests to a server that speaks the OpenAI protocol: bounded in number, retried where that helps, paced as it asks.

The one place where CHARM talks to a model server. A request has one of three ends: an answer, a ``Failure`` of its own
(the server will not answer this one), or, where nobody is answered, an error that stops all of them. What was answered
until then has been handed on.

- Tried again: broken connections, time-outs, 408, 409, 425, 429, 5xx, and bodies that are not what they should be.
- A failure of that request: any other status, and a request that is out of tries while the server still answers.
- An error at once: a rejected key, an unknown model or route, a redirect, a used-up quota; later: a server that is down.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from charm_core.errors import CharmError, ConfigError, ServiceError
from tasks.answering.pacing import Gate, Pacing, retry_after_seconds
from tasks.endpoint import Endpoint, is_loopback
from tasks.secrets import secret

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncOpenAI

Q = TypeVar("Q")
T = TypeVar("T")
Call = Callable[["AsyncOpenAI", Q], Awaitable[T]]
"""Sends one request through the client and returns what came of it; MalformedAnswerError if that is not what it should be."""

RATE_LIMITED = 429
_PASSING = {408, 409, 425, RATE_LIMITED}
_DOWN = {502, 503, 504}
"""What a proxy answers for a server that is gone. Not 500: some servers have no list of models."""
_MESSAGE_LENGTH = 300
_PROBE_SECONDS = 10.0
_CONNECT_SECONDS = 30.0
_REFUSALS_PER_TRY = 10
"""A request that alone is refused so often, such as one above the limit of tokens per minute, is not tried for ever."""


class Failure(BaseModel):
    """The permanent failure of one request."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    status: int | None = Field(default=None, description="HTTP status; none where no whole answer came.")
    code: str | None = Field(default=None, description="The server's own name of the error.")
    message: str = Field(description="What the server or the connection said, without secrets.")


class MalformedAnswerError(Exception):
    """An answer with status 200 that is not what the protocol says. Raised by a ``Call``; the request is tried again."""


def call_endpoint(
    endpoint: Endpoint,
    requests: Iterable[Q],
    call: "Call[Q, T]",
    on_done: Callable[[Q, T | Failure], None],
    *,
    answered_before: bool = False,
    pacing: Pacing = Pacing(),  # noqa: B008 - frozen
) -> None:
    """Send requests, at most ``endpoint.concurrency`` at a time. Not from inside a running event loop: see ``ask_endpoint``.

    Args:
        endpoint: Whom to ask.
        requests: What to ask, in this order; taken one by one, so an iterator keeps memory flat.
        call: Sends one of them. It is called again for a try that failed, so it must not have other effects.
        on_done: Called exactly once per request as its end comes, in the calling thread; inside an event loop, so it must
            not wait long, nor call what needs a loop of its own, such as Prefect.
        answered_before: The endpoint has answered such requests, so that failures in a row are theirs and not the server's.
        pacing: Waits and limits.

    Raises:
        ConfigError: The key is rejected, the model or the route is unknown, or the server redirects: nothing can be answered.
        ServiceError: The server is down, answers nobody, or its quota is used up.
    """
    asyncio.run(ask_endpoint(endpoint, requests, call, on_done, answered_before=answered_before, pacing=pacing))


async def ask_endpoint(
    endpoint: Endpoint,
    requests: Iterable[Q],
    call: "Call[Q, T]",
    on_done: Callable[[Q, T | Failure], None],
    *,
    answered_before: bool = False,
    pacing: Pacing = Pacing(),  # noqa: B008 - frozen
) -> None:
    """``call_endpoint`` as a coroutine, to ask several endpoints at once."""
    key = _key(endpoint.api_key) if endpoint.api_key else None
    pending = iter(requests)
    async with _open_client(endpoint, key) as client:
        caller = _Caller(endpoint, client, key, call, pacing, answered_before=answered_before)

        async def work() -> None:
            for request in pending:  # shared by all workers: each takes what no other has taken
                on_done(request, await caller.answer(request))

        try:
            async with asyncio.TaskGroup() as workers:
                for _ in range(endpoint.concurrency):
                    workers.create_task(work())
        except BaseExceptionGroup as group:
            raise _first(group) from None


def _key(name: str) -> str:
    key = secret(name).get_secret_value().strip()  # a file's last line ends in a line break
    if not (key.isascii() and key.isprintable() and key):
        raise ConfigError(f"the secret {name!r} has characters that no key has, such as a line break; set it anew")
    return key


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


@asynccontextmanager
async def _open_client(endpoint: Endpoint, key: str | None) -> AsyncIterator["AsyncOpenAI"]:
    import httpx2  # both take half a second to import
    from openai import AsyncOpenAI

    async def drop_headers(request: httpx2.Request) -> None:
        # what the openai client takes from the environment must not go to whatever server the settings name
        for name in ("openai-organization", "openai-project", *(() if key else ("authorization",))):
            request.headers.pop(name, None)

    async with (
        httpx2.AsyncClient(
            limits=httpx2.Limits(
                max_connections=endpoint.concurrency + 1, max_keepalive_connections=endpoint.concurrency + 1
            ),
            # the total time is limited around each call: these only end what hangs
            timeout=httpx2.Timeout(endpoint.timeout_seconds, connect=min(endpoint.timeout_seconds, _CONNECT_SECONDS)),
            follow_redirects=False,
            trust_env=not is_loopback(endpoint.base_url),
            event_hooks={"request": [drop_headers]},
        ) as http,
        AsyncOpenAI(
            api_key=key or "none",
            base_url=endpoint.base_url,
            max_retries=0,
            timeout=http.timeout,
            http_client=http,
        ) as client,
    ):
        yield client


@dataclass(frozen=True, kw_only=True)
class _Trouble:
    """A try that brought no answer."""

    failure: Failure
    may_pass: bool
    retry_after: float | None = None
    """Seconds that the server asks for."""


class _Caller(Generic[Q, T]):
    """Brings requests to their end, and remembers whether anybody is answered."""

    def __init__(
        self,
        endpoint: Endpoint,
        client: "AsyncOpenAI",
        key: str | None,
        call: "Call[Q, T]",
        pacing: Pacing,
        *,
        answered_before: bool,
    ) -> None:
        self._endpoint, self._client, self._key, self._call, self._pacing = endpoint, client, key, call, pacing
        self._answered_before = answered_before
        self._gate = Gate(endpoint.concurrency)
        self._answered = 0
        self._failures_in_a_row = 0

    async def answer(self, request: Q) -> T | Failure:
        """The answer to a request, or why there is none.

        Raises:
            ConfigError, ServiceError: Nobody is answered.
        """
        tries = refusals = 0
        while True:
            answered = self._answered
            result = await self._try(request)
            if not isinstance(result, _Trouble):
                self._answered += 1
                self._failures_in_a_row = 0
                self._gate.answered()
                return result
            failure = result.failure
            if not result.may_pass:
                return self._failed(failure)
            if failure.status == RATE_LIMITED:
                # no try of this request's own: the limit is on all of them
                refusals += 1
                self._pause(result)
                if refusals < _REFUSALS_PER_TRY * self._endpoint.max_tries:
                    continue
                return self._failed(failure)
            tries += 1
            if tries >= self._endpoint.max_tries:
                await self._check_is_up(failure, alone=self._answered > answered)
                return self._failed(failure)
            await self._wait(result, tries)

    async def _try(self, request: Q) -> "T | _Trouble":
        import openai

        await self._gate.enter()
        try:
            # the client's own time-outs are between bytes: a server that sends one byte a minute never meets them
            async with asyncio.timeout(self._endpoint.timeout_seconds):
                return await self._call(self._client, request)
        except openai.APIStatusError as error:
            return self._status_trouble(error)
        except (TimeoutError, openai.APITimeoutError):
            return self._passing(f"no answer within {self._endpoint.timeout_seconds:g} s")
        except openai.APIConnectionError as error:
            return self._passing(f"the connection failed: {error.__cause__ or error}")
        except (
            MalformedAnswerError,
            openai.APIResponseValidationError,
            json.JSONDecodeError,
            ValidationError,
        ) as error:
            return self._passing(f"the answer is malformed: {error}")
        finally:
            self._gate.leave()

    def _passing(self, message: str) -> _Trouble:
        return _Trouble(failure=Failure(message=self._without_key(message)), may_pass=True)

    def _status_trouble(self, error: "APIStatusError") -> _Trouble:
        """What a status other than 2xx means for this request.

        Raises:
            ConfigError, ServiceError: It means the same for all requests.
        """
        failure = Failure(
            status=error.status_code,
            code=self._without_key(error.code) if error.code else None,
            message=self._without_key(_server_message(error.body)),
        )
        fatal = self._fatal(failure)
        if fatal is not None:
            raise fatal from None  # the client's error holds the request and so the key
        may_pass = failure.status in _PASSING or error.status_code >= 500
        wait = retry_after_seconds(error.response.headers) if may_pass else None
        if wait is not None and wait > self._pacing.longest_retry_after_seconds:
            raise ServiceError(
                f"{self._who()} asks to come back in {wait:.0f} s ({failure.message}); run again then: what was answered is kept"
            ) from None
        return _Trouble(failure=failure, may_pass=may_pass, retry_after=wait)

    def _fatal(self, failure: Failure) -> CharmError | None:
        said = f"{self._who()} answers {failure.status}: {failure.message}"
        match failure.status:
            case 401:
                advice = "check the secret that endpoint.api_key names" if self._key else "set endpoint.api_key"
                return ConfigError(f"{said}; {advice}")
            case 403 if not (self._answered or self._answered_before):  # later it is about the one request
                return ConfigError(f"{said}; the key may not use this model")
            case 404 | 405:
                return ConfigError(f"{said}; check model and base_url, which ends in /v1 with most servers")
            case status if status is not None and 300 <= status < 400:
                return ConfigError(f"{said}; it redirects, which is not followed: give the final address as base_url")
            case 402:
                return ServiceError(f"{said}; what was answered is kept")
            case 429 if failure.code == "insufficient_quota":
                return ServiceError(f"{said}; what was answered is kept: run again when there is quota")
        return None

    def _failed(self, failure: Failure) -> Failure:
        """The failure, unless it is one too many in a row."""
        self._failures_in_a_row += 1
        trusted = self._answered_before and not self._answered
        if self._failures_in_a_row >= self._pacing.hopeless_failures and not trusted:
            raise ServiceError(
                f"{self._who()} failed {self._failures_in_a_row} requests in a row, the last with {failure.status or 'no status'}: "
                f"{failure.message}; what was answered before is kept"
            )
        return failure

    async def _check_is_up(self, failure: Failure, *, alone: bool) -> None:
        """Find out whether a request that is out of tries failed alone.

        Raises:
            ServiceError: It did not: the server is down.
        """
        if not alone and not await self._is_up():
            raise ServiceError(
                f"{self._who()} does not answer ({self._endpoint.max_tries} tries, last: {failure.message}); what was "
                f"answered before is kept: run again when it is up"
            )

    async def _is_up(self) -> bool:
        import httpx2
        import openai

        try:
            await self._client.get("/models", cast_to=httpx2.Response, options={"timeout": _PROBE_SECONDS})
        except openai.APIStatusError as error:
            return error.status_code not in _DOWN
        except openai.APIError:
            return False
        return True

    async def _wait(self, trouble: _Trouble, tries: int) -> None:
        if trouble.retry_after is not None:
            self._gate.pause(trouble.retry_after)
        else:
            await asyncio.sleep(self._pacing.wait(tries))

    def _pause(self, trouble: _Trouble) -> None:
        """Ask nothing for a while.

        Raises:
            ServiceError: After so many pauses not even a single request at a time is let through.
        """
        one_at_a_time = self._gate.limit == 1 and not self._gate.inside
        begins = self._gate.pause(trouble.retry_after or self._pacing.wait(self._gate.pauses_in_a_row))
        if begins and one_at_a_time and self._gate.pauses_in_a_row >= self._endpoint.max_tries:
            raise ServiceError(
                f"{self._who()} still refuses every request after {self._gate.pauses_in_a_row} pauses, last: "
                f"{trouble.failure.message}; what was answered before is kept: run again later"
            )

    def _who(self) -> str:
        return f"{self._endpoint.base_url} (model {self._endpoint.model!r})"

    def _without_key(self, text: str) -> str:
        short = " ".join(text.split())
        hidden = short.replace(self._key, "[key]") if self._key else short
        return hidden if len(hidden) <= _MESSAGE_LENGTH else f"{hidden[:_MESSAGE_LENGTH]}..."


def _server_message(body: object) -> str:
    """What a server says about an error, of whatever form."""
    if isinstance(body, dict):
        for name in ("message", "detail", "error"):
            if body.get(name):
                return str(body[name])
    return str(body) if body else "no reason given"
