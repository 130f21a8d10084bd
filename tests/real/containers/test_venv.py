"""containers/venv.sh and bootstrap_pip.py, with the real pip, tiny packages and no network.

A `shop` folder holds wheels that these tests build: pip itself (packed again from the environment
that runs the tests), torch as a CPU and as a plain build, and a few others. The scripts run from
a copy of containers/ whose locks pin just these. Few tests begin with nothing: most go on from
links to one of two environments that are made once, a light one and a finished one.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.package_index import link, pose_as, serving
from tests.shared import CHECKOUT
from tests.waiting import finish, wait_until

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
    # For EXTRA: one that any lock goes with, in two versions, and what it needs; one that wants
    # to change the lock.
    for name, version, needs in (
        ("own", "1.0", "light>=1"),
        ("own", "2.0", "needed"),
        ("needed", "3.0", "light"),
        ("rival", "4.0", "light<1"),
    ):
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        info = f"{name}-{version}.dist-info/METADATA"
        write_wheel(folder, name, version, {info: f"{metadata}Requires-Dist: {needs}\n".encode()})
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
        done = finish(self.start(*arguments, **environment))
        assert done.stdout == "", "only problems and progress are said, and both on stderr"
        return done

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
    for name in ("venv.sh", "bootstrap_pip.py", "extra.py"):
        shutil.copy2(CHECKOUT / "containers" / name, root / "containers")
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
    deepspeed = pin("deepspeed==1.0", shop / "deepspeed-1.0.tar.gz")
    torch = shop / "cpu/torch-2.13.0+cpu-py3-none-any.whl"
    plain_torch = shop / "cuda/torch-2.13.0-py3-none-any.whl"
    checkout.lock("pip.txt", pin(f"pip=={pip.name.split('-')[1]}", pip))
    checkout.lock("torch-cpu.txt", pin("torch==2.13.0+cpu", torch, " ; python_version >= '3.0'"))
    base = pin("light==1.0", shop / "light-1.0-py3-none-any.whl")
    checkout.lock("base.txt", base)
    checkout.lock("cpu.txt", base + cpu + deepspeed)
    checkout.lock("cuda.txt", base + cpu + pin("torch==2.13.0", plain_torch))
    tool = pin("tool==1.0", shop / "tool-1.0-py3-none-any.whl")
    checkout.lock("dev.txt", base + cpu + deepspeed + tool)
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


@pytest.fixture(scope="session")
def python_with_pip_alone(
    tmp_path_factory: pytest.TempPathFactory, python_without_ensurepip: Path
) -> Path:
    """The same with a pip: a Debian with python3-pip, but without python3-venv."""
    folder = tmp_path_factory.mktemp("debian") / "usr"
    shutil.copytree(python_without_ensurepip.parents[1], folder, symlinks=True)
    python = folder / "bin/python3"
    # Debian's name for site-packages is another; its last one belongs to the distribution.
    program = "import site; print(site.getsitepackages()[-1])"
    where = Path(subprocess.check_output([python, "-I", "-c", program], text=True).strip())
    where.mkdir(parents=True, exist_ok=True)
    pip = importlib.metadata.distribution("pip").locate_file("pip")
    (where / "pip").symlink_to(str(pip))
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


@pytest.fixture(scope="module")
def light(
    tmp_path_factory: pytest.TempPathFactory, shop: Path, python_with_pip_alone: Path
) -> Checkout:
    """A checkout with the light environment, made once, by the host's pip."""
    root = tmp_path_factory.mktemp("light") / "a checkout"
    checkout = make_checkout(root, shop, python_with_pip_alone)
    (root / "containers/bootstrap_pip.py").unlink()
    done = checkout.run("--base")
    assert done.returncode == 0, done.stderr
    shutil.copy2(CHECKOUT / "containers/bootstrap_pip.py", root / "containers")
    return checkout


def copy_of(made: Checkout, root: Path) -> Checkout:
    """A copy of a checkout; packages are links, because pip replaces files and changes none."""

    def put(source: str, target: str) -> None:
        (os.link if "site-packages" in source else shutil.copy2)(source, target)

    shutil.copytree(made.root, root, symlinks=True, copy_function=put)
    return Checkout(root=root, shop=made.shop, environment=dict(made.environment))


@pytest.fixture
def ready(finished: Checkout, tmp_path: Path) -> Checkout:
    """A copy of the finished checkout."""
    return copy_of(finished, tmp_path / "a checkout")


@pytest.fixture
def growing(light: Checkout, tmp_path: Path) -> Checkout:
    """A copy of the light one, whose cpu.txt adds no more than setuptools."""
    checkout = copy_of(light, tmp_path / "a checkout")
    wheel = checkout.shop / "setuptools-1.0-py3-none-any.whl"
    base = (checkout.root / "containers/locks/base.txt").read_text(encoding="utf-8")
    checkout.lock("cpu.txt", base + pin("setuptools==1.0", wheel))
    return checkout


def contents(folder: Path) -> dict[str, int]:
    """Every path below `folder` with its time of change."""
    return {str(path): path.lstat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def program(path: Path, text: str) -> Path:
    """Write an executable shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def path_with(folder: Path, *tools: str) -> str:
    """A PATH that has just these tools of the system."""
    folder.mkdir()
    for tool in tools:
        found = shutil.which(tool, path=os.defpath)
        assert found, f"{tool} is not on {os.defpath}"
        (folder / tool).symlink_to(found)
    return str(folder)


def path_without_python(folder: Path) -> str:
    """A PATH with the tools that venv.sh uses, and no Python."""
    text_tools = ("awk", "cut", "grep", "sed", "tail")
    files = ("df", "dirname", "find", "ls", "mkdir", "mv", "rm")
    return path_with(folder, "bash", "env", *files, *text_tools)


# ---- a whole run ----------------------------------------------------------------------------


def test_the_environment_holds_what_the_locks_name(finished: Checkout) -> None:
    # In spite of PYTHONPATH and `user = true`: see the fixture.
    installed = finished.installed()
    assert installed.pop("pip") == importlib.metadata.version("pip")
    assert installed.pop("light") == "1.0"
    assert installed == {"setuptools": "1.0", "torch": "2.13.0+cpu", "deepspeed": "1.0"}


def test_an_unknown_option_is_refused(checkout: Checkout) -> None:
    assert "unknown arguments '--develop'" in checkout.refusal("--develop")
    assert not checkout.venv.exists()


# ---- the second run -------------------------------------------------------------------------


def test_a_second_run_looks_at_what_is_there_and_does_nothing(
    ready: Checkout, tmp_path: Path
) -> None:
    # As a checkout or a copy gives them.
    for lock in (ready.root / "containers/locks").iterdir():
        os.utime(lock)
    before = contents(ready.root)
    # With these, and the environment's own interpreter, nothing else can be begun.
    path = path_with(tmp_path / "bin", "bash", "dirname", "grep")
    done = ready.run(PATH=path, PYTHON="/nowhere")
    assert (done.returncode, done.stderr) == (0, "")
    assert contents(ready.root) == before


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
    done = ready.run(**full_disk)
    assert done.returncode == 2
    # Nothing is added to what is out of date, even where all that base names is as it was.
    begun, error = done.stderr.splitlines()
    assert "installing the cpu environment" in begun
    assert error.startswith("error: VENV=.venv: 1024 MiB are free on its file system, 3000 are ")
    # What was there is gone, so nothing half new and half old can be left.
    assert [path.name for path in ready.venv.iterdir()] == [".sluice-lock"]


def test_dev_adds_to_a_plain_environment_and_satisfies_it(ready: Checkout) -> None:
    (ready.venv / "left over").touch()
    done = ready.run("--dev")
    assert done.returncode == 0, done.stderr
    assert "adding what containers/locks/dev.txt has in addition to cpu" in done.stderr
    assert ready.installed()["tool"] == "1.0"
    assert (ready.venv / "left over").exists()
    assert ready.run().stderr == ""
    assert ready.run("--dev").stderr == ""


def test_base_has_no_torch_and_the_hosts_pip_fills_in_where_ensurepip_is_missing(
    light: Checkout,
) -> None:
    assert light.installed() == {"pip": importlib.metadata.version("pip"), "light": "1.0"}


def test_base_grows_into_the_rest_and_of_two_at_once_the_second_waits(
    growing: Checkout, tmp_path: Path
) -> None:
    (growing.venv / "left over").touch()
    # The first has the lock when it looks how much room there is.
    moment = Moment(tmp_path / "bin", "df", "*")
    first = growing.start(PATH=moment.path)
    moment.wait(first)
    second = growing.start()
    assert second.stderr
    assert second.stderr.readline() == ".venv: waiting for another set-up of it to finish\n"
    moment.go_on()
    worked, waited = finish(first), finish(second)
    assert (worked.returncode, waited.returncode) == (0, 0), worked.stderr + waited.stderr
    assert "adding what containers/locks/cpu.txt has in addition to base" in worked.stderr
    assert "ready after" in worked.stderr
    assert waited.stderr == ""
    assert growing.installed()["torch"] == "2.13.0+cpu"
    assert (growing.venv / "left over").exists()
    assert growing.run("--base").stderr == ""


def test_the_cuda_environment_serves_to_train_and_is_not_replaced(growing: Checkout) -> None:
    growing.environment["PIP_FIND_LINKS"] = f"{growing.shop} {growing.shop}/cuda"
    done = growing.run("--cuda")
    assert done.returncode == 0, done.stderr
    assert growing.installed()["torch"] == "2.13.0"
    assert growing.run().stderr == ""
    assert growing.run("--base").stderr == ""
    refused = growing.run("--dev")
    assert refused.returncode == 2
    assert "error: VENV=.venv: holds the cuda environment" in refused.stderr
    assert growing.installed()["torch"] == "2.13.0"


# ---- packages of the user's own -------------------------------------------------------------


def others(checkout: Checkout) -> dict[str, str]:
    """The packages that are not the lock's; they are recorded, too."""
    found = checkout.installed()
    for name in ("pip", "light", "setuptools", "torch", "deepspeed", "tool"):
        found.pop(name, None)
    lines = (checkout.venv / "share/extra.txt").read_text(encoding="utf-8").splitlines()
    assert dict(line.split("==") for line in lines) == found
    return found


def ask_for(checkout: Checkout, text: str) -> str:
    """Write a file of requirements; return the option that names it."""
    (checkout.root / "my packages.txt").write_text(text, encoding="utf-8")
    return "--extra=my packages.txt"


def test_own_packages_stay_until_others_are_asked_for(growing: Checkout) -> None:
    option = ask_for(growing, "own\n")
    wheel = growing.shop / "tool-1.0-py3-none-any.whl"
    cpu = (growing.root / "containers/locks/cpu.txt").read_text(encoding="utf-8")
    growing.lock("dev.txt", cpu + pin("tool==1.0", wheel))
    done = growing.run(option)
    assert done.returncode == 0, done.stderr
    assert "\n  beyond the lock: needed==3.0 own==2.0\n" in f"\n{done.stderr}"
    assert others(growing) == {"own": "2.0", "needed": "3.0"}
    for words in ([option], [], ["--cpu"], ["--base"]):
        assert growing.run(*words).stderr == ""
    # More of the lock, then another lock: both bring them along.
    assert growing.run("--dev").returncode == 0
    assert growing.installed()["tool"] == "1.0"
    assert others(growing) == {"own": "2.0", "needed": "3.0"}
    lengthen_a_lock(growing)
    done = growing.run()
    assert "installing the cpu environment" in done.stderr
    assert others(growing) == {"own": "2.0", "needed": "3.0"}
    # The file is not read again until it is named.
    option = ask_for(growing, "# another\nown<2\n")
    assert growing.run().stderr == ""
    assert growing.run(option).returncode == 0
    assert others(growing) == {"own": "1.0"}


def test_what_does_not_go_with_the_lock_is_refused_and_changes_nothing(ready: Checkout) -> None:
    assert ready.run(ask_for(ready, "own==1.0\n")).returncode == 0
    before, stamp = ready.installed(), (ready.venv / STAMP).read_text()
    for text, said in (
        ("own\nrival\n", "error: EXTRA: rival 4.0 needs light<1, but the lock has light 1.0, "),
        ("nowhere\n", "error: EXTRA: nowhere: pip finds no such package or version for Python 3"),
        ("own @ file:///tmp/own.whl", "error: EXTRA=my packages.txt: line 1: is an address or a "),
    ):
        done = ready.run(ask_for(ready, text))
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1].startswith(said), done.stderr
        assert done.stderr.count("error") == 1
        assert (ready.installed(), (ready.venv / STAMP).read_text()) == (before, stamp)
    assert ready.run().stderr == ""


# ---- interruptions --------------------------------------------------------------------------


class Moment:
    """A PATH on which `tool`, called with words like `pattern`, waits until it is let go on."""

    def __init__(self, folder: Path, tool: str, pattern: str) -> None:
        real = shutil.which(tool, path=os.defpath)
        folder.mkdir()
        self.reached, self.gate = folder / "reached", folder / "gate"
        os.mkfifo(self.gate)
        # A shell that is interrupted here would say so.
        wait = f": >'{self.reached}'; {{ read -r word <'{self.gate}'; }} 2>/dev/null"
        program(folder / tool, f'case "$*" in {pattern}) {wait};; esac\nexec {real} "$@"')
        self.path = f"{folder}{os.pathsep}{os.defpath}"

    def wait(self, process: subprocess.Popen[str]) -> None:
        """Wait until `process`, or one below it, is there."""
        wait_until(lambda: self.reached.exists() or process.poll() is not None, "the moment")
        assert process.poll() is None, finish(process)

    def go_on(self) -> None:
        self.gate.write_text("go\n")


def interrupt(growing: Checkout, folder: Path, blow: signal.Signals) -> tuple[int, str]:
    """Start an install, strike it between torch and the rest; return its status and words."""
    growing.lock("cpu.txt", (growing.root / "containers/locks/dev.txt").read_text())
    # deepspeed's line is taken out of the lock when torch is there.
    moment = Moment(folder, "awk", "*deepspeed*")
    process = growing.start(PATH=moment.path)
    moment.wait(process)
    os.killpg(process.pid, blow)
    done = finish(process)
    assert not (growing.venv / STAMP).exists()
    assert growing.installed().keys() == {"pip", "light", "torch"}
    return done.returncode, done.stderr


def test_an_install_that_is_killed_is_repaired_by_the_next(
    growing: Checkout, python_without_ensurepip: Path, tmp_path: Path
) -> None:
    status, _ = interrupt(growing, tmp_path / "bin", signal.SIGKILL)
    assert status == -signal.SIGKILL
    # Where neither ensurepip nor a pip is there, containers/bootstrap_pip.py brings one.
    done = growing.run("--base", PYTHON=str(python_without_ensurepip))
    assert done.returncode == 0, done.stderr
    assert growing.installed().keys() == {"pip", "light"}


def test_ctrl_c_is_no_error(growing: Checkout, tmp_path: Path) -> None:
    status, said = interrupt(growing, tmp_path / "bin", signal.SIGINT)
    assert status == 130
    assert said.endswith(".venv: interrupted; the next run starts again\n")
    assert "error" not in said


# ---- the interpreter ------------------------------------------------------------------------


def test_a_PYTHON_that_does_not_run_is_refused(checkout: Checkout, tmp_path: Path) -> None:
    # As a pyenv shim does for a version that is listed but not installed.
    shim = program(tmp_path / "shim", "echo 'pyenv: python3: command not found' >&2; exit 127")
    assert f"PYTHON={shim}: does not run" in checkout.refusal(PYTHON=str(shim))
    assert not checkout.venv.exists()


def test_a_PYTHON_of_another_version_is_refused(checkout: Checkout, tmp_path: Path) -> None:
    for version in ("3.10", "3.15"):
        other = program(tmp_path / "python", f"echo '{version} /usr/bin/python'")
        error = checkout.refusal(PYTHON=str(other))
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
    assert "cannot be created or written" in error


# ---- torch: the CPU build, and nothing else -------------------------------------------------


def without_hash_for_this_machine(checkout: Checkout) -> None:
    torch = checkout.shop / "cpu/torch-2.13.0+cpu-py3-none-any.whl"
    checkout.lock("torch-cpu.txt", pin("torch==2.13.0+cpu", torch, " ; python_version < '3.0'"))


linux_only = pytest.mark.skipif(sys.platform != "linux", reason="macOS has one build of torch")


@linux_only
def test_the_cpu_build_is_taken_where_newer_cuda_builds_lie(growing: Checkout) -> None:
    shop = growing.shop
    without_hash_for_this_machine(growing)
    done = growing.run(PIP_FIND_LINKS=f"{shop} {shop}/cuda {shop}/cpu")
    assert done.returncode == 0, done.stderr
    assert "no hash is locked for torch 2.13.0+cpu" in done.stderr
    assert growing.installed()["torch"] == "2.13.0+cpu"


@linux_only
def test_a_cuda_build_alone_is_refused(growing: Checkout) -> None:
    shop = growing.shop
    without_hash_for_this_machine(growing)
    error = growing.refusal(PIP_FIND_LINKS=f"{shop} {shop}/cuda")
    assert "torch 2.13.0+cpu: no CPU build for Python" in error
    assert "torch" not in growing.installed()


@linux_only
def test_a_torch_with_another_hash_is_refused(growing: Checkout) -> None:
    growing.lock("torch-cpu.txt", f"torch==2.13.0+cpu \\\n    --hash=sha256:{'0' * 64}\n")
    done = growing.run()
    assert done.returncode == 2
    assert "DO NOT MATCH THE HASHES" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: torch 2.13.0+cpu: could not be")
    assert "torch" not in growing.installed()


@linux_only
def test_a_network_that_is_down_is_not_called_a_missing_wheel(growing: Checkout) -> None:
    error = growing.refusal(
        PIP_NO_INDEX="0", PIP_INDEX_URL=f"{NOWHERE}/simple", PIP_FIND_LINKS=str(growing.shop)
    )
    assert re.match(
        r"error: torch 2\.13\.0\+cpu: http://127\.0\.0\.1:9/simple/torch/ could not be reached"
        r" \(.*\), https://download\.pytorch\.org/whl/cpu/torch/ could not be reached \(.*\);",
        error,
    )


@linux_only
def test_pytorchs_own_index_is_asked_when_the_configured_one_has_no_cpu_build(
    growing: Checkout, tmp_path: Path
) -> None:
    # As on an ordinary machine: the configured index has the plain build only.
    cpu, cuda = "torch-2.13.0+cpu-py3-none-any.whl", "torch-2.13.0-py3-none-any.whl"
    pages = {
        "/simple/torch/": link(f"/files/{cuda}"),
        f"/files/{cuda}": (growing.shop / "cuda" / cuda).read_bytes(),
    }
    cpu_pages = {
        "/whl/cpu/torch/": link("/whl/" + cpu.replace("+", "%2B")),
        "/whl/" + cpu.replace("+", "%2B"): (growing.shop / "cpu" / cpu).read_bytes(),
    }
    with serving(pages) as index, serving(cpu_pages) as pytorch:
        done = growing.run(
            PIP_NO_INDEX="0",
            PIP_INDEX_URL=f"{index.url}/simple",
            PIP_FIND_LINKS=str(growing.shop),
            PIP_CERT=str(pose_as("download.pytorch.org", pytorch, tmp_path)),
            https_proxy=pytorch.url,
        )
        assert done.returncode == 0, done.stderr
        assert growing.installed()["torch"] == "2.13.0+cpu"
        assert f"/files/{cuda}" not in index.asked
        assert "download.pytorch.org:443" in pytorch.asked
    assert "no hash is locked" not in done.stderr


# ---- a Python without ensurepip -------------------------------------------------------------


def test_without_ensurepip_and_a_network_it_is_one_line_even_for_the_active_environment(
    checkout: Checkout, python_without_ensurepip: Path
) -> None:
    command = [str(python_without_ensurepip), "-I", "-m", "venv", "--without-pip"]
    subprocess.run([*command, str(checkout.venv)], check=True)
    (checkout.venv / ".sluice-lock").touch()
    # The first Python on PATH is the one that goes; the one below it makes the new environment.
    path = f"{checkout.venv / 'bin'}{os.pathsep}{os.defpath}"
    error = checkout.refusal(
        PYTHON="", PATH=path, PIP_NO_INDEX="", PIP_FIND_LINKS="", PIP_INDEX_URL=f"{NOWHERE}/simple"
    )
    assert re.search(r"http://127.0.0.1:9/simple/pip/ could not be read \(.*refused\)", error)
    assert "python3-venv" in error
    assert (checkout.venv / "bin/python").resolve() == python_without_ensurepip
