"""ssh_config without the ssh command: Paramiko's parser for plain files; all else is refused.

Paramiko treats a Match that it does not know as true, ignores Include, keeps one of several SendEnv
lines, and reads a comment after a value as part of it. So each line is checked first.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import paramiko

from cluster.login.settings import Settings
from runfolder.errors import UserError

OWN = "~/.ssh/config"
FILES = (OWN, "/etc/ssh/ssh_config")
# The keywords that config.py uses.
HONOURED = """
addressfamily batchmode certificatefile ciphers connecttimeout escapechar forwardagent
globalknownhostsfile hashknownhosts host hostkeyalgorithms hostkeyalias hostname identitiesonly
identityagent identityfile kbdinteractiveauthentication kexalgorithms macs passwordauthentication
port preferredauthentications proxycommand proxyjump pubkeyauthentication remotecommand
requiredrsasize sendenv serveralivecountmax serveraliveinterval setenv stricthostkeychecking user
userknownhostsfile
"""
# Keywords that do not affect how a host is reached or identified: forwardings, sharing, appearance.
# Or those that make OpenSSH trust more than we do without them.
OF_NO_MATTER = """
addkeystoagent canonicaldomains canonicalizefallbacklocal canonicalizemaxdots checkhostip
clearallforwardings compression connectionattempts controlmaster controlpath controlpersist
dynamicforward enableescapecommandline exitonforwardfailure fingerprinthash forwardx11
forwardx11timeout forwardx11trusted gatewayports gssapiauthentication gssapidelegatecredentials
hostbasedauthentication ipqos localcommand localforward loglevel logverbose
nohostauthenticationforlocalhost permitlocalcommand numberofpasswordprompts permitremoteopen
pkcs11provider rekeylimit remoteforward requesttty securitykeyprovider streamlocalbindmask
streamlocalbindunlink syslogfacility tcpkeepalive tunnel tunneldevice updatehostkeys
verifyhostkeydns visualhostkey xauthlocation
"""
# Keywords whose lines add up, while Paramiko keeps one of them.
ONCE = ("certificatefile", "sendenv", "setenv")
LINE = re.compile(r"([A-Za-z0-9]+)(?:[ \t]*=[ \t]*|[ \t]+)([^=].*)")
# No comment after it, no quotes except around all of it, no backslash.
PLAIN = re.compile(r"\"[^\"\\]+\"|[^\"'\\#\0]+")


def read(alias: str, config: str) -> Settings:
    """Return what a file, or the user's and the system's, say; a `UserError` names its line."""
    found: Settings = {}
    for file in [config] if config else FILES:
        path = Path(file).expanduser()
        try:
            # As ssh does, for this file only: its commands run as the user.
            if file == OWN and not config and _is_writable_by_others(path.stat()):
                raise UserError(
                    f"{path}: others can write to it, and only you should: chmod go-w {path}"
                )
            text = path.read_text(errors="surrogateescape")
        except FileNotFoundError:
            continue
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
        _refuse_what_is_not_plain(path, text)
        for key, value in paramiko.SSHConfig.from_text(text).lookup(alias).items():
            if key in ("identityfile", *ONCE):
                values = value if isinstance(value, list) else [value]
                found.setdefault(key, []).extend(values)
            # A value that it adds itself is not from the file.
            elif (key, value) != ("hostname", alias):
                found.setdefault(key, ["none" if value is None else value])
    return found


def _is_writable_by_others(found: os.stat_result) -> bool:
    return found.st_uid not in (0, os.getuid()) or bool(found.st_mode & 0o022)


def _refuse_what_is_not_plain(path: Path, text: str) -> None:
    of_no_matter = OF_NO_MATTER.split()
    known, seen = {*HONOURED.split(), *of_no_matter}, set()
    for number, line in enumerate(text.split("\n"), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        found = LINE.fullmatch(line)
        key, value = (found[1].lower(), found[2]) if found else (line, "")
        is_known = key in known and key not in seen
        # These are passed to a shell as they are.
        is_plain = key in ("proxycommand", "remotecommand", *of_no_matter) or PLAIN.fullmatch(value)
        if not is_known or not is_plain:
            raise UserError(
                f"{path}:{number}: '{line}' is not supported without the ssh command; install it, "
                "or leave the line out"
            )
        if key in ONCE:
            seen.add(key)
