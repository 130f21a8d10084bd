"""check_site.py: the command: what it prints where, and its exit code."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.commands import check_site
from cluster.remote import calls
from cluster.runs import clusters
from cluster.site.settings import ARRIVED, FOLDERS
from cluster.slurm.refusals import ControllerUnreachable, SlurmError
from runfolder.errors import UserError
from tests.fast import command
from tests.fast.cluster import answers
from tests.fast.cluster.answers import Recorded

GOOD = """[slurm]
partition = "gpu"
cpus_per_node = 4
gpus_per_node = 2
save_s = 20
[paths]
scratch = "/tmp"
"""


class Desk:
    """A folder with a site.toml, where the command is called."""

    def __init__(self, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.capfd = capfd

    def check(self, text: str, **variables: str) -> subprocess.CompletedProcess[str]:
        if text:
            (self.folder / "site.toml").write_text(text)
        environment = {"PATH": str(self.folder), "HOME": str(self.folder)} | variables
        return command.call(
            check_site.main, folder=self.folder, environment=environment, capfd=self.capfd
        )

    def faults(self, text: str) -> list[str]:
        """Return the faults that are told, without the file's name."""
        done = self.check(text)
        lines = done.stderr.splitlines()
        assert done.returncode == (2 if lines else 0)
        return [line.removeprefix("error: site.toml: ") for line in lines]


@pytest.fixture
def laptop(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Desk:
    return Desk(tmp_path, capfd)


@pytest.fixture
def desk(laptop: Desk, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    """A login node, whose Slurm says what one has said."""
    (laptop.folder / "sbatch").touch(mode=0o755)
    monkeypatch.setattr(check_site.limits, "user_name", lambda: answers.USER)
    monkeypatch.setattr(clusters, "chosen", lambda site: Recorded(answers=answers.of("24.11")))
    return laptop


def test_a_right_file_is_shown_with_what_was_and_was_not_compared(desk: Desk) -> None:
    done = desk.check(GOOD)
    assert (done.returncode, done.stderr) == (0, "")
    heading, _, *rows = done.stdout.splitlines()
    assert heading == "site.toml and Slurm 24.11.5 of sluice, for user ada"
    assert "slurm.cpus_per_node  4                    4 on 2 nodes" in rows
    assert rows[-1].startswith("not compared: paths.scratch, ")


def test_faults_of_the_file_are_all_told_and_nothing_is_compared(desk: Desk) -> None:
    done = desk.check(GOOD.replace("cpus", "cpu").replace('"/tmp"', "5"))
    assert (done.returncode, done.stdout) == (2, "")
    *faults, last = done.stderr.splitlines()
    assert [fault.split(" ")[2] for fault in faults] == [
        "'slurm.cpu_per_node'",
        "slurm.cpus_per_node",
        "paths.scratch:",
    ]
    assert last == "not compared with Slurm, until these are corrected"


def test_differences_and_what_is_not_on_this_machine_are_told_together(desk: Desk) -> None:
    (desk.folder / "file").touch()
    text = GOOD.replace("gpus_per_node = 2", "gpus_per_node = 3")
    text += f'runs = "{desk.folder}/new/runs"\ndatasets = "/$NO_SUCH/x"\n'
    text += f'cache = "{desk.folder}/file/x"\nimages = "/"\n'
    text += '[container]\napptainer = "no-such"\nverify_key = "k.pem"\nbinds = ["a", "/x:/cache"]'
    beginnings = [
        "slurm.gpus_per_node: 3, but",
        "paths.datasets: $NO_SUCH is not set",
        f"paths.cache: {desk.folder}/file is not a folder",
        "container.apptainer: no-such is not a command",
        "container.verify_key=k.pem: is neither",
        "container.binds: 'a' is not SOURCE:TARGET:ro",
        "container.binds: '/x:/cache' would hide",
    ]
    faults = desk.faults(text)
    assert len(faults) == len(beginnings), faults
    for fault, beginning in zip(faults, beginnings, strict=True):
        assert fault.startswith(beginning)


def test_data_may_be_the_sites_own_but_runs_must_be_written(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    (desk.folder / "shared").mkdir()
    may = os.access
    # Root may write everywhere.
    monkeypatch.setattr(
        os, "access", lambda path, mode: Path(path).name != "shared" and may(path, mode)
    )
    text = "".join(f'{kind} = "{desk.folder}/shared"\n' for kind in FOLDERS)
    (fault,) = desk.faults(GOOD + text)
    assert fault.startswith("paths.runs: ")
    (fault,) = desk.faults(GOOD + f'images = "{desk.folder}/shared/new"\n')
    assert fault.startswith(f"paths.images: {desk.folder}/shared is not a folder that you can")


@pytest.mark.parametrize(
    ("reason", "is_fault"),
    [
        ("You must name your project.", True),
        # It may pass, or is a limit of the user's.
        ("Requested nodes are busy", False),
        ("Job violates accounting/QOS policy (job submit limit)", False),
    ],
)
def test_what_sbatch_itself_refuses_is_told(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, reason: str, is_fault: bool
) -> None:
    def refuse(words: str, said: str) -> str:
        if words == "sbatch":
            raise SlurmError(reason)
        return said

    queue = Recorded(answers=answers.of("24.11"), change=refuse)
    monkeypatch.setattr(clusters, "chosen", lambda site: queue)
    told = f"slurm: sbatch refuses a job with these settings: {reason}"
    assert desk.faults(GOOD) == [told] * is_fault


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ControllerUnreachable("it is down"), 0, "not compared: [slurm]: it is down"),
        (SlurmError("no such cluster"), 2, "error: site.toml: slurm: Slurm does not answer"),
    ],
)
def test_a_slurm_that_does_not_answer_is_not_taken_for_one_that_agrees(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, error: SlurmError, code: int, said: str
) -> None:
    def fail(words: str, answer: str) -> str:
        raise error

    queue = Recorded(answers=answers.of("24.11"), change=fail)
    monkeypatch.setattr(clusters, "chosen", lambda site: queue)
    done = desk.check(GOOD)
    assert done.returncode == code
    assert said in done.stdout + done.stderr
    assert done.stdout.startswith("site.toml, not compared with Slurm\n")


def test_without_slurm_the_file_alone_is_checked(laptop: Desk) -> None:
    done = laptop.check(GOOD)
    assert (done.returncode, done.stderr) == (0, "")
    alone, not_compared = done.stdout.splitlines()
    assert alone == "site.toml: no fault in the file itself"
    assert not_compared.startswith("not compared: Slurm is not at hand")


def test_without_a_file_it_says_how_to_begin(laptop: Desk) -> None:
    done = laptop.check("")
    assert (done.returncode, done.stdout) == (2, "")
    assert "cp configs/site.example.toml site.toml" in done.stderr


def test_from_a_laptop_the_cluster_checks_it_once_the_file_is_right(
    laptop: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def carry_out(site: SimpleNamespace, words: list[str]) -> int:
        asked.append(words)
        if site.ssh.host == "gone":
            raise UserError("gone: cannot be reached")
        return 2

    monkeypatch.setattr(calls, "carry_out", carry_out)
    host = '[ssh]\nhost = "login"\n'
    assert laptop.check(GOOD + host).returncode == 2
    assert asked == [["check-site"]]
    # The path is the cluster's, and is not looked for here.
    assert laptop.check(GOOD + 'runs = "/no/such"\n' + host).stderr == ""
    asked.clear()
    assert "'ssh.hots' is not a setting" in laptop.check(GOOD + host + "hots = 1").stderr
    assert (
        "ssh.config: /no/such is not a file"
        in laptop.check(GOOD + host + 'config = "/no/such"').stderr
    )
    assert asked == []
    gone = laptop.check(GOOD + '[ssh]\nhost = "gone"')
    assert gone.returncode == 2
    assert gone.stderr.endswith("it was not compared with Slurm: gone: cannot be reached\n")
    # There, it does not look for yet another machine.
    assert "no sbatch on the PATH" in laptop.check(GOOD + host, **{ARRIVED: "1"}).stdout
