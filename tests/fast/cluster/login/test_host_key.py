"""cluster/login/host_key.py: which key is believed to be a host's; what is asked, what is kept."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import paramiko
import pytest

from cluster.login.config import Host
from cluster.login.host_key import Check
from runfolder.errors import UserError

pytestmark = pytest.mark.needs("sshd")
NAME, PORT = "farm.example.org", 2222
KNOWN_AS = f"[{NAME}]:{PORT}"
OURS, STRANGER, OTHER_TYPE = (paramiko.ECDSAKey.generate(bits=bits) for bits in (256, 256, 384))


def line(key: paramiko.PKey) -> str:
    """Return a public key as known_hosts has it."""
    return f"{key.get_name()} {key.get_base64()}"


@dataclass
class User:
    """Who answers what a test has foreseen."""

    answers: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)

    def ask(self, question: str) -> str:
        self.asked.append(question)
        return self.answers.pop(0)

    def secret(self, question: str) -> str:
        raise AssertionError(question)


@pytest.fixture
def known(tmp_path: Path) -> Path:
    return tmp_path / "known_hosts"


@pytest.fixture
def host(known: Path) -> Host:
    return Host(
        alias="farm",
        hostname=NAME,
        port=PORT,
        user="me",
        user_known_hosts_files=(str(known),),
        strict_host_key_checking="yes",
    )


def check(host: Host, shown: paramiko.PKey, *answers: str) -> User:
    """Have a key checked that a server has shown; it must be believed."""
    user = User(list(answers))
    Check.of(host).check(shown, user, user.told.append)
    assert not user.answers
    return user


def refusal(host: Host, shown: paramiko.PKey, *answers: str) -> str:
    """Return the one line with which a key is refused."""
    with pytest.raises(UserError) as caught:
        check(host, shown, *answers)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- unknown ----


@pytest.mark.parametrize("answer", ["yes", OURS.fingerprint], ids=["yes", "fingerprint"])
def test_an_unknown_key_is_shown_and_appended(host: Host, known: Path, answer: str) -> None:
    host = replace(host, strict_host_key_checking="ask")
    # A file that another program left without its last newline.
    known.write_text("# mine\nother.example.org ssh-ed25519 AAAA broken but mine")
    user = check(host, OURS, "perhaps", answer)
    assert OURS.fingerprint in user.asked[0] and KNOWN_AS in user.asked[0]
    assert known.read_text() == (
        "# mine\nother.example.org ssh-ed25519 AAAA broken but mine\n"
        + f"{KNOWN_AS} {line(OURS)}\n"
    )
    assert check(host, OURS).asked == []


def test_strict_checking_refuses_what_is_new_and_accept_new_takes_it(
    host: Host, known: Path
) -> None:
    said = refusal(host, OURS)
    assert "not known" in said and OURS.fingerprint in said
    check(replace(host, strict_host_key_checking="accept-new"), OURS)
    assert line(OURS) in known.read_text()


def test_a_file_that_cannot_be_used_is_said(host: Host, tmp_path: Path) -> None:
    host = replace(host, strict_host_key_checking="accept-new")
    user = check(replace(host, user_known_hosts_files=("/proc/known_hosts",)), OURS)
    assert "is not saved" in user.told[0]
    (tmp_path / "file").touch()
    host = replace(host, user_known_hosts_files=(f"{tmp_path}/file/known_hosts",))
    assert "Not a directory" in refusal(host, OURS)
    # It may revoke keys.
    host = replace(host, user_known_hosts_files=(str(tmp_path),))
    assert "Is a directory; it may revoke keys" in refusal(host, OURS)


# ---- changed ----


@pytest.mark.parametrize("strictness", ["yes", "ask", "accept-new"])
def test_a_changed_key_is_refused_with_file_and_line(
    host: Host, known: Path, strictness: Any
) -> None:
    known.write_text(f"# a comment\n{KNOWN_AS} {line(STRANGER)}\n")
    said = refusal(replace(host, strict_host_key_checking=strictness), OURS)
    assert f"{known}:2" in said and OURS.fingerprint in said
    assert known.read_text() == f"# a comment\n{KNOWN_AS} {line(STRANGER)}\n"


def test_a_host_known_by_another_type_only_is_refused_as_ssh_does(host: Host, known: Path) -> None:
    known.write_text(f"{KNOWN_AS} {line(OTHER_TYPE)}\n")
    said = refusal(replace(host, strict_host_key_checking="accept-new"), OURS)
    assert "no host key of a known type" in said and f"{known}:1" in said


def test_the_key_of_the_name_without_its_port_does_not_stand_for_another_with_it(
    host: Host, known: Path
) -> None:
    known.write_text(f"{KNOWN_AS} {line(STRANGER)}\n{NAME} {line(OURS)}\n")
    assert f"{known}:1" in refusal(host, OURS)


def test_an_rsa_key_that_is_too_short_is_refused_though_it_is_known(
    host: Host, known: Path
) -> None:
    shown = paramiko.RSAKey.generate(1024)
    known.write_text(f"{KNOWN_AS} {line(shown)}\n")
    check(host, shown)
    said = refusal(replace(host, required_rsa_size=1025), shown)
    assert "its RSA host key has 1024 bits, and RequiredRSASize is 1025" in said


# ---- who is meant ----


def test_an_alias_stands_for_the_name(host: Host, known: Path) -> None:
    known.write_text(f"barn {line(OURS)}\n")
    check(replace(host, host_key_alias="barn"), OURS)
    assert "not known" in refusal(host, OURS)


# ---- markers ----


@pytest.mark.parametrize("names", [KNOWN_AS, NAME])
def test_a_revoked_key_is_refused(host: Host, known: Path, names: str) -> None:
    known.write_text(f"{KNOWN_AS} {line(OURS)}\n@revoked {names} {line(OURS)}\n")
    assert f"revoked ({known}:2)" in refusal(host, OURS)


def test_a_host_that_only_an_authority_knows_is_refused_by_name(host: Host, known: Path) -> None:
    authority = f"@cert-authority *.org {line(STRANGER)}\n@cert-authority {KNOWN_AS} {line(OURS)}\n"
    known.write_text(authority)
    said = refusal(replace(host, strict_host_key_checking="accept-new"), OURS)
    assert f"{known}:2" in said and 'backend = "openssh"' in said
    known.write_text(f"{authority}{KNOWN_AS} {line(OURS)}\n")
    check(host, OURS)
