"""Before a run on several ranks begins: do all have the same code, config, libraries, GPUs; what do their links carry?

Every rank tells all others in one gather what it has, and all judge alike. Then they send each other messages in a
ring, and sum one over all.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import secrets
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoints.checkpoint_folder import FolderPlace
from pretrain.checkpoints.checkpoint_places import open_place
from pretrain.console import counted
from pretrain.errors import ConfigError, DataError
from pretrain.options.config import Config
from pretrain.options.config_changes import flatten
from pretrain.planning.plan_memory import checkpoint_bytes
from pretrain.ranks.distributed import Ranks
from pretrain.ranks.link_speeds import LinkSpeeds, measure_links
from pretrain.ranks.network import GLOO, NCCL
from pretrain.redaction import storable

ROOT = Path(__file__).resolve().parents[2]
CLOCK_SECONDS = 5.0  # that a node's clock may be off before it is named
SEEN_SECONDS = 10.0  # within which a file is seen by all nodes: what NFS does not find it does not look for at once
_SAME = ("torch", "deepspeed", "triton")  # must be the same; of these a difference is only said:
_SIMILAR = ("numpy", "pydantic", "safetensors", "sentencepiece", "tokenizers", "webdataset")
_FIXES = {
    "code": "Give all nodes the same files of pretrain/, kernels/ and launch/.",
    "config": "Start all ranks with the same CONFIG and key=value.",
}


@dataclass(frozen=True)
class Facts:
    """What a rank runs with.

    Attributes:
        host: name of its node.
        same: what all ranks must have alike, by name.
        similar: what had better be alike.
        interface: that it meets other ranks over.
    """

    host: str
    same: dict[str, str]
    similar: dict[str, str]
    interface: str = ""


@dataclass
class Findings:
    """What was found before the run began.

    Attributes:
        events: (event, message) of each, for the run's record.
        details: for `environment.json`.
    """

    events: list[tuple[str, str]] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    def add(self, event: str, message: str) -> None:
        """Note what was found, if it was anything."""
        if message:
            self.events.append((event, message))


def check_start(config: Config, ranks: Ranks) -> Findings:
    """Compare the ranks and measure their links, all ranks together; nothing to do for one.

    Args:
        config: of the run, as this rank has read it.
        ranks: all of them.
    Raises:
        ConfigError: ranks differ in what must be the same, or a node does not see the folder of the checkpoints.
    """
    findings = Findings()
    if ranks.world_size == 1:
        return findings
    options = {name: repr(value) for name, value in flatten(storable(config.model_dump(mode="json"))).items()}
    files = source_hashes()
    facts = ranks.gather(facts_of(ranks.device, {"config": _digest(options), "code": _digest(files)}))
    hosts = [one.host for one in facts]
    _check_same(facts, hosts, {"config": options, "code": files}, ranks)
    place = ranks.agree(lambda: open_place(config.checkpoint, Path(config.run.dir), config.data))
    if isinstance(place, FolderPlace):
        if len(set(hosts)) > 1:
            check_shared(place.folder, ranks, hosts)
        findings.add("little_space", missing_space(config, place.folder) if ranks.is_first else "")
    for name in dict.fromkeys(name for one in facts for name in one.similar):
        findings.add("uneven_nodes", difference(name, [one.similar.get(name, "absent") for one in facts], hosts))
    for text in clock_skews(ranks, hosts):
        findings.add("clock_skew", text)
    speeds = measure_links(ranks, hosts)
    interfaces = sorted({one.interface for one in facts})
    findings.add("network", describe(hosts, interfaces, speeds))
    for text in speeds.slow():
        findings.add("slow_link", text)
    findings.details = {"ranks_of_nodes": Counter(hosts), "interfaces": interfaces, **speeds.as_json()}
    return findings


def _check_same(
    facts: Sequence[Facts], hosts: Sequence[str], details: Mapping[str, Mapping[str, str]], ranks: Ranks
) -> None:
    problems = []
    for name in dict.fromkeys(name for one in facts for name in one.same):
        if found := difference(name, [one.same.get(name, "absent") for one in facts], hosts):
            if name in details:  # what of it differs is asked for now only
                found += _what_differs(ranks, details[name])
            problems.append(f"start: {found}. {_FIXES.get(name, 'Install the same on all nodes (make setup).')}")
    if problems:
        error = ConfigError("\n".join(problems))
        error.agreed = True
        raise error


def check_same_rows(plan_hash: str, pieces: Mapping[str, Any], ranks: Ranks) -> None:
    """Check that all ranks read the same rows, whatever copies of the shards they have.

    Args:
        plan_hash, pieces: of this rank's plan of the rows.
        ranks: all of them.
    Raises:
        DataError: they differ; names the odd nodes and what differs.
    """
    told = ranks.gather((platform.node(), plan_hash))
    found = difference("data", [value[:12] for _, value in told], [host for host, _ in told])
    if found:
        what = _what_differs(ranks, {name: json.dumps(value) for name, value in pieces.items()})
        error = DataError(f"start: {found}{what}. Give all nodes the same prepared shards.")
        error.agreed = True
        raise error


def facts_of(device: torch.device, hashes: Mapping[str, str]) -> Facts:
    """Return what this rank runs with, and the hashes of what else must be the same."""
    same = {**hashes, "Python": ".".join(platform.python_version_tuple()[:2]), **_versions(_SAME)}
    similar = _versions(_SIMILAR)
    name = GLOO
    if device.type == "cuda":
        name = NCCL
        found = torch.cuda.get_device_properties(device)
        same |= {"CUDA": str(torch.version.cuda), "NCCL": ".".join(map(str, torch.cuda.nccl.version()))}
        similar |= {"GPU": f"{found.name}, {found.total_memory / 2**30:.0f} GiB", "driver": _driver()}
    return Facts(platform.node(), same, similar, os.environ.get(name, "").removeprefix("="))


def _versions(packages: Sequence[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = torch.__version__ if package == "torch" else version(package)
        except PackageNotFoundError:
            continue
    return found


def _driver() -> str:
    try:
        words = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").split()
        return next((word for word in words if word[0].isdigit() and "." in word), "unknown")
    except OSError:
        return "unknown"


def source_hashes() -> dict[str, str]:
    """Return the sha256 of every source file that a run uses, by its path in the repository."""
    paths = [path for package in ("kernels", "launch", "pretrain") for path in (ROOT / package).rglob("*")]
    return {
        str(path.relative_to(ROOT)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(paths)
        if path.suffix in (".py", ".json")
    }


def difference(name: str, values: Sequence[str], hosts: Sequence[str]) -> str:
    """Say which nodes have another value than most ranks, or nothing if all have the same.

    Args:
        name: what the values are of.
        values: by rank.
        hosts: name of each rank's node.
    """
    common = common_value(values)
    others = [value for value in dict.fromkeys(values) if value != common]
    if not others:
        return ""
    parts = [f"{value} on {_where([r for r, one in enumerate(values) if one == value], hosts)}" for value in others]
    odd = {host for host, value in zip(hosts, values, strict=True) if value != common}
    num_nodes, num_ranks = len(set(hosts) - odd), values.count(common)
    rest = f"{num_nodes} other node{'s'[: num_nodes > 1]}" if num_nodes else f"{num_ranks} rank{'s'[: num_ranks > 1]}"
    return f"{name} is {' and '.join(parts)}; expected {common}, as on {rest}"


def common_value(values: Sequence[str]) -> str:
    """Return the value of most ranks; of two that are as frequent, the one of the lowest rank."""
    return Counter(values).most_common(1)[0][0]


def _where(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """Nodes and their ranks: `node07 (ranks 56-63)`."""
    by_host: dict[str, list[int]] = {}
    for rank in ranks:
        by_host.setdefault(hosts[rank], []).append(rank)
    texts = []
    for host, own in list(by_host.items())[:4]:
        is_run = own == list(range(own[0], own[-1] + 1))
        numbers = f"{own[0]}-{own[-1]}" if is_run and len(own) > 2 else ", ".join(map(str, own))
        texts.append(f"{host} (rank{'s'[: len(own) > 1]} {numbers})")
    more = f" and {len(by_host) - 4} more nodes" if len(by_host) > 4 else ""
    return ", ".join(texts) + more


def _what_differs(ranks: Ranks, own: Mapping[str, str]) -> str:
    """Name what differs in a mapping, between a rank that has the common one and the first that has not."""
    told = ranks.gather(dict(own))
    digests = [_digest(one) for one in told]
    common = told[digests.index(common_value(digests))]
    other = told[next(rank for rank, digest in enumerate(digests) if digest != common_value(digests))]
    names = [name for name in {**common, **other} if common.get(name) != other.get(name)]
    texts = [f"{name} is {_short(other.get(name))}, not {_short(common.get(name))}" for name in names[:5]]
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f" ({'; '.join(texts)}{more})"


def _short(value: str | None) -> str:
    return "absent" if value is None else value[:12] + "…" if len(value) > 60 and " " not in value else value


def _digest(mapping: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(mapping, sort_keys=True).encode()).hexdigest()[:12]


def clock_skews(ranks: Ranks, hosts: Sequence[str]) -> list[str]:
    """Name the nodes whose clock differs from the median one, as far as a barrier can tell."""
    ranks.barrier()
    times = ranks.gather(time.time())
    median = statistics.median(times)
    by_host = dict(zip(reversed(hosts), reversed(times), strict=True))  # of each node its first rank's
    off = {host: seconds - median for host, seconds in by_host.items() if abs(seconds - median) > CLOCK_SECONDS}
    return [
        f"the clock of {host} is {abs(seconds):.0f} s {'ahead of' if seconds > 0 else 'behind'} the median node's: "
        "times in its log are off, and a store may refuse its requests. Have it set by NTP"
        for host, seconds in sorted(off.items())
    ]


def check_shared(folder: Path, ranks: Ranks, hosts: Sequence[str]) -> None:
    """Check that what rank 0 writes into a folder is seen on all nodes.

    Raises:
        ConfigError: it is not, or cannot be written.
    """

    def write() -> Path:
        try:
            path = folder / f".tmp-seen-by-all-nodes-{secrets.token_hex(4)}"
            path.mkdir(parents=True)
            return path
        except OSError as error:
            raise ConfigError(
                f"start: {folder} cannot be written ({error}); expected a folder for checkpoints. Use another run.dir."
            ) from None

    def look(path: Path) -> None:
        give_up = time.monotonic() + SEEN_SECONDS
        while hosts[ranks.rank] != hosts[0] and not path.exists():
            if time.monotonic() > give_up:
                raise ConfigError(
                    f"start: {folder} on {platform.node()} lacks what {hosts[0]} has written there; expected a folder "
                    "that all nodes share. Use another run.dir, or checkpoint.dir."
                )
            time.sleep(0.5)
            if folder.exists():
                os.listdir(folder)  # has NFS look again

    path = ranks.from_first(ranks.agree(lambda: write() if ranks.is_first else None))
    try:
        ranks.agree(lambda: look(path))
    finally:
        if ranks.is_first:
            with suppress(OSError):
                path.rmdir()


def missing_space(config: Config, folder: Path) -> str:
    """Say whether the disk lacks space for the checkpoints that are kept at once, beside those that are there."""
    try:
        there = len(list(folder.glob("step-*"))) if folder.exists() else 0
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(existing).free
    except OSError as error:
        return f"{folder} does not tell how much space it has ({error})"
    needed = checkpoint_bytes(config) * max(config.checkpoint.keep_last + 1 - there, 1)
    if free >= needed:
        return ""
    return (
        f"{folder} has {free / 1e9:.1f} GB free; the checkpoints that are kept at once (checkpoint.keep_last "
        f"{config.checkpoint.keep_last}, and the one being written) need about {needed / 1e9:.1f} GB more"
    )


def describe(hosts: Sequence[str], interfaces: Sequence[str], speeds: LinkSpeeds) -> str:
    """Say in one line what the ranks meet over, and how fast."""
    return f"{counted(len(hosts), 'rank')} on {counted(len(set(hosts)), 'node')}, {', '.join(interfaces)}: {speeds}"
