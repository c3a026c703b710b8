"""Export to Hugging Face's format, and the proof that transformers computes the same from it.

Every file is written by our own hand: transformers' `save_pretrained` changes the tokenizer's class, drops
`tokenizer.model` and writes only one of the two styles of RoPE's options. transformers serves for one thing: it loads
what was written as a user will, and what it computes is compared with the trained model.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import pretrain
from pretrain.errors import ExportError
from pretrain.families import ModelShape
from pretrain.family_table import check_exported, export_tensors, ignored_options, import_tensors, published_config
from pretrain.model import Transformer
from pretrain.model_card import model_card
from pretrain.run_folder import LoadedRun
from pretrain.tensor_files import write_tensors, write_text
from pretrain.tokenizer import Tokenizer
from pretrain.tokenizer_export import export_tokenizer

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MAX_SHARD_BYTES = 5_000_000_000  # what the Hub advises: larger files are slow to fetch again

# The largest allowed difference of a logit, relative to the largest logit of its row. Both sides compute in fp32 from
# the same weights and differ at most in the order of sums. Measured on random models of 8 and 48 layers at three scales
# of weights, rows of 256 to 1024 tokens: 0 in all families but gpt2, windows and scaled RoPE included; gpt2 5e-7 to
# 1.8e-6. Mistakes (docs/notes/0005-families.md): exact GELU for the tanh form from 6e-5 up, norm_eps of 1e-6 for 1e-5
# from 1.3e-4, YaRN without its attention factor from 6e-3, unscaled RoPE from 1e-2, a window off by one from 3e-2.
LOGIT_TOLERANCE = 5e-5
NUM_TEXTS = 10_000


def export_hf(
    loaded: LoadedRun,
    out_dir: Path,
    dtype: str,
    rows: Mapping[str, Sequence[Tensor]],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> dict[str, Any]:
    """Write a model in Hugging Face's format and verify it by loading it with transformers.

    The weights of `loaded.model` are rounded to `dtype` in place, so that what is compared, in fp32, is the exported
    model, and no second copy of it is held.

    Args:
        loaded: the trained model and where it comes from.
        out_dir: an existing, empty folder; it holds an incomplete export if an error is raised.
        dtype: `bf16`, `fp16` or `fp32`.
        rows: token ids to compare logits on, by where they are from, each int64 [T] with T <= seq_len.
        max_shard_bytes: size at which the weights go on in another file.

    Returns:
        What was verified, as it stands in `verification.json`.

    Raises:
        ExportError: the family is not exported, a weight is not finite or not in the family's table, or transformers
            computes something else.
        OSError: a file could not be written.
    """
    shape, tokenizer = loaded.model.shape, loaded.tokenizer
    check_exported(shape, str(loaded.run))
    _round_weights(loaded.model, DTYPES[dtype])
    files = _write_weights(loaded, out_dir, DTYPES[dtype], max_shard_bytes)
    _write_json(out_dir / "config.json", _hf_config(shape, tokenizer, DTYPES[dtype]))
    _write_json(out_dir / "generation_config.json", _generation_config(tokenizer))
    samples = [tokenizer.decode(row.tolist()) for kind in rows.values() for row in kind]
    report = {
        "source": source_of(loaded),
        "dtype": dtype,
        "files": files,
        "versions": _versions(),
        "logits": verify_model(loaded.model, out_dir, rows),
        "tokenizer": export_tokenizer(tokenizer, out_dir, shape.seq_len, samples, NUM_TEXTS, load_tokenizer),
        "ignored_by": ignored_options(shape),
    }
    _write_json(out_dir / "verification.json", report)
    write_text(out_dir / "README.md", model_card(shape, report))
    return report


def source_of(loaded: LoadedRun) -> dict[str, Any]:
    """Return what identifies the trained model: run, step, tokens, and hashes of its config and tokenizer."""
    config = loaded.config.model_dump_json()
    return {
        "run": loaded.run.resolve().name,
        "checkpoint": loaded.checkpoint,
        "step": loaded.step,
        "tokens": loaded.num_tokens,
        "config_sha256": hashlib.sha256(config.encode()).hexdigest(),
        "tokenizer_sha256": loaded.tokenizer.fingerprint,
    }


@torch.no_grad()
def _round_weights(model: nn.Module, dtype: torch.dtype) -> None:
    # Parameters only: `model.to(bfloat16)` would also round RoPE's frequencies, which clients compute in fp32.
    for name, parameter in model.named_parameters():
        parameter.copy_(parameter.to(dtype))
        if not torch.isfinite(parameter).all():
            raise ExportError(
                f"{name}: holds NaN or infinity as {dtype}; expected finite weights. Export as fp32 or bf16 (--dtype), "
                "and if that fails too, an earlier checkpoint (--step)."
            )


def _write_weights(
    loaded: LoadedRun, out_dir: Path, dtype: torch.dtype, max_shard_bytes: int
) -> dict[str, dict[str, Any]]:
    """Write `model.safetensors`, or shards and their index; returns size and sha256 by file name."""
    metadata = {"format": "pt", **{key: str(value) for key, value in source_of(loaded).items()}}
    metadata |= {f"{name}_version": version for name, version in _versions().items()}
    shards: list[list[str]] = []
    files: dict[str, dict[str, Any]] = {}
    held: dict[str, Tensor] = {}
    total_bytes = 0

    def write_shard() -> None:
        partial = f"model-{len(shards) + 1:05}.safetensors"  # the number of shards is not known yet
        num_bytes, sha256 = write_tensors(out_dir / partial, held, metadata)
        shards.append(list(held))
        files[partial] = {"bytes": num_bytes, "sha256": sha256}
        held.clear()

    for name, tensor in export_tensors(loaded.model.shape, loaded.model.named_parameters()):
        tensor = tensor.detach().to(dtype).clone(memory_format=torch.contiguous_format)
        if held and sum(other.nbytes for other in held.values()) + tensor.nbytes > max_shard_bytes:
            write_shard()
        held[name] = tensor
        total_bytes += tensor.nbytes
    write_shard()

    weight_map: dict[str, str] = {}
    renamed: dict[str, dict[str, Any]] = {}
    for number, (names, (partial, described)) in enumerate(zip(shards, files.items(), strict=True), 1):
        final = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        (out_dir / partial).rename(out_dir / final)
        weight_map |= dict.fromkeys(names, final)
        renamed[final] = described
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        _write_json(out_dir / "model.safetensors.index.json", index)
    return renamed


def _hf_config(shape: ModelShape, tokenizer: Tokenizer, dtype: torch.dtype) -> dict[str, Any]:
    dtype_name = str(dtype).removeprefix("torch.")
    return {
        **published_config(shape),
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
        "dtype": dtype_name,  # transformers 5
        "torch_dtype": dtype_name,  # transformers 4 and llama.cpp
        "transformers_version": transformers.__version__,
    }


def _generation_config(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
        "do_sample": False,
        "transformers_version": transformers.__version__,
    }


def _versions() -> dict[str, str]:
    libraries = ("torch", "transformers", "tokenizers", "safetensors", "sentencepiece")
    return {"longhaul": pretrain.__version__} | {name: importlib.metadata.version(name) for name in libraries}


def _write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


@torch.inference_mode()
def verify_model(model: Transformer, out_dir: Path, rows: Mapping[str, Sequence[Tensor]]) -> dict[str, Any]:
    """Load an export with transformers and compare its config, weights and logits with the model's, in fp32.

    Args:
        model: the model that was exported, its weights rounded as the export's are.
        out_dir: the export.
        rows: token ids by where they are from, each int64 [T].

    Returns:
        The number of rows and tokens, the largest difference of a logit, absolute and relative, its tolerance, and
        the number of positions where the most probable token differs. At such a position the two candidates' logits
        are closer than twice the tolerance: they tie.

    Raises:
        ExportError: anything differs, naming the first row, position and token.
    """
    exported, info = _load(AutoModelForCausalLM, out_dir, dtype=torch.float32, output_loading_info=True)
    exported.eval()
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(kind):
            raise ExportError(
                f"export: transformers reports {kind} {sorted(map(str, info[kind]))[0]} of {len(info[kind])}; "
                f"expected none for {type(exported).__name__}. {_REPORT_IT}"
            )
    _compare_config(model.shape, exported.config.to_dict())
    _compare_weights(model, exported)
    largest, relative, num_ties = 0.0, 0.0, 0
    named_rows = [(f"{kind} row {index}", row) for kind in rows for index, row in enumerate(rows[kind])]
    for name, row_T in named_rows:
        ours_TV = model.logits(row_T[None])[0]
        theirs_TV = exported(input_ids=row_T[None]).logits[0]
        difference, scale, ties = _compare_logits(ours_TV, theirs_TV, f"export: {name}")
        largest, relative, num_ties = max(largest, difference), max(relative, difference / scale), num_ties + ties
    return {
        "architecture": type(exported).__name__,
        "rows": {kind: len(rows[kind]) for kind in rows},
        "tokens": sum(len(row) for _, row in named_rows),
        "longest_row": max(len(row) for _, row in named_rows),
        "max_difference": largest,
        "max_relative_difference": relative,
        "relative_tolerance": LOGIT_TOLERANCE,
        "argmax_ties": num_ties,
    }


def _load(auto_class: Any, out_dir: Path, **options: Any) -> Any:
    """Load from the folder alone, as a user without network would, and without transformers' progress bars."""
    bars, verbosity = transformers.logging.is_progress_bar_enabled(), transformers.logging.get_verbosity()
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    try:
        return auto_class.from_pretrained(str(out_dir), local_files_only=True, trust_remote_code=False, **options)
    except Exception as error:  # of any class: what transformers cannot load is not an export
        if getattr(error, "name", None) == "kernels":
            raise ExportError(
                "export: transformers finds that PyPI's package `kernels` is installed and imports ours of that name; "
                "expected an environment without it. Run `pip uninstall kernels`."
            ) from error
        message = f"{type(error).__name__}: {error}"
        raise ExportError(f"export: transformers does not load it ({message}). {_REPORT_IT}") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()


def load_tokenizer(out_dir: Path) -> Any:
    """Load an export's tokenizer as a user will."""
    return _load(AutoTokenizer, out_dir)


_REPORT_IT = "Nothing was exported; report this with the run's config.yaml, it is a bug or an untested transformers."


def _compare_config(shape: ModelShape, read: dict[str, Any]) -> None:
    """Every option must be read as it was meant: norm_eps, for one, hardly moves the logits of a trained model."""
    for key, value in published_config(shape).items():
        if key == "rope_scaling":  # transformers 4's; transformers 5 puts it over rope_parameters, compared below
            continue
        got = read.get(key, read.get("rope_parameters", {}).get(key))  # transformers 5 keeps RoPE's base only there
        if got != value:
            raise ExportError(f"export: {key} is {got!r} in transformers; expected {value!r}. {_REPORT_IT}")


def _compare_weights(model: Transformer, exported: nn.Module) -> None:
    """Every weight must come back bit for bit: logits alone do not show a token's embedding that no row holds."""
    shape, left = model.shape, dict(model.named_parameters())
    tensors = dict(exported.state_dict())
    if shape.tie_embeddings:
        tensors.pop("lm_head.weight", None)
    for name, returned in import_tensors(shape, tensors):
        if name not in left:
            raise ExportError(f"{name}: transformers made up this parameter; expected only the model's. {_REPORT_IT}")
        # Compared as they are published, since the padding of the vocabulary does not come back.
        ours, theirs = (export_tensors(shape, [(name, tensor)]) for tensor in (left.pop(name), returned))
        for (published_name, wanted), (_, got) in zip(ours, theirs, strict=True):
            if not torch.equal(got, wanted):
                raise ExportError(f"{published_name}: comes back altered; expected the same bits. {_REPORT_IT}")
    if left:
        raise ExportError(f"{next(iter(left))}: does not come back; expected every parameter. {_REPORT_IT}")


def _compare_logits(ours_TV: Tensor, theirs_TV: Tensor, where: str) -> tuple[float, float, int]:
    """Return the largest difference, the largest logit and the number of ties; raise if a difference is too large."""
    if ours_TV.shape != theirs_TV.shape:
        raise ExportError(
            f"{where}: logits are {tuple(theirs_TV.shape)} in transformers; expected {tuple(ours_TV.shape)}. "
            f"{_REPORT_IT}"
        )
    scale = max(float(ours_TV.abs().max()), torch.finfo(torch.float32).tiny)
    difference_TV = (ours_TV - theirs_TV).abs()
    largest = float(difference_TV.max())
    if not largest <= LOGIT_TOLERANCE * scale:  # written so that NaN fails
        bad = difference_TV.nan_to_num(torch.inf).amax(1) > LOGIT_TOLERANCE * scale
        position = int(bad.nonzero()[0])
        token = int(difference_TV[position].nan_to_num(torch.inf).argmax())
        raise ExportError(
            f"{where}, position {position}: the logit of token {token} is {float(theirs_TV[position, token]):.6g} in "
            f"transformers; expected {float(ours_TV[position, token]):.6g} within {LOGIT_TOLERANCE * scale:.2g} "
            f"(largest difference in the row: {largest:.3g}). {_REPORT_IT}"
        )
    return largest, scale, int((ours_TV.argmax(1) != theirs_TV.argmax(1)).sum())


def resolved_config(folder: Path) -> dict[str, Any]:
    """Return what transformers reads in a folder's `config.json`, with every default.

    Raises:
        ExportError: it does not read it.
    """
    return _loaded_from(AutoConfig, folder).to_dict()


@dataclass
class Reference:
    """What transformers computes from a published model, in fp32.

    Args:
        architecture: the class.
        logits: of the last positions of each row, `[positions, V]`.
        greedy: tokens that continue the prompt, each the most probable of V.
        greedy_logits: `[tokens, V]`, from which they were taken.
    """

    architecture: str
    logits: list[Tensor]
    greedy: list[int]
    greedy_logits: Tensor


@torch.inference_mode()
def reference_of(
    folder: Path, rows: Sequence[Tensor], num_positions: int, prompt_T: Tensor, num_tokens: int, vocab_size: int
) -> Reference:
    """Compute logits and a greedy continuation with transformers; the model is gone when this returns.

    Args:
        folder: the published model.
        rows: token ids, each int64 [T].
        num_positions: of each row whose logits are kept, the last ones.
        prompt_T: token ids to continue.
        num_tokens: how many follow.
        vocab_size: V, of which tokens are taken and logits kept.

    Raises:
        ExportError: transformers does not load it, or makes up some of its weights.
    """
    model, info = _loaded_from(AutoModelForCausalLM, folder, dtype=torch.float32, output_loading_info=True)
    for kind in ("missing_keys", "mismatched_keys"):
        if info.get(kind):
            raise ExportError(
                f"{folder}: transformers reports {kind} {sorted(map(str, info[kind]))[0]}; expected none."
            )
    model.eval()
    logits = [
        model(input_ids=row_T[None], logits_to_keep=num_positions).logits[0, :, :vocab_size].clone() for row_T in rows
    ]
    greedy: list[int] = []
    steps: list[Tensor] = []
    for _ in range(num_tokens):
        tokens_BT = torch.cat((prompt_T, torch.tensor(greedy, dtype=torch.int64)))[None]
        logits_BTV = model(input_ids=tokens_BT, use_cache=False, logits_to_keep=1).logits
        steps.append(logits_BTV[0, -1, :vocab_size].clone())
        greedy.append(int(steps[-1].argmax()))
    greedy_logits = torch.stack(steps) if steps else torch.empty(0, vocab_size)
    return Reference(type(model).__name__, logits, greedy, greedy_logits)


def published_tokenizer(folder: Path, is_plain: bool = False) -> Any:
    """Load a published tokenizer by the class that it names, or plainly from its `tokenizer.json`.

    Raises:
        ExportError: transformers does not load it.
    """
    return _loaded_from(PreTrainedTokenizerFast if is_plain else AutoTokenizer, folder)


def _loaded_from(auto_class: Any, folder: Path, **options: Any) -> Any:
    try:
        return _load(auto_class, folder, **options)
    except ExportError as error:
        raise ExportError(
            f"{folder}: transformers {transformers.__version__} does not load it ({type(error.__cause__).__name__}: "
            f"{error.__cause__}); expected a model of this version. Nothing was imported."
        ) from error.__cause__
