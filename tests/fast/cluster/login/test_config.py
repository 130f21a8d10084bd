"""cluster/login/config.py: what `ssh -G` says of a host; without ssh the same, or a refusal."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cluster.login import config, plain_config
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
    """Return a host as ssh resolves it, and as we do without; but for what ssh does by default."""
    ours = config._host(alias, plain_config.read(alias, path), path)
    return replace(resolve(alias, config=path), algorithms=ours.algorithms), ours


FULL = """
# Of a user
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
  UserKnownHostsFile ~/.ssh/kh
  GlobalKnownHostsFile none
  HostKeyAlias farm
  StrictHostKeyChecking accept-new
  HashKnownHosts yes
  PreferredAuthentications password,publickey
  NumberOfPasswordPrompts 1
  ServerAliveInterval 90
  ServerAliveCountMax 5
  ConnectTimeout 10
  AddressFamily inet6
  EscapeChar ^X
  SetEnv A=1
  SendEnv SLUICE_* LANG
  ForwardAgent yes
  Ciphers aes256-ctr,aes128-ctr
  Compression yes
Host *
  User nobody
  ControlMaster auto
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
        "CanonicalizeHostname yes",
        "KnownHostsCommand /bin/keys",
        "RevokedHostKeys /etc/revoked",
        "BindAddress 127.0.0.2",
        "ProxyUseFdpass yes",
        "Frobnicate yes",
        "User 'x'",
        'User "x',
        "User x # a comment",
        "User",
        "just words",
        "SendEnv A\nSendEnv B",
    ],
)
def test_what_cannot_be_honoured_is_refused_with_file_and_line(
    tmp_path: Path, no_ssh: None, line: str
) -> None:
    path = write(tmp_path, f"# one\nHost x\n  {line}\n")
    number = 3 + line.count("\n")
    with pytest.raises(UserError, match=f"^{path}:{number}: .* without the ssh command"):
        resolve("x", config=path)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("Port ssh", "port ssh: is not a number"),
        ("ServerAliveInterval 1m", "serveraliveinterval 1m: is not a number"),
        ("ProxyCommand nc %C", "nc %C %C: is not supported; write it out"),
        ("UserKnownHostsFile known", "userknownhostsfile known: use a path"),
    ],
)
def test_a_value_that_cannot_be_honoured_is_refused(
    tmp_path: Path, no_ssh: None, line: str, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        resolve("x", config=write(tmp_path, f"{line}\n"))


@needs_ssh
@pytest.mark.parametrize(
    "line",
    ["KnownHostsCommand /bin/keys", "RevokedHostKeys /etc/revoked", "BindAddress 127.0.0.2"],
)
def test_what_ssh_would_do_and_we_cannot_names_the_other_backend(tmp_path: Path, line: str) -> None:
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
        ("none", ""),
        ("SSH_AUTH_SOCK", "/tmp/agent"),
        ("/run/%r/agent", "/run/me/agent"),
        ("$OTHER_AGENT", "/tmp/other"),
        ("$NO_AGENT", ""),
    ],
)
def test_the_agent_that_is_named_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str, path: str
) -> None:
    monkeypatch.setenv("OTHER_AGENT", "/tmp/other")
    text = f"User me\nIdentityAgent {value}\n"
    for host in by_both(write(tmp_path, text), "x"):
        assert host.identity_agent == path


def test_a_file_of_the_user_s_that_others_may_write_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_ssh: None
) -> None:
    path = write(tmp_path, "User me\n")
    monkeypatch.setattr(plain_config, "OWN", path)
    monkeypatch.setattr(plain_config, "FILES", (path,))
    Path(path).chmod(0o644)
    assert resolve("x").user == "me"
    for mode in (0o664, 0o646):
        Path(path).chmod(mode)
        with pytest.raises(UserError, match=f"^{path}: others can write to it"):
            resolve("x")
    # As with ssh -F.
    assert resolve("x", config=path).user == "me"


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


@needs_ssh
def test_ssh_is_asked_without_a_terminal_and_runs_nothing(tmp_path: Path) -> None:
    path = write(
        tmp_path, f"ProxyCommand touch {tmp_path}/ran\nLocalCommand touch {tmp_path}/ran\n"
    )
    resolve("x", config=path)
    assert not (tmp_path / "ran").exists()
