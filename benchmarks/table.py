"""Results as text: `python benchmarks/table.py bench-results/*.json`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if sys.path[0] == str(Path(__file__).resolve().parent):  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import host_tables
from benchmarks.host_tables import aligned, verdict

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
        parts.append(render_one(record))
    return "\n".join(parts)


def render_one(record: dict[str, Any]) -> str:
    """Write one result as a table, with what has no number, without its machine."""
    failures = [f"  no number: {failure['part']}: {failure['error']}" for failure in record["failures"]]
    return "\n".join([TABLES[record["benchmark"]](record), *failures])


def _head(record: dict[str, Any]) -> str:
    device = record["device"]
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items() if number)
    memory = f"{device['memory_bytes'] / 2**30:.0f} GiB"
    shrunk = "\nSHRUNK: these numbers show that it runs, not how fast" if record["settings"].get("shrink") else ""
    return (
        f"{device['name']}, {memory}; {versions}; {record['date'][:10]}; commit {record['commit'] or 'unknown'}{shrunk}"
    )


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
        + aligned(lines)
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
    return aligned(lines)


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
    return [f"time of a scored pair, documents / causal (target: at most {DOCUMENTS_RATIO})", aligned(sorted(lines))]


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
    return f"operators: {size}; largest relative error {worst:.1e}\n" + aligned(lines)


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
    return "\n".join([f"training step: {name}{size}", aligned(lines), *verdicts])


def _step_verdicts(name: str, ours: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    """Say which targets of a step were met; a peer without a number is compared with nothing."""
    verdicts = []
    target = MFU_TARGETS.get(name)
    if target and ours["mfu"] is not None and ours["seq_len"] == MFU_SEQ_LEN:
        verdicts.append(verdict(ours["mfu"] >= target, f"MFU of at least {100 * target:.0f}%",
                                 f"{100 * ours['mfu']:.1f}%"))  # fmt: skip
    peers = [row for row in rows if not row["variant"].startswith("ours")]
    if peers:
        best = max(peers, key=lambda row: row["tokens_per_second"])
        ratio = ours["tokens_per_second"] / best["tokens_per_second"]
        verdicts.append(verdict(ratio > 1, f"faster than each of {len(peers)} peers",
                                 f"{ratio:.2f} times {best['variant']}"))  # fmt: skip
    memory = {row["variant"]: row["common_memory_bytes"] for row in peers if row.get("common_memory_bytes")}
    if memory and ours.get("common_memory_bytes"):
        least = min(memory, key=lambda variant: memory[variant])
        ratio = ours["common_memory_bytes"] / memory[least]
        verdicts.append(verdict(ratio < 1, f"the lowest peak memory at {ours['common_micro_batch_size']} rows",
                                 f"{ratio:.2f} of {least}'s"))  # fmt: skip
    return verdicts


def _overhead(record: dict[str, Any]) -> str:
    others = [
        name for name in ("bare", "plain", "trainer") if any(row.get(f"{name}_seconds") for row in record["rows"])
    ]
    titles = {"bare": "bare torch", "plain": "plain PyTorch", "trainer": "Trainer"}
    heads = [cell for name in others for cell in (f"{titles[name]} ms", "ours/it", "by CPU time")]
    lines = [["training loop beside others", "ours ms/step", *heads, "bare's loss differs by"]]
    verdicts = []
    for row in record["rows"]:
        cells = [f"{1e3 * row['ours_seconds']:.1f}"]
        for name in others:
            seconds = row.get(f"{name}_seconds")
            ratios = [row.get(key) for key in ratio_keys(name)]
            cells += [
                f"{1e3 * seconds:.1f}" if seconds else "-",
                *(f"{ratio:.3f}" if ratio else "-" for ratio in ratios),
            ]
        lines.append([row["case"], *cells, f"{row['largest_loss_difference']:.1e}"])
        verdicts += _overhead_verdicts(row, record["device"]["kind"] == "cpu")
    return "\n".join([aligned(lines), *verdicts])


def ratio_keys(name: str) -> tuple[str, str]:
    """Name the ratios of our step to another loop's in a row of `benchmarks/overhead.py`: of time, and of CPU time."""
    prefix = "" if name == "bare" else f"{name}_"
    return f"{prefix}ratio", f"{prefix}cpu_ratio"


def _overhead_verdicts(row: dict[str, Any], on_cpu: bool) -> list[str]:
    def ratio_to(name: str) -> float:
        wall, cpu = (row.get(key) or 0.0 for key in ratio_keys(name))
        return max(wall, cpu) if on_cpu else wall  # other programs may make one of them look well, not both

    rate = 1 / ratio_to("bare")
    text = f"{row['case']}: at least {BARE_RATE} of bare torch's tokens/s"
    verdicts = [verdict(rate >= BARE_RATE, text, f"{rate:.3f}")]
    if ratio := ratio_to("trainer"):
        verdicts.append(verdict(ratio < 1, f"{row['case']}: faster than the Trainer", f"{1 / ratio:.2f} times"))
    return verdicts


def _attention_cpu(record: dict[str, Any]) -> str:
    lines = [["forward and backward", "ours ms", "masked ms", "best SDPA ms", "ours/best", "by CPU time", "cutting ms"]]
    for row in record["rows"]:
        name = f"{row['case']} {row['num_rows']}x{row['seq_len']} {row['dtype']}"
        times = [f"{1e3 * row[f'{key}_seconds']:.2f}" for key in ("ours", "masked", "best_sdpa")]
        ratios = [f"{row[key]:.2f}" if key in row else "-" for key in ("ratio", "cpu_ratio")]  # older files lack one
        lines.append([name, *times, *ratios, f"{1e3 * row['cut_seconds']:.2f}"])
    settings = record["settings"]
    heads = f"{settings['heads']} query heads, {settings['kv_heads']} key heads of 64"
    return f"attention on a CPU: {heads}; threads: {settings['num_threads']}\n" + aligned(lines)


def _operators_cpu(record: dict[str, Any]) -> str:
    lines = [["forward and backward, fp32", "tokens", "width", "ours ms", "PyTorch ms", "ours/PyTorch", "by CPU time"]]
    for row in record["rows"]:
        times = [f"{1e3 * row[f'{key}_seconds']:.2f}" for key in ("ours", "torch")]
        sizes = [str(row[key]) for key in ("num_tokens", "width")]
        lines.append([row["operator"], *sizes, *times, f"{row['ratio']:.2f}", f"{row['cpu_ratio']:.2f}"])
    return f"operators on a CPU; threads: {record['settings']['num_threads']}\n" + aligned(lines)


def _generation(record: dict[str, Any]) -> str:
    ways = ("ours", "recomputed", "transformers")
    lines = [["greedy, prompt included", "rows", "prompt", *(f"{way} tokens/s" for way in ways), "ours/transformers"]]
    for row in record["rows"]:
        rates = [row[f"{way}_tokens_per_second"] for way in ways]
        cells = [str(row["num_rows"]), str(row["num_prompt"]), *(f"{rate:.1f}" for rate in rates)]
        lines.append([row["model"], *cells, f"{rates[0] / rates[2]:.2f}"])
    new, threads = record["settings"]["new_tokens"], record["settings"]["num_threads"]
    return f"generation on a CPU: {new} new tokens a row, by processor time; threads: {threads}\n" + aligned(lines)


TABLES = {
    "generation": _generation,
    "attention": _attention,
    "attention_cpu": _attention_cpu,
    "operators_cpu": _operators_cpu,
    "norms": _norms,
    "operators": _operators,
    "step": _steps,
    "data": host_tables.data,
    "overhead": _overhead,
    "startup": host_tables.startup,
    "checkpoint": host_tables.checkpoint,
    "memory": host_tables.memory,
    "prepare": host_tables.prepare,
    "filters": host_tables.filters,
    "tars": host_tables.tars,
    "convert": host_tables.convert,
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
