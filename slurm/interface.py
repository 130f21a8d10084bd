"""The network interface by which this machine reaches an address.

Gloo and NCCL otherwise guess it from the host name, and guess wrong if a node has several.
"""

import ctypes
import ipaddress
import os
import socket


class _InterfaceAddress(ctypes.Structure):
    """One entry of the list that getifaddrs(3) makes; its later fields are not read."""


_InterfaceAddress._fields_ = [
    ("next", ctypes.POINTER(_InterfaceAddress)),
    ("name", ctypes.c_char_p),
    ("flags", ctypes.c_uint),
    ("address", ctypes.c_void_p),
]


def interface_towards(address: str) -> str:
    """Return the name of the interface by which this machine reaches `address`.

    Args:
        address: an IPv4 or IPv6 address, or a host name.

    Raises:
        ValueError: `address` is neither an address nor a known name.
        OSError: no route leads there, or no interface has the address that would be used.
    """
    local, scope = _local_address(address)
    if local.is_loopback:
        return "lo"
    for name, borne, borne_scope in _interface_addresses():
        if (borne, borne_scope) == (local, scope):
            return name
    raise OSError(f"{address} is reached from {local}, which no interface of this machine has")


def use_interface_towards(address: str, of_site: str = "") -> str:
    """Have Gloo and NCCL use the interface that leads to `address`; return its name.

    The site's setting takes precedence; variables that are already set are kept.

    Raises:
        ValueError, OSError: as `interface_towards`.
    """
    name = of_site or interface_towards(address)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    # Without the =, NCCL would use every interface whose name begins so.
    os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")
    return name


IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


def _local_address(address: str) -> tuple[IPAddress, int]:
    """Return this machine's own address towards `address`, and its scope (0: global)."""
    try:
        # Any port will do: connecting a datagram socket sends nothing, it only chooses a route.
        found = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)
    except (socket.gaierror, UnicodeError) as error:
        raise ValueError(f"{address!r} cannot be resolved here: {error}") from None
    family, kind, protocol, _, target = found[0]
    try:
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)
            own = probe.getsockname()
    except OSError as error:
        raise OSError(error.errno, f"no route to {address} ({error.strerror})") from None
    scope = own[3] if family == socket.AF_INET6 else 0
    return ipaddress.ip_address(own[0].partition("%")[0]), scope


def _interface_addresses() -> list[tuple[str, IPAddress, int]]:
    """Return (interface, address, scope) of all addresses, the secondary ones too."""
    library = ctypes.CDLL(None, use_errno=True)
    first = ctypes.POINTER(_InterfaceAddress)()
    if library.getifaddrs(ctypes.byref(first)) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    found: list[tuple[str, IPAddress, int]] = []
    try:
        entry = first
        while entry:
            name, place = entry.contents.name.decode(), entry.contents.address
            family = ctypes.c_ushort.from_address(place).value if place else 0
            # The offsets are those of sockaddr_in and sockaddr_in6, which are the kernel's.
            if family == socket.AF_INET:
                found.append((name, ipaddress.IPv4Address(ctypes.string_at(place + 4, 4)), 0))
            elif family == socket.AF_INET6:
                scope = ctypes.c_uint.from_address(place + 24).value
                borne = ipaddress.IPv6Address(ctypes.string_at(place + 8, 16))
                found.append((name, borne, scope))
            entry = entry.contents.next
    finally:
        library.freeifaddrs(first)
    return found
