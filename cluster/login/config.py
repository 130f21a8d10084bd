"""What the configuration of OpenSSH says about a host, as `ssh -G` resolves it."""

from __future__ import annotations

import os
import pwd
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from cluster.login import plain_config
from cluster.login.settings import Settings, Values, by_ssh
from cluster.login.transport import OPENSSH
from runfolder.errors import UserError, printable

# ServerAliveInterval 0 means never, and a laptop that was moved would wait forever.
ALIVE_INTERVAL_S = 15
METHODS = ("publickey", "keyboard-interactive", "password")
IDENTITIES = ("~/.ssh/id_rsa", "~/.ssh/id_ecdsa", "~/.ssh/id_ed25519")
USER_KNOWN_HOSTS = "~/.ssh/known_hosts ~/.ssh/known_hosts2"
GLOBAL_KNOWN_HOSTS = "/etc/ssh/ssh_known_hosts /etc/ssh/ssh_known_hosts2"
PUBKEYS = "pubkeyacceptedalgorithms"
ALGORITHMS = ("kexalgorithms", "hostkeyalgorithms", "ciphers", "macs", PUBKEYS)
# As ssh accepts it: user@host, or a URI; and as ProxyJump does, with a port.
DESTINATION = re.compile(
    r"(?:ssh://)?(?:(?P<user>.+)@)?(?P<host>\[[^\[\]]+\]|[^\[\]:@/]+)(?::(?P<port>[0-9]{1,5}))?/?"
)
# What a shell would interpret as more than a name, in %h, %n and %r of a ProxyCommand
# (valid_hostname and valid_ruser of OpenSSH 9.6, which older releases lack).
BAD_HOST = re.compile(r"^-|[\s\x00-\x1f\x7f'`\"$\\;&<>|(){}]")
BAD_USER = re.compile(r"^-|[\x00-\x1f\x7f'`\";&<>|(){}]|\s-|\\\Z")
# Keywords that change whom to trust, or how to connect, and are not supported here.
REFUSED = dict.fromkeys(
    ("knownhostscommand", "revokedhostkeys", "bindaddress", "bindinterface"), "none"
)
REFUSED |= {"proxyusefdpass": "no"}


@dataclass(frozen=True, kw_only=True)
class Host:
    """A host, with all that decides how it is reached and identified."""

    alias: str
    hostname: str
    port: int = 22
    user: str
    config: str = ""
    """The file that was read instead of ~/.ssh/config; jumps are looked up in it, too."""

    identity_files: tuple[str, ...] = ()
    certificate_files: tuple[str, ...] = ()
    identities_only: bool = False
    identity_agent: str = ""
    """The agent's socket; empty without an agent."""
    methods: tuple[str, ...] = METHODS
    """Those of publickey, keyboard-interactive and password that may be used, in this order."""
    batch_mode: bool = False

    proxy_jump: tuple[str, ...] = ()
    """[user@]host[:port], in order."""
    proxy_command: str = ""

    user_known_hosts_files: tuple[str, ...] = ()
    """A new key is added to the first."""
    global_known_hosts_files: tuple[str, ...] = ()
    host_key_alias: str = ""
    strict_host_key_checking: str = "ask"
    """yes, ask or accept-new."""
    hash_known_hosts: bool = False
    required_rsa_size: int = 1024
    """In bits."""

    forwards_agent: bool = False
    server_alive_interval_s: float = ALIVE_INTERVAL_S
    server_alive_count_max: int = 3
    connect_timeout_s: int | None = None
    address_family: str = "any"
    escape_char: str = "~"
    """One character, as ^X if it is a control character; "none" without one."""
    send_env: tuple[str, ...] = ()
    set_env: Mapping[str, str] = field(default_factory=dict)
    algorithms: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By ssh_config's keyword in lower case: those that ssh would use."""
    remote_command: str = ""

    @property
    def known_as(self) -> str:
        """Its name in known_hosts: host, [host]:port or the alias for its key."""
        if self.host_key_alias:
            return self.host_key_alias.lower()
        name = self.hostname.lower()
        return name if self.port == 22 else f"[{name}]:{self.port}"

    def environment(self, ours: Mapping[str, str]) -> dict[str, str]:
        """Return what SendEnv allows of `ours`, and SetEnv's; the server may accept none."""
        sent = {x: y for x, y in ours.items() if any(fnmatchcase(x, p) for p in self.send_env)}
        return sent | dict(self.set_env)


def resolve(alias: str, *, user: str = "", port: int = 0, config: str = "") -> Host:
    """Return what OpenSSH's configuration says about a host.

    Args:
        alias: a Host of ssh_config, a name, an address; user@host, ssh://user@host:port too.
        user, port: instead of what ssh_config says, unless empty.
        config: a file instead of ~/.ssh/config and /etc/ssh/ssh_config.

    Raises:
        UserError: the configuration is wrong, or not supported.
    """
    if found := DESTINATION.fullmatch(alias):
        alias, user = found["host"].strip("[]"), user or found["user"] or ""
        port = port or int(found["port"] or 0)
    elif "@" in alias and not alias.startswith("ssh://"):
        # An IPv6 address without its brackets.
        before, _, alias = alias.rpartition("@")
        user = user or before
    # Before ssh -G sees them, too: a Match exec would put them in its command.
    _refuse_unsafe(alias, user)
    if config and not Path(config).is_file():
        raise UserError(f"{config}: there is no such ssh_config; see config in [ssh] of site.toml")
    if shutil.which("ssh"):
        options = ["-F", config] if config else []
        options += ["-l", user] if user else []
        options += ["-p", str(port)] if port else []
        settings = by_ssh(options, alias)
    else:
        settings = plain_config.read(alias, config)
        settings |= {"user": [user]} if user else {}
        settings |= {"port": [str(port)]} if port else {}
    return _host(alias, settings, config)


def _refuse_unsafe(name: str, user: str) -> None:
    if not name or BAD_HOST.search(name) or name.startswith("ssh://"):
        raise UserError(
            f"'{printable(name)}' is not a host; use a name, an address, or a Host of ssh"
        )
    if BAD_USER.search(user):
        raise UserError(
            f"'{printable(user)}' is not a user; a shell would interpret it as more than a name"
        )


def _host(alias: str, settings: Settings, config: str) -> Host:
    """Return the host that these settings, in the words of `ssh -G`, describe."""
    said = Values(alias, settings)
    for key, harmless in REFUSED.items():
        if (value := settings.get(key, [harmless])[0]).lower() != harmless:
            raise said.wrong(key, value, f"is not supported; {OPENSSH}")
    hostname, port = said.one("hostname", alias), said.number("port", 22)
    here = pwd.getpwuid(os.getuid())
    user = said.one("user", here.pw_name)
    _refuse_unsafe(hostname, user)
    tokens = {"%": "%", "d": here.pw_dir, "h": hostname, "i": str(here.pw_uid), "n": alias}
    said.tokens = tokens | {"p": str(port), "r": user, "u": here.pw_name}
    jump = said.one("proxyjump")
    alive_interval_s = said.number("serveraliveinterval", 0)
    escape = settings.get("escapechar", ["~"])[0]
    return Host(
        alias=alias,
        hostname=hostname,
        port=port,
        user=user,
        config=config,
        identity_files=tuple(map(said.path, said.all("identityfile", IDENTITIES))),
        certificate_files=tuple(map(said.path, said.all("certificatefile"))),
        identities_only=said.is_on("identitiesonly"),
        identity_agent=said.agent(),
        methods=_methods(said),
        batch_mode=said.is_on("batchmode"),
        proxy_jump=tuple(part.strip() for part in jump.split(",") if part.strip()),
        proxy_command="" if jump else said.expand(said.one("proxycommand")),
        user_known_hosts_files=said.files("userknownhostsfile", USER_KNOWN_HOSTS),
        global_known_hosts_files=said.files("globalknownhostsfile", GLOBAL_KNOWN_HOSTS),
        host_key_alias=said.one("hostkeyalias"),
        strict_host_key_checking=_strictness(said.one("stricthostkeychecking", "ask")),
        hash_known_hosts=said.is_on("hashknownhosts"),
        required_rsa_size=said.number("requiredrsasize", 1024),
        forwards_agent=said.is_on("forwardagent"),
        server_alive_interval_s=alive_interval_s or ALIVE_INTERVAL_S,
        # If the user sets no interval, the count means nothing.
        server_alive_count_max=said.number("serveralivecountmax", 3) if alive_interval_s else 3,
        connect_timeout_s=said.number("connecttimeout", 0) or None,
        address_family=said.one("addressfamily", "any").lower(),
        # ssh prints a control character with a backslash before it, and a backslash twice.
        escape_char=escape.removeprefix("\\") or escape,
        send_env=tuple(word for line in said.all("sendenv") for word in line.split()),
        set_env=dict(line.split("=", 1) for line in said.all("setenv") if "=" in line),
        algorithms={
            key: tuple(settings[key][0].split(",")) for key in ALGORITHMS if key in settings
        },
        remote_command=said.expand(said.one("remotecommand")),
    )


def _methods(said: Values) -> tuple[str, ...]:
    order = said.one("preferredauthentications", ",".join(METHODS)).split(",")
    allowed = {
        # Also "unbound" and "host-bound", which only concern an agent's restrictions.
        "publickey": said.is_on("pubkeyauthentication", "yes"),
        "keyboard-interactive": said.is_on("kbdinteractiveauthentication", "yes"),
        "password": said.is_on("passwordauthentication", "yes"),
    }
    return tuple(method for method in map(str.strip, order) if allowed.get(method))


def _strictness(value: str) -> str:
    if value.lower() in ("yes", "true"):
        return "yes"
    # "no" would accept a changed key. Only new keys are accepted.
    return "accept-new" if value.lower() in ("no", "false", "off", "accept-new") else "ask"
