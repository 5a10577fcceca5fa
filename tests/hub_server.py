"""A Hugging Face hub on loopback: as much of its protocol as ``datasets`` uses to load a dataset at a commit."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Files = Mapping[str, bytes]
"""Path in the repository to content."""


@contextlib.contextmanager
def serve_hub(datasets: Mapping[tuple[str, str], Files]) -> Iterator[str]:
    """Serve datasets by (id, commit); yields the address for ``HF_ENDPOINT``."""

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            self.reply(*(answer(path, datasets) or not_found(path, datasets)))

        def do_HEAD(self) -> None:
            self.do_GET()

        def reply(self, content: bytes, headers: Mapping[str, str], status: int) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


Answer = tuple[bytes, dict[str, str], int]


def answer(path: str, datasets: Mapping[tuple[str, str], Files]) -> Answer | None:
    for (name, commit), files in datasets.items():
        resolve, tree = f"/datasets/{name}/resolve/{commit}/", f"/api/datasets/{name}/tree/{commit}"
        if path.startswith(resolve) and path.removeprefix(resolve) in files:
            content = files[path.removeprefix(resolve)]
            return content, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}, 200
        if path.startswith(resolve):
            return b"{}", {"X-Error-Code": "EntryNotFound"}, 404
        if path == f"/api/datasets/{name}/revision/{commit}":
            described = {"id": name, "sha": commit, "tags": [], "siblings": [{"rfilename": file} for file in files]}
            return json.dumps(described).encode(), {}, 200
        if path.startswith(tree):
            return json.dumps(listing(files, path.removeprefix(tree))).encode(), {}, 200
    return None


def not_found(path: str, datasets: Mapping[tuple[str, str], Files]) -> Answer:
    known = any(f"datasets/{name}/" in path for name, _ in datasets)
    return b"{}", {"X-Error-Code": "RevisionNotFound" if known else "RepoNotFound"}, 404


def listing(files: Files, folder: str) -> list[dict[str, object]]:
    """What lies directly in a folder."""
    prefix = f"{folder.strip('/')}/" if folder.strip("/") else ""
    inside = {path.removeprefix(prefix): content for path, content in files.items() if path.startswith(prefix)}
    folders = {path.partition("/")[0] for path in inside if "/" in path}
    return [
        *({"type": "directory", "oid": "d" * 40, "size": 0, "path": f"{prefix}{name}"} for name in sorted(folders)),
        *(
            {"type": "file", "oid": hashlib.sha1(content).hexdigest(), "size": len(content), "path": f"{prefix}{path}"}
            for path, content in inside.items()
            if "/" not in path
        ),
    ]
