"""What is compared and measured before a run on several ranks begins, with ranks one of which differs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from pretrain.options.settings import load_config
from pretrain.ranks.link_speeds import Link, LinkSpeeds, rounds
from pretrain.training.preflight import common_value, difference, missing_space, source_hashes
from tests.helpers.fork_server import ForkServer
from tests.helpers.hosts import Hosts, require
from tests.helpers.rank_helpers import metric_lines, run_cases

SIZES = ["train.global_batch_size=6", "train.micro_batch_size=2", "train.num_steps=4"]


def test_a_difference_names_the_odd_node_and_its_ranks():
    hosts = [f"node{rank // 8:02}" for rank in range(64)]
    values = ["2.11.0" if host == "node07" else "2.12.1" for host in hosts]
    assert difference("torch", values, hosts) == (
        "torch is 2.11.0 on node07 (ranks 56-63); expected 2.12.1, as on 7 other nodes"
    )
    values[3] = values[9] = "2.13.0"
    assert difference("torch", values, hosts) == (
        "torch is 2.13.0 on node00 (rank 3), node01 (rank 9) and 2.11.0 on node07 (ranks 56-63); expected 2.12.1, as on "
        "5 other nodes"
    )
    assert difference("torch", ["1"] * 64, hosts) == ""


def test_of_two_nodes_that_differ_the_first_is_right():
    assert common_value(["b", "a"]) == "b"
    assert difference("code", ["b", "a"], ["x", "y"]) == "code is a on y (rank 1); expected b, as on 1 other node"
    assert difference("code", ["b", "a", "b"], ["x"] * 3) == "code is a on x (rank 1); expected b, as on 2 ranks"


def test_very_many_odd_nodes_are_not_all_named():
    hosts = [f"n{rank}" for rank in range(1000)]
    text = difference("NCCL", ["2.29.3" if rank % 3 else "2.30.1" for rank in range(1000)], hosts)
    assert text.startswith(
        "NCCL is 2.30.1 on n0 (rank 0), n3 (rank 3), n6 (rank 6), n9 (rank 9) and 330 more nodes; exp"
    )


def test_every_module_is_part_of_the_code():
    hashes = source_hashes()
    assert {"pretrain/training/train.py", "launch/pretrain.py", "kernels/rms_norm.py"} <= set(hashes)
    assert any(name.endswith(".json") for name in hashes) and all(len(one) == 64 for one in hashes.values())


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 5, 8, 9])
def test_each_link_of_the_ring_has_its_round_and_no_rank_two_at_once(num_ranks: int):
    found = rounds(num_ranks)
    assert sorted(link for one in found for link in one) == list(range(num_ranks if num_ranks > 2 else 1))
    for one in found:
        ends = [end for link in one for end in (link, (link + 1) % num_ranks)]
        assert len(ends) == len(set(ends))


def speeds(rates: list[float], ranks_a_node: int = 1, on_gpus: bool = True) -> LinkSpeeds:
    num = len(rates)
    hosts = [f"node{rank // ranks_a_node}" for rank in range(num)]
    return LinkSpeeds(5e9, [Link((r, (r + 1) % num), (hosts[r], hosts[(r + 1) % num]), rate * 1e9)
                            for r, rate in enumerate(rates)], on_gpus)  # fmt: skip


def test_a_slow_node_and_a_slow_link_are_named():
    assert speeds([10, 9, 11, 10, 9]).slow() == []
    (text,) = speeds([10, 4, 3, 10, 9]).slow()
    assert text == (
        "node2 is slow: its links to other nodes carry 3 to 4 GB/s, where good ones carry 10 GB/s. Look at its cable, "
        "port or interface, or leave it out"
    )
    (text,) = speeds([10, 9, 0.5, 10, 9]).slow()
    assert text == "the link between node2 (rank 2) and node3 (rank 3) carries 0.5 GB/s, where good ones carry 10 GB/s"
    assert speeds([2, 2, 9]).slow()[0].startswith("node1 is slow")  # of three nodes
    assert speeds([2, 9]).slow() == []  # of two nobody knows


def test_links_within_nodes_are_compared_with_each_other():
    assert speeds([200, 10, 210, 9, 190, 11], ranks_a_node=2).slow() == []
    assert speeds([200, 10, 60, 9, 190, 11], ranks_a_node=2, on_gpus=False).slow() == []
    (text,) = speeds([200, 10, 60, 9, 190, 11], ranks_a_node=2).slow()
    assert text.startswith(
        "the link between node1 (rank 2) and node1 (rank 3) carries 60 GB/s, where good ones within a"
    )
    shown = str(speeds([200, 10, 210, 9, 190, 11], ranks_a_node=2))
    assert shown == "all-reduce 5 GB/s, within nodes 190 to 210 GB/s, between nodes 9 to 11 GB/s"


def test_space_that_checkpoints_lack_is_said_before_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = load_config("configs/llama-7b.yaml", [f"run.dir={tmp_path}"])
    folder = tmp_path / "run/checkpoints"
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 100e9}))
    said = missing_space(config, folder)
    (needed,) = re.findall(r"has 100\.0 GB free; .* need about ([\d.]+) GB more", said)
    assert 300 < float(needed) < 330  # keep_last 3 and one more of 6.7e9 parameters x 12 bytes
    for step in range(3):
        (folder / f"step-{step:08}").mkdir(parents=True)
    assert missing_space(config, folder) == ""


@pytest.mark.launches
@pytest.mark.timeout(300)
def test_the_rank_that_differs_is_named_before_the_run_begins(tiny_config: Path, tmp_path: Path):
    cases = [
        ({"lie": "version"}, r"ConfigError: start: torch is 0\.1 on node2 \(rank 2\); expected 2\.\S+, as on 2 other nodes. "
         r"Install the same on all nodes \(make setup\)\.\nstart: deepspeed is 0\.1 on node2"),
        ({"lie": "code"}, r"ConfigError: start: code is \w{12} on node2 \(rank 2\); expected \w{12}, as on 2 other nodes "
         r"\(pretrain/optimizers/optim\.py is f{12}…, not \w{12}…\)\. Give all nodes the same files"),
        ({"lie": "", "last_overrides": ["optim.lr=2e-3"]}, r"ConfigError: start: config is \w+ on node2 \(rank 2\); .* "
         r"\(optim\.lr is 0\.002, not 0\.003\)\. Start all ranks with the same CONFIG and key=value\."),
        ({"lie": "folder"}, r"ConfigError: rank 2: start: \S+/checkpoints on node2 lacks what node0 has written there; "),
        ({"lie": "shards"}, r"DataError: start: data is f{12} on node2 \(rank 2\); expected .* \(rows of code is 7, not "),
        ({"lie": "clock"}, "done"),
        ({"lie": "slow"}, "done"),
        ({"lie": "similar"}, "done"),
    ]  # fmt: skip
    given = [case | {"overrides": [f"run.dir={tmp_path}/{n}"]} for n, (case, _) in enumerate(cases)]
    outcomes = run_cases(tiny_config, given, 3, tmp_path / "cases", overrides=SIZES)
    for outcome, (_, expected) in zip(outcomes, cases, strict=True):
        assert re.match(expected, outcome), outcome
    failed = json.loads((tmp_path / "0/status.json").read_text())
    assert (failed["status"], failed["exit_status"]) == ("failed", 2) and "torch is 0.1 on node2" in failed["reason"]
    events = {name: {line["event"]: line["message"] for line in metric_lines(tmp_path / name) if "event" in line}
              for name in ("5", "6", "7")}  # fmt: skip
    assert events["5"]["clock_skew"].startswith("the clock of node2 is 3600 s ahead of the median node's")
    assert "clock_skew" not in events["6"]
    assert events["6"]["slow_link"].startswith("node2 is slow: its links to other nodes carry ")
    assert events["6"]["network"].startswith("3 ranks on 3 nodes, lo: all-reduce ")
    assert re.match(r"numpy is 0\.1 on node2 \(rank 2\); expected [\d.]+, as on 2 other", events["7"]["uneven_nodes"])
    for name in ("5", "6", "7"):
        assert not list((tmp_path / name / "checkpoints").glob(".*"))  # nor is a sign left


@pytest.mark.slow
@pytest.mark.launches
@pytest.mark.timeout(300)
def test_a_node_with_a_slow_interface_is_named(fork_server: ForkServer, tiny_config: Path, tmp_path: Path):
    require("tc")
    with Hosts(3) as hosts:
        hosts.limit(1, "100mbit")
        enter = ("tests.fault.hangs:enter_hosts", {"namespaces": hosts.namespaces, "names": hosts.names})
        ranks = fork_server.start([tiny_config, f"run.dir={tmp_path}/run", *SIZES], 3, tmp_path / "log", [enter],
                                  MASTER_ADDR=hosts.addresses[0], LOCAL_WORLD_SIZE="1")  # fmt: skip
        assert ranks.wait(200) == [0, 0, 0], ranks.log()
    said = [line["message"] for line in metric_lines(tmp_path / "run") if line.get("event") == "slow_link"]
    (rate,) = re.findall(r"^node2 is slow: its links to other nodes carry ([\d.]+)", said[0])
    assert 0.005 < float(rate) < 0.025  # 12.5 MB/s, and what a bucket of 64 kB adds
