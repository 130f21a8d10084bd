"""ssh_config without the ssh command: Paramiko's reader for plain files, and all else refused.

Paramiko takes a Match that it does not know for true, leaves Include out, keeps one of several
SendEnv lines, and reads a comment behind a value as a part of it. So each line is looked at first.
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
# What config.py makes something of.
HONOURED = """
addressfamily batchmode certificatefile ciphers connecttimeout escapechar forwardagent
globalknownhostsfile hashknownhosts host hostkeyalgorithms hostkeyalias hostname identitiesonly
identityagent identityfile kbdinteractiveauthentication kexalgorithms macs passwordauthentication
port preferredauthentications proxycommand proxyjump pubkeyauthentication remotecommand
requiredrsasize sendenv serveralivecountmax serveraliveinterval setenv stricthostkeychecking user
userknownhostsfile
"""
# What is about other things than the way to a host and who it is: forwardings, sharing, looks.
# Or what makes OpenSSH trust more than we do without it.
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
# Of which each line adds to the ones before, and Paramiko keeps one.
ONCE = ("certificatefile", "sendenv", "setenv")
LINE = re.compile(r"([A-Za-z0-9]+)(?:[ \t]*=[ \t]*|[ \t]+)([^=].*)")
# Neither a comment behind it, nor quotes but around all of it, nor a backslash.
PLAIN = re.compile(r"\"[^\"\\]+\"|[^\"'\\#\0]+")


def read(alias: str, config: str) -> Settings:
    """Return what a file, or the user's and the system's, say; a `UserError` names its line."""
    found: Settings = {}
    for file in [config] if config else FILES:
        path = Path(file).expanduser()
        try:
            # As ssh, which looks at this file only: what it says runs as the user.
            if file == OWN and not config and _is_writable_by_others(path.stat()):
                raise UserError(
                    f"{path}: others may write it; it has to be yours alone: chmod go-w {path}"
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
            # One that it puts in itself is no word of the file.
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
        # These are for a shell, as they are.
        is_plain = key in ("proxycommand", "remotecommand", *of_no_matter) or PLAIN.fullmatch(value)
        if not is_known or not is_plain:
            raise UserError(
                f"{path}:{number}: '{line}' is not understood without the ssh command; install it, "
                "which reads it, or leave the line out"
            )
        if key in ONCE:
            seen.add(key)
