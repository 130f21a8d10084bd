"""comparison.py: a site.toml beside what recorded Slurms say."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.check import comparison, limits
from cluster.check.comparison import Comparison
from cluster.site.settings import PRIVATE
from tests.fast.cluster import answers
from tests.fast.cluster.answers import RELEASES, Recorded

Change = Callable[[str], str]


@pytest.fixture(autouse=True)
def ada(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "user_name", lambda: answers.USER)
    for name in ("SBATCH_ACCOUNT", "SBATCH_RESERVATION"):
        monkeypatch.delenv(name, raising=False)


def compared(release: str = "26.05", change: Change = str, **settings: Any) -> Comparison:
    slurm = replace(PRIVATE.slurm, **settings)
    site = replace(PRIVATE, slurm=slurm, source=Path("site.toml"))
    queue = Recorded(answers=answers.of(release), change=lambda _, said: change(said))
    return comparison.compare(limits.read(queue), site)


def nodes(pattern: str, new: str) -> Change:
    """Return the change of a field of every node."""
    return lambda said: re.sub(pattern, new, said) if "NodeName=" in said else said


# Two threads a core, as many sites have them.
THREADS = nodes(
    r"CPUEfctv=4 CPUTot=4(.*?)ThreadsPerCore=1", r"CPUEfctv=8 CPUTot=8\1ThreadsPerCore=2"
)
CORES = nodes("ThreadsPerCore=1", "ThreadsPerCore=2")
TYPES = nodes(r"Gres=gpu:2", "Gres=gpu:a100:2")


@pytest.mark.parametrize("release", RELEASES)
def test_the_right_file_agrees_with_each_release(release: str) -> None:
    found = compared(release, account="research", qos="short", memory_per_node_mb=8000)
    assert (found.faults, found.notes, found.not_compared) == ([], [], [])
    assert found.rows == [
        ("slurm.partition", "gpu", "UP, 2 nodes"),
        ("slurm.account", "research", "research"),
        ("slurm.qos", "short", "normal, short, urgent"),
        ("slurm.save_s", "20", "a job may take 1-00:00:00"),
        ("slurm.gpu_type", "(any)", "no types"),
        ("slurm.gpus_per_node", "2", "2 on 2 nodes"),
        ("slurm.cpus_per_node", "4", "4 on 2 nodes"),
        ("slurm.memory_per_node_mb", "8000", "8000 on 2 nodes"),
    ]


@pytest.mark.parametrize(
    ("settings", "change", "setting", "write"),
    [
        ({"partition": "gpus"}, str, "slurm.partition 'gpus'", "did you mean 'gpu'?"),
        ({"partition": "down"}, str, "slurm.partition 'down'", "choose another, or ask the site"),
        ({"account": "physics"}, str, "slurm.account", 'write slurm.account = "research"'),
        ({"qos": "long"}, str, "slurm.qos", 'write slurm.qos = "normal"'),
        ({"cpus_per_node": 5}, str, "slurm.cpus_per_node", "write slurm.cpus_per_node = 4"),
        ({"cpus_per_node": 8}, CORES, "slurm.cpus_per_node", "write slurm.cpus_per_node = 4"),
        ({"gpus_per_node": 4}, str, "slurm.gpus_per_node", "write slurm.gpus_per_node = 2"),
        ({"gpu_type": "a100"}, str, "slurm.gpu_type", 'write slurm.gpu_type = ""'),
        ({"gpu_type": "A100"}, TYPES, "slurm.gpu_type", 'write slurm.gpu_type = "a100"'),
        (
            {"memory_per_node_mb": 8001},
            str,
            "slurm.memory_per_node_mb",
            "write slurm.memory_per_node_mb = 8000",
        ),
        # A job of a day at most has half of it to save.
        ({"save_s": 43201}, str, "slurm.save_s", "write slurm.save_s = 43200"),
        (
            {},
            lambda said: said.replace("MaxTime=1-00:00:00", "MaxTime=00:01:10"),
            "slurm.save_s",
            "write slurm.save_s = 10",
        ),
        ({"sbatch_flags": ["--constraint=ib"]}, str, "slurm.sbatch_flags", "features: none"),
        (
            {},
            lambda said: said.replace("MaxCPUsPerNode=UNLIMITED", "MaxCPUsPerNode=3"),
            "slurm.cpus_per_node",
            "write slurm.cpus_per_node = 3",
        ),
    ],
)
def test_a_difference_says_the_setting_and_what_to_write(
    settings: dict[str, Any], change: Change, setting: str, write: str
) -> None:
    (fault,) = compared(change=change, **settings).faults
    assert fault.startswith(f"site.toml: {setting}"), fault
    assert fault.endswith(write), fault


def test_what_is_not_used_of_a_node_is_a_note_and_no_fault() -> None:
    found = compared(cpus_per_node=3, gpus_per_node=0, memory_per_node_mb=4000)
    assert found.faults == []
    assert [note.partition(":")[0] for note in found.notes] == [
        "slurm.gpus_per_node",
        "slurm.cpus_per_node",
        "slurm.memory_per_node_mb",
    ]


def test_it_says_whether_slurm_counts_cores_or_their_threads() -> None:
    half = compared(change=THREADS)
    assert half.faults == []
    (note,) = half.notes
    assert "8 CPUs of each node (hardware threads: node1 has 4 cores with 2 threads" in note
    assert note.endswith("write slurm.cpus_per_node = 8")
    assert compared(change=THREADS, cpus_per_node=8).notes == []
    rows = {setting: said for setting, _, said in compared(change=CORES).rows}
    assert rows["slurm.cpus_per_node"].startswith("4 on 2 nodes (cores: node1 has 4 cores with 2")


def test_of_nodes_that_differ_one_must_have_all_at_once() -> None:
    def differ(said: str) -> str:
        lines = said.split("\n")
        if not said.startswith("NodeName="):
            return said
        lines[1] = re.sub("CPU(Efctv|Tot)=4", r"CPU\1=16", lines[1]).replace("gpu:2", "gpu:1")
        return "\n".join(lines)

    (note,) = compared(change=differ).notes
    assert note == "only 1 of 2 nodes have all of this: node1"
    (fault,) = compared(change=differ, cpus_per_node=16).faults
    assert fault.endswith("write what node1 has: slurm.gpus_per_node = 2, slurm.cpus_per_node = 4")


def test_of_several_partitions_one_that_is_right_will_do() -> None:
    found = compared(partition="gpu,down")
    assert found.faults == []
    assert [note for note in found.notes if "slurm.partition 'down': is DOWN" in note]
    (fault,) = compared(partition="gpu,nothing").faults
    assert "slurm.partition 'nothing': there is no such partition" in fault


@pytest.mark.parametrize(
    ("change", "begins"),
    [
        (lambda said: "" if "|" in said else said, "slurm.qos: "),
        (lambda said: "" if said.startswith("NodeName=") else said, "CPUs, GPUs and memory of a"),
        (lambda said: said.replace("TotalNodes=2", "TotalNodes=3"), "CPUs, GPUs and memory of a"),
        (lambda said: said.replace("associations,limits,qos", "none"), "slurm.account, slurm.qos"),
        (lambda said: said.replace("MaxTime=", "Max="), "MaxTime of partition gpu"),
    ],
)
def test_what_slurm_does_not_show_is_said_and_is_no_fault(change: Change, begins: str) -> None:
    found = compared(change=change)
    assert found.faults == []
    (said,) = found.not_compared
    assert said.startswith(begins)
