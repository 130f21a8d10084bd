"""containers/registry.py: a tag becomes a digest, against registries on this machine."""

from __future__ import annotations

import http.server
import json
import os
import sys
import threading
from collections.abc import Iterator

import pytest

from containers import registry as registries
from containers.registry import Unreachable, resolve
from tests import waiting
from tests.shared import CHECKOUT, free_port

DIGEST = "sha256:" + "ab" * 32


class Registry(http.server.BaseHTTPRequestHandler):
    """Wants a token for `owner/image`, has it under the tag 12, and refuses all else."""

    def do_HEAD(self) -> None:
        if self.path != "/v2/owner/image/manifests/12" and self.path != "/v2/":
            self.send_error(404)
        elif self.path == "/v2/" or self.headers["Authorization"] != "Bearer let me":
            self.send_response(401)
            realm = f"http://127.0.0.1:{self.server.server_port}/token"
            self.send_header("WWW-Authenticate", f'Bearer realm="{realm}",service="s",scope="pull"')
            self.end_headers()
        else:
            self.send_response(200)
            self.send_header("Docker-Content-Digest", DIGEST)
            self.end_headers()

    def do_GET(self) -> None:
        asked = self.path == "/token?service=s&scope=pull"
        self.send_response(200 if asked else 403)
        self.end_headers()
        self.wfile.write(json.dumps({"token": "let me"}).encode() if asked else b"")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registries, "TIMEOUT_S", waiting.HANGS_AFTER_S)


@pytest.fixture(scope="module")
def registry() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Registry) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_tag_becomes_a_digest_with_the_token_that_is_asked_for(registry: str) -> None:
    assert resolve(f"{registry}/owner/image:12") == f"{registry}/owner/image@{DIGEST}"


def test_a_digest_stays_and_needs_no_token(registry: str) -> None:
    reference = f"{registry}/owner/private@{DIGEST}"
    assert resolve(reference) == reference


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("{registry}/owner/image:13", "404"),
        ("{registry}/Owner image", "is not a name"),
        ("127.0.0.1:{closed}/owner/image:12", "cannot be reached"),
        ("127.0.0.1:port/owner/image:12", "is not a name"),
    ],
)
def test_what_cannot_be_had_is_said(registry: str, reference: str, says: str) -> None:
    with pytest.raises(Unreachable, match=says):
        resolve(reference.format(registry=registry, closed=free_port()))


@pytest.mark.parametrize(("tag", "code"), [("12", 0), ("13", 1)])
def test_the_command_prints_the_reference_or_one_line(registry: str, tag: str, code: int) -> None:
    words = [sys.executable, "-I", "containers/registry.py", f"{registry}/owner/image:{tag}"]
    done = waiting.run(words, cwd=CHECKOUT, env=os.environ)
    assert done.returncode == code
    assert done.stdout == ("" if code else f"{registry}/owner/image@{DIGEST}\n")
    assert len(done.stderr.splitlines()) == code
