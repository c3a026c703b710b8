"""Convert a run's checkpoint to files that other people's software loads, verified or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.errors import ConfigError, DataError, ExportError
from pretrain.families import resolve_shape
from pretrain.family_table import check_exported
from pretrain.run_folder import CONFIG_FILE, LoadedRun, load_run
from pretrain.settings import load_config
from pretrain.stream import ValRows
from pretrain.tensor_files import sync_folder

FORMATS = ("hf",)
MAX_ROWS, MAX_TOKENS = 4, 8192  # of whole rows; for 7B weights 8192 tokens are 2.3e14 operations, both sides together


def convert(
    run: str | Path, out: str | Path, step: int | None = None, to: str = "hf", dtype: str | None = None
) -> dict[str, Any]:
    """Export a checkpoint, verify the export and put it in its place, complete or not at all.

    Args:
        run: run folder.
        out: folder to make; it must not exist, or be empty.
        step: checkpoint to convert; the newest good one by default.
        to: format, one of `FORMATS`.
        dtype: precision of the weights, `bf16`, `fp16` or `fp32`; the one that the run trained in by default.

    Returns:
        What was verified, as it stands in the export's `verification.json`.

    Raises:
        ConfigError: `out` is taken, or there is no such run, step or format.
        CheckpointError: the checkpoint is damaged.
        ExportError: the family is not exported, or the export could not be written or does not compute what the
            trained model computes.
    """
    if to not in FORMATS:
        raise ConfigError(f"--to is {to!r}; expected one of {', '.join(FORMATS)}.")
    out = Path(os.path.abspath(out))
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(
            f"{out}: exists already; expected no such folder, or an empty one. Delete it or name another."
        )
    _check_family(Path(run))
    loaded = load_run(run, step)
    # transformers takes seconds to import, and what is wrong above should be said at once.
    from pretrain.hf_export import export_hf

    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        report = export_hf(loaded, partial, dtype or loaded.config.train.precision, comparison_rows(loaded))
        os.rename(partial, out)
        sync_folder(out.parent)
    except OSError as error:
        raise ExportError(
            f"{out}: cannot be written ({error}); expected a folder on a disk with room. Name another."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return report


def notes(report: Mapping[str, Any]) -> list[str]:
    """Say what is unusual about an export."""
    replaced = report["tokenizer"].get("class_replaced_because")
    return [f"tokenizer_class was replaced: {replaced}"] if replaced else []


def summary(report: Mapping[str, Any]) -> str:
    """Say what was exported, and how far it agrees."""
    logits, tokenizer = report["logits"], report["tokenizer"]
    ties = f", and {tokenizer['ties']} have other ids of the same score" if tokenizer["ties"] else ""
    return (
        f"{logits['architecture']} of step {report['source']['step']} in {report['dtype']}. "
        f"In transformers, logits of {logits['tokens']} tokens differ by at most {logits['max_difference']:.1e} "
        f"({logits['max_relative_difference']:.1e} of the largest), ids of {tokenizer['mismatches']} of "
        f"{tokenizer['texts']} texts{ties}."
    )


def _check_family(run: Path) -> None:
    """Refuse a run whose family is not exported before its checkpoint, which may take minutes, is read and verified."""
    if (run / CONFIG_FILE).exists():
        config = load_config(run / CONFIG_FILE)
        check_exported(resolve_shape(config.model, config.tokenizer.vocab_size, config.data.max_seq_len), str(run))


def comparison_rows(loaded: LoadedRun) -> dict[str, list[Tensor]]:
    """Token ids to compare logits on: held-out rows where the run's data is at hand, and random ones.

    Returns:
        Rows of int64 [T], `held-out` and `random`: one to four held-out ones, else as many random ones, all of
        `seq_len` tokens; then a random one of a few tokens and one of a single token.
    """
    vocab_size, seq_len = loaded.tokenizer.vocab_size, loaded.config.data.seq_len
    generator = torch.Generator().manual_seed(loaded.config.run.seed)
    num_rows = min(max(MAX_TOKENS // seq_len, 1), MAX_ROWS)
    held_out = _held_out_rows(loaded, num_rows)
    lengths = [seq_len] * (num_rows - len(held_out)) + [7, 1]
    random = [torch.randint(vocab_size, (length,), generator=generator) for length in lengths]
    return {"held-out": held_out, "random": random}


def _held_out_rows(loaded: LoadedRun, num_rows: int) -> list[Tensor]:
    try:
        with closing(ValRows(loaded.config, loaded.tokenizer.fingerprint, num_rows)) as held_out:
            return list(held_out.batch(range(held_out.num_rows)).tokens_BT)
    except (DataError, OSError):  # moved, deleted or damaged since: an export needs no training data
        return []
