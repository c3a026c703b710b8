"""Convert a run's checkpoint to files that other people's software loads, verified or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pretrain
from pretrain.checkpoints.checkpoint_files import manifest_digest
from pretrain.checkpoints.run_folder import CONFIG_FILE, open_run
from pretrain.checkpoints.saved_run import SavedRun
from pretrain.console import format_bytes
from pretrain.data.stream import ValRows
from pretrain.doctor.machine_check import CGROUPS, memory_limit
from pretrain.errors import ConfigError, DataError, ExportError
from pretrain.formats.family_table import check_exported
from pretrain.formats.partial_export import PartialExport, Progress
from pretrain.formats.reference import compared_positions
from pretrain.options.config import Config
from pretrain.options.families import ModelShape, num_parameters, resolve_shape
from pretrain.options.settings import load_config

FORMATS: Mapping[str, tuple[str, ...]] = {  # and the precisions that each can hold
    "hf": ("bf16", "fp16", "fp32"),
    "gguf": ("bf16", "fp16", "fp32", "q8_0"),
    "torch": ("bf16", "fp16", "fp32"),
}
MAX_SHARD_BYTES = 5_000_000_000  # what the Hub advises: larger files are slow to fetch again
# Of the rows that are compared, together and each: for 7B weights 8192 tokens are 2.3e14 operations on both sides.
MAX_ROWS, MAX_TOKENS = 4, 8192
_LIBRARY_BYTES = 600_000_000  # torch and transformers
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class ConvertOptions:
    """What is to be made.

    Args:
        to: format, one of `FORMATS`.
        dtype: precision of the weights; None: the one that the run trained in.
        max_shard_bytes: size at which Hugging Face's weights go on in another file.
        verify: `logits` or `tensors`; None: logits, if the model in fp32 fits the memory that is free.
        licence: of the weights; None: not chosen.
    """

    to: str = "hf"
    dtype: str | None = None
    max_shard_bytes: int = MAX_SHARD_BYTES
    verify: str | None = None
    licence: str | None = None


def convert(
    run: str | Path,
    out: str | Path,
    step: int | None = None,
    options: ConvertOptions = ConvertOptions(),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Export a checkpoint, verify the export and put it in its place, complete or not at all.

    What was written when a conversion was interrupted, or the disk was full, stays in a hidden folder beside `out`, and
    the same conversion goes on with it.

    Args:
        run: run folder.
        out: folder to make; it must not exist, or be empty.
        step: checkpoint to convert; the newest good one by default.
        options: what is to be made.
        progress: tells how far it is.

    Returns:
        What was verified, as it stands in the export's `verification.json`.

    Raises:
        ConfigError: `out` is taken, or there is no such run, step or format.
        CheckpointError: the checkpoint is damaged.
        ExportError: the family is not exported, or the export could not be written or does not compute what the
            trained model computes.
    """
    out = Path(os.path.abspath(out))
    _check(out, options)
    config = _config_of(Path(run))
    if config is not None:  # said before the checkpoint, which may take minutes, is read and verified
        shape = resolve_shape(config.model, config.tokenizer.vocab_size, config.data.max_seq_len)
        _check_model(shape, options.to, str(run))
    progress = progress or Progress()
    progress.tell(f"{run}: reading and verifying the checkpoint")
    with open_run(run, step) as saved:
        _check_model(saved.shape, options.to, str(run))
        return _make(saved, out, options, progress)


def _make(saved: SavedRun, out: Path, options: ConvertOptions, progress: Progress) -> dict[str, Any]:
    dtype = options.dtype or saved.config.train.precision
    verify = options.verify or _choose_verification(saved.shape, progress)
    key = {
        "checkpoint": manifest_digest(saved.manifest), "to": options.to, "dtype": dtype, "licence": options.licence,
        "max_shard_bytes": options.max_shard_bytes, "longhaul": pretrain.__version__,
    }  # fmt: skip
    discard, export = True, None
    try:
        export = PartialExport(out, key, progress)
        report = _export(saved, export, options, dtype, verify)
        export.finish()
    except OSError as error:
        discard = False
        partial = export.folder if export is not None and export.keeps_files() else None
        raise ExportError(
            f"{out}: cannot be written ({error}); expected a folder on a disk with room. "
            + (f"Free space and run the same again, which goes on with {partial}; or name another." if partial else
               "Name another.")
        ) from error  # fmt: skip
    except KeyboardInterrupt:
        discard = False
        raise
    finally:
        progress.end()
        if export is not None:
            export.close(discard=discard)
    return report


def _export(saved: SavedRun, export: PartialExport, options: ConvertOptions, dtype: str, verify: str) -> dict[str, Any]:
    """Call the exporter of the format; its libraries take seconds to import, and what is wrong is said before."""
    if options.to == "torch":
        from pretrain.formats.torch_export import export_torch

        return export_torch(saved, export, dtype)
    rows = comparison_rows(saved)
    if options.to == "gguf":
        try:
            from pretrain.formats.gguf_export import export_gguf
        except ModuleNotFoundError as error:
            if error.name != "gguf":
                raise
            raise ConfigError(
                "--to is gguf; expected the package gguf to be installed. Run: pip install 'longhaul[gguf]'"
            ) from None
        return export_gguf(saved, export, dtype, rows, verify, options.licence)
    from pretrain.formats.hf_export import export_hf

    return export_hf(saved, export, dtype, rows, options.max_shard_bytes, verify, options.licence)


def _check(out: Path, options: ConvertOptions) -> None:
    """Refuse options that mean nothing, and a place that is taken, before anything is read."""
    if options.to not in FORMATS:
        raise ConfigError(f"--to is {options.to!r}; expected one of {', '.join(FORMATS)}.")
    if options.dtype is not None and options.dtype not in FORMATS[options.to]:
        raise ConfigError(
            f"--dtype is {options.dtype}; expected one of {', '.join(FORMATS[options.to])} for --to {options.to}."
        )
    if options.max_shard_bytes < 1:
        raise ConfigError(f"--max-shard-size is {options.max_shard_bytes}; expected a size such as 5GB.")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(
            f"{out}: exists already; expected no such folder, or an empty one. Delete it or name another."
        )


def _config_of(run: Path) -> Config | None:
    return load_config(run / CONFIG_FILE) if (run / CONFIG_FILE).exists() else None


def _check_model(shape: ModelShape, to: str, where: str) -> None:
    """Refuse a model that the format has no way to say."""
    if to == "torch":
        return
    check_exported(shape, where)
    if to == "gguf":
        from pretrain.formats.gguf_tables import check_gguf

        check_gguf(shape, where)


def parse_size(text: str) -> int:
    """Return the bytes that a size such as `5GB`, `500MB` or `2GiB` means.

    Raises:
        ConfigError: it is none.
    """
    number = text.rstrip("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz").strip()
    unit = text[len(text.rstrip("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")) :].upper() or "B"
    try:
        return int(float(number) * _UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        raise ConfigError(f"--max-shard-size is {text!r}; expected a size such as 5GB, 500MB or 2GiB.") from None


def _choose_verification(shape: ModelShape, progress: Progress) -> str:
    """Compare logits where one copy of the model in fp32, a quarter more, and a row's logits fit what is free."""
    positions = len(compared_positions(min(shape.seq_len, MAX_TOKENS), shape.vocab_size))
    # Of a row both sides' logits, and what their differences are computed in. Measured: docs/notes/0033-formats.md.
    needed = 5 * num_parameters(shape) + 16 * positions * shape.vocab_size + _LIBRARY_BYTES
    free = _available_bytes()
    if free is None or needed <= free:
        return "logits"
    progress.say(
        f"note: logits are not compared: that takes {format_bytes(needed)}, and {format_bytes(free)} are free. Every "
        "tensor is compared instead; --verify logits compares logits all the same."
    )
    return "tensors"


def _available_bytes() -> int | None:
    """Return the memory that is free, of this machine or of what a container or job may have."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))
        limit = memory_limit(CGROUPS, Path("/proc/self/cgroup").read_text(encoding="utf-8"))
    except (OSError, StopIteration):
        return None
    return free if limit is None else min(free, limit)


def comparison_rows(saved: SavedRun) -> dict[str, list[Tensor]]:
    """Token ids to compare logits on: held-out rows where the run's data is at hand, and random ones.

    Returns:
        Rows of int64 [T], `held-out` and `random`: one to four held-out ones, else as many random ones, all of
        `seq_len` tokens, or the first `MAX_TOKENS`; then a random one of a few tokens, one of a single token, and where
        rows grow in later phases one of the longest.
    """
    vocab_size, seq_len = saved.tokenizer.vocab_size, min(saved.config.data.seq_len, MAX_TOKENS)
    generator = torch.Generator().manual_seed(saved.config.run.seed)
    num_rows = min(max(MAX_TOKENS // seq_len, 1), MAX_ROWS)
    held_out = [row_T[:seq_len] for row_T in _held_out_rows(saved, num_rows)]
    lengths = [seq_len] * (num_rows - len(held_out)) + [7, 1]
    if (longest := min(saved.shape.seq_len, MAX_TOKENS)) > seq_len:  # rows of a later phase, which may pass a window
        lengths.append(longest)
    random = [torch.randint(vocab_size, (length,), generator=generator) for length in lengths]
    return {"held-out": held_out, "random": random}


def _held_out_rows(saved: SavedRun, num_rows: int) -> list[Tensor]:
    try:
        with closing(ValRows(saved.config, saved.tokenizer.fingerprint, num_rows)) as held_out:
            return list(held_out.batch(range(held_out.num_rows)).tokens_BT)
    except (DataError, OSError):  # moved, deleted or damaged since: an export needs no training data
        return []


def summary(report: Mapping[str, Any], out: str | Path) -> str:
    """Say in a few lines what was made and how it was verified."""
    source, tokenizer = report["source"], report.get("tokenizer")
    found = report.get("logits") or report["tensors"]
    lines = [f"{out}: {found['architecture']} of step {source['step']} in {report['dtype']}."]
    if logits := report.get("logits"):
        lines.append(
            f"In {report.get('client', 'transformers')}, logits of {logits['tokens']} tokens differ by at most "
            f"{logits['max_difference']:.1e} ({logits['max_relative_difference']:.1e} of the largest), "
            f"{report['greedy']['equal_tokens']} tokens of greedy continuations are the same."
        )
    if tensors := report.get("tensors"):
        lines.append(f"{tensors['compared']} tensors were read back and are those of the checkpoint.")
    if tokenizer and "texts" in tokenizer:
        ties = f", and {tokenizer['ties']} have other ids of the same score" if tokenizer.get("ties") else ""
        lines.append(f"Ids of {tokenizer['mismatches']} of {tokenizer['texts']} texts differ{ties}.")
    lines += report.get("notes", [])
    return " ".join(lines)
