"""refusals.py: whose words are whose; what the commands fail with is in test_slurm.py."""

from __future__ import annotations

import pytest

from cluster.slurm import refusals


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        ("Note: your quota", "Note: your quota"),
        ("sbatch: error: Note: your quota", "Note: your quota"),
        ("sbatch: lua: Note: your quota", "lua: Note: your quota"),
        ("quota: error: 90% used", "quota: error: 90% used"),
        ("error: .cluster: no cluster is up", ".cluster: no cluster is up"),
        ("slurm_update error: Invalid user id", "Invalid user id"),
        ("slurm_load_partitions: Connection refused", "Connection refused"),
        ("sacctmgr: fatal: no", "no"),
        ("sbatch: error: Batch job submission failed: Invalid account", "Invalid account"),
    ],
)
def test_only_the_name_of_a_command_is_taken_from_a_line(line: str, kept: str) -> None:
    assert refusals.sentences(f"{line}\n") == [kept]
