"""A user who answers what a test has foreseen, and remembers what was asked and shown."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.login.config import Host, resolve
from cluster.login.connection import Connection, connect
from tests.real.cluster.login.server import Server


@dataclass
class Answers:
    """`Prompts` with answers; each is for a question that has these words in it."""

    expected: list[tuple[str, str]]
    shown: list[str] = field(default_factory=list)
    secret_questions: list[str] = field(default_factory=list)
    open_questions: list[str] = field(default_factory=list)

    def ask(self, question: str) -> str:
        self.open_questions.append(question)
        return self._next(question)

    def secret(self, question: str) -> str:
        self.secret_questions.append(question)
        return self._next(question)

    def say(self, text: str) -> None:
        self.shown.append(text)

    def _next(self, question: str) -> str:
        assert self.expected, f"not foreseen: {question!r}"
        words, answer = self.expected.pop(0)
        assert words in question
        return answer


def answers(*expected: tuple[str, str]) -> Answers:
    """Return a user with these answers, for questions in this order."""
    return Answers(list(expected))


def host_of(server: Server) -> Host:
    """Return the server as its ssh_config has it."""
    return resolve("server", config=str(server.config))


def signed_in(host: Host, user: Answers | None = None) -> Connection:
    """Return a connection to a host; all that the user was to be asked has been."""
    user = user or answers()
    connection = connect(host, prompts=user, say=user.say)
    assert not user.expected, f"not asked: {user.expected}"
    return connection


def output(connection: Connection, command: str) -> str:
    """Return what a command says on the far side, if it succeeds."""
    channel = connection.open_session()
    channel.exec_command(command)
    text = b"".join(iter(lambda: channel.recv(65536), b""))
    assert channel.recv_exit_status() == 0
    return text.decode()
