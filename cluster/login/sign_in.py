"""Who we are, proven in the ways that the server takes, in the order that the user prefers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from cluster.login.agent import Binding
from cluster.login.config import OPENSSH, Host
from cluster.login.dialogue import Dialogue, PasswordExpired, Reply, Round, SignInLost
from cluster.login.keys import Candidate, Keys, KeyUnusable
from cluster.login.link import CERTIFICATE, Link
from cluster.login.prompts import Prompts, printable_line
from runfolder.errors import UserError, printable

RSA = ("rsa-sha2-512", "rsa-sha2-256")
TRY_AGAIN = "Permission denied, please try again."


def sign_in(link: Link, host: Host, prompts: Prompts, say: Callable[[str], None]) -> None:
    """Sign in to a server whose host key was checked.

    Raises:
        UserError: it lets us in by no method; the connection is useless then.
    """
    keys = Keys(host=host, prompts=prompts, binding=Binding.of(link))
    try:
        _SignIn(link, host, prompts, say, keys).run()
    except SignInLost as error:
        raise _lost(link, host, error) from None
    finally:
        keys.close()


class _SignIn:
    def __init__(
        self,
        link: Link,
        host: Host,
        prompts: Prompts,
        say: Callable[[str], None],
        keys: Keys,
    ) -> None:
        self._link = link
        self._host = host
        self._prompts = prompts
        self._say = say
        self._keys = keys
        self._dialogue = Dialogue(link, host.user, lambda text: say(lines(text)))
        # Asked for nothing, nobody can give a password or a code.
        self._order = ("publickey",) if host.batch_mode else host.methods
        self._tried: list[str] = []
        self._start_over()

    def _start_over(self) -> None:
        """Take all methods for usable, as after a first factor."""
        self._candidates: Iterator[Candidate] = self._keys.candidates()
        self._tries_left = {
            "publickey": 1,
            "password": self._host.number_of_password_prompts,
            "keyboard-interactive": self._host.number_of_password_prompts,
        }

    def run(self) -> None:
        reply = self._dialogue.begin()
        attempts: dict[str, Callable[[], Reply | None]] = {
            "publickey": self._by_key,
            "password": self._by_password,
            "keyboard-interactive": self._by_conversation,
        }
        while not reply.is_success:
            usable = (
                method
                for method in self._order
                if method in reply.methods and self._tries_left.get(method)
            )
            method = next(usable, None)
            if method is None:
                raise self._refused(reply)
            answer = attempts[method]()
            if answer is None:
                continue
            reply = answer
            if reply.is_partial:
                self._start_over()

    # ---- the methods; None: there was nothing to ask the server ----

    def _by_key(self) -> Reply | None:
        candidate = next(self._candidates, None)
        if candidate is None:
            self._tries_left["publickey"] = 0
            return None
        algorithm = self._algorithm(candidate)
        if not algorithm:
            return None
        self._tried.append(candidate.name)
        reply = self._dialogue.show_key(algorithm, candidate.blob)
        if not reply.is_key_welcome:
            return reply
        try:
            return self._dialogue.prove_key(
                algorithm, candidate.blob, lambda data: candidate.signer.sign(data, algorithm)
            )
        except KeyUnusable as error:
            self._say(f"note: {printable(str(error))}")
            return None

    def _by_password(self) -> Reply:
        self._note_try("password")
        question = f"Password of {self._host.user}@{self._host.hostname}: "
        try:
            reply = self._dialogue.give_password(self._prompts.secret(question))
        except PasswordExpired:
            raise UserError(
                f"{self._host.alias}: the password of {self._host.user} has expired; change it: "
                f"ssh {self._host.user}@{self._host.hostname}"
            ) from None
        return self._told(reply, "password")

    def _by_conversation(self) -> Reply:
        self._note_try("keyboard-interactive")
        was_asked = False

        def answer(round_: Round) -> list[str]:
            nonlocal was_asked
            for text in (round_.name, round_.instruction):
                if text.strip():
                    self._say(lines(text))
            answers = []
            for question, is_shown in round_.questions:
                was_asked = True
                # As ssh does, so that it is known who asks; and on each line, as the last of them
                # could look like a question of ours.
                name = f"({self._host.user}@{self._host.hostname})"
                asked = re.split(r"\r\n|\r|\n", question)
                whole = "\n".join(f"{name} {line}" for line in asked)
                ask = self._prompts.ask if is_shown else self._prompts.secret
                answers.append(ask(whole))
            return answers

        reply = self._dialogue.converse(answer)
        if not was_asked:
            self._tries_left["keyboard-interactive"] = 0
            return reply
        return self._told(reply, "keyboard-interactive")

    def _note_try(self, method: str) -> None:
        self._tries_left[method] -= 1
        if method not in self._tried:
            self._tried.append(method)

    def _told(self, reply: Reply, method: str) -> Reply:
        is_over = reply.is_success or reply.is_partial
        if not is_over and method in reply.methods and self._tries_left[method]:
            self._say(TRY_AGAIN)
        return reply

    def _algorithm(self, candidate: Candidate) -> str:
        """Return how a key signs; empty if that is not allowed."""
        kind = candidate.kind
        allowed = self._host.algorithms.get("pubkeyacceptedalgorithms")
        names = [kind]
        if kind.removesuffix(CERTIFICATE) == "ssh-rsa":
            # With SHA-1 it signs nothing any more.
            tail = CERTIFICATE if kind.endswith(CERTIFICATE) else ""
            told = self._link.server_extensions.get("server-sig-algs", b"").decode(errors="replace")
            taken = [name for name in RSA if not told or name in told.split(",")]
            names = [f"{name}{tail}" for name in taken]
            if not names:
                self._keys.problems.append(
                    f"{candidate.name}: the server takes RSA with SHA-1 only"
                )
        names = [name for name in names if allowed is None or name in allowed]
        return names[0] if names else ""

    def _refused(self, reply: Reply) -> UserError:
        host = self._host
        takes = ", ".join(printable(name) for name in reply.methods) or "nothing"
        tried = ", ".join(self._tried) or "nothing was there to try"
        said = [
            f"{host.alias}: {host.user} was not let in; the server takes {takes}, tried: {tried}"
        ]
        said += self._keys.problems
        if host.lacking and {"gssapi-with-mic", "hostbased"} & set(reply.methods):
            said.append(f"for {' or '.join(host.lacking)} {OPENSSH}")
        return UserError(printable("; ".join(said)))


def _lost(link: Link, host: Host, error: SignInLost) -> UserError:
    words = printable(link.last_words)
    hint = ""
    if "too many authentication failures" in words.lower():
        hint = "; name the one key: IdentityFile and IdentitiesOnly yes in ssh_config"
    return UserError(f"{host.alias}: the sign-in was broken off: {words or error}{hint}")


def lines(text: str) -> str:
    """Return a server's words with its lines, and nothing that could steer the terminal."""
    return "\n".join(printable_line(line) for line in text.rstrip("\r\n").splitlines())
