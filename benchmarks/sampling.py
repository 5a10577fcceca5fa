"""The sampling engine beside what one would write in ten lines: answers a second from a server of fixed latency on loopback.

    python -m benchmarks.sampling [--prompts 1000] [--concurrency 64] [--latency 0.5]

Prints one table. The server runs in a process of its own and answers every request after the same time. Three servers: a
steady one; one at which 2 % of the requests meet a 500 or a cut connection; one with a rate limit of half of what is asked
for, in requests a second, and 429 with Retry-After above it. The loop asks one request after the other with the openai
client, for a few prompts, and is scaled. Gather is asyncio.gather under a semaphore over the openai client, with its own two
retries. Ours journals every answer as it comes. The floor is prompts × latency / concurrency, or what the limit allows.
"""

import argparse
import asyncio
import multiprocessing
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory

from openai import AsyncOpenAI, OpenAI, OpenAIError

from charm_core.sampling import Answer, Decoding
from tasks.answering.chat import Prompt, ask_chat
from tasks.answering.journal import Journal
from tasks.policy_models import OpenAIBackend
from tests.endpoint_server import Asked, EndpointServer, Reply, failure

LOOP_PROMPTS = 8
DECODING = Decoding(max_tokens=64)


def faulty(asked: Asked) -> Reply | None:
    """One in fifty goes wrong."""
    drawn = random.Random(f"{asked.prompt} {asked.time}").random()  # noqa: S311
    return None if drawn > 0.02 else failure(500, "engine") if drawn > 0.01 else Reply(cut="unanswered")


class RateLimit:
    """So many requests a second, and a second's worth at once."""

    def __init__(self, rate: float) -> None:
        self._rate, self._left, self._seen = rate, rate, time.monotonic()
        self._turn = threading.Lock()

    def __call__(self, _: Asked) -> Reply | None:
        """429 where there is nothing left."""
        with self._turn:
            now = time.monotonic()
            self._left = min(self._rate, self._left + (now - self._seen) * self._rate)
            self._seen = now
            if self._left < 1:
                return failure(429, "slow down", retry_after="1")
            self._left -= 1
            return None


def serve(kind: str, latency: float, rate: float, port: Connection) -> None:
    """Answer until the other end says stop."""
    behaviours = {"steady": lambda _: None, "faulty": faulty, "limited": RateLimit(rate)}
    with EndpointServer(behaviours[kind], latency=latency) as server:
        port.send(server.url)
        port.recv()
        port.send(server.peak)


@contextmanager
def server(kind: str, latency: float, rate: float) -> Iterator[tuple[str, list[int]]]:
    """Its address; its most requests at a time are in the list afterwards."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(kind, latency, rate, there))
    process.start()
    peak: list[int] = []
    try:
        yield here.recv(), peak
        here.send(None)
        peak.append(here.recv())
    finally:
        process.join(timeout=10)
        process.terminate()


def loop(url: str, prompts: list[Prompt], _: int) -> int:
    """One after the other."""
    client = OpenAI(base_url=url, api_key="none")
    answered = 0
    for prompt in prompts:
        client.chat.completions.create(model="tiny", messages=prompt.messages, max_tokens=64)  # type: ignore[arg-type]
        answered += 1
    return answered


def gather(url: str, prompts: list[Prompt], concurrency: int) -> int:
    """All at once, as far as a semaphore lets them."""

    async def everything() -> int:
        room = asyncio.Semaphore(concurrency)
        async with AsyncOpenAI(base_url=url, api_key="none") as client:

            async def ask(prompt: Prompt) -> None:
                async with room:
                    await client.chat.completions.create(
                        model="tiny",
                        messages=prompt.messages,
                        max_tokens=64,  # type: ignore[arg-type]
                    )

            results = await asyncio.gather(*map(ask, prompts), return_exceptions=True)
        return sum(not isinstance(result, OpenAIError) for result in results)

    return asyncio.run(everything())


def ours(url: str, prompts: list[Prompt], concurrency: int) -> int:
    """The engine, with its journal."""
    backend = OpenAIBackend(base_url=url, model="tiny", concurrency=concurrency)
    answers: list[Answer] = []
    with TemporaryDirectory() as folder, Journal(Path(folder), "shard").held() as journal:

        def on_answer(answer: Answer) -> None:
            journal.append(answer)
            answers.append(answer)

        ask_chat(backend, DECODING, prompts, on_answer, threading.Event())
    return sum(answer.status != "failed" for answer in answers)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one way took."""

    seconds: float
    cpu: float
    unanswered: int
    peak: int


def measure(
    way: Callable[[str, list[Prompt], int], int], prompts: list[Prompt], kind: str, options: argparse.Namespace
) -> Measured:
    """Ask all prompts in one way."""
    rate = options.concurrency / options.latency / 2
    with server(kind, options.latency, rate) as (url, peak):
        started, busy = time.perf_counter(), time.process_time()
        answered = way(url, prompts, options.concurrency)
        seconds, cpu = time.perf_counter() - started, time.process_time() - busy
    return Measured(seconds=seconds, cpu=cpu, unanswered=len(prompts) - answered, peak=peak[0])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--latency", type=float, default=0.5)
    options = parser.parse_args()
    count = options.prompts
    prompts = [Prompt(prompt_id=f"p{n}", messages=[{"role": "user", "content": f"question {n}"}]) for n in range(count)]
    few = measure(loop, prompts[:LOOP_PROMPTS], "steady", options)
    slow = few.seconds / LOOP_PROMPTS * count
    print(f"{count} prompts, {options.latency} s each, {options.concurrency} at a time")
    print(
        f"{'server':10}{'way':10}{'seconds':>9}{'answers/s':>11}{'× loop':>8}{'of floor':>10}{'CPU ms each':>13}"
        f"{'unanswered':>12}{'peak':>6}"
    )

    def line(kind: str, way: str, floor: float, took: Measured) -> str:
        answered = count - took.unanswered
        return (
            f"{kind:10}{way:10}{took.seconds:9.1f}{answered / took.seconds:11.1f}{slow / took.seconds:8.1f}"
            f"{floor / took.seconds:10.0%}{took.cpu / count * 1000:13.1f}{took.unanswered:12}{took.peak:6}"
        )

    steady = count * options.latency / options.concurrency
    scaled = Measured(seconds=slow, cpu=few.cpu / LOOP_PROMPTS * count, unanswered=0, peak=few.peak)
    print(line("steady", "loop", steady, scaled))
    for kind, floor in (("steady", steady), ("faulty", steady), ("limited", 2 * steady)):
        for way in (gather, ours):
            print(line(kind, way.__name__, floor, measure(way, prompts, kind, options)))


if __name__ == "__main__":
    main()
