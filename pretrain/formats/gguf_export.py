"""The export to GGUF, for llama.cpp and Ollama, with the tokenizer inside; read back and compared.

`gguf`'s writer makes the head of the file, whose places of tensors it computes; the tensors stream behind it by our own
hand, one parameter at a time, so that a file can be gone on with. Its reader is what the file is verified with, beside
llama.cpp itself where that is installed.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from pretrain.checkpoints.run_folder import EXPORT_REPORT
from pretrain.checkpoints.saved_run import SavedRun
from pretrain.errors import ExportError
from pretrain.formats.gguf_tables import (
    GGUF_MODELS,
    check_gguf,
    extra_tensors,
    gguf_keys,
    gguf_tensors,
    is_always_fp32,
    parameters_of,
)
from pretrain.formats.gguf_tokenizer import gguf_tokenizer
from pretrain.formats.hf_files import cast_weight, write_json
from pretrain.formats.llama_cpp import find_library, verify_with_llama_cpp
from pretrain.formats.partial_export import Part, PartialExport
from pretrain.formats.provenance import metadata_of, source_of, versions
from pretrain.formats.reference import REPORT_IT
from pretrain.options.families import ModelShape
from pretrain.storage.tensor_files import bytes_of
from pretrain.tokenizers.chat import TURN_BEGIN, TURN_END, speaks_chatml
from pretrain.tokenizers.tokenizer import Tokenizer
from pretrain.transformer.model import Transformer

FILE = "model.gguf"
_Type = gguf.GGMLQuantizationType
_TYPES = {"fp32": _Type.F32, "fp16": _Type.F16, "bf16": _Type.BF16, "q8_0": _Type.Q8_0}
_FILE_TYPES = {
    "fp32": gguf.LlamaFileType.ALL_F32, "fp16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}  # fmt: skip
_TORCH = {_Type.F32: torch.float32, _Type.F16: torch.float16, _Type.BF16: torch.bfloat16}
_ROWS_AT_ONCE = 1 << 24  # elements that are quantized at once: numpy makes several copies
Q8_BLOCK = 32


def export_gguf(
    saved: SavedRun, export: PartialExport, dtype: str, rows: Mapping[str, Sequence[Tensor]], verify: str,
    licence: str | None,
) -> dict[str, Any]:  # fmt: skip
    """Write `model.gguf` and a Modelfile for Ollama; read the file back, and run it where llama.cpp is installed.

    Args:
        saved: the checkpoint.
        export: the folder in the making.
        dtype: `fp32`, `fp16`, `bf16` or `q8_0`; vectors stay in fp32, rows that 32 does not divide in fp16 for `q8_0`.
        rows: token ids to compare logits on, by where they are from.
        verify: `logits`, or `tensors`: llama.cpp is not run.
        licence: of the weights; None: not chosen.

    Returns:
        What was verified, as it stands in `verification.json`.

    Raises:
        ExportError: llama.cpp cannot compute the model or give the same ids; a weight is not finite; or what is read
            back or computed is something else.
        CheckpointError: a parameter cannot be read.
        OSError: a file could not be written.
    """
    check_gguf(saved.shape, str(saved.run))
    vocabulary, notes = gguf_tokenizer(saved.tokenizer, saved.step)
    keys = _keys(saved, dtype, licence) | {f"tokenizer.{key}": value for key, value in vocabulary.items()}
    layout = [(name, _layout(saved, name, dtype)) for name in saved.shapes]
    extra = extra_tensors(saved.shape)
    infos = [
        *((name, tensor, _Type.F32) for name, tensor in extra.items()),
        *(one for _, all_ in layout for one in all_),
    ]
    head = _head(export.folder, GGUF_MODELS[saved.shape.family].architecture, keys, infos)
    parts = [Part(len(head), partial(list, [head]), is_head=True)]
    parts += [
        Part(_padded(tensor.nbytes), partial(_with_padding, [bytes_of(tensor)], tensor.nbytes))
        for tensor in extra.values()
    ]
    parts += [
        Part(sum(_padded(_size(tensor, kind)) for _, tensor, kind in all_), partial(_make, saved, name, dtype))
        for name, all_ in layout
    ]
    files = export.write({FILE: parts})
    (export.folder / "Modelfile").write_text(modelfile(saved.tokenizer), encoding="utf-8")
    export.progress.tell("reading the file back")
    report: dict[str, Any] = {
        "format": "gguf", "source": source_of(saved), "dtype": dtype, "files": files,
        "versions": versions(["torch", "gguf", "sentencepiece"]), "verified": "tensors",
        "tensors": _read_back(saved, export.folder / FILE, dtype, keys, extra), "notes": notes,
    }  # fmt: skip
    library = find_library() if verify == "logits" else None
    if library:
        export.progress.tell("comparing logits in llama.cpp")
        report |= {"verified": "logits", "client": "llama.cpp"}
        path = export.folder / FILE
        report |= verify_with_llama_cpp(saved, _model_of(saved.shape, path), path, dtype, rows)
        shutil.rmtree(export.folder / ".reference")
    elif verify == "logits":
        notes.append("llama.cpp is not installed here: it was not run (docs/conversion.md says how it is found).")
    write_json(export, EXPORT_REPORT, report)
    return report


def _keys(saved: SavedRun, dtype: str, licence: str | None) -> dict[str, Any]:
    """What the file says of the model and of where it comes from."""
    general = {
        "general.type": "model",
        "general.name": saved.run.resolve().name,
        "general.file_type": int(_FILE_TYPES[dtype]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
    }
    if licence:
        general["general.license"] = licence
    provenance = {f"longhaul.{key}": value for key, value in metadata_of(saved, ["torch", "gguf"]).items()}
    return general | provenance | gguf_keys(saved.shape)


def _layout(saved: SavedRun, name: str, dtype: str) -> list[tuple[str, Tensor, Any]]:
    """The tensors of a parameter, without data, and the type of each."""
    empty = torch.empty(saved.shapes[name], dtype=torch.float32, device="meta")
    return [(theirs, one, _type_of(theirs, one, dtype)) for theirs, one in gguf_tensors(saved.shape, [(name, empty)])]


def _type_of(name: str, tensor: Tensor, dtype: str) -> Any:
    if is_always_fp32(name, tensor):
        return _Type.F32
    return _Type.F16 if dtype == "q8_0" and tensor.shape[-1] % Q8_BLOCK else _TYPES[dtype]


def _size(tensor: Tensor, kind: Any) -> int:
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    return tensor.numel() // block * block_bytes


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // gguf.GGUF_DEFAULT_ALIGNMENT) * gguf.GGUF_DEFAULT_ALIGNMENT


def _head(folder: Path, architecture: str, keys: Mapping[str, Any], infos: Sequence[tuple[str, Tensor, Any]]) -> bytes:
    """Everything before the first tensor, as gguf writes it."""
    logging.getLogger("gguf").setLevel(logging.WARNING)
    writer = gguf.GGUFWriter(None, architecture)
    for key, value in keys.items():
        _add(writer, key, value)
    for name, tensor, kind in infos:
        writer.add_tensor_info(name, list(tensor.shape), np.dtype(np.float32), _size(tensor, kind), raw_dtype=kind)
    path = folder / ".head"
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    head = path.read_bytes()
    path.unlink()
    return head + bytes(_padded(len(head)) - len(head))


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Add a key in the type that llama.cpp reads it in."""
    kinds = gguf.GGUFValueType
    if isinstance(value, list):
        kind = {str: kinds.STRING, int: kinds.INT32, float: kinds.FLOAT32}[type(value[0])]
        writer.add_key_value(key, value, kinds.ARRAY, sub_type=kind)
    elif isinstance(value, str):
        writer.add_key_value(key, value, kinds.STRING)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    else:
        writer.add_float32(key, value)


def _make(saved: SavedRun, name: str, dtype: str) -> Iterator[bytes | memoryview]:
    weight = cast_weight(name, saved.read(name), torch.float32)
    for theirs, tensor in gguf_tensors(saved.shape, [(name, weight)]):
        kind = _type_of(theirs, tensor, dtype)
        yield from _with_padding(_encode(theirs, tensor, kind), _size(tensor, kind))


def _with_padding(buffers: Sequence[Any] | Iterator[Any], num_bytes: int) -> Iterator[Any]:
    yield from buffers
    yield bytes(_padded(num_bytes) - num_bytes)


def _encode(name: str, tensor: Tensor, kind: Any) -> Iterator[memoryview]:
    if kind in _TORCH:
        yield bytes_of(cast_weight(name, tensor, _TORCH[kind]).contiguous())
        return
    for rows in tensor.split(max(_ROWS_AT_ONCE // tensor.shape[-1], 1)):
        yield bytes_of(torch.from_numpy(gguf.quants.quantize(rows.contiguous().numpy(), kind)).contiguous())


def read_parameters(shape: ModelShape, path: Path) -> Iterator[tuple[str, Tensor]]:
    """Read our parameters back from a GGUF file, one at a time, without the padding of the vocabulary.

    Args:
        shape: of the model that is in it.
        path: the file.

    Yields:
        Name and tensor, in the file's dtype, or in fp32 if it is quantized there.

    Raises:
        ExportError: it is not a GGUF file, or holds another model.
    """
    with torch.device("meta"):
        empty = dict(Transformer(shape, 0).named_parameters())
    left = {one.name: one for one in _open(path).tensors}
    for name, parameter in empty.items():
        theirs = [key for key, _ in gguf_tensors(shape, [(name, parameter)])]
        if missing := [key for key in theirs if key not in left]:
            raise ExportError(f"{path}: has no tensor {missing[0]}; expected one for {name}. Convert again.")
        yield from parameters_of(shape, {key: _decode(left[key]) for key in theirs})


def _model_of(shape: ModelShape, path: Path) -> Transformer:
    """Our model, fp32, with the weights that a file holds."""
    with torch.device("meta"):
        model = Transformer(shape, 0)
    model.to_empty(device="cpu")
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in read_parameters(shape, path):
            parameters[name].zero_()[: len(tensor)].copy_(tensor)
    return model.eval()


def _open(path: Path) -> gguf.GGUFReader:
    try:
        return gguf.GGUFReader(path, "c")  # tensors of torch want memory that could be written
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise ExportError(f"{path}: is not readable ({error}); expected a GGUF file. Convert again.") from None


def _decode(tensor: Any) -> Tensor:
    kind, shape = tensor.tensor_type, [int(size) for size in reversed(tensor.shape)]
    if kind == _Type.BF16:
        return torch.from_numpy(np.asarray(tensor.data).view(np.int16)).view(torch.bfloat16).view(shape)
    data = tensor.data if kind in _TORCH else gguf.quants.dequantize(tensor.data, kind)
    return torch.from_numpy(np.asarray(data)).view(shape)


def _read_back(
    saved: SavedRun, path: Path, dtype: str, keys: Mapping[str, Any], extra: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Compare every key and tensor of a file with what it was to hold."""
    reader = _open(path)
    for key, value in keys.items():
        field = reader.get_field(key)
        found: Any = None if field is None else field.contents()
        wanted = np.asarray(value)
        if not np.array_equal(found, wanted.astype(np.float32) if wanted.dtype.kind == "f" else wanted):
            shown = [str(one)[:60] for one in (found, value)]
            raise ExportError(f"{path.name}: {key} is {shown[0]}; expected {shown[1]}. {REPORT_IT}")
    by_name, quantized, largest = {one.name: one for one in reader.tensors}, 0, 0.0
    for name, tensor in extra.items():
        if not torch.equal(_decode(by_name.pop(name)), tensor):
            raise ExportError(f"{name}: comes back altered; expected the same bits. {REPORT_IT}")
    left = set(by_name)
    for name in saved.shapes:
        parts = _layout(saved, name, dtype)
        own = {theirs: by_name[theirs] for theirs, _, _ in parts if theirs in left}
        left -= own.keys()
        if any(theirs not in own or own[theirs].tensor_type != kind for theirs, _, kind in parts):
            raise ExportError(
                f"{name}: its tensors are {sorted(own)}; expected {[one[0] for one in parts]}. {REPORT_IT}"
            )
        ((ours, returned),) = parameters_of(saved.shape, {theirs: _decode(one) for theirs, one in own.items()})
        error = _compare(ours, returned, saved.read(name)[: len(returned)], parts[0][2])
        if name == "embedding.weight" and len(parts) > 1 and not torch.equal(_decode(own[parts[1][0]]), returned):
            raise ExportError(f"{parts[1][0]}: differs from the embedding; expected the same. {REPORT_IT}")
        quantized += parts[0][2] == _Type.Q8_0
        largest = max(largest, error)
    if left:
        raise ExportError(f"{sorted(left)[0]}: was not written; expected only the model's tensors. {REPORT_IT}")
    result = {"architecture": f"{GGUF_MODELS[saved.shape.family].architecture} (GGUF)", "compared": len(by_name)}
    return result | ({"quantized_parameters": quantized, "largest_error_in_steps": largest} if quantized else {})


def _compare(name: str, returned: Tensor, wanted: Tensor, kind: Any) -> float:
    """Compare a parameter with the checkpoint's: exactly in its dtype, or within the step that it was quantized with.

    Returns:
        The largest difference in steps; 0 where it is exact.
    """
    if kind in _TORCH:
        if not torch.equal(returned, wanted.to(_TORCH[kind])):
            raise ExportError(f"{name}: comes back altered; expected the same bits. {REPORT_IT}")
        return 0.0
    blocks, difference = wanted.reshape(-1, Q8_BLOCK), (returned - wanted).reshape(-1, Q8_BLOCK).abs().amax(1)
    step = blocks.abs().amax(1) / 127
    # Half a step is lost by rounding, and up to 127 times 2^-11 of one because the step itself is kept in fp16; below
    # the smallest numbers of fp16 the step has fewer digits.
    if (bad := ~(difference <= 0.57 * step + 127 * 2.0**-25)).any():  # NaN is too large
        index = int(bad.nonzero()[0])
        raise ExportError(
            f"{name}: block {index} differs by {float(difference[index]):.3g}; expected at most 0.57 of its step, "
            f"{float(step[index]):.3g}. {REPORT_IT}"
        )
    return float((difference / step.clamp(min=2.0**-14)).max())


def modelfile(tokenizer: Tokenizer) -> str:
    """Return the Modelfile from which `ollama create` makes a model of the file beside it."""
    lines = [f"FROM ./{FILE}"]
    if speaks_chatml(tokenizer):
        turn = TURN_BEGIN + "{{ .Role }}\n{{ .Content }}" + TURN_END + "\n"
        lines += [
            f'TEMPLATE """{{{{ range .Messages }}}}{turn}{{{{ end }}}}{TURN_BEGIN}assistant\n"""',
            f'PARAMETER stop "{TURN_END}"',
        ]
    else:
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    lines.append(f'PARAMETER stop "{tokenizer.name_of(tokenizer.eos_id)}"')
    return "\n".join(lines) + "\n"
