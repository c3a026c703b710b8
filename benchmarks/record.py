"""What a result says beside its numbers: device, versions, date, commit, settings, and which parts failed."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    "torch", "triton", "deepspeed", "transformers", "accelerate", "liger-kernel", "numpy", "sentencepiece",
)  # fmt: skip


def describe_device() -> dict[str, Any]:
    """Name the GPU, or the CPU where there is none, with its memory and parallel units, and how busy the machine is."""
    load = {"num_cores": len(os.sched_getaffinity(0)), "load_average": round(os.getloadavg()[0], 1)}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return {
            "kind": "cuda",
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "num_processors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            **load,
        }
    return {
        "kind": "cpu",
        "name": _cpu_name(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "num_processors": torch.get_num_threads(),
        **load,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def installed_versions() -> dict[str, str | None]:
    """Return the versions of what the numbers depend on; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _commit() -> str | None:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None  # a copy without its history


class Record:
    """The result of one benchmark, written anew after every part, so that a run that is cut short keeps the rest.

    Args:
        benchmark: its name, which decides how the table shows it.
        out: file to write, or None.
        settings: what was asked for.
    """

    def __init__(self, benchmark: str, out: Path | None, settings: dict[str, Any]) -> None:
        self.out = out
        self.content: dict[str, Any] = {
            "benchmark": benchmark,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": _commit(),
            "device": describe_device(),
            "versions": installed_versions(),
            "settings": settings,
            "rows": [],
            "failures": [],
        }
        self.write()

    def add(self, **row: Any) -> None:
        """Add a measured row."""
        self.content["rows"].append(row)
        self.write()

    def fail(self, part: str, error: str) -> None:
        """Say that a part has no number, and why."""
        self.content["failures"].append({"part": part, "error": error})
        self.write()

    def write(self) -> None:
        """Write the file, if there is one."""
        if self.out is None:
            return
        self.out.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.out.with_name(f".{self.out.name}.tmp")
        temporary.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, self.out)


def first_line(error: BaseException) -> str:
    """Write an error on one line of at most 300 characters."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:300]
