"""Servers on this machine: a package index, which may ask for a password or pose as another host,
and one that hangs up on everybody.
"""

from __future__ import annotations

import base64
import datetime
import http.server
import socketserver
import ssl
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec


class Server(http.server.ThreadingHTTPServer):
    """Serves `pages` on loopback; `certificate` lets it pose as any host behind a proxy."""

    daemon_threads = True

    def __init__(self, pages: Mapping[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.pages = pages
        self.password = ""
        self.certificate: ssl.SSLContext | None = None
        self.asked: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Answer(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        expected = f"Basic {base64.b64encode(self.server.password.encode()).decode()}"
        page = self.server.pages.get(self.path)
        if self.server.password and self.headers.get("Authorization") != expected:
            self.send_error(401)
        elif page is None:
            self.send_error(404)
        else:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            self.wfile.write(page)

    def do_CONNECT(self) -> None:
        """Be the proxy and, within the tunnel, the host that was asked for."""
        self.server.asked.append(self.path)
        if self.server.certificate is None:
            self.send_error(403)
            return
        self.send_response(200)
        self.end_headers()
        self.connection = self.server.certificate.wrap_socket(self.connection, server_side=True)
        self.rfile = self.connection.makefile("rb")
        self.wfile = self.connection.makefile("wb", buffering=0)
        self.close_connection = False


@contextmanager
def serving(pages: Mapping[str, bytes]) -> Iterator[Server]:
    """Serve `pages` for as long as this is entered."""
    with Server(pages) as server:
        # How often it looks whether it is to end.
        thread = threading.Thread(target=server.serve_forever, args=[0.02], daemon=True)
        thread.start()
        yield server
        server.shutdown()


def link(target: str) -> bytes:
    """Return a page that refers to one file."""
    return f"<!DOCTYPE html><html><body><a href='{target}'>a file</a></body></html>".encode()


def pose_as(host: str, server: Server, folder: Path) -> Path:
    """Give `server` a certificate for `host`; return the CA bundle that trusts it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, host)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    bundle, private = folder / "ca.pem", folder / "key.pem"
    bundle.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    server.certificate = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.certificate.load_cert_chain(bundle, private)
    return bundle


class HangsUp(socketserver.ThreadingTCPServer):
    """Ends every connection as it comes, and counts them."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), socketserver.BaseRequestHandler)
        self.connections = 0
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections += 1
        self.shutdown_request(request)


@contextmanager
def hanging_up() -> Iterator[HangsUp]:
    """Hang up on everybody for as long as this is entered."""
    with HangsUp() as server:
        threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
        yield server
        server.shutdown()
