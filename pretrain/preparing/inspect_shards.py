"""What is in prepared shards, in words and figures: `launch/prepare.py --inspect`. Reads manifests and indexes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.console import format_bytes, format_count
from pretrain.data.row_table import RowTable, stored_tables
from pretrain.data.shard_reader import check_shards
from pretrain.data.shards import Manifest, index_path, load_index
from pretrain.data.text_shards import text_opener
from pretrain.errors import ConfigError, DataError, LonghaulError
from pretrain.options.config import Config, TokenizerSection
from pretrain.tokenizers.tokenizer import Tokenizer
from pretrain.tokenizers.tokenizer_files import MAIN_FILES, open_tokenizer

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
_BAR_WIDTH = 40
_SAMPLE_TOKENS = 400  # of a document are decoded


def inspect(
    folder: str | Path, config: Config | None = None, tokenizer: str | None = None, num_samples: int = 3
) -> dict[str, Any]:
    """Look into a prepared corpus.

    Args:
        folder: of the shards.
        config: names the tokenizer.
        tokenizer: a tokenizer's file or folder, instead. Without both it is looked for in the folder and its parents.
        num_samples: documents to decode, spread evenly over the training split.

    Returns:
        What `--json` prints; docs/data.md says what each value is.

    Raises:
        DataError: there is no manifest, or an index is damaged.
        ConfigError: the tokenizer that is named is not the corpus's.
    """
    folder = Path(folder)
    manifest = Manifest.load(folder)
    found, place = _find_tokenizer(folder, manifest, config, tokenizer)
    splits = {split: _split_of(folder, manifest, split) for split in ("train", "val")}
    total = {
        key: sum(part[key] for part in splits.values())
        for key in ("num_shards", "num_documents", "num_tokens", "text_bytes", "tar_bytes", "index_bytes")
    }
    return {
        "folder": str(folder),
        "corpus": manifest.corpus,
        "dtype": manifest.dtype,
        "text_field": manifest.text and manifest.text.text_field,
        "fingerprint": manifest.fingerprint(),
        "tokenizer": {
            "fingerprint": manifest.tokenizer_fingerprint,
            "vocab_size": manifest.vocab_size,
            "file": place,
            "kind": found.kind if found else None,
        },
        "splits": splits,
        "total": total,
        "held_out_documents": total["num_documents"] and splits["val"]["num_documents"] / total["num_documents"],
        "held_out_bytes": total["text_bytes"] and splits["val"]["text_bytes"] / total["text_bytes"],
        "compression": _compression(manifest, total),
        "lengths": _lengths(folder, manifest),
        "rows": list(_row_tables(folder, manifest)),
        "counts": manifest.counts,
        "samples": list(_samples(folder, manifest, found, num_samples)) if found else [],
    }


def _split_of(folder: Path, manifest: Manifest, split: str) -> dict[str, int]:
    shards = manifest.shards(split)
    indexes = [index_path(folder, shard.name) for shard in shards]
    return {
        "num_shards": len(shards),
        "num_documents": sum(shard.num_documents for shard in shards),
        "num_tokens": sum(shard.num_tokens for shard in shards),
        "text_bytes": manifest.text_bytes[split],
        "tar_bytes": sum(shard.num_bytes for shard in shards),
        "index_bytes": sum(path.stat().st_size for path in indexes if path.exists()),
    }


def _compression(manifest: Manifest, total: dict[str, int]) -> dict[str, float]:
    """Bytes of text per token and per byte stored; tokens without bos and eos."""
    id_bytes = np.dtype(manifest.dtype).itemsize
    num_tokens = total["num_tokens"] - 2 * total["num_documents"]
    return {
        "text_bytes_per_token": total["text_bytes"] / max(num_tokens, 1),
        "text_bytes_per_stored_byte": total["text_bytes"] / max(total["tar_bytes"] + total["index_bytes"], 1),
        "stored_bytes_per_token": (total["tar_bytes"] + total["index_bytes"]) / max(total["num_tokens"], 1),
        "overhead": (total["tar_bytes"] + total["index_bytes"]) / max(total["num_tokens"] * id_bytes, 1) - 1,
    }


def _lengths(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """Documents by their number of tokens, bos and eos included; memory is that of the distinct lengths."""
    values, counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
    for shard in manifest.train + manifest.val:
        new_values, new_counts = np.unique(load_index(folder, shard)["num_tokens"], return_counts=True)
        values, places = np.unique(np.concatenate([values, new_values.astype(np.int64)]), return_inverse=True)
        counts = np.bincount(places, np.concatenate([counts, new_counts]), len(values)).astype(np.int64)
    if not len(values):
        return {"mean": 0.0, "max": 0, "percentiles": {}, "histogram": []}
    num_documents, ends = int(counts.sum()), counts.cumsum()
    ranks = [min(int(np.ceil(num_documents * percent / 100)), num_documents) for percent in PERCENTILES]
    places = np.searchsorted(ends, ranks)
    bins = np.ceil(np.log2(np.maximum(values, 1))).astype(int)  # bin b holds lengths above 2^(b-1) up to 2^b
    by_bin = np.bincount(bins, counts).astype(int)
    histogram = [
        {"up_to": 2**number, "num_documents": int(count)} for number, count in enumerate(by_bin) if number >= bins.min()
    ]
    return {
        "mean": float((values * counts).sum() / num_documents),
        "max": int(values[-1]),
        "percentiles": {str(percent): int(values[place]) for percent, place in zip(PERCENTILES, places, strict=True)},
        "histogram": histogram,
    }


def _row_tables(folder: Path, manifest: Manifest) -> Iterator[dict[str, Any]]:
    """How full the rows of each stored `seq_len` and packing are; what cannot be used says why."""
    for seq_len, packing in stored_tables(folder):
        kind = {"seq_len": seq_len, "packing": packing}
        try:
            tables = {split: RowTable.open(folder, manifest, split, seq_len, packing) for split in ("train", "val")}
            slots = {split: int(table.slots_per_block().sum()) for split, table in tables.items()}
        except DataError as error:
            yield kind | {"problem": str(error)}
            continue
        yield kind | {
            split: {"num_rows": table.num_rows, "fill": slots[split] / max(table.num_rows * seq_len, 1)}
            for split, table in tables.items()
        }


def _find_tokenizer(
    folder: Path, manifest: Manifest, config: Config | None, given: str | None
) -> tuple[Tokenizer | None, str | None]:
    """The corpus's tokenizer and where it lies."""
    if given is not None or config is not None:
        section = config.tokenizer if config and given is None else _section(str(given), manifest)
        tokenizer = open_tokenizer(section)
        if tokenizer.fingerprint != manifest.tokenizer_fingerprint:
            raise ConfigError(
                f"{section.model}: its fingerprint is {tokenizer.fingerprint[:12]}; expected "
                f"{manifest.tokenizer_fingerprint[:12]}, that of the tokenizer of {folder}. Name that one."
            )
        return tokenizer, section.model
    for parent in (folder, *folder.resolve().parents[:2]):
        for path in sorted({parent / name for name in MAIN_FILES} | set(parent.glob("*.model"))):
            try:
                tokenizer = open_tokenizer(_section(str(path), manifest))
            except (LonghaulError, OSError):
                continue
            if tokenizer.fingerprint == manifest.tokenizer_fingerprint:
                return tokenizer, str(path)
    return None, None


def _section(model: str, manifest: Manifest) -> TokenizerSection:
    return TokenizerSection(model=model, vocab_size=manifest.vocab_size)


def _samples(
    folder: Path, manifest: Manifest, tokenizer: Tokenizer, num_samples: int
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """The beginnings of documents, spread evenly over the training split."""
    shards = manifest.train
    ends = np.cumsum([shard.num_documents for shard in shards])
    num_documents = int(ends[-1]) if len(ends) else 0
    for number in range(min(num_samples, num_documents)):
        document = num_documents * (2 * number + 1) // (2 * min(num_samples, num_documents))
        place = int(np.searchsorted(ends, document, side="right"))
        shard, inside = shards[place], document - int(ends[place]) + shards[place].num_documents
        one: dict[str, Any] = {"shard": shard.name, "document": inside}
        try:
            check_shards(folder, (shard,))
            reader = text_opener(manifest, tokenizer)(folder, shard, manifest.dtype, verify_index=False)
            try:
                ids = reader.read(inside)
                if manifest.context_bit is not None:
                    ids = ids & ids.dtype.type((1 << manifest.context_bit) - 1)
            finally:
                reader.close()
            yield one | {"num_tokens": len(ids), "text": tokenizer.decode(ids[:_SAMPLE_TOKENS].tolist())}
        except DataError as error:
            yield one | {"problem": str(error)}


def render(content: dict[str, Any]) -> str:
    """Write what `inspect` gives for people."""
    tokenizer, total, compression = content["tokenizer"], content["total"], content["compression"]
    kind = f"{tokenizer['kind']} at {tokenizer['file']}" if tokenizer["file"] else "not found: name it by --tokenizer"
    holds_ids = content["text_field"] is None
    lines = [
        f"{content['folder']}: corpus {content['corpus']}, data fingerprint {content['fingerprint'][:12]}",
        f"tokenizer: {tokenizer['fingerprint'][:12]}, {tokenizer['vocab_size']:,} ids as {content['dtype']}; {kind}",
        *([] if holds_ids else [f"train: tars of text, tokenized when read; field of .json: {content['text_field']}"]),
        "",
        f"{'':7}{'shards':>8}{'documents':>14}{'tokens':>10}{'text':>11}{'stored':>11}",
    ]
    for name, part in [*content["splits"].items(), ("in all", total)]:
        lines.append(
            f"{name:7}{part['num_shards']:>8,}{part['num_documents']:>14,}{format_count(part['num_tokens']):>10}"
            f"{format_bytes(part['text_bytes']):>11}{format_bytes(part['tar_bytes'] + part['index_bytes']):>11}"
        )
    lines += [
        f"held out: {content['held_out_documents']:.3%} of documents, {content['held_out_bytes']:.3%} of text",
        f"a token is {compression['text_bytes_per_token']:.3f} bytes of text; a byte stored is "
        f"{compression['text_bytes_per_stored_byte']:.2f} bytes of text"
        + (f"; beside the ids, tars and indexes take {compression['overhead']:.2%}" if holds_ids else ""),
        "",
        *_render_lengths(content["lengths"]),
        "",
    ]
    for table in content["rows"]:
        kind = f"rows of {table['seq_len']} tokens{'' if table['packing'] == 'best_fit' else ', ' + table['packing']}"
        if "problem" in table:
            lines.append(f"{kind} cannot be used: {table['problem']}")
            continue
        parts = [f"{split} {table[split]['num_rows']:,} rows, {table[split]['fill']:.2%} full"
                 for split in ("train", "val") if table[split]["num_rows"]]  # fmt: skip
        lines.append(f"{kind}: {'; '.join(parts)}")
    lines += ["counts when it was prepared:"] if content["counts"] else []
    lines += [f"  {count:>14,}  {reason.replace('_', ' ')}" for reason, count in sorted(content["counts"].items())]
    for sample in content["samples"]:
        place = f"{sample['shard']}, document {sample['document']}"
        lines.append(f"\n--- {place}" + (f", {sample['num_tokens']:,} tokens ---" if "text" in sample else " ---"))
        lines.append(sample.get("text", sample.get("problem", "")))
    return "\n".join(lines)


def _render_lengths(lengths: dict[str, Any]) -> list[str]:
    if not lengths["histogram"]:
        return ["no documents"]
    percentiles = ", ".join(f"{percent}%: {value:,}" for percent, value in lengths["percentiles"].items())
    lines = [
        f"tokens of a document: mean {lengths['mean']:,.1f}, longest {lengths['max']:,}",
        f"percentiles: {percentiles}",
    ]
    most = max(one["num_documents"] for one in lengths["histogram"])
    for one in lengths["histogram"]:
        bar = "#" * -(-one["num_documents"] * _BAR_WIDTH // most)
        lines.append(f"  up to {one['up_to']:>12,} {one['num_documents']:>14,} {bar}".rstrip())
    return lines
