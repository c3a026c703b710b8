"""What `prepare` would make of a config's sources, from samples of them: `launch/prepare.py --dry-run`."""

from __future__ import annotations

import math
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.console import LiveLine, counted, format_bytes, format_count, format_duration
from pretrain.data.packing import SEGMENT_DTYPE, pack
from pretrain.data.remote_corpus import open_remote
from pretrain.data.shards import INDEX_DTYPE, MANIFEST_NAME, Manifest
from pretrain.data.source_files import list_files, token_format
from pretrain.errors import ConfigError
from pretrain.options.batch_plan import num_steps_of
from pretrain.options.config import Config, SourceSection
from pretrain.options.phases import phases_of, val_fraction_of
from pretrain.preparing.corpus import advice_for_none
from pretrain.preparing.filters import filters_of
from pretrain.preparing.near_duplicates import band_shape
from pretrain.preparing.prepare import check_complete, check_untokenized
from pretrain.preparing.source_sample import Estimate, estimate_texts, estimate_tokens
from pretrain.preparing.sources import ReadLog
from pretrain.preparing.spills import RECORD
from pretrain.preparing.workers import num_processes, num_usable_cores
from pretrain.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer, choose_sample, fit
from pretrain.tokenizers.tokenizer import Tokenizer
from pretrain.tokenizers.tokenizer_files import main_file, open_tokenizer

SAMPLE_BYTES, SAMPLE_SECONDS = 8_000_000, 4.0  # of all sources together: read, and again tokenized
FIT_BYTES = 2_000_000  # that a tokenizer is trained on, if there is none
GUESSED_TOKEN_BYTES = 4.0  # where a sample is too small to train one
_SHARD_END_BYTES = 10_240  # of zeros at the end of a tar file
_LINE_NUMBER_BYTES = 8
_ESTIMATED = "~ marks what a sample was taken of: what is said of the rest is an estimate, and counts its duplicates"


@dataclass(frozen=True)
class Forecast:
    """What one source gives.

    Attributes:
        name: the source.
        state: `to do`, `begun` or `complete`; what is complete is not foreseen, but read from its manifest.
        is_exact: documents and text were counted, not estimated.
        num_files, source_bytes: what is read; 0 if nothing is.
        num_documents, text_bytes, num_tokens: of both splits, bos and eos included.
        shard_bytes: on disk, with indexes and rows.
        temporary_bytes: on disk as well, until the shards are complete.
        num_rows: of the training split, for `data.seq_len`.
        epochs: times that the run reads the training split.
        epoch_steps: steps in which it reads it once, on the average of the run.
        seconds: that `prepare` takes, without the training of a tokenizer.
        counts: of documents read, skipped and masked in what was read, by reason; of a complete source, in all of it.
        examples: the first of each reason; none of a complete source.
    """

    name: str
    state: str
    is_exact: bool
    num_files: int
    source_bytes: int
    num_documents: int
    text_bytes: int
    num_tokens: int
    shard_bytes: int
    temporary_bytes: int
    num_rows: int
    epochs: float
    epoch_steps: float
    seconds: float
    counts: dict[str, int]
    examples: dict[str, str]


@dataclass(frozen=True)
class _Encoder:
    """How many ids and seconds a text takes."""

    tokenizer: Tokenizer | None
    basis: str
    correction: float = 1.0  # bytes per token that are expected, relative to those of `tokenizer`

    def measure(self, texts: list[str], seconds: float) -> tuple[float, float, list[int]]:
        """Tokenize texts for a while.

        Returns:
            Ids per byte of text without bos and eos, seconds per byte, and the number of ids of each text.
        """
        texts = random.Random(1).sample(texts, len(texts))
        if self.tokenizer is None:
            lengths = [math.ceil(len(text.encode()) / GUESSED_TOKEN_BYTES) for text in texts]
            return 1 / GUESSED_TOKEN_BYTES, 0.0, lengths
        begin, num_bytes = time.monotonic(), 0
        lengths = []
        for text in texts:
            lengths.append(len(self.tokenizer.encode(text)))
            num_bytes += len(text.encode())
            if time.monotonic() - begin > seconds:
                break
        elapsed = time.monotonic() - begin
        return sum(lengths) / max(num_bytes, 1) / self.correction, elapsed / max(num_bytes, 1), lengths


def forecast(config: Config) -> dict[str, Any]:
    """Foresee what `prepare` makes of a config, in a few seconds; writes nothing.

    Returns:
        `tokenizer`, `processes`, `tokens_per_step`, `num_steps`, `sources` (a list of `Forecast`), `total`.

    Raises:
        ConfigError, DataError: as `prepare`, for what it meets.
    """
    sources = config.data.sources
    is_there = main_file(config.tokenizer.model).exists()
    tokenizer = open_tokenizer(config.tokenizer) if is_there else None
    for source in sources:
        if tokenizer is not None and source.paths:
            check_complete(source, config, tokenizer, LiveLine())
    logs = {source.name: ReadLog() for source in sources}
    estimates = _estimate_texts(config, logs, tokenizer.loses_u2581 if tokenizer else True)
    encoder = _open_encoder(
        config, tokenizer, [text for parts in estimates.values() for part in parts for text in part.texts]
    )
    forecasts = [
        _foresee(source, config, encoder, estimates.get(source.name, []), logs[source.name]) for source in sources
    ]
    forecasts = [_with_epochs(one, forecasts, config) for one in forecasts]
    total = {
        key: sum(getattr(one, key) for one in forecasts)
        for key in ("num_files", "source_bytes", "num_documents", "text_bytes", "num_tokens", "shard_bytes", "num_rows",
                    "seconds")
    }  # fmt: skip
    # Sources are prepared one after the other.
    total["temporary_bytes"] = max(one.temporary_bytes for one in forecasts)
    return {
        "tokenizer": {"model": config.tokenizer.model, "tokens_are": encoder.basis},
        "processes": num_processes(config.data),
        "seq_len": config.data.seq_len,
        "tokens_per_step": config.train.global_batch_size * config.data.seq_len,
        "num_steps": num_steps_of(config),
        "sources": [asdict(one) for one in forecasts],
        "total": total,
    }


def _is_complete(source: SourceSection) -> bool:
    return not source.paths or Path(source.shards, MANIFEST_NAME).exists()


def _estimate_texts(config: Config, logs: dict[str, ReadLog], loses_u2581: bool) -> dict[str, list[Estimate]]:
    """Samples of all sources of text that are not complete."""
    found = {source.name: list_files(source) for source in config.data.sources if not _is_complete(source)}
    texts = {name: files for name, files in found.items() if token_format(files) is None}
    share = max(len(texts), 1)
    return {
        source.name: estimate_texts(
            texts[source.name],
            source,
            config.data,
            SAMPLE_BYTES / share,
            SAMPLE_SECONDS / share,
            config.run.seed,
            logs[source.name],
            loses_u2581,
        )
        for source in config.data.sources
        if source.name in texts
    }


def _open_encoder(config: Config, tokenizer: Tokenizer | None, texts: list[str]) -> _Encoder:
    """The config's tokenizer; or one that is trained on half of the sample, if there is none."""
    if all(_is_complete(source) for source in config.data.sources):
        return _Encoder(None, "counted")
    if tokenizer is not None:
        return _Encoder(tokenizer, f"counted with {config.tokenizer.model}")
    check_untokenized(config)
    texts = random.Random(config.run.seed).sample(texts, len(texts))
    halves: tuple[list[str], list[str]] = ([], [])
    sizes = [0, 0]
    for text in texts:
        smaller = int(sizes[1] < sizes[0])
        halves[smaller].append(text)
        sizes[smaller] += len(text.encode())
        if min(sizes) >= FIT_BYTES:
            break
    sample = choose_sample(halves[0], FIT_BYTES, config.run.seed)
    try:
        model = fit(sample, config.tokenizer)
    except ConfigError:  # the sample does not hold so many pieces; all of the text may
        return _Encoder(None, f"guessed: {GUESSED_TOKEN_BYTES:.0f} bytes of text each; there is no tokenizer yet")
    with tempfile.NamedTemporaryFile(suffix=".model") as file:
        file.write(model)
        file.flush()
        tokenizer = SentencePieceTokenizer(Path(file.name), config.tokenizer.bos, config.tokenizer.eos)
    seen, unseen = (_Encoder(tokenizer, "").measure(half, SAMPLE_SECONDS / 4)[0] for half in halves)
    # A tokenizer of much more text lies between what this one does on its own text and on other text.
    basis = f"estimated by a tokenizer trained on {format_bytes(sum(map(len, sample)))} now; there is none yet"
    return _Encoder(tokenizer, basis, math.sqrt(unseen / seen) if seen else 1.0)


def _foresee(
    source: SourceSection, config: Config, encoder: _Encoder, estimates: list[Estimate], log: ReadLog
) -> Forecast:
    if _is_complete(source):
        return _recall(source, config)
    data = config.data
    files = list_files(source)
    if held := token_format(files):
        tokenizer = open_tokenizer(config.tokenizer)
        estimates = [estimate_tokens(files, held, tokenizer, data, SAMPLE_BYTES // 4, config.run.seed, log)]
    num_documents = num_bytes = num_tokens = seconds = 0.0
    lengths: list[int] = []
    for part in estimates:
        share = part.text_bytes / max(sum(other.text_bytes for other in estimates), 1)
        part_tokens, per_byte, part_lengths = part.num_tokens, 0.0, part.lengths
        if part_tokens is None:
            seconds_left = SAMPLE_SECONDS * share / len(data.sources)
            tokens_per_byte, per_byte, part_lengths = encoder.measure(part.texts, seconds_left)
            part_tokens = tokens_per_byte * part.text_bytes
        num_documents += part.num_documents
        num_bytes += part.text_bytes
        num_tokens += part_tokens + 2 * part.num_documents  # bos and eos
        seconds += part.text_bytes * _seconds_per_byte(part.seconds_per_byte, per_byte, config)
        lengths += part_lengths
    rows = _num_rows(num_tokens - num_documents, lengths, data.seq_len, data.packing)
    return _forecast(
        source, config, num_documents, num_bytes, num_tokens, rows,
        state="begun" if Path(source.shards).exists() else "to do",
        is_exact=all(part.is_exact for part in estimates),
        num_files=len(files),
        source_bytes=sum(file.stat().st_size for file in files),
        seconds=seconds,
        temporary_bytes=_spilled_bytes(num_documents, num_tokens, files, source, config),
        counts=dict(sorted(log.counts.items())),
        examples=dict(sorted(log.examples.items())),
    )  # fmt: skip


def _spilled_bytes(
    num_documents: float, num_tokens: float, files: Sequence[Path], source: SourceSection, config: Config
) -> int:
    """Bytes of the documents between the two passes: ids, a record each, and where they are from."""
    filters = filters_of(source, config.data)
    num_bands = band_shape(filters.near_duplicates)[0] if filters.near_duplicates else 0
    place_bytes = sum(len(str(file)) for file in files) / len(files) + _LINE_NUMBER_BYTES
    return round(num_tokens * _id_bytes(config) + num_documents * (RECORD.itemsize + 8 * num_bands + place_bytes))


def _id_bytes(config: Config) -> int:
    return 2 if config.tokenizer.vocab_size <= 65536 else 4


def _recall(source: SourceSection, config: Config) -> Forecast:
    """What a complete corpus holds."""
    remote = open_remote(source.shards, config.data)
    manifest = Manifest.load(remote.folder if remote else source.shards)
    if remote:
        remote.close()
    shards = manifest.train + manifest.val
    num_documents, num_tokens = (sum(getattr(one, key) for one in shards) for key in ("num_documents", "num_tokens"))
    rows = _num_rows(num_tokens - num_documents, [], config.data.seq_len, config.data.packing)
    return _forecast(
        source, config, num_documents, sum(manifest.text_bytes.values()), num_tokens, rows,
        state="complete", is_exact=True, num_files=0, source_bytes=0, seconds=0.0,
        temporary_bytes=0, counts=manifest.counts, examples={},
    )  # fmt: skip


def _forecast(
    source: SourceSection, config: Config, num_documents: float, text_bytes: float, num_tokens: float, num_rows: float,
    **rest: Any,
) -> Forecast:  # fmt: skip
    data = config.data
    id_bytes = _id_bytes(config)
    num_segments = num_documents + num_rows  # a document, and one more for each row that one goes on in
    shard_bytes = (
        num_tokens * id_bytes
        + num_documents * INDEX_DTYPE.itemsize
        + num_segments * SEGMENT_DTYPE.itemsize
        + num_rows * 8
        + math.ceil(num_tokens * id_bytes / data.shard_bytes) * _SHARD_END_BYTES
    )
    share = 1 - val_fraction_of(source, data)
    train_rows = max(num_rows * share, 1.0) if num_documents and share else 0
    return Forecast(
        name=source.name,
        num_documents=round(num_documents),
        text_bytes=round(text_bytes),
        num_tokens=round(num_tokens),
        shard_bytes=round(shard_bytes),
        num_rows=round(train_rows),
        epochs=0.0,
        epoch_steps=0.0,
        **rest,
    )


def _with_epochs(one: Forecast, forecasts: list[Forecast], config: Config) -> Forecast:
    """Add how often the run reads a source, and how many of its steps do so once."""
    phases, num_steps = phases_of(config), num_steps_of(config)
    epochs = 0.0
    if not one.num_rows:
        return one
    for phase, end in zip(phases, [*(phase.first_step for phase in phases[1:]), num_steps], strict=True):
        sizes = {other.name: other.num_rows if phase.kind == "epochs" else 1 for other in forecasts}
        weights = {name: amount * sizes[name] for name, amount in phase.amounts.items()}
        share = weights.get(one.name, 0.0) / (sum(weights.values()) or 1.0)
        # Rows of every length have the same tokens in a step; those of data.seq_len were counted.
        epochs += (end - phase.first_step) * config.train.global_batch_size * share / one.num_rows
    return replace(one, epochs=epochs, epoch_steps=num_steps / epochs if epochs else 0.0)


def _num_rows(num_slots: float, lengths: list[int], seq_len: int, packing: str) -> float:
    """Rows of `seq_len` that documents fill, by how a sample of them packs."""
    slots = np.array(lengths, dtype=np.int64) + 1
    num_rows = len(pack(slots, seq_len, packing)[1]) - 1 if len(slots) else 0
    few = 50 if packing == "best_fit" else 1  # whose last one says more than the others
    fill = int(slots.sum()) / (num_rows * seq_len) if num_rows >= few and packing != "concat" else 1.0
    return num_slots / seq_len / fill


def _seconds_per_byte(reading: float, encoding: float, config: Config) -> float:
    """Seconds per byte of text: one process reads, several tokenize, on the cores that there are."""
    processes = num_processes(config.data)
    if processes == 1:
        return reading + encoding
    return max(reading, encoding / processes, (reading + encoding) / min(processes + 1, num_usable_cores()))


def _notes(content: dict[str, Any]) -> list[str]:
    """What is left out of the sources or masked, and why; and which of them give nothing."""
    notes = []
    for one in content["sources"]:
        name, counts = one["name"], one["counts"]
        num_read = f"{counts.get('documents_read', 0):,} documents that were read"
        notes += [
            f"{name}: {counts[reason]:,} {reason.replace('_', ' ')}, of {num_read}; the first: {example}"
            for reason, example in one["examples"].items()
        ]
        if not one["num_documents"]:
            notes.append(f"warning: {name}: no document to train on, of {num_read}. {advice_for_none(name, counts)}")
    return notes


def render(content: dict[str, Any]) -> str:
    """Write a forecast as a table, and what is left out."""
    lines = [["source", "files", "stored", "documents", "text", "tokens", "shards", "rows", "steps/epoch", "epochs",
              "time"]]  # fmt: skip
    for one in [*content["sources"], content["total"] | {"name": "in all"}]:
        sign = "" if one.get("is_exact", True) else "~"
        is_sum = "state" not in one
        lines.append(
            [
                one["name"],
                f"{one['num_files']:,}" if is_sum or one["num_files"] else one["state"],
                format_bytes(one["source_bytes"]),
                f"{sign}{one['num_documents']:,}",
                sign + format_bytes(one["text_bytes"]),
                format_count(one["num_tokens"]),
                format_bytes(one["shard_bytes"]),
                f"{one['num_rows']:,}",
                "" if is_sum else f"{one['epoch_steps']:,.0f}",
                "" if is_sum else f"{one['epochs']:.2f}",
                format_duration(one["seconds"]),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.rjust(width) if number else cell.ljust(width) for number, (cell, width) in
                      enumerate(zip(line, widths, strict=True))).rstrip() for line in lines]  # fmt: skip
    num_tokens = content["num_steps"] * content["tokens_per_step"]
    needed = sum(one["shard_bytes"] for one in content["sources"] if one["state"] != "complete")
    return "\n".join(
        [
            *text,
            *_notes(content),
            f"tokens are {content['tokenizer']['tokens_are']}",
            *([_ESTIMATED] if any("~" in line[3] for line in lines) else []),
            f"disk: {format_bytes(needed + content['total']['temporary_bytes'])} while `prepare` runs, "
            f"{format_bytes(needed)} when it is done",
            f"the run: {counted(content['num_steps'], 'step')} of {content['tokens_per_step']:,} tokens, "
            f"{format_count(num_tokens)} in all; time is that of {counted(content['processes'], 'process')} to "
            "make the shards, without the training of a tokenizer; nothing was written",
        ]
    )
