"""Results as text: `python benchmarks/table.py bench-results/*.json`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# TFLOP/s that the project wants of an H100: causal, bf16, by direction, width of heads and length of rows.
ATTENTION_TARGETS = {
    ("forward", 128): {2048: 450, 4096: 510, 8192: 540, 16384: 555},
    ("forward", 64): {2048: 360, 4096: 395, 8192: 420, 16384: 430},
    ("backward", 128): {2048: 290, 4096: 365, 8192: 420, 16384: 440},
    ("backward", 64): {2048: 260, 4096: 310, 8192: 350, 16384: 370},
}
MFU_TARGETS = {"gpt2-124m": 0.45, "llama-350m": 0.52, "llama-1.3b": 0.58}  # likewise, at MFU_SEQ_LEN, by config
MFU_SEQ_LEN = 2048
BARE_RATE = 0.97  # of a bare torch loop's tokens/s that ours must reach with the same operators
REPORTS = 0.01  # of a step that its reports may take
BLOCKED = 0.10  # of the time of a save, which an asynchronous one may hold up the step
DOCUMENTS_RATIO = 1.15  # that a scored pair may take in packed documents, in causal rows of that length


def render(records: Sequence[dict[str, Any]]) -> str:
    """Write the results as tables, each machine and date once above the tables that it belongs to."""
    parts: list[str] = []
    last_head = ""
    for record in records:
        head = _head(record)
        if head != last_head:
            parts.append(head)
        last_head = head
        parts.append(_TABLES[record["benchmark"]](record))
        parts += [f"  no number: {failure['part']}: {failure['error']}" for failure in record["failures"]]
    return "\n".join(parts)


def _head(record: dict[str, Any]) -> str:
    device = record["device"]
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items() if number)
    memory = f"{device['memory_bytes'] / 2**30:.0f} GiB"
    shrunk = "\nSHRUNK: these numbers show that it runs, not how fast" if record["settings"].get("shrink") else ""
    return (
        f"{device['name']}, {memory}; {versions}; {record['date'][:10]}; commit {record['commit'] or 'unknown'}{shrunk}"
    )


def _aligned(lines: list[list[str]]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    texts = []
    for line in lines:
        cells = [
            text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(zip(line, widths, strict=True))
        ]
        texts.append("  " + "  ".join(cells).rstrip())
    return "\n".join(texts)


def _norms(record: dict[str, Any]) -> str:
    rows = record["rows"]
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    numbers = {(r["operation"], r["width"], r["direction"], r["implementation"]): r for r in rows}
    places = list(dict.fromkeys((r["operation"], r["width"], r["direction"]) for r in rows))
    lines = [["microseconds (% of copy)", *names]]
    for place in sorted(places, key=lambda place: (place[0].removeprefix("add_"), place)):
        cells = []
        for name in names:
            row = numbers.get((*place, name))
            cells.append(f"{row['microseconds']:.0f} ({row['percent_of_copy']:.0f}%)" if row else "-")
        lines.append([f"{place[0]} D={place[1]} {place[2]}", *cells])
    worst = max((row["relative_error"] for row in rows), default=0.0, key=lambda error: (error != error, error))
    copy = record.get("copy_gigabytes_per_second", 0.0)
    num_rows = record["settings"]["rows"]
    return (
        f"norms: N={num_rows}, bf16; a copy moves {copy:.0f} GB/s here; largest relative error {worst:.1e}\n"
        + _aligned(lines)
    )


def _attention(record: dict[str, Any]) -> str:
    rows = record["rows"]
    if not rows:
        return "attention: no rows"
    worst = max((row["relative_error"] for row in rows), key=lambda error: (error != error, error))
    settings = record["settings"]
    size = f"{settings['tokens']} tokens, H x C = {settings['width']}, {settings['dtype']}"
    parts = [f"attention: TFLOP/s; {size}; largest relative error {worst:.1e}"]
    for direction in ("forward", "backward"):
        parts.append(_attention_rates(direction, [row for row in rows if row["direction"] == direction], record))
    return "\n".join([*parts, *_documents_beside_causal(rows)])


def _attention_rates(direction: str, rows: list[dict[str, Any]], record: dict[str, Any]) -> str:
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    rates = {(row["case"], row["T"], row["head_dim"], row["implementation"]): row["tflops"] for row in rows}
    aimed = "H100" in record["device"]["name"] and record["settings"]["dtype"] == "bf16"
    lines = [[direction, *names, *(["target"] if aimed else []), "ours / best of torch's"]]
    for case, T, width in dict.fromkeys(place[:3] for place in sorted(rates)):
        found = {name: rates[case, T, width, name] for name in names if (case, T, width, name) in rates}
        cells = [f"{found[name]:.3g}" if name in found else "-" for name in names]
        if aimed:
            target = ATTENTION_TARGETS.get((direction, width), {}).get(T) if case == "causal" else None
            cells.append(str(target or "-"))
        others = [rate for name, rate in found.items() if not name.startswith("ours")]
        cells.append(f"{found['ours'] / max(others):.2f}" if "ours" in found and others else "-")
        lines.append([f"{case} T={T} C={width}", *cells])
    return _aligned(lines)


def _documents_beside_causal(rows: list[dict[str, Any]]) -> list[str]:
    """Compare what a scored pair takes in packed documents and in causal rows."""
    keys = ("implementation", "direction", "head_dim", "T")
    causal = {tuple(row[key] for key in keys): row for row in rows if row["case"] == "causal"}
    lines = []
    for row in rows:
        beside = causal.get(tuple(row[key] for key in keys))
        if row["case"] == "documents" and beside:
            ratio = row["picoseconds_per_scored"] / beside["picoseconds_per_scored"]
            place = f"documents T={row['T']} C={row['head_dim']} {row['direction']}"
            lines.append([place, row["implementation"], f"{ratio:.2f}"])
    if not lines:
        return []
    return [f"time of a scored pair, documents / causal (target: at most {DOCUMENTS_RATIO})", _aligned(sorted(lines))]


def _operators(record: dict[str, Any]) -> str:
    rows = record["rows"]
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    numbers = {(row["operator"], row["direction"], row["implementation"]): row for row in rows}
    lines = [["microseconds (% of copy, GB)", *names]]
    for place in dict.fromkeys((row["operator"], row["direction"]) for row in rows):
        cells = []
        for name in names:
            row = numbers.get((*place, name))
            if row is None:
                cells.append("-")
                continue
            notes = [] if row["percent_of_copy"] is None else [f"{row['percent_of_copy']:.0f}%"]
            notes += [] if row["peak_bytes"] is None else [f"{row['peak_bytes'] / 1e9:.2f}"]
            cells.append(f"{row['microseconds']:.0f}" + (f" ({', '.join(notes)})" if notes else ""))
        lines.append([" ".join(place), *cells])
    worst = max((row["relative_error"] for row in rows), default=0.0, key=lambda error: (error != error, error))
    sizes = record["settings"]
    size = f"{sizes['tokens']} tokens, {sizes['classes']} classes, width {sizes['width']}"
    return f"operators: {size}; largest relative error {worst:.1e}\n" + _aligned(lines)


def _steps(record: dict[str, Any]) -> str:
    rows = record["rows"]
    ours = next((row for row in rows if row["variant"] == "ours-deepspeed"), None)
    shared = rows[0].get("common_micro_batch_size") if rows else None
    lines = [
        ["variant", "micro-batch", "ms/step", "tokens/s", "of ours", "MFU", "causal MFU", "GiB", f"GiB of {shared}"]
    ]
    for row in rows:
        rates = [f"{100 * row[name]:.1f}%" if row[name] is not None else "-" for name in ("mfu", "mfu_causal")]
        size = f"{row['num_micro_steps']}x{row['micro_batch_size']}x{row['seq_len']}"
        of_ours = f"{row['tokens_per_second'] / ours['tokens_per_second']:.2f}" if ours else "-"
        memory = [row["peak_memory_bytes"], row.get("common_memory_bytes")]
        lines.append(
            [row["variant"], size, f"{1e3 * row['step_seconds']:.1f}", f"{row['tokens_per_second']:.0f}", of_ours,
             *rates, *(f"{number / 2**30:.1f}" if number else "-" for number in memory)]
        )  # fmt: skip
    name = Path(record["settings"]["config"]).stem
    size = f", {rows[0]['num_parameters'] / 1e6:.3g} million parameters" if rows else ""
    aimed = ours is not None and "H100" in record["device"]["name"] and not record["settings"].get("shrink")
    verdicts = _step_verdicts(name, ours, rows) if ours and aimed else []
    return "\n".join([f"training step: {name}{size}", _aligned(lines), *verdicts])


def _step_verdicts(name: str, ours: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    """Say which targets of a step were met; a peer without a number is compared with nothing."""
    verdicts = []
    target = MFU_TARGETS.get(name)
    if target and ours["mfu"] is not None and ours["seq_len"] == MFU_SEQ_LEN:
        verdicts.append(_verdict(ours["mfu"] >= target, f"MFU of at least {100 * target:.0f}%",
                                 f"{100 * ours['mfu']:.1f}%"))  # fmt: skip
    peers = [row for row in rows if not row["variant"].startswith("ours")]
    if peers:
        best = max(peers, key=lambda row: row["tokens_per_second"])
        ratio = ours["tokens_per_second"] / best["tokens_per_second"]
        verdicts.append(_verdict(ratio > 1, f"faster than each of {len(peers)} peers",
                                 f"{ratio:.2f} times {best['variant']}"))  # fmt: skip
    memory = {row["variant"]: row["common_memory_bytes"] for row in peers if row.get("common_memory_bytes")}
    if memory and ours.get("common_memory_bytes"):
        least = min(memory, key=lambda variant: memory[variant])
        ratio = ours["common_memory_bytes"] / memory[least]
        verdicts.append(_verdict(ratio < 1, f"the lowest peak memory at {ours['common_micro_batch_size']} rows",
                                 f"{ratio:.2f} of {least}'s"))  # fmt: skip
    return verdicts


def _prepare(record: dict[str, Any]) -> str:
    lines = [["processes", "seconds", "CPU s", "MB/CPU s", "sentencepiece", "tokenizer", "MB of memory", "in main"]]
    scale = [["MB of text", "processes", "seconds", "CPU s", "MB/CPU s", "MB of memory", "in main"]]
    for row in record["rows"]:
        if row.get("part") == "scale":  # older files have no parts
            sizes = [f"{row[key] / 1e6:.0f}" for key in ("num_bytes", "peak_bytes", "peak_main_bytes")]
            rates = [f"{row[key]:.1f}" for key in ("seconds", "cpu_seconds")]
            rates.append(f"{row['bytes_per_cpu_second'] / 1e6:.2f}")
            scale.append([sizes[0], str(row["num_processes"]), *rates, *sizes[1:]])
            continue
        rates = [row[f"{key}bytes_per_cpu_second"] / 1e6 for key in ("", "sentencepiece_", "tokenizer_")]
        sizes = [f"{row[key] / 1e6:.0f}" for key in ("peak_bytes", "peak_main_bytes")]
        seconds = [f"{row[key]:.1f}" for key in ("seconds", "cpu_seconds")]
        lines.append([str(row["num_processes"]), *seconds, *(f"{rate:.2f}" for rate in rates), *sizes])
    size = f"{record['rows'][0]['num_bytes'] / 1e6:.0f} MB of text" if record["rows"] else ""
    text = f"prepare: {size}; sentencepiece and our tokenizer alone, in MB a CPU second\n" + _aligned(lines)
    return text + ("\n\n" + _aligned(scale) if len(scale) > 1 else "")


def _filters(record: dict[str, Any]) -> str:
    lines = [["filter", "CPU s", "over none", "text kept"]]
    for row in record["rows"]:
        kept = f"{row['kept_bytes']:.1%}" if "kept_bytes" in row else "-"
        lines.append([row["filter"], f"{row['cpu_seconds']:.2f}", f"{row['ratio']:.2f}", kept])
    settings = record["settings"]
    head = f"prepare of {settings['megabytes']:g} MB by {settings['processes']} processes; --verify over sha256 alone\n"
    return head + _aligned(lines)


def _tars(record: dict[str, Any]) -> str:
    lines = [["tars read in rows", "bare sentencepiece", "rows", "rows/bare", "indexing", "index/text"]]
    for row in record["rows"]:
        rates = [f"{row[f'{key}_tokens_per_second'] / 1e6:.3f}" for key in ("bare", "rows", "index")]
        share = row["index_bytes"] / row["text_bytes"]
        lines.append(
            [f"{row['documents']} .{row['kind']}", *rates[:2], f"{row['ratio']:.2f}", rates[2], f"{share:.2%}"]
        )
    return f"million tokens a CPU second, T={record['settings']['seq_len']}\n" + _aligned(lines)


def _data(record: dict[str, Any]) -> str:
    rows, text = record["rows"], []
    lines = [["rows of documents, one core", "million tokens/s", "fill"]]
    for row in (row for row in rows if row["part"] in ("packing", "reading")):
        fill = f"{100 * row['fill']:.3f}%" if "fill" in row else "-"
        lines.append([f"{row['part']} T={row['seq_len']}", f"{row['tokens_per_second'] / 1e6:.1f}", fill])
    text.append(_aligned(lines))
    lines = [["rows that are a document each, one core", "million tokens/s", "ours is times this"]]
    for row in (row for row in rows if row["part"] == "whole rows"):
        name = f"{row['reader']} T={row['seq_len']}"
        lines.append([name, f"{row['tokens_per_second'] / 1e6:.1f}", f"{row['ratio']:.2f}"])
    text.append(_aligned(lines))
    lines = [["start", "at row", "milliseconds", "MB"]]
    for row in (row for row in rows if row["part"] in ("first step", "plan")):
        name = f"{row['reader']}, plan of {row['num_rows']:,} rows" if row["part"] == "plan" else "first step from disk"
        size = f"{row['bytes'] / 1e6:,.0f}" if "bytes" in row else "-"
        lines.append([name, f"{row['first_row']:,}", f"{1e3 * row['seconds']:,.0f}", size])
    text.append(_aligned(lines))
    text += [f"reading takes {row['bytes'] / 1e6:.0f} MB of a process" for row in rows if row["part"] == "memory"]
    return f"data, {record['settings']['tokens'] / 1e6:.3g} million tokens\n" + "\n".join(text)


def _overhead(record: dict[str, Any]) -> str:
    lines = [
        ["training loop beside others", "ours ms/step", "bare torch", "ours/bare", "by CPU time", "Trainer",
         "ours/Trainer", "by CPU time", "bare's loss differs by"]
    ]  # fmt: skip
    verdicts = []
    for row in record["rows"]:
        times = {name: row.get(f"{name}_seconds") for name in ("ours", "bare", "trainer")}  # older files lack the last
        ms = {name: f"{1e3 * seconds:.1f}" if seconds else "-" for name, seconds in times.items()}
        ratios = {key: row.get(key) for key in ("ratio", "cpu_ratio", "trainer_ratio", "trainer_cpu_ratio")}
        cells = [f"{ratio:.3f}" if ratio else "-" for ratio in ratios.values()]
        lines.append(
            [row["case"], ms["ours"], ms["bare"], *cells[:2], ms["trainer"], *cells[2:],
             f"{row['largest_loss_difference']:.1e}"]
        )  # fmt: skip
        rate = 1 / ratios["ratio"]
        verdicts.append(_verdict(rate >= BARE_RATE, f"{row['case']}: at least {BARE_RATE} of bare torch's tokens/s",
                                 f"{rate:.3f}"))  # fmt: skip
        if ratio := ratios["trainer_ratio"]:
            verdicts.append(_verdict(ratio < 1, f"{row['case']}: faster than the Trainer", f"{1 / ratio:.2f} times"))
    return "\n".join([_aligned(lines), *verdicts])


def _verdict(is_met: bool, target: str, found: str) -> str:
    return f"  target {'met' if is_met else 'MISSED'}: {target} ({found})"


def _startup(record: dict[str, Any]) -> str:
    num_ranks = record["settings"].get("ranks", 1)
    lines = [[f"start to first step, ranks: {num_ranks}", "seconds", "of CPU"]]
    for row in record["rows"]:
        cpu_seconds = row.get("cpu_seconds")
        lines.append([row["part"], f"{row['seconds']:.2f}", "" if cpu_seconds is None else f"{cpu_seconds:.2f}"])
    return _aligned(lines)


def _reporting(record: dict[str, Any]) -> str:
    lines = [["reports of a step", "ms", "of CPU", "most"]]
    for row in record["rows"]:
        lines.append([row["part"], *(f"{1e3 * row[key]:.3f}" for key in ("seconds", "cpu_seconds", "most_seconds"))])
    step_seconds, seconds = record["settings"]["step_seconds"], record["rows"][-1]["cpu_seconds"]
    target = f"less than {REPORTS:.0%} of a step of {1e3 * step_seconds:.0f} ms, by processor time"
    return _aligned(lines) + "\n" + _verdict(seconds < REPORTS * step_seconds, target, f"{seconds / step_seconds:.2%}")


def _checkpoint(record: dict[str, Any]) -> str:
    lines = [["save or load", "seconds", "MB/s", "of the disk"]]
    seconds = {row["what"]: row["seconds"] for row in record["rows"] if "seconds" in row}
    for row in record["rows"]:
        if "seconds" in row:
            disk = seconds.get(f"disk {'load' if row['what'].endswith('load') else 'save'}")
            rate = "" if disk is None else f"{disk / row['seconds']:.2f}"
            lines.append([row["what"], f"{row['seconds']:.2f}", f"{row['megabytes_per_second']:.0f}", rate])
    settings = record["settings"]
    text = f"checkpoints of {settings['bytes']:,} bytes, {settings['ranks']} ranks, ZeRO stage {settings['stage']}\n"
    text += _aligned(lines)
    if {"longhaul blocked", "longhaul save"} <= seconds.keys():
        share = seconds["longhaul blocked"] / seconds["longhaul save"]
        text += "\n" + _verdict(share <= BLOCKED, f"at most {BLOCKED:.0%} of a save holds up the step", f"{share:.1%}")
    for row in record["rows"]:
        if "share_bytes" in row:
            text += f"\n  loading takes {row['bytes']:,} bytes beside a rank's share of {row['share_bytes']:,}"
    return text


def ring_bytes(traffic: dict[str, list[int]], num_ranks: int) -> float:
    """What a rank sends, and gets, if its collectives of a step, as calls and payload, go round a ring.

    Source: Patarasu and Yuan 2009: an all-reduce is a reduce-scatter and an all-gather.
    """
    share = (num_ranks - 1) / num_ranks
    return sum(size * share * (2 if name == "all_reduce" else 1) for name, (_, size) in traffic.items())


def _memory(record: dict[str, Any]) -> str:
    states = ("parameters", "masters", "moments", "gradients")
    lines = [["bytes a parameter", "ranks", *states, "states", "in theory", "buckets", "peak", "sent in a step"]]
    for row in record["rows"]:
        found, num_parameters = row["memory"]["backward"], row["num_parameters"]
        numbers = [found[kind] for kind in states]
        numbers += [sum(numbers), sum(row["theory"].values()), row["memory"]["forward"]["buckets"]]
        numbers += [max(row["peaks"].values()), ring_bytes(row["traffic"]["step"], row["ranks"])]
        cells = [f"{number / num_parameters:.2f}" for number in numbers]
        lines.append([f"ZeRO {row['stage']}, {row['precision']}", str(row["ranks"]), *cells])
    return _aligned(lines)


def _attention_cpu(record: dict[str, Any]) -> str:
    lines = [["forward and backward", "ours ms", "masked ms", "best SDPA ms", "ours/best", "cutting ms"]]
    for row in record["rows"]:
        name = f"{row['case']} {row['num_rows']}x{row['seq_len']} {row['dtype']}"
        times = [f"{1e3 * row[f'{key}_seconds']:.2f}" for key in ("ours", "masked", "best_sdpa")]
        lines.append([name, *times, f"{row['ratio']:.2f}", f"{1e3 * row['cut_seconds']:.2f}"])
    settings = record["settings"]
    heads = f"{settings['heads']} query heads, {settings['kv_heads']} key heads of 64"
    return f"attention on a CPU: {heads}; threads: {settings['num_threads']}\n" + _aligned(lines)


def _generation(record: dict[str, Any]) -> str:
    ways = ("ours", "recomputed", "transformers")
    lines = [["greedy, prompt included", "rows", "prompt", *(f"{way} tokens/s" for way in ways), "ours/transformers"]]
    for row in record["rows"]:
        rates = [row[f"{way}_tokens_per_second"] for way in ways]
        cells = [str(row["num_rows"]), str(row["num_prompt"]), *(f"{rate:.1f}" for rate in rates)]
        lines.append([row["model"], *cells, f"{rates[0] / rates[2]:.2f}"])
    new, threads = record["settings"]["new_tokens"], record["settings"]["num_threads"]
    return f"generation on a CPU: {new} new tokens a row, by processor time; threads: {threads}\n" + _aligned(lines)


_TABLES = {
    "generation": _generation,
    "attention": _attention,
    "attention_cpu": _attention_cpu,
    "norms": _norms,
    "operators": _operators,
    "step": _steps,
    "data": _data,
    "overhead": _overhead,
    "startup": _startup,
    "reporting": _reporting,
    "checkpoint": _checkpoint,
    "memory": _memory,
    "prepare": _prepare,
    "filters": _filters,
    "tars": _tars,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(prog="table", description=__doc__)
    parser.add_argument("results", type=Path, nargs="+", metavar="FILE", help="JSON files of results")
    arguments = parser.parse_args(argv)
    print(render([json.loads(path.read_text(encoding="utf-8")) for path in arguments.results]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
