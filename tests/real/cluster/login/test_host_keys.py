"""Host keys against the real sshd and ssh: nothing is said before the key is believed."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.login.config import Host
from cluster.login.connection import connect
from runfolder.errors import UserError
from tests.real.cluster.login.answers import Answers, answers, host_of, signed_in
from tests.real.cluster.login.server import Server, keygen, start

pytestmark = pytest.mark.needs("sshd")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Return an sshd with host keys of two types."""
    made = start(tmp_path_factory.mktemp("both"), host_keys=("ed25519", "rsa"))
    yield made
    made.stop()


@pytest.fixture
def known(tmp_path: Path) -> Path:
    return tmp_path / "known_hosts"


@pytest.fixture
def host(both: Server, known: Path) -> Host:
    """Return the server, with a known_hosts file that the test fills."""
    return replace(host_of(both), user_known_hosts_files=(str(known),))


def public(key: Path) -> str:
    """Return a public key as known_hosts has it."""
    return " ".join(Path(f"{key}.pub").read_text().split()[:2])


def fingerprint(key: Path) -> str:
    done = subprocess.run(
        ["ssh-keygen", "-l", "-f", f"{key}.pub"], check=True, capture_output=True, text=True
    )
    return done.stdout.split()[1]


def found_by_openssh(server: Server, known: Path) -> str:
    find = ["ssh-keygen", "-F", f"[127.0.0.1]:{server.port}", "-f", str(known)]
    return subprocess.run(find, check=True, capture_output=True, text=True).stdout


def by_openssh(server: Server, known: Path) -> subprocess.CompletedProcess[str]:
    """Have the ssh command sign in."""
    command = ["ssh", "-F", server.config, "-o", f"UserKnownHostsFile={known}"]
    command += ["-o", "StrictHostKeyChecking=yes", "server", "true"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def refusal(server: Server, host: Host, user: Answers | None = None) -> str:
    """Return the one line with which a host key is refused, before anything else was said."""
    before = len(server.log)
    user = user or answers()
    with pytest.raises(UserError) as caught:
        connect(host, prompts=user, say=user.say)
    # Not even a name was sent, let alone a password.
    assert "userauth-request" not in server.log[before:]
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("is_hashed", [False, True])
def test_an_unknown_key_is_shown_and_appended_and_openssh_knows_it_then(
    both: Server, host: Host, known: Path, is_hashed: bool
) -> None:
    host = replace(host, hash_known_hosts=is_hashed)
    assert "was not accepted" in refusal(both, host, answers(("SHA256:", "no")))
    user = answers(("SHA256:", fingerprint(both.host_key)))
    with signed_in(host, user):
        pass
    assert f"[127.0.0.1]:{both.port}" in user.open_questions[0]
    assert ("127.0.0.1" in known.read_text()) != is_hashed
    assert public(both.host_key) in found_by_openssh(both, known)
    with signed_in(host):
        pass


def test_a_changed_key_never_gets_as_far_as_a_password(
    both: Server, host: Host, known: Path, tmp_path: Path
) -> None:
    known.write_text(f"[127.0.0.1]:{both.port} {public(keygen(tmp_path / 'stranger'))}\n")
    with known.open("a") as stream:
        stream.write(f"127.0.0.1 {public(both.host_key)}\n")
    # Nothing is foreseen: to ask for anything would fail.
    assert f"{known}:1" in refusal(both, host)
    # ssh, too, says that the key has changed.
    done = by_openssh(both, known)
    assert done.returncode == 255 and "IDENTIFICATION HAS CHANGED" in done.stderr


def test_the_type_that_is_known_is_asked_for(both: Server, host: Host, known: Path) -> None:
    known.write_text(f"[127.0.0.1]:{both.port} {public(both.folder / 'host_rsa')}\n")
    with signed_in(host) as connection:
        assert connection.transport.get_remote_server_key().get_name() == "ssh-rsa"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return keygen(tmp_path_factory.mktemp("authority") / "ca", "rsa")


def test_a_host_that_is_known_by_its_certificate_alone_is_refused_by_name(
    both: Server, host: Host, known: Path, authority: Path
) -> None:
    known.write_text(f"@cert-authority [127.*]:* {public(authority)}\n")
    said = refusal(both, host)
    assert f"{known}:1" in said and 'backend = "openssh"' in said
    with known.open("a") as stream:
        stream.write(f"[127.0.0.1]:{both.port} {public(both.host_key)}\n")
    with signed_in(host):
        pass
