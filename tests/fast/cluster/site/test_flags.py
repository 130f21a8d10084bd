"""flags.py: a site's flags of sbatch, read as sbatch reads them."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.site import flags
from cluster.site.file import load_site
from runfolder.errors import UserError

SITE = """[slurm]
partition = "gpu"
cpus_per_node = 4
gpus_per_node = 2
sbatch_flags = {}
[paths]
scratch = "/tmp"
"""


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["--array=0-1"], "array"),
        (["-a", "0-1"], "array"),
        (["-a0-1"], "array"),
        (["--arr=0-1"], "array"),
        (["-Ha0-1"], "array"),
        (["--comment", "mine", "--array", "0-1"], "array"),
        (["--export=NONE"], "export"),
        (["--export", "NONE"], "export"),
        (["--get-user-env"], "get-user-env"),
        (["--wrap=true"], "wrap"),
        (["--pars"], "parsable"),
        (["--test-only"], "test-only"),
        (["--wait"], "wait"),
        (["-W"], "wait"),
        (["-Q"], "quiet"),
        (["-o", "/tmp/log"], "output"),
        (["--err=/tmp/log"], "error"),
        (["--open-mode=truncate"], "open-mode"),
        (["-Jmine"], "job-name"),
        (["--requeue"], "requeue"),
        (["--no-req"], "no-requeue"),
        (["-k"], "no-kill"),
        (["--signal=B:USR1@60"], "signal"),
        (["-D/tmp"], "chdir"),
        (["-N2"], "nodes"),
        (["--ntasks-per-node", "4"], "ntasks-per-node"),
        (["-c", "8"], "cpus-per-task"),
        (["-G4"], "gpus"),
        (["--gres=gpu:a100:2"], "gres"),
        (["--gres=lustre:1,gpu"], "gres"),
        (["--tres-per-task=gres/gpu:1"], "tres-per-task"),
        (["--tres-per-task", "cpu=4"], "tres-per-task"),
        (["--tres-per-t=license/fluent:1,cpu:4"], "tres-per-task"),
        (["--tres-per-task=gres:gpu:a100:2"], "tres-per-task"),
        (["--tres-per-node=gres/gpu:2"], "tres-per-node"),
        (["--ntasks-per-tres=2"], "ntasks-per-tres"),
        (["-t", "10"], "time"),
        (["-Mother"], "clusters"),
        # sbatch takes it for a part of a heterogeneous job, and the last for the batch script.
        (["--exclusive", ":", "--exclusive"], ":"),
        (["--exclusive", "mine.sh"], "mine.sh"),
        (["--constraint=a100", "--", "--exclusive"], "--"),
    ],
)
def test_a_flag_that_cannot_work_is_refused_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SLUICE_SITE", raising=False)
    Path("site.toml").write_text(SITE.format(words))
    with pytest.raises(UserError) as refused:
        load_site()
    assert str(refused.value).startswith("site.toml: slurm.sbatch_flags: ")
    shown = f"--{name}" if name[0].isalpha() and "." not in name else f"'{name}'"
    assert shown in str(refused.value).split(": ", 2)[2].split(" ")[0]


@pytest.mark.parametrize(
    "words",
    [
        ["--constraint=a100", "--exclusive"],
        ["-C", "a100&ib", "--gres=lustre:1"],
        ["--tres-per-task=license/gpu_solver:1", "--gres=gpumem:1"],
        # The value of an option may look like one that is refused.
        ["--comment", "--array", "--mail-type=END"],
        ["-pgpu", "-A", "array", "-H"],
        ["--time-min=10", "--mem=0", "--wait-all-nodes=1", "--nodelist=n1"],
        ["--exclusive=user", "--nice=10", "--gres-flags=enforce-binding"],
        # Another release's, which we do not know.
        ["--no-such-option=1"],
    ],
)
def test_other_flags_are_the_sites_own_affair(words: list[str]) -> None:
    assert list(flags.problems(words)) == []


def test_a_shortened_name_is_reckoned_with_as_the_whole_one() -> None:
    read = list(flags.options(["--part=long", "-Hq", "high", "--resv=x", "--rese", "kept"]))
    assert read == [
        ("partition", "long"),
        ("hold", ""),
        ("qos", "high"),
        ("resv", "x"),
        ("reservation", "kept"),
    ]


def test_an_option_and_its_value_in_one_word_hide_nothing_after_them() -> None:
    assert list(flags.problems(["--mem 5G", "--time=1:00", "--comment=two words"])) == [
        "'--mem 5G' is not an sbatch option; write each with its value: --NAME=VALUE",
        "--time is not allowed here: TIME=, or the job's file, sets the time limit",
    ]
