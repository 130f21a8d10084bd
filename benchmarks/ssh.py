"""What Python costs in SSH: `make ssh` compared with the ssh command, one server on loopback.

    python benchmarks/ssh.py

In turns: bulk transfers both ways, the time from a key to its echo in a terminal, and the start. On
loopback nothing hides the client's own work: over a real network both clients wait for the same
link, and the ratios are closer to one.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import pty
import pwd
import random
import select
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a file: the checkout is not on the path yet
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks import record
from runfolder.errors import UserError
from train.engine import arguments
from train.engine.errors import RunFailed, run_to_exit

HOST = "benchmark"
# Keys that do not count, for warm-up.
WARM_UP_KEYS = 30
TIMEOUT_S = 60.0


@dataclass(kw_only=True)
class Config:
    """Measure make ssh against the ssh command."""

    megabytes: int = 500
    """Size of each bulk transfer."""
    keystrokes: int = 300
    """Keys typed in each session."""
    pause_ms: float = 5.0
    """Pause between an echo and the next key."""
    repeats: int = 5
    """How often each is measured, in turns; medians count."""
    results: str = str(record.ROOT / "benchmarks" / "results")
    """Folder for the record."""


@dataclass(frozen=True)
class Client:
    """One of the two clients that are compared."""

    name: str
    words: list[str]
    """Its command line, without the remote command."""
    terminal_words: list[str]
    """The same, with a remote terminal."""
    environment: dict[str, str]


def main(argv: list[str]) -> int:
    """Run the benchmark; return its exit code."""
    started = time.monotonic()
    config = arguments.parse(Config, argv, prog="benchmarks/ssh.py", dry_run={})
    with (
        tempfile.TemporaryDirectory(prefix="sluice-benchmark-") as name,
        server(Path(name)) as file,
    ):
        sluice = environment(Path(name), file)
        clients = [
            Client(
                "ssh",
                ["ssh", "-F", str(file), HOST],
                ["ssh", "-F", str(file), "-tt", HOST],
                dict(os.environ),
            ),
            Client(
                "sluice",
                [sys.executable, "-m", "cluster", "ssh", "--command"],
                [sys.executable, "-m", "cluster", "ssh", "--command"],
                sluice,
            ),
        ]
        found = measure(clients, config, Path(name))
        algorithms = agreed(file)
    print(table(found), flush=True)
    content = {
        "benchmark": "make ssh beside the ssh command, both with one sshd on loopback",
        "circumstances": record.circumstances()
        | {
            # Other load slows the echo of both clients, and Python's more.
            "load": round(os.getloadavg()[0], 1),
            "ssh": said(["ssh", "-V"]),
            "paramiko": importlib.metadata.version("paramiko"),
            "cryptography": importlib.metadata.version("cryptography"),
        },
        "workload": {
            "megabytes": config.megabytes,
            "keystrokes": config.keystrokes,
            "pause_ms": config.pause_ms,
            "repeats": config.repeats,
        },
        "ciphers": algorithms,
        "cases": found,
        "seconds": round(time.monotonic() - started, 1),
    }
    path = record.save(Path(config.results), "ssh", content)
    print(f"\nrecord: {os.path.relpath(path)}", flush=True)
    return 0


def measure(clients: list[Client], config: Config, folder: Path) -> dict[str, Any]:
    """Return the figures of both clients, by case."""
    size = config.megabytes * 1_000_000
    zeros = folder / "zeros"
    with zeros.open("wb") as stream:
        stream.truncate(size)
    down = f"echo go >&2; head -c {size} /dev/zero"
    up = "echo go >&2; cat >/dev/null"
    values: dict[str, dict[str, list[float]]] = {}

    def note(case: str, client: Client, *measured: float) -> None:
        values.setdefault(case, {}).setdefault(client.name, []).extend(measured)

    for turn in range(config.repeats + 1):
        for client in clients:
            bulk_down = bulk(client, down, None)
            bulk_up = bulk(client, up, zeros)
            echoes, cpu = echo(client, config)
            start = seconds([*client.words, "true"], client.environment)
            if not turn:
                continue
            note("download, MB/s", client, config.megabytes / bulk_down[0])
            note("download, CPU s/GB", client, bulk_down[1] / size * 1e9)
            note("upload, MB/s", client, config.megabytes / bulk_up[0])
            note("upload, CPU s/GB", client, bulk_up[1] / size * 1e9)
            note("echo, us", client, *(one * 1e6 for one in echoes))
            note("echo, CPU us/key", client, cpu * 1e6)
            note("start, s", client, start)
    return {case: compared(of_both) for case, of_both in values.items()}


def compared(values: dict[str, list[float]]) -> dict[str, Any]:
    """Return medians, their ratio, and how far apart the values lie."""
    medians = {name: statistics.median(of_one) for name, of_one in values.items()}

    def tenths(of_one: list[float]) -> list[float]:
        ordered = sorted(of_one)
        return [round(ordered[round(part * (len(ordered) - 1))], 3) for part in (0.1, 0.9)]

    return {
        **{name: round(median, 3) for name, median in medians.items()},
        "sluice_to_ssh": round(medians["sluice"] / medians["ssh"], 3),
        "p10_and_p90": {name: tenths(of_one) for name, of_one in values.items()},
    }


def table(found: dict[str, dict[str, Any]]) -> str:
    """Return the figures as text for a terminal."""
    lines = [f"{'':<22}{'ssh':>10}{'sluice':>10}{'sluice : ssh':>15}"]
    lines += [
        f"{name:<22}{one['ssh']:>10.2f}{one['sluice']:>10.2f}{one['sluice_to_ssh']:>15.2f}"
        for name, one in found.items()
    ]
    return "\n".join(lines)


# ---- the measurements -----------------------------------------------------------------------


def bulk(client: Client, command: str, source: Path | None) -> tuple[float, float]:
    """Return the seconds from the command's start to the client's end, and its CPU seconds."""
    with contextlib.ExitStack() as stack:
        stdin = stack.enter_context(source.open("rb")) if source else subprocess.DEVNULL
        process = subprocess.Popen(
            [*client.words, command],
            stdin=stdin,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            cwd=record.ROOT,
            env=client.environment,
        )
        assert process.stderr is not None
        first = process.stderr.readline()
        started = time.perf_counter()
        rest = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        took = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode or first != b"go\n" or rest:
            raise RunFailed(f"{client.name}: {(first + rest).decode(errors='replace')}")
    return took, usage.ru_utime + usage.ru_stime


def echo(client: Client, config: Config) -> tuple[list[float], float]:
    """Return the seconds from each key to its echo in a terminal, and the CPU seconds of one."""
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(record.ROOT)
        words = [*client.terminal_words, "stty raw echo; echo ready; exec cat >/dev/null"]
        os.execvpe(words[0], words, client.environment)
    try:
        shown = b""
        while b"ready" not in shown:
            shown += read(terminal)
        # The rest of the line, and everything after it.
        while select.select([terminal], [], [], 0.3)[0]:
            read(terminal)
        dice = random.Random(0)
        times = []
        before = 0.0
        for number in range(WARM_UP_KEYS + config.keystrokes):
            if number == WARM_UP_KEYS:
                before = cpu_seconds(process)
            time.sleep(config.pause_ms / 1000)
            key = bytes((dice.randrange(ord("a"), ord("z") + 1),))
            started = time.perf_counter()
            os.write(terminal, key)
            if read(terminal) != key:
                raise RunFailed(f"{client.name}: a different key was echoed")
            times.append(time.perf_counter() - started)
        return times[WARM_UP_KEYS:], (cpu_seconds(process) - before) / config.keystrokes
    finally:
        os.kill(process, signal.SIGKILL)
        os.close(terminal)
        os.waitpid(process, 0)


def read(terminal: int) -> bytes:
    """Return what a terminal shows next."""
    if not select.select([terminal], [], [], TIMEOUT_S)[0]:
        raise RunFailed(f"nothing came back within {TIMEOUT_S:.0f} s")
    return os.read(terminal, 4096)


def cpu_seconds(process: int) -> float:
    """Return the CPU time that a process has used; NaN if /proc does not show it."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return float("nan")
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def seconds(command: list[str], variables: dict[str, str]) -> float:
    """Return the seconds that a command takes."""
    started = time.perf_counter()
    done = subprocess.run(
        command,
        cwd=record.ROOT,
        env=variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    took = time.perf_counter() - started
    if done.returncode:
        raise RunFailed(f"{command[0]} failed: {done.stderr.strip()[-500:]}")
    return took


# ---- the server -----------------------------------------------------------------------------


@contextlib.contextmanager
def server(folder: Path) -> Iterator[Path]:
    """Run an sshd on loopback; yields an ssh_config in which it is HOST."""
    sshd = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if sshd is None or shutil.which("ssh") is None:
        raise UserError("ssh or sshd is missing; apt-get install openssh-client openssh-server")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    for key in ("host_key", "client_key"):
        words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", f"{folder}/{key}"]
        subprocess.run(words, check=True, stdin=subprocess.DEVNULL)
    port = random.randrange(20_000, 30_000)
    (folder / "known_hosts").write_text(
        f"[127.0.0.1]:{port} {(folder / 'host_key.pub').read_text()}"
    )
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host_key\n"
        f"AuthorizedKeysFile {folder}/client_key.pub\nPidFile {folder}/pid\nStrictModes no\n"
        "UsePAM no\nPermitRootLogin yes\nPasswordAuthentication no\nPrintMotd no\n"
    )
    config = folder / "ssh_config"
    config.write_text(
        f"Host {HOST}\n  HostName 127.0.0.1\n  Port {port}\n"
        f"  User {pwd.getpwuid(os.geteuid()).pw_name}\n  IdentityFile {folder}/client_key\n"
        f"  IdentitiesOnly yes\n  IdentityAgent none\n  UserKnownHostsFile {folder}/known_hosts\n"
        "  LogLevel ERROR\n"
    )
    process = subprocess.Popen(
        [sshd, "-D", "-e", "-f", folder / "sshd_config"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 10
        while not (folder / "pid").exists():
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                raise RunFailed(f"sshd: {process.communicate()[1].strip()[-500:]}")
            time.sleep(0.02)
        yield config
    finally:
        process.terminate()
        process.communicate()


def environment(folder: Path, config: Path) -> dict[str, str]:
    """Return an environment in which the login node is the benchmark's server."""
    example = (record.ROOT / "configs" / "site.example.toml").read_text(encoding="utf-8")
    site = folder / "site.toml"
    named = f'\n[ssh]\nhost = "{HOST}"\nconfig = "{config}"\n'
    site.write_text(example.replace("\n[ssh]\n", named), encoding="utf-8")
    return dict(os.environ) | {"SLUICE_SITE": str(site)}


def agreed(file: Path) -> dict[str, str]:
    """Return the ciphers that the two use."""
    from cluster.login import config, connection

    done = subprocess.run(
        ["ssh", "-v", "-F", str(file), HOST, "true"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stderr.splitlines()
    names = [x.partition("cipher: ")[2].split()[0] for x in lines if "server->client cipher" in x]
    with connection.connect(config.resolve(HOST, config=str(file))) as connected:
        return {"ssh": names[0], "sluice": connected.transport.remote_cipher}


def said(command: list[str]) -> str:
    """Return the output of a command, on both streams."""
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return (done.stdout + done.stderr).strip()


if __name__ == "__main__":
    run_to_exit(main)
