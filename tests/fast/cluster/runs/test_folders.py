"""runs.py: run folders, found by name, made whole, with the code as it is."""

from __future__ import annotations

import fcntl
import hashlib
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.runs import checkout as code_of
from cluster.runs import folders
from cluster.site import places
from runfolder import attempts, lock, records
from runfolder.errors import UserError

RECORD = {"job": "rag", "module": "train.labs.rag", "accel": "ddp", "num_processes": 2}


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout of three files, its runs folder unset, and this test in it."""
    folder = tmp_path / "checkout"
    for name in ("slurm/node.sh", "train/labs/rag.py", "README.md"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / "slurm/node.sh").chmod(0o755)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("SLUICE_RUNS", raising=False)
    monkeypatch.delenv("SLUICE_DATASETS", raising=False)
    # No repository around the temporary folder, no settings of this user.
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    return folder


Git = Callable[..., None]


@pytest.fixture
def git(checkout: Path) -> Git:
    """Return a function that runs git in the checkout."""

    def run(*words: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, *words], cwd=checkout, check=True, capture_output=True)

    return run


def fill(folder: Path) -> None:
    (folder / "config.yaml").write_text("a: 1\n")


def create(name: str = "20260101-000000-abcdef") -> Path:
    folder = folders.runs_folder() / "rag" / name
    folders.create(folder, content=dict(RECORD), fill=fill)
    return folder


def code(folder: Path) -> set[str]:
    root = folder / "code"
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


# ---- making ----


def test_a_run_folder_holds_its_record_its_config_and_the_code(checkout: Path) -> None:
    folder = create()
    assert records.read(folder).items() >= RECORD.items()
    assert (folder / "config.yaml").read_text() == "a: 1\n"
    assert code(folder) == {"slurm/node.sh", "train/labs/rag.py", "README.md"}
    assert (folder / "code/slurm/node.sh").stat().st_mode & 0o111
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_without_git_the_code_is_all_but_data_and_caches(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLUICE_DATASETS", str(checkout / "mydata"))
    monkeypatch.setenv("SLUICE_RUNS", str(checkout / "myruns"))
    for name in (
        *(".venv/x", "runs/x", "datasets/x", "cache/x", "train/__pycache__/x", ".mypy_cache/x"),
        *("mydata/x", "myruns/x/y/z"),
    ):
        (checkout / name).parent.mkdir(parents=True)
        (checkout / name).touch()
    (checkout / "site.toml").write_text("account = 'secret'")
    (checkout / "weights.bin").write_bytes(bytes(code_of.MAX_UNTRACKED_BYTES + 1))
    (checkout / "dangling").symlink_to("nowhere")
    folder = create()
    assert code(folder) == {"slurm/node.sh", "train/labs/rag.py", "README.md"}
    assert records.read(folder)["git_commit"] is None


@pytest.mark.needs("git")
def test_with_git_the_code_is_what_is_tracked_or_new_with_the_edits(
    checkout: Path, git: Git
) -> None:
    (checkout / ".gitignore").write_text("secret\nruns\n")
    git("init")
    git("add", ".")
    git("commit", "-m", "x")
    (checkout / "README.md").write_text("edited")
    (checkout / "train/new.py").write_text("new")
    (checkout / "secret").touch()
    (checkout / "weights.bin").write_bytes(bytes(code_of.MAX_UNTRACKED_BYTES + 1))
    (checkout / "train/labs/rag.py").unlink()
    folder = create()
    assert code(folder) == {".gitignore", "slurm/node.sh", "README.md", "train/new.py"}
    assert (folder / "code/README.md").read_text() == "edited"
    record = records.read(folder)
    assert len(record["git_commit"]) == 40
    diff = (folder / "code.diff").read_bytes()
    assert b"+edited" in diff
    assert record["git_diff_sha256"] == hashlib.sha256(diff).hexdigest()


@pytest.mark.needs("git")
@pytest.mark.parametrize("with_git", [True, False])
def test_what_looks_like_a_secret_is_not_copied_and_said(
    checkout: Path,
    git: Git,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    with_git: bool,
) -> None:
    if with_git:
        git("init")
        git("add", ".")
        git("commit", "-m", "x")
    monkeypatch.setenv("SLUICE_SITE", "my.toml")
    (checkout / "my.toml").write_text(sites_text := "[slurm]")
    names = {".env", "deploy.key", "hf_token.txt", "my.toml", "site-lab.toml"}
    for name in names:
        (checkout / name).write_text(sites_text)
    (checkout / "tokenizer.py").touch()
    monkeypatch.setattr(places, "folder", Path)
    copied = code(create())
    assert not copied & names
    assert "tokenizer.py" in copied
    said = capsys.readouterr().err
    assert said.startswith("note: not copied (it looks like a secret): ")
    assert all(name in said for name in names)
    assert len(said.splitlines()) == 1


@pytest.mark.needs("git")
def test_a_tarball_inside_some_other_repository_is_code_without_git(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", "/")
    (tmp_path / ".gitignore").write_text("checkout")
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init"], ["add", "."], [*identity, "commit", "-m", "x"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True, capture_output=True)
    folder = create()
    assert code(folder) == {"slurm/node.sh", "train/labs/rag.py", "README.md"}


def test_a_later_edit_does_not_reach_the_run(checkout: Path) -> None:
    folder = create()
    (checkout / "train/labs/rag.py").write_text("edited")
    assert (folder / "code/train/labs/rag.py").read_text() == "train/labs/rag.py"


def test_a_place_that_takes_no_folder_is_refused_and_leaves_nothing(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place, said in (("README.md/runs", "README.md is not a folder"), ("/proc/x", "/proc")):
        monkeypatch.setenv("SLUICE_RUNS", place)
        with pytest.raises(UserError, match=f"^SLUICE_RUNS: .*{said}.*choose another place"):
            folders.create(folders.new_folder("rag", ""), content=dict(RECORD), fill=fill)
    assert sorted(path.name for path in checkout.iterdir()) == ["README.md", "slurm", "train"]


def test_a_run_folder_that_cannot_be_finished_leaves_nothing(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(code_of, "copy", lambda target: (_ for _ in ()).throw(OSError(28, "")))
    with pytest.raises(UserError, match=r"^SLUICE_RUNS: the run folder cannot be created"):
        create()
    assert list((checkout / "runs/rag").iterdir()) == []


@pytest.mark.needs("git")
def test_a_secret_that_is_staged_is_neither_code_nor_in_the_diff(checkout: Path, git: Git) -> None:
    git("init")
    git("add", ".")
    git("commit", "-m", "x")
    (checkout / ".env").write_text("PASSWORD=1234")
    (checkout / "new.py").write_text("new")
    (checkout / "data.bin").write_bytes(bytes(code_of.MAX_UNTRACKED_BYTES + 1))
    git("add", "--force", ".env", "new.py", "data.bin")
    folder = create()
    # What was staged was meant, whatever its size.
    assert {"new.py", "data.bin"} <= code(folder)
    assert ".env" not in code(folder)
    diff = (folder / "code.diff").read_bytes()
    assert b"+new" in diff
    assert b"1234" not in diff


@pytest.mark.needs("git")
def test_before_the_first_commit_git_still_tells_what_to_ignore(checkout: Path, git: Git) -> None:
    (checkout / ".gitignore").write_text("ignored\nruns\n")
    (checkout / "ignored").touch()
    git("init")
    git("add", "README.md")
    folder = create()
    assert code(folder) == {".gitignore", "slurm/node.sh", "train/labs/rag.py", "README.md"}
    assert records.read(folder)["git_commit"] is None


@pytest.mark.needs("git")
def test_a_git_that_does_not_answer_is_said(checkout: Path, git: Git) -> None:
    git("init")
    (checkout / ".git/config").write_text("[broken")
    with pytest.raises(UserError, match=r"^git: .*config"):
        create()


@pytest.mark.parametrize("name", ["a/b", "..%2f", "a b", "ü", "$x", "a\n"])
def test_a_name_that_is_no_word_is_refused(checkout: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"^NAME="):
        folders.new_folder("rag", name)


def test_two_runs_of_one_second_have_two_folders(checkout: Path) -> None:
    assert folders.new_folder("rag", "a_b-1.2") != folders.new_folder("rag", "a_b-1.2")


def test_a_name_is_given_once_whatever_the_job(checkout: Path) -> None:
    create("20260101-000000-abcdef-first")
    with pytest.raises(UserError, match=r"^NAME=first: rag/20260101-\S+-first has this name"):
        folders.new_folder("other", "first")
    # Only the end of the name of another.
    create("20260101-000000-abcdef-very-long")
    folders.new_folder("rag", "long")


# ---- finding ----


def test_a_run_is_found_by_path_stamp_start_name_and_job(checkout: Path) -> None:
    old = create("20260101-000000-abcdef-first-try")
    new = create("20260102-000000-123456")
    other = folders.runs_folder() / "imdb/20260103-000000-fedcba"
    folders.create(other, content=dict(RECORD), fill=fill)
    for name, folder in (
        (str(old), old),
        ("runs/rag/20260101-000000-abcdef-first-try", old),
        ("rag/20260101-000000-abcdef-first-try", old),
        ("20260101", old),
        ("first-try", old),
        ("rag", new),
        ("imdb", other),
        # Of two jobs the newest, whatever the jobs' names.
        ("2026", other),
    ):
        assert folders.find(name) == folder, name


@pytest.mark.parametrize("name", ["", "rga", "/nowhere/at/all", "*", "[", "..", "a/../b", "."])
def test_a_run_that_is_not_there_is_refused_with_the_newest(checkout: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"^RUN=.*holds no runs yet"):
        folders.find(name)
    create()
    with pytest.raises(UserError, match=r"^RUN=.*the newest are rag/20260101-000000-abcdef$"):
        folders.find(name)


def test_a_run_that_is_being_made_is_not_found(checkout: Path) -> None:
    create().rename(folders.runs_folder() / "rag/.20260101-000000-abcdef.unfinished")
    with pytest.raises(UserError, match="holds no runs yet"):
        folders.find("rag")


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"job": "rag"}'])
def test_a_damaged_record_is_refused(checkout: Path, text: str) -> None:
    folder = create()
    (folder / "run.json").write_text(text)
    with pytest.raises(UserError, match=f"^{folder}/run.json: is not the record of a run"):
        records.read(folder)


# ---- attempts and the lock ----


def test_attempts_count_from_one_and_pass_over_what_is_none(checkout: Path) -> None:
    folder = create()
    assert attempts.begin(folder) == 1
    (folder / "attempts/notes").mkdir()
    (folder / "attempts/9").mkdir()
    assert attempts.begin(folder) == 10
    assert (folder / "attempts/10").is_dir()


def test_a_run_that_is_in_use_is_refused_with_its_holder(checkout: Path) -> None:
    folder = create()
    lock.check_free(folder)
    with (folder / "run.lock").open("w") as stream:
        stream.write("process 7 on node1")
        stream.flush()
        lock.check_free(folder)
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"in use by another run \(process 7 on node1\)"):
            lock.check_free(folder)
    lock.check_free(folder)
    (folder / "run.lock").unlink()
    (folder / "run.lock").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        lock.check_free(folder)


# ---- a script's own folder ----


def snapshot(script: Path) -> set[str]:
    folder = folders.runs_folder() / "mine" / "20260101-000000-abcdef"
    folders.create(folder, content=dict(RECORD), fill=fill, script_folder=script)
    code = folder / "code/script"
    return {str(path.relative_to(code)) for path in code.rglob("*") if path.is_file()}


def test_a_scripts_folder_is_copied_without_data_secrets_and_environments(
    checkout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine"
    # What is no code of a checkout may be a script's own package.
    for name in ("fit.py", "datasets/news.py", ".venv/x.py", "hf_token", "__pycache__/a.pyc"):
        (mine / name).parent.mkdir(parents=True, exist_ok=True)
        (mine / name).write_text("x")
    (mine / "large.bin").write_bytes(bytes(1_000_001))
    assert snapshot(mine) == {"fit.py", "datasets/news.py"}
    assert capsys.readouterr().err.splitlines() == [
        f"note: not copied (it looks like a secret): {mine}/hf_token",
        f"note: not copied (over 1 MB): {mine}/large.bin",
    ]


def test_a_scripts_repository_is_recorded_with_its_edits(checkout: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(mine)]
    (mine / "fit.py").write_text("x = 1\n")
    (mine / ".gitignore").write_text("out\n")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], check=True)
    (mine / "fit.py").write_text("x = 2\n")
    (mine / "out").touch()
    assert snapshot(mine) == {"fit.py", ".gitignore"}
    run = folders.runs_folder() / "mine" / "20260101-000000-abcdef"
    assert b"+x = 2" in (run / "script.diff").read_bytes()
    commit = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True)
    assert records.read(run)["script_git_commit"] == commit.strip()


def test_a_scripts_folder_that_is_a_home_or_data_is_refused(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(code_of, "MAX_FILES", 3)
    mine = tmp_path / "mine"
    mine.mkdir()
    for number in range(4):
        (mine / f"{number}.py").touch()
    with pytest.raises(UserError, match=r"holds more than 3 files.*a folder of its own"):
        snapshot(mine)
    assert not (folders.runs_folder() / "mine/20260101-000000-abcdef").exists()
