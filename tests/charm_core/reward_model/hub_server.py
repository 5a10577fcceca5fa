"""A hub on loopback that speaks as much of the protocol as huggingface_hub needs to read public models."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """Models by id, each a folder, all at one commit; and how many bytes of each file were served."""

    models: dict[str, Path]
    url: str = ""
    gated: set[str] = field(default_factory=set)
    served: dict[str, int] = field(default_factory=dict)

    def environment(self, cache: Path) -> dict[str, str]:
        """Settings with which huggingface_hub asks this hub."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(cache),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }


class _Server(ThreadingHTTPServer):
    def __init__(self, hub: Hub) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        if found := re.fullmatch(r"/api/models/(.+?)/(revision|tree)/([^/]+)/?", path):
            self._about(found[1], found[2], found[3])
        elif found := re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path):
            self._file(found[1], found[2], found[3], body=body)
        else:
            self._send(404, {}, b"")

    def _about(self, model: str, what: str, revision: str) -> None:
        hub = self.server.hub
        if model not in hub.models:
            self._send(404, {"X-Error-Code": "RepoNotFound"}, b"{}")
        elif model in hub.gated:
            self._send(403, {"X-Error-Code": "GatedRepo"}, b"{}")
        elif revision not in (COMMIT, "main"):
            self._send(404, {"X-Error-Code": "RevisionNotFound"}, b"{}")
        else:
            files = [(path.name, path.stat().st_size) for path in sorted(hub.models[model].iterdir())]
            about: Any = {"id": model, "sha": COMMIT, "siblings": [{"rfilename": name} for name, _ in files]}
            tree = [{"type": "file", "path": name, "size": size, "oid": "0" * 40} for name, size in files]
            answer = json.dumps(about if what == "revision" else tree).encode()
            self._send(200, {"Content-Type": "application/json", "X-Repo-Commit": COMMIT}, answer)

    def _file(self, model: str, revision: str, name: str, *, body: bool) -> None:
        hub = self.server.hub
        file = hub.models.get(model, Path("/nowhere")) / name
        if not file.is_file() or revision not in (COMMIT, "main"):
            self._send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b"")
            return
        content = file.read_bytes()
        headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        status = 200
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(wanted[1]), min(int(wanted[2] or len(content) - 1), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            status, content = 206, content[first : last + 1]
        self._send(status, headers, content, body=body)
        if body:
            hub.served[name] = hub.served.get(name, 0) + len(content)

    def _send(self, status: int, headers: dict[str, str], content: bytes, *, body: bool = True) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Be quiet."""


@contextmanager
def serve(models: dict[str, Path]) -> Iterator[Hub]:
    """Run a hub while the block lasts."""
    hub = Hub(models=models)
    server = _Server(hub)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
