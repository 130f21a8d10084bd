"""ssh_config without the ssh command: as `ssh -G` has it, or refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st

from cluster.login import config, ssh_config
from cluster.login.config import Host, resolve
from cluster.login.connection import route
from runfolder.errors import UserError

needs_ssh = pytest.mark.needs("sshd")


@pytest.fixture(autouse=True)
def agent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSH_AUTH_SOCK", "/tmp/agent")


@pytest.fixture
def no_ssh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config.shutil, "which", lambda name: None)


def write(folder: Path, text: str) -> str:
    path = folder / "ssh_config"
    path.write_text(text, errors="surrogateescape")
    return str(path)


def by_both(path: str, alias: str) -> tuple[Host, Host]:
    """Return a host as ssh resolves it, and as we do without."""
    return resolve(alias, config=path), config._host(
        alias, ssh_config.read(alias, config=path), path
    )


FULL = """
# Of a user
SendEnv SLUICE_*
Host farm !farm2 other-*
  HostName %h.example.org
  Port 2222
  User "me too"
  IdentityFile ~/.ssh/farm
  IdentityFile "/keys/with space"
  CertificateFile /keys/%r-cert.pub
  IdentitiesOnly=yes
  IdentityAgent $SSH_AUTH_SOCK
  ProxyCommand nc -x "a b" %h %p # no comment
  UserKnownHostsFile ~/.ssh/kh "/etc/known hosts"
  GlobalKnownHostsFile none
  HostKeyAlias Farm
  StrictHostKeyChecking accept-new
  HashKnownHosts yes
  PreferredAuthentications password,publickey
  NumberOfPasswordPrompts 1
  ServerAliveInterval 1m30
  ServerAliveCountMax 5
  ConnectTimeout 10
  AddressFamily inet6
  EscapeChar ^x
  SetEnv A=1 B=2
  ForwardAgent yes
  Ciphers aes256-ctr,aes128-ctr
  Compression yes
Match all
  User nobody
  SendEnv LANG
"""


@needs_ssh
def test_all_that_is_honoured_is_read_as_ssh_reads_it(tmp_path: Path) -> None:
    ours = by_both(write(tmp_path, FULL), "farm")
    assert ours[0] == ours[1]
    host = ours[1]
    assert host.user == "me too" and host.port == 2222 and host.hostname == "farm.example.org"
    assert host.identity_files[1] == "/keys/with space"
    assert host.certificate_files == ("/keys/me too-cert.pub",)
    assert host.proxy_command == 'nc -x "a b" farm.example.org 2222 # no comment'
    assert host.user_known_hosts_files[1:] == ("/etc/known hosts",)
    assert host.global_known_hosts_files == ()
    assert host.known_as == "farm" and host.strict_host_key_checking == "accept-new"
    assert host.methods == ("password", "publickey")
    assert (host.server_alive_interval_s, host.server_alive_count_max) == (90, 5)
    assert host.escape_char == "^X"
    assert host.algorithms == {"ciphers": ("aes256-ctr", "aes128-ctr")}
    assert host.environment({"SLUICE_X": "1", "LANG": "C", "HOME": "/"}) == {
        "SLUICE_X": "1",
        "LANG": "C",
        "A": "1",
        "B": "2",
    }


@needs_ssh
def test_defaults_are_ssh_s(tmp_path: Path) -> None:
    ours = by_both(write(tmp_path, "Host x\n"), "y")
    # ssh has types of keys that are not in use here.
    assert set(ours[1].identity_files) < set(ours[0].identity_files)
    assert ours[0] == replace(ours[1], identity_files=ours[0].identity_files)
    assert ours[0].server_alive_interval_s == 15


@pytest.mark.parametrize(
    "line",
    [
        "Include other",
        "Match host farm",
        "Match tagged x",
        "Match exec true",
        "CanonicalizeHostname yes",
        "KnownHostsCommand /bin/keys",
        "RevokedHostKeys /etc/revoked",
        "ProxyUseFdpass yes",
        "Ciphers +3des-cbc",
        "Port ssh",
        "Frobnicate yes",
        "User 'x'",
        'User "x',
        "User a b",
        "User",
        "just words",
        "BatchMode perhaps",
        "ProxyCommand a\0b",
    ],
)
def test_what_cannot_be_honoured_is_refused_with_file_and_line(
    tmp_path: Path, no_ssh: None, line: str
) -> None:
    path = write(tmp_path, f"# one\nHost x\n  {line}\n")
    with pytest.raises(UserError, match=f"^{path}:3: "):
        resolve("x", config=path)
    # It does not matter where it is not meant.
    if not line.startswith(("Match", "just", "User")) and "\0" not in line:
        assert resolve("y", config=path).hostname == "y"


@needs_ssh
@pytest.mark.parametrize("line", ["KnownHostsCommand /bin/keys", "RevokedHostKeys /etc/revoked"])
def test_what_ssh_would_trust_by_and_we_cannot_names_the_other_backend(
    tmp_path: Path, line: str
) -> None:
    with pytest.raises(UserError, match='backend = "openssh"'):
        resolve("x", config=write(tmp_path, f"{line}\n"))


@needs_ssh
def test_ssh_s_own_complaint_names_file_and_line(tmp_path: Path) -> None:
    path = write(tmp_path, "Host x\n  Frobnicate yes\n")
    with pytest.raises(UserError, match=f"{path}: line 2: Bad configuration option"):
        resolve("x", config=path)
    with pytest.raises(UserError, match="there is no such ssh_config"):
        resolve("x", config=f"{path}.not")


@pytest.mark.parametrize("alias", ["", "-oProxyCommand=touch /tmp/x", "a b", "a\nb", "a\x00"])
def test_what_is_no_host_is_refused(alias: str) -> None:
    with pytest.raises(UserError, match="is not a host"):
        resolve(alias)


@pytest.mark.parametrize("by_ssh", [False, True], ids=["no ssh", "ssh"])
@pytest.mark.parametrize(
    "alias",
    [
        "$(touch${IFS}/tmp/p)",
        "a;b",
        "me@-x",
        "ssh://me@-x",
        "me@-x/y",
        "ssh://me@x/y",
        "$(id)@farm",
        "-l@farm",
        "a -x@farm",
        "a\\@farm",
    ],
)
def test_what_a_shell_would_run_is_neither_host_nor_user(
    tmp_path: Path, request: pytest.FixtureRequest, alias: str, by_ssh: bool
) -> None:
    if not by_ssh:
        request.getfixturevalue("no_ssh")
    path = write(tmp_path, "ProxyCommand nc %h %n %r\n")
    with pytest.raises(UserError, match=r"is not a (host|user)"):
        resolve(alias, config=path)


def test_a_name_or_a_user_of_the_file_is_looked_at_too(tmp_path: Path, no_ssh: None) -> None:
    with pytest.raises(UserError, match="is not a host"):
        resolve("x", config=write(tmp_path, "HostName %h;id\n"))
    with pytest.raises(UserError, match="is not a user"):
        resolve("x", config=write(tmp_path, "User `id`\n"))
    with pytest.raises(UserError, match=r"the jump .* is not a user"):
        route(resolve("x", config=write(tmp_path, "Host x\nProxyJump $(id)@y\n")))
    # What is not for a shell stays as it is.
    host = resolve(r"DOMAIN\me@fe80::1%eth0", config=write(tmp_path, ""))
    assert (host.user, host.hostname) == (r"DOMAIN\me", "fe80::1%eth0")


@needs_ssh
@pytest.mark.parametrize(
    ("value", "path"),
    [
        ("yes", "/tmp/agent"),
        ("no", ""),
        ("/run/%r/agent", "/run/me/agent"),
        ("$OTHER_AGENT", "/tmp/other"),
        ("$NO_AGENT", ""),
    ],
)
def test_the_agent_that_is_named_is_forwarded_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str, path: str
) -> None:
    monkeypatch.setenv("OTHER_AGENT", "/tmp/other")
    text = f"User me\nForwardAgent {value}\n"
    for host in by_both(write(tmp_path, text), "x"):
        assert host.forward_agent == path and host.identity_agent == "/tmp/agent"


@needs_ssh
def test_what_a_certificate_has_to_be_is_read_as_ssh_reads_it(tmp_path: Path) -> None:
    path = write(tmp_path, "CASignatureAlgorithms ssh-ed25519\nRequiredRSASize 3072\n")
    for host in by_both(path, "x"):
        assert host.algorithms == {"casignaturealgorithms": ("ssh-ed25519",)}
        assert host.required_rsa_size == 3072


def test_a_file_of_the_user_s_that_others_may_write_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_ssh: None
) -> None:
    path = write(tmp_path, "User me\n")
    monkeypatch.setattr(ssh_config, "OWN", path)
    monkeypatch.setattr(ssh_config, "FILES", (path,))
    Path(path).chmod(0o644)
    assert resolve("x").user == "me"
    for mode in (0o664, 0o646):
        Path(path).chmod(mode)
        with pytest.raises(UserError, match=f"^{path}: others may write it"):
            resolve("x")
    # As with ssh -F.
    assert resolve("x", config=path).user == "me"
    Path(path).chmod(0o644)
    monkeypatch.setattr(ssh_config.os, "getuid", lambda: 12345)
    assert ssh_config._is_writable_by_others(Path(path).stat()) == (Path(path).stat().st_uid != 0)


def test_a_strictness_that_is_not_known_asks() -> None:
    assert config._strictness("perhaps") == "ask"
    assert config._strictness("off") == "accept-new"


def test_user_and_port_may_be_in_the_name(tmp_path: Path, no_ssh: None) -> None:
    path = write(tmp_path, "User other\nPort 3\n")
    host = resolve("ssh://me@farm:44", config=path)
    assert (host.alias, host.hostname, host.user, host.port) == ("farm", "farm", "me", 44)
    host = resolve("me@farm", config=path)
    assert (host.hostname, host.user, host.port) == ("farm", "me", 3)
    host = resolve("farm", config=path, user="given", port=5)
    assert (host.hostname, host.user, host.port) == ("farm", "given", 5)


# ---- hostile ----

NOISE = [
    *('"a b"', '"', "'x'", "\\", "#", "=", ",", "a,b", "\t", "\r", "\x00", "\udcff", "é", "x", "*"),
    *(
        "none",
        "yes",
        "99999999999",
        "-1",
        "%h",
        "%C",
        "${HOME}",
        "$X",
        "~nobody-here/x",
        "^x",
        "1h2m",
    ),
]
VALUES = {
    ssh_config.YES_NO: ["yes", "no", "NO", "true"],
    ssh_config.NUMBERS: ["1", "22", "007"],
    ssh_config.TIMES: ["0", "30", "1h2m", "2D", "none"],
    ssh_config.PATHS: ["/k", "~/k", "none", "/a /b", '"/a b" /c', "/k_%h"],
    ssh_config.ALGORITHMS: ["aes128-ctr,aes256-ctr", "ssh-ed25519", "hmac-sha2-256"],
    ssh_config.LISTS: ["/k", "~/k", "A B", "-A", "LC_*", "none", "%d/%r"],
    ssh_config.WORDS: [
        "x",
        "a.B",
        "none",
        "NONE",
        '"a b"',
        "yes",
        "any",
        "%h.org",
        "^x",
        "~/s",
        "a,c",
    ],
    tuple(ssh_config.CHOICES): ["any", "INET", "yes", "no", "ask", "accept-new", "off", "unbound"],
    ("Host",): ["x", "x y", "*", "!x *", "?", "y", "X", '"x"', "x,y", "* !y"],
    ("ProxyJump",): ["a", "b@c:22,d", "none", "ssh://x"],
    ("ProxyCommand",): ["nc %h %p", "none", "a  'b' #c", "%r%%"],
    ("SetEnv",): ["A=1", "A=1 B=2", "A"],
    ("Match", "Include", "Foo", "#", ""): ["all", "host x", "/k"],
}
LINE = st.builds(
    "".join,
    st.tuples(
        st.sampled_from(["", " ", "\t"]),
        st.sampled_from(list(VALUES)).flatmap(
            lambda keywords: st.tuples(
                st.sampled_from(keywords),
                st.sampled_from([" ", " ", " ", "=", " = ", "\t", ""]),
                st.sampled_from(VALUES[keywords] * 4 + NOISE),
            ).map("".join)
        ),
        st.sampled_from([""] * 6 + [" ", " # c", "#c", " x"]),
    ),
)


@needs_ssh
@given(st.lists(LINE, min_size=1, max_size=4))
@example(["ProxyJump none", "ProxyCommand x"])
@example(["ProxyJump ssh://x"])
@example(["ProxyJump ssh://u@x:2222/,ssh://y"])
@example(["ProxyCommand none", "ProxyJump x"])
@example(["Host !x", "User y"])
@example(["ConnectTimeout none", "ConnectTimeout 30"])
@example(["ProxyCommand==", "Ciphers ,"])
@example(["IdentityFile \udcff"])
@example(["UserKnownHostsFile /a b"])
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_hostile_files_are_read_as_ssh_reads_them_or_refused(
    tmp_path: Path, lines: list[str]
) -> None:
    compare(tmp_path, lines)


def compare(folder: Path, lines: list[str]) -> None:
    """Check that a file is read as ssh reads it, or refused."""
    path = write(folder, "\n".join(lines) + "\n")
    try:
        found = ssh_config.read("x", config=path)
        ours = config._host("x", found, path)
    except UserError as error:
        assert "\n" not in str(error).strip()
        return
    # What ssh refuses may pass here where it is about what we leave out; never what we use.
    theirs = resolve_or_none(path)
    if theirs is None:
        return
    if "identityfile" not in found:
        ours = replace(ours, identity_files=theirs.identity_files)
    # Debian's ssh asks every 300 s then.
    if ours.batch_mode and "serveraliveinterval" not in found:
        ours = replace(ours, server_alive_interval_s=theirs.server_alive_interval_s)
    # ssh puts what may be an address in brackets.
    jumps = tuple(jump.replace("[", "").replace("]", "") for jump in theirs.proxy_jump)
    theirs = replace(theirs, proxy_jump=jumps)
    event("compared")
    assert ours == theirs


def resolve_or_none(path: str) -> Host | None:
    try:
        return resolve("x", config=path)
    except UserError:
        return None


@given(st.binary(max_size=200))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_read_or_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "ssh_config"
    path.write_bytes(data)
    try:
        ssh_config.read("x", config=str(path))
    except UserError as error:
        assert str(path) in str(error) or "ssh_config" in str(error)


@needs_ssh
def test_ssh_is_asked_without_a_terminal_and_runs_nothing(tmp_path: Path) -> None:
    path = write(
        tmp_path, f"ProxyCommand touch {tmp_path}/ran\nLocalCommand touch {tmp_path}/ran\n"
    )
    resolve("x", config=path)
    assert not (tmp_path / "ran").exists()
