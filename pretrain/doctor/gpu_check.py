"""torch and the GPUs: builds and drivers that fit, memory that is free, who else is there, and what is used instead."""

from __future__ import annotations

import csv
import ctypes
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pretrain.console import counted
from pretrain.doctor.findings import Line, Request, answer_of, failure, last_line, ok, skipped, warning
from pretrain.ranks.gpus import gpu_of_device

_QUERY = (
    "index,uuid,name,memory.total,memory.free,driver_version,compute_cap,ecc.errors.uncorrected.volatile.total,"
    "mig.mode.current"
)
_HOLDERS = "gpu_uuid,pid,used_memory,process_name"
_MUCH_USED = 0.1  # of a GPU's memory, by others
_VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class SeenGpu:
    """A GPU as nvidia-smi sees it; what the driver does not tell is None."""

    index: int
    uuid: str
    name: str
    total_mib: float
    free_mib: float
    driver: str
    capability: float | None
    ecc_errors: int | None
    mig: bool


@dataclass(frozen=True)
class Torch:
    """What torch says of itself and of this machine: `cuda` is its build's version, `why` why it sees no GPU."""

    version: str
    cuda: str | None
    hip: str | None
    num_gpus: int
    why: str = ""


def has_gpus() -> bool:
    """Whether this machine has GPUs of NVIDIA or AMD, whatever torch makes of them."""
    return Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists()


def check(request: Request) -> Iterator[Line]:
    """Look at torch, the driver and each GPU."""
    status, listing, said = answer_of("nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits")
    if status == 124:
        yield failure("nvidia-smi", said, "Restart the machine, or have it drained: its driver hangs.")
        return
    if has_gpus() and status not in (0, 127):
        yield failure("nvidia-smi", last_line(said + listing), "Install a driver that fits the kernel, or restart.")
    seen = read_gpus(listing) if status == 0 else []
    # before torch is one of them, under a number that it does not know where it is in a container
    holders = answer_of("nvidia-smi", f"--query-compute-apps={_HOLDERS}", "--format=csv,noheader,nounits")[1]
    torch_says = ask_torch()
    if not seen:  # as in containers that have the driver and not its programs
        yield from (judge_gpu(gpu) for gpu in gpus_of_torch(torch_says.num_gpus))
    yield judge_torch(torch_says, seen)
    yield from judge_visible(os.environ.get(_VISIBLE), seen)
    if seen:
        yield judge_driver(torch_says.cuda, driver_cuda(), seen[0].driver)
        yield from map(judge_gpu, seen)
        yield from judge_processes(holders, seen)
    if len(seen) > 1:
        yield from judge_links(answer_of("nvidia-smi", "topo", "-m")[1])
    if torch_says.num_gpus == 0:
        yield _on_cpu()


def ask_torch() -> Torch:
    """Import torch, and multiply a matrix on each GPU."""
    import warnings

    import torch

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    why = last_line(str(said[-1].message)) if said else ""
    for number in range(num_gpus):
        ones = torch.ones(64, 64, device=torch.device("cuda", number))
        assert (ones @ ones).sum().item() == 64**3, f"GPU {number} multiplies wrongly"
    return Torch(torch.__version__, torch.version.cuda, torch.version.hip, num_gpus, why)


def gpus_of_torch(num_gpus: int) -> list[SeenGpu]:
    """Return the GPUs as torch sees them, where nvidia-smi is not there, and for AMD's."""
    import torch

    found = []
    for number in range(num_gpus):
        free, total = torch.cuda.mem_get_info(number)
        capability = None if torch.version.hip else float("{}.{}".format(*torch.cuda.get_device_capability(number)))
        name = torch.cuda.get_device_name(number)
        found.append(SeenGpu(number, "", name, total / 2**20, free / 2**20, "", capability, None, False))
    return found


def _on_cpu() -> Line:
    from kernels.pieces import has_bf16_units

    how = (
        "bf16 has matrix units here" if has_bf16_units() else "bf16 has no matrix units here: use train.precision=fp32"
    )
    cores = len(os.sched_getaffinity(0))
    return ok(
        "instead",
        f"ranks train on {counted(cores, 'core')}, by gloo, with PyTorch's operators for the Triton kernels; {how}",
    )


def read_gpus(listing: str) -> list[SeenGpu]:
    """Read what nvidia-smi lists."""
    found = []
    for row in csv.reader(listing.splitlines(), skipinitialspace=True):
        if len(row) != len(_QUERY.split(",")):
            continue
        index, uuid, name, total, free, driver, capability, errors, mig = (cell.strip() for cell in row)
        known = _number(capability), _number(errors)
        found.append(SeenGpu(int(index), uuid, name, _number(total) or 0, _number(free) or 0, driver, known[0],
                             None if known[1] is None else int(known[1]), mig == "Enabled"))  # fmt: skip
    return found


def _number(text: str) -> float | None:
    return float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else None


def driver_cuda() -> tuple[int, int] | None:
    """Return the newest CUDA that the driver knows; None without one."""
    number = ctypes.c_int()
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number)):
            return None
    except (OSError, AttributeError):
        return None
    return number.value // 1000, number.value % 1000 // 10


def judge_torch(found: Torch, seen: Sequence[SeenGpu]) -> Line:
    """Say whether torch's build fits the machine."""
    build = f"CUDA {found.cuda}" if found.cuda else f"ROCm {found.hip}" if found.hip else "CPU build"
    text = f"{found.version}, {build}"
    if not seen:
        return ok("torch", f"{text}, sees {counted(found.num_gpus, 'GPU')}" if found.num_gpus else text)
    if not found.cuda:
        return failure(
            "torch", f"{text}; expected a CUDA build: this machine has {counted(len(seen), 'GPU')}",
            "Install torch from an index with CUDA builds (pip's own has them).",
        )  # fmt: skip
    if found.num_gpus == 0 and os.environ.get(_VISIBLE) is None:
        return failure(
            "torch", f"{text}, sees no GPU, nvidia-smi sees {len(seen)}" + (f": {found.why}" if found.why else ""),
            "Let the driver and torch's CUDA fit (the line `driver`), and in a container start it with --gpus or --nv.",
        )  # fmt: skip
    return ok("torch", f"{text}, sees {found.num_gpus} of {counted(len(seen), 'GPU')}")


def judge_visible(value: str | None, seen: Sequence[SeenGpu]) -> Iterator[Line]:
    """Say what CUDA_VISIBLE_DEVICES hides."""
    if value is None:
        if seen:
            yield ok(_VISIBLE, "is not set: all GPUs are used")
        return
    names = [name.strip() for name in value.split(",") if name.strip()]
    unknown = [name for name in names if seen and not _is_known(name, seen)]
    if unknown:
        yield failure(
            _VISIBLE, f"is {value}, and {', '.join(unknown)} is no GPU of this machine; those after it are hidden too",
            f"Unset it, or name GPUs from 0 to {len(seen) - 1}.",
        )  # fmt: skip
    elif seen and not names or names == ["-1"]:
        yield warning(_VISIBLE, f"is {value or 'empty'}, which hides all GPUs", "Unset it.")
    elif seen:
        yield ok(_VISIBLE, f"is {value}: {len(names)} of {counted(len(seen), 'GPU')} used")
    else:
        yield ok(_VISIBLE, f"is {value or 'empty'}; nvidia-smi lists no GPU")


def _is_known(name: str, seen: Sequence[SeenGpu]) -> bool:
    if name.isdigit():
        return int(name) < len(seen)
    return name == "-1" or name.startswith("MIG-") or any(gpu.uuid.startswith(name) for gpu in seen)


def judge_driver(build: str | None, newest: tuple[int, int] | None, driver: str) -> Line:
    """Say whether the driver is new enough for torch's CUDA: within one major version an older one will do."""
    if build is None or newest is None:
        return skipped("driver", f"{driver}: not compared with a CUDA build of torch")
    own = tuple(map(int, build.split(".")[:2]))
    text = f"{driver}, for CUDA up to {newest[0]}.{newest[1]}; torch is built with {build}"
    if newest[0] < own[0]:
        return failure("driver", text, f"Install a driver for CUDA {own[0]}, or a build of torch for CUDA {newest[0]}.")
    return ok("driver", text)


def judge_gpu(gpu: SeenGpu) -> Line:
    """Say what a GPU is, and what is wrong with it."""
    name = f"GPU {gpu.index}"
    parts = [gpu.name, f"{gpu.free_mib / 1024:.1f} of {gpu.total_mib / 1024:.1f} GiB free"]
    table = gpu_of_device(gpu.name)
    has_bf16 = gpu.capability is None or gpu.capability >= 8.0
    if gpu.capability is not None:
        parts.append(f"capability {gpu.capability}, {'bf16' if has_bf16 else 'no bf16'}")
    parts.append("ECC off or not known" if gpu.ecc_errors is None else f"ECC: {gpu.ecc_errors} uncorrected errors")
    if table is None:
        parts.append("not in the table of GPUs: no MFU and no plan")
    text = ", ".join(parts)
    if gpu.ecc_errors:
        return failure(name, text, "Reset or replace it (nvidia-smi -r): what it computes may be wrong.")
    if gpu.mig:
        return warning(name, f"{text}, divided by MIG", "Use one part, as one rank, or switch MIG off: NCCL does not "
                       "connect the parts of one GPU.")  # fmt: skip
    if not has_bf16:
        return warning(name, text, "Use train.precision=fp16 or fp32; attention's kernels need capability 8.0.")
    if gpu.free_mib < (1 - _MUCH_USED) * gpu.total_mib:
        return warning(name, text, "Look who uses its memory (the lines below), or choose other GPUs by "
                       f"{_VISIBLE}.")  # fmt: skip
    return ok(name, text)


def judge_processes(listing: str, seen: Sequence[SeenGpu]) -> Iterator[Line]:
    """Name the processes that hold GPUs' memory."""
    numbers = {gpu.uuid: gpu.index for gpu in seen}
    rows = [[cell.strip() for cell in row] for row in csv.reader(listing.splitlines()) if len(row) >= 4]
    others = [row for row in rows if row[0] in numbers]
    for uuid, pid, used, *words in others[:16]:
        size = f"{float(used) / 1024:.1f} GiB" if _number(used) else "memory"
        yield warning(f"GPU {numbers[uuid]}", f"process {pid} ({','.join(words)}) holds {size}",
                      "End it if it is yours, or use another GPU.")  # fmt: skip
    if not others:
        yield ok("other processes", "none holds memory of a GPU")


def judge_links(topology: str) -> Iterator[Line]:
    """Say how the GPUs are connected, by what `nvidia-smi topo -m` prints."""
    rows = [line.split() for line in re.sub(r"\x1b\[[0-9;]*m", "", topology).splitlines()]
    rows = [row for row in rows if re.fullmatch(r"GPU\d+", row[0] if row else "") and "X" in row]
    links = [word for row in rows for word in row[1 : len(rows) + 1] if word != "X"]
    if not links:
        return
    if slow := sorted({word for word in links if not word.startswith("NV")}):
        yield ok("links of GPUs", f"not all by NVLink: {', '.join(slow)} (nvidia-smi topo -m explains them)")
    else:
        yield ok("links of GPUs", f"NVLink between all {len(rows)} ({', '.join(sorted(set(links)))})")
