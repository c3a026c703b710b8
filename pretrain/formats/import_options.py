"""The part of `launch/convert.py` that imports: `python launch/convert.py DIR OUT --from hf`."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from pretrain.errors import EXIT_INTERRUPTED
from pretrain.interrupts import begin_work


def add_options(parser: argparse.ArgumentParser, way: argparse._MutuallyExclusiveGroup) -> None:
    """Add the options of an import; `way` is the choice between `--to` and `--from`."""
    way.add_argument("--from", dest="source", choices=["hf"], help="format of a published model; OUT is a run folder")
    for name, what in (("--add-tokens", "special tokens that no plain text gives"), ("--add-symbols", "texts")):
        parser.add_argument(
            name, nargs="+", default=[], metavar="TOKEN", help=f"with --from: {what} to add, or files with one a line"
        )


def import_model(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int | None:
    """Import a published model and say what was verified; return the exit status, or None if that was not asked for.

    Raises:
        LonghaulError: as `import_hf`.
    """
    if not arguments.source:
        if arguments.add_tokens or arguments.add_symbols:
            parser.error("--add-tokens and --add-symbols go with --from")
        return None
    if arguments.step is not None or arguments.dtype:
        parser.error(
            "--step and --dtype go with --to: an import has step 0, and fp32 weights that hold the published ones"
        )
    from pretrain.formats.added_tokens import AddedTokens, read_tokens
    from pretrain.formats.hf_import import import_hf

    begin_work("stopped; nothing was imported", EXIT_INTERRUPTED)
    added = AddedTokens(read_tokens(arguments.add_tokens), read_tokens(arguments.add_symbols))
    report = import_hf(arguments.run, arguments.out, added)
    for note in _notes(report):
        print(f"note: {note}", file=sys.stderr)
    print(json.dumps(report) if arguments.json else _summary(arguments.out, report))
    return 0


def _notes(report: dict[str, Any]) -> list[str]:
    vocabulary, tokenizer = report["vocabulary"], report["tokenizer"]
    notes = list(report["notes"])
    if report["left_out"]:
        notes.append(
            f"{len(report['left_out'])} tensors are no weights and were left out, such as {report['left_out'][0]}"
        )
    if vocabulary["trimmed"]:
        notes.append(
            f"the published embedding has {vocabulary['published']:,} rows, and the tokenizer "
            f"{vocabulary['tokenizer']:,} ids: "
            f"{vocabulary['trimmed']:,} rows that no text uses were left out"
        )
    notes += [f"the tokenizer was not read from {fault}" for fault in tokenizer.get("passed_over", [])]
    if "class_differs" in tokenizer:
        notes.append(f"the tokenizer's file counts, not the class that it names: {tokenizer['class_differs']}")
    if report["logits"]["window_is_reached"] is False:
        notes.append("no compared row was longer than the window of attention, so that it was not tried")
    return notes


def _summary(out: str, report: dict[str, Any]) -> str:
    logits, tokenizer, vocabulary = report["logits"], report["tokenizer"], report["vocabulary"]
    tie = logits["greedy_tie_at"]
    greedy = f"{logits['greedy_tokens']} tokens" if tie is None else f"{tie} tokens, where two tie,"
    more = f", {vocabulary['added']} of them new" if vocabulary["added"] else ""
    return (
        f"{out}: {logits['architecture']} as family {report['family']}, {vocabulary['imported']:,} ids of "
        f"{tokenizer['file']}{more}. Every weight is bit for bit the published one. In transformers, logits of "
        f"{logits['positions']:,} positions differ by at most {logits['max_difference']:.1e} "
        f"({logits['max_relative_difference']:.1e} of the largest), greedy text is the same for {greedy} and ids of "
        f"{tokenizer['mismatches']} of {tokenizer['texts']:,} texts differ. To go on training it, edit "
        f"{out}/continue.yaml."
    )
