"""slurm/interface.py on this machine's loopback, and on interfaces of a namespace of our own."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from slurm.interface import interface_towards
from tests.shared import CHECKOUT


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.1.1", "::1", "localhost"])
def test_this_machine_is_reached_by_the_loopback(address: str) -> None:
    assert interface_towards(address) == "lo"


@pytest.mark.parametrize("address", ["", "not an address", "300.1.1.1", "no-such-host.invalid"])
def test_what_is_no_address_is_said_plainly(address: str) -> None:
    with pytest.raises(ValueError, match=f"'{address}' cannot be resolved here"):
        interface_towards(address)


IN_A_NAMESPACE = """
ip link set lo up
ip link add first type veth peer name second && ip link set first up && ip link set second up
ip address add 10.1.0.1/24 dev first && ip address add 10.2.0.1/24 dev second
# The route to 10.3 goes out from an address that is the second one of its interface.
ip address add 10.2.0.9/24 dev second
ip route add 10.3.0.0/16 dev second src 10.2.0.9
ip -6 address add fd01::1/64 dev first nodad
exec "$0" - <<'PYTHON'
from slurm.interface import interface_towards

for address in "10.1.0.2", "10.2.0.1", "10.3.0.1", "fd01::2", "10.9.9.9":
    try:
        print(interface_towards(address))
    except OSError as error:
        print(error)
PYTHON
"""


@pytest.mark.needs("unshare")
def test_each_address_has_its_own_interface_secondary_addresses_too() -> None:
    if shutil.which("ip") is None:
        pytest.skip("this machine has no command ip")
    unshare = ["unshare", "--map-root-user", "--net", "bash", "-euc", IN_A_NAMESPACE]
    process = subprocess.run(
        [*unshare, sys.executable],
        check=False,
        capture_output=True,
        text=True,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONPATH": str(CHECKOUT)},
    )
    lines = process.stdout.splitlines()
    assert lines[:4] == ["first", "second", "second", "first"], process.stderr
    assert "no route to 10.9.9.9" in lines[4]
