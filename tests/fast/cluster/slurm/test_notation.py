"""notation.py: records of Slurm; its times are in test_request.py."""

from __future__ import annotations

from cluster.slurm import notation


def test_the_first_of_a_key_counts() -> None:
    line = "NodeName=n1 OS=Linux 6.1 #1 SMP State=DOWN Reason=bad State=IDLE [root@today]"
    fields = notation.fields_of(line)
    assert (fields["OS"], fields["State"], fields["Reason"]) == ("Linux 6.1 #1 SMP", "DOWN", "bad")
