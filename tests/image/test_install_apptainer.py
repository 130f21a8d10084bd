"""containers/install-apptainer.sh, for real: as root (where the tests are root's) and as a user.

The script runs from a copy in a folder that everybody may enter, with a PATH that has neither
Apptainer nor sudo, so that nothing of the system changes.
"""

from __future__ import annotations

import os
import platform
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
IS_ROOT = os.geteuid() == 0
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
    shutil.copy(ROOT / "containers/install-apptainer.sh", path / "containers")
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

    @property
    def prefix(self) -> Path:
        return self.folder / "prefix"

    @property
    def private(self) -> Path:
        return self.prefix / "bin/apptainer"

    def start(
        self, command: list[str | Path], environment: dict[str, str]
    ) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            cwd="/",
            env={
                "PATH": str(self.path),
                "HOME": str(self.folder),
                "TMPDIR": str(self.folder / "tmp"),
                "APT_CONFIG": str(self.apt_config),
                "APPTAINER_PREFIX": str(self.prefix),
            }
            | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            **self.identity(),  # type: ignore[call-overload]
        )

    def identity(self) -> dict[str, object]:
        if not IS_ROOT:
            return {}
        entry = pwd.getpwnam(self.name)
        return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}

    def run(
        self, command: list[str | Path], environment: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        process = self.start(command, environment or {})
        stdout, stderr = process.communicate(timeout=120)
        return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)

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
    return Caller(name, home, path, folder / "apt.conf")


@pytest.fixture
def someone(ordinary_user: str, folder: Path) -> Caller:
    """Return an ordinary user with an empty folder."""
    return make_caller(ordinary_user, folder, folder / "bin")


@pytest.fixture(scope="module", params=["root", "user"] if IS_ROOT else ["user"])
def installed(
    request: pytest.FixtureRequest, ordinary_user: str, folder: Path
) -> tuple[Caller, subprocess.CompletedProcess[str]]:
    """Return a caller who has installed a private copy, and what the script said.

    The ordinary user has none of the tools that Apptainer starts on his PATH.
    """
    if request.param == "user":
        caller = make_caller(ordinary_user, folder, folder / "bare")
    else:
        needed = ["mksquashfs", "squashfuse", "fuse-overlayfs", "fakeroot", "newuidmap", "patchelf"]
        missing = [tool for tool in needed if shutil.which(tool) is None]
        if missing:
            pytest.skip(f"as root this would install packages for {', '.join(missing)} here")
        caller = make_caller("root", folder, folder / "bin")
    return caller, caller.install()


def one_error(result: subprocess.CompletedProcess[str]) -> str:
    """Return the one error line of a run that failed, which is its last and has no stack."""
    assert result.returncode == 2, result
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:], result.stderr
    return lines[-1]


# ---- a private copy -------------------------------------------------------------------------


def test_a_private_copy_is_made_and_runs(
    installed: tuple[Caller, subprocess.CompletedProcess[str]],
) -> None:
    caller, result = installed
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{caller.private}\n"
    version = caller.run([caller.private, "version"])
    assert version.returncode == 0, version.stderr
    assert tuple(map(int, version.stdout.split(".")[:2])) >= (1, 2)
    # Nothing is left of the way there: no lists, no settings with a proxy's password.
    left = {path.name for path in caller.prefix.iterdir()}
    assert left <= {"bin", "root", "tools", ".sluice-lock", ".sluice-stamp"}
    assert list((caller.folder / "tmp").iterdir()) == []


def test_the_second_call_returns_at_once(
    installed: tuple[Caller, subprocess.CompletedProcess[str]],
) -> None:
    caller, first = installed
    for arguments in ([], ["--check"]):
        start = time.monotonic()
        second = caller.install(*arguments)
        assert time.monotonic() - start < 1
        assert (second.returncode, second.stdout) == (0, first.stdout)
        notes = second.stderr.splitlines()
        assert all(line.startswith("note: ") for line in notes), second.stderr


@pytest.mark.needs("unshare")
def test_the_private_copy_starts_a_container(
    installed: tuple[Caller, subprocess.CompletedProcess[str]],
) -> None:
    caller, _ = installed
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
    installed: tuple[Caller, subprocess.CompletedProcess[str]],
) -> None:
    caller, _ = installed
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
    installed: tuple[Caller, subprocess.CompletedProcess[str]],
) -> None:
    caller, first = installed
    result = caller.install(PATH=f"{stand_in(caller, '1.1.0').parent}:{caller.path}")
    assert (result.returncode, result.stdout) == (0, first.stdout)
    assert "1.1.0" in result.stderr and "passed over" in result.stderr


def test_a_killed_install_starts_over(someone: Caller) -> None:
    process = someone.start([someone.script], {})
    deadline = time.monotonic() + 30
    while not (someone.prefix / "work/sid.conf").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert (someone.prefix / "work").exists(), "it was over before it was killed"
    assert "none on PATH" in one_error(someone.install("--check"))
    half = someone.prefix / "root/half"
    someone.run(["mkdir", "-p", half])
    result = someone.install()
    assert (result.returncode, result.stdout) == (0, f"{someone.private}\n"), result.stderr
    assert not half.exists()


# ---- what is there already ------------------------------------------------------------------


def stand_in(caller: Caller, version: str) -> Path:
    """Write a program named apptainer that knows nothing but its version."""
    path = caller.folder / f"stand-in-{version}" / "apptainer"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f'#!/bin/sh\n[ "$1" = version ] && echo {version}\n')
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("version", ["1.2.0", "1.10.3-1.el9", "2.0.0-rc.1"])
def test_one_on_path_is_taken(someone: Caller, version: str) -> None:
    path = stand_in(someone, version)
    for arguments in ([], ["--check"]):
        result = someone.install(*arguments, PATH=f"{path.parent}:{someone.path}")
        assert (result.returncode, result.stdout) == (0, f"{path}\n")
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
def test_an_unreachable_mirror_is_one_line_in_seconds(
    ordinary_user: str, folder: Path, path: str
) -> None:
    caller = make_caller(ordinary_user, folder, folder / path)
    system = platform.freedesktop_os_release()
    if system["ID"] != "debian":
        pytest.skip("the sources of another system are no mirrors of Debian")
    codename = system["VERSION_CODENAME"]
    # Nothing listens on port 9 of this machine.
    sources = caller.folder / "sources.list"
    sources.write_text(f"deb [trusted=yes] http://127.0.0.1:9/debian {codename} main\n")
    settings = caller.folder / "apt.conf"
    settings.write_text(
        f'Dir::Etc::sourcelist "{sources}";\nDir::Etc::sourceparts "/dev/null";\n'
        'Acquire::http::Proxy "DIRECT";\n'
    )
    start = time.monotonic()
    result = caller.install(APT_CONFIG=str(settings))
    assert time.monotonic() - start < 5
    assert "http://127.0.0.1:9/debian/dists/" in one_error(result)
    assert not (caller.prefix / "work").exists()
    assert list((caller.folder / "tmp").iterdir()) == []


def test_a_folder_that_is_not_ours_is_left_alone(someone: Caller) -> None:
    someone.prefix.mkdir()
    (someone.prefix / "thesis.tex").touch()
    assert "not made by" in one_error(someone.install())
    assert [path.name for path in someone.prefix.iterdir()] == ["thesis.tex"]


def test_a_prefix_that_cannot_be_made_is_one_line(someone: Caller) -> None:
    assert "cannot be made" in one_error(someone.install(APPTAINER_PREFIX="/proc/prefix"))
    assert "cannot lie" in one_error(someone.install(APPTAINER_PREFIX=f"{someone.folder}/a:b"))


def test_unknown_arguments_are_one_line(someone: Caller) -> None:
    for arguments in (["--chekc"], ["--check", "--check"], ["prefix"]):
        result = someone.install(*arguments)
        assert one_error(result) == result.stderr.rstrip("\n")


def test_a_system_without_packages_is_told_where_to_get_it(someone: Caller) -> None:
    path = someone.folder / "path"
    path.mkdir()
    for program in ("bash", "dirname", "realpath", "uname", "mktemp", "rm", "env", "sort", "head"):
        (path / program).symlink_to(someone.path / program)
    error = one_error(someone.install(PATH=str(path)))
    assert "module load apptainer" in error and "install-unprivileged.sh" in error
