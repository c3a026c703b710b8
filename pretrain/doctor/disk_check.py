"""The disk of the run folder: its speed and space, and whether what a run relies on works there."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from pretrain.console import format_bytes
from pretrain.doctor.findings import Line, Request, failure, ok, skipped, warning
from pretrain.doctor.run_files import config_of
from pretrain.errors import LonghaulError
from pretrain.storage.whole_file import sync_folder

_PROBE_BYTES, _CHUNK_BYTES, _MOST_SECONDS = 256 << 20, 4 << 20, 20.0
_SLOW_BYTES_PER_SECOND = 100e6  # a checkpoint of a billion parameters (12 GB) takes two minutes
_LITTLE_BYTES, _FEW_INODES = 10e9, 10_000
_IN_MEMORY = ("tmpfs", "ramfs")
_OF_NETWORKS = ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "cifs", "smb3", "ceph", "fuse.sshfs", "fuse.ceph")
_LOCAL_LOCKS = ("nolock", "local_lock=flock", "local_lock=all", "localflock")
_MEND = "Use another run.dir, on a file system that can."


def check(request: Request) -> Iterator[Line]:
    """Try the folder that runs are written to."""
    wanted = Path(folder_of(request)).absolute()
    if wanted.exists() and not wanted.is_dir():
        yield failure("folder", f"{wanted} is a file; expected a folder", "Use --dir, or another run.dir.")
        return
    folder = next((path for path in (wanted, *wanted.parents) if path.is_dir()), Path("/"))
    where = str(folder) if folder == wanted else f"{folder} (where {wanted} would be made)"
    yield judge_mount(folder, *mount_of(folder, Path("/proc/self/mountinfo").read_text(encoding="utf-8")))
    yield judge_space(where, os.statvfs(folder))
    try:
        probe = tempfile.mkdtemp(prefix=".longhaul-doctor-", dir=folder)
    except OSError as error:
        yield failure("writing", f"{where} cannot be written: {error.strerror}", "Change its rights, or use --dir.")
        return
    try:
        yield try_replacing(Path(probe))
        yield try_locking(Path(probe))
        if request.is_quick:
            yield skipped("speed", "left out by --quick")
        else:
            yield judge_speed(*measure(Path(probe)))
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        yield failure("writing", f"{where}: {error.strerror}", "Free space there, or raise your quota." if full else
                      _MEND)  # fmt: skip
    finally:
        shutil.rmtree(probe, ignore_errors=True)


def folder_of(request: Request) -> str:
    """Return the folder whose disk is meant: the one given, or the config's run folder, or the working folder."""
    if request.folder or not request.config:
        return request.folder or "."
    try:
        return config_of(request).run.dir
    except LonghaulError:  # which another check reports
        return "."


def mount_of(folder: Path, mounts: str) -> tuple[str, str]:
    """Return the type and options of the file system that a folder is on.

    Args:
        folder: that exists.
        mounts: as /proc/self/mountinfo has them.
    """
    found, longest = ("unknown", ""), -1
    real = os.path.realpath(folder)
    for line in mounts.splitlines():
        own, _, rest = line.partition(" - ")
        point = own.split()[4].encode().decode("unicode_escape")  # a space is \040
        is_above = real == point or real.startswith(point.rstrip("/") + "/")
        if is_above and len(point) >= longest:  # of two at one point the later one is on top
            kind, _, options = rest.split()[:3]
            found, longest = (kind, f"{own.split()[5]},{options}"), len(point)
    return found


def judge_mount(folder: Path, kind: str, options: str) -> Line:
    """Say what a kind of file system means for a run."""
    text = f"{folder} is on {kind}"
    given = options.split(",")
    if "ro" in given:
        return failure("file system", f"{text}, mounted read-only", "Use another run.dir, or mount it rw.")
    if kind in _IN_MEMORY:
        return warning("file system", f"{text}: in memory, gone at a restart", "Use a folder on a disk.")
    if kind == "overlay":
        return warning("file system", f"{text}: gone with the container", "Mount a folder of the host for run.dir.")
    local = [option for option in given if option in _LOCAL_LOCKS]
    if kind in _OF_NETWORKS and local:
        return warning(
            "file system", f"{text} with {local[0]}: a run folder's lock is not seen by other nodes",
            "See to it that two jobs never have one run.dir, or mount it without that option.",
        )  # fmt: skip
    return ok("file system", text)


def judge_space(where: str, found: os.statvfs_result) -> Line:
    """Say how much fits on a disk."""
    free, size = found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize
    inodes = f", {found.f_favail:,} inodes free" if found.f_files else ""  # btrfs and others have no limit
    text = f"{where}: {format_bytes(free)} of {format_bytes(size)} free{inodes}"
    if found.f_files and found.f_favail < _FEW_INODES:
        return warning("space", text, "Remove small files, of which there are too many.")
    if free < _LITTLE_BYTES:
        return warning("space", text, "Free space: a checkpoint takes 12 bytes a parameter (longhaul doctor CONFIG "
                       "says how much that is).")  # fmt: skip
    return ok("space", text)


def try_replacing(folder: Path) -> Line:
    """Try what makes checkpoints complete or absent: fsync, rename of files and folders, fsync of the folder."""
    content = {"old": b"old" * 1000, "new": b"new" * 1000}
    for name, data in content.items():
        with open(folder / name, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    os.replace(folder / "new", folder / "old")
    (folder / ".tmp-step").mkdir()
    (folder / ".tmp-step" / "file").touch()
    os.rename(folder / ".tmp-step", folder / "step")
    sync_folder(folder)
    if (folder / "old").read_bytes() != content["new"] or sorted(os.listdir(folder)) != ["old", "step"]:
        return failure("replacing", "a file that replaces another is not seen in its place", _MEND)
    return ok("replacing", "files and folders are renamed whole; fsync of both works")


def try_locking(folder: Path) -> Line:
    """Try what keeps two jobs out of one run folder: a lock of the file `.lock`, held once."""
    with open(folder / ".lock", "a+") as first, open(folder / ".lock", "a+") as second:
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return failure(
                "locking", f"a file cannot be locked ({error.strerror}), without which no run starts",
                "Mount it with locks (NFS: without nolock, lockd running; Lustre: -o flock), or use another run.dir.",
            )  # fmt: skip
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return ok("locking", "a file that is locked cannot be locked again")
    return failure("locking", "a file can be locked twice, so that two jobs could train in one run folder", _MEND)


def measure(folder: Path, num_bytes: int = _PROBE_BYTES) -> tuple[int, float, float]:
    """Write a file and read it again; return its size, and the seconds of both."""
    chunk = os.urandom(_CHUNK_BYTES)
    with open(folder / "speed", "w+b", buffering=0) as file:
        os.unlink(folder / "speed")  # nothing is left, however this ends
        begin, size = time.monotonic(), 0
        while size < num_bytes and time.monotonic() - begin < _MOST_SECONDS:
            size += file.write(chunk)
        os.fsync(file.fileno())
        written = time.monotonic() - begin
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # read it from the disk, not from memory
        file.seek(0)
        begin = time.monotonic()
        while file.read(_CHUNK_BYTES):
            pass
        return size, written, time.monotonic() - begin


def judge_speed(num_bytes: int, write_seconds: float, read_seconds: float) -> Line:
    """Say how fast a disk is."""
    writing, reading = (num_bytes / max(seconds, 1e-9) for seconds in (write_seconds, read_seconds))
    text = f"writes {format_bytes(writing)}/s with fsync, reads {format_bytes(reading)}/s ({num_bytes >> 20} MiB)"
    if min(writing, reading) < _SLOW_BYTES_PER_SECOND:
        return warning("speed", text, "Use a faster disk for run.dir, or set checkpoint.every_steps higher: each "
                       "checkpoint has 12 bytes a parameter.")  # fmt: skip
    return ok("speed", text)
