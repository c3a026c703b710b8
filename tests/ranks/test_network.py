"""Which interface is chosen, from what launchers say; on hosts of their own in `test_starting.py`."""

from __future__ import annotations

import socket

import psutil
import pytest

from pretrain.errors import ConfigError, PeerError
from pretrain.ranks import network
from pretrain.ranks.network import Route, find_route, interface_variables, route_to, spans_nodes

RANKS = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "node1"}
ETH = Route("eth0", "10.0.0.2", is_own=False)
LO = Route("lo", "127.0.0.1", is_own=True)


class Store(dict):
    def set(self, key: str, value: str) -> None:
        self[key] = value.encode()

    def get(self, key: str) -> bytes:  # type: ignore[override]
        return self[key]


def test_the_loopback_interface_leads_to_this_node():
    for address in ("127.0.0.1", "localhost", "127.0.1.1"):
        route = route_to(address)
        assert route.is_loopback and route.is_own and route.interface in psutil.net_if_addrs()


def test_this_nodes_other_addresses_are_its_own():
    for name, addresses in psutil.net_if_addrs().items():
        for one in addresses:
            if one.family == socket.AF_INET and not one.address.startswith("127."):
                assert route_to(one.address) == Route(name, one.address, is_own=True)


@pytest.mark.parametrize(
    ("environment", "spans"),
    [
        ({"LOCAL_WORLD_SIZE": "4"}, False),
        ({"LOCAL_WORLD_SIZE": "2", "SLURM_STEP_NUM_NODES": "1"}, True),  # torchrun in a step of one task
        ({"LOCAL_SIZE": "4", "SLURM_STEP_NUM_NODES": "2"}, False),  # deepspeed on one node of an allocation
        ({"SLURM_STEP_NUM_NODES": "2"}, True),
        ({"SLURM_STEP_NUM_NODES": "1"}, False),
        ({}, True),  # rank 3 is 1 on its node: there is another one
    ],
    ids=str,
)
def test_other_nodes_are_known_from_what_the_launcher_says(environment, spans):
    assert spans_nodes(RANKS, environment) is spans


@pytest.mark.parametrize("environment", [{"LOCAL_WORLD_SIZE": "4"}, {"LOCAL_WORLD_SIZE": "1"}, {}], ids=str)
@pytest.mark.parametrize("rank", ["0", "3"])
def test_a_name_that_is_not_known_is_said_on_every_rank(monkeypatch: pytest.MonkeyPatch, rank, environment):
    monkeypatch.setattr(network, "RESOLVE_SECONDS", 0.0)
    monkeypatch.setattr("platform.node", lambda: "node2")
    ranks = RANKS | {"RANK": rank, "LOCAL_RANK": "0", "MASTER_ADDR": "no-such-host.invalid"}
    with pytest.raises(PeerError, match=r"launch: MASTER_ADDR is no-such-host.invalid, which node2 does not know \("):
        find_route(ranks, environment)
    assert find_route(ranks | {"RANK": "0", "WORLD_SIZE": "1"}, {}).is_loopback  # nobody is to be met


def test_on_one_node_it_is_the_loopback_interface_whatever_the_hosts_name_means(monkeypatch: pytest.MonkeyPatch):
    routes = {"node1": ETH, "127.0.0.1": route_to("127.0.0.1")}
    monkeypatch.setattr(network, "route_to", routes.__getitem__)
    route = find_route(RANKS, {"LOCAL_WORLD_SIZE": "4"})
    assert route.is_loopback
    assert interface_variables(route, RANKS, {"LOCAL_WORLD_SIZE": "4"}, Store()) == {
        "GLOO_SOCKET_IFNAME": route.interface, "NCCL_SOCKET_IFNAME": f"={route.interface}",
    }  # fmt: skip


def test_what_the_user_has_set_stays_and_nccl_follows_gloo():
    store = Store()
    both = {"GLOO_SOCKET_IFNAME": "ib0", "NCCL_SOCKET_IFNAME": "ib"}
    assert interface_variables(ETH, RANKS, both, store) == {}
    assert interface_variables(LO, RANKS, {"GLOO_SOCKET_IFNAME": "ib0"}, Store()) == {"NCCL_SOCKET_IFNAME": "=ib0"}
    assert interface_variables(ETH, RANKS, {"NCCL_SOCKET_IFNAME": "ib"}, store) == {"GLOO_SOCKET_IFNAME": "eth0"}
    assert list(store.values()) == [b"10.0.0.2"]  # which rank 0's node may ask for


def test_rank_0s_node_asks_for_another_nodes_address(monkeypatch: pytest.MonkeyPatch):
    store = Store()
    interface_variables(ETH, RANKS, {}, store)
    monkeypatch.setattr(network, "route_to", {"10.0.0.2": Route("eth5", "10.0.0.1", is_own=False)}.__getitem__)
    chosen = interface_variables(LO, RANKS | {"RANK": "0", "LOCAL_RANK": "0"}, {"LOCAL_SIZE": "2"}, store)
    assert chosen == {"GLOO_SOCKET_IFNAME": "eth5", "NCCL_SOCKET_IFNAME": "=eth5"}


@pytest.mark.parametrize("environment", [{}, {"SLURM_NODEID": "1"}, {"CROSS_RANK": "1"}], ids=str)
def test_another_node_that_means_itself_is_named(monkeypatch: pytest.MonkeyPatch, environment):
    monkeypatch.setattr(network, "route_to", lambda _: LO)
    monkeypatch.setattr("platform.node", lambda: "node2")
    with pytest.raises(
        ConfigError, match=r"launch: MASTER_ADDR is node1, by which node2 means itself; expected an add"
    ):
        find_route(RANKS, environment)
    assert find_route(RANKS, {"SLURM_NODEID": "0"}) == LO  # the name is its own
    assert find_route(RANKS, environment | {"TORCHELASTIC_RUN_ID": "1"}) == LO  # torchrun has met there


def test_an_interface_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match=r"environment: GLOO_SOCKET_IFNAME is ib7, which \S+ does not have; expected"):
        find_route(RANKS, {"LOCAL_WORLD_SIZE": "4", "GLOO_SOCKET_IFNAME": "lo,ib7"})
