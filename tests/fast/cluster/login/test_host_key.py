"""cluster/login/host_key.py: which key is believed to be a host's; what is asked, what is kept."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    SSHCertificateBuilder,
    SSHCertificateType,
)

from cluster.login import host_key, known_hosts
from cluster.login.config import Host
from runfolder.errors import UserError

NAME, PORT = "farm.example.org", 2222
KNOWN_AS = f"[{NAME}]:{PORT}"
DAY_S = 86400


def line(key: Any) -> str:
    """Return a public key as known_hosts has it."""
    public: bytes = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    return public.decode()


def blob(text: str) -> bytes:
    return base64.b64decode(text.split()[1])


def fingerprint(text: str) -> str:
    return known_hosts.fingerprint(blob(text))


OURS = line(ed25519.Ed25519PrivateKey.generate())
STRANGER = line(ed25519.Ed25519PrivateKey.generate())
OTHER_TYPE = line(ec.generate_private_key(ec.SECP256R1()))
AUTHORITY = rsa.generate_private_key(65537, 2048)


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


def check(host: Host, shown: str | bytes, *answers: str) -> User:
    """Have a key checked that a server has shown; it must be believed."""
    user = User(list(answers))
    shown = blob(shown) if isinstance(shown, str) else shown
    host_key.checker(host).check(shown, user, user.told.append)
    assert not user.answers
    return user


def refusal(host: Host, shown: str | bytes, *answers: str) -> str:
    """Return the one line with which a key is refused."""
    with pytest.raises(UserError) as caught:
        check(host, shown, *answers)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- unknown ----


@pytest.mark.parametrize("answer", ["yes", fingerprint(OURS)], ids=["yes", "fingerprint"])
def test_an_unknown_key_is_shown_and_appended(host: Host, known: Path, answer: str) -> None:
    host = replace(host, strict_host_key_checking="ask")
    # A file that another program left without its last newline.
    known.write_text("# mine\nother.example.org ssh-ed25519 AAAA broken but mine")
    user = check(host, OURS, "perhaps", answer)
    assert fingerprint(OURS) in user.asked[0] and KNOWN_AS in user.asked[0]
    assert known.read_text() == (
        "# mine\nother.example.org ssh-ed25519 AAAA broken but mine\n" + f"{KNOWN_AS} {OURS}\n"
    )
    assert check(host, OURS).asked == []


def test_a_name_is_hashed_where_that_is_wanted(host: Host, known: Path) -> None:
    host = replace(host, hash_known_hosts=True, strict_host_key_checking="ask")
    check(host, OURS, "yes")
    assert NAME not in known.read_text() and OURS in known.read_text()
    assert check(host, OURS).asked == []


def test_no_is_no(host: Host, known: Path) -> None:
    host = replace(host, strict_host_key_checking="ask")
    assert "was not accepted" in refusal(host, OURS, "no")
    assert not known.exists()


def test_strict_checking_refuses_what_is_new_and_accept_new_takes_it(
    host: Host, known: Path
) -> None:
    said = refusal(host, OURS)
    assert "not known" in said and fingerprint(OURS) in said
    check(replace(host, strict_host_key_checking="accept-new"), OURS)
    assert OURS in known.read_text()


def test_a_file_that_cannot_be_used_is_said(host: Host, tmp_path: Path) -> None:
    host = replace(host, strict_host_key_checking="accept-new")
    user = check(replace(host, user_known_hosts_files=("/proc/known_hosts",)), OURS)
    assert "is not kept" in user.told[0]
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
    known.write_text(f"# a comment\n{KNOWN_AS} {STRANGER}\n")
    said = refusal(replace(host, strict_host_key_checking=strictness), OURS)
    assert f"{known}:2" in said and fingerprint(OURS) in said
    assert known.read_text() == f"# a comment\n{KNOWN_AS} {STRANGER}\n"


def test_the_type_that_is_known_is_asked_for(host: Host, known: Path) -> None:
    known.write_text(f"{KNOWN_AS} {OTHER_TYPE}\n")
    assert host_key.checker(host).algorithms()[0] == "ecdsa-sha2-nistp256"


def test_a_host_known_by_another_type_only_is_refused_as_ssh_does(host: Host, known: Path) -> None:
    known.write_text(f"{KNOWN_AS} {OTHER_TYPE}\n")
    said = refusal(replace(host, strict_host_key_checking="accept-new"), OURS)
    assert "no host key of a type that is known" in said and f"{known}:1" in said


def test_the_key_of_the_name_without_its_port_does_not_stand_for_another_with_it(
    host: Host, known: Path
) -> None:
    known.write_text(f"{KNOWN_AS} {STRANGER}\n{NAME} {OURS}\n")
    assert f"{known}:1" in refusal(host, OURS)


def rsa_blob(bits: int) -> bytes:
    """Return a public key of RSA that nobody has the private one of."""
    modulus = (1 << bits - 1 | 1).to_bytes(bits // 8 + 1, "big")
    parts = (b"ssh-rsa", b"\1\0\1", modulus)
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def test_an_rsa_key_that_is_too_short_is_refused_though_it_is_known(
    host: Host, known: Path
) -> None:
    shown = rsa_blob(3072)
    known.write_text(f"{KNOWN_AS} ssh-rsa {base64.b64encode(shown).decode()}\n")
    check(replace(host, required_rsa_size=3072), shown)
    said = refusal(replace(host, required_rsa_size=3073), shown)
    assert "its host key is of RSA with 3072 bits, and RequiredRSASize is 3073" in said


# ---- who is meant ----


@pytest.mark.parametrize("names", [KNOWN_AS, f"other,[*.org]:{PORT}", NAME, "*", "[farm.*]:*"])
def test_names_and_patterns(host: Host, known: Path, names: str) -> None:
    known.write_text(f"{names} {OURS}\n")
    check(host, OURS)


@pytest.mark.parametrize("names", [f"*,!{NAME},!{KNOWN_AS}", f"[{NAME}]:22", "[*]:1"])
def test_names_that_are_others(host: Host, known: Path, names: str) -> None:
    known.write_text(f"{names} {OURS}\n")
    assert "not known" in refusal(host, OURS)


def test_an_alias_stands_for_the_name(host: Host, known: Path) -> None:
    known.write_text(f"barn {OURS}\n")
    check(replace(host, host_key_alias="barn"), OURS)
    assert "not known" in refusal(host, OURS)


# ---- markers ----


@pytest.mark.parametrize("names", [KNOWN_AS, NAME, "*"])
def test_a_revoked_key_is_refused(host: Host, known: Path, names: str) -> None:
    known.write_text(f"{KNOWN_AS} {OURS}\n@revoked {names} {OURS}\n")
    assert f"revoked ({known}:2)" in refusal(host, OURS)


def test_a_line_that_cannot_be_honoured_is_said(host: Host, known: Path) -> None:
    known.write_text(f"@trusted * {OURS}\n* ssh-frog AAAA\nelsewhere ssh-x AA\n{KNOWN_AS} {OURS}\n")
    assert check(host, OURS).told == [
        f"note: {known}:1: '@trusted' is a marker that is not known here; left out",
        f"note: {known}:2: its key cannot be read; left out",
    ]


# ---- certificates ----

Change = Callable[[SSHCertificateBuilder], SSHCertificateBuilder]


def certificate(
    change: Change = lambda builder: builder,
    kind: SSHCertificateType = SSHCertificateType.HOST,
    names: tuple[bytes, ...] = (NAME.encode(),),
    valid: tuple[int, int] = (-DAY_S, DAY_S),
) -> bytes:
    """Return a host certificate for a new key."""
    builder = SSHCertificateBuilder().public_key(ed25519.Ed25519PrivateKey.generate().public_key())
    builder = builder.serial(1).type(kind).key_id(b"host")
    builder = builder.valid_principals(list(names)) if names else builder.valid_for_all_principals()
    now = int(time.time())
    builder = builder.valid_after(now + valid[0]).valid_before(now + valid[1])
    return blob(change(builder).sign(AUTHORITY).public_bytes().decode())


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ({}, ""),
        ({"names": ()}, ""),
        ({"names": (b"other.example.org",)}, f"it is not for {NAME}"),
        ({"valid": (-2 * DAY_S, -DAY_S)}, "it has expired"),
        ({"valid": (DAY_S, 2 * DAY_S)}, "it is not valid yet"),
        ({"kind": SSHCertificateType.USER}, "it is a user's"),
        (
            {"change": lambda builder: builder.add_critical_option(b"frog", b"")},
            "it has an option that is not known",
        ),
    ],
    ids=["named", "for all", "other", "expired", "early", "a user's", "option"],
)
def test_a_host_certificate(host: Host, known: Path, options: dict[str, Any], wrong: str) -> None:
    known.write_text(f"@cert-authority [*.org]:* {line(AUTHORITY)}\n")
    if wrong:
        assert wrong in refusal(host, certificate(**options))
    else:
        check(host, certificate(**options))


def test_a_certificate_that_was_changed_is_refused(host: Host, known: Path) -> None:
    known.write_text(f"@cert-authority * {line(AUTHORITY)}\n")
    assert "its signature is wrong" in refusal(
        host, certificate(names=(b"firm.example.org",)).replace(b"firm", b"farm")
    )


def test_an_authority_that_is_not_wanted_certifies_nobody(host: Host, known: Path) -> None:
    shown = certificate()
    known.write_text(f"@cert-authority * {line(AUTHORITY)}\n")
    # One that ssh would not let sign, by its algorithm or by its size, does not either.
    only = replace(host, algorithms={"casignaturealgorithms": ("ssh-ed25519",)})
    assert "it is signed with rsa-sha2-512, which CASig" in refusal(only, shown)
    short = refusal(replace(host, required_rsa_size=4096), shown)
    assert f"the authority of {known}:1 is of RSA with 2048 bits" in short
    known.write_text(f"@cert-authority * {line(AUTHORITY)}\n@revoked * {line(AUTHORITY)}\n")
    assert "revoked" in refusal(host, shown)


def test_with_an_authority_of_others_the_plain_key_counts(host: Host, known: Path) -> None:
    shown = certificate()
    known.write_text(f"@cert-authority other {line(AUTHORITY)}\n")
    assert "not known" in refusal(host, shown)
    user = check(replace(host, strict_host_key_checking="accept-new"), shown)
    assert len(user.told) == 1
    # Without the certificate, which will be another one.
    assert known.read_text().splitlines()[1].startswith(f"{KNOWN_AS} ssh-ed25519 ")
    check(host, shown)
