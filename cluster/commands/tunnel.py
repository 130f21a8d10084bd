"""`make tunnel`: forward a port of this machine to one on the cluster.

python -m cluster tunnel --run RUN [--port 6006]
python -m cluster tunnel --port 8888 --node node7
"""

from __future__ import annotations

import contextlib
import re
import selectors
import socket
import sys
import threading
from typing import NoReturn

from cluster.commands.board import LISTENS
from cluster.errors import Parser
from cluster.login.backends import connect
from cluster.login.transport import Running, Stream, Transport
from cluster.remote import calls
from cluster.site.file import load_site
from cluster.site.settings import Site
from runfolder.errors import UserError, printable

TENSORBOARD_PORT = 6006
BLOCK_BYTES = 1 << 16
# How often it checks that the other end is still there.
POLL_S = 1.0


def main(argv: list[str]) -> int:
    """Run the command; return its exit code."""
    parser = Parser(
        prog="python -m cluster tunnel",
        description="Forward a port of this machine to one on the cluster.",
        allow_abbrev=False,
    )
    parser.add_argument("--run", default="", help="forward to the TensorBoard of this run")
    parser.add_argument("--node", default="", help="forward to a port of this node")
    parser.add_argument("--port", default="", help="the port, here and on the node")
    options = parser.parse_args(argv)
    if bool(options.run) == bool(options.node):
        raise UserError(
            "make tunnel: give RUN= for the TensorBoard of a run, or NODE= and PORT= for any port"
        )
    if options.node and not options.port:
        raise UserError(
            f"NODE={options.node}: PORT= is missing; give the port to forward to on the node"
        )
    if not re.fullmatch(r"(?!-)[A-Za-z0-9._:-]*", options.node):
        raise UserError(f"NODE={options.node}: is not the name of a node")
    port = _port(options.port)
    site = load_site()
    if not site.is_elsewhere and not site.is_private:
        raise UserError(
            "make tunnel: is for a laptop; this is the cluster, or site.toml has no ssh.host"
        )
    with _listen(port) as door, connect(site) as login:
        if options.node:
            _lead(door, login, options.node, port, "")
        return _to_tensorboard(door, login, site, options.run)


def _port(text: str) -> int:
    if not text:
        return TENSORBOARD_PORT
    if not re.fullmatch(r"[0-9]{1,5}", text) or not 0 < int(text) < 65536:
        raise UserError(f"PORT={text}: is not a port; choose one from 1024 to 65535")
    return int(text)


def _listen(port: int) -> socket.socket:
    try:
        # For connections from this machine only.
        return socket.create_server(("127.0.0.1", port))
    except OSError as error:
        raise UserError(
            f"PORT={port}: cannot be used on this machine: {error.strerror}; choose another"
        ) from None


def _to_tensorboard(door: socket.socket, login: Transport, site: Site, run: str) -> int:
    script = calls.script(site, calls.checkout(login, site), ["board", "--run", run])
    board = login.start(script, site.ssh.modules)
    try:
        while line := printable(board.read_line()):
            if found := re.fullmatch(rf"{LISTENS} ([A-Za-z0-9._:-]+) (\d+)", line):
                address, port = found[1], int(found[2])
                _lead(door, login, address, port, f"TensorBoard of {run}: ", board)
            if line.startswith("error: "):
                raise UserError(line.removeprefix("error: "))
            # The first time, the packages that the commands need are installed there.
            print(line, file=sys.stderr, flush=True)
        raise UserError(
            f"{site.ssh.host}: {login.lost or 'TensorBoard did not start, and gave no reason'}"
        )
    finally:
        board.end()


def _lead(
    door: socket.socket,
    login: Transport,
    host: str,
    port: int,
    what: str,
    board: Running | None = None,
) -> NoReturn:
    """Serve the port until Ctrl+C.

    Raises:
        UserError: the other end is gone, or the connection was lost.
    """
    here = door.getsockname()[1]
    print(f"{what}http://127.0.0.1:{here} forwards to {host}:{port}; Ctrl+C ends it", flush=True)
    waiting = selectors.DefaultSelector()
    waiting.register(door, selectors.EVENT_READ)
    while True:
        if login.lost:
            raise UserError(f"the connection was lost: {login.lost}")
        if board is not None and board.is_over():
            said = printable(board.read_line()).removeprefix("error: ")
            raise UserError(
                f"{what}has ended{f' ({said})' if said else ''}; make tunnel starts it again"
            )
        if not waiting.select(POLL_S):
            continue
        guest, _ = door.accept()
        # Each in its own thread: a connection that hangs does not hold up the others.
        threading.Thread(target=_serve, args=(guest, login, host, port), daemon=True).start()


def _serve(guest: socket.socket, login: Transport, host: str, port: int) -> None:
    try:
        far = login.dial(host, port)
    except UserError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr, flush=True)
        guest.close()
        return
    back = threading.Thread(target=_pump, args=(far, guest), daemon=True)
    back.start()
    _pump(guest, far)
    back.join()
    guest.close()
    with contextlib.suppress(OSError, EOFError):
        far.close()


def _pump(source: Stream, target: Stream) -> None:
    """Copy data until the source ends, then pass on the end."""
    try:
        while data := source.recv(BLOCK_BYTES):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except Exception:
        # One side is gone, for whatever reason, so the other is shut down, too. close() alone
        # would not wake the thread that waits for it.
        for end in (source, target):
            with contextlib.suppress(OSError, EOFError):
                end.shutdown(socket.SHUT_RDWR)
