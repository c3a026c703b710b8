"""The checks of `longhaul doctor` one by one, each with what it finds in order, doubtful and broken."""

from __future__ import annotations

import fcntl
import os
import socket
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packaging.requirements import Requirement

from pretrain.cluster.slurm import Job, NodeGroup
from pretrain.doctor import (
    collective_check,
    compiler_check,
    deepspeed_check,
    disk_check,
    gpu_check,
    kernel_check,
    machine_check,
    network_check,
    package_check,
    remote_check,
    run_check,
    slurm_check,
)
from pretrain.doctor.findings import Line, Request
from pretrain.options.settings import load_config
from pretrain.ranks.network import Route
from tests.helpers.rank_helpers import ROOT
from tests.helpers.small_disk import small_disk


def outcomes(lines) -> dict[str, str]:
    return {line.name: line.outcome for line in lines}


def is_line(line: Line, outcome: str, *parts: str) -> bool:
    assert line.outcome == outcome and all(part in f"{line.text} → {line.mend}" for part in parts), line
    return outcome not in ("warning", "failure") or bool(line.mend)


# --- packages

NEEDED = [Requirement(text) for text in ("torch>=2.11,<2.14", "deepspeed==0.19.8", "numpy>=1.26,<3")]
RIGHT = {"torch": "2.13.0+cpu", "deepspeed": "0.19.8", "numpy": "2.4.6"}


def test_packages_within_their_ranges():
    (line,) = package_check.judge_required(NEEDED, RIGHT.get)
    assert is_line(line, "ok", "3 of 3", "torch 2.13.0+cpu, deepspeed 0.19.8, numpy 2.4.6")


def test_packages_of_a_wrong_version_or_missing_are_named_with_what_installs_them():
    lines = list(package_check.judge_required(NEEDED, {"torch": "2.10.1", "numpy": "2.4.6"}.get))
    assert outcomes(lines) == {"torch": "failure", "deepspeed": "failure", "required": "ok"}
    assert is_line(lines[0], "failure", "torch is 2.10.1; expected <2.14,>=2.11", "pip install 'torch<2.14,>=2.11'")
    assert is_line(lines[1], "failure", "deepspeed is not installed; expected ==0.19.8")
    assert is_line(lines[2], "ok", "1 of 3")


def test_python():
    assert is_line(package_check.judge_python("3.12.1", ">=3.11"), "ok", "3.12.1")
    assert is_line(package_check.judge_python("3.10.4", ">=3.11"), "failure", "3.10.4; expected >=3.11", "apt-get")


def test_extras():
    needed = [Requirement("datasketch>=2,<3"), Requirement("py3langid>=0.3,<0.5")]
    both = {"datasketch": "2.0.0", "py3langid": "0.4.0"}
    assert is_line(package_check.judge_extra("data", needed, both.get), "ok", "datasketch 2.0.0, py3langid 0.4.0")
    assert is_line(package_check.judge_extra("data", needed, {}.get), "skipped", "longhaul[data]", "near-duplicates")
    part = package_check.judge_extra("data", needed, {"datasketch": "2.0.0"}.get)
    assert is_line(part, "skipped", "in part", "py3langid is not installed", "pip install 'py3langid<0.5,>=0.3'")
    old = package_check.judge_extra("data", needed, (both | {"datasketch": "1.6"}).get)
    assert is_line(old, "warning", "datasketch is 1.6", "pip install 'datasketch<3,>=2'")


def test_every_extra_has_its_purpose(monkeypatch: pytest.MonkeyPatch):
    found: dict = {}
    monkeypatch.setattr("setuptools.setup", lambda **options: found.update(options))
    source = (ROOT / "setup.py").read_text(encoding="utf-8")
    exec(compile(source, str(ROOT / "setup.py"), "exec"), {"__file__": str(ROOT / "setup.py")})
    assert set(package_check.PURPOSES) == set(found["extras_require"])
    assert "packaging>=24" in found["install_requires"]  # which reads the ranges


def test_triton_is_torchs():
    versions = {"torch": "2.13.0", "triton": "3.7.1"}
    judge = package_check.judge_triton
    assert is_line(*judge(['triton==3.7.1; platform_system == "Linux"'], versions.get), "ok", "is the one")
    assert is_line(
        *judge(["triton==3.6.0"], versions.get), "warning", "expected ==3.6.0", "pip install 'triton==3.6.0'"
    )
    assert is_line(*judge(["numpy"], versions.get), "ok", "asks for none")


def test_this_environment_is_in_order():
    lines = list(package_check.check(Request()))
    assert not any(line.outcome == "failure" for line in lines)
    assert {"longhaul", "Python", "required", "extra data"} <= set(outcomes(lines))


# --- GPUs

LISTING = """\
0, GPU-aa, NVIDIA H100 80GB HBM3, 81559, 81000, 570.86.15, 9.0, 0, Disabled
1, GPU-bb, NVIDIA H100 80GB HBM3, 81559, 81000, 570.86.15, 9.0, 0, Disabled
"""
H100, SECOND = gpu_check.read_gpus(LISTING)
CUDA = gpu_check.Torch("2.13.0", "12.8", None, 2)


def test_gpus_are_read():
    assert H100 == gpu_check.SeenGpu(0, "GPU-aa", "NVIDIA H100 80GB HBM3", 81559, 81000, "570.86.15", 9.0, 0, False)
    (other,) = gpu_check.read_gpus("0, GPU-c, NVIDIA RTX, 24564, 20000, 570.1, [N/A], [N/A], [N/A]\nno GPU\n")
    assert (other.capability, other.ecc_errors, other.mig) == (None, None, False)
    assert gpu_check.read_gpus("") == []


@pytest.mark.parametrize(
    ("changes", "outcome", "parts"),
    [
        ({}, "ok", ["79.1 of 79.6 GiB free", "capability 9.0, bf16", "ECC: 0"]),
        ({"free_mib": 40000}, "warning", ["39.1 of 79.6 GiB free", "CUDA_VISIBLE_DEVICES"]),
        ({"ecc_errors": 3}, "failure", ["3 uncorrected errors", "nvidia-smi -r"]),
        ({"mig": True}, "warning", ["divided by MIG"]),
        ({"name": "Tesla T4", "capability": 7.5}, "warning", ["no bf16", "fp16"]),
        ({"name": "NVIDIA X1", "ecc_errors": None}, "ok", ["not in the table of GPUs", "ECC off"]),
    ],
)
def test_a_gpu(changes: dict, outcome: str, parts: list[str]):
    assert is_line(gpu_check.judge_gpu(replace(H100, **changes)), outcome, *parts)


def test_torchs_build_and_the_gpus(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    judge, seen = gpu_check.judge_torch, [H100, SECOND]
    assert is_line(judge(CUDA, seen), "ok", "2.13.0, CUDA 12.8, sees 2 of 2 GPUs")
    assert is_line(judge(gpu_check.Torch("2.13.0+cpu", None, None, 0), []), "ok", "CPU build")
    assert is_line(judge(gpu_check.Torch("2.13.0+cpu", None, None, 0), seen), "failure", "expected a CUDA build")
    blind = replace(CUDA, num_gpus=0, why="CUDA driver version is insufficient")
    assert is_line(judge(blind, seen), "failure", "sees no GPU", "is insufficient", "--gpus")


def test_driver():
    judge = gpu_check.judge_driver
    assert is_line(judge("12.8", (12, 4), "550.1"), "ok", "for CUDA up to 12.4; torch is built with 12.8")
    assert is_line(judge("13.0", (12, 8), "570.1"), "failure", "a driver for CUDA 13, or a build of torch for CUDA 12")
    assert is_line(judge(None, (12, 8), "570.1"), "skipped", "570.1")


@pytest.mark.parametrize(
    ("value", "outcome", "part"),
    [
        (None, "ok", "all GPUs are used"),
        ("1", "ok", "1 of 2 GPUs"),
        ("GPU-b,0", "ok", "2 of 2 GPUs"),
        ("", "warning", "hides all GPUs"),
        ("-1", "warning", "hides all GPUs"),
        ("0,4", "failure", "4 is no GPU of this machine"),
    ],
)
def test_visible_devices(value: str | None, outcome: str, part: str):
    assert is_line(*gpu_check.judge_visible(value, [H100, SECOND]), outcome, part)


def test_who_holds_memory():
    listing = "GPU-bb, 4711, 1024, python a,b\nGPU-x, 1, 1, another machine's\n"
    (line,) = gpu_check.judge_processes(listing, [H100, SECOND])
    assert is_line(line, "warning", "process 4711 (python a,b) holds 1.0 GiB") and line.name == "GPU 1"
    assert is_line(*gpu_check.judge_processes("", [H100]), "ok", "none")


TOPOLOGY = "\tGPU0\tGPU1\tCPU Affinity\nGPU0\t X \t{0}\t0-7\nGPU1\t{0}\t X \t0-7\n\nLegend:\n  X = Self\n"


def test_links_of_gpus():
    assert is_line(*gpu_check.judge_links(TOPOLOGY.format("NV18")), "ok", "NVLink between all 2 (NV18)")
    assert is_line(*gpu_check.judge_links(TOPOLOGY.format("SYS")), "ok", "not all by NVLink: SYS")
    assert list(gpu_check.judge_links("")) == []


def test_a_driver_that_hangs_or_is_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(gpu_check, "has_gpus", lambda: True)
    program.write_text("#!/bin/sh\necho 'Failed to initialize NVML: Driver/library version mismatch'\nexit 18\n")
    program.chmod(0o755)
    lines = list(gpu_check.check(Request()))
    assert is_line(lines[0], "failure", "version mismatch", "restart") and "torch" in outcomes(lines)
    monkeypatch.setattr(gpu_check, "answer_of", lambda *_: (124, "", "nvidia-smi did not answer in 20 s"))
    assert is_line(*gpu_check.check(Request()), "failure", "did not answer in 20 s", "its driver hangs")


@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a GPU")
def test_a_cpu_build_of_torch_on_a_machine_with_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    program = tmp_path / "nvidia-smi"
    answers = {"--query-gpu*": LISTING, "--query-compute*": "GPU-aa, 7, 2048, python\n", "topo": TOPOLOGY.format("NV4")}
    cases = "".join(f"{pattern}) cat <<'END'\n{text}END\n;;\n" for pattern, text in answers.items())
    program.write_text(f"#!/bin/sh\ncase $1 in\n{cases}esac\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    lines = list(gpu_check.check(Request()))
    names = ["torch", "CUDA_VISIBLE_DEVICES", "driver", "GPU 0", "GPU 1", "GPU 0", "links of GPUs", "instead"]
    assert [line.name for line in lines] == names
    assert [line.outcome for line in lines] == ["failure", "ok", "skipped", "ok", "ok", "warning", "ok", "ok"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a GPU")
def test_what_is_used_without_a_gpu():
    assert is_line(list(gpu_check.check(Request()))[-1], "ok", "by gloo", "cores")


# --- compiler


def test_the_compiler_works_is_missing_or_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("CC", raising=False)
    assert is_line(*compiler_check.check(Request()), "ok", "Python.h is found")
    monkeypatch.setattr(compiler_check, "has_gpus", lambda: True)
    monkeypatch.setattr(compiler_check.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert is_line(*compiler_check.check(Request()), "failure", "Python.h", "python3-dev")
    monkeypatch.setenv("CC", "/bin/false")
    assert is_line(*compiler_check.check(Request()), "failure", "/bin/false fails", "build-essential")
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert is_line(*compiler_check.check(Request()), "failure", "none is found on PATH", "build-essential")
    monkeypatch.setattr(compiler_check, "has_gpus", lambda: False)
    assert is_line(*compiler_check.check(Request()), "warning", "no GPU is here")


# --- kernels


def test_kernels_are_right_here():
    found = {
        name: kernel_check.compare(*case)
        for name, case in kernel_check.cases(torch.device("cpu"), torch.float32).items()
    }
    assert list(found) == ["attention", "RMSNorm", "LayerNorm", "SwiGLU", "loss"] and max(found.values()) <= 1


@pytest.mark.parametrize("name", ["attention", "RMSNorm", "LayerNorm", "SwiGLU", "loss"])
@pytest.mark.parametrize("fault", ["forward", "backward", "nan"])
def test_kernels_that_are_wrong_are_seen(name: str, fault: str):
    operation, truth, exact, arguments = kernel_check.cases(torch.device("cpu"), torch.float32)[name]

    def broken(*own):
        y = operation(*own)
        if fault == "forward":
            return y + 1e-4 * y.detach().abs().max()
        if fault == "backward":
            return y + 1e-4 * (y - y.detach())
        return y * float("nan")

    ratio = kernel_check.compare(broken, truth, exact, arguments)
    assert is_line(
        kernel_check.judge(name, ratio, "so"), "failure", "times the error that is allowed, so", "Do not train"
    )


def test_an_exact_kernel_is_said_to_be():
    assert is_line(kernel_check.judge("RMSNorm", 0.5, "so"), "ok", "0.50 of the error")


# --- network


def test_names_and_interfaces():
    def unknown(host: str) -> Route:
        raise socket.gaierror(-2, "Name or service not known")

    def lo(host: str) -> Route:
        return Route("lo", "127.0.1.1", True)

    def eth(host: str) -> Route:
        return Route("eth0", "10.0.0.5", True)

    assert is_line(network_check.judge_name("n1", eth), "ok", "n1 is 10.0.0.5 on eth0")
    assert is_line(network_check.judge_name("n1", lo), "ok", "127.0.1.1", "loopback")
    assert is_line(network_check.judge_name("n1", unknown), "warning", "not known", "/etc/hosts")
    assert is_line(network_check.judge_interface(eth), "ok", "eth0 (10.0.0.5) leads to other machines")
    assert is_line(network_check.judge_interface(unknown), "skipped", "one node only")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, {"variables": "ok"}),
        ({"GLOO_SOCKET_IFNAME": "lo"}, {"GLOO_SOCKET_IFNAME": "ok"}),
        ({"GLOO_SOCKET_IFNAME": "eth77"}, {"GLOO_SOCKET_IFNAME": "failure"}),
        ({"NCCL_SOCKET_IFNAME": "eth"}, {"NCCL_SOCKET_IFNAME": "ok"}),
        ({"NCCL_SOCKET_IFNAME": "^docker"}, {"NCCL_SOCKET_IFNAME": "ok"}),
        ({"NCCL_SOCKET_IFNAME": "=eth"}, {"NCCL_SOCKET_IFNAME": "failure"}),
        ({"NCCL_SOCKET_IFNAME": "ib"}, {"NCCL_SOCKET_IFNAME": "failure"}),
    ],
)
def test_interfaces_by_choice(environment: dict[str, str], expected: dict[str, str]):
    lines = list(network_check.judge_variables(environment, ["lo", "eth0"]))
    assert outcomes(lines) == expected and all(line.mend for line in lines if line.outcome == "failure")


def test_a_port_that_is_taken():
    with socket.socket() as holder:
        holder.bind(("", 0))
        holder.listen()
        port = holder.getsockname()[1]
        assert is_line(network_check.judge_port(port), "warning", f"{port}", "is taken", "--master_port")
    assert is_line(network_check.judge_port(port), "ok", "is free")


# --- collectives


@pytest.mark.launches
def test_two_ranks_meet_and_sum():
    found, said = collective_check.run_ranks(2)
    assert found is not None, said
    line = collective_check.judge("gloo", found, said, 3.0)
    assert is_line(line, "ok", "2 ranks, gloo: all-reduce ", " GB/s", "(3 s with the start)")
    assert is_line(
        collective_check.judge("gloo", found | {"is_right": False}, "", 3.0), "failure", "sums 2 ranks wrongly"
    )


@pytest.mark.launches
def test_ranks_that_do_not_meet_say_why(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth77")
    line = collective_check.judge("gloo", *collective_check.run_ranks(1), 3.0)
    assert is_line(line, "failure", "rank 0 of 1 ended with status 1", "GLOO_SOCKET_IFNAME is eth77", "firewall")


def test_ranks_that_hang_are_ended():
    found, said = collective_check.run_ranks(1, seconds=0.2)
    assert found is None and said == "rank 0 of 1 ended with no answer in 0 s: it said nothing"


# --- DeepSpeed


class Builder:
    def __init__(self, is_compatible: bool = True, problem: Exception | None = None) -> None:
        self._is_compatible, self._problem = is_compatible, problem

    def is_compatible(self, verbose: bool) -> bool:
        return self._is_compatible

    def load(self, verbose: bool) -> None:
        if self._problem:
            raise self._problem


@pytest.mark.parametrize(
    ("builder", "missing", "compiles", "outcome", "parts"),
    [
        (Builder(), [], False, "ok", ["could be built", "parallel.nvme_dir"]),
        (Builder(), [], True, "ok", ["built and loaded"]),
        (Builder(False), [], True, "skipped", ["cannot be built here", "libaio-dev"]),
        (Builder(), ["ninja"], True, "skipped", ["ninja not on PATH", "libaio-dev"]),
        (Builder(problem=RuntimeError("x\na.cpp:1: fatal error: libaio.h\ny")), [], True, "warning", ["libaio.h"]),
    ],
)
def test_operators(builder: Builder, missing: list[str], compiles: bool, outcome: str, parts: list[str]):
    _, option, needs = deepspeed_check.OPERATORS["async_io"]
    assert is_line(deepspeed_check.judge("async_io", builder, option, needs, missing, compiles), outcome, *parts)


# --- disk


def test_a_disk_that_works(tmp_path: Path):
    lines = list(disk_check.check(Request(folder=str(tmp_path / "runs/new"), is_quick=True)))
    assert [line.name for line in lines] == ["file system", "space", "replacing", "locking", "speed"]
    assert outcomes(lines)["replacing"] == outcomes(lines)["locking"] == "ok"
    assert f"{tmp_path} (where {tmp_path}/runs/new would be made)" in lines[1].text and list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full(tmp_path: Path):
    with small_disk(tmp_path / "disk", 400) as folder:
        lines = list(disk_check.check(Request(folder=str(folder))))
        assert is_line(lines[0], "warning", "tmpfs", "in memory") and is_line(lines[1], "warning", "Free space")
        assert is_line(lines[-1], "failure", "No space left on device", "Free space there")
        assert list(folder.iterdir()) == []


def test_a_disk_with_few_inodes(tmp_path: Path):
    with small_disk(tmp_path / "disk", 20_000, num_inodes=500) as folder:
        assert is_line(disk_check.judge_space("x", os.statvfs(folder)), "warning", "inodes free", "Remove small files")


def test_speed_is_measured_and_judged(tmp_path: Path):
    size, writing, reading = disk_check.measure(tmp_path, 8 << 20)
    assert size == 8 << 20 and writing > 0 and reading > 0 and list(tmp_path.iterdir()) == []
    assert is_line(disk_check.judge_speed(256 << 20, 0.5, 0.1), "ok", "writes 536.9 MB/s", "reads 2.7 GB/s (256 MiB)")
    assert is_line(disk_check.judge_speed(256 << 20, 10, 0.1), "warning", "writes 26.8 MB/s", "checkpoint.every_steps")


MOUNTS = """\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 0:40 / /my\\040data rw,relatime shared:9 - nfs4 host:/x rw,vers=4.2,local_lock=none
31 22 0:41 / /data rw - nfs host:/x rw,vers=3,local_lock=all
32 22 0:42 / /data/read ro - nfs4 host:/x rw
33 22 0:43 / /box rw - overlay overlay rw
"""


@pytest.mark.parametrize(
    ("folder", "outcome", "parts"),
    [
        ("/home/x", "ok", ["on ext4"]),
        ("/my data/x", "ok", ["on nfs4"]),
        ("/data/x", "warning", ["local_lock=all", "not seen by other nodes"]),
        ("/data/read", "failure", ["read-only"]),
        ("/database", "ok", ["on ext4"]),
        ("/box", "warning", ["gone with the container"]),
    ],
)
def test_file_systems(folder: str, outcome: str, parts: list[str]):
    found = disk_check.mount_of(Path(folder), MOUNTS)
    assert is_line(disk_check.judge_mount(Path(folder), *found), outcome, *parts)


def test_a_file_system_whose_locks_do_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    assert is_line(disk_check.try_locking(tmp_path), "failure", "can be locked twice")

    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert is_line(disk_check.try_locking(tmp_path), "failure", "No locks available", "lockd")


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(**_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(disk_check.tempfile, "mkdtemp", refuse)
    assert is_line(
        list(disk_check.check(Request(folder=str(tmp_path))))[-1], "failure", "Read-only file system", "--dir"
    )


# --- the machine


def test_limits_of_groups_of_processes(tmp_path: Path):
    own = tmp_path / "system/job"
    own.mkdir(parents=True)
    (own / "memory.max").write_text("max\n")
    (own.parent / "memory.max").write_text("8000000000\n")
    (own / "cpu.max").write_text("150000 100000\n")
    assert machine_check.memory_limit(tmp_path, "0::/system/job\n") == 8_000_000_000
    assert machine_check.cpu_quota(tmp_path, "0::/system/job\n") == 1.5
    assert machine_check.memory_limit(tmp_path, "0::/other\n") is None
    for folder, name, value in (("memory/a", "memory.limit_in_bytes", "4096"), ("cpu/a", "cpu.cfs_quota_us", "50000"),
                                ("cpu/a", "cpu.cfs_period_us", "100000")):  # fmt: skip
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / name).write_text(value)
    (tmp_path / "memory/memory.limit_in_bytes").write_text(str(2**63 - 4096))
    membership = "4:memory:/a\n1:cpu:/a\n0::/\n"
    assert machine_check.memory_limit(tmp_path, membership) == 4096
    assert machine_check.cpu_quota(tmp_path, membership) == 0.5


def test_memory_cores_and_threads():
    known = {"MemTotal": 64 * 10**9, "MemAvailable": 32 * 10**9, "SwapTotal": 10**9, "SwapFree": 10**9}
    judge = machine_check
    assert is_line(judge.judge_memory(known, 16 * 10**9), "ok", "32.0 GB of 64.0 GB", "may have 16.0 GB")
    assert is_line(judge.judge_memory(known | {"MemAvailable": 10**9}, None), "warning", "1.0 GB of 64.0 GB")
    assert is_line(judge.judge_swap(known, ["/dev/sda2"]), "ok", "0 B of 1.0 GB used (/dev/sda2)")
    pressed = known | {"SwapFree": 0, "MemAvailable": 10**9}
    assert is_line(judge.judge_swap(pressed, []), "warning", "holds all others up")
    assert is_line(judge.judge_swap({}, []), "ok", "none")
    assert is_line(judge.judge_cores(8, 8, None), "ok", "8 usable of 8")
    assert is_line(judge.judge_cores(8, 8, 2.5), "warning", "the time of 2.5", "OMP_NUM_THREADS to 2 ")
    assert is_line(judge.judge_cores(1, 8, None), "warning", "1 usable of 8", "--cpus-per-task")
    for value, outcome in (
        (None, "ok"),
        ("4", "ok"),
        ("8,2", "ok"),
        ("9", "warning"),
        ("many", "warning"),
        ("0", "warning"),
    ):
        assert is_line(judge.judge_threads(value, 8), outcome)


def test_limits_of_the_shell(tmp_path: Path):
    judge = machine_check.judge_limit
    assert is_line(judge("open files", 1024, 1048576), "ok", "1,024, up to 1,048,576")
    assert is_line(judge("processes", 100, 100), "warning", "100; expected 4,096 at least", "ulimit -u")
    assert is_line(judge("stack", 1 << 20, -1), "warning", "1 MiB, up to no limit; expected 8 MiB", "ulimit -s")
    assert is_line(judge("stack", -1, -1), "ok", "no limit")
    assert is_line(machine_check.judge_locked(8 << 20, True), "warning", "8 MiB", "memlock=-1")
    assert is_line(machine_check.judge_locked(8 << 20, False), "skipped", "8 MiB")
    assert is_line(machine_check.judge_locked(-1, True), "ok", "no limit")
    assert is_line(machine_check.judge_shared(tmp_path / "none"), "warning", "No such file", "Mount a tmpfs")
    with small_disk(tmp_path / "shm", 64) as folder:
        assert is_line(machine_check.judge_shared(folder), "warning", "65.5 kB", "--shm-size")


# --- SLURM

GROUP = NodeGroup("gpu", True, 4, 96, 8, 86400.0, None)


def test_partitions():
    states = [
        ("gpu", "up", "idle", 2),
        ("gpu", "up", "down", 2),
        ("old", "down", "idle", 1),
        ("sick", "up", "drained", 3),
    ]
    lines = list(slurm_check.judge_partitions([GROUP, replace(GROUP, partition="sick", is_default=False)], states))
    assert is_line(lines[0], "ok", "up (default): 4 nodes with 8 GPUs and 96 CPUs; 2 idle, 2 down")
    assert is_line(lines[1], "warning", "down: no nodes that are up", "sinfo -R")
    assert is_line(lines[2], "warning", "3 drained", "sinfo -R")
    assert is_line(*slurm_check.judge_partitions([], []), "warning", "none")


def test_a_cluster_that_does_not_answer():
    assert is_line(slurm_check.judge_unreached("no answer", {}), "warning", "no answer", "login node")
    assert is_line(slurm_check.judge_unreached("no answer", {"SLURM_JOB_ID": "1"}), "failure", "cannot be requeued")


def test_the_job_that_it_runs_in():
    job = Job("7", "RUNNING", partition="gpu", num_nodes=1, nodes="n01", seconds_left=7200.0)
    given = {"SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_ON_NODE": "96"}
    assert is_line(
        slurm_check.judge_job([job], "7", given), "ok", "1 node (n01) of gpu, 96 CPUs and 8 GPUs", "2h00m left"
    )
    late = replace(job, seconds_left=60.0)
    assert is_line(slurm_check.judge_job([late], "7", given), "warning", "1m00s left", "new allocation")
    assert is_line(slurm_check.judge_job([], "7", given), "warning", "not known", "Unset SLURM_JOB_ID")


def test_no_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert is_line(*slurm_check.check(Request()), "skipped", "sbatch is not on PATH")


# --- stores


def test_stores(tmp_path: Path):
    (tmp_path / "a.txt").touch()
    (tmp_path / "b").mkdir()
    assert is_line(*remote_check.check(Request(store=f"file://{tmp_path}")), "ok", "holds 2 names: a.txt, b")
    assert is_line(*remote_check.check(Request(store=f"file://{tmp_path}/none")), "failure", "no such bucket or folder")
    assert is_line(*remote_check.check(Request(store="nosuch://x")), "failure", "nosuch")
    assert is_line(*remote_check.check(Request(store="https://x/y")), "skipped", "cannot be listed", "--verify")


# --- a config


def checked(config: Path, *overrides: str) -> dict[str, Line]:
    return {line.name: line for line in run_check.check(Request(config=str(config), overrides=overrides))}


def test_a_config_whose_data_are_there(tiny_config: Path, tmp_path: Path):
    found = checked(tiny_config, f"run.dir={tmp_path}/run")
    names = ["config", "tokenizer", "source code", "source prose", "rows", "run folder", "checkpoints", "memory"]
    assert list(found) == names and set(outcomes(found.values()).values()) == {"ok"}
    assert (
        is_line(found["source code"], "ok", "shards of the sizes in their manifest") and not (tmp_path / "run").exists()
    )


def test_what_a_config_lacks(tiny_config: Path, tmp_path: Path):
    found = checked(
        tiny_config, f"tokenizer.model={tmp_path}/none.model", f"data.sources.0.shards={tmp_path}/none", "data.sources.0.paths=[none/*]",
        f"data.sources.1.shards={tmp_path}/none2",
    )  # fmt: skip
    assert is_line(found["tokenizer"], "warning", "not there yet", "launch/prepare.py")
    assert is_line(found["source code"], "failure", "neither shards", "none/*", "data.sources[].paths")
    assert is_line(found["source prose"], "warning", "not prepared yet", "launch/prepare.py") and "rows" not in found
    assert is_line(checked(tmp_path / "none.yaml")["config"], "failure", "cannot be read", "YAML file")
    assert is_line(checked(tiny_config, "model.dim=33")["config"], "failure", "model.dim is 33")


def test_shards_that_are_damaged(tiny_config: Path, tmp_path: Path):
    (source,) = [one for one in load_config(tiny_config).data.sources if one.name == "prose"]
    copy = tmp_path / "prose"
    copy.mkdir()
    for file in Path(source.shards).iterdir():
        if file.is_file():
            (copy / file.name).write_bytes(file.read_bytes())
    tars = sorted(copy.glob("*.tar"))
    with open(tars[0], "ab") as file:
        file.write(b"more")
    found = checked(tiny_config, f"data.sources.1.shards={copy}")
    assert is_line(found["source prose"], "failure", f"{tars[0].stem} has ", "bytes, not ", "Copy the folder again")
    tars[0].unlink()
    assert is_line(checked(tiny_config, f"data.sources.1.shards={copy}")["source prose"], "failure", "is missing")


def test_run_folders(tmp_path: Path):
    judge = run_check.judge_run_folder
    assert is_line(judge(tmp_path / "a/b"), "ok", "will be made")
    assert is_line(judge(tmp_path), "ok", "is free; no start so far")
    (tmp_path / "status.json").write_text('{"status": "running", "pid": 12, "host": "n1", "saved_step": 50}')
    with open(tmp_path / ".lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert is_line(judge(tmp_path), "warning", "is in use: process 12 on n1", "--cancel")
    assert is_line(judge(tmp_path), "ok", "the last start: running; saved at step 50")
    (tmp_path / "file").touch()
    assert is_line(judge(tmp_path / "file"), "failure", "is no folder")


def test_memory_that_a_run_needs():
    small, large = load_config(ROOT / "configs/gpt2-124m.yaml"), load_config(ROOT / "configs/llama-70b.yaml")
    assert is_line(run_check.judge_memory(small, []), "ok", "activations are not foreseen on a CPU")
    assert is_line(run_check.judge_memory(large, []), "failure", "GiB, and this machine has", "longhaul plan")
    assert is_line(
        run_check.judge_memory(small, ["NVIDIA H100 80GB HBM3"] * 8), "ok", "on 8 x H100, foreseen", "are left"
    )
    assert is_line(run_check.judge_memory(large, ["NVIDIA H100 80GB HBM3"] * 8), "failure", "too many", "longhaul plan")
    assert is_line(run_check.judge_memory(small, ["NVIDIA X1"]), "skipped", "not in the table")


def test_space_for_checkpoints(tiny_config: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    assert is_line(checked(tiny_config)["checkpoints"], "failure", "GB free", "checkpoint.keep_last lower")
    elsewhere = checked(tiny_config, "checkpoint.dir=s3://bucket/x")["checkpoints"]
    assert is_line(elsewhere, "skipped", "each, in a store")
