"""A web server on loopback that misbehaves as it is told, and one that speaks the hub's API."""

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass(frozen=True)
class Asked:
    """One request."""

    path: str
    headers: Mapping[str, str]


@dataclass
class Answer:
    """What to send. A body that is a function writes as it likes."""

    status: int = 200
    body: bytes | Callable[[Callable[[bytes], None]], None] = b""
    headers: dict[str, str] = field(default_factory=dict)
    length: int | None = None
    """Length to announce where it is another than that of the body."""


Script = Callable[[Asked], Answer]


@dataclass
class WebServer:
    """A running server and what it was asked."""

    url: str
    asked: list[Asked]


@contextmanager
def serve(script: Script) -> Iterator[WebServer]:
    """Answer every GET with what the script says."""
    asked: list[Asked] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            request = Asked(self.path, {name.lower(): value for name, value in self.headers.items()})
            asked.append(request)
            answer = script(request)
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            length = len(answer.body) if isinstance(answer.body, bytes) and answer.length is None else answer.length
            if length is not None:
                self.send_header("Content-Length", str(length))
            self.end_headers()
            with suppress(BrokenPipeError, ConnectionResetError):
                if isinstance(answer.body, bytes):
                    self.wfile.write(answer.body)
                else:
                    answer.body(self._write)

        def do_HEAD(self) -> None:
            self.send_error(405)

        def _write(self, block: bytes) -> None:
            self.wfile.write(block)
            self.wfile.flush()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield WebServer(url=f"http://127.0.0.1:{server.server_port}", asked=asked)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def in_turn(*answers: Answer) -> Script:
    """One answer after the other; the last one for ever."""
    left = list(answers)
    return lambda _: left.pop(0) if len(left) > 1 else left[0]


def with_etag(body: bytes, etag: str = '"v1"') -> Script:
    """A file that is sent only to those who do not have it."""

    def script(asked: Asked) -> Answer:
        if asked.headers.get("if-none-match") == etag:
            return Answer(status=304, headers={"ETag": etag})
        return Answer(body=body, headers={"ETag": etag, "Last-Modified": "Fri, 28 Feb 2025 10:00:00 GMT"})

    return script


def endless(write: Callable[[bytes], None]) -> None:
    """A body without an end."""
    while True:
        write(b"x" * 65_536)


def trickle(write: Callable[[bytes], None]) -> None:
    """A body that comes a byte at a time."""
    for _ in range(2_000):
        write(b"{")
        time.sleep(0.02)


def hub(
    repository: str, files: Mapping[str, bytes], *, commit: str = COMMIT, sha256: Mapping[str, str] | None = None
) -> Script:
    """The part of the hub's API that names a commit and its files, and hands them out."""
    listed = [
        {
            "rfilename": name,
            "size": len(content),
            "lfs": {"size": len(content), "sha256": (sha256 or {}).get(name) or hashlib.sha256(content).hexdigest(), "pointerSize": 130},
        }
        for name, content in files.items()
    ]  # fmt: skip
    about = {"id": repository, "sha": commit, "siblings": listed, "cardData": {"license": "cc-by-4.0"}, "tags": []}

    def script(asked: Asked) -> Answer:
        path = asked.path.partition("?")[0]
        if path in (
            f"/api/datasets/{repository}",
            *(f"/api/datasets/{repository}/revision/{name}" for name in ("main", commit)),
        ):
            return Answer(body=json.dumps(about).encode(), headers={"Content-Type": "application/json"})
        if path.startswith(f"/api/datasets/{repository}/revision/"):
            return Answer(404, b"{}", {"X-Error-Code": "RevisionNotFound", "Content-Type": "application/json"})
        for name, content in files.items():
            if path == f"/datasets/{repository}/resolve/{commit}/{name}":
                return with_etag(content, f'"{hashlib.sha256(content).hexdigest()}"')(asked)
        return Answer(404, b"{}", {"X-Error-Code": "RepoNotFound", "Content-Type": "application/json"})

    return script
