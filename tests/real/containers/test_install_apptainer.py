"""containers/install-apptainer.sh, for real: as root (where the tests are root's) and as a user.

The script runs from a copy in a folder that everybody may enter, with a PATH that has neither
Apptainer nor sudo, so that nothing of the system changes. Root's private copy is the one that this
checkout has, where it has one: the gate's first step is to make it (.ci/run).
"""

from __future__ import annotations

import os
import platform
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests import waiting
from tests.package_index import hanging_up
from tests.real.accounts import IS_ROOT
from tests.shared import CHECKOUT
from tests.waiting import wait_until

# What the script itself can bring, and what would change the outcome or the system.
TOOLS = {"mksquashfs", "unsquashfs", "squashfuse", "squashfuse_ll", "fuse-overlayfs", "patchelf"}
TOOLS |= {"fakeroot", "fakeroot-sysv", "fakeroot-tcp", "faked", "faked-sysv", "faked-tcp"}
HIDDEN = {"apptainer", "singularity", "sudo", "dnf"}
PACKAGE_MANAGERS = ("apt-get", "apt-config", "dpkg-deb", "flock")

pytestmark = pytest.mark.skipif(
    any(shutil.which(command) is None for command in PACKAGE_MANAGERS),
    reason=f"a private copy needs {', '.join(PACKAGE_MANAGERS)}",
)


# ---- who runs it, and where -----------------------------------------------------------------


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Return a folder that every user may enter, which pytest's own are not."""
    path = Path(tempfile.mkdtemp(prefix="sluice-apptainer-"))
    path.chmod(0o755)
    (path / "containers").mkdir()
    shutil.copy(CHECKOUT / "containers/install-apptainer.sh", path / "containers")
    # Should the distribution have a package of Apptainer, root would install that.
    (path / "preferences").write_text("Package: apptainer\nPin: version *\nPin-Priority: -1\n")
    (path / "apt.conf").write_text(f'Dir::Etc::preferences "{path}/preferences";\n')
    for name, hidden in (("bin", HIDDEN), ("bare", HIDDEN | TOOLS)):
        (path / name).mkdir()
        for directory in ("/usr/sbin", "/usr/bin", "/sbin", "/bin"):
            for program in Path(directory).iterdir():
                link = path / name / program.name
                if program.name not in hidden and not link.is_symlink():
                    link.symlink_to(program)
    yield path
    shutil.rmtree(path)


@dataclass(frozen=True)
class Caller:
    """A user with a folder of his own; `prefix` is where his private copy goes."""

    name: str
    folder: Path
    path: Path
    apt_config: Path
    prefix: Path

    @property
    def private(self) -> Path:
        return self.prefix / "bin/apptainer"

    def start(
        self, command: list[str | Path], environment: dict[str, str]
    ) -> subprocess.Popen[str]:
        variables = {
            "PATH": str(self.path),
            "HOME": str(self.folder),
            "TMPDIR": str(self.folder / "tmp"),
            "APT_CONFIG": str(self.apt_config),
            "APPTAINER_PREFIX": str(self.prefix),
        }
        identity: dict[str, Any] = {"start_new_session": True}
        if IS_ROOT:
            entry = pwd.getpwnam(self.name)
            identity |= {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
        words = [str(word) for word in command]
        return waiting.start(words, cwd="/", env=variables | environment, **identity)

    def run(
        self, command: list[str | Path], environment: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        return waiting.finish(self.start(command, environment or {}))

    @property
    def script(self) -> Path:
        return self.path.parent / "containers/install-apptainer.sh"

    def install(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.run([self.script, *arguments], environment)


def make_caller(name: str, folder: Path, path: Path) -> Caller:
    home = Path(tempfile.mkdtemp(prefix="home-", dir=folder))
    home.chmod(0o755)
    (home / "tmp").mkdir()
    if IS_ROOT:
        for owned in (home, home / "tmp"):
            shutil.chown(owned, name)
    return Caller(name, home, path, folder / "apt.conf", home / "prefix")


@pytest.fixture
def someone(ordinary_user: str, folder: Path) -> Caller:
    """Return an ordinary user with an empty folder."""
    return make_caller(ordinary_user, folder, folder / "bin")


@dataclass(frozen=True)
class Installed:
    """A caller who has installed a private copy, what the script said, and what --check before."""

    caller: Caller
    result: subprocess.CompletedProcess[str]
    before: subprocess.CompletedProcess[str] | None


@pytest.fixture(scope="module", params=["root", "user"] if IS_ROOT else ["user"])
def installed(request: pytest.FixtureRequest, ordinary_user: str, folder: Path) -> Installed:
    """Return what has become of an install: root's, or a user's after one that was killed.

    The ordinary user has none of the tools that Apptainer starts on his PATH.
    """
    if request.param == "user":
        caller = make_caller(ordinary_user, folder, folder / "bare")
        kill_an_install(caller, folder / "bin")
        before = caller.install("--check")
        return Installed(caller, caller.install(), before)
    needed = ["mksquashfs", "squashfuse", "fuse-overlayfs", "fakeroot", "newuidmap", "patchelf"]
    missing = [tool for tool in needed if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"as root this would install packages for {', '.join(missing)} here")
    caller = make_caller("root", folder, folder / "bin")
    if (CHECKOUT / ".apptainer/.sluice-stamp").exists():
        caller = replace(caller, prefix=CHECKOUT / ".apptainer")
    return Installed(caller, caller.install(), None)


def kill_an_install(caller: Caller, tools: Path) -> None:
    """Start an install by someone who has the tools, and kill it before the first download."""
    reached, gate = caller.folder / "tmp/reached", caller.folder / "gate"
    os.mkfifo(gate)
    stand_in = caller.folder / "path/apt-get"
    stand_in.parent.mkdir()
    stand_in.write_text(
        f"#!/bin/sh\ncase $APT_CONFIG in */sid.conf) : >{reached}; read -r word <{gate};; esac\n"
        f'exec {tools}/apt-get "$@"\n'
    )
    stand_in.chmod(0o755)
    process = caller.start([caller.script], {"PATH": f"{stand_in.parent}:{tools}"})
    wait_until(lambda: reached.exists() or process.poll() is not None, "the first download")
    os.killpg(process.pid, signal.SIGKILL)
    assert waiting.finish(process).returncode == -signal.SIGKILL
    # What one that is killed has in TMPDIR, nobody knows any more.
    for file in (caller.folder / "tmp").iterdir():
        file.unlink()
    assert (caller.prefix / "work/sid.conf").exists()
    caller.run(["mkdir", "-p", caller.prefix / "root/half"])


def one_error(result: subprocess.CompletedProcess[str]) -> str:
    """Return the one error line of a run that failed, which is its last and has no stack."""
    assert result.returncode == 2, result
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:], result.stderr
    return lines[-1]


# ---- a private copy -------------------------------------------------------------------------


def test_a_private_copy_is_made_and_runs(
    installed: Installed,
) -> None:
    caller, result = installed.caller, installed.result
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{caller.private}\n"
    version = caller.run([caller.private, "version"])
    assert version.returncode == 0, version.stderr
    assert tuple(map(int, version.stdout.split(".")[:2])) >= (1, 2)
    # Nothing is left of the way there: no lists, no settings with a proxy's password.
    left = {path.name for path in caller.prefix.iterdir()}
    assert left <= {"bin", "root", "tools", ".sluice-lock", ".sluice-stamp"}
    assert list((caller.folder / "tmp").iterdir()) == []


def test_a_killed_install_was_none_and_the_next_started_over(installed: Installed) -> None:
    if installed.before is not None:
        assert "none on PATH" in one_error(installed.before)
    assert not (installed.caller.prefix / "root/half").exists()


def test_the_second_call_looks_at_what_is_there_and_does_nothing(installed: Installed) -> None:
    caller, first = installed.caller, installed.result
    # Without apt-get, flock and the like an install would fail.
    tools = ("bash", "dirname", "env", "head", "realpath", "sort", "uname", "unshare")
    path = path_of(caller, *tools)
    for arguments in ([], ["--check"]):
        second = caller.install(*arguments, PATH=path)
        assert (second.returncode, second.stdout) == (0, first.stdout)
        notes = second.stderr.splitlines()
        assert all(line.startswith("note: ") for line in notes), second.stderr


@pytest.mark.needs("unshare")
def test_the_private_copy_starts_a_container(
    installed: Installed,
) -> None:
    caller = installed.caller
    # The least that is a root filesystem: this system's, as folders and a few mounts.
    tree = caller.folder / "tree"
    for name in ("dev", "etc", "proc", "sys", "tmp", "usr", "bin", "lib", "lib64"):
        (tree / name).mkdir(parents=True, exist_ok=True)
    result = caller.run(
        [caller.private, "exec", "--userns", "--no-home", "--no-mount", "tmp,cwd"]
        + [word for name in ("usr", "bin", "lib", "lib64") for word in ("--bind", f"/{name}")]
        + [tree, "/usr/bin/id", "-u"]
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().isdigit()


def test_what_the_user_lacks_lies_beside_it_and_runs(
    installed: Installed,
) -> None:
    caller = installed.caller
    tools = caller.prefix / "tools/usr/bin"
    if caller.path.name == "bin":
        assert not tools.exists()
        return
    assert caller.run([tools / "fakeroot", "id", "-u"]).stdout == "0\n"
    assert "squashfs" in caller.run([tools / "mksquashfs", "-version"]).stdout
    for tool in ("unsquashfs", "squashfuse", "fuse-overlayfs"):
        # The linker lists what a program loads, and fails where it lacks some of it.
        assert "not found" not in caller.run(["ldd", tools / tool]).stdout
    assert str(tools) in caller.private.read_text()


def test_an_old_apptainer_on_path_is_passed_over(
    installed: Installed,
) -> None:
    caller, first = installed.caller, installed.result
    result = caller.install(PATH=f"{stand_in(caller, '1.1.0').parent}:{caller.path}")
    assert (result.returncode, result.stdout) == (0, first.stdout)
    assert "1.1.0" in result.stderr and "skipped" in result.stderr


# ---- what is there already ------------------------------------------------------------------


def path_of(caller: Caller, *tools: str) -> str:
    """Return a PATH with just these tools."""
    folder = caller.folder / "few tools"
    folder.mkdir()
    for tool in tools:
        (folder / tool).symlink_to(caller.path / tool)
    return str(folder)


def stand_in(caller: Caller, version: str) -> Path:
    """Write a program named apptainer that knows nothing but its version."""
    path = caller.folder / f"stand-in-{version}" / "apptainer"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f'#!/bin/sh\n[ "$1" = version ] && echo {version}\n')
    path.chmod(0o755)
    return path


def test_one_on_path_is_taken(someone: Caller) -> None:
    for version in ("1.2.0", "1.10.3-1.el9", "2.0.0-rc.1"):
        path = stand_in(someone, version)
        result = someone.install(PATH=f"{path.parent}:{someone.path}")
        assert (result.returncode, result.stdout) == (0, f"{path}\n")
    checked = someone.install("--check", PATH=f"{path.parent}:{someone.path}")
    assert (checked.returncode, checked.stdout) == (0, f"{path}\n")
    assert not someone.prefix.exists()


def test_the_one_that_is_named_is_taken_or_refused(someone: Caller) -> None:
    new, old = stand_in(someone, "1.4.5"), stand_in(someone, "1.1.9")
    assert someone.install(APPTAINER=str(new)).stdout == f"{new}\n"
    assert "this is 1.1.9" in one_error(someone.install(APPTAINER=str(old)))
    assert "no such" in one_error(someone.install(APPTAINER="/nowhere/apptainer"))
    assert "does not run" in one_error(someone.install(APPTAINER="/bin/false"))


def test_where_sudo_works_the_distributions_package_is_installed(someone: Caller) -> None:
    path = someone.folder / "sudo"
    path.mkdir()
    path.chmod(0o777)
    package = stand_in(someone, "1.4.5")
    programs = {
        "sudo": '[ "$1" = -n ] && shift && exec "$@"',
        "apt-cache": 'echo "  Candidate: 1:1.4.5-2"; echo "  500 mirror main Packages"',
        # That of a package is all that apt-get does here.
        "apt-get": f'case "$*" in *" install "*" apptainer"*) cp {package} {path};; esac',
    }
    for name, text in programs.items():
        (path / name).write_text(f"#!/bin/sh\n{text}\n")
        (path / name).chmod(0o755)
    result = someone.install(PATH=f"{path}:{someone.path}")
    assert (result.returncode, result.stdout) == (0, f"{path}/apptainer\n"), result.stderr
    assert "the system's package, version 1.4.5" in result.stderr
    assert not someone.prefix.exists()


def test_check_installs_nothing(someone: Caller) -> None:
    result = someone.install("--check")
    assert one_error(result) == result.stderr.rstrip("\n")
    old = stand_in(someone, "1.1.0")
    checked = someone.install("--check", PATH=f"{old.parent}:{someone.path}")
    assert "none of version 1.2 or newer" in one_error(checked)
    assert not someone.prefix.exists()


# ---- what goes wrong ------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["bin", "bare"])
def test_a_mirror_that_hangs_up_is_one_line_after_one_try(
    ordinary_user: str, folder: Path, path: str
) -> None:
    caller = make_caller(ordinary_user, folder, folder / path)
    system = platform.freedesktop_os_release()
    if system["ID"] != "debian":
        pytest.skip("the sources of another system are no mirrors of Debian")
    codename = system["VERSION_CODENAME"]
    sources, settings = caller.folder / "sources.list", caller.folder / "apt.conf"
    settings.write_text(
        f'Dir::Etc::sourcelist "{sources}";\nDir::Etc::sourceparts "/dev/null";\n'
        'Acquire::http::Proxy "DIRECT";\n'
    )
    with hanging_up() as mirror:
        sources.write_text(f"deb [trusted=yes] {mirror.url}/debian {codename} main\n")
        result = caller.install(APT_CONFIG=str(settings))
    assert f"{mirror.url}/debian/dists/" in one_error(result)
    # apt connects twice for one try; it would wait longer before each further one.
    assert mirror.connections == 2
    assert not (caller.prefix / "work").exists()
    assert list((caller.folder / "tmp").iterdir()) == []


def test_a_folder_that_is_not_ours_is_left_alone(someone: Caller) -> None:
    someone.prefix.mkdir()
    (someone.prefix / "thesis.tex").touch()
    assert "not made by" in one_error(someone.install())
    assert [path.name for path in someone.prefix.iterdir()] == ["thesis.tex"]


def test_a_prefix_that_cannot_be_made_is_one_line(someone: Caller) -> None:
    assert "cannot be created" in one_error(someone.install(APPTAINER_PREFIX="/proc/prefix"))
    assert "must not contain" in one_error(
        someone.install(APPTAINER_PREFIX=f"{someone.folder}/a:b")
    )


def test_unknown_arguments_are_one_line(someone: Caller) -> None:
    for arguments in (["--chekc"], ["--check", "--check"], ["prefix"]):
        result = someone.install(*arguments)
        assert one_error(result) == result.stderr.rstrip("\n")


def test_a_system_without_packages_is_told_where_to_get_it(someone: Caller) -> None:
    tools = ("bash", "dirname", "realpath", "uname", "mktemp", "rm", "env", "sort", "head")
    error = one_error(someone.install(PATH=path_of(someone, *tools)))
    assert "module load apptainer" in error and "install-unprivileged.sh" in error
