"""sync.py: what is brought to the cluster, and under which name."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.plan.job import load_job
from cluster.remote import sync
from cluster.runs import checkout
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
    origin = {".sluice-origin.json", ".sluice-origin.diff"}
    assert names == {"train/x.py", "run.sh", "site.toml"} | origin


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


@pytest.fixture
def own(here: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder outside the checkout, in git, with edits: a script, its module, what is no code."""
    root = tmp_path_factory.mktemp("home") / "fit"
    (root / "scripts").mkdir(parents=True)
    (root / "scripts/fit.py").write_text("import helper\n")
    (root / "helper.py").write_text("x = 1\n")
    (root / ".gitignore").write_text("*.bin\n")
    git = ["git", "-C", root, "-c", "user.name=x", "-c", "user.email=x@example.org"]
    for words in (["init", "--quiet"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], check=True)
    (root / "helper.py").write_text("x = 2\n")
    (root / "data.bin").write_text("ignored")
    (root / "notes.txt").write_text("n" * 2_000_000)
    return root


def sent(job: Path, there: Path) -> Path:
    """Lay out a job as it is sent; return its file there."""
    parcel = sync.pack_job(load_job(str(job)))
    there.mkdir()
    parts = parcel.packed(set(parcel.contents))
    subprocess.run(["tar", "-xzf", "-"], input=parts, cwd=there, check=True)
    return there / job.name


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ("fit/fit.yaml", "script: scripts/fit.py\nfolder: .\nresources: {time: 4:00:00}\n"),
        ("jobs/fit.yaml", "script: ../fit/scripts/fit.py\nfolder: ../fit\n"),
        ("fit/fit.yaml", "script: scripts/fit.py\n"),
        ("fit/fit.yaml", "module: helper\nfolder: .\nafter: tinyllama\n"),
        ("fit/fit.yaml", "command: tune\narguments: [run, '04:00:00', 1.5]\n"),
    ],
)
def test_a_job_of_ones_own_is_the_same_there(
    own: Path, tmp_path_factory: pytest.TempPathFactory, place: str, text: str
) -> None:
    job = own.parent / place
    job.parent.mkdir(exist_ok=True)
    job.write_text(text.replace("4:00:00", '"4:00:00"'))
    here = load_job(str(job))
    there = load_job(str(sent(job, tmp_path_factory.mktemp("cluster") / "key")))
    assert replace(there, path=here.path, script_folder=here.script_folder) == here
    if here.script_folder is None:
        assert there.script_folder is None
        return
    assert there.script_folder is not None
    original, copy = (checkout.state(each) for each in (here.script_folder, there.script_folder))
    assert (copy.commit, copy.diff) == (original.commit, original.diff)
    assert set(copy.files) == set(original.files)
    for file in copy.files:
        assert (there.script_folder / file).read_bytes() == (here.script_folder / file).read_bytes()
    assert checkout.place_of(there.script_folder).endswith(f":{here.script_folder.resolve()}")


def test_what_of_a_job_cannot_be_brought_is_refused(own: Path, here: Path) -> None:
    job = own / "fit.yaml"
    job.write_text(f"script: {here / 'train/x.py'}\n")
    with pytest.raises(UserError, match="a script of the checkout"):
        sync.pack_job(load_job(str(job)))
    (own / ".gitignore").write_text("fit.py\n")
    subprocess.run(["git", "-C", own, "rm", "--quiet", "--cached", "scripts/fit.py"], check=True)
    job.write_text("script: scripts/fit.py\nfolder: .\n")
    with pytest.raises(UserError, match="was not copied"):
        sync.pack_job(load_job(str(job)))
