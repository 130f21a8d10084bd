"""An SSH server of Paramiko's that asks what it is told to, as one-time codes and pushes do."""

from __future__ import annotations

import socket
import threading
from dataclasses import dataclass, field
from pathlib import Path

import paramiko

HOST_KEY = paramiko.ECDSAKey.generate()


@dataclass
class Questioner(paramiko.ServerInterface):
    """Lets in who answers all rounds of keyboard-interactive."""

    rounds: list[tuple[str, list[tuple[str, bool, str]]]]
    """Each with its instruction, and its questions: the words, whether the answer may be seen,
    the answer."""
    port: int = 0
    given: list[list[str]] = field(default_factory=list)
    _round: int = 0

    def __post_init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self._transports: list[paramiko.Transport] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            transport = paramiko.Transport(connection)
            transport.add_server_key(HOST_KEY)
            self._transports.append(transport)
            transport.start_server(threading.Event(), self)

    def stop(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for transport in self._transports:
            transport.close()

    def write_config(self, folder: Path, *lines: str) -> Path:
        """Write an ssh_config in which it is the host `questioner`, and is known."""
        known = folder / "known_hosts"
        known.write_text(f"[127.0.0.1]:{self.port} {HOST_KEY.get_name()} {HOST_KEY.get_base64()}\n")
        text = ["Host questioner", *lines, "HostName 127.0.0.1", f"Port {self.port}", "User me"]
        text += [f"UserKnownHostsFile {known}", "GlobalKnownHostsFile none", "IdentityFile none"]
        text += ["IdentityAgent none"]
        path = folder / "ssh_config"
        path.write_text("\n  ".join(text) + "\n")
        return path

    # ---- what Paramiko calls ----

    def get_allowed_auths(self, username: str) -> str:
        return "keyboard-interactive"

    def check_auth_interactive(self, username: str, submethods: str) -> object:
        self._round = 0
        return self._query()

    def check_auth_interactive_response(self, responses: list[str]) -> object:
        self.given.append(responses)
        _, questions = self.rounds[self._round]
        if responses != [answer for _, _, answer in questions]:
            return paramiko.AUTH_FAILED
        self._round += 1
        return paramiko.AUTH_SUCCESSFUL if self._round == len(self.rounds) else self._query()

    def _query(self) -> paramiko.InteractiveQuery:
        instruction, questions = self.rounds[self._round]
        prompts = [(words, is_shown) for words, is_shown, _ in questions]
        return paramiko.InteractiveQuery("", instruction, *prompts)
