"""Tar files as others write them, for tests of what reads them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import webdataset


def write_tar(path: Path, samples: Iterable[Mapping[str, Any]], **options: Any) -> Path:
    """Write samples as webdataset does; without `mtime` it writes its own times, and with them PAX headers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path), **options) as tar:
        for sample in samples:
            tar.write(dict(sample))
    return path


def text_samples(texts: Iterable[str], kind: str = "txt", folder: str = "") -> list[dict[str, Any]]:
    """A sample a text, as `.txt`, as `.json`, or as either in turns, with an image beside it."""
    samples = []
    for number, text in enumerate(texts):
        sample: dict[str, Any] = {"__key__": f"{folder}{number:06d}"}
        chosen = ("txt", "json")[number % 2] if kind == "mixed" else kind
        sample[chosen] = text if chosen == "txt" else json.dumps({"text": text, "number": number}).encode()
        if kind == "mixed":
            sample["jpg"] = bytes(range(256)) * 5
        samples.append(sample)
    return samples
