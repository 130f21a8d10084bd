"""containers/base.sh, for real: a tree of whoever runs the tests, which are often root's.

It is made once, from this system's mirror, with an apt configuration that has a password wherever
one can stand. The ordinary user's is that on which the image is built.
"""

from __future__ import annotations

import json
import os
import pwd
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import waiting
from tests.package_index import hanging_up
from tests.real.accounts import IS_ROOT
from tests.shared import CHECKOUT

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
        shutil.copy(CHECKOUT / "containers" / script, path / "containers")
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
    identity: dict[str, object] = {}
    if IS_ROOT:
        entry = pwd.getpwnam(user)
        groups = os.getgrouplist(user, entry.pw_gid)
        identity = {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": groups}
    return waiting.run(
        [str(word) for word in command], cwd="/", env=variables | environment, **identity
    )


def one_error(result: subprocess.CompletedProcess[str]) -> str:
    """Return the one error line of a run that failed, which is its last."""
    assert result.returncode == 2, result
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:], result.stderr
    return lines[-1]


# ---- the tree -------------------------------------------------------------------------------


def plant_secrets(home: Path, user: str) -> dict[str, str]:
    """Write a configuration of apt for this system's mirror, with a password wherever it fits."""
    update = subprocess.run(
        ["apt-get", "--print-uris", "update"], capture_output=True, text=True, check=True
    )
    sources = sorted(set(re.findall(rf"'(http\S+)/dists/({SUITE}\S*)/main/", update.stdout)))
    sources = sources or [("http://deb.debian.org/debian", SUITE)]
    keys = f"Signed-By: {KEYRING}\n" if KEYRING.exists() else ""

    apt = home / "apt"
    (apt / "parts").mkdir(parents=True)
    # A comment, continued lines, another's repository of the same suite, one that is off.
    paragraphs = [f"# {SECRET}-comment\n"]
    for mirror, suite in sources:
        with_password = mirror.replace("://", f"://bob:{SECRET}-url@")
        paragraphs.append(
            f"Types: deb deb-src\nURIs: {with_password}\n# within\nSuites: oldoldstable\n {suite}\n"
            f"Components: contrib main\n{keys}"
        )
    paragraphs += [
        f"Types: deb\nURIs: http://127.0.0.1:9/{SECRET}-off\nSuites: {SUITE}\n"
        "Components: main\nEnabled: no\n",
        f"Types: deb\nURIs: http://127.0.0.1:9/{SECRET}-other\nSuites: {SUITE}\n"
        "Components: main\nSigned-By: /usr/share/keyrings/other.gpg\n",
    ]
    (apt / "parts/debian.sources").write_text("\n".join(paragraphs))
    (apt / "sources.list").write_text(
        f"# deb http://127.0.0.1:9/{SECRET} {SUITE} main\n"
        f"deb [signed-by=/usr/share/keyrings/x.gpg] http://127.0.0.1:9/{SECRET} {SUITE} main\n"
        f"deb http://127.0.0.1:9/docker {SUITE} stable\n"
    )
    # With its scheme, without which apt uses a password for https only.
    hosts = sorted({"/".join(mirror.split("/")[:3]) for mirror, _ in sources})
    lines = [f"machine {host} login bob password {SECRET}-auth\n" for host in hosts]
    (apt / "auth.conf").write_text("".join(lines))
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


@dataclass(frozen=True)
class Tree:
    """A tree, whose it is, and what the run that made it printed."""

    user: str
    path: Path
    stdout: str


@pytest.fixture(scope="module")
def tree(folder: Path) -> Tree:
    """Return a tree of whoever runs the tests."""
    user = pwd.getpwuid(os.geteuid()).pw_name
    home = make_home(user, folder)
    result = run_base(user, home, home / "out", **plant_secrets(home, user))
    assert result.returncode == 0, result.stderr
    return Tree(user, home / "out", result.stdout)


def test_the_tree_is_a_debian(tree: Tree) -> None:
    assert f"VERSION_CODENAME={SUITE}" in (tree.path / "etc/os-release").read_text()
    assert (tree.path / "usr/bin/apt-get").exists()
    assert (tree.path / "etc/ssl/certs/ca-certificates.crt").stat().st_size > 100_000


def test_two_runs_give_one_digest_and_no_other_output(
    tree: Tree, image: Path, ordinary_user: str, home: Path
) -> None:
    assert re.fullmatch(r"sha256:[0-9a-f]{64}\n", tree.stdout)
    packages = set()
    for line in image.with_suffix(".txt").read_text().splitlines():
        _, name, version = line.split()
        packages.add((name.partition(":")[0], version))
    status = (tree.path / "var/lib/dpkg/status").read_text()
    own = re.findall(r"^Package: (.+)\n(?:.+\n)*?Version: (.+)$", status, re.MULTILINE)
    assert len(own) > 50
    if packages >= set(own):
        # The ordinary user's run, while the image was built.
        other = json.loads(image.with_suffix(".json").read_text())["base"]["digest"] + "\n"
    else:
        # Since then the mirror has other packages.
        other = run_base(ordinary_user, home, home / "out").stdout
    assert tree.stdout == other


def test_nothing_of_the_host_is_in_the_tree(tree: Tree) -> None:
    apt = tree.path / "etc/apt"
    assert (apt / "sources.list").read_text().splitlines() == [
        f"deb http://deb.debian.org/debian {SUITE} main",
        f"deb http://deb.debian.org/debian {SUITE}-updates main",
        f"deb http://deb.debian.org/debian-security {SUITE}-security main",
    ]
    for empty in ("sources.list.d", "auth.conf.d", "preferences.d"):
        assert list((apt / empty).iterdir()) == []
    for name in ("auth.conf", "apt.conf", "apt.conf.d/99mmdebstrap"):
        assert not (apt / name).exists()
    for empty in ("var/log", "var/lib/apt/lists", "var/cache/apt/archives"):
        files = [path for path in (tree.path / empty).rglob("*") if path.is_file()]
        assert all(path.name == "lock" for path in files), files
    assert (tree.path / "etc/hostname").read_text() == "localhost\n"
    for empty in ("etc/resolv.conf", "etc/machine-id"):
        assert (tree.path / empty).read_bytes() == b""
    assert list((tree.path / "dev").iterdir()) == []

    secrets = subprocess.run(
        ["grep", "-r", "-l", "-a", "-F", "-e", SECRET, tree.path],
        check=False,
        capture_output=True,
        text=True,
    )
    assert (secrets.returncode, secrets.stdout) == (1, ""), secrets
    assert not list(tree.path.rglob(f"*{SECRET}*"))


def test_every_file_is_the_callers_to_read_and_delete(tree: Tree) -> None:
    owner = pwd.getpwnam(tree.user).pw_uid
    for path in [tree.path, *tree.path.rglob("*")]:
        status = path.lstat()
        assert status.st_uid == owner, path
        wanted = 0o700 if stat.S_ISDIR(status.st_mode) else 0o600
        assert stat.S_ISLNK(status.st_mode) or status.st_mode & wanted == wanted, path
        assert stat.S_IFMT(status.st_mode) in (stat.S_IFDIR, stat.S_IFREG, stat.S_IFLNK), path


def test_nothing_is_left_beside_the_tree_but_its_record(tree: Tree) -> None:
    home = tree.path.parent
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


@pytest.mark.needs("root")  # and so can become a user without a range of ids
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
def test_a_mirror_that_hangs_up_is_one_line_after_one_try(
    ordinary_user: str, folder: Path, is_root: bool
) -> None:
    user = "root" if is_root else ordinary_user
    home = make_home(user, folder)
    with hanging_up() as mirror:
        (home / "sources.list").write_text(f"deb {mirror.url}/debian {SUITE} main\n")
        (home / "apt.conf").write_text(
            f'Dir::Etc::sourcelist "{home}/sources.list";\nDir::Etc::sourceparts "/dev/null";\n'
            'Acquire::http::Proxy "DIRECT";\n'
        )
        result = run_base(user, home, home / "out", APT_CONFIG=str(home / "apt.conf"))
    assert f"{mirror.url}/debian/dists/{SUITE}/InRelease" in one_error(result)
    # apt connects twice for one try; it would wait longer before each further one.
    assert mirror.connections == 2
    # The next run finds the way free.
    assert list((home / "out").iterdir()) == []
    assert list((home / "tmp").iterdir()) == []


def test_what_cannot_be_is_one_line(ordinary_user: str, home: Path) -> None:
    for arguments, environment, what in (
        ([], {}, "unknown arguments"),
        (["--help"], {}, "unknown arguments"),
        (["a", "b"], {}, "unknown arguments"),
        (["/proc/base/out"], {}, "/proc/base/out: "),
        ([str(home / "out")], {"SUITE": "../etc"}, "SUITE=../etc: "),
        ([str(home / "out")], {"TMPDIR": "/nowhere"}, "TMPDIR=/nowhere: "),
    ):
        result = run_base(ordinary_user, home, *arguments, **environment)
        assert one_error(result) == result.stderr.rstrip("\n")
        assert what in result.stderr
