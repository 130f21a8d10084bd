"""site.toml: read, checked, and the folders that follow from it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.plan import resolve
from cluster.runs import folders
from cluster.site import places, variables
from cluster.site.file import load_site, site_of_this_machine
from runfolder.errors import UserError
from tests.shared import CHECKOUT

EXAMPLE = CHECKOUT / "configs/site.example.toml"
LEAST = """
[slurm]
partition = "long"
cpus_per_node = 8
gpus_per_node = 0
[paths]
scratch = "/tmp"
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for kind in ("RUNS", "DATASETS", "CACHE", "IMAGES", "SITE"):
        monkeypatch.delenv(f"SLUICE_{kind}", raising=False)
    return tmp_path


def write(text: str) -> None:
    Path("site.toml").write_text(text)


def test_without_a_file_the_private_cluster_is_the_site() -> None:
    assert load_site().is_private


def test_the_example_is_a_site_and_shows_every_setting_with_its_default(folder: Path) -> None:
    text = EXAMPLE.read_text()
    write(text)
    as_given = load_site()
    # What is commented out is what is there without it.
    write(re.sub(r"(?m)^#(\w+ = )", r"\1", text))
    assert load_site().slurm == as_given.slurm
    assert load_site().paths == as_given.paths
    assert load_site().container == as_given.container
    assert load_site().network == as_given.network
    assert load_site().preflight == as_given.preflight
    shown = tomllib.loads(re.sub(r"(?m)^#(\w+ = )", r"\1", text))
    for name in ("slurm", "paths", "container", "network", "preflight"):
        known = set(vars(getattr(as_given, name)))
        assert set(shown[name]) == known


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ('partiton = "x"', "'slurm.partiton' is not a setting; did you mean 'partition'"),
        ("save_s = -1", "slurm.save_s: -1 must be a whole number from 1 to 65535"),
        ("save_s = true", "slurm.save_s: True must be a whole number"),
        ('save_s = "5"', "slurm.save_s: '5' must be a whole number"),
        ("account = 5", "slurm.account: 5 must be a string in quotes"),
        ('sbatch_flags = "--x"', "slurm.sbatch_flags: '--x' must be a list of strings"),
    ],
)
def test_a_wrong_setting_is_named(change: str, said: str) -> None:
    write(LEAST.replace("[paths]", f"{change}\n[paths]"))
    with pytest.raises(UserError, match=re.escape(said)):
        load_site()


@pytest.mark.parametrize("key", ["partition", "cpus_per_node", "gpus_per_node", "scratch"])
def test_a_missing_key_is_named_with_where_it_is_explained(key: str) -> None:
    write(re.sub(rf"(?m)^{key} = .*\n", "", LEAST))
    with pytest.raises(UserError, match=rf"\.{key} is missing; configs/site\.example\.toml"):
        load_site()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[slurm", "is not valid TOML"),
        ("x = 1", "'x' is not a setting; did you mean|'x' is not a setting; choose from"),
        ("slurm = 3", "'slurm' is not a table"),
        (LEAST + '[container]\nvariant = "gpu"', r"container.variant: 'gpu' must be \"cuda\" or"),
        (LEAST + '[environment]\n"A B" = "x"', "environment.A B: is not a valid variable name"),
        (LEAST + "[environment]\nA = 1", "environment.A: 1 must be a string"),
        (LEAST + '[environment]\nSLUICE_WORLD_SIZE = "1"', "SLUICE_WORLD_SIZE: is reserved"),
        (LEAST + '[environment]\nUID = "1"', "environment.UID: is reserved"),
        (LEAST + '[environment]\nRANK = "1"', "environment.RANK: Sluice sets it"),
        (LEAST.replace('"long"', '""'), "slurm.partition: '' must be filled in"),
        (LEAST + '[ssh]\nbackend = "rsh"', r"ssh.backend: 'rsh' must be \"paramiko\" or"),
        (LEAST + '[ssh]\nconfig = "$NO_SUCH_VARIABLE/x"', r"ssh.config: \$NO_SUCH_VARIABLE is not"),
        (
            LEAST + '[ssh]\nhost = "-oProxyCommand=x"',
            r"ssh.host: '-oProxyCommand=x' must be the name of a machine",
        ),
    ],
)
def test_what_is_no_site_is_refused(text: str, said: str) -> None:
    write(text)
    with pytest.raises(UserError, match=said):
        load_site()


def test_a_named_file_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_SITE", "elsewhere.toml")
    with pytest.raises(UserError, match=r"SLUICE_SITE=elsewhere\.toml"):
        load_site()


def test_folders_come_from_the_environment_then_the_site_then_the_checkout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert places.folder("runs") == Path("runs")
    monkeypatch.setenv("PROJECT", "p1")
    write(LEAST + 'runs = "/data/$PROJECT/runs"')
    assert places.folder("runs") == Path("/data/p1/runs")
    assert places.folder_setting("runs") == "site.toml: paths.runs"
    monkeypatch.setenv("SLUICE_RUNS", "/mine")
    assert places.folder("runs") == Path("/mine")
    assert places.folder_setting("runs") == "SLUICE_RUNS"


def test_variables_of_the_nodes_are_left_to_the_nodes() -> None:
    write(LEAST.replace('"/tmp"', '"$SLURM_TMPDIR/x"'))
    assert load_site().paths.scratch == "$SLURM_TMPDIR/x"


@given(st.text(max_size=200))
def test_any_text_is_a_site_or_refused_in_words(text: str) -> None:
    Path("site.toml").write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        load_site()
    except UserError as error:
        assert str(error).startswith("site.toml: ")


def test_a_folder_with_an_unknown_variable_is_refused_where_it_is_used() -> None:
    write(LEAST + 'runs = "/data/$NO_SUCH_VARIABLE/x"')
    assert load_site().paths.runs == "/data/$NO_SUCH_VARIABLE/x"
    with pytest.raises(UserError, match=r"paths.runs: \$NO_SUCH_VARIABLE is not set"):
        places.folder("runs")


def test_a_laptop_has_none_of_the_clusters_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(LEAST + 'runs = "/of/the/$CLUSTER"\n[container]\napptainer = "theirs"\n[ssh]\nhost = "l"')
    (tmp_path / "sbatch").touch(mode=0o755)
    monkeypatch.setenv("CLUSTER", "cluster")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not load_site().is_elsewhere
    assert places.folder("runs") == Path("/of/the/cluster")
    assert site_of_this_machine().container.apptainer == "theirs"
    (tmp_path / "sbatch").unlink()
    assert load_site().is_elsewhere
    assert places.folder("runs") == Path("runs")
    assert places.folder_setting("runs") == "SLUICE_RUNS"
    assert site_of_this_machine().container.apptainer == ""
    # With nobody to ask, a machine without Slurm is a login node with a problem.
    write(LEAST)
    assert not load_site().is_elsewhere


def test_a_folder_that_is_a_link_is_where_it_leads(tmp_path: Path) -> None:
    write(LEAST)
    (tmp_path / "shared").mkdir()
    Path("runs").symlink_to(tmp_path / "shared")
    assert places.folder("runs") == tmp_path / "shared"


def test_a_folder_keeps_the_name_by_which_the_user_came_to_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "nfs7/ada/sluice").mkdir(parents=True)
    (folder / "home").symlink_to("nfs7/ada")
    physical, logical = folder / "nfs7/ada/sluice", folder / "home/sluice"
    monkeypatch.chdir(logical)
    for pwd, expected in (
        (str(logical), logical),
        (str(physical), physical),
        # Another folder's, as `make -C` has it, or a path that is not plain.
        (str(folder), physical),
        (f"{folder}/nfs7/../home/sluice", physical),
        ("sluice", physical),
        ("", physical),
    ):
        monkeypatch.setenv("PWD", pwd)
        assert folders.runs_folder() == expected / "runs"
        assert folders.datasets_folder() == expected / "datasets"
        assert resolve.cache_folder() == expected / "cache"
        assert places.here() / places.folder("images") == expected / "images"
        assert resolve.short(folders.runs_folder()) == "runs"
    # A link to what stays leads there, by its own path.
    monkeypatch.setenv("PWD", str(logical))
    (folder / "home/kept").mkdir()
    Path("runs").symlink_to("../kept")
    assert folders.runs_folder() == folder / "home/kept"


def test_what_each_process_gets_from_us_is_not_for_a_file_to_set() -> None:
    script = (CHECKOUT / "slurm/environment.sh").read_text()
    found = re.findall(r"^ *export (.*)$", script, re.MULTILINE)
    # Where ours is a default, the file's counts.
    ours = {name for line in found for name in re.findall(r"\b([A-Z_]+)=(?!\$\{\1:-)", line)}
    assert {"HF_HOME", "TRITON_CACHE_DIR"} <= ours
    for name in ours:
        assert list(variables.faults({name: "x"})), name
