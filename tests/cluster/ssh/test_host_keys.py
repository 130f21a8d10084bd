"""Host keys against the real sshd: what is known, what is asked, what is refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.errors import UserError
from cluster.ssh.config import Host
from cluster.ssh.connection import connect
from tests.cluster.ssh.answers import Answers, answers, host_of, signed_in
from tests.cluster.ssh.server import NewServer, Server, keygen, start
from tests.conftest import CHECKOUT

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


@pytest.fixture
def stranger(tmp_path: Path) -> str:
    """Return a key that is not the server's."""
    return public(keygen(tmp_path / "stranger"))


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


# ---- unknown ----


def test_an_unknown_key_is_shown_and_appended(both: Server, host: Host, known: Path) -> None:
    # A file that another program left without its last newline.
    known.write_text("# mine\nother.example.org ssh-ed25519 AAAA broken but mine")
    user = answers(("SHA256:", "perhaps"), ("Type yes", "yes"))
    with signed_in(host, user):
        pass
    assert fingerprint(both.host_key) in user.open_questions[0]
    assert f"[127.0.0.1]:{both.port}" in user.open_questions[0]
    assert known.read_text() == (
        "# mine\nother.example.org ssh-ed25519 AAAA broken but mine\n"
        f"[127.0.0.1]:{both.port} {public(both.host_key)}\n"
    )
    with signed_in(host):
        pass
    # OpenSSH, too, knows it now.
    assert public(both.host_key) in found_by_openssh(both, known)


def test_a_name_is_hashed_where_that_is_wanted(both: Server, host: Host, known: Path) -> None:
    host = replace(host, hash_known_hosts=True)
    with signed_in(host, answers(("SHA256:", fingerprint(both.host_key)))):
        pass
    assert "127.0.0.1" not in known.read_text()
    assert public(both.host_key) in found_by_openssh(both, known)
    with signed_in(host):
        pass


def test_no_is_no(both: Server, host: Host, known: Path) -> None:
    assert "was not accepted" in refusal(both, host, answers(("SHA256:", "no")))
    assert not known.exists()


def test_without_a_terminal_an_unknown_key_is_refused(both: Server, host: Host) -> None:
    script = (
        "import sys; from cluster.ssh import config, connection; from cluster.errors import *\n"
        "from dataclasses import replace\n"
        f"host = replace(config.resolve('server', config={str(both.config)!r}),"
        f" user_known_hosts_files=({host.user_known_hosts_files[0]!r},))\n"
        "run_to_exit(lambda argv: bool(connection.connect(host)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        start_new_session=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: there is no terminal to ask")
    assert len(done.stderr.splitlines()) == 1


def test_strict_checking_refuses_what_is_new_and_accept_new_takes_it(
    both: Server, host: Host, known: Path
) -> None:
    said = refusal(both, replace(host, strict_host_key_checking="yes"))
    assert fingerprint(both.host_key) in said
    with signed_in(replace(host, strict_host_key_checking="accept-new")):
        pass
    assert public(both.host_key) in known.read_text()


def test_a_file_that_cannot_be_written_is_said(host: Host, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    host = replace(host, user_known_hosts_files=(f"{tmp_path}/file/known_hosts",))
    user = answers(("SHA256:", "yes"))
    with pytest.raises(UserError, match="Not a directory"):
        signed_in(host, user)
    user = answers(("SHA256:", "yes"))
    with signed_in(replace(host, user_known_hosts_files=("/proc/known_hosts",)), user):
        pass
    assert "is not kept" in user.shown[0]


# ---- changed ----


def test_a_changed_key_is_refused_with_file_and_line(
    both: Server, host: Host, known: Path, stranger: str
) -> None:
    known.write_text(f"# a comment\n[127.0.0.1]:{both.port} {stranger}\n")
    for strictness in ("yes", "ask", "accept-new"):
        said = refusal(both, replace(host, strict_host_key_checking=strictness))
        assert f"{known}:2" in said and fingerprint(both.host_key) in said
    assert stranger in known.read_text()


def test_the_wrong_key_never_gets_as_far_as_a_password(
    new_server: NewServer, known: Path, stranger: str
) -> None:
    server = new_server("PasswordAuthentication yes")
    server.write_config(key=False)
    known.write_text(f"[127.0.0.1]:{server.port} {stranger}\n")
    host = replace(host_of(server), user_known_hosts_files=(str(known),))
    # Nothing is foreseen: to ask for the password would fail.
    assert f"{known}:1" in refusal(server, host)


def test_the_type_that_is_known_is_asked_for(both: Server, host: Host, known: Path) -> None:
    known.write_text(f"[127.0.0.1]:{both.port} {public(both.folder / 'host_rsa')}\n")
    with signed_in(host) as connection:
        assert connection.transport.get_remote_server_key().get_name() == "ssh-rsa"


def test_a_host_known_by_another_type_only_is_refused_as_ssh_does(
    both: Server, host: Host, known: Path, tmp_path: Path
) -> None:
    known.write_text(f"[127.0.0.1]:{both.port} {public(keygen(tmp_path / 'e', 'ecdsa'))}\n")
    said = refusal(both, replace(host, strict_host_key_checking="accept-new"))
    assert "no host key of a type that is known" in said and f"{known}:1" in said


def test_the_key_of_the_name_without_its_port_does_not_stand_for_another_with_it(
    both: Server, host: Host, known: Path, stranger: str
) -> None:
    known.write_text(f"[127.0.0.1]:{both.port} {stranger}\n127.0.0.1 {public(both.host_key)}\n")
    assert f"{known}:1" in refusal(both, host)
    # ssh, too, says that the key has changed.
    command = ["ssh", "-F", both.config, "-o", f"UserKnownHostsFile={known}", "server", "true"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 255 and "IDENTIFICATION HAS CHANGED" in done.stderr


def test_an_rsa_key_that_is_too_short_is_refused_though_it_is_known(
    both: Server, host: Host, known: Path
) -> None:
    known.write_text(f"[127.0.0.1]:{both.port} {public(both.folder / 'host_rsa')}\n")
    with signed_in(replace(host, required_rsa_size=3072)):
        pass
    said = refusal(both, replace(host, required_rsa_size=3073))
    assert "its host key is of RSA with 3072 bits, and RequiredRSASize is 3073" in said


# ---- who is meant ----


@pytest.mark.parametrize(
    "names",
    [
        "[127.0.0.1]:{port}",
        "other,[127.*]:{port}",
        "127.0.0.1",
        "*",
        "[127.0.0.?]:*",
    ],
)
def test_names_and_patterns(both: Server, host: Host, known: Path, names: str) -> None:
    known.write_text(f"{names.format(port=both.port)} {public(both.host_key)}\n")
    with signed_in(replace(host, strict_host_key_checking="yes")):
        pass


@pytest.mark.parametrize("names", ["*,!127.0.0.1,![127.0.0.1]:{port}", "[127.0.0.1]:22", "[*]:1"])
def test_names_that_are_others(both: Server, host: Host, known: Path, names: str) -> None:
    known.write_text(f"{names.format(port=both.port)} {public(both.host_key)}\n")
    assert "not known" in refusal(both, replace(host, strict_host_key_checking="yes"))


def test_an_alias_stands_for_the_name(both: Server, host: Host, known: Path) -> None:
    known.write_text(f"farm {public(both.host_key)}\n")
    with signed_in(replace(host, host_key_alias="farm")):
        pass
    assert "not known" in refusal(both, replace(host, strict_host_key_checking="yes"))


# ---- markers ----


@pytest.mark.parametrize("names", ["[127.0.0.1]:{port}", "127.0.0.1", "*"])
def test_a_revoked_key_is_refused(both: Server, host: Host, known: Path, names: str) -> None:
    names = names.format(port=both.port)
    known.write_text(
        f"[127.0.0.1]:{both.port} {public(both.host_key)}\n"
        f"@revoked {names} {public(both.host_key)}\n"
    )
    assert f"revoked ({known}:2)" in refusal(both, host)


def test_a_line_that_cannot_be_honoured_is_said(
    both: Server, host: Host, known: Path, stranger: str
) -> None:
    known.write_text(f"@trusted * {public(both.host_key)}\n* ssh-frog AAAA\nelsewhere ssh-x AA\n")
    user = answers(("SHA256:", "yes"))
    with signed_in(host, user):
        pass
    assert f"{known}:1: '@trusted'" in user.shown[0]
    assert user.shown[1] == f"note: {known}:2: its key cannot be read; left out"
    assert len(user.shown) == 3


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return keygen(tmp_path_factory.mktemp("authority") / "ca", "rsa")


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        (("-n", "127.0.0.1"), ""),
        ((), ""),
        (("-n", "other.example.org"), "it is not for 127.0.0.1"),
        (("-n", "127.0.0.1", "-V", "-2d:-1d"), "it has expired"),
        (("-n", "127.0.0.1", "-V", "+1d:+2d"), "it is not valid yet"),
        (("-n", "127.0.0.1", "-t", "ssh-rsa"), "it is signed with SHA-1"),
    ],
    ids=["named", "for all", "other", "expired", "early", "sha1"],
)
def test_a_host_certificate(
    authority: Path,
    known: Path,
    tmp_path: Path,
    options: tuple[str, ...],
    wrong: str,
) -> None:
    folder = tmp_path / "certified"
    folder.mkdir()
    keygen(folder / "host_ed25519")
    sign = ["ssh-keygen", "-q", "-h", "-s", authority, "-I", "host", *options]
    subprocess.run([*sign, folder / "host_ed25519.pub"], check=True, capture_output=True)
    certificate = f"HostCertificate {folder}/host_ed25519-cert.pub"
    server = start(folder, certificate)
    try:
        host = replace(host_of(server), user_known_hosts_files=(str(known),))
        known.write_text(f"@cert-authority [127.*]:* {public(authority)}\n")
        if wrong:
            assert wrong in refusal(server, host)
            # ssh sees it in the same way.
            command = ["ssh", "-F", server.config, "-o", f"UserKnownHostsFile={known}"]
            command += ["-o", "StrictHostKeyChecking=yes", "server", "true"]
            assert subprocess.run(command, capture_output=True, check=False).returncode == 255
            return
        with signed_in(replace(host, strict_host_key_checking="yes")):
            pass
        # One that ssh would not let sign, by its algorithm or by its size, does not either.
        only = replace(host, algorithms={"casignaturealgorithms": ("ssh-ed25519",)})
        assert "it is signed with rsa-sha2-512, which CASig" in refusal(server, only)
        short = refusal(server, replace(host, required_rsa_size=4096))
        assert f"the authority of {known}:1 is of RSA with 3072 bits" in short
        # A revoked authority certifies nobody.
        with known.open("a") as stream:
            stream.write(f"@revoked * {public(authority)}\n")
        assert "revoked" in refusal(server, host)
        # One that is for other hosts does not either; the plain key counts then.
        known.write_text(f"@cert-authority other {public(authority)}\n")
        assert "not known" in refusal(server, replace(host, strict_host_key_checking="yes"))
        known.write_text(f"[127.0.0.1]:{server.port} {public(server.host_key)}\n")
        with signed_in(host):
            pass
    finally:
        server.stop()


def test_the_file_of_known_hosts_must_be_readable_as_it_may_revoke(host: Host) -> None:
    folder = replace(host, user_known_hosts_files=(str(Path.cwd()),))
    with pytest.raises(UserError, match="Is a directory; it may revoke keys"):
        connect(folder)
