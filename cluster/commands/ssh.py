"""`make ssh`: a shell on the login node, or one command there.

python -m cluster ssh [--command COMMAND]
"""

from __future__ import annotations

import os

from cluster.errors import Parser
from cluster.login.alarm import leave_on_signals
from cluster.login.transport import OPENSSH, to_stderr
from cluster.site.file import load_site
from runfolder.errors import UserError


def main(argv: list[str]) -> int:
    """Run a shell or a command on the login node; return its exit code."""
    parser = Parser(
        prog="python -m cluster ssh",
        description="A shell on the login node; ~. at the start of a line ends it.",
        allow_abbrev=False,
    )
    parser.add_argument("--command", default="", help="run this command there, instead of a shell")
    options = parser.parse_args(argv)
    _open_standard_streams()
    settings = load_site().ssh
    if not settings.host:
        raise UserError("ssh: no host is set; set host in [ssh] of site.toml")

    if settings.backend == "openssh":
        from cluster.login import openssh

        words = openssh.words_of(settings)
        if options.command:
            # Where ssh_config has a RemoteCommand, ssh would refuse another.
            words = openssh.for_commands(words, settings.host)
        if openssh.master_of(words, settings.host) == "dead":
            words += ["-o", "ControlPath=none"]
        words += [settings.host] + ([options.command] if options.command else [])
        os.execvp(words[0], words)
    leave_on_signals()
    # These imports take a third of a second; errors above should not have to wait for them.
    from cluster.login import config, connection, session

    found = config.resolve(
        settings.host, user=settings.user, port=settings.port, config=settings.config
    )
    if found.forwards_agent:
        to_stderr(f"note: ForwardAgent is ignored; if you need it, {OPENSSH}")
    with connection.connect(found) as connected:
        return session.run(connected, options.command or found.remote_command or None)


def _open_standard_streams() -> None:
    """Make sure that 0, 1 and 2 are open, so that no socket gets one of these numbers."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)
