"""What a result says of ours beside its peers, each as one number: our time divided by the peer's for the same work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from benchmarks.table import ratio_keys

# Not what people use instead, but the least that the work takes: ours can only come near.
BOUNDS = frozenset({"the bare disk", "one open memmap", "bare torch loop, our model"})


class Comparison(NamedTuple):
    """Ours beside one peer; `ratio` is our time over the peer's, so that below 1 ours is quicker."""

    what: str
    peer: str
    ratio: float


def comparisons(record: dict[str, Any]) -> list[Comparison]:
    """Return what a result compares; nothing for a benchmark that has no peer."""
    compare = _COMPARISONS.get(record["benchmark"])
    return [] if compare is None else list(compare(record["rows"]))


def _beside_best(rows: list[dict[str, Any]], place: list[str], key: str, is_rate: bool) -> Iterator[Comparison]:
    """Compare ours with the best other implementation at each place, which is named by these keys of a row."""
    places: dict[str, dict[str, float]] = {}
    for row in rows:
        seconds = 1 / row[key] if is_rate else row[key]
        places.setdefault(" ".join(str(row[name]) for name in place), {})[row["implementation"]] = seconds
    for what, seconds_of in places.items():
        others = {name: seconds for name, seconds in seconds_of.items() if not name.startswith("ours")}
        if "ours" in seconds_of and others:
            best = min(others, key=lambda name: others[name])
            yield Comparison(what, best, seconds_of["ours"] / others[best])


def _attention(rows: list[dict[str, Any]]) -> Iterator[Comparison]:
    named = [row | {"length": f"T={row['T']}", "head": f"C={row['head_dim']}"} for row in rows]
    return _beside_best(named, ["case", "length", "head", "direction"], "tflops", is_rate=True)


def _norms(rows: list[dict[str, Any]]) -> Iterator[Comparison]:
    named = [row | {"size": f"D={row['width']}"} for row in rows]
    return _beside_best(named, ["operation", "size", "direction"], "microseconds", is_rate=False)


def _operators(rows: list[dict[str, Any]]) -> Iterator[Comparison]:
    return _beside_best(rows, ["operator", "direction"], "microseconds", is_rate=False)


def _attention_cpu(rows: list[dict[str, Any]]) -> Iterator[Comparison]:
    for row in rows:
        what = f"{row['case']}, {row['num_rows']} x {row['seq_len']}, {row['dtype']}"
        yield Comparison(what, "quickest SDPA", row.get("cpu_ratio", row["ratio"]))  # older files lack the first


def _operators_cpu(rows: list[dict[str, Any]]) -> Iterator[Comparison]:
    for row in rows:
        what = f"{row['operator']}, {row['num_tokens']} x {row['width']}"
        what += f", {row['num_classes']} classes" if row["operator"] == "loss" else ""
        yield Comparison(what, "plain PyTorch", row["cpu_ratio"])


def _steps(rows: list[dict[str, Any]]) -> Iterator[Comparison]:
    rates = {row["variant"]: row["tokens_per_second"] for row in rows}
    for peer, rate in rates.items():
        if "ours-deepspeed" in rates and not peer.startswith("ours"):
            yield Comparison("step", peer, rate / rates["ours-deepspeed"])


def _overhead(rows: list[dict[str, Any]]) -> Iterator[Comparison]:
    peers = {"bare": "bare torch loop, our model", "plain": "plain PyTorch", "trainer": "transformers' Trainer"}
    for row in rows:
        for name, peer in peers.items():
            if ratio := row.get(ratio_keys(name)[1]):
                yield Comparison(f"step, {row['case']}", peer, ratio)


def _generation(rows: list[dict[str, Any]]) -> Iterator[Comparison]:
    for row in rows:
        what = f"{row['model']}, rows: {row['num_rows']}, prompt: {row['num_prompt']}"
        ratio = row["transformers_tokens_per_second"] / row["ours_tokens_per_second"]
        yield Comparison(what, "transformers' generate", ratio)


def _data(rows: list[dict[str, Any]]) -> Iterator[Comparison]:
    for row in rows:
        if row["part"] == "whole rows" and row["reader"] != "ours":
            yield Comparison("reading whole rows", row["reader"], 1 / row["ratio"])
    plans = {(row["first_row"], row["reader"]): row["seconds"] for row in rows if row["part"] == "plan"}
    for (first_row, reader), seconds in plans.items():
        if reader != "ours":
            yield Comparison(f"plan at row {first_row:,}", reader, plans[first_row, "ours"] / seconds)


def _checkpoint(rows: list[dict[str, Any]]) -> Iterator[Comparison]:
    seconds = {row["what"]: row["seconds"] for row in rows if "seconds" in row}
    for name, taken in seconds.items():
        peer, _, what = name.rpartition(" ")
        if peer not in ("longhaul", "") and what in ("save", "load") and f"longhaul {what}" in seconds:
            yield Comparison(what, "the bare disk" if peer == "disk" else peer, seconds[f"longhaul {what}"] / taken)


def _prepare(rows: list[dict[str, Any]]) -> Iterator[Comparison]:
    for row in rows:
        if "sentencepiece_bytes_per_cpu_second" in row:
            ratio = row["sentencepiece_bytes_per_cpu_second"] / row["bytes_per_cpu_second"]
            yield Comparison(f"prepare, processes: {row['num_processes']}", "bare sentencepiece", ratio)


def _tars(rows: list[dict[str, Any]]) -> Iterator[Comparison]:
    for row in rows:
        yield Comparison(f"rows of {row['documents']} .{row['kind']}", "bare sentencepiece", 1 / row["ratio"])


_COMPARISONS: dict[str, Callable[[list[dict[str, Any]]], Iterator[Comparison]]] = {
    "attention": _attention,
    "norms": _norms,
    "operators": _operators,
    "step": _steps,
    "attention_cpu": _attention_cpu,
    "operators_cpu": _operators_cpu,
    "overhead": _overhead,
    "generation": _generation,
    "data": _data,
    "checkpoint": _checkpoint,
    "prepare": _prepare,
    "tars": _tars,
}
