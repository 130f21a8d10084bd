"""sync.py: what is brought to the cluster, and under which name."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.remote import sync
from cluster.site.settings import PRIVATE, Ssh
from runfolder.errors import UserError

SITE = """
[slurm]
partition = "gpu"
cpus_per_node = 4
gpus_per_node = 0
[paths]
scratch = "/tmp"
[ssh]
host = "login"
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout without git, of a laptop."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    (tmp_path / "train").mkdir()
    (tmp_path / "train/x.py").write_text("x")
    (tmp_path / "run.sh").write_text("#!")
    (tmp_path / "run.sh").chmod(0o755)
    (tmp_path / "site.toml").write_text(SITE)
    return tmp_path


def packed() -> sync.Parcel:
    return sync.pack(replace(PRIVATE, source=Path("site.toml")))


def test_the_name_follows_from_every_byte_and_from_what_may_be_run(here: Path) -> None:
    names = {packed().key}
    assert packed().key in names
    for change in (
        lambda: (here / "train/x.py").write_text("y"),
        lambda: (here / "run.sh").chmod(0o644),
        lambda: (here / "site.toml").write_text(SITE + 'user = "other"'),
        lambda: (here / "train/x.py").rename(here / "train/y.py"),
    ):
        change()
        assert packed().key not in names
        names.add(packed().key)


def test_the_manifest_is_one_that_sha256sum_believes(here: Path, tmp_path: Path) -> None:
    (here / "a name, *odd* ü.txt").write_text("x")
    parcel = packed()
    there = tmp_path / "there"
    there.mkdir()
    # As the far side does; and Debian 12's own Python 3.11 knows no filter for its extractall.
    parts = parcel.packed(set(parcel.contents))
    subprocess.run(["tar", "--extract", "--gzip", "--file=-"], input=parts, cwd=there, check=True)
    (tmp_path / "manifest").write_text(parcel.manifest)
    words = ["sha256sum", "--check", "--strict", "--quiet", tmp_path / "manifest"]
    subprocess.run(words, cwd=there, check=True)
    assert (there / "run.sh").stat().st_mode & 0o777 == 0o755
    assert (there / "train/x.py").stat().st_mode & 0o777 == 0o644


def test_a_folder_of_data_is_not_code_even_where_git_has_it(here: Path) -> None:
    (here / "datasets").mkdir()
    (here / "datasets/README.md").write_text("x")
    subprocess.run(["git", "init", "--quiet"], check=True)
    subprocess.run(["git", "add", "--force", "datasets", "train"], check=True)
    words = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org", "commit", "-qm", "x"]
    subprocess.run(words, check=True)
    names = set(packed().contents)
    assert names == {"train/x.py", "run.sh", "site.toml", ".origin.json", ".origin.diff"}


@pytest.mark.parametrize("name", ["a\nb", "a\\b"])
def test_a_name_that_no_manifest_can_hold_is_refused(here: Path, name: str) -> None:
    (here / name).write_text("x")
    with pytest.raises(UserError, match="rename it"):
        packed()


def test_the_folder_is_one_word_from_the_home_or_the_root(here: Path) -> None:
    for folder, word in (
        ("sluice", '"$HOME"/sluice'),
        ("~/my work", "\"$HOME\"/'my work'"),
        ("/scratch/x", "/scratch/x"),
    ):
        settings = replace(PRIVATE, ssh=Ssh(host="login", folder=folder))
        assert sync.home(settings) == word
