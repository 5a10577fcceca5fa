"""A Hugging Face hub on loopback that takes pushes: as much of its protocol as ``HfApi.upload_folder`` uses."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_secret"


@dataclass
class Hub:
    """What the hub has, and what it was asked."""

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    uploads: dict[str, bytes] = field(default_factory=dict)
    address: str = ""
    refused_uploads: int = 0
    """Status that uploads of files get, or 0 to take them."""


@contextlib.contextmanager
def serve_push_hub() -> Iterator[Hub]:
    """Serve an empty hub that lets ``TOKEN`` write."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.handle_with(b"")

        def do_POST(self) -> None:
            self.handle_with(self.body())

        def do_PUT(self) -> None:
            self.do_POST()

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def handle_with(self, content: bytes) -> None:
            path = self.path.partition("?")[0]
            hub.requests.append(f"{self.command} {path}")
            allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}" or path.startswith("/upload/")
            status, answer = respond(hub, path, content) if allowed else (401, {"error": "Invalid credentials"})
            encoded = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(encoded)))
            self.end_headers()
            self.wfile.write(encoded)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def respond(hub: Hub, path: str, content: bytes) -> tuple[int, object]:
    if path == "/api/repos/create":
        return create(hub, json.loads(content))
    if path == "/api/validate-yaml":
        return 200, {"errors": [], "warnings": []}
    if path.startswith("/upload/") and hub.refused_uploads:
        return hub.refused_uploads, {"error": "no"}
    if path.startswith("/upload/"):
        hub.uploads[path.removeprefix("/upload/")] = content
        return 200, {}
    if found := re.fullmatch(r"/(.+/.+)\.git/info/lfs/objects/batch", path):
        objects = json.loads(content)["objects"]
        actions = [{**one, "actions": {"upload": {"href": f"{hub.address}/upload/{one['oid']}"}}} for one in objects]
        return 200, {"transfer": "basic", "objects": actions}
    found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(\w+)/(.*))?", path)
    if found is None or found[1] not in hub.repositories:
        return 404, {"error": "Repository not found"}
    return in_repository(hub, found[1], found[2] or "", content)


def create(hub: Hub, asked: dict[str, str]) -> tuple[int, object]:
    name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
    status = 409 if name in hub.repositories else 200
    hub.repositories.setdefault(name, {})
    hub.private.setdefault(name, asked.get("visibility") == "private" or bool(asked.get("private")))
    return status, {"url": f"{hub.address}/{name}"}


def in_repository(hub: Hub, name: str, what: str, content: bytes) -> tuple[int, object]:
    files = hub.repositories[name]
    if what == "preupload":
        asked = json.loads(content)["files"]
        modes = [
            {
                "path": one["path"],
                "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for one in asked
        ]
        return 200, {"files": modes}
    if what == "tree":
        return 200, [
            {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for path, data in files.items()
        ]
    if what == "branch":
        return 200, {}
    if what == "commit":
        for line in content.splitlines():
            commit(hub, files, json.loads(line))
        return 200, {"commitUrl": f"{hub.address}/{name}/commit/{'c' * 40}", "commitOid": "c" * 40, "success": True}
    return 200, {"id": name, "sha": "c" * 40, "private": hub.private[name], "tags": [], "siblings": []}


def commit(hub: Hub, files: dict[str, bytes], line: dict[str, dict[str, str]]) -> None:
    value = line["value"]
    match line["key"]:
        case "header":
            hub.commits.append(value["summary"])
        case "file":
            files[value["path"]] = base64.b64decode(value["content"])
        case "lfsFile":
            files[value["path"]] = hub.uploads[value["oid"]]
        case "deletedFile":
            del files[value["path"]]
