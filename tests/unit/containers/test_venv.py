"""containers/venv.sh and bootstrap_pip.py, with the real pip, tiny packages and no network.

A `shop` folder holds wheels that these tests build: pip itself (packed again from the environment
that runs the tests), torch as a CPU and as a plain build, and a few others. The scripts run from
a copy of containers/ whose locks pin just these.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import http.server
import importlib.metadata
import io
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
# What the tests run in is itself an environment; venv.sh starts from the Python below it.
BASE_PYTHON = Path(os.path.realpath(getattr(sys, "_base_executable", sys.executable)))
PYTHON_VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
STAMP = ".sluice-stamp"
# Nothing listens here, so that a test which reaches for a network fails at once.
NOWHERE = "http://127.0.0.1:9"


# ---- a shop of tiny packages ----------------------------------------------------------------


def write_wheel(folder: Path, name: str, version: str, files: Mapping[str, bytes]) -> Path:
    """Write a pure-Python wheel of `files` into `folder`."""
    info = f"{name}-{version}.dist-info"
    members = dict(files)
    members.setdefault(
        f"{info}/METADATA",
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
    )
    members.setdefault(
        f"{info}/WHEEL", b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
    record = ""
    for member, content in members.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
        record += f"{member},sha256={digest},{len(content)}\n"
    members[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    return wheel


def write_pip_wheel(folder: Path) -> Path:
    """Pack the pip that is installed here into a wheel again."""
    pip = importlib.metadata.distribution("pip")
    files = {}
    for path in pip.files or []:
        left_out = path.name in ("RECORD", "INSTALLER", "REQUESTED", "direct_url.json")
        if path.parts[0].startswith("pip") and path.suffix != ".pyc" and not left_out:
            files[path.as_posix()] = Path(path.locate()).read_bytes()
    return write_wheel(folder, "pip", pip.version, files)


def write_sdist(folder: Path) -> Path:
    """A source package that builds only beside an installed setuptools and without its ops."""
    backend = """
import os, zipfile
import setuptools  # the one that the lock put into the environment: build isolation has none

def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    assert os.environ["DS_BUILD_OPS"] == "0"
    name = "deepspeed-1.0-py3-none-any.whl"
    info = "deepspeed-1.0.dist-info"
    with zipfile.ZipFile(os.path.join(wheel_directory, name), "w") as archive:
        archive.writestr("deepspeed.py", "")
        archive.writestr(f"{info}/METADATA", METADATA)
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\\nTag: py3-none-any\\n")
        archive.writestr(f"{info}/RECORD", "")
    return name

METADATA = "Metadata-Version: 2.1\\nName: deepspeed\\nVersion: 1.0\\n"
"""
    files = {
        "deepspeed-1.0/PKG-INFO": "Metadata-Version: 2.1\nName: deepspeed\nVersion: 1.0\n",
        "deepspeed-1.0/backend.py": backend,
        "deepspeed-1.0/pyproject.toml": (
            '[build-system]\nrequires = ["setuptools"]\n'
            'build-backend = "backend"\nbackend-path = ["."]\n'
        ),
    }
    sdist = folder / "deepspeed-1.0.tar.gz"
    with tarfile.open(sdist, "w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    return sdist


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def pin(name: str, file: Path, marker: str = "") -> str:
    """One locked requirement, as uv writes it."""
    return f"{name}{marker} \\\n    --hash=sha256:{sha256(file)}\n"


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A find-links folder with everything but torch, and two subfolders with a torch each."""
    folder = tmp_path_factory.mktemp("shop")
    write_pip_wheel(folder)
    write_wheel(folder, "setuptools", "1.0", {"setuptools.py": b""})
    write_wheel(folder, "light", "1.0", {"light.py": b""})
    write_wheel(folder, "tool", "1.0", {"tool.py": b""})
    write_sdist(folder)
    for build, version in (("cpu", "2.13.0+cpu"), ("cuda", "2.13.0"), ("cuda", "2.14.0")):
        (folder / build).mkdir(exist_ok=True)
        write_wheel(folder / build, "torch", version, {"torch.py": f"build = '{build}'".encode()})
    return folder


# ---- a checkout -----------------------------------------------------------------------------


@dataclass(kw_only=True)
class Checkout:
    """A copy of containers/ with tiny locks, and the environment to run its scripts in."""

    root: Path
    shop: Path
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def venv(self) -> Path:
        return self.root / self.environment.get("VENV", ".venv")

    def lock(self, name: str, text: str) -> None:
        (self.root / "containers/locks" / name).write_text(text, encoding="utf-8")

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(self.root / "containers/venv.sh"), *arguments],
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments, **environment)
        out, err = process.communicate(timeout=240)
        assert out == "", "only problems and progress are said, and both on stderr"
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def refusal(self, *arguments: str, **environment: str) -> str:
        """Run, and return the one line `error: ...` that a refusal ends with."""
        done = self.run(*arguments, **environment)
        assert done.returncode == 2, done.stderr
        assert not (self.venv / STAMP).exists()
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert errors == done.stderr.splitlines()[-1:], done.stderr
        return errors[0]

    def installed(self) -> dict[str, str]:
        """The packages in the environment, as its own interpreter sees them."""
        program = (
            "import importlib.metadata as m\nfor d in m.distributions(): print(d.name, d.version)"
        )
        lines = subprocess.check_output(
            [self.venv / "bin/python", "-I", "-c", program], text=True
        ).splitlines()
        return dict(line.split() for line in lines)


def make_checkout(root: Path, shop: Path, python: Path) -> Checkout:
    locks = root / "containers/locks"
    locks.mkdir(parents=True)
    for name in ("venv.sh", "bootstrap_pip.py"):
        shutil.copy2(ROOT / "containers" / name, root / "containers")
    home = root / "home"
    home.mkdir()
    environment = {
        "PATH": os.defpath,
        "HOME": str(home),
        "LC_ALL": "C.UTF-8",
        "PYTHON": str(python),
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": f"{shop} {shop}/cpu",
        "PIP_NO_CACHE_DIR": "1",
        # Bytecode is most of a tiny install's time.
        "PIP_NO_COMPILE": "1",
        "PIP_RETRIES": "0",
        "https_proxy": NOWHERE,
    }
    checkout = Checkout(root=root, shop=shop, environment=environment)
    pip = next(shop.glob("pip-*.whl"))
    cpu = pin("setuptools==1.0", shop / "setuptools-1.0-py3-none-any.whl")
    cpu += pin("deepspeed==1.0", shop / "deepspeed-1.0.tar.gz")
    torch = shop / "cpu/torch-2.13.0+cpu-py3-none-any.whl"
    plain_torch = shop / "cuda/torch-2.13.0-py3-none-any.whl"
    checkout.lock("pip.txt", pin(f"pip=={pip.name.split('-')[1]}", pip))
    checkout.lock("torch-cpu.txt", pin("torch==2.13.0+cpu", torch, " ; python_version >= '3.0'"))
    base = pin("light==1.0", shop / "light-1.0-py3-none-any.whl")
    checkout.lock("base.txt", base)
    checkout.lock("cpu.txt", base + cpu)
    checkout.lock("cuda.txt", base + cpu + pin("torch==2.13.0", plain_torch))
    checkout.lock("dev.txt", base + cpu + pin("tool==1.0", shop / "tool-1.0-py3-none-any.whl"))
    return checkout


@pytest.fixture(scope="session")
def python_without_ensurepip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the interpreter and its standard library less ensurepip, as Debian ships it."""
    folder = tmp_path_factory.mktemp("python")
    library = folder / f"lib/python{PYTHON_VERSION}"
    (library / "site-packages").mkdir(parents=True)
    for entry in Path(os.__file__).resolve().parent.iterdir():
        if entry.name not in ("ensurepip", "site-packages", "dist-packages", "__pycache__"):
            (library / entry.name).symlink_to(entry)
    for shared in (BASE_PYTHON.parents[1] / "lib").glob("libpython*"):
        (folder / "lib" / shared.name).symlink_to(shared)
    python = folder / "bin/python3"
    python.parent.mkdir()
    shutil.copy2(BASE_PYTHON, python)
    command = [str(python), "-I", "-c", "import venv, ensurepip"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stderr.endswith("No module named 'ensurepip'\n"), done.stderr
    return python


@pytest.fixture
def checkout(tmp_path: Path, shop: Path, python_without_ensurepip: Path) -> Checkout:
    """A fresh checkout. It starts from a Python without ensurepip, which is the faster way."""
    # The blank in the path shows whether every path is quoted.
    return make_checkout(tmp_path / "a checkout", shop, python_without_ensurepip)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, shop: Path) -> Checkout:
    """A checkout with its environment, made once, on a host whose settings are awkward."""
    root = tmp_path_factory.mktemp("finished") / "a checkout"
    checkout = make_checkout(root, shop, BASE_PYTHON)
    # A module on a cluster sets PYTHONPATH, and many a pip.conf says `user = true`.
    with zipfile.ZipFile(shop / "setuptools-1.0-py3-none-any.whl") as archive:
        archive.extractall(root / "module")
    (root / "pip.conf").write_text("[install]\nuser = true\n", encoding="utf-8")
    before = contents(root)
    done = checkout.run(PYTHONPATH=str(root / "module"), PIP_CONFIG_FILE=str(root / "pip.conf"))
    assert done.returncode == 0, done.stderr
    before[str(checkout.venv)] = checkout.venv.lstat().st_mtime_ns
    assert {
        path: changed
        for path, changed in contents(root).items()
        if not path.startswith(f"{checkout.venv}{os.sep}")
    } == before, "nothing is written outside VENV"
    return checkout


@pytest.fixture
def ready(finished: Checkout, tmp_path: Path) -> Checkout:
    """A copy of the finished checkout."""
    root = tmp_path / "a checkout"
    shutil.copytree(finished.root, root, symlinks=True)
    return Checkout(root=root, shop=finished.shop, environment=dict(finished.environment))


def contents(folder: Path) -> dict[str, int]:
    """Every path below `folder` with its time of change."""
    return {str(path): path.lstat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def program(path: Path, text: str) -> Path:
    """Write an executable shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def path_without_python(folder: Path) -> str:
    """A PATH with the tools that venv.sh uses, and no Python."""
    folder.mkdir()
    text_tools = ("awk", "cut", "grep", "sed", "tail")
    for tool in ("bash", "df", "dirname", "env", "find", "ls", "mkdir", "mv", "rm", *text_tools):
        found = shutil.which(tool, path=os.defpath)
        assert found, f"{tool} is not on {os.defpath}"
        (folder / tool).symlink_to(found)
    return str(folder)


# ---- a whole run ----------------------------------------------------------------------------


def test_the_environment_holds_what_the_locks_name(finished: Checkout) -> None:
    # In spite of PYTHONPATH and `user = true`: see the fixture.
    installed = finished.installed()
    assert installed.pop("pip") == importlib.metadata.version("pip")
    assert installed.pop("light") == "1.0"
    assert installed == {"setuptools": "1.0", "torch": "2.13.0+cpu", "deepspeed": "1.0"}


def test_an_unknown_option_is_refused(checkout: Checkout) -> None:
    assert "'--develop' is not understood" in checkout.refusal("--develop")
    assert not checkout.venv.exists()


# ---- the second run -------------------------------------------------------------------------


def test_a_second_run_does_nothing_and_says_nothing(ready: Checkout) -> None:
    before = contents(ready.root)
    seconds = []
    for _ in range(5):
        began = os.times()
        done = ready.run()
        ended = os.times()
        seconds.append(
            ended.children_user + ended.children_system
            - began.children_user - began.children_system
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
    assert contents(ready.root) == before
    # Of processor time, because other work on the machine makes the clock's time longer.
    assert min(seconds) < 0.1


@pytest.mark.skipif(
    not (Path(sys.prefix) / STAMP).is_file(),
    reason="the tests do not run in an environment that containers/venv.sh made",
)
def test_the_environment_of_this_run_is_left_alone() -> None:
    stamp = Path(sys.prefix) / STAMP
    before = stamp.read_bytes(), stamp.stat().st_mtime_ns
    done = subprocess.run(
        [ROOT / "containers/venv.sh", "--dev"],
        env=os.environ | {"VENV": sys.prefix},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (stamp.read_bytes(), stamp.stat().st_mtime_ns) == before


def test_new_times_on_the_locks_change_nothing(ready: Checkout) -> None:
    for lock in (ready.root / "containers/locks").iterdir():
        os.utime(lock)
    assert ready.run().stderr == ""


@pytest.fixture
def full_disk(tmp_path: Path) -> dict[str, str]:
    """Settings under which an install is refused at its start, for want of space."""
    table = (
        "Filesystem 1024-blocks Used Available Capacity Mounted on\\n/dev/x 9 9 1048576 9%% /\\n"
    )
    program(tmp_path / "bin/df", f"printf '{table}'")
    return {"PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.defpath}"}


def lengthen_a_lock(checkout: Checkout) -> None:
    lock = checkout.root / "containers/locks/cpu.txt"
    lock.write_text("# another\n" + lock.read_text(encoding="utf-8"), encoding="utf-8")


def damage_the_stamp(checkout: Checkout) -> None:
    stamp = checkout.venv / STAMP
    stamp.write_bytes(stamp.read_bytes()[:-9])


def remove_the_stamp(checkout: Checkout) -> None:
    (checkout.venv / STAMP).unlink()


def remove_the_interpreter(checkout: Checkout) -> None:
    # As an upgrade of the system, or `pyenv uninstall`, does.
    (checkout.venv / "bin/python").unlink()
    (checkout.venv / "bin/python").symlink_to("/gone/python")


@pytest.mark.parametrize(
    "change", [lengthen_a_lock, damage_the_stamp, remove_the_stamp, remove_the_interpreter]
)
def test_a_change_starts_a_new_install(
    ready: Checkout, full_disk: dict[str, str], change: Callable[[Checkout], None]
) -> None:
    assert ready.run(**full_disk).stderr == ""
    change(ready)
    error = ready.refusal(**full_disk)
    assert "1024 MiB are free on its file system, 3000 are needed" in error
    # What was there is gone, so nothing half new and half old can be left.
    assert not (ready.venv / "bin").exists()


def test_dev_adds_to_a_plain_environment_and_satisfies_it(ready: Checkout) -> None:
    (ready.venv / "left over").touch()
    done = ready.run("--dev")
    assert done.returncode == 0, done.stderr
    assert "adding what containers/locks/dev.txt has beyond cpu" in done.stderr
    assert ready.installed()["tool"] == "1.0"
    assert (ready.venv / "left over").exists()
    assert ready.run().stderr == ""
    assert ready.run("--dev").stderr == ""


def test_base_has_no_torch_and_grows_into_the_rest(checkout: Checkout) -> None:
    assert checkout.run("--base").returncode == 0
    assert set(checkout.installed()) == {"pip", "light"}
    (checkout.venv / "left over").touch()
    done = checkout.run()
    assert "adding what containers/locks/cpu.txt has beyond base" in done.stderr
    assert checkout.installed()["torch"] == "2.13.0+cpu"
    assert (checkout.venv / "left over").exists()
    assert checkout.run("--base").stderr == ""


def test_nothing_is_added_to_what_is_out_of_date(checkout: Checkout) -> None:
    assert checkout.run().returncode == 0
    (checkout.venv / "left over").touch()
    # What base names is as it was; the rest of the environment is not.
    lengthen_a_lock(checkout)
    done = checkout.run()
    assert done.returncode == 0, done.stderr
    assert "installing the cpu environment" in done.stderr
    assert not (checkout.venv / "left over").exists()


def test_the_cuda_environment_serves_to_train_and_is_not_replaced(checkout: Checkout) -> None:
    checkout.environment["PIP_FIND_LINKS"] = f"{checkout.shop} {checkout.shop}/cuda"
    done = checkout.run("--cuda")
    assert done.returncode == 0, done.stderr
    assert checkout.installed()["torch"] == "2.13.0"
    assert checkout.run().stderr == ""
    assert checkout.run("--base").stderr == ""
    refused = checkout.run("--dev")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "error: VENV=.venv: holds the cuda environment" in refused.stderr
    assert checkout.installed()["torch"] == "2.13.0"


# ---- interruptions, and two at once ---------------------------------------------------------


def slow_tool(folder: Path, name: str, seconds: int) -> str:
    """A PATH on which the tool `name` takes its time, so that there is a moment to interrupt."""
    real = shutil.which(name, path=os.defpath)
    program(folder / name, f'sleep {seconds}\nexec {real} "$@"')
    return f"{folder}{os.pathsep}{os.defpath}"


def interrupt(checkout: Checkout, folder: Path, blow: signal.Signals) -> tuple[int, str]:
    """Start an install, strike it between torch and the rest; return its status and words."""
    # awk runs for the disk check, and again at that point.
    process = checkout.start(PATH=slow_tool(folder, "awk", 4))
    assert process.stderr
    said = ""
    while "packages)" not in said:
        line = process.stderr.readline()
        assert line, said
        said += line
    os.killpg(process.pid, blow)
    said += process.communicate(timeout=30)[1]
    assert not (checkout.venv / STAMP).exists()
    assert "torch" in checkout.installed()
    return process.returncode, said


def test_an_install_that_is_killed_is_repaired_by_the_next(
    checkout: Checkout, tmp_path: Path
) -> None:
    status, _ = interrupt(checkout, tmp_path / "bin", signal.SIGKILL)
    assert status == -signal.SIGKILL
    done = checkout.run()
    assert done.returncode == 0, done.stderr
    assert checkout.installed()["deepspeed"] == "1.0"


def test_ctrl_c_is_no_error(checkout: Checkout, tmp_path: Path) -> None:
    status, said = interrupt(checkout, tmp_path / "bin", signal.SIGINT)
    assert status == 130
    assert said.endswith(".venv: interrupted; the next run starts again\n")
    assert "error" not in said


def test_of_two_at_once_the_second_waits_and_does_nothing(
    checkout: Checkout, tmp_path: Path
) -> None:
    path = slow_tool(tmp_path / "bin", "awk", 1)
    first, second = checkout.start(PATH=path), checkout.start(PATH=path)
    said = [first.communicate(timeout=240)[1], second.communicate(timeout=240)[1]]
    assert (first.returncode, second.returncode) == (0, 0), said
    waited, worked = sorted(said, key=len)
    assert waited == ".venv: waiting for another set-up of it to end\n"
    assert "ready after" in worked


# ---- the interpreter ------------------------------------------------------------------------


def test_a_PYTHON_that_does_not_run_is_refused(checkout: Checkout, tmp_path: Path) -> None:
    # As a pyenv shim does for a version that is listed but not installed.
    shim = program(tmp_path / "shim", "echo 'pyenv: python3: command not found' >&2; exit 127")
    assert f"PYTHON={shim}: does not run" in checkout.refusal(PYTHON=str(shim))
    assert not checkout.venv.exists()


@pytest.mark.parametrize("version", ["3.9", "3.10", "3.15", "2.7"])
def test_a_PYTHON_of_another_version_is_refused(
    checkout: Checkout, tmp_path: Path, version: str
) -> None:
    old = program(tmp_path / "python", f"echo '{version} /usr/bin/python'")
    error = checkout.refusal(PYTHON=str(old))
    assert f"this is Python {version}; set PYTHON to one from 3.11 to 3.14" in error
    assert not checkout.venv.exists()


def test_no_python_at_all_is_one_clear_line(checkout: Checkout, tmp_path: Path) -> None:
    path = path_without_python(tmp_path / "bin")
    error = checkout.refusal(PYTHON="", PATH=path)
    assert error == (
        "error: PATH: no Python from 3.11 to 3.14 that runs; install one, or set PYTHON to its path"
    )


def test_shims_and_old_versions_on_PATH_are_passed_over(
    checkout: Checkout, tmp_path: Path, full_disk: dict[str, str]
) -> None:
    program(tmp_path / "shims/python3", "exit 127")
    program(tmp_path / "shims/python3.14", "exit 127")
    program(tmp_path / "old/python3", "echo '3.9 /usr/bin/python3'")
    tools = path_without_python(tmp_path / "tools")
    # Enough to see which interpreter was chosen.
    shutil.copy2(tmp_path / "bin/df", tmp_path / "old")
    (tmp_path / "tools" / f"python{PYTHON_VERSION}").symlink_to(BASE_PYTHON)
    path = os.pathsep.join([str(tmp_path / "shims"), str(tmp_path / "old"), tools])
    said = checkout.run(PYTHON="", PATH=path).stderr
    assert f"installing the cpu environment with Python {PYTHON_VERSION} " in said


def test_an_active_environment_can_make_itself_again(ready: Checkout) -> None:
    (ready.venv / STAMP).unlink()
    path = f"{ready.venv / 'bin'}{os.pathsep}{os.defpath}"
    done = ready.run(PYTHON="", PATH=path)
    assert done.returncode == 0, done.stderr
    assert (ready.venv / "bin/python").resolve() == BASE_PYTHON


# ---- the folder and the disk ----------------------------------------------------------------


def test_a_folder_of_the_user_is_never_cleared(checkout: Checkout, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").touch()
    assert "was not made by containers/venv.sh" in checkout.refusal(VENV=str(mine))
    assert [path.name for path in mine.iterdir()] == ["thesis.tex"]


def test_a_path_that_cannot_be_made_is_refused(checkout: Checkout, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    error = checkout.refusal(VENV=str(tmp_path / "file" / "venv"))
    assert "cannot be made or written" in error


# ---- torch: the CPU build, and nothing else -------------------------------------------------


def without_hash_for_this_machine(checkout: Checkout) -> None:
    torch = checkout.shop / "cpu/torch-2.13.0+cpu-py3-none-any.whl"
    checkout.lock("torch-cpu.txt", pin("torch==2.13.0+cpu", torch, " ; python_version < '3.0'"))


linux_only = pytest.mark.skipif(sys.platform != "linux", reason="macOS has one build of torch")


@linux_only
def test_the_cpu_build_is_taken_where_newer_cuda_builds_lie(checkout: Checkout) -> None:
    shop = checkout.shop
    without_hash_for_this_machine(checkout)
    done = checkout.run(PIP_FIND_LINKS=f"{shop} {shop}/cuda {shop}/cpu")
    assert done.returncode == 0, done.stderr
    assert "no hash is locked for torch 2.13.0+cpu" in done.stderr
    assert checkout.installed()["torch"] == "2.13.0+cpu"


@linux_only
def test_a_cuda_build_alone_is_refused(checkout: Checkout) -> None:
    shop = checkout.shop
    without_hash_for_this_machine(checkout)
    error = checkout.refusal(PIP_FIND_LINKS=f"{shop} {shop}/cuda")
    assert "torch 2.13.0+cpu: no CPU build for Python" in error
    assert "torch" not in checkout.installed()


@linux_only
def test_a_torch_with_another_hash_is_refused(checkout: Checkout) -> None:
    checkout.lock("torch-cpu.txt", f"torch==2.13.0+cpu \\\n    --hash=sha256:{'0' * 64}\n")
    done = checkout.run()
    assert done.returncode == 2
    assert "DO NOT MATCH THE HASHES" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: torch 2.13.0+cpu: could not be")
    assert "torch" not in checkout.installed()


@linux_only
def test_a_network_that_is_down_is_not_called_a_missing_wheel(checkout: Checkout) -> None:
    error = checkout.refusal(
        PIP_NO_INDEX="0", PIP_INDEX_URL=f"{NOWHERE}/simple", PIP_FIND_LINKS=str(checkout.shop)
    )
    assert re.match(
        r"error: torch 2\.13\.0\+cpu: http://127\.0\.0\.1:9/simple/torch/ could not be reached"
        r" \(.*\), https://download\.pytorch\.org/whl/cpu/torch/ could not be reached \(.*\);",
        error,
    )


# ---- servers --------------------------------------------------------------------------------


class Server(http.server.ThreadingHTTPServer):
    """Serves `pages` on loopback; `certificate` lets it pose as any host behind a proxy."""

    daemon_threads = True

    def __init__(self, pages: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.pages = pages
        self.password = ""
        self.certificate: ssl.SSLContext | None = None
        self.asked: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Answer(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        expected = f"Basic {base64.b64encode(self.server.password.encode()).decode()}"
        page = self.server.pages.get(self.path)
        if self.server.password and self.headers.get("Authorization") != expected:
            self.send_error(401)
        elif page is None:
            self.send_error(404)
        else:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            self.wfile.write(page)

    def do_CONNECT(self) -> None:
        """Be the proxy and, within the tunnel, the host that was asked for."""
        self.server.asked.append(self.path)
        if self.server.certificate is None:
            self.send_error(403)
            return
        self.send_response(200)
        self.end_headers()
        self.connection = self.server.certificate.wrap_socket(self.connection, server_side=True)
        self.rfile = self.connection.makefile("rb")
        self.wfile = self.connection.makefile("wb", buffering=0)
        self.close_connection = False


@pytest.fixture
def serve() -> Iterator[Callable[[dict[str, bytes]], Server]]:
    servers: list[Server] = []

    def start(pages: dict[str, bytes]) -> Server:
        server = Server(pages)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def link(target: str) -> bytes:
    return f"<!DOCTYPE html><html><body><a href='{target}'>a file</a></body></html>".encode()


def pose_as(host: str, server: Server, folder: Path) -> Path:
    """Give `server` a certificate for `host`; return the CA bundle that trusts it."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, host)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    bundle, private = folder / "ca.pem", folder / "key.pem"
    bundle.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    server.certificate = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.certificate.load_cert_chain(bundle, private)
    return bundle


@linux_only
def test_pytorchs_own_index_is_asked_when_the_configured_one_has_no_cpu_build(
    checkout: Checkout, serve: Callable[[dict[str, bytes]], Server], tmp_path: Path
) -> None:
    # As on an ordinary machine: the configured index has the plain build only.
    cpu, cuda = "torch-2.13.0+cpu-py3-none-any.whl", "torch-2.13.0-py3-none-any.whl"
    index = serve(
        {
            "/simple/torch/": link(f"/files/{cuda}"),
            f"/files/{cuda}": (checkout.shop / "cuda" / cuda).read_bytes(),
        }
    )
    pytorch = serve(
        {
            "/whl/cpu/torch/": link("/whl/" + cpu.replace("+", "%2B")),
            "/whl/" + cpu.replace("+", "%2B"): (checkout.shop / "cpu" / cpu).read_bytes(),
        }
    )
    done = checkout.run(
        PIP_NO_INDEX="0",
        PIP_INDEX_URL=f"{index.url}/simple",
        PIP_FIND_LINKS=str(checkout.shop),
        PIP_CERT=str(pose_as("download.pytorch.org", pytorch, tmp_path)),
        https_proxy=pytorch.url,
    )
    assert done.returncode == 0, done.stderr
    assert checkout.installed()["torch"] == "2.13.0+cpu"
    assert f"/files/{cuda}" not in index.asked
    assert "download.pytorch.org:443" in pytorch.asked
    assert "no hash is locked" not in done.stderr


# ---- a Python without ensurepip -------------------------------------------------------------


def test_the_hosts_pip_fills_in_where_ensurepip_is_missing(
    checkout: Checkout, python_without_ensurepip: Path, tmp_path: Path
) -> None:
    # Debian with python3-pip, but without python3-venv.
    host = tmp_path / "debian"
    shutil.copytree(python_without_ensurepip.parents[1], host, symlinks=True)
    python = host / "bin/python3"
    # Debian's name for site-packages is another; its last one belongs to the distribution.
    where = subprocess.check_output(
        [python, "-I", "-c", "import site; print(site.getsitepackages()[-1])"], text=True
    )
    Path(where.strip()).mkdir(parents=True, exist_ok=True)
    pip = Path(str(importlib.metadata.distribution("pip").locate_file("pip")))
    (Path(where.strip()) / "pip").symlink_to(pip)
    (checkout.root / "containers/bootstrap_pip.py").unlink()
    done = checkout.run(PYTHON=str(python))
    assert done.returncode == 0, done.stderr
    assert checkout.installed()["pip"] == importlib.metadata.version("pip")


def test_a_python_without_ensurepip_and_a_network_is_one_clear_line(
    checkout: Checkout,
) -> None:
    error = checkout.refusal(PIP_NO_INDEX="", PIP_FIND_LINKS="", PIP_INDEX_URL=f"{NOWHERE}/simple")
    assert re.search(r"http://127.0.0.1:9/simple/pip/ could not be read \(.*refused\)", error)
    assert "python3-venv" in error


# ---- bootstrap_pip.py -----------------------------------------------------------------------


@dataclass(kw_only=True)
class Bare:
    """A virtual environment without pip, and a lock."""

    python: Path
    lock: Path
    wheel: Path

    def bootstrap(self, **environment: str) -> subprocess.CompletedProcess[str]:
        # Like venv.sh, with -I; PIP_CONFIG_FILE keeps this machine's pip.conf out.
        settings = {"PATH": os.defpath, "PIP_CONFIG_FILE": os.devnull} | environment
        script = ROOT / "containers/bootstrap_pip.py"
        return subprocess.run(
            [self.python, "-I", script, self.lock],
            env=settings,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def pip_version(self) -> str:
        command = [str(self.python), "-I", "-m", "pip", "--version"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.split()[1] if done.returncode == 0 else ""


@pytest.fixture
def bare(tmp_path: Path, shop: Path) -> Bare:
    command = [str(BASE_PYTHON), "-I", "-m", "venv", "--without-pip", str(tmp_path / "bare")]
    subprocess.run(command, check=True)
    wheel = next(shop.glob("pip-*.whl"))
    lock = tmp_path / "pip.txt"
    lock.write_text(pin(f"pip=={wheel.name.split('-')[1]}", wheel), encoding="utf-8")
    return Bare(python=tmp_path / "bare/bin/python", lock=lock, wheel=wheel)


def index_pages(wheel: Path, content: bytes | None = None) -> dict[str, bytes]:
    """A simple index with pip's wheel, linked relatively and with a hash, as indexes do."""
    return {
        "/simple/pip/": link(f"../../files/{wheel.name}#sha256={sha256(wheel)}"),
        f"/files/{wheel.name}": content if content is not None else wheel.read_bytes(),
    }


def test_bootstrap_takes_pip_from_the_configured_index(
    bare: Bare, serve: Callable[[dict[str, bytes]], Server], tmp_path: Path
) -> None:
    server = serve(index_pages(bare.wheel))
    server.password = "me:se@cret"
    settings = tmp_path / "pip.conf"
    index = server.url.replace("//", "//me:se%40cret@")
    settings.write_text(f"[global]\nindex-url = {index}/simple/\n", encoding="utf-8")
    done = bare.bootstrap(PIP_CONFIG_FILE=str(settings))
    assert (done.returncode, done.stderr) == (0, "")
    assert bare.pip_version() == importlib.metadata.version("pip")


def test_bootstrap_refuses_other_bytes_under_the_same_name(
    bare: Bare, serve: Callable[[dict[str, bytes]], Server]
) -> None:
    server = serve(index_pages(bare.wheel, bare.wheel.read_bytes() + b"!"))
    done = bare.bootstrap(PIP_INDEX_URL=f"{server.url}/simple")
    assert done.returncode == 2
    assert re.fullmatch(r"error: pip-.*\.whl: .*\(its sha256 differs\).*\n", done.stderr)
    assert bare.pip_version() == ""


def test_bootstrap_goes_on_to_the_next_source(
    bare: Bare, serve: Callable[[dict[str, bytes]], Server], tmp_path: Path
) -> None:
    first = serve({"/simple/pip/": link("pip-0.1-py3-none-any.whl")})
    second = serve(index_pages(bare.wheel))
    done = bare.bootstrap(
        PIP_FIND_LINKS=str(tmp_path),
        PIP_INDEX_URL=f"{first.url}/simple",
        PIP_EXTRA_INDEX_URL=f"{second.url}/simple",
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert first.asked == ["/simple/pip/"]


def test_bootstrap_trusts_the_certificate_that_pip_would_trust(
    bare: Bare, serve: Callable[[dict[str, bytes]], Server], tmp_path: Path
) -> None:
    server = serve(index_pages(bare.wheel))
    bundle = pose_as("index.example.org", server, tmp_path)
    settings = {"PIP_INDEX_URL": "https://index.example.org/simple", "PIP_PROXY": server.url}
    refused = bare.bootstrap(**settings)
    assert refused.returncode == 2
    assert "CERTIFICATE_VERIFY_FAILED" in refused.stderr
    done = bare.bootstrap(**settings, PIP_CERT=str(bundle))
    assert (done.returncode, done.stderr) == (0, "")


def test_bootstrap_never_shows_a_password(
    bare: Bare, serve: Callable[[dict[str, bytes]], Server]
) -> None:
    server = serve({})
    index = server.url.replace("//", "//me:secret@")
    done = bare.bootstrap(PIP_INDEX_URL=f"{index}/simple")
    assert done.returncode == 2
    assert f"{server.url}/simple/pip/ could not be read (Not Found)" in done.stderr
    assert "secret" not in done.stderr


def test_bootstrap_wants_an_environment(bare: Bare) -> None:
    outside = Bare(python=BASE_PYTHON, lock=bare.lock, wheel=bare.wheel)
    done = outside.bootstrap()
    assert done.returncode == 2
    assert "run containers/venv.sh" in done.stderr
