"""A training module outside a run, such as an export: in a container, or on the host."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from cluster.plan import machine
from cluster.plan.binds import certificates, named_paths, own_places
from cluster.plan.runtime import Runtime
from runfolder.errors import UserError

# Apptainer's own exit code when it could not start the command.
NOT_STARTED = 255


def call(
    runtime: Runtime,
    module: str,
    arguments: Sequence[str],
    *,
    code: Path,
    environment: Mapping[str, str],
    writable: Iterable[Path] = (),
    online: bool = False,
    reads_input: bool = False,
) -> int:
    """Run a training module with the code of `code`; return its exit code.

    In the container it may write to `writable`, folders that exist, and read what `arguments` and
    the settings files among them name. With `reads_input`, it has this process's standard input.

    Raises:
        UserError: a path that it needs cannot be bound, or the container does not start.
    """
    # -P: the code of `code`, not that of the current folder.
    words = ["-P", "-m", module, *arguments]
    if runtime.image is None:
        # No Python variable of the caller is passed on, only this one; as in the image.
        start = ["slurm/isolated.sh", "env", f"PYTHONPATH={code}", sys.executable]
        return _call([*start, *words], environment)
    needed = [Path.cwd(), code, *(certificates(environment) if online else [])]
    if (datasets := Path(environment["SLUICE_DATASETS"])).exists():
        needed.append(datasets)
    binds = own_places([*needed, *named_paths(arguments)], writable)
    home = environment.get("HOME", "/tmp/home")
    with tempfile.TemporaryDirectory(prefix="sluice-") as scratch:
        code_inside = code.resolve()
        # `~` means the user's own home, also in a settings file.
        inside = ["env", f"HOME={home}", f"PYTHONPATH={code_inside}", "python", *words]
        device = environment.get("SLUICE_DEVICE") or ("cuda" if machine.gpus() else "cpu")
        options = [
            f"--image={runtime.image.path.absolute()}",
            f"--apptainer={runtime.apptainer}",
            f"--scratch={scratch}",
            f"--workdir={Path.cwd()}",
            f"--device={device}",
            f"--binds={chr(10).join(binds)}",
            *(["--online"] if online else []),
            *(["--input"] if reads_input else []),
        ]
        started = {**environment, "SLUICE_DEVICE": device}
        exit_code = _call(["slurm/container.sh", *options, "--", *inside], started)
    if exit_code == NOT_STARTED:
        raise UserError(
            f"{runtime.image.path}: apptainer could not start it, the reason is above; "
            "RUNTIME=host runs without a container"
        )
    return exit_code


def _call(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Return the exit code of a command, which takes its time to exit when it is interrupted.

    Ctrl+C reaches it, too, and it cleans up what is half done; `subprocess.call` would kill it
    after a quarter of a second.
    """
    # A KeyboardInterrupt between the child's exit and the recording of its code would lose the
    # code, and Python would report 0. The child does not inherit this handler.
    before = signal.signal(signal.SIGINT, lambda number, frame: None)
    try:
        return subprocess.Popen(command, env=environment).wait()
    finally:
        signal.signal(signal.SIGINT, before)
