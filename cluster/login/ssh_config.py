"""ssh_config read without the ssh command: all that we can honour, a refusal of all else.

Paramiko's parser takes a Match that it does not know for true, leaves Include out, and keeps one of
several SendEnv lines. Here, a line that is not understood to the end is an error that names it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from cluster.login import patterns, tokens
from runfolder.errors import UserError

Settings = dict[str, list[str]]
"""In the words of `ssh -G`: keywords in lower case, each with its values in their order."""

OWN = "~/.ssh/config"
FILES = (OWN, "/etc/ssh/ssh_config")
INSTALL = "install the ssh command, which reads it, or leave it out"
# Those of which each line adds to the ones before.
LISTS = ("identityfile", "certificatefile", "sendenv")
YES_NO = (
    "batchmode",
    "compression",
    "gssapiauthentication",
    "hashknownhosts",
    "hostbasedauthentication",
    "identitiesonly",
    "kbdinteractiveauthentication",
    "passwordauthentication",
    "tcpkeepalive",
)
NUMBERS = ("port", "numberofpasswordprompts", "requiredrsasize", "serveralivecountmax")
TIMES = ("connecttimeout", "serveraliveinterval")
WORDS = (
    "bindaddress",
    "escapechar",
    "forwardagent",
    "hostkeyalias",
    "hostname",
    "identityagent",
    "pkcs11provider",
    "preferredauthentications",
    "user",
)
PATHS = ("userknownhostsfile", "globalknownhostsfile")
ALGORITHMS = (
    "casignaturealgorithms",
    "ciphers",
    "hostkeyalgorithms",
    "kexalgorithms",
    "macs",
    "pubkeyacceptedalgorithms",
)
# What is about other things than the way to a host and who it is: forwardings, sharing, looks.
# Or what makes OpenSSH trust more than we do without it.
OF_NO_MATTER = (
    "addkeystoagent",
    "canonicaldomains",
    "canonicalizefallbacklocal",
    "canonicalizemaxdots",
    "checkhostip",
    "clearallforwardings",
    "connectionattempts",
    "controlmaster",
    "controlpath",
    "controlpersist",
    "dynamicforward",
    "enableescapecommandline",
    "exitonforwardfailure",
    "fingerprinthash",
    "forwardx11",
    "forwardx11timeout",
    "forwardx11trusted",
    "gatewayports",
    "gssapidelegatecredentials",
    "ipqos",
    "localcommand",
    "localforward",
    "loglevel",
    "logverbose",
    "nohostauthenticationforlocalhost",
    "permitlocalcommand",
    "permitremoteopen",
    "rekeylimit",
    "remoteforward",
    "requesttty",
    "securitykeyprovider",
    "streamlocalbindmask",
    "streamlocalbindunlink",
    "syslogfacility",
    "tunnel",
    "tunneldevice",
    "updatehostkeys",
    "verifyhostkeydns",
    "visualhostkey",
    "xauthlocation",
)
OTHER_NAMES = {
    "challengeresponseauthentication": "kbdinteractiveauthentication",
    "pubkeyacceptedkeytypes": "pubkeyacceptedalgorithms",
}
CHOICES = {
    "addressfamily": ("any", "inet", "inet6"),
    "pubkeyauthentication": ("yes", "no", "true", "false", "unbound", "host-bound"),
    "stricthostkeychecking": ("yes", "no", "true", "false", "off", "ask", "accept-new"),
}
UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


def read(alias: str, *, user: str = "", port: int = 0, config: str = "") -> Settings:
    """Return what the files say of a host; see `config.resolve`.

    Raises:
        UserError: a line cannot be honoured; names file and line.
    """
    found: Settings = {"host": [alias]}
    if user:
        found["user"] = [user]
    if port:
        found["port"] = [str(port)]
    for file in [config] if config else FILES:
        path = Path(tokens.home(file))
        try:
            with path.open(errors="surrogateescape") as stream:
                # As ssh, which looks at this file only: what it says runs as the user.
                if file == OWN and not config and _is_writable_by_others(os.fstat(stream.fileno())):
                    raise UserError(
                        f"{path}: others may write it; it has to be yours alone: chmod go-w {path}"
                    )
                text = stream.read()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
        _take(found, path, text, alias)
    name = tokens.expand(found.get("hostname", ["%h"])[0], {"%": "%", "h": alias})
    found["hostname"] = [name.lower()]
    return found


def _is_writable_by_others(found: os.stat_result) -> bool:
    return found.st_uid not in (0, os.getuid()) or bool(found.st_mode & 0o022)


def _take(found: Settings, path: Path, text: str, alias: str) -> None:
    """Add what a file says; what was said before stays."""
    is_active = True
    for number, line in enumerate(text.split("\n"), 1):
        line = line.strip(" \t\r")
        if not line or line.startswith("#"):
            continue
        try:
            if "\0" in line:
                raise ValueError("there is a zero byte in it")
            keyword, rest = _split(line)
            if keyword == "host":
                names = [word.encode(errors="surrogateescape") for word in _words(rest)]
                is_active = patterns.matches_any(alias.encode(errors="surrogateescape"), names)
            elif keyword == "match":
                if [word.lower() for word in _words(rest)] != ["all"]:
                    raise ValueError("Match is not understood without the ssh command")
                is_active = True
            elif is_active:
                _add(found, keyword, rest)
        except ValueError as error:
            raise UserError(f"{path}:{number}: {error}; {INSTALL}") from None


def _split(line: str) -> tuple[str, str]:
    found = re.fullmatch(r"([A-Za-z0-9]+)(?:[ \t]*=[ \t]*|[ \t]+)(.+)", line)
    if found is None or found[2].startswith("="):
        raise ValueError(f"'{line}' is not understood")
    keyword = found[1].lower()
    return OTHER_NAMES.get(keyword, keyword), found[2]


def _words(rest: str) -> list[str]:
    """Return the words of a line; quotes only around a whole word, and no backslashes."""
    words = []
    left = rest
    while left and not left.startswith("#"):
        found = re.match(r'(?:"([^"\\]*)"|([^\s"\'\\]+))(?:[ \t]+|$)', left)
        if found is None or not (found[1] or found[2]):
            raise ValueError(f"'{rest}' is not understood")
        words.append(found[1] or found[2])
        left = left[found.end() :]
    if not words:
        raise ValueError("a value is missing")
    return words


def _add(found: Settings, keyword: str, rest: str) -> None:
    if keyword in OF_NO_MATTER:
        return
    if keyword == "proxycommand":
        if found.get("proxyjump", ["none"])[0].lower() == "none":
            found.setdefault(keyword, [rest])
        return
    if keyword == "proxyjump":
        if not re.fullmatch(r"[^\s\"'#]+", rest):
            raise ValueError(f"'{rest}' is not understood")
        if "proxycommand" not in found:
            found.setdefault(keyword, [rest])
        return
    words = _words(rest)
    if keyword == "sendenv":
        for word in words:
            _send(found.setdefault(keyword, []), word)
        return
    if keyword in ("setenv", *PATHS):
        found.setdefault(keyword, words if keyword == "setenv" else [" ".join(words)])
        return
    if len(words) > 1:
        raise ValueError(f"'{rest}' is not understood")
    value = _value(keyword, words[0])
    if keyword in TIMES and value == "none":
        # A later line may still say something.
        return
    if keyword in LISTS:
        if value not in found.setdefault(keyword, []):
            found[keyword].append(value)
    else:
        found.setdefault(keyword, [value])


def _send(names: list[str], word: str) -> None:
    """Take a pattern of SendEnv up; one with a - takes back those that it matches."""
    if not word.startswith("-"):
        names.append(word)
        return
    taken_back = word[1:].encode(errors="surrogateescape")
    names[:] = [
        name
        for name in names
        if not patterns.matches(name.encode(errors="surrogateescape"), taken_back)
    ]


def _value(keyword: str, word: str) -> str:
    """Return a value in the words of `ssh -G`."""
    lower = word.lower()
    if keyword in YES_NO:
        if lower not in ("yes", "no", "true", "false"):
            raise ValueError(f"{keyword} {word}: is neither yes nor no")
        return "yes" if lower in ("yes", "true") else "no"
    if keyword in NUMBERS:
        if not re.fullmatch(r"[0-9]{1,9}", word) or (
            keyword == "port" and not 0 < int(word) < 65536
        ):
            raise ValueError(f"{keyword} {word}: is no number that it takes")
        return str(int(word))
    if keyword in TIMES:
        return "none" if lower == "none" else str(_seconds(keyword, lower))
    if keyword in ALGORITHMS:
        if not re.fullmatch(r"[a-z0-9][a-z0-9@.-]*(,[a-z0-9][a-z0-9@.-]*)*", word):
            raise ValueError(f"{keyword} {word}: is not understood without the ssh command")
        return word
    if keyword == "escapechar" and not re.fullmatch(r"none|\^?[!-~]", word):
        raise ValueError(f"{keyword} {word}: is not understood without the ssh command")
    choices = CHOICES.get(keyword)
    if choices is not None:
        if lower not in choices:
            raise ValueError(f"{keyword} {word}: is none of {', '.join(choices)}")
        return lower
    if keyword in LISTS or keyword in WORDS:
        return lower if keyword == "hostkeyalias" else word
    raise ValueError(f"{keyword} is not understood without the ssh command")


def _seconds(keyword: str, word: str) -> int:
    if not re.fullmatch(r"([0-9]{1,6}[smhdw]?)+", word):
        raise ValueError(f"{keyword} {word}: is no time")
    return sum(int(count) * UNITS[unit] for count, unit in re.findall(r"([0-9]+)([smhdw]?)", word))
