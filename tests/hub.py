"""A loopback stand-in for the Hugging Face hub, named by HF_ENDPOINT: a few small repositories.

    with Hub() as hub:
        hub.add("models", "owner/name", REVISION, {"config.json": b"..."})
        subprocess.run(..., env=os.environ | {"HF_ENDPOINT": hub.url})

It speaks what huggingface_hub and datasets ask for: the API's info and tree of a repository, and
HEAD and GET of its files, with ranges. One revision of each repository exists.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import unquote, urlsplit

API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+)(?:/(.*))?)?")
FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass
class Hub(ThreadingHTTPServer):
    """The server; `asked` holds each request as 'METHOD /path', in order."""

    repositories: dict[tuple[str, str], tuple[str, dict[str, bytes]]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    refusal: int = 0
    """Answer every request with this status, when it is not 0."""
    cuts: dict[str, int] = field(default_factory=dict)
    """Drop the connection half-way through these files, so many times."""

    def __post_init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Request)
        self.daemon_threads = True

    def add(self, kind: str, name: str, revision: str, files: dict[str, bytes]) -> None:
        """Serve a repository; `kind` is 'models' or 'datasets'."""
        self.repositories[kind, name] = (revision, files)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: clients that leave in the middle are part of the tests."""


class _Request(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(f"{self.command} {path}")
        if self.server.refusal:
            return self.answer(self.server.refusal, b"")
        if found := API.fullmatch(path):
            kind, name, what, revision, below = found.groups()
        elif found := FILE.fullmatch(path):
            kind, name, revision, below = found.groups()
            kind, what = "datasets" if kind else "models", "file"
        else:
            return self.answer(404, b"")
        known, files = self.server.repositories.get((kind, name), ("", {}))
        if not known:
            return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        if revision and revision != known:
            return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if what == "file":
            return self.file(below, known, files)
        if what == "tree":
            recursive = "recursive=true" in urlsplit(self.path).query.lower()
            return self.json(_tree(files, f"{below}/" if below else "", recursive=recursive))
        siblings = [{"rfilename": path} for path in files]
        return self.json({"id": name, "sha": known, "siblings": siblings, "private": False})

    do_HEAD = do_GET

    def file(self, path: str, revision: str, files: dict[str, bytes]) -> None:
        if path not in files:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        content = files[path]
        headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Repo-Commit": revision,
            "Accept-Ranges": "bytes",
        }
        start = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if start is None:
            return self.answer(200, content, headers, path)
        first = int(start[1])
        headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        return self.answer(206, content[first:], headers, path)

    def json(self, content: object) -> None:
        self.answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def answer(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, path: str = ""
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.server.cuts.get(path, 0) > 0:
            self.server.cuts[path] -= 1
            body, self.close_connection = body[: len(body) // 2], True
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def _tree(files: dict[str, bytes], prefix: str, *, recursive: bool) -> list[dict[str, object]]:
    entries: dict[str, dict[str, object]] = {}
    for path, content in files.items():
        if path.startswith(prefix):
            child, slash, _ = path.removeprefix(prefix).partition("/")
            oid = hashlib.sha1(content).hexdigest()
            if slash and not recursive:
                entries[child] = {"type": "directory", "path": prefix + child, "oid": oid}
            else:
                size = len(content)
                entries[path] = {"type": "file", "path": path, "size": size, "oid": oid}
    return list(entries.values())
