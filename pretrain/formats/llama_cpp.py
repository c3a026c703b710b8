"""Running an exported GGUF file in llama.cpp, where its Python package is installed, and comparing what it computes.

llama.cpp ends the process where a file is not as it expects, so it runs in one of its own: `python -m
pretrain.formats.llama_cpp REQUEST`. `llama_cpp` is llama-cpp-python; LLAMA_CPP_LIB_PATH names another build of its
library.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import subprocess
import sys
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.checkpoints.saved_run import SavedRun
from pretrain.errors import ExportError
from pretrain.formats.gguf_tokenizer import begins_texts, read_as_special
from pretrain.formats.reference import (
    REPORT_IT,
    Reference,
    compare_continuations,
    compare_logits,
    compute_reference,
    summarize,
)
from pretrain.options.families import ModelShape
from pretrain.tokenizers.tokenizer import SPACE_PIECE
from pretrain.tokenizers.varied_texts import varied_texts

ROOT = Path(__file__).resolve().parents[2]
NUM_TEXTS = 10_000
# Of a logit, relative to the largest of its row. In fp32 llama.cpp sums in another order (measured on random models of
# every family: at most 1.1e-6), but looks GELU up in a table of fp16 (6e-4). Weights of 16 and 8 bits it multiplies
# with activations that it rounds likewise (fp16 1.5e-3, bf16 1e-2, q8_0 3.1e-2).
_TOLERANCE = {"fp32": 5e-5, "fp16": 2e-2, "bf16": 5e-2, "q8_0": 8e-2}
_GELU_TOLERANCE = 5e-3
_CHUNK_TOKENS = 256  # of which all logits are held


def find_library() -> bool:
    """Whether llama.cpp's Python package is installed."""
    return importlib.util.find_spec("llama_cpp") is not None


def tolerance_of(shape: ModelShape, dtype: str) -> float:
    """Return the largest allowed difference of a logit from ours, relative to the largest of its row."""
    return max(_TOLERANCE[dtype], _GELU_TOLERANCE if shape.activation == "gelu" else 0.0)


def verify_with_llama_cpp(
    saved: SavedRun, model: Any, path: Path, dtype: str, rows: Mapping[str, Sequence[Tensor]]
) -> dict[str, Any]:
    """Compare logits, greedy continuations and token ids in llama.cpp with ours.

    Args:
        saved: the checkpoint that was exported.
        model: ours, fp32, with the weights that the file holds.
        path: the GGUF file.
        dtype: precision of the file.
        rows: token ids to compare logits on, by where they are from.

    Returns:
        `logits`, `greedy` and `tokenizer`, as in `verification.json`.

    Raises:
        ExportError: llama.cpp does not load the file, or something differs, naming the first place.
    """
    folder = path.with_name(".reference")
    reference = compute_reference(model, rows, folder)
    special = read_as_special(saved.tokenizer)
    samples = [saved.tokenizer.decode(row.tolist()).replace(SPACE_PIECE, "") for _, row in reference.named_rows()]
    texts = varied_texts(NUM_TEXTS, seed=0, samples=samples, words=list(saved.tokenizer.special_tokens()))
    texts = [text for text in texts if not any(piece in text for piece in special)]
    found = _run(path, folder, reference, texts, saved.tokenizer.special_tokens())
    tolerance, divergences, compared = tolerance_of(saved.shape, dtype), [], []
    for index, (name, _) in enumerate(reference.named_rows()):
        kept = reference.positions(index)
        ours_TV, theirs_TV = reference.logits(index), _logits(folder / f"theirs-{index}", len(kept))
        compared.append(compare_logits(ours_TV, theirs_TV, f"export: {name}", "llama.cpp", tolerance, kept))
        divergences.append(_divergence(ours_TV, theirs_TV))
    logits = {"architecture": f"{saved.shape.family} (GGUF)", **summarize(reference, compared, tolerance)}
    logits["mean_kl"] = float(torch.cat(divergences).mean())
    return {
        "logits": logits,
        "greedy": compare_continuations(reference, found["greedy"], "llama.cpp", tolerance),
        "tokenizer": _compare_ids(saved, texts, found),
    }


def _run(
    path: Path, folder: Path, reference: Reference, texts: Sequence[str], special_tokens: Iterable[str]
) -> dict[str, Any]:
    request = {
        "model": str(path),
        "rows": [row.tolist() for _, row in reference.named_rows()],
        "kept": [reference.positions(index).tolist() for index in range(len(reference.named_rows()))],
        "continuations": [[one.prompt, len(one.ids)] for one in reference.continuations],
        "texts": list(texts),
        "special": list(special_tokens),
    }
    asked, answered = folder / "request.json", folder / "answer.json"
    asked.write_text(json.dumps(request), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "pretrain.formats.llama_cpp", str(asked), str(answered)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"]
        shown = next((line for line in lines if "error" in line.lower() or "ASSERT" in line), lines[-1])
        raise ExportError(f"export: llama.cpp does not run it ({shown.strip()}). {REPORT_IT}")
    return dict(json.loads(answered.read_text(encoding="utf-8")))


def _logits(path: Path, num_tokens: int) -> Tensor:
    size = path.stat().st_size // 4
    return torch.from_file(str(path), shared=False, size=size, dtype=torch.float32).view(num_tokens, -1)


def _divergence(ours_TV: Tensor, theirs_TV: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergence of the export's distribution from ours at each position, in nats."""
    ours_TV, theirs_TV = ours_TV.log_softmax(1), theirs_TV.log_softmax(1)
    return (ours_TV.exp() * (ours_TV - theirs_TV)).sum(1)


def _compare_ids(saved: SavedRun, texts: Sequence[str], found: Mapping[str, Any]) -> dict[str, Any]:
    tokenizer = saved.tokenizer
    notes_nfc = tokenizer.files.get("tokenizer.json", b"").find(b'"NFC"') >= 0
    num_tokens = num_texts = 0
    for text, ours, theirs in zip(texts, tokenizer.encode_batch(texts), found["ids"], strict=True):
        if notes_nfc and unicodedata.normalize("NFC", text) != text:
            continue
        if ours != theirs:
            raise ExportError(
                f"export: tokenizer: ids of {text!r} are {theirs} in llama.cpp; expected {ours}. {REPORT_IT}"
            )
        num_texts, num_tokens = num_texts + 1, num_tokens + len(ours)
    for name, token_id in tokenizer.special_tokens().items():
        if (ids := found["special"][name]) != [token_id]:
            raise ExportError(
                f"export: tokenizer: {name} is {ids} in llama.cpp where special tokens are read; "
                f"expected {[token_id]}. {REPORT_IT}"
            )
    begin = [tokenizer.bos_id] if begins_texts(tokenizer, saved.step) else []
    if found["begins_with"] != begin:
        raise ExportError(
            f"export: tokenizer: llama.cpp puts {found['begins_with']} before a text; expected {begin}. {REPORT_IT}"
        )
    return {"kind": tokenizer.kind, "texts": num_texts, "tokens": num_tokens, "mismatches": 0}


class _Session:
    """llama.cpp with a model, in fp32 as far as it computes so: fp32 keys and values, no fused attention."""

    def __init__(self, path: str, num_tokens: int) -> None:
        import llama_cpp.llama_cpp as library  # type: ignore[import-not-found]

        self._library = library
        library.llama_backend_init()
        parameters = library.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self._model = library.llama_model_load_from_file(path.encode(), parameters)
        if not self._model:
            raise SystemExit("error: the model is not loaded")
        options = library.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = num_tokens, _CHUNK_TOKENS, _CHUNK_TOKENS
        options.type_k = options.type_v = 0  # GGML_TYPE_F32
        options.flash_attn_type = library.LLAMA_FLASH_ATTN_TYPE_DISABLED
        options.n_threads = options.n_threads_batch = max(torch.get_num_threads(), 1)
        self._context = library.llama_init_from_model(self._model, options)
        if not self._context:
            raise SystemExit("error: there is no context")
        self._vocabulary = library.llama_model_get_vocab(self._model)
        self._vocab_size = library.llama_vocab_n_tokens(self._vocabulary)

    def clear(self) -> None:
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)

    def logits(self, ids: Sequence[int], first: int) -> Tensor:
        """Compute the logits of tokens that follow the `first` ones before them, fp32 [T, V]."""
        library = self._library
        batch = library.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for index, token in enumerate(ids):
            batch.token[index], batch.pos[index] = token, first + index
            batch.n_seq_id[index], batch.seq_id[index][0], batch.logits[index] = 1, 0, True
        if library.llama_decode(self._context, batch):
            raise SystemExit("error: decoding failed")
        rows = [library.llama_get_logits_ith(self._context, index) for index in range(len(ids))]
        found = torch.stack([
            torch.frombuffer(ctypes.string_at(row, 4 * self._vocab_size), dtype=torch.float32).clone() for row in rows
        ])  # fmt: skip
        library.llama_batch_free(batch)
        return found

    def ids(self, text: str, special: bool = False, whole: bool = False) -> list[int]:
        """Return the ids of a text; with `special` of special tokens in it too, with `whole` as a document begins."""
        data = text.encode()
        found = (self._library.llama_token * (len(data) + 8))()
        count = self._library.llama_tokenize(self._vocabulary, data, len(data), found, len(found), whole, special)
        return list(found[:count])


def main(asked: str, answered: str) -> None:
    """Do what a request says, in the process that llama.cpp may end."""
    request = json.loads(Path(asked).read_text(encoding="utf-8"))
    longest = max([len(row) for row in request["rows"]] + [len(one) + new for one, new in request["continuations"]])
    session = _Session(request["model"], longest)
    for index, row in enumerate(request["rows"]):
        session.clear()
        with open(Path(answered).with_name(f"theirs-{index}"), "wb") as file:
            for begin in range(0, len(row), _CHUNK_TOKENS):
                logits_CV = session.logits(row[begin : begin + _CHUNK_TOKENS], begin)
                places = [place - begin for place in request["kept"][index] if 0 <= place - begin < _CHUNK_TOKENS]
                file.write(logits_CV[places].numpy().data)
    greedy = []
    for prompt, num_new in request["continuations"]:
        session.clear()
        tokens, done = list(prompt), 0
        for _ in range(num_new):
            tokens.append(int(session.logits(tokens[done:], done)[-1].argmax()))
            done = len(tokens) - 1
        greedy.append(tokens[len(prompt) :])
    answer = {
        "greedy": greedy,
        "ids": [session.ids(text) for text in request["texts"]],
        "special": {name: session.ids(name, special=True) for name in request["special"]},
        "begins_with": session.ids("", whole=True),
    }
    Path(answered).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
