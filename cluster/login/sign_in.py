"""Authentication, by the methods that the server accepts, in the order that the user prefers."""

from __future__ import annotations

import functools
import queue
import re
import threading
from collections.abc import Callable
from typing import Any

import paramiko

from cluster.login.config import Host
from cluster.login.keys import Keys
from cluster.login.link import BROKEN, Link
from cluster.login.prompts import Prompts, printable_line
from cluster.login.transport import OPENSSH
from runfolder.errors import UserError, printable

TRY_AGAIN = "Permission denied, please try again."
# A push notification is answered on a phone that has to be found first.
PATIENCE_S, LAST_WORDS_S = 600.0, 1.0
# Of a password, or of a round of questions, as ssh by default.
TRIES = 3


def sign_in(link: Link, host: Host, prompts: Prompts, say: Callable[[str], None]) -> None:
    """Sign in to a server whose host key was checked, or raise a `UserError`."""
    link.auth_timeout = PATIENCE_S
    _SignIn(link, host, prompts, say).run()


class _SignIn:
    def __init__(
        self, link: Link, host: Host, prompts: Prompts, say: Callable[[str], None]
    ) -> None:
        self._link = link
        self._host = host
        self._prompts = prompts
        self._say = say
        self._keys = Keys(host=host, prompts=prompts)
        # In batch mode nobody is asked for a password or a code.
        self._order = ("publickey",) if host.batch_mode else host.methods
        self._tried: list[str] = []
        self._takes: tuple[str, ...] = ()
        """The methods that can continue, according to the server's last answer."""

    def run(self) -> None:
        self._attempt(lambda: self._link.auth_none(self._host.user))
        by = {
            "publickey": self._by_key,
            "password": self._by_password,
            "keyboard-interactive": self._by_conversation,
        }
        while not self._link.is_authenticated():
            # After each factor all methods may be used again.
            for method in self._order:
                if method in self._takes and by[method]():
                    break
            else:
                raise self._refused()

    def _attempt(self, method: Callable[[], list[str]]) -> bool:
        """Ask the server; return whether it accepted this, even as one factor of several."""
        error: Exception | None = None
        more: list[str] = []
        try:
            more = method()
        except paramiko.BadAuthenticationType as unwanted:
            more, error = unwanted.allowed_types, unwanted
        except paramiko.AuthenticationException as refused:
            error = refused
        except BROKEN as broken:
            raise self._lost(broken) from None
        if banner := self._link.get_banner():
            self._say(lines(banner.decode(errors="replace")))
        if not self._link.is_active():
            raise self._lost(error)
        if more:
            self._takes = tuple(more)
        return error is None

    # ---- the methods; each returns whether the server accepted it ----

    def _by_key(self) -> bool:
        for name, key in self._keys.candidates():
            self._tried += [name] if name not in self._tried else []
            sign = functools.partial(self._link.auth_publickey, self._host.user, key)
            if self._attempt(sign):
                return True
        return False

    def _by_password(self) -> bool:
        question = f"Password of {self._host.user}@{self._host.hostname}: "

        def attempt() -> bool:
            password = self._prompts.secret(question).encode(errors="surrogateescape")
            return self._attempt(
                lambda: self._link.auth_password(self._host.user, password, fallback=False)
            )

        return self._repeated("password", attempt)

    def _by_conversation(self) -> bool:
        return self._repeated("keyboard-interactive", self._converse)

    def _repeated(self, method: str, attempt: Callable[[], bool | None]) -> bool:
        """Try a few times; None from a try: it asked nothing, and would not ask the next time."""
        self._tried += [method] if method not in self._tried else []
        for _ in range(TRIES):
            if (is_content := attempt()) is not False:
                return bool(is_content)
            if method not in self._takes:
                return False
            self._say(TRY_AGAIN)
        return False

    def _converse(self) -> bool | None:
        # Paramiko asks in the thread that reads the connection, where Ctrl+C never arrives: the
        # questions are handed over to this one.
        asked: queue.SimpleQueue[Any] = queue.SimpleQueue()
        answered: queue.SimpleQueue[list[bytes] | None] = queue.SimpleQueue()

        def hand_over(*questions: Any) -> list[bytes]:
            asked.put(questions)
            if (given := answered.get()) is None:
                raise paramiko.SSHException("the question was not answered")
            return given

        def attempt() -> None:
            try:
                asked.put(
                    self._attempt(lambda: self._link.auth_interactive(self._host.user, hand_over))
                )
            except UserError as error:
                asked.put(error)

        threading.Thread(target=attempt, daemon=True).start()
        was_asked = False
        try:
            while isinstance(found := asked.get(), tuple):
                *words, questions = found
                for text in filter(str.strip, words):
                    self._say(lines(text))
                was_asked = was_asked or bool(questions)
                answered.put([self._answer(*question) for question in questions])
        except BaseException:
            answered.put(None)
            raise
        if isinstance(found, UserError):
            raise found
        return True if found else False if was_asked else None

    def _answer(self, question: str, is_shown: bool) -> bytes:
        # As ssh does, to show who asks; and on each line, because the last of them could look like
        # our own question.
        name = f"({self._host.user}@{self._host.hostname})"
        whole = "\n".join(f"{name} {line}" for line in re.split(r"\r\n|\r|\n", question))
        ask = self._prompts.ask if is_shown else self._prompts.secret
        return ask(whole).encode(errors="surrogateescape")

    def _refused(self) -> UserError:
        host = self._host
        takes = ", ".join(self._takes) or "nothing"
        tried = ", ".join(self._tried) or "nothing was available"
        said = [f"{host.alias}: permission denied for {host.user}; the server accepts {takes}"]
        said += [f"tried: {tried}", *self._keys.problems]
        if more := {"gssapi-with-mic", "hostbased"} & set(self._takes):
            said.append(f"for {' or '.join(sorted(more))}, {OPENSSH}")
        return UserError(printable("; ".join(said)))

    def _lost(self, error: Exception | None) -> UserError:
        # The thread that reads may still be reading the server's last message.
        self._link.join(LAST_WORDS_S)
        words, hint = printable(self._link.last_words or "the connection ended"), ""
        if "too many authentication failures" in words.lower():
            hint = "; offer only one key: IdentityFile and IdentitiesOnly yes in ssh_config"
        elif "Illegal info request" in str(error):
            # Instead of an answer to a password: the server wants a new one.
            user = f"{self._host.user}@{self._host.hostname}"
            words = f"the password of {self._host.user} has expired; change it: ssh {user}"
        elif isinstance(error, paramiko.SSHException) and not self._link.last_words:
            words = printable(str(error))
        return UserError(f"{self._host.alias}: the sign-in failed: {words}{hint}")


def lines(text: str) -> str:
    """Return a server's text with its lines, without terminal control characters."""
    return "\n".join(printable_line(line) for line in text.rstrip("\r\n").splitlines())
