"""Where the processes of an attempt meet: the first node's address and a free port on it.

The processes could only guess the address: each would use its own. The host's name service and
Slurm are asked outside, as a container may know less; their answers are evaluated here.
"""

from __future__ import annotations

import re

from runfolder.errors import UserError
from runfolder.ports import free_port

LOOK = "check network.interface and network.address_suffix in site.toml"


def meeting_point(
    *,
    of_interface: str | None,
    by_name: str,
    by_slurm: str,
    job_id: int,
    restarts: int,
    num_nodes: int,
) -> tuple[str, int]:
    """Return the address and the port at which the processes meet.

    `of_interface` is the output of `ip -oneline address show dev`, None if the site sets no
    interface; `by_name` and `by_slurm` are the outputs of `getent ahostsv4` for the node's name
    and for the address that Slurm has for it.

    Raises:
        UserError: the node has no address that others could reach, or no free port.
    """
    address = _address(of_interface, by_name, by_slurm, is_alone=num_nodes == 1)
    # A different one for each job, as two may share a node, and for each start: processes of the
    # previous one may still listen.
    first = job_id * 13 + restarts * 101
    return address, free_port((address, "127.0.0.1"), first=first)


def _address(of_interface: str | None, by_name: str, by_slurm: str, *, is_alone: bool) -> str:
    if of_interface is not None:
        found: list[str] = re.findall(r"\binet (\d+\.\d+\.\d+\.\d+)", of_interface)
    else:
        found = [line.split(" ")[0] for line in f"{by_name}\n{by_slurm}".splitlines()]
    for address in found:
        # A distribution may give a machine's own name a loopback address.
        if address and not address.startswith("127."):
            return address
    if is_alone and of_interface is None:
        return "127.0.0.1"
    raise UserError(f"the first node has no address that other nodes can reach; {LOOK}")
