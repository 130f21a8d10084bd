"""Sign-in against the real sshd: each kind of key, agent, certificate, password, questions."""

from __future__ import annotations

import logging
import re
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.login.config import resolve
from cluster.login.connection import connect
from cluster.login.link import Link
from runfolder.errors import UserError
from tests.real.accounts import IS_ROOT
from tests.real.cluster.login.agent import Agent
from tests.real.cluster.login.answers import answers, host_of, output, signed_in
from tests.real.cluster.login.questioner import Questioner
from tests.real.cluster.login.server import PASSWORD, USER, NewServer, Server, keygen, start

pytestmark = pytest.mark.needs("sshd")
# Only root can give sshd a password that is not in the machine's own /etc/shadow.
by_root = pytest.mark.needs("root")
PAM = """auth required pam_unix.so nodelay
account required pam_permit.so
session required pam_permit.so
"""


KINDS = {
    "ed25519": ("ed25519",),
    "rsa": ("rsa",),
    "ecdsa": ("ecdsa", "", "-b", "256"),
    "ecdsa384": ("ecdsa", "", "-b", "384"),
}
NewKey = Callable[[Path, str], Path]


@pytest.fixture(scope="module")
def new_key(tmp_path_factory: pytest.TempPathFactory) -> NewKey:
    """Return a function that puts a key pair of a kind at a path; those of a kind are the same."""
    folder = tmp_path_factory.mktemp("keys")

    def put(path: Path, kind: str) -> Path:
        if not (folder / kind).exists():
            keygen(folder / kind, *KINDS[kind])
        for suffix in ("", ".pub"):
            shutil.copy(f"{folder / kind}{suffix}", f"{path}{suffix}")
        return path

    return put


@dataclass(frozen=True)
class Authority:
    """One whose certificates a server takes."""

    key: Path
    server: Server

    def certify(self, key: Path, *options: str) -> None:
        """Make a certificate for a key, beside it."""
        sign = ["ssh-keygen", "-q", "-s", self.key, "-I", "test", "-n", USER, *options]
        subprocess.run([*sign, f"{key}.pub"], check=True, capture_output=True)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Authority]:
    folder = tmp_path_factory.mktemp("authority")
    key = keygen(folder / "key")
    server = start(folder / "sshd", f"TrustedUserCAKeys {key}.pub")
    yield Authority(key, server)
    server.stop()


@pytest.fixture(scope="module")
def password_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Return an sshd that lets us in by PASSWORD, too."""
    made = start(tmp_path_factory.mktemp("password"), password=IS_ROOT)
    yield made
    made.stop()


def allow(server: Server, key: Path) -> None:
    with server.authorized_keys.open("a") as stream:
        stream.write(Path(f"{key}.pub").read_text())


def refusal(server: Server, *expected: tuple[str, str]) -> str:
    """Return the one line with which the sign-in ends."""
    user = answers(*expected)
    with pytest.raises(UserError) as caught:
        connect(host_of(server), prompts=user, say=user.say)
    assert not user.expected
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- keys ----


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("ed25519", ()),
        ("rsa", ()),
        ("rsa", ("-m", "PEM")),
        ("ecdsa384", ("-m", "PEM")),
    ],
    ids="".join,
)
def test_a_key_of_each_current_type_opens_the_door(
    server: Server, new_key: NewKey, tmp_path: Path, kind: str, options: tuple[str, ...]
) -> None:
    key = new_key(tmp_path / "key", kind)
    allow(server, key)
    server.write_config(f"IdentityFile {key}", key=False)
    rewrite(key, "", "", *options)
    with signed_in(host_of(server)) as connection:
        assert output(connection, "id -un") == f"{USER}\n"
    rewrite(key, "", "one two", *options)
    with signed_in(host_of(server), answers(("Passphrase", "one two"))):
        pass


def rewrite(key: Path, old: str, new: str, *options: str) -> None:
    """Give a key file another passphrase, and another format if need be."""
    words = ["ssh-keygen", "-q", "-p", "-a", "1", "-P", old, "-N", new, "-f", key]
    subprocess.run([*words, *options], check=True, capture_output=True)


def test_a_wrong_passphrase_is_asked_again_and_then_ends_in_one_line(
    server: Server, tmp_path: Path
) -> None:
    key = keygen(tmp_path / "key", "ed25519", "right")
    allow(server, key)
    server.write_config(f"IdentityFile {key}", key=False)
    with signed_in(host_of(server), answers(("Passphrase", "no"), ("Passphrase", "right"))):
        pass
    said = refusal(server, *[("Passphrase", "no")] * 3)
    assert "permission denied" in said and str(key) in said


def test_a_passphrase_is_asked_only_where_no_open_key_is_taken(
    server: Server, tmp_path: Path
) -> None:
    stranger = keygen(tmp_path / "stranger", "ed25519", "secret")
    server.write_config(f"IdentityFile {stranger}")
    with signed_in(host_of(server)):
        pass


def test_a_key_file_that_others_may_read_is_not_used(server: Server, tmp_path: Path) -> None:
    key = keygen(tmp_path / "key")
    allow(server, key)
    key.chmod(0o644)
    server.write_config(f"IdentityFile {key}", key=False)
    assert f"{key}: others may read it; chmod 600 {key}" in refusal(server)


def test_a_key_that_is_no_key_is_named(server: Server, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("not a key\n")
    (tmp_path / "key").chmod(0o600)
    server.write_config(f"IdentityFile {tmp_path}/key", key=False)
    assert f"{tmp_path}/key: " in refusal(server)


# ---- the agent ----


def test_the_agent_signs(server: Server, agent: Agent, new_key: NewKey, tmp_path: Path) -> None:
    for kind in ("ed25519", "rsa", "ecdsa"):
        key = new_key(tmp_path / kind, kind)
        allow(server, key)
        agent.add(key)
        key.unlink()
        # The .pub tells which of the agent's keys it is to be.
        server.write_config(f"IdentityFile {key}", f"IdentityAgent {agent.socket}", key=False)
        with signed_in(host_of(server)):
            pass


def test_identities_only_keeps_the_keys_of_the_agent_back(
    new_server: NewServer, agent: Agent, tmp_path: Path
) -> None:
    server = new_server("MaxAuthTries 3")
    for number in range(4):
        agent.add(keygen(tmp_path / f"other-{number}"))
    server.write_config(f"IdentityAgent {agent.socket}", "IdentitiesOnly yes")
    with signed_in(host_of(server)):
        pass
    server.write_config(
        "IdentitiesOnly no", f"IdentityAgent {agent.socket}", f"IdentityFile {tmp_path}/x"
    )
    # The file's own key would come after the agent's, and after the server's patience.
    said = refusal(server)
    assert "Too many authentication failures" in said and "IdentitiesOnly" in said


def test_a_key_that_the_agent_does_not_sign_with_is_left_aside(
    server: Server, agent: Agent, tmp_path: Path
) -> None:
    refused = keygen(tmp_path / "refused")
    allow(server, refused)
    # Nobody is there to confirm it.
    agent.add(refused, "-c")
    server.write_config("IdentitiesOnly no", f"IdentityAgent {agent.socket}")
    with signed_in(host_of(server)):
        pass
    server.write_config("IdentitiesOnly no", f"IdentityAgent {agent.socket}", key=False)
    assert "ssh-agent: it refused to sign with refused" in refusal(server)


def test_a_key_whose_algorithm_is_not_allowed_is_left_out(
    server: Server, new_key: NewKey, tmp_path: Path
) -> None:
    allow(server, rsa := new_key(tmp_path / "key", "rsa"))
    only = f"IdentityFile {rsa}"
    server.write_config(only, "PubkeyAcceptedAlgorithms rsa-sha2-256", key=False)
    with signed_in(host_of(server)):
        assert "rsa-sha2-256" in server.log
    server.write_config(only, "PubkeyAcceptedAlgorithms ssh-ed25519", key=False)
    assert "PubkeyAcceptedAlgorithms does not allow a key of type ssh-rsa" in refusal(server)
    server.write_config("PubkeyAcceptedAlgorithms rsa-sha2-512")
    assert "does not allow a key of type ssh-ed25519" in refusal(server)


# ---- certificates ----


@pytest.mark.parametrize("kind", ["ed25519", "rsa"])
def test_a_certificate_opens_the_door(
    authority: Authority, new_key: NewKey, tmp_path: Path, kind: str
) -> None:
    server = authority.server
    key = new_key(tmp_path / "key", kind)
    authority.certify(key)
    server.write_config(f"IdentityFile {key}", key=False)
    before = len(server.log)
    with signed_in(host_of(server)) as connection:
        output(connection, "true")
    assert re.search(r"Accepted publickey .*-CERT .*ID test", server.log[before:])

    # The certificate elsewhere, and not named; then named.
    shutil.move(f"{key}-cert.pub", tmp_path / "elsewhere.pub")
    assert "permission denied" in refusal(server)
    server.write_config(
        f"IdentityFile {key}", f"CertificateFile {tmp_path}/elsewhere.pub", key=False
    )
    with signed_in(host_of(server)):
        pass


def test_a_certificate_in_the_agent_opens_the_door(
    authority: Authority, agent: Agent, new_key: NewKey, tmp_path: Path
) -> None:
    key = new_key(tmp_path / "key", "rsa")
    authority.certify(key)
    agent.add(key)
    authority.server.write_config("IdentitiesOnly no", f"IdentityAgent {agent.socket}", key=False)
    with signed_in(host_of(authority.server)):
        pass


# ---- passwords and questions ----


@by_root
def test_a_password_is_asked_in_secret_and_a_wrong_one_again(password_server: Server) -> None:
    server = password_server
    server.write_config(key=False)
    user = answers(("Password of", "wrong"), ("Password of", PASSWORD))
    with signed_in(host_of(server), user):
        pass
    assert user.shown == ["Permission denied, please try again."]
    assert not user.open_questions

    said = refusal(server, *[("Password of", "wrong")] * 3)
    assert "permission denied" in said and "password" in said and "wrong" not in said
    server.write_config("BatchMode yes", key=False)
    assert "nothing was available" in refusal(server)


@by_root
def test_keyboard_interactive_of_pam_twice_over(new_server: NewServer) -> None:
    server = new_server(
        "AuthenticationMethods keyboard-interactive:pam,keyboard-interactive:pam", pam=PAM
    )
    server.write_config(key=False)
    user = answers(("Password", "wrong"), ("Password", PASSWORD), ("Password", PASSWORD))
    with signed_in(host_of(server), user):
        pass
    assert len(user.secret_questions) == 3
    # Each factor has its own tries.
    server.write_config("NumberOfPasswordPrompts 1", key=False)
    with signed_in(host_of(server), answers(*[("Password", PASSWORD)] * 2)):
        pass
    server.write_config(key=False)
    assert "permission denied" in refusal(server, *[("Password", "wrong")] * 3)


@by_root
def test_a_key_and_then_a_code(new_server: NewServer, tmp_path: Path) -> None:
    server = new_server("AuthenticationMethods publickey,keyboard-interactive:pam", pam=PAM)
    with signed_in(host_of(server), answers(("Password", PASSWORD))):
        pass
    server.write_config(f"IdentityFile {keygen(tmp_path / 'stranger')}", key=False)
    assert "permission denied" in refusal(server)


@by_root
def test_the_preferred_method_comes_first(password_server: Server) -> None:
    server = password_server
    server.write_config("PreferredAuthentications password,publickey")
    with signed_in(host_of(server), answers(("Password of", PASSWORD))):
        pass
    server.write_config("PasswordAuthentication no", key=False)
    assert "nothing was available" in refusal(server)


def test_each_line_of_a_question_bears_the_name_of_who_asks(tmp_path: Path) -> None:
    words = "Code\r\nPassphrase for the key /home/me/.ssh/id_rsa: "
    questioner = Questioner([("", [(words, False, "x")])])
    try:
        host = resolve("questioner", config=str(questioner.write_config(tmp_path)))
        user = answers(("Passphrase", "x"))
        with signed_in(host, user):
            pass
    finally:
        questioner.stop()
    (asked,) = user.secret_questions
    assert [line[:15] for line in asked.split("\n")] == ["(me@127.0.0.1) "] * 2


def test_the_banner_is_shown_without_what_could_steer_the_terminal(
    new_server: NewServer, tmp_path: Path
) -> None:
    (tmp_path / "banner").write_bytes(b"Welcome\n\x1b]0;owned\x07\x9b2J\nsecond line\n")
    server = new_server(f"Banner {tmp_path}/banner")
    user = answers()
    with signed_in(host_of(server), user):
        pass
    (shown,) = user.shown
    assert shown.startswith("Welcome\n?]0;owned?") and shown.endswith("\nsecond line")
    assert not any(ord(letter) < 32 and letter != "\n" for letter in shown)


def test_nothing_secret_is_logged(
    password_server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key = keygen(tmp_path / "key", "ed25519", "hunter22")
    server = password_server
    allow(server, key)
    server.write_config(f"IdentityFile {key}", key=False)
    paramiko_log = logging.getLogger("paramiko")
    paramiko_log.addHandler(caplog.handler)
    paramiko_log.setLevel(logging.DEBUG)
    try:
        with signed_in(host_of(server), answers(("Passphrase", "hunter22"))):
            pass
        if IS_ROOT:
            server.write_config(key=False)
            with signed_in(host_of(server), answers(("Password", PASSWORD))):
                pass
    finally:
        paramiko_log.removeHandler(caplog.handler)
        paramiko_log.setLevel(logging.NOTSET)
    assert "Remote version" in caplog.text
    assert "hunter22" not in caplog.text and PASSWORD not in caplog.text


@by_root
@pytest.mark.parametrize("dead", ["the server", "the way there"])
def test_a_connection_that_ends_at_the_question_is_told_in_one_line(
    password_server: Server, dead: str
) -> None:
    server = password_server
    server.write_config(key=False)

    class Killer:
        def ask(self, question: str) -> str:
            (link,) = (thread for thread in threading.enumerate() if isinstance(thread, Link))
            if dead == "the server":
                server.send_children(signal.SIGKILL)
            else:
                # Nothing can be sent, and no end is heard yet.
                link.sock.shutdown(socket.SHUT_WR)
            return "x"

        secret = ask

    with pytest.raises(UserError, match=r"^server: the sign-in failed: "):
        connect(host_of(server), prompts=Killer(), say=print)
