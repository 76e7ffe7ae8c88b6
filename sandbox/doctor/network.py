"""What goes wrong before the first collective: names, interfaces, ports, half an environment.

`host` is the node where a job of several nodes will meet, or None: then only this machine matters.
"""

import socket
from collections.abc import Mapping

from sandbox.doctor.finding import Finding
from sandbox.runtime.network import interface_towards, interfaces, loopback

__all__ = ["environment", "first_node", "gloo", "host_name", "outward", "port"]

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def host_name(host: str | None) -> Finding:
    """The machine's own name: torchrun tells it to the other nodes, and gloo listens at its address."""
    name, what = socket.gethostname(), "host name"
    mend = f"Write `{outward()} {name}` into /etc/hosts, or give torchrun --local-addr {outward()}."
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        return Finding(what, name, f"This machine's name, {name}, does not resolve ({error}). {mend}")
    if loopback(address):
        if host is None:
            return Finding(what, f"{name} is {address}: enough for this machine, not for several")
        wrong = f"This machine's name, {name}, resolves to {address}: the other nodes would look for it on themselves."
        return Finding(what, f"{name} is {address}", f"{wrong} {mend}")
    if address not in (known := interfaces()).values() and known:
        wrong = f"This machine's name, {name}, resolves to {address}, which is none of its addresses."
        return Finding(what, f"{name} is {address}", f"{wrong} {mend}")
    return Finding(what, f"{name} is {address}")


def gloo(variables: Mapping[str, str], host: str | None) -> Finding:
    """Where gloo will listen."""
    named = variables.get("GLOO_SOCKET_IFNAME")
    if not named:
        return Finding("gloo", "listens towards the first rank")
    known = interfaces()
    absent = [name for name in named.split(",") if known and name not in known]
    wrong = ""
    if absent:
        wrong = f"GLOO_SOCKET_IFNAME={named}: there is no interface {absent[0]} with an address. "
        wrong += f"There are: {', '.join(known)}. Unset it, or name one of them."
    elif host and any(loopback(known.get(name, "")) for name in named.split(",")):
        wrong = f"GLOO_SOCKET_IFNAME={named} has gloo listen where no other node can come. "
        wrong += f"Unset it, or name the interface that leads to {host}: {interface_towards(host) or 'none does'}."
    return Finding("gloo", f"GLOO_SOCKET_IFNAME={named}", wrong)


def port(number: int) -> Finding:
    """Whether a rendezvous can listen there."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that just closed is no obstacle
        try:
            probe.bind(("", number))
            probe.listen()
        except OSError as error:
            wrong = f"Port {number} cannot be listened at ({error.strerror}): another job may have it, see `ss -ltnp`. "
            return Finding("port", str(number), f"{wrong}Give torchrun another: --rdzv-endpoint HOST:PORT.")
    return Finding("port", f"{number} is free")


def first_node(host: str) -> Finding:
    """The way to the node where the others meet it."""
    if not host:
        return Finding("first node", "''", "--host is empty. Give the name of the node where the others meet it.")
    try:
        address = socket.gethostbyname(host)
    except (OSError, UnicodeError) as error:  # the latter: no name at all, such as one with an empty label
        wrong = f"{host} does not resolve on this machine ({error}). Write its address into /etc/hosts, or use that."
        return Finding("first node", host, wrong)
    found = f"{host} is {address}"
    if loopback(address):
        wrong = f"{host} resolves to {address} on this machine, which would look for the rendezvous on itself. "
        return Finding("first node", found, f"{wrong}Give the address that other nodes reach it by.")
    if (interface := interface_towards(host)) is None and interfaces():
        return Finding("first node", found, f"No interface of this machine leads to {host} ({address}).")
    return Finding("first node", f"{found}, by {interface}")


def environment(variables: Mapping[str, str]) -> Finding | None:
    """Half of torchrun's variables: a rank would then take itself for a launcher."""
    there = [name for name in TORCHRUN if name in variables]
    if not there or len(there) == len(TORCHRUN):
        return None
    absent = ", ".join(name for name in TORCHRUN if name not in variables)
    return Finding("environment", ", ".join(there), f"{', '.join(there)} set, but not {absent}. Set all, or none.")


def outward() -> str:
    """An address of this machine that others may reach."""
    return next((address for address in interfaces().values() if not loopback(address)), "127.0.0.1")
