"""The words of a sign-in (RFC 4252, 4256), asked and answered in the thread that calls.

Paramiko's own asks its questions in the thread that reads the socket, where Ctrl+C never comes,
cannot ask whether a key would do before it is unlocked, and may miss an answer that comes at once.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from paramiko.common import (
    MSG_SERVICE_ACCEPT,
    MSG_USERAUTH_BANNER,
    MSG_USERAUTH_FAILURE,
    MSG_USERAUTH_INFO_REQUEST,
    MSG_USERAUTH_SUCCESS,
    cMSG_SERVICE_REQUEST,
    cMSG_USERAUTH_INFO_RESPONSE,
    cMSG_USERAUTH_REQUEST,
)
from paramiko.message import Message

from cluster.login.link import BROKEN, Link
from cluster.login.private_key import string

# A push code is answered on a telephone that has to be found first.
PATIENCE_S = 600
SERVICE = b"ssh-connection"
LAST_WORDS_S = 1
MOST_QUESTIONS = 64
ENDED = "the connection ended"


class SignInLost(Exception):
    """The connection ended, or was silent for too long, in the middle of the sign-in."""


class PasswordExpired(Exception):
    """The server wants a new password."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What the server says of an attempt."""

    is_success: bool = False
    is_partial: bool = False
    """It was right, and another method has to follow."""
    methods: tuple[str, ...] = ()
    """Those that can go on."""
    is_key_welcome: bool = False
    """The key that was shown would do."""


@dataclass(frozen=True, kw_only=True)
class Round:
    """A question, or several at once, of keyboard-interactive."""

    name: str
    instruction: str
    questions: tuple[tuple[str, bool], ...]
    """Each with whether the answer may be shown."""


class Dialogue:
    """A sign-in; takes the place of Paramiko's AuthHandler in a link."""

    def __init__(self, link: Link, user: str, on_banner: Callable[[str], None]) -> None:
        self._link = link
        self._user = user.encode(errors="surrogateescape")
        self._on_banner = on_banner
        self._heard: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        self._authenticated = False
        kinds = (
            MSG_SERVICE_ACCEPT,
            MSG_USERAUTH_SUCCESS,
            MSG_USERAUTH_FAILURE,
            MSG_USERAUTH_BANNER,
            # Also the number of "that key would do" and of "give me a new password".
            MSG_USERAUTH_INFO_REQUEST,
        )
        self._handler_table = {kind: self._listener(kind) for kind in kinds}
        self.banner: bytes | None = None
        link.auth_handler = self

    # ---- what Paramiko's transport calls, in its own thread ----

    def is_authenticated(self) -> bool:
        """Return whether the server has let us in."""
        return self._authenticated

    def get_username(self) -> str:
        """Return who signs in."""
        return self._user.decode(errors="replace")

    def abort(self) -> None:
        """Note that the connection has ended."""
        self._heard.put((0, None))

    def _listener(self, kind: int) -> Callable[[Any], None]:
        def listen(message: Any) -> None:
            if kind == MSG_USERAUTH_SUCCESS:
                # Here, as the next packet may come compressed already.
                self._authenticated = True
                self._link._auth_trigger()
            self._heard.put((kind, message))

        return listen

    # ---- what the sign-in calls ----

    def begin(self) -> Reply:
        """Ask for the service; return which methods may be used."""
        message = Message()
        message.add_byte(cMSG_SERVICE_REQUEST)
        message.add_string("ssh-userauth")
        self._send(message)
        kind, _ = self._hear()
        if kind != MSG_SERVICE_ACCEPT:
            raise SignInLost("the server does not speak of a sign-in")
        self._request(b"none")
        return self._verdict()

    def show_key(self, algorithm: str, blob: bytes) -> Reply:
        """Ask whether the server would accept a key."""
        self._request(b"publickey", b"\0" + string(algorithm.encode()) + string(blob))
        return self._verdict(lambda message: Reply(is_key_welcome=True))

    def prove_key(self, algorithm: str, blob: bytes, sign: Callable[[bytes], bytes]) -> Reply:
        """Sign in by a key."""
        body = b"\1" + string(algorithm.encode()) + string(blob)
        head = bytes([cMSG_USERAUTH_REQUEST[0]]) + string(self._user) + string(SERVICE)
        signed = sign(string(self._link.session_id) + head + string(b"publickey") + body)
        self._request(b"publickey", body + string(signed))
        return self._verdict()

    def give_password(self, password: str) -> Reply:
        """Sign in by a password.

        Raises:
            PasswordExpired: it was right, and is too old.
        """

        def expired(message: Any) -> Reply:
            raise PasswordExpired

        secret = password.encode(errors="surrogateescape")
        self._request(b"password", b"\0" + string(secret))
        return self._verdict(expired)

    def converse(self, answer: Callable[[Round], list[str]]) -> Reply:
        """Sign in by keyboard-interactive, through as many rounds as the server wants."""

        def reply(message: Any) -> None:
            answers = answer(_round(message))
            response = Message()
            response.add_byte(cMSG_USERAUTH_INFO_RESPONSE)
            response.add_int(len(answers))
            for text in answers:
                response.add_string(text.encode(errors="surrogateescape"))
            self._send(response)

        self._request(b"keyboard-interactive", string(b"") + string(b""))
        return self._verdict(reply)

    def _request(self, method: bytes, body: bytes = b"") -> None:
        message = Message()
        message.add_byte(cMSG_USERAUTH_REQUEST)
        for part in (self._user, SERVICE, method):
            message.add_string(part)
        message.add_bytes(body)
        self._send(message)

    def _send(self, message: Message) -> None:
        try:
            self._link._send_user_message(message)
        except BROKEN:
            # The thread that reads may still be at the server's last words.
            self._link.join(LAST_WORDS_S)
            raise SignInLost(ENDED) from None

    def _verdict(self, on_question: Callable[[Any], Reply | None] | None = None) -> Reply:
        """Return what the server makes of a request; `on_question` may end it or go on (None)."""
        while True:
            kind, message = self._hear()
            if kind == MSG_USERAUTH_SUCCESS:
                return Reply(is_success=True)
            if kind == MSG_USERAUTH_FAILURE:
                names = message.get_string().decode(errors="replace")
                is_partial = message.get_boolean()
                methods = tuple(name for name in names.split(",") if name)
                return Reply(methods=methods, is_partial=is_partial)
            if kind != MSG_USERAUTH_INFO_REQUEST or on_question is None:
                raise SignInLost("the server answers what it was not asked")
            if (reply := on_question(message)) is not None:
                return reply

    def _hear(self) -> tuple[int, Any]:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                # In short turns: a transport that is closed from here leaves no last word.
                kind, message = self._heard.get(timeout=1)
            except queue.Empty:
                if not self._link.is_active():
                    raise SignInLost(ENDED) from None
                if time.monotonic() > deadline:
                    raise SignInLost(f"no answer for {PATIENCE_S} s") from None
                continue
            if kind == 0:
                raise SignInLost(ENDED)
            if kind != MSG_USERAUTH_BANNER:
                return kind, message
            self._on_banner(message.get_string().decode(errors="replace"))


def _round(message: Any) -> Round:
    name = message.get_string().decode(errors="replace")
    instruction = message.get_string().decode(errors="replace")
    message.get_string()
    count = message.get_int()
    if count > MOST_QUESTIONS:
        raise SignInLost(f"the server asks {count} questions at once")
    questions = []
    for _ in range(count):
        text = message.get_string().decode(errors="replace")
        questions.append((text, message.get_boolean()))
    return Round(name=name, instruction=instruction, questions=tuple(questions))
