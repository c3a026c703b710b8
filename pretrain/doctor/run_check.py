"""A config, or a run folder: whether what it names is there and fits, in memory and on the disk."""

from __future__ import annotations

import fcntl
import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from pretrain.checkpoints.checkpoint_folder import FolderPlace
from pretrain.checkpoints.checkpoint_places import open_place
from pretrain.checkpoints.run_status import read_saved_step
from pretrain.cluster.run_state import read_json
from pretrain.cluster.submit_checks import check_data
from pretrain.console import counted, format_bytes
from pretrain.data.shards import Manifest, index_path
from pretrain.doctor.findings import Line, Request, failure, ok, refused, skipped, warning
from pretrain.doctor.run_files import config_of
from pretrain.errors import LonghaulError
from pretrain.options.config import Config, SourceSection
from pretrain.planning.plan import choose_machine, make_plan
from pretrain.planning.plan_memory import checkpoint_bytes, host_bytes, resident
from pretrain.planning.plan_report import gib, lack
from pretrain.ranks.gpus import gpu_of_device
from pretrain.storage.stores import Store, is_remote, shown
from pretrain.tokenizers.tokenizer_files import main_file, open_tokenizer
from pretrain.training.preflight import missing_space

_RETRY_SECONDS = 20.0


def check(request: Request) -> Iterator[Line]:
    """Look at all that a start would need; nothing is started or made."""
    try:
        config = config_of(request)
    except LonghaulError as error:
        yield refused("config", error, "Give a YAML file, such as one of configs/, or a run folder.")
        return
    yield ok("config", f"{request.config} is in order; its run folder is {config.run.dir}")
    yield _tokenizer(config)
    prepared = True
    for source in config.data.sources:
        line = _source(source)
        prepared = prepared and line.outcome == "ok"
        yield line
    if prepared:
        yield _plan_of_rows(config)
    yield judge_run_folder(Path(config.run.dir))
    yield _space(config)
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    yield judge_memory(config, names if torch.cuda.is_available() else [])


def _tokenizer(config: Config) -> Line:
    try:
        path = main_file(config.tokenizer.model)
        if not path.exists():
            return warning("tokenizer", f"{path} is not there yet", "Run launch/prepare.py, which trains it.")
        found = open_tokenizer(config.tokenizer)
    except LonghaulError as error:
        return refused("tokenizer", error)
    return ok("tokenizer", f"{path}, {found.vocab_size:,} ids")


def _source(source: SourceSection) -> Line:
    """Compare a corpus with its manifest by names and sizes."""
    name = f"source {source.name}"
    try:
        if is_remote(source.shards):
            Store(source.shards, _RETRY_SECONDS).read("manifest.json")
            return ok(name, f"{shown(source.shards)} can be read")
        folder = Path(source.shards)
        if not (folder / "manifest.json").exists():
            return _raw(name, source)
        manifest = Manifest.load(folder)
    except LonghaulError as error:
        return refused(name, error)
    wrong, shards = [], manifest.train + manifest.val
    for shard in shards:
        tar = folder / f"{shard.name}.tar"
        if not tar.exists() or not index_path(folder, shard.name).exists():
            wrong.append(f"{shard.name} is missing or lacks its index")
        elif manifest.text is None and tar.stat().st_size != shard.num_bytes:
            wrong.append(f"{shard.name} has {tar.stat().st_size:,} bytes, not {shard.num_bytes:,}")
    if wrong:
        some = "; ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        return failure(name, f"{folder}: {some}", "Copy the folder again, or run launch/prepare.py, which mends it.")
    tokens = sum(shard.num_tokens for shard in manifest.train)
    return ok(name, f"{folder}: {counted(len(shards), 'shard')} of the sizes in the manifest, {tokens:,} tokens to "
              "train on (launch/prepare.py --verify reads them to the last byte)")  # fmt: skip


def _raw(name: str, source: SourceSection) -> Line:
    missing = [path for path in source.paths if not is_remote(path) and not glob.glob(path, recursive=True)]
    if missing:
        return failure(name, f"neither shards ({source.shards}) nor raw text ({', '.join(missing)}) are there",
                       "Correct data.sources[].paths or shards.")  # fmt: skip
    if not source.paths:
        return failure(name, f"{source.shards} holds no manifest.json, and there are no paths to prepare it from",
                       "Correct data.sources[].shards.")  # fmt: skip
    return warning(name, f"{source.shards} is not prepared yet", "Run launch/prepare.py.")


def _plan_of_rows(config: Config) -> Line:
    try:
        check_data(config)
    except LonghaulError as error:
        return refused("rows", error)
    return ok("rows", "tokenizer, shards and row tables fit each other")


def judge_run_folder(folder: Path) -> Line:
    """Say whether a run could be started, or gone on with, in a folder."""
    if not folder.exists():
        above = next(path for path in folder.absolute().parents if path.exists())
        if os.access(above, os.W_OK | os.X_OK):
            return ok("run folder", f"{folder} will be made")
        return failure("run folder", f"{folder} cannot be made in {above}", "Use another run.dir.")
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        what = "cannot be written" if folder.is_dir() else "is no folder"
        return failure("run folder", f"{folder} {what}", "Change its rights, or use another run.dir.")
    status = read_json(folder / "status.json")
    if (lock := folder / ".lock").exists():
        try:
            with open(lock, "a+", encoding="utf-8") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # and lets go of it at once
        except BlockingIOError:
            who = f"process {status.get('pid')} on {status.get('host')}" if status else "another process"
            mend = "Wait for it, stop it (longhaul submit --cancel), or use another run.dir."
            return warning("run folder", f"{folder} is in use: {who} trains there", mend)
        except OSError as error:
            mend = "Mend its rights, mount the file system with locks, or use another run.dir."
            return failure("run folder", f"{lock} cannot be locked ({error.strerror})", mend)
    saved = read_saved_step(folder)
    state = f"the last start: {status.get('status', 'unknown')}" if status else "no start so far"
    return ok("run folder", f"{folder} is free; {state}" + (f"; saved at step {saved}" if saved else ""))


def _space(config: Config) -> Line:
    """Say whether the checkpoints that are kept at once have room."""
    size = format_bytes(checkpoint_bytes(config))
    try:
        place = open_place(config.checkpoint, Path(config.run.dir), config.data)
    except LonghaulError as error:
        return refused("checkpoints", error)
    if not isinstance(place, FolderPlace):
        return skipped("checkpoints", f"{size} each, in a store (--store lists it)")
    if problem := missing_space(config, place.folder):
        return failure("checkpoints", problem, "Free space there, or set checkpoint.keep_last lower or checkpoint.dir.")
    return ok("checkpoints", f"{size} each, {config.checkpoint.keep_last + 1} at once: there is room in {place.folder}")


def judge_memory(config: Config, names: Sequence[str]) -> Line:
    """Say whether the run fits this machine's memory.

    Args:
        config: of the run.
        names: of the GPUs; empty on a CPU.
    """
    if not names:
        states = sum(resident(config, 1).values()) + sum(host_bytes(config, 1).values())
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        text = f"one rank's weights and states are {gib(states)}, and this machine has {gib(free)}"
        if states > free:
            return failure("memory", text, "Use a smaller model, or GPUs: `longhaul plan CONFIG` says how many.")
        return ok("memory", f"{text}; activations are not foreseen on a CPU")
    if gpu_of_device(names[0]) is None:
        return skipped("memory", f"{names[0]} is not in the table of GPUs")
    try:
        plan = make_plan(config, choose_machine(config, names[0], len(names), len(names)))
    except LonghaulError as error:
        return refused("memory", error)
    text = f"{gib(plan.memory.total)} a GPU on {len(names)} x {plan.machine.name}, foreseen"
    if not plan.fits:
        return failure(
            "memory", f"{text}: {lack(plan)}", "Use what `longhaul plan CONFIG --gpus N` finds, or more GPUs."
        )
    return ok("memory", f"{text}; {gib(plan.free_bytes)} are left")
