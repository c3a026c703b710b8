"""The model card, `README.md` of an export: what the model is, how to load it, how it was verified."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from pretrain.options.families import ModelShape, num_parameters

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
{licence_line}tags: [longhaul]
---

# {name}

A decoder-only Transformer, {made} with Longhaul and exported for {architecture} of transformers.

{licence_note}| | |
|---|---|
{facts}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0], skip_special_tokens=True))
```

{kind} {tokenizer_notes}
{warnings}
## Training
{training}

## Verification

{how}

{checks}

`verification.json` holds these figures, the sha256 of every weight file and the versions of all libraries
({versions}).
"""


def _plain(text: str) -> str:
    """A name as text of one line, whatever Markdown or HTML would make of it."""
    return re.sub(r"([\\`*_\[\]<>|&#~])", r"\\\1", " ".join(text.split()))


_NO_LICENCE = """> **Licence: not chosen yet.** State here, and as `license:` in the head of this file, under which
> terms the weights may be used (`launch/convert.py --license` writes both). The licence of the training data may bind
> you{and_of_what}.

"""


def model_card(
    shape: ModelShape,
    report: dict[str, Any],
    data: Sequence[Mapping[str, Any]] = (),
    curve: Mapping[str, Sequence[Sequence[float]]] | None = None,
    licence: str | None = None,
) -> str:
    """Write the card of an export.

    Args:
        shape: the exported model.
        report: what `verification.json` holds.
        data: what the model has seen of each source, as `provenance.data_of` returns it.
        curve: points of its loss, as `provenance.loss_curve` returns them.
        licence: of the weights, an identifier that the Hub knows, such as `apache-2.0`; None: not chosen.
    """
    source, tokens, architecture = report["source"], report["tokenizer"], architecture_of(report)
    window = shape.sliding_window
    padding = (shape.padded_vocab_size - shape.vocab_size) * shape.dim * (1 if shape.tie_embeddings else 2)
    heads = f"{shape.num_heads} query, {shape.num_kv_heads} key and value, {shape.head_dim} wide"
    facts = {
        "Parameters": f"{num_parameters(shape) - padding:,}",
        "Architecture": f"{architecture}: {shape.num_layers} layers, width {shape.dim}, "
        f"feed-forward {shape.ffn_dim} ({shape.activation}), {shape.norm}, {shape.positions} positions",
        "Attention heads": heads,
        "Embeddings": "shared with the output layer" if shape.tie_embeddings else "separate from the output layer",
        "Context length": f"{shape.seq_len:,} tokens" + (f", each seeing {window:,} at most" if window else ""),
        "Tokenizer": f"{tokens['kind']}, {shape.vocab_size:,} tokens",
        **({"Begun from": f"the weights of {_plain(source['begun_from'])}"} if source["begun_from"] else {}),
        "Trained on": f"{source['tokens']:,} tokens in {source['step']:,} steps (run {_plain(source['run'])}, "
        f"{_plain(source['checkpoint'])})",
        "Weights": report["dtype"],
        "Config": f"sha256 {source['config_sha256']}",
        "Code": f"Longhaul {source['trained_by'].get('longhaul', '?')}"
        + (f", commit {source['git_commit']}" if source["git_commit"] else ""),
    }
    warnings = "".join(
        f"\n> **{clients} loads this model and computes something else**: it ignores `{option}`.\n"
        for option, clients in report["ignored_by"].items()
    )
    return _CARD.format(
        warnings=warnings,
        name=_plain(source["run"]),
        architecture=f"`{architecture}`",
        licence_line=f"license: {json.dumps(licence)}\n" if licence else "",
        licence_note=""
        if licence
        else _NO_LICENCE.format(
            and_of_what=", and so may that of the model that it was begun from" if source["begun_from"] else ""
        ),
        made="imported" if not source["step"] else "tuned" if source["tuned_on"] else "pretrained",
        kind=_kind(source),
        training=_training(data, curve or {}),
        how=_how(report),
        facts="\n".join(f"| {key} | {value} |" for key, value in facts.items()),
        checks=_checks(report),
        tokenizer_notes=_tokenizer_notes(tokens, source["step"]),
        versions=", ".join(f"{library} {version}" for library, version in report["versions"].items()),
    )


def _kind(source: Mapping[str, Any]) -> str:
    """What is to be expected of it."""
    tuned_on = source["tuned_on"]
    if not source["step"]:
        return "It computes what the model that was imported computes: it was not trained here."
    if tuned_on is None and source["begun_from"] is not None:
        return "Here it was trained on nothing but text to continue; the model that it was begun from may do more."
    if tuned_on is None:
        return "It was trained to continue text, not to follow instructions."
    return (
        f"It was tuned on prompts with their responses ({_plain(tuned_on)}) and answers in their manner: write a "
        "prompt\nas those were written, or by the chat template where they were conversations."
    )


def architecture_of(report: dict[str, Any]) -> str:
    """The class of transformers that a report is of."""
    found = report.get("logits") or report["tensors"]
    return str(found["architecture"])


def _how(report: dict[str, Any]) -> str:
    library = f"transformers {report['versions']['transformers']}"
    if report["verified"] == "logits":
        return (
            f"The export was loaded with {library} and compared with the trained model, both computing in fp32\n"
            f"from the same {report['dtype']} weights:"
        )
    return f"The files were read back and compared with the checkpoint; {library} has a place for every tensor:"


def _checks(report: dict[str, Any]) -> str:
    tokens, checks = report["tokenizer"], []
    if logits := report.get("logits"):
        rows = " and ".join(f"{number} {kind}" for kind, number in logits["rows"].items() if number)
        greedy = report["greedy"]
        checks.append(
            f"logits of {rows} rows ({logits['tokens']:,} tokens, the longest row {logits['longest_row']:,}): "
            f"largest difference {logits['max_difference']:.2g}, "
            f"{logits['max_relative_difference']:.2g} of the row's largest logit "
            f"(tolerance {logits['relative_tolerance']:g})"
        )
        checks.append(f"{greedy['equal_tokens']} tokens of {greedy['prompts']} greedy continuations are the same")
    checks.append("every weight came back bit for bit")
    checks.append(
        f"token ids and decoded text of {tokens['texts']:,} texts in many scripts, code, emoji and control "
        f"characters ({tokens['tokens']:,} tokens): {tokens['mismatches']} differ"
        + (f", {tokens['ties']} have other ids of the same score" if tokens["ties"] else "")
    )
    return ";\n".join(f"- {check}" for check in checks) + "."


def _training(data: Sequence[Mapping[str, Any]], curve: Mapping[str, Sequence[Sequence[float]]]) -> str:
    """Tables of what the model has seen and of how its loss went."""
    lines = []
    if data:
        lines += ["| source | tokens seen | epochs | documents | bytes of text |", "|---|---|---|---|---|"]
        for one in data:
            sizes = ["–" if one[key] is None else f"{one[key]:,}" for key in ("documents", "bytes")]
            epochs = "–" if one["epochs"] is None else f"{one['epochs']:.2f}"
            lines.append(f"| {_plain(one['name'])} | {one['tokens']:,} | {epochs} | {' | '.join(sizes)} |")
        lines += ["", "Documents and bytes are those of one epoch.", ""]
    for kind, points in curve.items():
        if points:
            lines += [f"Loss, {kind}, in nats per token:", "", "| step | tokens | loss |", "|---|---|---|"]
            lines += [f"| {int(step):,} | {int(tokens):,} | {loss:.4f} |" for step, tokens, loss in points] + [""]
    return "\n".join(lines).rstrip() or "Neither the data nor the loss of this run is recorded."


def _tokenizer_notes(tokens: dict[str, Any], step: int) -> str:
    """What a user of the tokenizer must know, from the report on it; one paragraph of lines."""
    begin = tokens["documents_begin_with"]
    is_put = tokens["begins_texts_with"] == [begin]
    notes = [
        f"Documents began with `{begin}` in training, and the tokenizer "
        + ("puts it first." if is_put else "does not put it first: do so where a text begins.")
    ]
    if not step:  # how others trained is not known
        notes = [f"The tokenizer puts `{begin}` before a text."] if is_put else []
    notes.append("Text of special tokens is read as these tokens unless `split_special_tokens=True`.")
    if tokens["loses_u2581"]:
        notes.append("Text with U+2581 does not come back as it was: the tokenizer writes spaces that way.")
    if lost := tokens["texts"] - tokens["restored"]:
        notes.append(
            f"Other text may not come back exactly either: {lost:,} of {tokens['texts']:,} made-up ones did not."
        )
    return textwrap.fill(" ".join(notes), 120)
