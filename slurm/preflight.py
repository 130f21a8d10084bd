"""Is this allocation healthy? Run by the batch script before training, in the job's container.

    python -m slurm.preflight check     on each node, as a task: leaves node-K.json
    python -m slurm.preflight judge     once afterwards, on the head node: leaves verdict.json

`check` tests its node first, then the network between the nodes; exit code 0 if all checks pass,
1 if not. `judge`: 0 healthy, 1 all nodes have the same problem, 3 there are nodes to exclude,
5 there is a problem between nodes, and it is unknown whose fault it is.
"""

import os
import re
import sys
import tempfile
import threading
from collections.abc import Callable
from multiprocessing import active_children
from pathlib import Path

from runfolder import moments
from runfolder.attempts import preflight_folder
from slurm.health.report import Report, Unhealthy
from slurm.health.settings import Settings
from slurm.health.verdict import judge

CHECKOUT = Path(__file__).resolve().parent.parent
GB = 1e9


# ---- checks of one node ---------------------------------------------------------------------
# Each returns a value for the report, or raises Unhealthy or OSError.


def _code(settings: Settings) -> str:
    for path in (CHECKOUT / "slurm/node.sh", CHECKOUT / "train"):
        _read(path, "code")
    return str(CHECKOUT)


def _datasets(settings: Settings) -> str:
    # Imported here, so that any Python can run `judge`.
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
    folder, wanted = settings.scratch, settings.min_free_scratch_bytes
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0" * 4096)
            probe.flush()
        filesystem = os.statvfs(folder)
    except OSError as error:
        raise Unhealthy(f"scratch {folder}: cannot be written ({error.strerror})") from None
    free = filesystem.f_bavail * filesystem.f_frsize
    if free < wanted:
        raise Unhealthy(f"scratch {folder}: {free / GB:.1f} GB free, {wanted / GB:.1f} GB required")
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
        raise Unhealthy(f"memory: {free / GB:.1f} GB free{limited}, {wanted / GB:.1f} GB required")
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
        # Version 2 lists no controllers; a limit may be set on any parent group, too.
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
    """Read a little of a file or folder, to detect a stale or unreadable one."""
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

    moments.reached("in-preflight")
    # Only now, as they import torch, which takes seconds: the results above are kept by then.
    if settings.device == "cuda" or settings.num_nodes > 1:
        # Its store warns about each connection that ends.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        from slurm.health.network import check_network

        check_network(settings, report)
    healthy = report.finish()
    watch.cancel()
    return 0 if healthy else 1


def _give_up(report: Report, settings: Settings) -> None:
    """End this process even if something in it hangs, such as a file system or a GPU."""
    if not report.content["done"]:
        report.hung(settings.preflight_timeout_s)
    for child in active_children():
        child.kill()
    os._exit(1)


def main(arguments: list[str]) -> int:
    """Run one of the two commands and return its exit code."""
    try:
        if arguments == ["check"]:
            return check(Settings.of_this_node(os.environ))
        if arguments == ["judge"]:
            return judge(os.environ)
        raise ValueError("usage: python -m slurm.preflight check|judge")
    except (ValueError, OSError) as error:
        print(f"error: preflight: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
