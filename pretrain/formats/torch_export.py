"""The export to a plain state dict of torch: our names, tensors only, and the model's shape as JSON beside it.

torch writes the whole file but the weights (`skip_data`), which costs nothing: it is a hole. They stream into the
places between, one parameter at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_crc32_options, set_crc32_options, skip_data

from pretrain.checkpoints.run_folder import EXPORT_REPORT
from pretrain.checkpoints.saved_run import SavedRun
from pretrain.errors import ExportError
from pretrain.formats.hf_files import DTYPES, cast_weight, write_json
from pretrain.formats.partial_export import Part, PartialExport
from pretrain.formats.provenance import source_of, versions
from pretrain.formats.reference import REPORT_IT
from pretrain.storage.tensor_files import bytes_of

FILE, SHAPE_FILE = "model.pt", "shape.json"


def export_torch(saved: SavedRun, export: PartialExport, dtype: str) -> dict[str, Any]:
    """Write a model as a state dict, `torch.load(…, weights_only=True)`, and read it back.

    Args:
        saved: the checkpoint.
        export: the folder in the making.
        dtype: `bf16`, `fp16` or `fp32`.

    Returns:
        What was verified, as it stands in `verification.json`.

    Raises:
        ExportError: a weight is not finite, or something else comes back.
        CheckpointError: a parameter cannot be read.
        OSError: a file could not be written.
    """
    files = export.write({FILE: _parts(saved, export.folder, DTYPES[dtype])})
    shape = asdict(saved.shape) | {"rope_scaling": None}
    if saved.shape.rope_scaling is not None:
        shape["rope_scaling"] = saved.shape.rope_scaling.model_dump()
    write_json(export, SHAPE_FILE, shape)
    for name, content in saved.tokenizer.files.items():
        (export.folder / name).write_bytes(content)
    loaded = torch.load(export.folder / FILE, weights_only=True, mmap=True)
    if loaded.keys() != saved.shapes.keys():
        raise ExportError(f"{FILE}: holds {len(loaded)} tensors; expected {len(saved.shapes)}. {REPORT_IT}")
    for name, tensor in loaded.items():
        if not torch.equal(tensor, cast_weight(name, saved.read(name), DTYPES[dtype])):
            raise ExportError(f"{name}: comes back altered; expected the same bits. {REPORT_IT}")
    report = {
        "format": "torch",
        "source": source_of(saved),
        "dtype": dtype,
        "files": files,
        "versions": versions(["torch"]),
        "verified": "tensors",
        "tensors": {"architecture": f"state dict of a {saved.shape.family} model", "compared": len(loaded)},
    }
    write_json(export, EXPORT_REPORT, report)
    return report


def _parts(saved: SavedRun, folder: Path, dtype: torch.dtype) -> list[Part]:
    """What torch writes, in the order of the file: what is not weights as it stands, weights as they are made."""
    skeleton = folder / ".skeleton" / FILE
    skeleton.parent.mkdir()
    # Memory of these is never touched. A checksum could not be that of weights that come later.
    empty = {name: torch.empty(size, dtype=dtype) for name, size in saved.shapes.items()}
    try:
        with _without_checksums(), skip_data():
            torch.save(empty, skeleton)
    except RuntimeError as error:  # torch's way to say that a file cannot be written
        raise OSError(f"torch: {str(error).splitlines()[0]}") from error
    reader: Any = torch._C.PyTorchFileReader(str(skeleton))
    offsets = [reader.get_record_offset(f"data/{index}") for index in range(len(empty))]
    ends = [begin + tensor.nbytes for begin, tensor in zip(offsets, empty.values(), strict=True)]
    between = []
    with open(skeleton, "rb") as file:
        for begin, end in zip([0, *ends], [*offsets, skeleton.stat().st_size], strict=True):
            file.seek(begin)
            between.append(file.read(end - begin))
    skeleton.unlink()
    skeleton.parent.rmdir()
    parts = [Part(len(between[0]), partial(list, [between[0]]))]
    for (name, tensor), after in zip(empty.items(), between[1:], strict=True):
        parts.append(Part(tensor.nbytes + len(after), partial(_make, saved, name, dtype, after)))
    return parts


def _make(saved: SavedRun, name: str, dtype: torch.dtype, after: bytes) -> Iterator[bytes | memoryview]:
    yield bytes_of(cast_weight(name, saved.read(name), dtype).contiguous())
    yield after


@contextmanager
def _without_checksums() -> Iterator[None]:
    before = get_crc32_options()
    set_crc32_options(False)
    try:
        yield
    finally:
        set_crc32_options(before)
