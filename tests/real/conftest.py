"""What the real tests share: an ordinary user, an image that it builds, private Slurms."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Generator, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.checkout import lay_out
from tests.conftest import has
from tests.real import accounts, whole_image
from tests.real.accounts import IS_ROOT, Account
from tests.real.desk import Desk, environment
from tests.real.private_slurm import Cluster, new_cluster, start_cluster
from tests.shared import CHECKOUT, at_end, once

# ---- the order of the tests, and what of a failure is kept -----------------------------------

# What takes longest comes first, since a worker that begins it last keeps the others waiting; and
# beside the first, which builds the image, what needs none.
ORDER = (
    "tests/real/slurm/test_own_scripts.py",
    "tests/real/slurm/test_lost_nodes.py",
    "tests/real/slurm/test_labs.py",
    "tests/real/train/",
    "tests/real/slurm/test_submit.py",
    "tests/real/slurm/test_sweep.py",
    "tests/real/test_make.py",
    "tests/real/cluster/test_laptop.py",
    "tests/real/train/test_chat.py",
    "tests/real/cluster/login/",
    "tests/real/cluster/test_new_user.py",
    "tests/real/containers/",
    "tests/real/benchmarks/",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def turn(item: pytest.Item) -> int:
        named = [beginning for beginning in ORDER if item.nodeid.startswith(beginning)]
        return ORDER.index(max(named, key=len)) if named else len(ORDER)

    items.sort(key=turn)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Keep the logs of the private Slurm that a test which failed had, and say where."""
    report = yield
    fixtures = getattr(item, "funcargs", {})
    if report.failed:
        for name in ("cluster", "own_cluster"):
            if name in fixtures and (logs := fixtures[name].folder / "log").is_dir():
                kept = Path(tempfile.mkdtemp(prefix="sluice-failed-")) / "slurm"
                shutil.copytree(logs, kept)
                report.sections.append(("Slurm's logs", f"kept in {kept}"))
        for name in ("desk", "own_desk"):
            if name in fixtures:
                kept = Path(tempfile.mkdtemp(prefix="sluice-failed-")) / "runs"
                runs = fixtures[name].checkout / "runs"
                if runs.is_dir():
                    shutil.copytree(runs, kept, symlinks=True, ignore_dangling_symlinks=True)
                    report.sections.append(("run folders", f"kept in {kept}"))
    return report


# ---- an ordinary user, and the image that it builds, once ------------------------------------


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Have the image built before a test that wants it takes its turn, and waits in it."""
    fixtures = getattr(item, "fixturenames", ())
    if "image" in fixtures and all(
        map(has, (n for m in item.iter_markers("needs") for n in m.args))
    ):
        # What went wrong is the fixture's to say.
        with suppress(Exception):
            whole_image.image()
    return (yield)


@pytest.fixture(scope="session")
def apptainer() -> str:
    """Return the command, as the commands of Sluice find it."""
    return whole_image.apptainer()


@pytest.fixture(scope="session")
def ordinary_user() -> str:
    """Return the name of a user who is not root."""
    return accounts.ordinary_user()


@pytest.fixture(scope="session")
def builder() -> Account:
    """Return the account that builds."""
    return accounts.builder()


@pytest.fixture(scope="session")
def builder_checkout() -> Path:
    """Return its checkout, with the light environment."""
    return accounts.builder_checkout()


@pytest.fixture(scope="session")
def image() -> Path:
    """Return a CPU image with its manifest beside it, in a folder that every user may enter."""
    return whole_image.image()


# ---- private Slurms, and checkouts to submit from --------------------------------------------


@pytest.fixture(scope="session")
def short_folder() -> Iterator[Path]:
    """Return a folder that every user may enter, with a path short enough for sockets."""
    path = Path(tempfile.mkdtemp(prefix="sluice-cluster-", dir="/tmp"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def users(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """Return who else may submit jobs to a private Slurm: as root, an ordinary user."""
    return (request.getfixturevalue("ordinary_user"),) if IS_ROOT else ()


@pytest.fixture(scope="session")
def cluster(users: tuple[str, ...]) -> Cluster:
    """Return the private Slurm of all workers, for tests that only submit jobs."""

    def make() -> str:
        path = Path(tempfile.mkdtemp(prefix="sluice-cluster-", dir="/tmp"))
        path.chmod(0o755)
        made = start_cluster(path / "c", users)
        at_end("rm", "-rf", path)
        at_end(CHECKOUT / "slurm/local/down.sh", environment=made.environment)
        return str(made.folder)

    return new_cluster(Path(once("cluster", make)), users)


@pytest.fixture(scope="session")
def own_cluster(short_folder: Path, users: tuple[str, ...]) -> Iterator[Cluster]:
    """Return a private Slurm of this worker's, for tests that set limits or pull plugs."""
    made = start_cluster(short_folder / "c", users)
    yield made
    done = made.local("down.sh")
    assert done.returncode == 0, done.stderr


def at(cluster: Cluster, apptainer: str, image: Path) -> Iterator[Desk]:
    folder = Path(tempfile.mkdtemp(prefix="sluice-desk-"))
    folder.chmod(0o755)
    # Copies: the folder is on the path of other users' jobs.
    lay_out(folder / "sluice", copied=True)
    yield Desk(cluster, folder / "sluice", environment(cluster, apptainer, image))
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def desk(cluster: Cluster, apptainer: str, image: Path) -> Iterator[Desk]:
    """Return a checkout at the Slurm of all workers."""
    yield from at(cluster, apptainer, image)


@pytest.fixture(scope="session")
def own_desk(own_cluster: Cluster, apptainer: str, image: Path) -> Iterator[Desk]:
    """Return a checkout at this worker's own Slurm."""
    yield from at(own_cluster, apptainer, image)
