"""Runs on several nodes as docs/clusters.md starts them: hosts of their own, with ssh, a name that is 127.0.1.1, and docker0."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.fork_server import ForkServer
from tests.helpers.hosts import Hosts, require
from tests.helpers.rank_helpers import losses, metric_lines

pytestmark = [pytest.mark.slow, pytest.mark.launches, pytest.mark.timeout(600)]
BIN = Path(sys.executable).parent
SIZES = ["train.micro_batch_size=4", "train.num_steps=12", "checkpoint={every_steps: 3, keep_last: 9}"]


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    require("ssh", "sshd", "pdsh")
    with Hosts(2) as hosts:
        hosts.start_ssh()
        yield hosts


@pytest.fixture(scope="module")
def expected(fork_server: ForkServer, tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of the same run on two ranks of one machine."""
    folder = tmp_path_factory.mktemp("starting")
    ranks = fork_server.start([tiny_config, f"run.dir={folder}/run", *SIZES], 2, folder / "log")
    assert ranks.wait(120) == [0, 0], ranks.log()
    return losses(folder / "run")


def wait_until(condition: Callable[[], object], seconds: float, *logs: Path) -> None:
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, "".join(f"== {log}\n{log.read_text()[-4000:]}" for log in logs)
        time.sleep(0.02)


def last_start(run: Path) -> dict:
    return json.loads((run / "environment.json").read_text())["starts"][-1]


def test_deepspeed_with_a_host_file_over_ssh(hosts: Hosts, tiny_config: Path, tmp_path: Path, expected: list[float]):
    run, hostfile, log = tmp_path / "run", tmp_path / "hosts.txt", tmp_path / "log"
    hostfile.write_text("".join(f"{name} slots=1\n" for name in hosts.names))
    launcher = hosts.start(0, BIN / "deepspeed", "--hostfile", hostfile, "--master_addr", "node1",
                           "launch/pretrain.py", tiny_config, f"run.dir={run}", *SIZES, log=log)  # fmt: skip
    wait_until(lambda: launcher.poll() is not None, 240, log)
    assert launcher.returncode == 0, log.read_text()
    assert losses(run) == expected
    start = last_start(run)
    assert (start["world_size"], start["ranks_of_nodes"]) == (2, {"node1": 1, "node2": 1})
    assert start["interfaces"] == ["eth0"] and start["all_reduce_bytes_per_second"] > 0
    assert [link["hosts"] for link in start["slowest_links"]] == [["node1", "node2"]]
    (said,) = [line["message"] for line in metric_lines(run) if line.get("event") == "network"]
    assert said.startswith("2 ranks on 2 nodes, eth0: all-reduce ")


def test_torchrun_goes_on_without_a_node_that_is_lost(hosts: Hosts, tiny_config: Path, tmp_path: Path, expected):
    run, logs = tmp_path / "run", [tmp_path / "log-1", tmp_path / "log-2"]
    command = [BIN / "torchrun", "--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d",
               "--rdzv-endpoint=node1:29400", "--rdzv-id=1", "--rdzv-conf=last_call_timeout=3",
               "launch/pretrain.py", tiny_config, f"run.dir={run}", *SIZES]  # fmt: skip
    agents = [hosts.start(host, *command, log=logs[host], TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1") for host in range(2)]
    wait_until(lambda: (run / "metrics.jsonl").exists() and len(losses(run)) >= 5, 120, *logs)
    assert last_start(run)["ranks_of_nodes"] == {"node1": 1, "node2": 1}
    hosts.kill(1)
    wait_until(lambda: agents[0].poll() is not None, 240, *logs)
    assert agents[0].returncode == 0, logs[0].read_text()
    assert last_start(run)["world_size"] == 1
    assert losses(run) == pytest.approx(expected, abs=1e-5)
    assert json.loads((run / "status.json").read_text())["status"] == "done"


def find_route(hosts: Hosts, host: int, **environment: str) -> str:
    """What a rank on a host finds, or what it says."""
    code = (
        "import os; from pretrain.ranks import network; network.RESOLVE_SECONDS = 0.5\n"
        "try: print(network.find_route(os.environ, os.environ))\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    ranks = {"RANK": str(host), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_SIZE": "1", "CROSS_RANK": str(host)}
    done = subprocess.run(hosts.command(host, sys.executable, "-c", code), capture_output=True, text=True,
                          env=hosts.environment() | ranks | environment)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("host", "variables", "found"),
    [
        (1, {"MASTER_ADDR": "node1"}, "Route(interface='eth0', address='10.112.0.2', is_own=False)"),
        (0, {"MASTER_ADDR": "10.112.0.1"}, "Route(interface='eth0', address='10.112.0.1', is_own=True)"),
        (0, {"MASTER_ADDR": "node1"}, "Route(interface='lo', address='127.0.0.1', is_own=True)"),  # asks the others
        (0, {"MASTER_ADDR": "node1", "LOCAL_SIZE": "2"}, "Route(interface='lo', address='127.0.0.1', is_own=True)"),
        (1, {"MASTER_ADDR": "127.0.0.1"}, "ConfigError launch: MASTER_ADDR is 127.0.0.1, by which node2 means itself"),
        (0, {"MASTER_ADDR": "localhost"}, "ConfigError launch: MASTER_ADDR is localhost, by which node1 means itself"),
        (1, {"MASTER_ADDR": "172.17.0.1"}, "ConfigError launch: MASTER_ADDR is 172.17.0.1, by which node2 means itself"),
        (1, {"MASTER_ADDR": "node7"}, "PeerError launch: MASTER_ADDR is node7, which node2 does not know ("),
        (1, {"MASTER_ADDR": "10.9.9.9"}, "PeerError launch: MASTER_ADDR is 10.9.9.9, which node2 does not reach (Netw"),
        (1, {"MASTER_ADDR": "node1", "GLOO_SOCKET_IFNAME": "ib7"}, "ConfigError environment: GLOO_SOCKET_IFNAME is "
            "ib7, which node2 does not have; expected one of lo, docker0, eth0"),
        (1, {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}, "Route(interface='lo', address='127.0.0.1'"),
    ],
)  # fmt: skip
def test_the_route_to_rank_0_is_found_or_the_node_is_named(hosts, host, variables, found):
    assert find_route(hosts, host, **variables).startswith(found)
