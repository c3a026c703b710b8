"""An `Inspection` as one HTML page that needs nothing else: no network, no files beside it, no library."""

from __future__ import annotations

import base64
import hashlib
import math
import zlib
from pathlib import Path
from typing import Any

from torch import Tensor

from pretrain.checkpoints.run_folder import LoadedRun
from pretrain.console import format_count
from pretrain.reporting.inspection import Guess, Inspection
from pretrain.reporting.page import OUTSIDE, fill_page, save_page
from pretrain.tokenizers.tokenizer import Tokenizer

TEXT, SPECIAL, BYTES = range(3)  # kinds of tokens, as the page's script numbers them


class _Pieces:
    """The tokens that a page shows, each written once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.shown: list[tuple[int, int, str]] = []  # id, kind, text
        self._tokenizer = tokenizer
        self._special = {token_id: name for name, token_id in tokenizer.special_tokens().items()}
        self._number_of: dict[int, int] = {}

    def numbers(self, ids: list[int]) -> list[int]:
        """Return which of `shown` each id is."""
        for token_id in ids:
            if token_id not in self._number_of:
                self._number_of[token_id] = len(self.shown)
                self.shown.append((token_id, *self._show(token_id)))
        return [self._number_of[token_id] for token_id in ids]

    def _show(self, token_id: int) -> tuple[int, str]:
        data = self._tokenizer.bytes_of(token_id)
        if not data or token_id in self._special:
            return SPECIAL, self._special.get(token_id) or self._tokenizer.name_of(token_id) or f"unused id {token_id}"
        try:
            return TEXT, data.decode()
        except UnicodeDecodeError:
            return BYTES, data.hex(" ").upper()


def page_data(inspection: Inspection, tokenizer: Tokenizer, facts: dict[str, str], vocab_size: int) -> dict[str, Any]:
    """Return what a page's script reads, as JSON can hold it: numbers of three digits, losses of five.

    Args:
        inspection: what was found.
        tokenizer: that of the inspection.
        facts: name and value of what the page says at its top.
        vocab_size: of the model.
    """
    pieces = _Pieces(tokenizer)
    maps = inspection.maps_LHX
    packed = zlib.compress(maps.numpy().tobytes(), 9)
    return {
        "facts": list(facts.items()),
        "vocab": vocab_size,
        "scale": round(math.log(vocab_size), 4),
        "tokens": pieces.numbers(inspection.ids),
        "characters": _split_characters(inspection.ids, tokenizer),
        "loss": _rounded(inspection.loss_T, 5),
        "entropy": _rounded(inspection.guess.entropy_P, 5),
        "rank": inspection.guess.target_rank_P[:-1].tolist(),
        "top": _choices(inspection.guess, pieces),
        "lens": {
            "places": inspection.num_lens_places,
            "k": inspection.lens[0].ids_PK.shape[1],
            "layers": [
                _choices(guess, pieces)
                | {"target": _rounded(guess.target_prob_P), "rank": guess.target_rank_P.tolist()}
                for guess in inspection.lens
            ],
        },
        "maps": {
            "layers": maps.shape[0],
            "heads": maps.shape[1],
            "tokens": inspection.num_map_tokens,
            "values": base64.b64encode(packed).decode(),
        },
        "pieces": pieces.shown,  # last: all numbers are given by now
    }


def _choices(guess: Guess, pieces: _Pieces) -> dict[str, Any]:
    return {
        "k": guess.ids_PK.shape[1],
        "ids": pieces.numbers(guess.ids_PK.flatten().tolist()),
        "p": _rounded(guess.probs_PK.flatten()),
    }


def _rounded(values: Tensor, digits: int = 3) -> list[float]:
    return [float(f"{value:.{digits}g}") for value in values.tolist()]


def _split_characters(ids: list[int], tokenizer: Tokenizer) -> dict[int, str]:
    """Return, of tokens that hold a part of a character only, the text that they and their neighbours give together."""
    found: dict[int, str] = {}
    places, data = [], b""
    for place, token_id in enumerate(ids):
        places.append(place)
        data += tokenizer.bytes_of(token_id)
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            if error.end == len(data):  # the beginning of a character: see what follows
                continue
        else:
            if len(places) > 1:
                found |= dict.fromkeys(places, text)
        places, data = [], b""
    return found


def facts_of(run: LoadedRun, inspection: Inspection) -> dict[str, str]:
    """Say which model it is and how it does on the whole text."""
    loss_sum, num_tokens = float(inspection.loss_T.double().sum()), len(inspection.loss_T)
    num_bytes = sum(len(run.tokenizer.bytes_of(token_id)) for token_id in inspection.ids[1:])
    num_parameters = sum(parameter.numel() for parameter in run.model.parameters())
    loss = loss_sum / num_tokens
    return {
        "run": run.run.name,
        "step": f"{run.step:,}",
        "trained on": f"{format_count(run.num_tokens)} tokens",
        "model": f"{run.config.model.family}, {format_count(num_parameters)} parameters",
        "text": f"{num_tokens:,} tokens, {num_bytes:,} bytes",
        "loss": f"{loss:.4f} nats per token",
        "perplexity": f"{math.exp(min(loss, 700.0)):.2f}",
        "bits per byte": f"{loss_sum / math.log(2.0) / max(num_bytes, 1):.4f}",
        "attention maps": f"agree with the model's own attention to {inspection.map_error:.0e}",
    }


def render(title: str, data: dict[str, Any]) -> str:
    """Put a page together. Nothing that the text holds can become markup or a script.

    Args:
        title: plain text.
        data: from `page_data`.
    """
    return fill_page("inspection", title, data)


def write_page(run: LoadedRun, inspection: Inspection, text: str, out: Path | None) -> Path:
    """Write the page of an inspection, complete or not at all, and return its path.

    Args:
        run: the model.
        inspection: of the text.
        text: that was looked at.
        out: the file; None: `inspect/step-NNNNNNNN-<hash of the text>.html` in the run folder.

    Raises:
        ConfigError: it cannot be written.
    """
    fix = "Name another." if out else OUTSIDE
    if out is None:
        out = run.run / "inspect" / f"step-{run.step:08d}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.html"
    beginning = " ".join(text.split())
    beginning = beginning if len(beginning) <= 60 else beginning[:59] + "…"
    data = page_data(inspection, run.tokenizer, facts_of(run, inspection), run.model.shape.vocab_size)
    page = render(f"{run.run.name}, step {run.step}: {beginning}", data)
    save_page(out, page, fix)
    return out
