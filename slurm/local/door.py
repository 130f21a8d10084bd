"""The way into the private cluster: a port on this machine's loopback that leads to sshd inside.

    door.py PORT PORT_FILE PID COMMAND...

Each connection becomes the standard input and output of one COMMAND. Port 0 means a free port; the
port is written to PORT_FILE. This process ends when process PID ends.
"""

from __future__ import annotations

import os
import selectors
import socket
import subprocess
import sys
from pathlib import Path


def main(port: int, port_file: Path, pid: int, command: list[str]) -> None:
    """Serve until process `pid` has ended."""
    cluster = os.pidfd_open(pid)
    try:
        door = socket.create_server(("127.0.0.1", port), backlog=16)
    except OSError as error:
        sys.exit(f"port {port}: {os.strerror(error.errno or 0)}")
    # Renamed when it is complete.
    unfinished = port_file.with_suffix(".new")
    unfinished.write_text(f"{door.getsockname()[1]}\n")
    unfinished.rename(port_file)

    waiting = selectors.DefaultSelector()
    waiting.register(door, selectors.EVENT_READ)
    waiting.register(cluster, selectors.EVENT_READ)
    guests: list[subprocess.Popen[bytes]] = []
    while all(key.fileobj is door for key, _ in waiting.select()):
        connection, _ = door.accept()
        with connection:
            guests = [guest for guest in guests if guest.poll() is None]
            stream = connection.fileno()
            guests.append(subprocess.Popen(command, stdin=stream, stdout=stream))
    for guest in guests:
        guest.wait()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
