"""slurm/rendezvous.py: which of the addresses that the host tells is taken, and which port."""

from __future__ import annotations

import pytest

from runfolder import ports
from runfolder.errors import UserError
from slurm.rendezvous import meeting_point

OF_IB0 = """4: ib0    inet 10.1.0.7/16 brd 10.1.255.255 scope global ib0\\       valid_lft forever
4: ib0    inet 10.1.0.8/16 scope global secondary ib0\\       valid_lft forever
"""
LOOPBACK = "127.0.1.1       STREAM node1\n127.0.1.1       DGRAM  \n"
ETHERNET = "192.168.3.4     STREAM node1.cluster\n192.168.3.4     DGRAM  \n"


@pytest.fixture(autouse=True)
def probes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Return what was asked for; nobody listens anywhere."""
    asked: list[tuple[str, int]] = []
    monkeypatch.setattr(ports, "_is_taken", lambda address, port: asked.append((address, port)))
    return asked


@pytest.mark.parametrize(
    ("of_interface", "by_name", "by_slurm", "address"),
    [
        (OF_IB0, ETHERNET, "", "10.1.0.7"),
        (None, ETHERNET, "10.9.9.9 STREAM", "192.168.3.4"),
        (None, LOOPBACK + ETHERNET, "", "192.168.3.4"),
        (None, LOOPBACK, ETHERNET, "192.168.3.4"),
        (None, "", ETHERNET, "192.168.3.4"),
    ],
)
def test_the_address_is_one_that_others_reach(
    of_interface: str | None,
    by_name: str,
    by_slurm: str,
    address: str,
    probes: list[tuple[str, int]],
) -> None:
    said = {"of_interface": of_interface, "by_name": by_name, "by_slurm": by_slurm}
    # Another port for each job and each start, and it is free on both of its addresses.
    assert meeting_point(**said, job_id=12, restarts=0, num_nodes=2) == (address, 20156)
    assert meeting_point(**said, job_id=12, restarts=1, num_nodes=2) == (address, 20257)
    assert meeting_point(**said, job_id=13, restarts=0, num_nodes=1) == (address, 20169)
    assert probes[:2] == [(address, 20156), ("127.0.0.1", 20156)]


@pytest.mark.parametrize(
    ("of_interface", "by_name", "by_slurm"),
    [("", ETHERNET, ETHERNET), ("1: lo    inet 127.0.0.1/8", ETHERNET, ""), (None, LOOPBACK, "")],
)
def test_without_one_it_is_said_where_to_look(
    of_interface: str | None, by_name: str, by_slurm: str
) -> None:
    with pytest.raises(UserError, match=r"no address that other nodes can reach; check netw"):
        meeting_point(
            of_interface=of_interface,
            by_name=by_name,
            by_slurm=by_slurm,
            job_id=1,
            restarts=0,
            num_nodes=2,
        )


def test_a_node_that_is_alone_needs_no_address() -> None:
    said = {"of_interface": None, "by_name": LOOPBACK, "by_slurm": ""}
    assert meeting_point(**said, job_id=12, restarts=0, num_nodes=1) == ("127.0.0.1", 20156)
