"""What the system lets a process have: memory, cores, shared memory, open files; by /proc, /sys and its limits."""

from __future__ import annotations

import os
import platform
import resource
from collections.abc import Iterator
from pathlib import Path

from pretrain.console import counted, format_bytes
from pretrain.doctor.findings import Line, Request, ok, skipped, warning

CGROUPS = Path("/sys/fs/cgroup")
_LITTLE_SHARED_BYTES = 512 << 20  # Docker's default is 64 MB, with which NCCL fails
_NO_LIMIT = 1 << 60  # cgroups of version 1 write a number as large as pages allow
_LEAST = {"open files": 1024, "processes": 4096, "stack": 8 << 20}
_LIMITS = {"open files": resource.RLIMIT_NOFILE, "processes": resource.RLIMIT_NPROC, "stack": resource.RLIMIT_STACK}
_ULIMIT = {"open files": "ulimit -n 65536", "processes": "ulimit -u 65536", "stack": "ulimit -s 8192"}


def check(request: Request) -> Iterator[Line]:
    """Look at the limits of this process."""
    yield ok("system", f"{platform.system()} {platform.release()}, {platform.machine()}")
    membership = _read(Path("/proc/self/cgroup"))
    known = _meminfo(_read(Path("/proc/meminfo")))
    yield judge_memory(known, memory_limit(CGROUPS, membership))
    yield judge_swap(known, [line.split()[0] for line in _read(Path("/proc/swaps")).splitlines()[1:]])
    usable = len(os.sched_getaffinity(0))
    yield judge_cores(usable, os.cpu_count() or usable, cpu_quota(CGROUPS, membership))
    yield judge_threads(os.environ.get("OMP_NUM_THREADS"), usable)
    yield judge_shared(Path("/dev/shm"))
    for name, number in _LIMITS.items():
        yield judge_limit(name, *resource.getrlimit(number))
    has_rdma = any(Path("/sys/class/infiniband").iterdir()) if Path("/sys/class/infiniband").is_dir() else False
    yield judge_locked(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], has_rdma)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def _meminfo(text: str) -> dict[str, int]:
    rows = [line.split() for line in text.splitlines()]
    return {row[0].rstrip(":"): 1024 * int(row[1]) for row in rows if len(row) > 1}


def _controlled(root: Path, membership: str, controller: str, names: tuple[str, str]) -> list[list[str]]:
    """Words of a cgroup's file and of those above it, of version 2 (`names[0]`) and 1 (`names[1]`)."""
    found = []
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        base, name = (root / controller, names[1]) if controllers else (root, names[0])
        own = base / path.lstrip("/")
        for folder in (own, *own.parents):
            if text := _read(folder / name):
                found.append(text.split())
            if folder == base:
                break
    return found


def memory_limit(root: Path, membership: str) -> int | None:
    """Return the bytes that a process's cgroup allows; None for no limit.

    Args:
        root: where cgroups are mounted.
        membership: as /proc/self/cgroup has it.
    """
    found = _controlled(root, membership, "memory", ("memory.max", "memory.limit_in_bytes"))
    limits = [int(words[0]) for words in found if words[0] != "max"]
    return min((limit for limit in limits if limit < _NO_LIMIT), default=None)


def cpu_quota(root: Path, membership: str) -> float | None:
    """Return the cores that a process's cgroup has the time of; None for no limit. Arguments as of `memory_limit`."""
    quotas = [float(quota) / float(period)
              for quota, period in (words for words in _controlled(root, membership, "cpu", ("cpu.max", "")) if
                                    len(words) == 2) if quota != "max"]  # fmt: skip
    times = [_controlled(root, membership, "cpu", ("", f"cpu.cfs_{name}_us")) for name in ("quota", "period")]
    quotas += [float(quota[0]) / float(period[0]) for quota, period in zip(*times, strict=False) if quota[0] != "-1"]
    return min(quotas, default=None)


def judge_memory(known: dict[str, int], limit: int | None) -> Line:
    """Say how much memory there is, and whether a container or job allows less."""
    total, free = known.get("MemTotal", 0), known.get("MemAvailable", 0)
    text = f"{format_bytes(free)} of {format_bytes(total)} free"
    if limit is not None and limit < total:
        text += f"; this container or job may have {format_bytes(limit)}"
    if free < 0.1 * total:
        return warning("memory", text, "End what takes it, or use another machine.")
    return ok("memory", text)


def judge_swap(known: dict[str, int], devices: list[str]) -> Line:
    """Say whether memory is being moved to a disk."""
    total, used = known.get("SwapTotal", 0), known.get("SwapTotal", 0) - known.get("SwapFree", 0)
    if not total:
        return ok("swap", "none")
    text = f"{format_bytes(used)} of {format_bytes(total)} used ({', '.join(devices)})"
    if used > 0.5 * total and known.get("MemAvailable", 0) < 0.2 * known.get("MemTotal", 0):
        return warning("swap", text, "End what takes memory: a rank that is swapped out holds all others up.")
    return ok("swap", text)


def judge_cores(usable: int, cores: int, quota: float | None) -> Line:
    """Say how many cores ranks share."""
    text = f"{usable} usable of {cores}"
    if quota is not None and quota < usable:
        return warning(
            "cores", f"{text}, and this container or job has the time of {quota:g}: more threads wait for each other",
            f"Set OMP_NUM_THREADS to {max(1, int(quota))} divided by the ranks of this machine, or raise the quota.",
        )  # fmt: skip
    if usable == 1 and cores > 1:
        return warning(
            "cores", text, "Give the job more (srun --cpus-per-task, taskset): data is read beside training."
        )
    return ok("cores", text)


def judge_threads(value: str | None, usable: int) -> Line:
    """Say what OMP_NUM_THREADS makes of a rank."""
    if value is None:
        return ok("OMP_NUM_THREADS", f"is not set: training gives each rank its part of {counted(usable, 'core')}")
    if not value.split(",")[0].strip().isdigit() or not int(value.split(",")[0]):
        return warning("OMP_NUM_THREADS", f"is {value!r}; expected a number", "Unset it.")
    if int(value.split(",")[0]) > usable:
        return warning("OMP_NUM_THREADS", f"is {value}, and {counted(usable, 'core')} usable",
                       f"Unset it, or set it to {usable} divided by the ranks of this machine.")  # fmt: skip
    return ok("OMP_NUM_THREADS", f"is {value}, for every rank")


def judge_shared(folder: Path) -> Line:
    """Say whether processes of this machine can share enough memory."""
    try:
        found = os.statvfs(folder)
    except OSError as error:
        return warning("shared memory", f"{folder}: {error.strerror}", f"Mount a tmpfs at {folder}.")
    size, free = found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize
    text = f"{folder} has {format_bytes(free)} of {format_bytes(size)} free"
    if free < _LITTLE_SHARED_BYTES:
        mend = "Start the container with --ipc=host or --shm-size=8g" if size < _LITTLE_SHARED_BYTES else (
            "Remove what ended processes have left there"
        )  # fmt: skip
        return warning("shared memory", text, f"{mend}: NCCL's ranks on one machine exchange through it.")
    return ok("shared memory", text)


def judge_limit(name: str, soft: int, hard: int) -> Line:
    """Say whether a limit of the shell is high enough."""
    size = {limit: "no limit" if limit == resource.RLIM_INFINITY else _shown(name, limit) for limit in (soft, hard)}
    text = f"{size[soft]}" if soft == hard else f"{size[soft]}, up to {size[hard]}"
    if soft != resource.RLIM_INFINITY and soft < _LEAST[name]:
        return warning(name, f"{text}; expected {_shown(name, _LEAST[name])} at least",
                       f"Run `{_ULIMIT[name]}` first, or have /etc/security/limits.conf say so.")  # fmt: skip
    return ok(name, text)


def _shown(name: str, limit: int) -> str:
    return f"{limit / 2**20:g} MiB" if name == "stack" else f"{limit:,}"


def judge_locked(limit: int, has_rdma: bool) -> Line:
    """Say whether memory can be locked, which InfiniBand needs."""
    is_unlimited = limit == resource.RLIM_INFINITY
    text = "no limit" if is_unlimited else f"{limit / 2**20:g} MiB"
    if has_rdma and not is_unlimited:
        return warning("locked memory", f"{text}, and this machine has InfiniBand or RoCE, which registers memory",
                       "Have it unlimited (ulimit -l unlimited; docker run --ulimit memlock=-1).")  # fmt: skip
    if not has_rdma and not is_unlimited:
        return skipped("locked memory", f"{text}; matters with InfiniBand or RoCE, of which there is none here")
    return ok("locked memory", text)
