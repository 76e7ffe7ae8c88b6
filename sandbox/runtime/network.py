"""Which of this machine's network interfaces leads where. Importing it is cheap."""

import contextlib
import socket
import struct

__all__ = ["interface_towards", "interfaces", "loopback"]

_SIOCGIFADDR = 0x8915  # of Linux: the IPv4 address of an interface


def interfaces() -> dict[str, str]:
    """Interface -> its IPv4 address, of those that have one. Empty where the system has no such question."""
    found = {}
    with contextlib.suppress(ImportError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        from fcntl import ioctl

        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                answer = ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()))
                found[name] = socket.inet_ntoa(answer[20:24])
    return found


def interface_towards(host: str, port: int = 1) -> str | None:
    """The interface by which this machine reaches `host`; of several machines, its peers reach it there.

    For one of the machine's own addresses it is the interface that has it. None: no such host, or no way to it.
    """
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, port))  # of a datagram socket: only looks up the way, sends nothing
            mine = probe.getsockname()[0]
    except (OSError, UnicodeError):  # the latter: it cannot be the name of a host
        return None
    return next((name for name, address in interfaces().items() if address == mine), None)


def loopback(address: str) -> bool:
    """Whether only this machine can reach the IPv4 `address`, which for others would be themselves."""
    return address.startswith("127.") or address == "0.0.0.0"
