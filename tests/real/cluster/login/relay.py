"""A network between client and server that a test can cut: a port on loopback."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from pathlib import Path

from tests.real.cluster.login.server import Server


class Relay:
    """Passes on what comes to `port`, until it is cut; a context manager that ends it."""

    def __init__(self, target: int, *, is_narrow: bool = False) -> None:
        """Listen for connections to `target`; if it is narrow, little is taken ahead."""
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        if is_narrow:
            # With the packets of a real network; with those of loopback the kernel takes megabytes.
            self._listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1400)
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.port: int = self._listener.getsockname()[1]
        self._ends: list[socket.socket] = []
        self._is_reset = False
        self._lock = threading.Lock()
        self._passes = threading.Event()
        self._passes.set()
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *_: object) -> None:
        self.reset()
        self._passes.set()

    def config(self, server: Server, *lines: str) -> Path:
        """Return an ssh_config in which the way to the host `server` is this."""
        text = server.config.read_text().replace(f"Port {server.port}", f"Port {self.port}")
        known = server.known_hosts.read_text().split(maxsplit=1)[1]
        key = server.folder / f"known_hosts-{self.port}"
        key.write_text(f"[127.0.0.1]:{self.port} {known}")
        text = text.replace(str(server.known_hosts), str(key))
        path = server.folder / f"ssh_config-{self.port}"
        path.write_text("\n  ".join([text.rstrip(), *lines]) + "\n")
        return path

    def cut(self) -> None:
        """Let nothing through any more, and say so to nobody."""
        self._passes.clear()

    def reset(self) -> None:
        """End all connections at once, as a firewall does."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            self._is_reset = True
            for end in self._ends:
                with contextlib.suppress(OSError):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    end.shutdown(socket.SHUT_RD)
                end.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._target))
                with self._lock:
                    self._ends += [client, server]
                    is_late = self._is_reset
                if is_late:
                    self.reset()
                    return
                for source, sink in ((client, server), (server, client)):
                    threading.Thread(target=self._pass, args=(source, sink), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                self._passes.wait()
                sink.sendall(data)
        # Also where the kernel reset it: a server was killed that had yet to read.
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)
