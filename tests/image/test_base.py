"""containers/base.sh, for real: as root (where the tests are root's) and as an ordinary user.

The trees are made once, from this system's mirror, with an apt configuration that has a password
wherever one can stand.
"""

from __future__ import annotations

import os
import pwd
import re
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
IS_ROOT = os.geteuid() == 0
SUITE = "bookworm"
# What must not be found in a tree, planted in all places that apt reads.
SECRET = "sluice-hunter2"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")

PROGRAMS = ("apt-get", "mmdebstrap", "newuidmap", "newgidmap")
pytestmark = [
    pytest.mark.needs("unshare"),
    pytest.mark.skipif(
        any(shutil.which(program) is None for program in PROGRAMS),
        reason=f"a base needs {', '.join(PROGRAMS)}",
    ),
]


# ---- who runs it, and where -----------------------------------------------------------------


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Return a folder that every user may enter, which pytest's own are not."""
    path = Path(tempfile.mkdtemp(prefix="sluice-base-"))
    path.chmod(0o755)
    (path / "containers").mkdir()
    for script in ("base.sh", "mirror.sh"):
        shutil.copy(ROOT / "containers" / script, path / "containers")
    yield path
    shutil.rmtree(path)


def make_home(user: str, folder: Path) -> Path:
    """Make a folder for `user` with an empty one for temporary files."""
    home = Path(tempfile.mkdtemp(prefix="home-", dir=folder))
    home.chmod(0o755)
    (home / "tmp").mkdir()
    if IS_ROOT:
        for path in (home, home / "tmp"):
            shutil.chown(path, user)
    return home


@pytest.fixture
def home(ordinary_user: str, folder: Path) -> Path:
    """Return an empty folder of the ordinary user."""
    return make_home(ordinary_user, folder)


def run_base(
    user: str, home: Path, *arguments: str | Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the script as `user`."""
    command = [home.parent / "containers/base.sh", *arguments]
    variables = {"PATH": os.environ["PATH"], "HOME": str(home), "TMPDIR": str(home / "tmp")}
    if not IS_ROOT:
        return run(command, variables | environment)
    entry = pwd.getpwnam(user)
    groups = os.getgrouplist(user, entry.pw_gid)
    return run(
        command, variables | environment, user=entry.pw_uid, group=entry.pw_gid, extra_groups=groups
    )


def run(
    command: list[str | Path], environment: dict[str, str], **identity: object
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # type: ignore[call-overload, no-any-return]
        command,
        check=False,
        cwd="/",
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=200,
        **identity,
    )


def one_error(result: subprocess.CompletedProcess[str]) -> str:
    """Return the one error line of a run that failed, which is its last."""
    assert result.returncode == 2, result
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:], result.stderr
    return lines[-1]


# ---- the trees ------------------------------------------------------------------------------


def plant_secrets(home: Path, user: str) -> dict[str, str]:
    """Write a configuration of apt for this system's mirror, with a password wherever it fits."""
    update = subprocess.run(
        ["apt-get", "--print-uris", "update"], capture_output=True, text=True, check=True
    )
    found = re.search(rf"'(http\S+)/dists/{SUITE}/main/", update.stdout)
    mirror = found[1] if found else "http://deb.debian.org/debian"
    with_password = mirror.replace("://", f"://bob:{SECRET}-url@")
    # With its scheme, without which apt uses a password for https only.
    host = "/".join(mirror.split("/")[:3])
    keys = f"Signed-By: {KEYRING}\n" if KEYRING.exists() else ""

    apt = home / "apt"
    (apt / "parts").mkdir(parents=True)
    # A comment, continued lines, another's repository of the same suite, one that is off.
    (apt / "parts/debian.sources").write_text(
        f"# {SECRET}-comment\n\n"
        f"Types: deb deb-src\nURIs: {with_password}\n# within\nSuites: oldoldstable\n {SUITE}\n"
        f"Components: contrib main\n{keys}\n"
        f"Types: deb\nURIs: http://127.0.0.1:9/{SECRET}-off\nSuites: {SUITE}\n"
        "Components: main\nEnabled: no\n\n"
        f"Types: deb\nURIs: http://127.0.0.1:9/{SECRET}-other\nSuites: {SUITE}\n"
        "Components: main\nSigned-By: /usr/share/keyrings/other.gpg\n"
    )
    (apt / "sources.list").write_text(
        f"# deb http://127.0.0.1:9/{SECRET} {SUITE} main\n"
        f"deb [signed-by=/usr/share/keyrings/x.gpg] http://127.0.0.1:9/{SECRET} {SUITE} main\n"
        f"deb http://127.0.0.1:9/docker {SUITE} stable\n"
    )
    (apt / "auth.conf").write_text(f"machine {host} login bob password {SECRET}-auth\n")
    (apt / "apt.conf").write_text(
        f'Dir::Etc::sourcelist "{apt}/sources.list";\nDir::Etc::sourceparts "{apt}/parts";\n'
        f'Dir::Etc::netrc "{apt}/auth.conf";\nAcquire::http::User-Agent "{SECRET}-agent";\n'
        f'APT::Update::Post-Invoke:: "echo {SECRET}-hook; false";\n'
    )
    # mmdebstrap's root, another user, cannot read these either.
    (apt / "auth.conf").chmod(0o600)
    if IS_ROOT:
        shutil.chown(apt / "auth.conf", user)
    return {"APT_CONFIG": str(apt / "apt.conf")}


@pytest.fixture(scope="module")
def trees(
    ordinary_user: str, folder: Path
) -> list[tuple[str, Path, subprocess.CompletedProcess[str]]]:
    """Return two trees, each with its owner and the run that made it: root's and a user's."""
    made = []
    for user in ("root" if IS_ROOT else ordinary_user, ordinary_user):
        home = make_home(user, folder)
        result = run_base(user, home, home / "out", **plant_secrets(home, user))
        assert result.returncode == 0, result.stderr
        made.append((user, home / "out", result))
    return made


@pytest.mark.slow
def test_the_tree_is_a_debian(
    trees: list[tuple[str, Path, subprocess.CompletedProcess[str]]],
) -> None:
    for _, tree, _ in trees:
        assert f"VERSION_CODENAME={SUITE}" in (tree / "etc/os-release").read_text()
        assert (tree / "usr/bin/apt-get").exists()
        assert (tree / "etc/ssl/certs/ca-certificates.crt").stat().st_size > 100_000


@pytest.mark.slow
def test_two_runs_give_one_digest_and_no_other_output(
    trees: list[tuple[str, Path, subprocess.CompletedProcess[str]]],
) -> None:
    first, second = (result.stdout for _, _, result in trees)
    assert re.fullmatch(r"sha256:[0-9a-f]{64}\n", first)
    assert first == second


@pytest.mark.slow
def test_nothing_of_the_host_is_in_the_tree(
    trees: list[tuple[str, Path, subprocess.CompletedProcess[str]]],
) -> None:
    for _, tree, _ in trees:
        assert (tree / "etc/apt/sources.list").read_text().splitlines() == [
            f"deb http://deb.debian.org/debian {SUITE} main",
            f"deb http://deb.debian.org/debian {SUITE}-updates main",
            f"deb http://deb.debian.org/debian-security {SUITE}-security main",
        ]
        for empty in ("sources.list.d", "auth.conf.d", "preferences.d"):
            assert list((tree / "etc/apt" / empty).iterdir()) == []
        for name in ("auth.conf", "apt.conf", "apt.conf.d/99mmdebstrap"):
            assert not (tree / "etc/apt" / name).exists()
        for empty in ("var/log", "var/lib/apt/lists", "var/cache/apt/archives"):
            files = [path for path in (tree / empty).rglob("*") if path.is_file()]
            assert all(path.name == "lock" for path in files), files
        assert (tree / "etc/hostname").read_text() == "localhost\n"
        for empty in ("etc/resolv.conf", "etc/machine-id"):
            assert (tree / empty).read_bytes() == b""
        assert list((tree / "dev").iterdir()) == []

        secrets = subprocess.run(
            ["grep", "-r", "-l", "-a", "-F", "-e", SECRET, tree],
            check=False,
            capture_output=True,
            text=True,
        )
        assert (secrets.returncode, secrets.stdout) == (1, ""), secrets
        assert not list(tree.rglob(f"*{SECRET}*"))


@pytest.mark.slow
def test_every_file_is_the_callers_to_read_and_delete(
    trees: list[tuple[str, Path, subprocess.CompletedProcess[str]]],
) -> None:
    for user, tree, _ in trees:
        owner = pwd.getpwnam(user).pw_uid
        for path in [tree, *tree.rglob("*")]:
            status = path.lstat()
            assert status.st_uid == owner, path
            wanted = 0o700 if stat.S_ISDIR(status.st_mode) else 0o600
            assert stat.S_ISLNK(status.st_mode) or status.st_mode & wanted == wanted, path
            assert stat.S_IFMT(status.st_mode) in (stat.S_IFDIR, stat.S_IFREG, stat.S_IFLNK), path


@pytest.mark.slow
def test_nothing_is_left_beside_the_tree_but_its_record(
    trees: list[tuple[str, Path, subprocess.CompletedProcess[str]]],
) -> None:
    for _, tree, _ in trees:
        home = tree.parent
        assert {path.name for path in home.iterdir()} == {"apt", "out", "out.log", "tmp"}
        assert list((home / "tmp").iterdir()) == []
        record = home / "out.log"
        assert SECRET not in record.read_text()
        assert stat.S_IMODE(record.stat().st_mode) == 0o600


# ---- what goes wrong ------------------------------------------------------------------------


def test_a_folder_with_something_in_it_is_refused(ordinary_user: str, home: Path) -> None:
    out = home / "out"
    out.mkdir()
    (out / "thesis.tex").touch()
    result = run_base(ordinary_user, home, out)
    assert one_error(result) == result.stderr.rstrip("\n")
    assert "not an empty folder" in result.stderr
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]


def test_a_file_in_its_place_is_refused(ordinary_user: str, home: Path) -> None:
    (home / "out").write_text("mine")
    assert "not an empty folder" in one_error(run_base(ordinary_user, home, home / "out"))
    assert (home / "out").read_text() == "mine"


def test_without_mmdebstrap_it_says_how_to_get_it(ordinary_user: str, home: Path) -> None:
    path = home / "path"
    path.mkdir()
    for program in ("bash", "realpath", "id", "env"):
        found = shutil.which(program)
        assert found
        (path / program).symlink_to(found)
    result = run_base(ordinary_user, home, home / "out", PATH=str(path))
    assert one_error(result) == result.stderr.rstrip("\n")
    assert "apt-get install mmdebstrap" in result.stderr
    assert not (home / "out").exists()


@pytest.mark.skipif(not IS_ROOT, reason="only root can become a user without a range of ids")
def test_a_user_without_a_range_of_ids_is_told(home: Path) -> None:
    result = run_base("nobody", home, home / "out")
    assert one_error(result) == result.stderr.rstrip("\n")
    assert "/etc/subuid: no line for nobody" in result.stderr
    first = re.search(r"--add-subuids (\d+)-", result.stderr)
    assert first
    # A range of its own: one that overlaps would give the files of one user to another.
    for line in Path("/etc/subuid").read_text().splitlines():
        _, start, count = line.split(":")
        assert int(first[1]) >= int(start) + int(count)


@pytest.mark.parametrize("is_root", [True, False] if IS_ROOT else [False])
def test_an_unreachable_mirror_is_one_line_in_seconds(
    ordinary_user: str, folder: Path, is_root: bool
) -> None:
    user = "root" if is_root else ordinary_user
    home = make_home(user, folder)
    # Nothing listens on port 9 of this machine.
    (home / "sources.list").write_text(f"deb http://127.0.0.1:9/debian {SUITE} main\n")
    (home / "apt.conf").write_text(
        f'Dir::Etc::sourcelist "{home}/sources.list";\nDir::Etc::sourceparts "/dev/null";\n'
        'Acquire::http::Proxy "DIRECT";\n'
    )
    start = time.monotonic()
    result = run_base(user, home, home / "out", APT_CONFIG=str(home / "apt.conf"))
    assert time.monotonic() - start < 5
    assert f"http://127.0.0.1:9/debian/dists/{SUITE}/InRelease" in one_error(result)
    # The next run finds the way free.
    assert list((home / "out").iterdir()) == []
    assert list((home / "tmp").iterdir()) == []


def test_what_cannot_be_is_one_line(ordinary_user: str, home: Path) -> None:
    for arguments, environment, what in (
        ([], {}, "not understood"),
        (["--help"], {}, "not understood"),
        (["a", "b"], {}, "not understood"),
        (["/proc/base/out"], {}, "/proc/base/out: "),
        ([str(home / "out")], {"SUITE": "../etc"}, "SUITE=../etc: "),
        ([str(home / "out")], {"TMPDIR": "/nowhere"}, "TMPDIR=/nowhere: "),
    ):
        result = run_base(ordinary_user, home, *arguments, **environment)
        assert one_error(result) == result.stderr.rstrip("\n")
        assert what in result.stderr
