"""The network interface that the ranks of several nodes meet over: the one that leads to the others.

By themselves gloo takes the interface of the address that the host's name stands for, often 127.0.1.1, and NCCL the
first one that is neither loopback nor Docker's. Where that is wrong, ranks wait for each other until the time is over.
"""

from __future__ import annotations

import ipaddress
import platform
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import psutil

from pretrain.errors import ConfigError, PeerError

GLOO, NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"
RESOLVE_SECONDS = 60.0  # the name of a node that has just been given to a job may take a while to be known
_ADDRESS_KEY = "longhaul/address"
_SET_IT = (
    "Give an address of rank 0's node that all nodes reach: deepspeed --master_addr, torchrun --rdzv-endpoint, or "
    "MASTER_ADDR"
)


class Store(Protocol):
    """What all ranks read and write: torch's, by which they meet."""

    def set(self, key: str, value: str) -> None:
        """Write a value."""

    def get(self, key: str) -> bytes:
        """Return a value, once it is there."""


@dataclass(frozen=True)
class Route:
    """How this node reaches another one.

    Attributes:
        interface: by which.
        address: of this node there.
        is_own: the address that is reached is this node's own.
    """

    interface: str
    address: str
    is_own: bool

    @property
    def is_loopback(self) -> bool:
        """Whether nothing but this node is reached that way."""
        return ipaddress.ip_address(self.address).is_loopback


def route_to(host: str) -> Route:
    """Find out how the system would send to a host; nothing is sent.

    Args:
        host: name or address.
    Raises:
        OSError: the name is not known (`socket.gaierror`), or no route leads there.
    """
    problem: OSError = OSError(f"{host} has no address")
    for family, kind, protocol, _, address in socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM):
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.connect(address)  # of a datagram socket: only chooses the route
            except OSError as error:
                problem = error
                continue
            own, other = (str(end[0]).partition("%")[0] for end in (probe.getsockname(), address))
        for name, known in psutil.net_if_addrs().items():
            if any(one.address.partition("%")[0] == own for one in known):
                return Route(name, own, is_own=own == other or ipaddress.ip_address(own).is_loopback)
    raise problem


def spans_nodes(ranks: Mapping[str, str], environment: Mapping[str, str]) -> bool:
    """Tell whether there are ranks on other nodes, as far as the launcher says."""
    on_this_node = environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE")
    if on_this_node:
        return int(on_this_node) < int(ranks["WORLD_SIZE"])
    if nodes := environment.get("SLURM_STEP_NUM_NODES"):
        return int(nodes) > 1
    return ranks["RANK"] != ranks["LOCAL_RANK"]


def find_route(ranks: Mapping[str, str], environment: Mapping[str, str]) -> Route:
    """Return how this node reaches rank 0's, or its own loopback interface if there is no other node.

    Args:
        ranks: RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR.
        environment: the process's environment variables.
    Raises:
        ConfigError: MASTER_ADDR means another node to every node, or GLOO_SOCKET_IFNAME is not an interface.
        PeerError: MASTER_ADDR is not known, or cannot be reached, from here.
    """
    known = psutil.net_if_addrs()
    given = [name for name in environment.get(GLOO, "").split(",") if name]
    for name in given:
        if name not in known:
            raise ConfigError(
                f"environment: {GLOO} is {name}, which {platform.node()} does not have; expected one of "
                f"{', '.join(known)}. Unset it, and the interface that leads to rank 0 is taken on each node."
            )
    master = ranks["MASTER_ADDR"]
    if ranks["WORLD_SIZE"] == "1":
        return route_to("127.0.0.1")
    route = _resolve(master)  # on one node too: there rank 0 would wait for ever to reach what it serves itself
    if not spans_nodes(ranks, environment):
        return route_to("127.0.0.1")
    means_loopback = [name for name in given if any(_is_loopback(one.address) for one in known[name])]
    if route.is_own and not means_loopback and not _may_be_own(master, ranks, environment):
        raise ConfigError(
            f"launch: MASTER_ADDR is {master}, by which {platform.node()} means itself; expected an address of rank "
            f"0's node. {_SET_IT}; if a name is meant, mend /etc/hosts on {platform.node()}."
        )
    return route


def _resolve(master: str) -> Route:
    give_up = time.monotonic() + RESOLVE_SECONDS
    while True:
        try:
            return route_to(master)
        except OSError as error:
            if time.monotonic() > give_up:
                reason = "does not know" if isinstance(error, socket.gaierror) else "does not reach"
                raise PeerError(
                    f"launch: MASTER_ADDR is {master}, which {platform.node()} {reason} ({error.strerror or error}); "
                    f"expected rank 0's node. {_SET_IT}."
                ) from None
        time.sleep(min(1.0, RESOLVE_SECONDS / 10))


def _may_be_own(master: str, ranks: Mapping[str, str], environment: Mapping[str, str]) -> bool:
    """Whether MASTER_ADDR, where there are several nodes, may mean this one."""
    if _is_loopback(master) or master == "localhost":
        return False
    if "TORCHELASTIC_RUN_ID" in environment:  # its agents have met there already, on whichever node it is
        return True
    number = next((environment[name] for name in ("CROSS_RANK", "SLURM_NODEID") if name in environment), None)
    return number == "0" if number is not None else ranks["RANK"] == ranks["LOCAL_RANK"]


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(socket.inet_ntoa(socket.inet_aton(address))).is_loopback
    except OSError:  # no IPv4 address
        return address == "::1"


def interface_variables(
    route: Route, ranks: Mapping[str, str], environment: Mapping[str, str], store: Store
) -> dict[str, str]:
    """Return GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, without those that the user has set; NCCL's follows gloo's.

    On rank 0's node its own name may stand for a loopback address: there it is the interface by which another node,
    which has written its address into the store, is reached.

    Args:
        route: what `find_route` returned.
        ranks, environment: as there.
        store: of all ranks.
    Raises:
        PeerError: the other node's address cannot be reached.
    """
    given = environment.get(GLOO, "").partition(",")[0]
    if spans_nodes(ranks, environment):
        if not route.is_loopback:
            store.set(_ADDRESS_KEY, route.address)
        elif not given:
            route = _resolve(store.get(_ADDRESS_KEY).decode())
    interface = given or route.interface
    # NCCL takes a name for the beginning of names; "=" has it take the very one.
    return {name: value for name, value in ((GLOO, interface), (NCCL, f"={interface}")) if not environment.get(name)}
