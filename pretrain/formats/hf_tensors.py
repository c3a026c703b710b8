"""The weights of a folder in Hugging Face's format, read one tensor at a time."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from pretrain.errors import CheckpointError, ExportError
from pretrain.storage.tensor_files import TensorFile

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# What old versions of transformers saved beside the weights: RoPE's frequencies and GPT-2's causal masks.
_BUFFERS = re.compile(r"\.rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$")
_COPY_IT = "Copy the model again."
_PICKLE = "pytorch_model.bin"


class HubTensors(Mapping[str, Tensor]):
    """The weights by name; each is read when it is asked for.

    Attributes:
        files: names of the files that hold them.
        buffers: names of tensors that are no weights, and left out.
    """

    def __init__(self, folder: Path, prefix: str) -> None:
        """Open the files; no tensor is read, except from `pytorch_model.bin`, which is memory-mapped.

        Args:
            folder: holds `model.safetensors` or `pytorch_model.bin`, or an index and the shards that it names.
            prefix: with which the names of all weights but the output layer's begin; added where a file lacks it.

        Raises:
            ExportError: a file is missing or damaged, a pickle needs more than tensors, or a name is in two files.
        """
        self.files, named = _files(folder)
        self._place: dict[str, tuple[Mapping[str, Tensor], str]] = {}
        self.buffers: list[str] = []
        for file in self.files:
            opened = _open(folder / file)
            for key in opened:
                name = key if key.startswith((prefix, "lm_head.")) else prefix + key
                if _BUFFERS.search(name):
                    self.buffers.append(key)
                elif name in self._place:
                    raise ExportError(f"{folder / file}: {name} is in another file too; expected it once. {_COPY_IT}")
                else:
                    self._place[name] = opened, key
        found = {key for _, key in self._place.values()} | set(self.buffers)
        if missing := sorted(named - found):
            raise ExportError(
                f"{folder}: {missing[0]} ({len(missing)} such) is in no file; expected it, since the index names it. "
                f"{_COPY_IT}"
            )

    def __getitem__(self, name: str) -> Tensor:
        opened, key = self._place[name]
        tensor = opened[key]
        if tensor.dtype not in _FLOATS:
            raise ExportError(
                f"{name}: the tensor is of {tensor.dtype}; expected bf16, fp16 or fp32. Use a checkpoint in one of "
                "these, and not a quantized one."
            )
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._place)

    def __len__(self) -> int:
        return len(self._place)


class Resized(Mapping[str, Tensor]):
    """Weights of which those with one row a token have other rows: some cut off, others added.

    Added rows are the mean of the rows that stay: a new token is then as likely as an average one, and changes what the
    others are least.

    Source: Hewitt 2021, "Initializing new word embeddings for pretrained language models".
    """

    def __init__(self, tensors: Mapping[str, Tensor], names: tuple[str, ...], num_kept: int, num_added: int) -> None:
        """Take the weights.

        Args:
            tensors: all weights.
            names: of those with one row a token.
            num_kept: rows that stay.
            num_added: rows that come behind them, in fp32.
        """
        self._tensors, self._names, self._num_kept, self._num_added = tensors, names, num_kept, num_added

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        if name not in self._names:
            return tensor
        kept = tensor[: self._num_kept]
        if not self._num_added:
            return kept
        grown = torch.empty(len(kept) + self._num_added, kept.shape[1], dtype=torch.float32)
        grown[: len(kept)] = kept
        grown[len(kept) :] = grown[: len(kept)].mean(0)
        return grown

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _files(folder: Path) -> tuple[list[str], set[str]]:
    """Return the files that hold the weights, and the tensors that an index names."""
    for name in ("model.safetensors", _PICKLE):
        index = folder / f"{name}.index.json"
        if index.is_file():
            try:
                weight_map = dict(json.loads(index.read_bytes())["weight_map"])
                files = sorted(set(weight_map.values()))
            except (ValueError, KeyError, TypeError) as error:
                raise ExportError(f"{index}: is not readable ({error}); expected a weight_map. {_COPY_IT}") from None
            for file in files:
                if file != Path(file).name or not (folder / file).is_file():
                    raise ExportError(
                        f"{folder / file}: is missing; expected it, since {index.name} names it. {_COPY_IT}"
                    )
            return files, set(weight_map)
        if (folder / name).is_file():
            return [name], set()
    raise ExportError(
        f"{folder}: holds no weights; expected model.safetensors, pytorch_model.bin or an index of one of them. "
        f"{_COPY_IT}"
    )


def _is_pickle(path: Path) -> bool:
    """Whether a file begins as those of torch.save do: a zip, or before torch 1.6 a bare pickle."""
    try:
        with open(path, "rb") as file:
            head = file.read(4)
    except OSError:
        return False
    return head == b"PK\x03\x04" or head[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def _open(path: Path) -> Mapping[str, Tensor]:
    if path.suffix == ".safetensors":
        try:
            return _Safetensors(TensorFile(path))
        except CheckpointError:
            if _is_pickle(path):
                raise ExportError(
                    f"{path}: is a pickle, as torch.save writes them; expected a safetensors file. Name it "
                    f"{_PICKLE}, of which tensors alone are read; or save the model as safetensors."
                ) from None
            raise ExportError(f"{path}: is not a whole safetensors file; expected one. {_COPY_IT}") from None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        # torch's own message begins with how to load it all the same, which is no mend.
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f" ({found[1]})" if found else ""
        raise ExportError(
            f"{path}: is a pickle that needs more than tensors{what}; expected tensors alone, because loading anything "
            "else can run any program. Use the model's safetensors files."
        ) from None
    except (RuntimeError, EOFError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ExportError(
            f"{path}: is not readable ({reason}); expected a file of torch.save's zip format. {_COPY_IT}"
        ) from None
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ExportError(f"{path}: holds other things than tensors; expected a state dict. {_COPY_IT}")
    return content


class _Safetensors(Mapping[str, Tensor]):
    def __init__(self, file: TensorFile) -> None:
        self._file, self._names = file, file.names()

    def __getitem__(self, name: str) -> Tensor:
        return self._file.read_whole(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
