"""This machine's name, the interface that ranks would meet over, and the port that launchers take."""

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Callable, Iterator, Mapping

from pretrain.doctor.findings import Line, Request, failure, ok, refused, skipped, warning
from pretrain.errors import LonghaulError
from pretrain.ranks.network import GLOO, NCCL, Route, find_route, route_to

DEFAULT_PORT = 29500  # of deepspeed and torchrun
_ELSEWHERE = "192.0.2.1"  # an address of no machine, kept for examples (RFC 5737): the way to it is the default one
_ONE_RANK = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
_FindRoute = Callable[[str], Route]


def check(request: Request) -> Iterator[Line]:
    """Look at names, interfaces and ports; nothing is sent to another machine."""
    yield judge_name(platform.node(), route_to)
    yield judge_interface(route_to)
    yield from judge_variables(os.environ, [name for _, name in socket.if_nameindex()])
    yield judge_port(DEFAULT_PORT)


def judge_name(name: str, find: _FindRoute) -> Line:
    """Say what this machine's name stands for."""
    try:
        route = find(name)
    except OSError as error:
        return warning(
            "host name", f"{name} is not known to the resolver ({error.strerror or error}), so that other nodes cannot "
            "find rank 0 here by it", f"Add a line `<address> {name}` to /etc/hosts, or have it put into DNS.",
        )  # fmt: skip
    where = " (loopback: with several nodes the address that leads to the others is taken)" if route.is_loopback else ""
    return ok("host name", f"{name} is {route.address} on {route.interface}{where}")


def judge_interface(find: _FindRoute) -> Line:
    """Say which interface leads to other machines."""
    try:
        route = find(_ELSEWHERE)
    except OSError:
        return skipped("interface", "no route leads to other machines: one node only")
    return ok("interface", f"{route.interface} ({route.address}) leads to other machines; ranks of several nodes take "
              "the one that leads to rank 0")  # fmt: skip


def judge_variables(environment: Mapping[str, str], interfaces: list[str]) -> Iterator[Line]:
    """Say whether what the user has set names interfaces that are here."""
    if value := environment.get(GLOO):
        try:
            find_route(_ONE_RANK, environment)
            yield ok(GLOO, f"is {value}, by choice")
        except LonghaulError as error:
            yield refused(GLOO, error)
    if value := environment.get(NCCL):
        excludes, is_exact = value.startswith("^"), value.lstrip("^").startswith("=")
        names = [name for name in value.lstrip("^=").split(",") if name]
        found = [one for one in interfaces if any(one == name if is_exact else one.startswith(name) for name in names)]
        if not excludes and not found:
            yield failure(NCCL, f"is {value}, which is no interface here; expected one of {', '.join(interfaces)}",
                          "Unset it, and the interface that leads to rank 0 is taken.")  # fmt: skip
        else:
            yield ok(NCCL, f"is {value}, by choice")
    if not environment.get(GLOO) and not environment.get(NCCL):
        yield ok("variables", f"neither {GLOO} nor {NCCL} is set: both are chosen at the start")


def judge_port(port: int) -> Line:
    """Say whether ranks could meet at a port."""
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", 0))
        except OSError as error:
            return failure("port", f"no port can be had ({error})", "Look at net.ipv4.ip_local_port_range and at who "
                           "holds so many connections (ss -s).")  # fmt: skip
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            return warning("port", f"{port}, the launchers' own, is taken ({error.strerror})",
                           "Give another: deepspeed --master_port, torchrun --master-port.")  # fmt: skip
    return ok("port", f"{port}, the launchers' own, is free")
