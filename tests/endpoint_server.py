"""A real server on loopback that speaks the OpenAI protocol, and misbehaves as it is told.

Import it with ``from tests.endpoint_server import EndpointServer``. By default it answers every chat request with a text
that is a function of the conversation alone; a ``behaviour`` decides otherwise, request by request.
"""

import asyncio
import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

MODEL = "tiny"


@dataclass(frozen=True)
class Asked:
    """One request, as the server sees it."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    number: int
    """Requests before this one."""
    time: int
    """How many times this conversation had been asked before."""

    @property
    def prompt(self) -> str:
        """The last message; empty for what is no chat."""
        return self.body["messages"][-1]["content"] if "messages" in self.body else ""


@dataclass(frozen=True)
class Reply:
    """What to send back, and how badly."""

    body: Any = None
    """JSON, or bytes as they are."""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    wait: float = 0.0
    """Seconds before the first byte."""
    byte_wait: float = 0.0
    """Seconds before every further byte."""
    cut: Literal["", "unanswered", "half"] = ""
    """Close the connection without an answer, or in the middle of one."""


Behaviour = Callable[[Asked], Reply | None]


def answer_to(conversation: list[dict[str, str]]) -> str:
    """The text of a good answer."""
    return f"answer to {conversation[-1]['content']}"


def completion(text: str | None, *, finish_reason: str = "stop", model: str = MODEL, **message: Any) -> dict[str, Any]:
    """A body of ``/v1/chat/completions``. Its id is always the same, which no client may mind."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text, **message}, "finish_reason": finish_reason}
    usage = {"prompt_tokens": 5, "completion_tokens": len((text or "").split())}
    usage["total_tokens"] = sum(usage.values())
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 0,
        "model": model,
        "choices": [choice],
        "usage": usage,
    }


def failure(status: int, message: str, *, code: str | None = None, **headers: str) -> Reply:
    """An error as the protocol writes it."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply({"error": {"message": message, "type": "error", "param": None, "code": code}}, status, names)


class EndpointServer:
    """Serves from a thread of its own while a ``with`` block lasts; counts what it is asked."""

    def __init__(self, behaviour: Behaviour = lambda asked: None, *, latency: float = 0.0, port: int = 0) -> None:
        self.behaviour = behaviour
        self.latency = latency
        self.port = port
        """0: one that is free."""
        self.asked: list[Asked] = []
        """Chat and other POST requests, in order of arrival."""
        self.answered: Counter[str] = Counter()
        """Good answers sent to the end, by prompt."""
        self.in_flight = 0
        self.peak = 0
        self.latest = 0.0
        """When the last good answer was sent, by ``time.monotonic``."""
        self._times: Counter[str] = Counter()

    @property
    def url(self) -> str:
        """What belongs into ``base_url``."""
        return f"http://127.0.0.1:{self.port}/v1"

    def times(self) -> Counter[str]:
        """How often each prompt was asked."""
        return Counter(asked.prompt for asked in self.asked)

    def __enter__(self) -> "EndpointServer":
        self._loop = asyncio.new_event_loop()
        started = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=(started,), name="endpoint-server", daemon=True)
        self._thread.start()
        started.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join()
        self._loop.close()

    def _serve(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._main(started))

    async def _main(self, started: threading.Event) -> None:
        self._stopped = asyncio.Event()
        self._connections: set[asyncio.Task[None]] = set()
        server = await asyncio.start_server(self._connection, "127.0.0.1", self.port, backlog=1024)
        self.port = server.sockets[0].getsockname()[1]
        started.set()
        await self._stopped.wait()
        server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            while request := await _read_request(reader):
                await self._reply(*request, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client has gone, or the server stops
        finally:
            self._connections.discard(task)
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def _reply(
        self, method: str, path: str, headers: dict[str, str], body: bytes, writer: asyncio.StreamWriter
    ) -> None:
        if method == "GET":
            asked = Asked(path, headers, {}, len(self.asked), 0)
            reply = self.behaviour(asked) or Reply({"object": "list", "data": [{"id": MODEL, "object": "model"}]})
            await _send(writer, reply)
            return
        content = json.loads(body)
        said = json.dumps(content.get("messages", content))
        asked = Asked(path, headers, content, len(self.asked), self._times[said])
        self._times[said] += 1
        self.asked.append(asked)
        self.in_flight += 1
        self.peak = max(self.peak, self.in_flight)
        try:
            # a behaviour may compute for a while
            reply = await asyncio.to_thread(self.behaviour, asked) or Reply(completion(answer_to(content["messages"])))
            await asyncio.sleep(self.latency + reply.wait)
            await _send(writer, reply)
            if reply.status == 200 and not reply.cut and "messages" in content:
                self.answered[asked.prompt] += 1
                self.latest = time.monotonic()
        finally:
            self.in_flight -= 1


async def _read_request(reader: asyncio.StreamReader) -> tuple[str, str, dict[str, str], bytes] | None:
    line = await reader.readline()
    if not line:
        return None
    method, path, _ = line.decode().split()
    headers: dict[str, str] = {}
    while (header := (await reader.readline()).decode().strip()) != "":
        name, _, value = header.partition(":")
        headers[name.lower()] = value.strip()
    return method, path, headers, await reader.readexactly(int(headers.get("content-length", 0)))


async def _send(writer: asyncio.StreamWriter, reply: Reply) -> None:
    if reply.cut == "unanswered":
        writer.transport.abort()
        return
    body = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **reply.headers}
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    writer.write(f"HTTP/1.1 {reply.status} -\r\n{head}\r\n".encode())
    if reply.cut == "half":
        writer.write(body[: len(body) // 2])
        await writer.drain()
        writer.transport.abort()
        return
    if reply.byte_wait:
        for position in range(len(body)):
            writer.write(body[position : position + 1])
            await writer.drain()
            await asyncio.sleep(reply.byte_wait)
    else:
        writer.write(body)
    await writer.drain()


@contextlib.contextmanager
def policy_model_server(folder: Any, *, max_new_tokens: int = 64) -> Iterator[EndpointServer]:
    """Serve a tiny causal language model, a Hugging Face folder, with transformers: real text, one request at a time."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    turn = threading.Lock()

    def generate(asked: Asked) -> Reply | None:
        if "messages" not in asked.body:
            return None
        inputs = tokenizer.apply_chat_template(
            asked.body["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        temperature = asked.body.get("temperature", 1.0)
        sampling = {"do_sample": True, "temperature": temperature, "top_p": asked.body.get("top_p", 1.0)}
        limit = min(asked.body.get("max_tokens") or max_new_tokens, max_new_tokens)
        with turn, torch.random.fork_rng(devices=[]):
            torch.manual_seed(asked.body.get("seed") or 0)
            output = model.generate(
                **inputs, max_new_tokens=limit, **(sampling if temperature else {"do_sample": False}), top_k=0
            )
        new = output[0, inputs["input_ids"].shape[1] :].tolist()
        ended = tokenizer.eos_token_id in new
        body = completion(
            tokenizer.decode(new, skip_special_tokens=True),
            finish_reason="stop" if ended else "length",
            model=asked.body["model"],
        )
        body["usage"] = {"prompt_tokens": inputs["input_ids"].shape[1], "completion_tokens": len(new)}
        body["usage"]["total_tokens"] = sum(body["usage"].values())
        return Reply(body)

    with EndpointServer(generate) as server:
        yield server
