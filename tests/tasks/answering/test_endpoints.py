"""One request after the other may go wrong in its own way; every request comes to exactly one end."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import pytest
from pydantic import ValidationError

from charm_core.errors import ConfigError, ServiceError
from tasks.answering.chat import OpenAIBackend
from tasks.answering.endpoints import Failure, MalformedAnswerError, ask_endpoint, call_endpoint
from tasks.answering.pacing import Gate, Pacing, retry_after_seconds
from tasks.endpoint import Endpoint
from tasks.secrets import use_secrets
from tests.endpoint_server import Asked, Behaviour, EndpointServer, Reply, completion, failure

QUICK = Pacing(first_wait_seconds=0.01, longest_wait_seconds=0.05)
CANARY = "sk-canary-0123456789abcdef"


async def chat(client: Any, prompt: str) -> str:
    answer = await client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": prompt}], max_tokens=8
    )
    try:
        return answer.choices[0].message.content
    except (AttributeError, TypeError, IndexError):
        raise MalformedAnswerError("no message") from None


def ask(server: EndpointServer, prompts: Any, *, pacing: Pacing = QUICK, **options: Any) -> dict[str, Any]:
    """What came of every prompt; fails if one came to two ends."""
    ends: list[tuple[str, Any]] = []
    answered_before = options.pop("answered_before", False)
    endpoint = Endpoint(base_url=server.url, model="tiny", **{"concurrency": 8, "timeout_seconds": 10.0, **options})
    try:
        call_endpoint(
            endpoint, prompts, chat, lambda *end: ends.append(end), answered_before=answered_before, pacing=pacing
        )
    finally:
        assert max(Counter(prompt for prompt, _ in ends).values(), default=1) == 1
        server.ends = dict(ends)  # what was handed on before an error
    return dict(ends)


def prompts(count: int) -> list[str]:
    return [f"prompt {number}" for number in range(count)]


def answers(count: int) -> dict[str, str]:
    return {prompt: f"answer to {prompt}" for prompt in prompts(count)}


def first(times: int, reply: Reply) -> Behaviour:
    """The first so many times that a prompt is asked."""
    return lambda asked: reply if asked.time < times and asked.body else None


def always(reply: Reply, *, models: Reply | None = None) -> Behaviour:
    return lambda asked: reply if asked.body else models


class TestAnswers:
    def test_all_are_answered_at_the_concurrency_that_is_set(self):
        with EndpointServer(latency=0.05) as server:
            assert ask(server, prompts(40), concurrency=5) == answers(40)
        assert server.peak == 5
        assert set(server.times().values()) == {1}

    def test_requests_are_taken_as_they_are_needed(self):
        taken = []

        def lazily():
            for prompt in prompts(30):
                taken.append(prompt)
                yield prompt

        def behaviour(asked: Asked) -> None:
            assert len(taken) <= server_asked() + 4

        with EndpointServer() as server:

            def server_asked() -> int:
                return len(server.asked)

            server.behaviour = behaviour
            assert ask(server, lazily(), concurrency=4) == answers(30)

    def test_nothing_to_ask_is_nothing_asked(self):
        with EndpointServer() as server:
            assert ask(server, []) == {}

    def test_several_endpoints_in_one_loop(self):
        ends: list[Any] = []

        async def both() -> None:
            endpoints = [Endpoint(base_url=server.url, model="tiny", concurrency=4) for server in (one, other)]
            await asyncio.gather(
                *(ask_endpoint(e, prompts(10), chat, lambda *end: ends.append(end)) for e in endpoints)
            )

        with EndpointServer() as one, EndpointServer() as other:
            asyncio.run(both())
        assert Counter(prompt for prompt, _ in ends) == dict.fromkeys(prompts(10), 2)
        assert len(one.asked) == len(other.asked) == 10


PASSING = {
    "429": failure(429, "slow down", retry_after="0.05"),
    "429 without a time": failure(429, "slow down"),
    "429 in milliseconds": failure(429, "slow down", retry_after_ms="30"),
    "408": failure(408, "time-out"),
    "409": failure(409, "lock"),
    "500": failure(500, "engine"),
    "503 with a time": failure(503, "loading", retry_after="0.05"),
    "529": Reply(b"overloaded", 529),
    "cut before": Reply(cut="unanswered"),
    "cut within": Reply(completion("half an answer"), cut="half"),
    "not JSON": Reply(b'{"id": "x", "choices": [{"mess'),
    "another type": Reply(b"<html>proxy</html>", headers={"content-type": "text/html"}),
    "no choices": Reply({"id": "x", "object": "chat.completion", "choices": []}),
    "null": Reply(b"null"),
    "a list": Reply([1, 2]),
    "choices of another type": Reply({"choices": "none"}),
    "slow bytes": Reply(completion("slow"), byte_wait=0.05),
}


@pytest.mark.parametrize("fault", PASSING)
def test_what_can_pass_is_asked_again(fault: str):
    reply = PASSING[fault]
    with EndpointServer(first(1, reply)) as server:
        assert ask(server, prompts(6), timeout_seconds=1.0, concurrency=3) == answers(6)
    assert set(server.times().values()) == {2}


class TestWhatCannotPass:
    @pytest.mark.parametrize("status", [400, 413, 422, 501 - 90])
    def test_a_request_that_is_refused_for_good_is_asked_once(self, status: int):
        reply = failure(status, "too long", code="context_length_exceeded")
        with EndpointServer(lambda asked: reply if asked.body and asked.prompt == "prompt 3" else None) as server:
            ends = ask(server, prompts(6))
        assert ends["prompt 3"] == Failure(status=status, code="context_length_exceeded", message="too long")
        assert {prompt: end for prompt, end in ends.items() if prompt != "prompt 3"} == {
            prompt: end for prompt, end in answers(6).items() if prompt != "prompt 3"
        }
        assert server.times()["prompt 3"] == 1

    def test_a_request_that_breaks_the_server_fails_alone(self):
        with EndpointServer(
            lambda asked: failure(500, "CUDA error") if asked.body and asked.prompt == "prompt 0" else None
        ) as server:
            ends = ask(server, prompts(3), max_tries=4, concurrency=1)
        assert ends == {**answers(3), "prompt 0": Failure(status=500, message="CUDA error")}
        assert server.times()["prompt 0"] == 4

    def test_slow_bytes_end_at_the_total_time(self):
        slow = Reply(completion("for ever"), byte_wait=0.2)
        start = time.monotonic()
        with EndpointServer(always(slow)) as server:
            ends = ask(server, prompts(1), timeout_seconds=0.5, max_tries=2)
        assert ends["prompt 0"] == Failure(message="no answer within 0.5 s")
        assert time.monotonic() - start < 15  # all bytes would take a minute a try

    def test_a_request_that_alone_is_rate_limited_does_not_go_on_for_ever(self):
        reply = failure(429, "request too large", retry_after="0.001")
        with EndpointServer(lambda asked: reply if asked.prompt == "prompt 1" else None, latency=0.001) as server:
            many = (f"prompt {number}" for number in range(4000))
            ends = ask(server, many, max_tries=1, concurrency=4)
        assert ends["prompt 1"].status == 429
        assert server.times()["prompt 1"] == 10


class TestGate:
    @staticmethod
    async def inside(gate: Gate, entered: list[asyncio.Task[None]], seconds: float = 0.02) -> int:
        await asyncio.sleep(seconds)
        return sum(task.done() for task in entered)

    def test_fewer_after_a_pause_and_slowly_more(self):
        async def scene() -> None:
            gate = Gate(8)
            entered = [asyncio.create_task(gate.enter()) for _ in range(40)]
            assert await self.inside(gate, entered) == gate.inside == 8
            assert gate.pause(0.05)
            assert not gate.pause(0.01)  # another answer to the same burst
            assert (gate.limit, gate.pauses_in_a_row) == (6, 1)
            for _ in range(8):
                gate.leave()
            assert await self.inside(gate, entered) == 8
            assert await self.inside(gate, entered, 0.1) == 8 + 6
            for _ in range(4):
                gate.answered()
            assert await self.inside(gate, entered) == 8 + 7
            assert (gate.limit, gate.pauses_in_a_row) == (7, 0)
            for _ in range(100):
                gate.answered()
            assert gate.limit == 8
            for task in entered:
                task.cancel()

        asyncio.run(scene())

    def test_one_at_a_time_is_the_least(self):
        async def scene() -> None:
            gate = Gate(8)
            for limit in (6, 3, 1, 1):
                gate.pause(0.001)
                assert gate.limit == limit
                await asyncio.sleep(0.01)
            await gate.enter()
            assert gate.inside == 1

        asyncio.run(scene())


class TestRateLimits:
    def test_a_rate_limit_pauses_everybody(self):
        arrivals: list[float] = []

        def behaviour(asked: Asked) -> Reply | None:
            arrivals.append(time.monotonic())
            return failure(429, "slow down", retry_after="1") if asked.number == 10 else None

        with EndpointServer(behaviour, latency=0.02) as server:
            assert ask(server, prompts(60), concurrency=4) == answers(60)
        gaps = [later - earlier for earlier, later in pairwise(arrivals)]
        assert max(gaps) > 0.9
        # those that were under way when the limit was met, and nobody else
        assert gaps.index(max(gaps)) <= 10 + 4

    def test_a_server_that_allows_few_at_a_time_answers_all(self):
        def behaviour(asked: Asked) -> Reply | None:
            return failure(429, "too many", retry_after="0.05") if server.in_flight > 3 else None

        with EndpointServer(latency=0.02) as server:
            server.behaviour = behaviour
            # the tries are not used up by waiting
            assert ask(server, prompts(100), concurrency=32, max_tries=2) == answers(100)

    def test_a_limit_that_never_lifts_is_an_error(self):
        with (
            EndpointServer(always(failure(429, "no more today"))) as server,
            pytest.raises(ServiceError, match=r"still refuses every request after 4 pauses, last: no more today"),
        ):
            ask(server, prompts(50), max_tries=3, concurrency=8)
        assert len(server.asked) == 8 + 6 + 3 + 1

    def test_a_wait_of_hours_is_an_error_at_once(self):
        with (
            EndpointServer(
                lambda asked: failure(429, "daily", retry_after="7200") if asked.number == 5 else None
            ) as server,
            pytest.raises(ServiceError, match=r"asks to come back in 7200 s \(daily\)"),
        ):
            ask(server, prompts(50), concurrency=1)
        assert server.ends == answers(5)

    def test_a_used_up_quota_is_an_error_at_once(self):
        with (
            EndpointServer(always(failure(429, "pay", code="insufficient_quota"))) as server,
            pytest.raises(ServiceError, match="when there is quota"),
        ):
            ask(server, prompts(50), concurrency=1)
        assert len(server.asked) == 1

    @pytest.mark.parametrize(
        ("headers", "seconds"),
        [
            ({"retry-after": "3"}, 3.0),
            ({"retry-after": "0.5"}, 0.5),
            ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
            ({"retry-after": "Sat, 21 Nov 2026 12:00:30 GMT"}, 30.0),
            ({"retry-after": "Sat, 21 Nov 2026 11:00:00 GMT"}, None),
            ({"retry-after": "0"}, None),
            ({"retry-after": "-5"}, None),
            ({"retry-after": "inf"}, None),
            ({"retry-after": "soon"}, None),
            ({}, None),
        ],
    )
    def test_what_the_server_asks_for(self, headers: dict[str, str], seconds: float | None):
        assert retry_after_seconds(headers, datetime(2026, 11, 21, 12, tzinfo=UTC)) == seconds

    def test_a_date_is_by_the_servers_clock(self):
        headers = {"retry-after": "Thu, 01 Jan 2015 00:00:07 GMT", "date": "Thu, 01 Jan 2015 00:00:00 GMT"}
        assert retry_after_seconds(headers) == 7.0

    def test_waits_double_up_to_a_limit_and_differ(self):
        pacing = Pacing(first_wait_seconds=1.0, longest_wait_seconds=10.0)
        for tries, most in ((1, 1.0), (2, 2.0), (3, 4.0), (4, 8.0), (5, 10.0), (5000, 10.0)):
            drawn = [pacing.wait(tries) for _ in range(50)]
            assert most / 2 <= min(drawn) < max(drawn) <= most


NOBODY = {
    "401": (failure(401, "who are you"), ConfigError, "set endpoint.api_key"),
    "403": (failure(403, "not yours"), ConfigError, "the key may not use this model"),
    "404": (failure(404, "no model 'tiny'"), ConfigError, r"404: no model 'tiny'; check model and base_url"),
    "405": (failure(405, "no"), ConfigError, "check model and base_url"),
    "301": (Reply({}, 301, {"location": "http://elsewhere/"}), ConfigError, "give the final address"),
    "402": (failure(402, "pay first"), ServiceError, "pay first"),
}


class TestNobodyIsAnswered:
    @pytest.mark.parametrize("status", NOBODY)
    def test_what_concerns_all_is_an_error_at_once(self, status: str):
        reply, kind, message = NOBODY[status]
        with EndpointServer(always(reply)) as server, pytest.raises(kind, match=message):
            ask(server, prompts(50), concurrency=1)
        assert len(server.asked) == 1

    def test_what_was_answered_before_is_handed_on(self):
        with (
            EndpointServer(lambda asked: failure(404, "unloaded") if asked.number >= 7 else None) as server,
            pytest.raises(ConfigError, match="unloaded"),
        ):
            ask(server, prompts(50), concurrency=1)
        assert server.ends == answers(7)

    def test_a_403_among_answers_is_about_that_request(self):
        behaviour = lambda asked: failure(403, "flagged input") if asked.prompt == "prompt 3" else None  # noqa: E731
        with EndpointServer(behaviour) as server:
            ends = ask(server, prompts(6), concurrency=1)
        assert ends["prompt 3"] == Failure(status=403, message="flagged input")
        assert sum(isinstance(end, str) for end in ends.values()) == 5

    def test_no_server_is_an_error_after_the_tries(self):
        with EndpointServer() as server:
            pass
        with pytest.raises(ServiceError, match=r"does not answer \(3 tries, last: the connection failed"):
            ask(server, prompts(5), max_tries=3)

    def test_a_server_that_goes_down_is_an_error_and_keeps_its_answers(self):
        with (
            EndpointServer(
                lambda asked: failure(503, "down") if not asked.body or asked.number >= 12 else None
            ) as server,
            pytest.raises(
                ServiceError, match=r"does not answer \(3 tries, last: down\); what was answered before is kept"
            ),
        ):
            ask(server, prompts(50), max_tries=3, concurrency=2)
        assert server.ends == answers(12)

    def test_a_dead_engine_behind_a_live_front_is_an_error(self):
        with (
            EndpointServer(
                lambda asked: failure(500, "engine dead") if asked.body and asked.number >= 5 else None
            ) as server,
            pytest.raises(ServiceError, match=r"failed 20 requests in a row, the last with 500: engine dead"),
        ):
            ask(server, prompts(200), max_tries=2, concurrency=4)
        assert sum(isinstance(end, str) for end in server.ends.values()) == 5

    def test_settings_that_the_server_never_accepts_are_an_error_soon(self):
        with (
            EndpointServer(always(failure(400, "unsupported parameter: seed"))) as server,
            pytest.raises(ServiceError, match=r"failed 20 requests in a row.*unsupported parameter: seed"),
        ):
            ask(server, prompts(500), concurrency=4)
        assert len(server.asked) < 30

    def test_requests_that_failed_before_may_all_fail_again(self):
        with EndpointServer(always(failure(400, "too long"))) as server:
            ends = ask(server, prompts(30), answered_before=True)
        assert set(ends.values()) == {Failure(status=400, message="too long")}

    def test_a_fault_of_ours_is_no_failure_of_the_request(self):
        async def broken(client: Any, prompt: str) -> str:
            raise KeyError(prompt)

        with EndpointServer() as server, pytest.raises(KeyError):
            call_endpoint(Endpoint(base_url=server.url, model="tiny"), prompts(3), broken, lambda *end: None)

    def test_a_fault_in_on_done_ends_the_run(self):
        def full(*end: Any) -> None:
            raise OSError("disk full")

        with EndpointServer() as server, pytest.raises(OSError, match="disk full"):
            call_endpoint(Endpoint(base_url=server.url, model="tiny"), prompts(3), chat, full)


class TestKeys:
    def test_the_key_is_sent_and_said_nowhere_else(self, caplog: pytest.LogCaptureFixture):
        caplog.set_level(0)

        def behaviour(asked: Asked) -> Reply | None:
            said = asked.headers["authorization"]
            assert said == f"Bearer {CANARY}"
            replies: dict[str, Reply] = {
                "prompt 1": failure(400, f"bad request, headers {asked.headers}", code=CANARY),
                "prompt 2": Reply(f"not JSON {said}".encode()),
                "prompt 3": Reply({"choices": [said]}),
            }
            return replies.get(asked.prompt)

        with EndpointServer(behaviour) as server, use_secrets({"THE_KEY": CANARY}.get):
            ends = ask(server, prompts(5), api_key="THE_KEY", max_tries=2)
            server.behaviour = lambda asked: failure(401, f"wrong key {CANARY}")
            with pytest.raises(ConfigError, match=r"wrong key \[key\]; check the secret") as caught:
                ask(server, prompts(1), api_key="THE_KEY")
        assert ends["prompt 0"] == "answer to prompt 0"
        assert sum(isinstance(end, Failure) for end in ends.values()) == 3
        assert CANARY not in f"{ends}{caught.value!r}{caught.value.__dict__}{caplog.text}"

    def test_without_a_key_none_is_sent_whatever_the_environment_has(self, monkeypatch: pytest.MonkeyPatch):
        for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
            monkeypatch.setenv(name, CANARY)
        monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
        with EndpointServer() as server:
            ask(server, prompts(1))
        assert CANARY not in str(server.asked[0].headers)
        assert "authorization" not in server.asked[0].headers

    def test_a_line_break_after_the_key_is_no_part_of_it(self):
        with EndpointServer() as server, use_secrets({"THE_KEY": f"{CANARY}\n"}.get):
            ask(server, prompts(1), api_key="THE_KEY")
        assert server.asked[0].headers["authorization"] == f"Bearer {CANARY}"

    @pytest.mark.parametrize("key", [f"{CANARY}\nx", f"{CANARY}ä", f"{CANARY}\0", "\n"])
    def test_what_is_no_key_is_an_error_that_does_not_show_it(self, key: str):
        wrong = pytest.raises(ConfigError, match="the secret 'THE_KEY' has characters that no key has")
        with EndpointServer() as server, use_secrets({"THE_KEY": key}.get), wrong as caught:
            ask(server, prompts(1), api_key="THE_KEY")
        assert CANARY not in str(caught.value)
        assert server.asked == []

    def test_a_missing_secret_is_an_error_before_anything_is_asked(self):
        with EndpointServer() as server, pytest.raises(ConfigError, match="there is no secret 'ABSENT'"):
            ask(server, prompts(1), api_key="ABSENT")
        assert server.asked == []


class TestAddresses:
    @pytest.mark.parametrize(
        "url",
        [
            "https://api.example.com/v1",
            "http://127.0.0.1:8000/v1",
            "http://[::1]:8000/v1",
            "http://localhost:8000/v1",
            "http://10.1.2.3/v1",
            "http://vllm:8000/v1",
            "http://vllm.models.svc.cluster.local/v1",
        ],
    )
    def test_a_key_may_go(self, url: str):
        assert Endpoint(base_url=url, model="m", api_key="KEY").base_url == url

    @pytest.mark.parametrize("url", ["http://api.example.com/v1", "http://8.8.8.8/v1"])
    def test_a_key_does_not_go_unencrypted_over_a_public_network(self, url: str):
        with pytest.raises(ValidationError, match="would send the key 'KEY' unencrypted"):
            Endpoint(base_url=url, model="m", api_key="KEY")
        Endpoint(base_url=url, model="m")
        Endpoint(base_url=url, model="m", api_key="KEY", insecure=True)

    @pytest.mark.parametrize(
        "url", ["api.example.com/v1", "ftp://x/v1", "http://", "https://host:port/v1", "https://[::1/v1", ""]
    )
    def test_what_is_no_address(self, url: str):
        with pytest.raises(ValidationError, match="base_url"):
            OpenAIBackend(base_url=url, model="m")

    @pytest.mark.parametrize("url", [f"https://user:{CANARY}@host/v1", f"https://host/v1?key={CANARY}"])
    def test_a_secret_in_the_address_is_an_error_that_does_not_show_it(self, url: str):
        with pytest.raises(ValidationError, match="put the key into a secret") as caught:
            Endpoint(base_url=url, model="m")
        assert CANARY not in caught.value.errors(include_input=False)[0]["msg"]


def test_identity_is_the_deployment_or_the_address():
    here = Endpoint(base_url="http://127.0.0.1:8000/v1/", model="m", api_key="A", concurrency=3, timeout_seconds=1)
    assert here.identity() == Endpoint(base_url="http://127.0.0.1:8000/v1", model="m").identity()
    moved: Callable[[str], Endpoint] = lambda url: Endpoint(base_url=url, model="m", deployment="org/m@abc")  # noqa: E731
    assert moved("http://a/v1").identity() == moved("http://b/v1").identity() != here.identity()
