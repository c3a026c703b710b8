"""The export to Hugging Face's format, and the proof that transformers computes the same from it.

transformers serves for one thing: it loads what was written as a user will, and what it computes is compared with the
trained model. Where a model of its size does not fit the memory, every tensor of the files is compared instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from pretrain.checkpoints.run_folder import EXPORT_REPORT
from pretrain.checkpoints.saved_run import SavedRun
from pretrain.errors import ExportError
from pretrain.formats.family_table import (
    check_exported,
    export_tensors,
    ignored_options,
    import_tensors,
    published_config,
)
from pretrain.formats.hf_files import (
    DTYPES,
    LIBRARIES,
    cast_weight,
    generation_config,
    hf_config,
    write_json,
    write_weights,
)
from pretrain.formats.model_card import model_card
from pretrain.formats.partial_export import PartialExport
from pretrain.formats.provenance import data_of, loss_curve, source_of, versions
from pretrain.formats.reference import (
    REPORT_IT,
    Reference,
    compare_continuations,
    compare_logits,
    compute_reference,
    summarize,
)
from pretrain.formats.tokenizer_export import export_tokenizer
from pretrain.options.families import ModelShape
from pretrain.storage.tensor_files import TensorFile

MAX_SHARD_BYTES = 5_000_000_000  # what the Hub advises: larger files are slow to fetch again

# The largest allowed difference of a logit, relative to the largest logit of its row. Both sides compute in fp32 from
# the same weights and differ at most in the order of sums. Measured on random models of 8 and 48 layers at three scales
# of weights, rows of 256 to 1024 tokens: 0 in all families but gpt2, windows and scaled RoPE included; gpt2 5e-7 to
# 1.8e-6. Mistakes (docs/notes/0005-families.md): exact GELU for the tanh form from 6e-5 up, norm_eps of 1e-6 for 1e-5
# from 1.3e-4, YaRN without its attention factor from 6e-3, unscaled RoPE from 1e-2, a window off by one from 3e-2.
LOGIT_TOLERANCE = 5e-5
NUM_TEXTS = 10_000


def export_hf(
    saved: SavedRun,
    export: PartialExport,
    dtype: str,
    rows: Mapping[str, Sequence[Tensor]],
    max_shard_bytes: int = MAX_SHARD_BYTES,
    verify: str = "logits",
    licence: str | None = None,
) -> dict[str, Any]:
    """Write a model in Hugging Face's format and verify it by loading it with transformers.

    Writing takes the memory of the largest parameter. `verify="logits"` loads the model once here and once in
    transformers, one after the other, each in fp32; `tensors` takes no more than writing.

    Args:
        saved: the checkpoint.
        export: the folder in the making; it holds an incomplete export if an error is raised.
        dtype: `bf16`, `fp16` or `fp32`.
        rows: token ids to compare logits on, by where they are from, each int64 [T] with T <= seq_len.
        max_shard_bytes: size at which the weights go on in another file.
        verify: `logits` or `tensors`.
        licence: of the weights, as the model card's head names it.

    Returns:
        What was verified, as it stands in `verification.json`.

    Raises:
        ExportError: the family is not exported, a weight is not finite or not in the family's table, or transformers
            computes something else.
        CheckpointError: a parameter cannot be read.
        OSError: a file could not be written.
    """
    shape, tokenizer, folder = saved.shape, saved.tokenizer, export.folder
    check_exported(shape, str(saved.run))
    files = write_weights(saved, export, DTYPES[dtype], max_shard_bytes)
    write_json(export, "config.json", hf_config(shape, tokenizer, DTYPES[dtype]))
    write_json(export, "generation_config.json", generation_config(tokenizer))
    samples = [tokenizer.decode(row.tolist()) for kind in rows.values() for row in kind]
    report: dict[str, Any] = {
        "format": "hf",
        "source": source_of(saved),
        "dtype": dtype,
        "files": files,
        "versions": versions(LIBRARIES),
        "tokenizer": export_tokenizer(tokenizer, folder, shape.seq_len, samples, NUM_TEXTS, load_tokenizer),
        "ignored_by": ignored_options(shape),
    }
    export.progress.tell(f"comparing {verify}")
    if verify == "logits":
        reference = compute_reference(_rounded_model(saved, DTYPES[dtype]), rows, folder / ".reference")
        report |= {"verified": "logits", **verify_model(saved, DTYPES[dtype], folder, reference)}
        _remove(reference.folder)
        if (shape.sliding_window or 0) >= report["logits"]["longest_row"]:
            report["notes"] = ["No compared row was longer than the window of attention, which was not tried."]
    else:
        report |= {"verified": "tensors", **verify_files(saved, DTYPES[dtype], folder, list(files))}
    write_json(export, EXPORT_REPORT, report)
    card = model_card(shape, report, data_of(saved), loss_curve(saved), licence)
    (folder / "README.md").write_text(card, encoding="utf-8")
    return report


def _rounded_model(saved: SavedRun, dtype: torch.dtype) -> Any:
    """The trained model in fp32, its weights rounded as the export's are."""
    model = saved.load().model
    with torch.no_grad():
        # Parameters only: `model.to(bfloat16)` would also round RoPE's frequencies, which clients compute in fp32.
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
    return model


def _remove(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def verify_model(saved: SavedRun, dtype: torch.dtype, out_dir: Path, reference: Reference) -> dict[str, Any]:
    """Load an export with transformers and compare config, weights, logits and continuations, in fp32.

    Args:
        saved: the checkpoint that was exported.
        dtype: of the exported weights.
        out_dir: the export.
        reference: what the trained model computes with weights rounded so.

    Returns:
        `logits`: as `summarize` says; `greedy`: as `compare_continuations` does.

    Raises:
        ExportError: anything differs, naming the first row, position and token.
    """
    exported, info = _load(AutoModelForCausalLM, out_dir, dtype=torch.float32, output_loading_info=True)
    exported.eval()
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(kind):
            raise ExportError(
                f"export: transformers reports {kind} {sorted(map(str, info[kind]))[0]} of {len(info[kind])}; "
                f"expected none for {type(exported).__name__}. {REPORT_IT}"
            )
    _compare_config(saved.shape, exported.config.to_dict())
    _compare_weights(saved, dtype, _untied(saved.shape, dict(exported.state_dict())))
    found = []
    with torch.inference_mode():
        for index, (name, row_T) in enumerate(reference.named_rows()):
            kept = reference.positions(index)
            # 0 means all, as where a user does not give it.
            theirs_TV = exported(input_ids=row_T[None], logits_to_keep=kept if len(kept) < len(row_T) else 0).logits[0]
            found.append(
                compare_logits(
                    reference.logits(index), theirs_TV, f"export: {name}", "transformers", LOGIT_TOLERANCE, kept
                )
            )
    logits = {"architecture": type(exported).__name__, **summarize(reference, found, LOGIT_TOLERANCE)}
    theirs = [_generate(exported, one.prompt, len(one.ids)) for one in reference.continuations]
    return {
        "logits": logits,
        "greedy": compare_continuations(reference, theirs, "transformers", LOGIT_TOLERANCE),
    }


def _generate(exported: Any, prompt: list[int], num_new: int) -> list[int]:
    tokens = torch.tensor([prompt])
    # No end and no padding: neither is a token that generation may not choose here.
    chosen = exported.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=num_new, do_sample=False, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    return chosen[0, len(prompt) :].tolist()


def verify_files(saved: SavedRun, dtype: torch.dtype, out_dir: Path, files: Sequence[str]) -> dict[str, Any]:
    """Compare every tensor of an export's files with the checkpoint, and names and shapes with transformers' model.

    Args:
        saved: the checkpoint that was exported.
        dtype: of the exported weights.
        out_dir: the export.
        files: of weights.

    Returns:
        `tensors`: transformers' class, and how many tensors were compared.

    Raises:
        ExportError: anything differs.
    """
    config = _load(AutoConfig, out_dir)
    _compare_config(saved.shape, config.to_dict())
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    tensors = {name: tensor for file in files for name, tensor in TensorFile(out_dir / file).tensors()}
    theirs = {name: tuple(one.shape) for name, one in _untied(saved.shape, dict(empty.state_dict())).items()}
    ours = {name: tuple(one.shape) for name, one in tensors.items()}
    if ours != theirs:
        name = next(name for name in [*ours, *theirs] if ours.get(name) != theirs.get(name))
        raise ExportError(
            f"export: {name} is {ours.get(name, 'not there')}; expected {theirs.get(name, 'no such tensor')} for "
            f"{type(empty).__name__} of transformers. {REPORT_IT}"
        )
    _compare_weights(saved, dtype, tensors)
    return {"tensors": {"architecture": type(empty).__name__, "compared": len(tensors)}}


def _untied(shape: ModelShape, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    if shape.tie_embeddings:
        tensors.pop("lm_head.weight", None)
    return tensors


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
        raise ExportError(f"export: transformers does not load it ({message}). {REPORT_IT}") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()


def load_tokenizer(out_dir: Path) -> Any:
    """Load an export's tokenizer as a user will."""
    return _load(AutoTokenizer, out_dir)


def _compare_config(shape: ModelShape, read: dict[str, Any]) -> None:
    """Every option must be read as it was meant: norm_eps, for one, hardly moves the logits of a trained model."""
    for key, value in published_config(shape).items():
        if key == "rope_scaling":  # transformers 4's; transformers 5 puts it over rope_parameters, compared below
            continue
        got = read.get(key, read.get("rope_parameters", {}).get(key))  # transformers 5 keeps RoPE's base only there
        if got != value:
            raise ExportError(f"export: {key} is {got!r} in transformers; expected {value!r}. {REPORT_IT}")


def _compare_weights(saved: SavedRun, dtype: torch.dtype, tensors: Mapping[str, Tensor]) -> None:
    """Every weight must come back bit for bit: logits alone do not show a token's embedding that no row holds."""
    left = dict(saved.shapes)
    for name, returned in import_tensors(saved.shape, tensors):
        if name not in left:
            raise ExportError(f"{name}: is no parameter of the model; expected only those. {REPORT_IT}")
        del left[name]
        # Compared as they are published, since the padding of the vocabulary does not come back.
        weight = cast_weight(name, saved.read(name), dtype)
        ours, theirs = (export_tensors(saved.shape, [(name, tensor)]) for tensor in (weight, returned))
        for (published_name, wanted), (_, got) in zip(ours, theirs, strict=True):
            if not torch.equal(got.to(dtype), wanted) or not torch.equal(got, wanted.to(got.dtype)):
                raise ExportError(f"{published_name}: comes back altered; expected the same bits. {REPORT_IT}")
    if left:
        raise ExportError(f"{next(iter(left))}: does not come back; expected every parameter. {REPORT_IT}")


def resolved_config(folder: Path) -> dict[str, Any]:
    """Return what transformers reads in a folder's `config.json`, with every default.

    Raises:
        ExportError: it does not read it.
    """
    return _loaded_from(AutoConfig, folder).to_dict()


@dataclass
class Computed:
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
) -> Computed:
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
    return Computed(type(model).__name__, logits, greedy, greedy_logits)


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
            f"{' '.join(str(error.__cause__).split())}); expected files that it reads. Correct them, or copy the model "
            "again."
        ) from error.__cause__
