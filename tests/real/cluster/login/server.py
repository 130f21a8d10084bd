"""A real sshd on loopback, and the client's side of it: keys, known_hosts, ssh_config."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.shared import free_port
from tests.waiting import wait_until

USER = pwd.getpwuid(os.geteuid()).pw_name
PASSWORD = "correct horse"
NewServer = Callable[..., "Server"]


@dataclass(frozen=True)
class Server:
    """An sshd that runs, and a client's configuration for it."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes]

    @property
    def host_key(self) -> Path:
        return self.folder / "host_ed25519"

    @property
    def client_key(self) -> Path:
        """A key of ed25519 that authorized_keys has."""
        return self.folder / "client_key"

    @property
    def known_hosts(self) -> Path:
        return self.folder / "known_hosts"

    @property
    def authorized_keys(self) -> Path:
        return self.folder / "authorized_keys"

    @property
    def config(self) -> Path:
        """An ssh_config in which the server is the host `server`."""
        return self.folder / "ssh_config"

    @property
    def log(self) -> str:
        """What sshd has logged, at level DEBUG1."""
        return (self.folder / "sshd.log").read_text(errors="replace")

    def write_config(self, *lines: str, name: str = "server", key: bool = True) -> Path:
        """Write an ssh_config with these lines first, as ssh takes the first that it finds."""
        identity = [f"IdentityFile {self.client_key}"] if key else []
        text = [
            f"Host {name}",
            *lines,
            "HostName 127.0.0.1",
            f"Port {self.port}",
            f"User {USER}",
            *identity,
            "IdentitiesOnly yes",
            "IdentityAgent none",
            f"UserKnownHostsFile {self.known_hosts}",
            "GlobalKnownHostsFile none",
            "HashKnownHosts no",
        ]
        self.config.write_text("\n  ".join(text) + "\n")
        return self.config

    def children(self) -> list[int]:
        """Return the processes of sshd that serve a connection.

        One for root; for another user a second one below it, without privileges.
        """
        found: list[int] = []
        for pid in _sshd_below(self.process.pid):
            found += [pid, *_sshd_below(pid)]
        return found

    def send_children(self, number: signal.Signals) -> None:
        """Send a signal to each process that serves a connection."""
        _send(self.children(), number)

    def stop(self) -> None:
        """End it and all its connections."""
        if self.process.poll() is None:
            _send([self.process.pid, *self.children()], signal.SIGKILL)
        self.process.wait()


def keygen(path: Path, kind: str = "ed25519", passphrase: str = "", *options: str) -> Path:
    """Make a key pair; returns the private one's path."""
    words = ["ssh-keygen", "-q", "-t", kind, "-N", passphrase, "-C", path.name, "-f", path]
    # As short as is taken, and opened quickly: what it takes to guess it is not the tests' matter.
    options = (*(["-b", "2048"] if kind == "rsa" else []), "-a", "1", *options)
    subprocess.run([*words, *options], check=True, stdin=subprocess.DEVNULL)
    return path


def known_hosts_line(port: int, public_key: Path) -> str:
    """Return the line that a client's known_hosts has for a server on loopback."""
    return f"[127.0.0.1]:{port} {' '.join(public_key.read_text().split()[:2])}\n"


def start(
    folder: Path,
    *lines: str,
    password: bool = False,
    pam: str = "",
    host_keys: tuple[str, ...] = ("ed25519",),
) -> Server:
    """Start an sshd that lets the user of the tests in by key.

    Args:
        folder: where its files go; it is made.
        lines: of sshd_config; the first that is found counts, so that these win.
        password: let the user in by PASSWORD, too (as root only: sshd sees an /etc/shadow of its
            own, in which the user has that password; the machine's is not touched).
        pam: the lines of its /etc/pam.d/sshd; empty: no PAM.
        host_keys: the types of its host keys; all are in the client's known_hosts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    for kind in host_keys:
        # A test may have made it, with a certificate.
        if not (folder / f"host_{kind}").exists():
            keygen(folder / f"host_{kind}", kind)
    keygen(folder / "client_key")
    shutil.copy(folder / "client_key.pub", folder / "authorized_keys")
    publics = [folder / f"host_{kind}.pub" for kind in host_keys]
    (folder / "known_hosts").write_text("".join(known_hosts_line(port, key) for key in publics))
    config = [
        *lines,
        *(f"HostKey {folder}/host_{kind}" for kind in host_keys),
        f"Port {port}",
        "ListenAddress 127.0.0.1",
        f"AuthorizedKeysFile {folder}/authorized_keys",
        f"PidFile {folder}/sshd.pid",
        "StrictModes no",
        "PermitRootLogin yes",
        f"PasswordAuthentication {'yes' if password and not pam else 'no'}",
        f"KbdInteractiveAuthentication {'yes' if pam else 'no'}",
        f"UsePAM {'yes' if pam else 'no'}",
        "PrintMotd no",
        "PrintLastLog no",
        "AcceptEnv LANG LC_* SLUICE_*",
        "MaxStartups 100",
        # Not the user's own: a session that is killed amid a .bashrc may leave a lock behind, on
        # which all later ones wait.
        f"SetEnv HOME={folder}",
        "LogLevel DEBUG2",
    ]
    (folder / "sshd_config").write_text("\n".join(config) + "\n")
    sshd = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    assert sshd is not None
    log = folder / "sshd.log"
    # Logged to stderr, it would come out of every session.
    command = [sshd, "-D", "-E", str(log), "-f", str(folder / "sshd_config")]
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    if password or pam:
        command = [*_with_files(folder, pam), *command]
    with log.open("ab") as stream:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, start_new_session=True
        )
    server = Server(folder, port, process)
    server.write_config()

    def listens() -> bool:
        assert process.poll() is None, server.log
        return (folder / "sshd.pid").exists()

    wait_until(listens, "sshd to listen", every_s=0.01, so_far=lambda: server.log)
    return server


def _with_files(folder: Path, pam: str) -> list[str]:
    """Return the start of a command that sees an /etc/shadow and a /etc/pam.d/sshd of its own."""
    hashed = subprocess.run(
        ["openssl", "passwd", "-6", PASSWORD], check=True, capture_output=True, text=True
    ).stdout.strip()
    lines = Path("/etc/shadow").read_text().splitlines()
    own = [f"{USER}:{hashed}:19000:0:99999:7:::" if x.startswith(f"{USER}:") else x for x in lines]
    (folder / "shadow").write_text("\n".join(own) + "\n")
    (folder / "shadow").chmod(0o600)
    binds = f"mount --bind {folder}/shadow /etc/shadow"
    if pam:
        (folder / "pam").write_text(pam)
        binds += f" && mount --bind {folder}/pam /etc/pam.d/sshd"
    # exec, so that the process that is started is sshd itself.
    return ["unshare", "--mount", "sh", "-c", f'{binds} && exec "$@"', "sh"]


def _send(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        # One of an earlier connection may just have ended.
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _sshd_below(parent: int) -> list[int]:
    found = []
    # What has ended meanwhile is left out.
    with suppress(FileNotFoundError, ProcessLookupError):
        for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
            with suppress(FileNotFoundError, ProcessLookupError):
                if Path(f"/proc/{pid}/comm").read_text().startswith("sshd"):
                    found.append(int(pid))
    return found
