"""Tables of what needs no accelerator: data, checkpoints, starts, memory, conversion; and how tables are set."""

from __future__ import annotations

from typing import Any

BLOCKED = 0.10  # of the time of a save, which an asynchronous one may hold up the step


def aligned(lines: list[list[str]]) -> str:
    """Set rows of cells in columns, the first to the left, the others to the right."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    texts = []
    for line in lines:
        cells = [
            text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(zip(line, widths, strict=True))
        ]
        texts.append("  " + "  ".join(cells).rstrip())
    return "\n".join(texts)


def verdict(is_met: bool, target: str, found: str) -> str:
    """Say whether a target was met, and what was found."""
    return f"  target {'met' if is_met else 'MISSED'}: {target} ({found})"


def prepare(record: dict[str, Any]) -> str:
    """Show the rate of `prepare`."""
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
    text = f"prepare: {size}; sentencepiece and our tokenizer alone, in MB a CPU second\n" + aligned(lines)
    return text + ("\n\n" + aligned(scale) if len(scale) > 1 else "")


def filters(record: dict[str, Any]) -> str:
    """Show what filters cost."""
    lines = [["filter", "CPU s", "over none", "text kept"]]
    for row in record["rows"]:
        kept = f"{row['kept_bytes']:.1%}" if "kept_bytes" in row else "-"
        lines.append([row["filter"], f"{row['cpu_seconds']:.2f}", f"{row['ratio']:.2f}", kept])
    settings = record["settings"]
    head = f"prepare of {settings['megabytes']:g} MB by {settings['processes']} processes; --verify over sha256 alone\n"
    return head + aligned(lines)


def tars(record: dict[str, Any]) -> str:
    """Show reading of others' tars."""
    lines = [["tars read in rows", "bare sentencepiece", "rows", "rows/bare", "indexing", "index/text"]]
    for row in record["rows"]:
        rates = [f"{row[f'{key}_tokens_per_second'] / 1e6:.3f}" for key in ("bare", "rows", "index")]
        share = row["index_bytes"] / row["text_bytes"]
        lines.append(
            [f"{row['documents']} .{row['kind']}", *rates[:2], f"{row['ratio']:.2f}", rates[2], f"{share:.2%}"]
        )
    return f"million tokens a CPU second, T={record['settings']['seq_len']}\n" + aligned(lines)


def data(record: dict[str, Any]) -> str:
    """Show what reading rows costs, beside other readers."""
    rows, text = record["rows"], []
    lines = [["rows of documents, one core", "million tokens/s", "fill"]]
    for row in (row for row in rows if row["part"] in ("packing", "reading")):
        fill = f"{100 * row['fill']:.3f}%" if "fill" in row else "-"
        lines.append([f"{row['part']} T={row['seq_len']}", f"{row['tokens_per_second'] / 1e6:.1f}", fill])
    text.append(aligned(lines))
    lines = [["rows that are a document each, one core", "million tokens/s", "ours is times this"]]
    for row in (row for row in rows if row["part"] == "whole rows"):
        name = f"{row['reader']} T={row['seq_len']}"
        lines.append([name, f"{row['tokens_per_second'] / 1e6:.1f}", f"{row['ratio']:.2f}"])
    text.append(aligned(lines))
    lines = [["start", "at row", "milliseconds", "MB"]]
    for row in (row for row in rows if row["part"] in ("first step", "plan")):
        name = f"{row['reader']}, plan of {row['num_rows']:,} rows" if row["part"] == "plan" else "first step from disk"
        size = f"{row['bytes'] / 1e6:,.0f}" if "bytes" in row else "-"
        lines.append([name, f"{row['first_row']:,}", f"{1e3 * row['seconds']:,.0f}", size])
    text.append(aligned(lines))
    text += [f"reading takes {row['bytes'] / 1e6:.0f} MB of a process" for row in rows if row["part"] == "memory"]
    return f"data, {record['settings']['tokens'] / 1e6:.3g} million tokens\n" + "\n".join(text)


def startup(record: dict[str, Any]) -> str:
    """Show the start by part."""
    num_ranks = record["settings"].get("ranks", 1)
    lines = [[f"start to first step, ranks: {num_ranks}", "seconds", "of CPU"]]
    for row in record["rows"]:
        cpu_seconds = row.get("cpu_seconds")
        lines.append([row["part"], f"{row['seconds']:.2f}", "" if cpu_seconds is None else f"{cpu_seconds:.2f}"])
    return aligned(lines)


def checkpoint(record: dict[str, Any]) -> str:
    """Show saves and loads."""
    lines = [["save or load", "seconds", "MB/s", "of the disk"]]
    seconds = {row["what"]: row["seconds"] for row in record["rows"] if "seconds" in row}
    for row in record["rows"]:
        if "seconds" in row:
            disk = seconds.get(f"disk {'load' if row['what'].endswith('load') else 'save'}")
            rate = "" if disk is None else f"{disk / row['seconds']:.2f}"
            lines.append([row["what"], f"{row['seconds']:.2f}", f"{row['megabytes_per_second']:.0f}", rate])
    settings = record["settings"]
    text = f"checkpoints of {settings['bytes']:,} bytes, {settings['ranks']} ranks, ZeRO stage {settings['stage']}\n"
    text += aligned(lines)
    if {"longhaul blocked", "longhaul save"} <= seconds.keys():
        share = seconds["longhaul blocked"] / seconds["longhaul save"]
        text += "\n" + verdict(share <= BLOCKED, f"at most {BLOCKED:.0%} of a save holds up the step", f"{share:.1%}")
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


def memory(record: dict[str, Any]) -> str:
    """Show bytes a parameter by stage."""
    states = ("parameters", "masters", "moments", "gradients")
    lines = [["bytes a parameter", "ranks", *states, "states", "in theory", "buckets", "peak", "sent in a step"]]
    for row in record["rows"]:
        found, num_parameters = row["memory"]["backward"], row["num_parameters"]
        numbers = [found[kind] for kind in states]
        numbers += [sum(numbers), sum(row["theory"].values()), row["memory"]["forward"]["buckets"]]
        numbers += [max(row["peaks"].values()), ring_bytes(row["traffic"]["step"], row["ranks"])]
        cells = [f"{number / num_parameters:.2f}" for number in numbers]
        lines.append([f"ZeRO {row['stage']}, {row['precision']}", str(row["ranks"]), *cells])
    return aligned(lines)


def convert(record: dict[str, Any]) -> str:
    """Show the time and memory of each conversion."""
    lines = [["conversion", "million parameters", "seconds", "MB of memory"]]
    for row in record["rows"]:
        sizes = [f"{row['parameters'] / 1e6:.1f}", f"{row['seconds']:.1f}", f"{row['peak_anonymous_bytes'] / 1e6:.0f}"]
        lines.append([row["subject"], *sizes])
    settings = record["settings"]
    return f"checkpoint of {settings['config']}, written by {settings['ranks']} ranks\n" + aligned(lines)
