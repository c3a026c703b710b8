"""Adapters alone in peft's format, which transformers loads onto an export of their base.

Several published layers may be one of ours: they share A, and each gets its rows of B, which is the same product.
"""

from __future__ import annotations

import json
import os
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.checkpoints.adapters import BASE
from pretrain.checkpoints.run_folder import EXPORT_REPORT, newest_good, place_of_run
from pretrain.errors import ConfigError, ExportError
from pretrain.formats.family_table import check_exported, export_tensors, published_layers
from pretrain.formats.partial_export import complete_or_absent
from pretrain.options.families import ModelShape, resolve_shape
from pretrain.options.settings import parse_config
from pretrain.storage.tensor_files import TensorFile, write_tensors
from pretrain.storage.whole_file import write_text
from pretrain.tokenizers.tokenizer_files import open_tokenizer
from pretrain.transformer.lora_layers import A, B, scale_of

_PREFIX = "base_model.model."  # peft's, before the names of transformers
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"


def export_adapter(
    run: str | Path, out: str | Path, step: int | None = None, dtype: str | None = None
) -> dict[str, Any]:
    """Write a run's adapters, read them back and compare what they add, complete or not at all.

    Args:
        run: run folder, tuned with `train.lora`.
        out: folder to make; it must not exist, or be empty.
        step: checkpoint; the newest good one by default.
        dtype: `bf16`, `fp16` or `fp32`; the one that the run trained in by default.

    Returns:
        What was verified, as it stands in `verification.json`.

    Raises:
        ConfigError: `out` is taken, there is no such step, or the run has no adapters.
        CheckpointError: the checkpoint is damaged.
        ExportError: the family is not exported, or it could not be written, or does not come back.
    """
    out, run = Path(os.path.abspath(out)), Path(run)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(
            f"{out}: exists already; expected no such folder, or an empty one. Delete it or name another."
        )
    if dtype is not None and dtype not in _DTYPES:
        raise ConfigError(f"--dtype is {dtype}; expected one of {', '.join(_DTYPES)} for --to peft.")
    reader = newest_good(run, place_of_run(run), step)
    if BASE not in reader.training:
        raise ConfigError(f"{run}: has no adapters; expected a run with train.lora. Export the whole model by --to hf.")
    config = parse_config(reader.manifest["about"]["config"])
    section = config.train.lora
    assert section is not None
    shape = resolve_shape(config.model, open_tokenizer(config.tokenizer, run).vocab_size, config.data.max_seq_len)
    check_exported(shape, str(run))
    tensors, targets, transposed = _published(shape, {name: reader.read_whole(name) for name in reader.shapes})
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True, "bias": "none", "lora_dropout": 0.0,
        "base_model_name_or_path": None, "r": section.rank, "lora_alpha": section.alpha, "target_modules": targets,
        "fan_in_fan_out": transposed,
    }  # fmt: skip
    kind = _DTYPES[dtype or config.train.precision]
    tensors = {name: tensor.to(kind).contiguous() for name, tensor in tensors.items()}
    report: dict[str, Any] = {
        "source": {"run": run.resolve().name, "step": reader.manifest["step"], "base": reader.training[BASE]},
        "dtype": str(kind).removeprefix("torch."), "target_modules": targets,
    }  # fmt: skip
    with closing(reader), complete_or_absent(out) as partial:
        write_tensors(partial / _WEIGHTS, tensors, {"format": "pt"})
        write_text(partial / _CONFIG, json.dumps(settings, indent=2) + "\n")
        rounded = {name: reader.read_whole(name).to(kind).float() for name in reader.shapes}
        report["largest_difference"] = _compare(shape, partial / _WEIGHTS, tensors, rounded, scale_of(section))
        write_text(partial / EXPORT_REPORT, json.dumps(report, indent=2) + "\n")
    return report


def _published(shape: ModelShape, adapters: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str], bool]:
    """Adapters by peft's names, the names of the layers that have some, and whether their weights are transposed."""
    tensors: dict[str, Tensor] = {}
    targets: dict[str, bool] = {}
    for layer in sorted({name.rpartition(".")[0] for name in adapters}):
        a, b = adapters[f"{layer}.{A}"], adapters[f"{layer}.{B}"]
        begin = 0
        for published, num_rows, transposed in published_layers(shape, f"{layer}.weight"):
            rows = num_rows or len(b)
            tensors[f"{_PREFIX}{published}.lora_A.weight"] = a.clone()
            tensors[f"{_PREFIX}{published}.lora_B.weight"] = b[begin : begin + rows]
            targets[".".join(published.split(".")[-2:])] = transposed
            begin += rows
    return tensors, sorted(targets), any(targets.values())


def _compare(
    shape: ModelShape, path: Path, written: dict[str, Tensor], adapters: dict[str, Tensor], scale: float
) -> float:
    """Compare what the file adds to each published weight with what the adapters add to ours; the largest difference.

    Raises:
        ExportError: a weight gets something else.
    """
    file, largest = TensorFile(path), 0.0

    def read(name: str) -> Tensor:
        return file.read(name, 0, len(written[name])).float()

    for layer in sorted({name.rpartition(".")[0] for name in adapters}):
        added = scale * (adapters[f"{layer}.{B}"] @ adapters[f"{layer}.{A}"])
        is_transposed = published_layers(shape, f"{layer}.weight")[0][2]
        for name, wanted in export_tensors(shape, [(f"{layer}.weight", added)]):
            stem = _PREFIX + name.removesuffix(".weight")
            got = scale * (read(f"{stem}.lora_B.weight") @ read(f"{stem}.lora_A.weight"))
            wanted = wanted.t() if is_transposed else wanted
            difference = float((got - wanted).abs().max())
            if not difference <= 1e-5 * max(float(wanted.abs().max()), 1e-12):
                raise ExportError(
                    f"{name}: the exported adapter adds up to {difference:.3g} more or less than ours; expected the "
                    "same. Nothing was exported; report this with the run's config.yaml."
                )
            largest = max(largest, difference)
    return largest
