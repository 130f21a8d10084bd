"""What ssh_config says of a host: as `ssh -G` resolves it, or by our own strict reading."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast

from cluster.login import patterns, ssh_config, tokens
from cluster.login.ssh_config import Settings
from runfolder.errors import UserError, printable

# `Match exec` and the names of a canonical host may ask the network.
TIMEOUT_S = 60
OPENSSH = 'set backend = "openssh" in [ssh] of site.toml, which takes the ssh command'
# ServerAliveInterval 0 means never, and a laptop that was moved would wait for ever.
ALIVE_INTERVAL_S = 15
METHODS = ("publickey", "keyboard-interactive", "password")
# In OpenSSH's order, without the types that it has and we cannot use.
IDENTITIES = ("~/.ssh/id_rsa", "~/.ssh/id_ecdsa", "~/.ssh/id_ed25519")
USER_KNOWN_HOSTS = "~/.ssh/known_hosts ~/.ssh/known_hosts2"
GLOBAL_KNOWN_HOSTS = "/etc/ssh/ssh_known_hosts /etc/ssh/ssh_known_hosts2"
ALGORITHMS = (
    "kexalgorithms",
    "hostkeyalgorithms",
    "ciphers",
    "macs",
    "pubkeyacceptedalgorithms",
    "casignaturealgorithms",
)
# As ssh takes it: user@host, or a URI.
DESTINATION = (
    r"(?P<scheme>ssh://)?(?:(?P<user>.+)@)?(?P<host>\[[^\[\]]+\]|[^\[\]:@/]+)"
    r"(?(scheme)(?::(?P<port>[0-9]{1,5}))?/?)"
)
# In bits, as OpenSSH's own.
REQUIRED_RSA_SIZE = 1024
# What a shell would take for more than a name, in a ProxyCommand's %h, %n and %r (valid_hostname
# and valid_ruser of OpenSSH 9.6, which older releases lack).
BAD_HOST = re.compile(r"^-|[\s\x00-\x1f\x7f'`\"$\\;&<>|(){}]")
BAD_USER = re.compile(r"^-|[\x00-\x1f\x7f'`\";&<>|(){}]|\s-|\\\Z")
# What would change whom we trust, or which way we go, and is not done here.
REFUSED = {
    "knownhostscommand": "none",
    "revokedhostkeys": "none",
    "bindinterface": "none",
    "proxyusefdpass": "no",
}


@dataclass(frozen=True, kw_only=True)
class Host:
    """A host, with all that decides how it is reached and whom it is believed to be."""

    alias: str
    """The name that was asked for."""
    hostname: str
    """The name or address that is connected to."""
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
    """Of publickey, keyboard-interactive and password those that may be used, in this order."""
    number_of_password_prompts: int = 3
    batch_mode: bool = False
    """Nothing is asked."""

    proxy_jump: tuple[str, ...] = ()
    """[user@]host[:port], the first first."""
    proxy_command: str = ""
    """For a shell; its tokens are expanded."""

    user_known_hosts_files: tuple[str, ...] = ()
    global_known_hosts_files: tuple[str, ...] = ()
    host_key_alias: str = ""
    strict_host_key_checking: Literal["yes", "ask", "accept-new"] = "ask"
    hash_known_hosts: bool = False
    required_rsa_size: int = REQUIRED_RSA_SIZE
    """In bits: an RSA key of a host, or of an authority, that is shorter is not believed."""

    forward_agent: str = ""
    """The socket of the agent that the far side may use; empty for none."""
    server_alive_interval_s: int = ALIVE_INTERVAL_S
    server_alive_count_max: int = 3
    connect_timeout_s: int | None = None
    """None: as long as the system tries."""
    address_family: Literal["any", "inet", "inet6"] = "any"
    bind_address: str = ""
    tcp_keep_alive: bool = True
    compression: bool = False
    escape_char: str = "~"
    """One character, as ^X if it is a control character; "none" without one."""
    send_env: tuple[str, ...] = ()
    """Patterns of variables."""
    set_env: Mapping[str, str] = field(default_factory=dict)
    algorithms: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By ssh_config's name in lower case, for those that the user restricts."""
    remote_command: str = ""
    """What runs in a session that is given no command; empty: the login shell."""
    lacking: tuple[str, ...] = ()
    """What the user has set up for the sign-in and only the ssh command can do."""

    @property
    def known_as(self) -> str:
        """The name under which known_hosts has it: host, [host]:port or the alias for its key."""
        if self.host_key_alias:
            return self.host_key_alias.lower()
        name = self.hostname.lower()
        return name if self.port == 22 else f"[{name}]:{self.port}"

    def environment(self, ours: Mapping[str, str]) -> dict[str, str]:
        """Return the variables for a session: those of `ours` that SendEnv lets pass, and SetEnv's.

        A server takes only what its AcceptEnv names, so each of them may come to nothing.
        """
        wanted = [name.encode(errors="surrogateescape") for name in self.send_env]
        sent = {
            name: value
            for name, value in ours.items()
            if any(patterns.matches(name.encode(errors="surrogateescape"), one) for one in wanted)
        }
        return sent | dict(self.set_env)


def resolve(alias: str, *, user: str = "", port: int = 0, config: str = "") -> Host:
    """Return what OpenSSH's configuration says of a host.

    Args:
        alias: a Host of ssh_config, a name, an address; user@host and ssh://user@host:port too.
        user: instead of what ssh_config says.
        port: instead of what ssh_config says; 0 leaves it.
        config: a file instead of ~/.ssh/config and /etc/ssh/ssh_config.

    Raises:
        UserError: the configuration is wrong, or says what we cannot do.
    """
    found = re.fullmatch(DESTINATION, alias)
    if found is not None:
        alias, user = found["host"].strip("[]"), user or found["user"] or ""
        port = port or int(found["port"] or 0)
    elif alias.startswith("ssh://"):
        raise UserError(f"'{printable(alias)}' is not a host; make it ssh://[user@]host[:port]")
    elif "@" in alias:
        # An address of IPv6 without its brackets.
        before, _, alias = alias.rpartition("@")
        user = user or before
    # Before ssh -G sees them, too: a Match exec would have them in its command.
    _refuse_unsafe(alias, user)
    if config and not Path(config).is_file():
        raise UserError(f"{config}: there is no such ssh_config; see config in [ssh] of site.toml")
    if shutil.which("ssh"):
        settings = _by_ssh(alias, user, port, config)
        # What ssh would do without any configuration is no restriction of the user's.
        plain = _by_ssh("x", "", 0, "none")
        settings = {
            key: value
            for key, value in settings.items()
            if key not in ALGORITHMS or value != plain.get(key)
        }
    else:
        settings = ssh_config.read(alias, user=user, port=port, config=config)
    return _host(alias, settings, config)


def _refuse_unsafe(name: str, user: str) -> None:
    if not name or BAD_HOST.search(name):
        raise UserError(
            f"'{printable(name)}' is not a host; make it a name, an address, or a Host of ssh"
        )
    if BAD_USER.search(user):
        raise UserError(
            f"'{printable(user)}' is not a user; a shell would take it for more than a name"
        )


def _by_ssh(alias: str, user: str, port: int, config: str) -> Settings:
    options = ["-F", config] if config else []
    options += ["-l", user] if user else []
    options += ["-p", str(port)] if port else []
    try:
        done = subprocess.run(
            ["ssh", "-T", "-G", *options, "--", alias],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            # A file's name may be any bytes.
            errors="surrogateescape",
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"ssh -G {alias} had no answer for {TIMEOUT_S} s; a Match exec in ssh_config may hang"
        ) from None
    if done.returncode != 0:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise UserError(
            f"ssh -G {alias}: {said[0] if said else f'exit code {done.returncode}'}; "
            "put ssh_config right"
        )
    found: Settings = {}
    for line in done.stdout.splitlines():
        key, _, value = line.partition(" ")
        found.setdefault(key, []).append(value)
    return found


def _host(alias: str, settings: Settings, config: str) -> Host:
    """Return the host that these settings, in the words of `ssh -G`, describe."""

    def one(key: str, default: str = "") -> str:
        value = settings.get(key, [default])[0]
        return default if value.lower() == "none" else value

    def yes(key: str, default: str = "no") -> bool:
        return one(key, default).lower() in ("yes", "true")

    def number(key: str, default: int) -> int:
        value = one(key, str(default))
        if not value.isdecimal():
            raise UserError(f"ssh_config for {alias}: {key} {value}: is not a number")
        return int(value)

    for key, harmless in REFUSED.items():
        if settings.get(key, [harmless])[0].lower() != harmless:
            raise UserError(f"ssh_config for {alias}: {key} is not supported; {OPENSSH}")

    hostname = one("hostname", alias)
    port = number("port", 22)
    user = one("user", pwd.getpwuid(os.getuid()).pw_name)
    _refuse_unsafe(hostname, user)
    jump = one("proxyjump")
    stand_for = tokens.of(
        alias=one("host", alias),
        hostname=hostname,
        port=port,
        user=user,
        key_alias=one("hostkeyalias"),
        jump=jump,
    )

    def path(value: str) -> str:
        return tokens.path(value, stand_for)

    def files(key: str, default: str) -> tuple[str, ...]:
        return tuple(map(path, _split_paths(settings.get(key, [default])[0], key)))

    identity_agent = _agent(settings.get("identityagent", ["SSH_AUTH_SOCK"])[0], stand_for)
    alive_interval_s = number("serveraliveinterval", 0)
    return Host(
        alias=alias,
        hostname=hostname,
        port=port,
        user=user,
        config=config,
        identity_files=_unique(map(path, _named(settings.get("identityfile", IDENTITIES)))),
        certificate_files=_unique(map(path, _named(settings.get("certificatefile", ())))),
        identities_only=yes("identitiesonly"),
        identity_agent=identity_agent,
        methods=_methods(one, yes),
        number_of_password_prompts=number("numberofpasswordprompts", 3),
        batch_mode=yes("batchmode"),
        # `ssh -G` writes only the last of them without its ssh://.
        proxy_jump=tuple(
            re.sub("^ssh://(.*?)/?$", r"\1", part.strip())
            for part in jump.split(",")
            if part.strip()
        ),
        proxy_command="" if jump else tokens.expand(one("proxycommand"), stand_for),
        user_known_hosts_files=files("userknownhostsfile", USER_KNOWN_HOSTS),
        global_known_hosts_files=files("globalknownhostsfile", GLOBAL_KNOWN_HOSTS),
        host_key_alias=one("hostkeyalias"),
        strict_host_key_checking=_strictness(one("stricthostkeychecking", "ask")),
        hash_known_hosts=yes("hashknownhosts"),
        required_rsa_size=number("requiredrsasize", REQUIRED_RSA_SIZE),
        forward_agent=_forwarded(one("forwardagent", "no"), identity_agent, stand_for),
        server_alive_interval_s=alive_interval_s or ALIVE_INTERVAL_S,
        # Without an interval of the user's the count means nothing.
        server_alive_count_max=number("serveralivecountmax", 3) if alive_interval_s else 3,
        connect_timeout_s=number("connecttimeout", 0) or None,
        address_family=_address_family(one("addressfamily", "any")),
        bind_address=one("bindaddress"),
        tcp_keep_alive=yes("tcpkeepalive", "yes"),
        compression=yes("compression"),
        escape_char=_escape_char(settings.get("escapechar", ["~"])[0]),
        send_env=tuple(word for line in settings.get("sendenv", ()) for word in line.split()),
        set_env=_assignments(settings.get("setenv", ())),
        algorithms={name: tuple(one(name).split(",")) for name in ALGORITHMS if name in settings},
        remote_command=tokens.expand(one("remotecommand"), stand_for),
        lacking=_lacking(one, yes),
    )


def _escape_char(value: str) -> str:
    # ssh prints a control character with a backslash before it, and a backslash twice.
    character = value.removeprefix("\\") or value
    return character.upper() if character.startswith("^") else character


def _named(values: Iterable[str]) -> Iterable[str]:
    return (value for value in values if value.lower() != "none")


def _unique(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(values))


def _split_paths(line: str, key: str) -> list[str]:
    """Return the files of a line in which `ssh -G` has left out the quotes.

    Files are named from the root, so that what is not belongs to the name before it.
    """
    names: list[str] = []
    for word in line.split(" "):
        if word.startswith(("/", "~")) or word.lower() == "none":
            names.append(word)
        elif names:
            names[-1] += f" {word}"
        elif word:
            raise UserError(f"ssh_config: {key} {line}: name the file from the root or from ~")
    return [name.rstrip() for name in names if name.lower() != "none"]


def _agent(value: str, stand_for: Mapping[str, str]) -> str:
    if value.lower() == "none":
        return ""
    if value == "SSH_AUTH_SOCK":
        return os.environ.get("SSH_AUTH_SOCK", "")
    # $NAME is a variable that holds the socket's path, and may be unset.
    if re.fullmatch(r"\$\w+", value):
        return os.environ.get(value[1:], "")
    return tokens.path(value, stand_for)


def _forwarded(value: str, identity_agent: str, stand_for: Mapping[str, str]) -> str:
    if value.lower() in ("no", "false"):
        return ""
    # A path, or a variable that has one, is of an agent that was started for the far side.
    is_ours = value.lower() in ("yes", "true")
    return identity_agent if is_ours else _agent(value, stand_for)


def _methods(one: Callable[[str, str], str], yes: Callable[[str, str], bool]) -> tuple[str, ...]:
    order = one("preferredauthentications", ",".join(METHODS)).split(",")
    allowed = {
        # Also "unbound" and "host-bound", which only concern an agent's restrictions.
        "publickey": one("pubkeyauthentication", "yes").lower() not in ("no", "false"),
        "keyboard-interactive": yes("kbdinteractiveauthentication", "yes"),
        "password": yes("passwordauthentication", "yes"),
    }
    return tuple(method for method in map(str.strip, order) if allowed.get(method))


def _strictness(value: str) -> Literal["yes", "ask", "accept-new"]:
    known = {"true": "yes", "yes": "yes", "accept-new": "accept-new"}
    # "no" would go on with a changed key. Only what is new is let pass.
    known |= dict.fromkeys(("no", "false", "off"), "accept-new")
    return cast(Literal["yes", "ask", "accept-new"], known.get(value.lower(), "ask"))


def _address_family(value: str) -> Literal["any", "inet", "inet6"]:
    word = value.lower()
    return cast(Literal["any", "inet", "inet6"], word if word in ("inet", "inet6") else "any")


def _assignments(lines: Iterable[str]) -> dict[str, str]:
    pairs = (line.partition("=") for line in lines)
    return {name: value for name, equals, value in pairs if equals}


def _lacking(one: Callable[[str, str], str], yes: Callable[[str, str], bool]) -> tuple[str, ...]:
    lacking = []
    if yes("gssapiauthentication", "no"):
        lacking.append("Kerberos (GSSAPIAuthentication)")
    if yes("hostbasedauthentication", "no"):
        lacking.append("HostbasedAuthentication")
    if one("pkcs11provider", ""):
        lacking.append("smart cards (PKCS11Provider)")
    return tuple(lacking)
