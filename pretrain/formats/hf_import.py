"""Import from Hugging Face's format: a run folder with a checkpoint of step 0, and the proof that it is the same model.

What is written is read back and compared with the source: every weight bit for bit, logits and a greedy continuation
with what transformers computes, and the tokenizer's ids. The two models are never in memory together.
"""

from __future__ import annotations

import ast
import gc
import json
import math
import os
import shutil
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pretrain import __version__
from pretrain.checkpoints.checkpoint_files import CheckpointReader
from pretrain.checkpoints.run_folder import CONFIG_FILE, load_run
from pretrain.checkpoints.weights_checkpoint import write_weights
from pretrain.errors import CheckpointError, ConfigError, ExportError
from pretrain.formats.added_tokens import AddedTokens
from pretrain.formats.family_table import export_tensors, import_tensors
from pretrain.formats.hf_config import PublishedConfig, check_config, family_of, read_config
from pretrain.formats.hf_tensors import HubTensors, Resized
from pretrain.formats.import_check import check_model, comparison_rows
from pretrain.formats.import_tokenizer import choose_tokenizer, keep_tokenizer
from pretrain.formats.partial_export import complete_or_absent
from pretrain.formats.published import PUBLISHED_MODELS
from pretrain.formats.start_config import start_config, start_yaml
from pretrain.options.families import ModelShape
from pretrain.options.settings import parse_config, resolved_yaml
from pretrain.planning.plan_shapes import parameter_shapes
from pretrain.storage.tensor_files import check_space, sha256_of
from pretrain.storage.whole_file import write_text
from pretrain.tokenizers.tokenizer import CARRIED_FILES, Tokenizer

NUM_TEXTS = 10_000
REPORT, START = "import.json", "continue.yaml"
_CHECKED_ROWS = 1024  # compared at once: each in fp32 is a copy


@dataclass(frozen=True)
class _Source:
    """A published model: its folder, config, family and weights."""

    folder: Path
    raw: dict[str, Any]
    resolved: dict[str, Any]
    config: PublishedConfig
    tensors: HubTensors

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Names of the tensors with one row a token."""
        weights = PUBLISHED_MODELS[self.config.options["family"]].weights
        return tuple(weight.theirs[0] for weight in weights if weight.vocabulary)


def import_hf(folder: str | Path, out: str | Path, added: AddedTokens | None = None) -> dict[str, Any]:
    """Make a run folder of a published model, verify it and put it in its place, complete or not at all.

    Args:
        folder: the published model: `config.json`, weights and tokenizer.
        out: run folder to make; it must not exist, or be empty.
        added: more tokens for its vocabulary.

    Returns:
        What was verified, as it stands in `import.json` in the run folder.

    Raises:
        ConfigError: `out` is taken, there is no such folder, or the model is of an architecture or has an option that
            is not known.
        ExportError: a file is missing or damaged, or the imported model does not compute what transformers does.
    """
    folder, out, added = Path(os.path.abspath(folder)), Path(os.path.abspath(out)), added or AddedTokens()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(
            f"{out}: exists already; expected no such folder, or an empty one. Delete it or name another."
        )
    raw = _read_raw(folder)
    family_of(raw, f"{folder}/config.json")
    # transformers takes seconds to import, and what is wrong above should be said at once.
    from pretrain.formats.hf_export import published_tokenizer, resolved_config

    source = _open(folder, raw, resolved_config(folder))
    sample = _sample_text()
    tokenizer, tokens_report = choose_tokenizer(folder, raw, published_tokenizer, [sample], NUM_TEXTS)
    if tokenizer.vocab_size > source.config.vocab_size:
        raise ExportError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size:,} ids, and config.json says vocab_size "
            f"{source.config.vocab_size:,}; expected no more. It is another model's tokenizer, or has tokens that the "
            f"model was not trained with, from {tokenizer.name_of(source.config.vocab_size)!r} on: remove these from "
            "its files, and add them by --add-tokens if you need them."
        )
    shape = check_config(source.config, source.resolved, tokenizer.vocab_size, f"{folder}/config.json")
    _check_names(source, shape)
    with complete_or_absent(out) as partial:
        return _import(source, shape, tokenizer, tokens_report, added, sample, partial, out)


def _read_raw(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_bytes())
    except OSError as error:
        mend = "Download it whole, such as by `huggingface-cli download NAME --local-dir DIR`."
        if (folder / CONFIG_FILE).is_file():
            mend = "This is a run folder, which --to converts; training goes on from it by resume.from."
        raise ConfigError(
            f"{path}: is not readable ({error.strerror}); expected a folder in Hugging Face's format, with "
            f"config.json, weights and tokenizer. {mend}"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{path}: is not JSON ({error}); expected it to be. Copy the model again.") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: holds no keys; expected an object of JSON. Copy the model again.")
    return raw


def _open(folder: Path, raw: dict[str, Any], resolved: dict[str, Any]) -> _Source:
    config = read_config(raw, resolved, f"{folder}/config.json")
    prefix = PUBLISHED_MODELS[config.options["family"]].weights[0].theirs[0].partition(".")[0] + "."
    return _Source(folder, raw, resolved, config, HubTensors(folder, prefix))


def _check_names(source: _Source, shape: ModelShape) -> None:
    """Refuse weights that lack a tensor or have one too many, before any is written."""
    empty = ((name, torch.empty(size, device="meta")) for name, size in parameter_shapes(shape).items())
    expected = {name for name, _ in export_tensors(shape, empty)}
    given, model = set(_without_tied(source, shape)), source.config.options["family"]
    if missing := sorted(expected - given):
        tie = missing == list(source.vocabulary[1:])
        raise ExportError(
            f"{source.folder}: {missing[0]} ({len(missing)} such) is in no file of weights; expected it in the {model} "
            "that config.json describes. "
            + ("If the output layer is the embedding, set tie_word_embeddings to true there; else c" if tie else "C")
            + "opy the model again."
        )
    if more := sorted(given - expected):
        raise ExportError(
            f"{source.folder}: {more[0]} ({len(more)} such) is a tensor without a place in the {model} that "
            "config.json describes; expected none. It is a model of another architecture or depth: use its own "
            "config.json."
        )


def _sample_text() -> str:
    """Real text that is on every machine: a module of Python's standard library."""
    path = Path(sysconfig.get_paths()["stdlib"]) / "argparse.py"
    return path.read_text(encoding="utf-8") if path.is_file() else str(ast.__doc__)


def _import(
    source: _Source, shape: ModelShape, tokenizer: Tokenizer, tokens_report: dict[str, Any], added: AddedTokens,
    sample: str, partial: Path, out: Path,
) -> dict[str, Any]:  # fmt: skip
    """Write everything to `partial`, which becomes `out`, and verify it."""
    num_ids = tokenizer.vocab_size
    for name in CARRIED_FILES:
        if (source.folder / name).is_file():
            shutil.copyfile(source.folder / name, partial / name)
    tokenizer = keep_tokenizer(tokenizer, added, source.folder, partial, NUM_TEXTS)
    shape = replace(shape, vocab_size=tokenizer.vocab_size, padded_vocab_size=-(-tokenizer.vocab_size // 128) * 128)
    shapes = parameter_shapes(shape)
    try:
        check_space(partial, 4 * sum(math.prod(size) for size in shapes.values()), len(shapes) + 16)
    except CheckpointError as error:
        needed = str(error).partition(". ")[0]  # its advice is for checkpoints of a run
        raise ExportError(f"{out}: {needed}; expected a folder on a disk with room. Name another.") from None
    config = parse_config(start_config(source.config, tokenizer, partial, out))
    about = provenance(source)
    resized = Resized(_without_tied(source, shape), source.vocabulary, num_ids, len(added))
    checkpoint = write_weights(
        partial / "checkpoints", import_tensors(shape, resized), shapes, config, tokenizer.fingerprint, about
    )
    write_text(partial / CONFIG_FILE, resolved_yaml(config))
    write_text(partial / START, start_yaml(source.config, shape, tokenizer, partial, out))
    _check_weights(checkpoint, shape, source, num_ids)
    report = {
        "source": about,
        "family": shape.family,
        "notes": list(source.config.notes),
        "left_out": source.tensors.buffers,
        "tokenizer": tokens_report | {"added": [*added.special, *added.symbols]},
        "vocabulary": {"published": source.config.vocab_size, "tokenizer": num_ids, "imported": tokenizer.vocab_size,
                       "trimmed": source.config.vocab_size - num_ids, "added": len(added)},
        "logits": _compare(source, shape, tokenizer, num_ids, sample, partial),
    }  # fmt: skip
    write_text(partial / REPORT, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    return report


def provenance(source: _Source) -> dict[str, Any]:
    """Return where a model is from: the folder's name, what its config says of itself, and sha256 of its files."""
    names = ["config.json", *source.tensors.files, "tokenizer.model", "tokenizer.json"]
    files = [source.folder / name for name in names]
    return {
        "format": "hf",
        "folder": source.folder.name,
        "name": source.raw.get("_name_or_path") or source.folder.name,
        "architectures": source.raw.get("architectures"),
        "dtype": source.raw.get("dtype") or source.raw.get("torch_dtype"),
        "longhaul": __version__,
        "sha256": {path.name: sha256_of(path) for path in files if path.is_file()},
    }


def _without_tied(source: _Source, shape: ModelShape) -> Mapping[str, torch.Tensor]:
    """The tensors without an output layer that is the embedding once more."""
    embedding, *output = source.vocabulary
    if not shape.tie_embeddings or output[0] not in source.tensors:
        return source.tensors
    if not torch.equal(source.tensors[embedding], source.tensors[output[0]]):
        raise ExportError(
            f"{source.folder}: {output[0]} is not {embedding}, and tie_word_embeddings is true; expected the same "
            "weights. "
            "Copy the model again, or set it to false in config.json."
        )
    return _Without(source.tensors, output[0])


class _Without(Mapping[str, torch.Tensor]):
    def __init__(self, tensors: Mapping[str, torch.Tensor], name: str) -> None:
        self._tensors, self._names = tensors, [one for one in tensors if one != name]

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _check_weights(checkpoint: Path, shape: ModelShape, source: _Source, num_ids: int) -> None:
    """Compare what the checkpoint holds with the source, bit for bit, one tensor at a time."""
    reader = CheckpointReader(checkpoint)
    reader.verify()
    for name in reader.shapes:
        for published, tensor in export_tensors(shape, [(name, reader.read_whole(name))]):
            num_rows = num_ids if published in source.vocabulary else len(tensor)
            theirs = source.tensors[published][:num_rows]
            parts = zip(tensor[:num_rows].split(_CHECKED_ROWS), theirs.split(_CHECKED_ROWS), strict=True)
            if not all(torch.equal(one, other.to(torch.float32)) for one, other in parts):
                raise ExportError(
                    f"{published}: is another one in the checkpoint; expected the same bits. The disk does not keep "
                    "what is "
                    "written, or this is a bug: report it with the model's config.json."
                )
    reader.close()


def _compare(
    source: _Source, shape: ModelShape, tokenizer: Tokenizer, num_ids: int, sample: str, partial: Path
) -> dict[str, Any]:
    """Compare what the imported model computes with transformers, which goes first and is gone then."""
    from pretrain.formats.hf_export import LOGIT_TOLERANCE, reference_of

    rows = comparison_rows(shape, num_ids, [token for token in tokenizer.encode(sample) if token < num_ids])
    reference = reference_of(source.folder, list(rows.rows.values()), rows.num_positions, rows.prompt_T,
                             rows.num_new_tokens, num_ids)  # fmt: skip
    gc.collect()
    return check_model(load_run(partial).model, rows, reference, LOGIT_TOLERANCE)
