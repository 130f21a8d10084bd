"""The processes of a training, forked where torch is imported already instead of launched.

    with Ranks("zero2", 2, "train.tinyllama", *words, environment=clean_environment) as ranks:
        done = ranks.end()

Each is a process of its own that runs the module as `python -m` does, with the environment that
`accelerate launch` gives to it (test_launcher.py compares the two). One server for all workers of
a run of the tests has imported torch, transformers and DeepSpeed, and computed nothing, so that it
has no threads that a fork would lose. Two ranks cost tenths of a second instead of ten.

What a library reads when it is imported is as the server had it: no network, one thread, no GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import importlib
import json
import os
import pkgutil
import runpy
import select
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from runfolder.exit_codes import of_system_exit
from tests.shared import CHECKOUT, free_port, once, shared
from tests.waiting import HANGS_AFTER_S, descendants, wait_until

# What the launcher makes of each file of configs/accelerate, for the scripts to read.
STRATEGIES: dict[str, dict[str, str]] = {
    "ddp": {},
    "zero1": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"},
    "zero2": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero3": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
    "fsdp2": {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_OFFLOAD_PARAMS": "false",
    },
}
# What a run imports, but for the scripts: `python -m` would warn of one that is there already.
PRELOADED = [
    *("accelerate.commands.launch", "deepspeed", "jsonargparse", "tests.waiting"),
    # It compiles a function, for which it imports all that torch can compile with.
    "deepspeed.runtime.zero.muon.muon_optimizer",
    *("torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp", "torch.distributed.run"),
    *("torch.distributed.tensor", "torch.utils.tensorboard", "transformers.trainer"),
    *(f"transformers.models.{name}.modeling_{name}" for name in ("bert", "distilbert", "llama")),
]
SERVERS_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "HF_HUB_OFFLINE": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}
PR_SET_PDEATHSIG = 1  # of linux/prctl.h


# ---- in the tests ---------------------------------------------------------------------------


class Ranks:
    """Processes of one training; used with `with`, at whose end they are killed."""

    def __init__(
        self,
        accel: str,
        num_processes: int,
        module: str,
        *words: str,
        environment: Mapping[str, str],
        words_of_rank: Mapping[int, list[str]] | None = None,
    ) -> None:
        """Start them under a strategy; `words_of_rank` follow `words` for single ranks."""
        group = self.variables(accel, num_processes)
        self.ranks = []
        try:
            for rank in range(num_processes):
                own = {**group, **environment, **self.numbers(rank)}
                own_words = words_of_rank.get(rank, []) if words_of_rank else []
                self.ranks.append(Forked(module, *words, *own_words, environment=own))
        except BaseException:
            self.__exit__(None, None, None)
            raise

    @staticmethod
    def variables(accel: str, num_processes: int) -> dict[str, str]:
        """Return what the launcher sets for all ranks, and who starts it."""
        return {
            "ACCELERATE_MIXED_PRECISION": "bf16",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "SLUICE_DEVICE": "cpu",
            "SLUICE_WORLD_SIZE": str(num_processes),
            "WORLD_SIZE": str(num_processes),
            "LOCAL_WORLD_SIZE": str(num_processes),
            **STRATEGIES[accel],
        }

    @staticmethod
    def numbers(rank: int) -> dict[str, str]:
        """Return what the launcher sets for one rank."""
        return {"RANK": str(rank), "LOCAL_RANK": str(rank)}

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for rank in self.ranks:
            rank.__exit__(kind, error, trace)

    @property
    def pids(self) -> list[int]:
        return [rank.pid for rank in self.ranks]

    def are_alive(self) -> bool:
        """Return whether none of them has ended."""
        return all(rank.is_alive() for rank in self.ranks)

    def end(self) -> list[subprocess.CompletedProcess[str]]:
        """Wait for all of them; those that hang fail with the stacks of all."""
        try:
            for rank in self.ranks:
                rank.wait()
        except AssertionError as hanging:
            for rank in self.ranks:
                rank.abort()
            told = "\n".join(f"---- {rank.told()}" for rank in self.ranks)
            raise AssertionError(f"{hanging}\n{told}") from None
        return [rank.completed() for rank in self.ranks]


def run(
    accel: str, num_processes: int, module: str, *words: str, environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run a training to its end, of which all processes have the same exit code."""
    with Ranks(accel, num_processes, module, *words, environment=environment) as ranks:
        ended = ranks.end()
    codes = [done.returncode for done in ended]
    output, errors = ("".join(getattr(d, part) for d in ended) for part in ("stdout", "stderr"))
    assert len(set(codes)) == 1, f"exit codes {codes}\n{output}\n{errors}"
    return subprocess.CompletedProcess([module, *words], codes[0], output, errors)


class Forked:
    """One process, which runs a program; used with `with`, at whose end it is killed."""

    def __init__(
        self,
        program: str,
        *words: str,
        environment: Mapping[str, str],
        cwd: str | Path = CHECKOUT,
    ) -> None:
        """Start it; `program` is a module or the path of a Python file."""
        self.words = [program, *words]
        self._code: int | None = None
        environment = {**environment, "PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1"}
        request = json.dumps({"words": self.words, "environment": environment, "cwd": str(cwd)})
        # Closed by __exit__.
        self._output, self._errors = (tempfile.TemporaryFile() for _ in range(2))  # noqa: SIM115
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._server.connect(once("ranks", _start_server))
        # Beyond the size of one message: a file, too.
        with tempfile.TemporaryFile() as file:
            file.write(request.encode())
            file.flush()
            descriptors = [stream.fileno() for stream in (file, self._output, self._errors)]
            socket.send_fds(self._server, [b"fork"], descriptors)
        self.pid = int(self._receive())

    def _receive(self) -> str:
        if not select.select([self._server], [], [], HANGS_AFTER_S)[0]:
            raise AssertionError(f"{self.words}: hangs after {HANGS_AFTER_S} s")
        answer = self._server.recv(100).decode()
        assert answer, "the server of tests/ranks.py has ended"
        return answer

    def __enter__(self) -> Forked:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Of one that has ended, the number may be another process's by now.
        if self.is_alive():
            started = descendants(self.pid)
            with contextlib.suppress(OSError):
                self._server.send(b"kill")
            self.wait()
            for pid in started:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for stream in (self._server, self._output, self._errors):
            stream.close()

    def is_alive(self) -> bool:
        if self._code is None and select.select([self._server], [], [], 0)[0]:
            self.wait()
        return self._code is None

    def wait(self) -> int:
        """Wait for its end; return its exit code, or the negative number of a signal."""
        if self._code is None:
            self._code = int(self._receive())
        return self._code

    def abort(self) -> None:
        """End it, and what it has started, with the stacks of all threads on its stderr."""
        if self._code is None:
            for pid in [*descendants(self.pid), self.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGABRT)
                    os.kill(pid, signal.SIGCONT)
            self.wait()

    @property
    def stdout(self) -> str:
        """What it has written so far."""
        return _content(self._output)

    @property
    def stderr(self) -> str:
        return _content(self._errors)

    def told(self) -> str:
        return f"{self.words}: exit code {self._code}\n{self.stdout}\n{self.stderr}"

    def wait_for(self, text: str) -> None:
        """Wait until it has printed `text`."""
        wait_until(
            lambda: text in self.stdout or not self.is_alive(),
            f"'{text}' never came",
            every_s=0.02,
            so_far=self.told,
        )
        assert text in self.stdout, f"'{text}' never came: {self.told()}"

    def completed(self) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(self.words, self.wait(), self.stdout, self.stderr)

    def end(self) -> subprocess.CompletedProcess[str]:
        """Wait for its end; one that hangs fails with its stacks."""
        try:
            self.wait()
        except AssertionError as hanging:
            self.abort()
            raise AssertionError(f"{hanging}\n{self.told()}") from None
        return self.completed()


def _content(stream: tempfile._TemporaryFileWrapper[bytes]) -> str:
    return os.pread(stream.fileno(), os.fstat(stream.fileno()).st_size, 0).decode(errors="replace")


def _start_server() -> str:
    """Start the server, which ends with the run of the tests; return the path of its socket."""
    # A worker of xdist is a child of what runs the tests.
    runs_tests = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
    path = shared() / "ranks.socket"
    ours = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("SLUICE_", "ACCELERATE_", "FSDP_", "PET_", "HF_", "PYTEST_"))
    }
    with (shared() / "ranks.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "tests.ranks", path, str(runs_tests)],
            cwd=CHECKOUT,
            env=ours | SERVERS_ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    wait_until(
        lambda: path.exists() or server.poll() is not None,
        "the server of tests/ranks.py did not start",
        so_far=(shared() / "ranks.log").read_text,
    )
    assert server.poll() is None, (shared() / "ranks.log").read_text()
    return str(path)


# ---- the server -----------------------------------------------------------------------------


def serve(path: str, runs_tests: int) -> None:
    """Fork a process for each connection, and tell over it its PID, and how it ended.

    A connection that is closed has its process killed. The server ends with the process
    `runs_tests`, and with the server all that it forked.
    """
    engine = importlib.import_module("train.engine")
    names = [found.name for found in pkgutil.walk_packages(engine.__path__, "train.engine.")]
    for name in [*PRELOADED, *names, "train.export"]:
        importlib.import_module(name)
    # A collection in a child would copy every page.
    gc.collect()
    gc.freeze()
    _Server(path, runs_tests).serve()


class _Server:
    def __init__(self, path: str, runs_tests: int) -> None:
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(f"{path}.new")
        self.listener.listen(100)
        self.runs_tests = os.pidfd_open(runs_tests)
        self.ready = selectors.DefaultSelector()
        for source in (self.listener, self.runs_tests):
            self.ready.register(source, selectors.EVENT_READ)
        # The process of each connection (0: it has ended), and by what is readable at its end.
        self.processes: dict[socket.socket, int] = {}
        self.ends: dict[int, socket.socket] = {}
        Path(f"{path}.new").rename(path)

    def serve(self) -> None:
        while True:
            for key, _ in self.ready.select():
                if key.fileobj is self.listener:
                    self.fork()
                elif key.fd == self.runs_tests:
                    return
                elif key.fd in self.ends:
                    self.bury(key.fd)
                else:
                    self.kill(key.fileobj)

    def fork(self) -> None:
        connection, _ = self.listener.accept()
        _, descriptors, _, _ = socket.recv_fds(connection, 100, 3)
        if len(descriptors) != 3:  # It has left already.
            connection.close()
            return
        pid = os.fork()
        if pid == 0:
            for source in (self.ready, self.listener, connection, *self.processes):
                source.close()
            for descriptor in (self.runs_tests, *self.ends):
                os.close(descriptor)
            _become(*descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        end = os.pidfd_open(pid)
        self.processes[connection], self.ends[end] = pid, connection
        for source in (connection, end):
            self.ready.register(source, selectors.EVENT_READ)
        _tell(connection, pid)

    def kill(self, connection: socket.socket) -> None:
        """Kill the process of a connection over which that is asked for, or that is closed."""
        try:
            is_closed = not connection.recv(100)
        except ConnectionResetError:
            is_closed = True
        if pid := self.processes[connection]:
            os.kill(pid, signal.SIGKILL)
        if is_closed:
            self.ready.unregister(connection)
            self.leave(connection)

    def bury(self, end: int) -> None:
        connection = self.ends.pop(end)
        _, status = os.waitpid(self.processes[connection], 0)
        self.processes[connection] = 0
        self.ready.unregister(end)
        os.close(end)
        _tell(connection, os.waitstatus_to_exitcode(status))
        self.leave(connection)

    def leave(self, connection: socket.socket) -> None:
        """Close a connection of which both ends are done: what was said over it is read first."""
        if not self.processes[connection] and connection not in self.ready.get_map():
            del self.processes[connection]
            connection.close()


def _tell(connection: socket.socket, number: int) -> None:
    # A test that has failed may be gone.
    with contextlib.suppress(OSError):
        connection.send(str(number).encode())


def _become(request_file: int, output: int, errors: int) -> NoReturn:
    """Run what is asked for, in a process that was just forked."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    size = os.fstat(request_file).st_size
    request = json.loads(os.pread(request_file, size, 0))
    os.dup2(output, 1)
    os.dup2(errors, 2)
    for descriptor in (request_file, output, errors):
        os.close(descriptor)
    faulthandler.enable(file=2)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    sys.argv = request["words"]
    program, code = sys.argv[0], 0
    try:
        if program.endswith(".py"):
            sys.path[0] = str(Path(program).parent)
            runpy.run_path(program, run_name="__main__")
        else:
            sys.path[0] = request["cwd"]
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = of_system_exit(end.code)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
