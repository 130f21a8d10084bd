"""faults.py: all that is wrong with a site.toml, each in a line, whatever else is wrong with it."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.site import faults
from cluster.site.file import SiteError, load_site
from cluster.site.settings import ARRIVED

SLURM = '[slurm]\npartition = "gpu"\ncpus_per_node = 8\ngpus_per_node = 4\n'
PATHS = '[paths]\nscratch = "/tmp"\n'
GOOD = SLURM + PATHS


def found(text: str) -> list[str]:
    return list(faults.faults(tomllib.loads(text)))


@pytest.fixture(autouse=True)
def on_a_laptop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ARRIVED, raising=False)


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        # ---- of one setting ----
        (GOOD, []),
        (PATHS, ["slurm.partition", "slurm.cpus_per_node", "slurm.gpus_per_node"]),
        (SLURM, ["paths.scratch"]),
        ("slurm = 3\n" + PATHS, ["'slurm'"]),
        (SLURM + 'acount = "x"\nqoss = "y"\n' + PATHS, ["'slurm.acount'", "'slurm.qoss'"]),
        (SLURM + 'account = "a,b"\nqos = "a b"\n' + PATHS, ["slurm.account", "slurm.qos"]),
        (SLURM + 'cluster = "all"\n' + PATHS, ["slurm.cluster"]),
        (SLURM + 'gpu_type = "gpu:a100"\n' + PATHS, ["slurm.gpu_type"]),
        (SLURM + 'gpu_type = "a100:4"\n' + PATHS, ["slurm.gpu_type"]),
        (SLURM + "save_s = 65536\n" + PATHS, ["slurm.save_s"]),
        (SLURM + "save_s = 0\n" + PATHS, ["slurm.save_s"]),
        (SLURM.replace('"gpu"', '"-gpu"') + PATHS, ["slurm.partition"]),
        (SLURM.replace('"gpu"', '"gpu,long"') + PATHS, []),
        (SLURM.replace("= 8", "= 0") + PATHS, ["slurm.cpus_per_node"]),
        (SLURM.replace("= 8", "= 8.0") + PATHS, ["slurm.cpus_per_node"]),
        (SLURM + '[paths]\nscratch = "~/x"', ["paths.scratch"]),
        (SLURM + '[paths]\nscratch = "$SLURM_TMPDIR/x"', []),
        (GOOD + 'runs = "runs"\ncache = "./x"\nimages = "~/images"', ["paths.runs", "paths.cache"]),
        (GOOD + '[network]\ninterface = "ib0\\nx"', ["network.interface"]),
        (GOOD + '[container]\nbinds = ["/a:/b", 3]', ["container.binds"]),
        (GOOD + "[preflight]\nmin_free_gpu_fraction = 1.1", ["preflight.min_free_gpu_fraction"]),
        (GOOD + "[preflight]\nmax_clock_skew_s = nan", ["preflight.max_clock_skew_s"]),
        (GOOD + '[ssh]\nhost = "h"\nport = 65536', ["ssh.port"]),
        (GOOD + '[ssh]\nhost = "h"\nfolder = "~/"', ["ssh.folder"]),
        (GOOD + '[ssh]\nhost = "h"\nconfig = "$NO_SUCH/x"', ["ssh.config"]),
        (GOOD + '[environment]\nUID = "1"\nA = 1', ["environment.UID", "environment.A"]),
        # ---- each of several flags ----
        (
            SLURM + 'sbatch_flags = ["--array=1", "--exclusive", "-o", "x"]\n' + PATHS,
            ["slurm.sbatch_flags", "slurm.sbatch_flags"],
        ),
        # ---- contradictions ----
        (SLURM.replace("= 8", "= 3") + PATHS, ["slurm.cpus_per_node"]),
        (SLURM.replace("= 4", "= 0") + 'gpu_type = "a100"\n' + PATHS, ["slurm.gpu_type"]),
        (SLURM + 'sbatch_flags = ["-plong"]\n' + PATHS, ["slurm.sbatch_flags"]),
        (SLURM + 'sbatch_flags = ["-pgpu", "-Aa"]\n' + PATHS, []),
        (SLURM + 'account = "b"\nsbatch_flags = ["-Aa"]\n' + PATHS, ["slurm.sbatch_flags"]),
        (
            SLURM + 'memory_per_node_mb = 9\nsbatch_flags = ["--mem-per-cpu=5"]\n' + PATHS,
            ["slurm.sbatch_flags"],
        ),
        (GOOD + '[ssh]\nuser = "ada"\nmodules = ["python"]', ["ssh.user", "ssh.modules"]),
        # It is not known whether there is a host, so nothing is said of what needs one.
        (GOOD + '[ssh]\nuser = "ada"\nhost = 3', ["ssh.host"]),
    ],
)
def test_each_fault_is_found(text: str, settings: Sequence[str]) -> None:
    assert [fault.split(" ")[0].rstrip(":") for fault in found(text)] == list(settings)


def test_a_file_with_many_faults_gives_them_all_in_the_files_order() -> None:
    text = """
partition = "x"
[slurm]
partition = "gpu"
cpus_per_node = "8"
gpus_per_node = 4
scratch = "/tmp"
acount = "x"
sbatch_flags = ["--wrap=x"]
[paths]
runs = "here"
[container]
variant = "gpu"
[sssh]
[environment]
UID = "1"
"""
    assert found(text) == [
        "'partition' is not a setting; it belongs in [slurm]",
        "'sssh' is not a setting; did you mean 'ssh'?",
        "'slurm.scratch' is not a setting; it belongs in [paths]",
        "'slurm.acount' is not a setting; did you mean 'account'?",
        "slurm.cpus_per_node: '8' must be a whole number, at least 1",
        "slurm.sbatch_flags: --wrap is not allowed here: the batch script is Sluice's own",
        "paths.scratch is missing; configs/site.example.toml explains it",
        "paths.runs: 'here' must be an absolute path; $USER and ~ work",
        'container.variant: \'gpu\' must be "cuda" or "cpu"',
        "environment.UID: is reserved; leave it out",
    ]


def test_a_variable_of_the_laptop_is_not_asked_for_on_the_cluster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(ARRIVED, "1")
    assert found(GOOD + '[ssh]\nhost = "h"\nconfig = "$NO_SUCH/x"') == []


def test_other_commands_show_the_first_and_how_many_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SLUICE_SITE", raising=False)
    Path("site.toml").write_text(PATHS)
    with pytest.raises(SiteError) as refused:
        load_site()
    assert len(refused.value.faults) == 3
    assert str(refused.value) == (
        f"{refused.value.faults[0]} (1 of 3 faults: `make check-site` lists them all)"
    )


VALUES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.just([]))
KEYS = st.sampled_from(["partition", "cpus_per_node", "scratch", "host", "x", "sbatch_flags"])


@given(
    st.dictionaries(
        st.sampled_from([*faults.SECTIONS, "x"]), VALUES | st.dictionaries(KEYS, VALUES)
    )
)
def test_any_content_is_a_site_or_has_faults_that_are_one_line(content: dict[str, object]) -> None:
    told = list(faults.faults(content))
    assert told, "no such content has all that a site needs"
