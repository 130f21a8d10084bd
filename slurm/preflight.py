"""Is this allocation healthy? Run by the batch script before training, in the job's container.

    python slurm/preflight.py check     on each node, as a task: leaves node-K.json
    python slurm/preflight.py judge     once afterwards, on the head node: leaves verdict.json

`check` looks at its node first and at the network between the nodes then; exit code 0 if all is
well, 1 if not. `judge`: 0 healthy, 1 the same is wrong with all nodes, 3 nodes to exclude were
named, 5 something is wrong between nodes, and it cannot be told whose fault it is.
"""

import os
import re
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from multiprocessing import active_children
from pathlib import Path

from health.report import Report, Unhealthy, preflight_folder
from health.verdict import judge

CHECKOUT = Path(__file__).resolve().parent.parent
GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the caller resolved; each field is the variable SLUICE_ and its name in capitals."""

    num_nodes: int
    node_rank: int
    node_name: str
    # Address and port of the first node; the port is one that training will use later.
    master_addr: str
    master_port: int
    run_folder: Path
    attempt: str
    datasets: Path
    # Node-local scratch as seen here.
    scratch_inside: Path
    # cpu or cuda.
    device: str
    gpus_per_node: int
    # Bus bandwidth of an all-reduce over all processes; 0: none is asked for.
    floor_bytes_per_second: float
    max_clock_skew_s: float
    min_free_memory_bytes: float
    # Of each GPU's memory, 0 to 1.
    min_free_gpu_fraction: float
    min_free_scratch_bytes: float
    # Of the whole check on a node.
    preflight_timeout_s: float

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "Settings":
        """Return the settings.

        Raises:
            ValueError: a variable is missing or not a number.
        """
        values: dict[str, object] = {}
        for field in fields(cls):
            name = f"SLUICE_{field.name.upper()}"
            if not environment.get(name):
                raise ValueError(f"{name} is not set; the batch script resolves it")
            assert isinstance(field.type, type)
            try:
                values[field.name] = field.type(environment[name])
            except ValueError:
                raise ValueError(f"{name} is not a number: {environment[name]!r}") from None
        return cls(**values)  # type: ignore[arg-type]

    @property
    def processes_per_node(self) -> int:
        """Return how many processes of a node take part in the all-reduce."""
        return self.gpus_per_node if self.device == "cuda" else 1


# ---- what one node can tell of itself -------------------------------------------------------
# Each returns what is worth keeping, or raises Unhealthy or OSError.


def _code(settings: Settings) -> str:
    for path in (CHECKOUT / "slurm/node.sh", CHECKOUT / "train"):
        _read(path, "code")
    return str(CHECKOUT)


def _datasets(settings: Settings) -> str:
    # Here, so that any Python can judge.
    import yaml

    _read(settings.datasets, "datasets")
    config_file = settings.run_folder / "config.yaml"
    _read(config_file, "run folder")
    try:
        config = yaml.safe_load(config_file.read_bytes())
    except yaml.YAMLError:
        raise Unhealthy(f"run folder {config_file}: is not YAML") from None
    staged = config.get("staged") if isinstance(config, dict) else None
    names = [name for name in staged.values() if name] if isinstance(staged, dict) else []
    for name in names:
        _read(settings.datasets / name, "datasets")
    return f"{len(names)} staged in {settings.datasets}"


def _scratch(settings: Settings) -> str:
    folder, wanted = settings.scratch_inside, settings.min_free_scratch_bytes
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0" * 4096)
            probe.flush()
        filesystem = os.statvfs(folder)
    except OSError as error:
        raise Unhealthy(f"scratch {folder}: cannot be written ({error.strerror})") from None
    free = filesystem.f_bavail * filesystem.f_frsize
    if free < wanted:
        raise Unhealthy(f"scratch {folder}: {free / GB:.1f} GB free, {wanted / GB:.1f} GB wanted")
    return f"{free / GB:.1f} GB free"


def _memory(settings: Settings) -> str:
    available = re.search(
        r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE
    )
    assert available is not None
    free, wanted = int(available[1]) * 1024, settings.min_free_memory_bytes
    limit = memory_limit(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup").read_text())
    limited = ""
    if limit is not None and limit < free:
        free, limited = limit, " within the job's limit"
    if free < wanted:
        raise Unhealthy(f"memory: {free / GB:.1f} GB free{limited}, {wanted / GB:.1f} GB wanted")
    return f"{free / GB:.1f} GB free{limited}"


def memory_limit(root: Path, memberships: str) -> int | None:
    """Return the lowest limit in bytes of the memory of this process, None without one.

    Args:
        root: where the control groups are mounted.
        memberships: the text of /proc/self/cgroup.
    """
    limits = []
    for line in memberships.splitlines():
        _, controllers, group = line.split(":", 2)
        # Version 2 names no controllers; a limit may be set on any group above, too.
        if controllers not in ("", "memory"):
            continue
        name = "memory.limit_in_bytes" if controllers else "memory.max"
        folder = root / controllers / group.lstrip("/")
        while folder.is_relative_to(root):
            if (folder / name).is_file():
                limits.append((folder / name).read_text().strip())
            folder = folder.parent
    return min((int(limit) for limit in limits if limit.isdecimal()), default=None)


def _read(path: Path, what: str) -> None:
    """Read a little of a file or folder, so that a stale or forbidden one shows."""
    try:
        if path.is_dir():
            list(path.iterdir())
        else:
            with path.open("rb") as file:
                file.read(1)
    except FileNotFoundError:
        raise Unhealthy(f"{what} {path}: is missing") from None
    except OSError as error:
        raise Unhealthy(f"{what} {path}: cannot be read ({error.strerror})") from None


LOCAL_CHECKS: dict[str, Callable[[Settings], str]] = {
    "code": _code,
    "datasets": _datasets,
    "scratch": _scratch,
    "memory": _memory,
}


# ---- the whole check ------------------------------------------------------------------------


def check(settings: Settings) -> int:
    """Check this node and its connections; return the exit code."""
    folder = preflight_folder(settings.run_folder, settings.attempt)
    report = Report(folder, settings.node_name, settings.node_rank)
    watch = threading.Timer(settings.preflight_timeout_s, _give_up, [report, settings])
    watch.daemon = True
    watch.start()

    report.begin("run folder", guilty=True)
    unwritable = report.unwritable()
    if unwritable:
        report.failed(Unhealthy(unwritable))
    else:
        report.passed(str(settings.run_folder))
    for name, look in LOCAL_CHECKS.items():
        report.begin(name, guilty=True)
        try:
            report.passed(look(settings))
        except Unhealthy as problem:
            report.failed(problem)
        except OSError as error:
            report.failed(Unhealthy(f"{name}: {error}"))

    _reached("in-preflight")
    # Only now, since they import torch, which takes seconds: what is above is known by then.
    if settings.device == "cuda" or settings.num_nodes > 1:
        # Its store warns of each connection that ends.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        from health.network import check_network

        check_network(settings, report)
    healthy = report.finish()
    watch.cancel()
    return 0 if healthy else 1


def _reached(moment: str) -> None:
    """Stop here for a test that asks for it; the training side, which knows how, is beside us."""
    if os.environ.get("SLUICE_PAUSE_AT"):
        sys.path.append(str(CHECKOUT))
        from train.engine.moments import reached

        reached(moment)


def _give_up(report: Report, settings: Settings) -> None:
    """End this process although something hangs in it, such as a file system or a GPU."""
    if not report.content["done"]:
        report.hung(settings.preflight_timeout_s)
    for child in active_children():
        child.kill()
    os._exit(1)


def main(arguments: list[str]) -> int:
    """Run one of the two commands and return its exit code."""
    try:
        if arguments == ["check"]:
            return check(Settings.from_environment(os.environ))
        if arguments == ["judge"]:
            return judge(os.environ)
        raise ValueError("usage: python slurm/preflight.py check|judge")
    except (ValueError, OSError) as error:
        print(f"error: preflight: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
