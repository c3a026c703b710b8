"""The model card, `README.md` of an export: what the model is, how to load it, how it was verified."""

from __future__ import annotations

import re
import textwrap
from typing import Any

from pretrain.families import ModelShape, num_parameters

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [longhaul]
---

# {name}

A decoder-only Transformer, pretrained with Longhaul and exported for {architecture} of transformers.

> **Licence: not chosen yet.** State here, and as `license:` in the head of this file, under which terms the weights
> may be used. The licence of the training data may bind you.

| | |
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

It is a base model: it continues text and follows no instructions. {tokenizer_notes}
{warnings}
## Verification

The export was loaded with transformers {transformers_version} and compared with the trained model, both computing in
fp32 from the same {dtype} weights:

{checks}

`verification.json` holds these figures, the sha256 of every weight file and the versions of all libraries
({versions}).
"""


def _plain(text: str) -> str:
    """A name as text of one line, whatever Markdown or HTML would make of it."""
    return re.sub(r"([\\`*_\[\]<>|&#~])", r"\\\1", " ".join(text.split()))


def model_card(shape: ModelShape, report: dict[str, Any]) -> str:
    """Write the card of an export.

    Args:
        shape: the exported model.
        report: what `verification.json` holds.
    """
    source, logits, tokens = report["source"], report["logits"], report["tokenizer"]
    window = shape.sliding_window
    rows = " and ".join(f"{number} {kind}" for kind, number in logits["rows"].items() if number)
    padding = (shape.padded_vocab_size - shape.vocab_size) * shape.dim * (1 if shape.tie_embeddings else 2)
    heads = f"{shape.num_heads} query, {shape.num_kv_heads} key and value, {shape.head_dim} wide"
    facts = {
        "Parameters": f"{num_parameters(shape) - padding:,}",
        "Architecture": f"{logits['architecture']}: {shape.num_layers} layers, width {shape.dim}, "
        f"feed-forward {shape.ffn_dim} ({shape.activation}), {shape.norm}, {shape.positions} positions",
        "Attention heads": heads,
        "Embeddings": "shared with the output layer" if shape.tie_embeddings else "separate from the output layer",
        "Context length": f"{shape.seq_len:,} tokens" + (f", each seeing {window:,} at most" if window else ""),
        "Tokenizer": f"{tokens['kind']}, {shape.vocab_size:,} tokens",
        "Trained on": f"{source['tokens']:,} tokens in {source['step']:,} steps (run {_plain(source['run'])}, "
        f"{_plain(source['checkpoint'])})",
        "Weights": report["dtype"],
        "Config": f"sha256 {source['config_sha256']}",
    }
    checks = (
        f"- logits of {rows} rows ({logits['tokens']:,} tokens, the longest row {logits['longest_row']:,}): "
        f"largest difference {logits['max_difference']:.2g}, "
        f"{logits['max_relative_difference']:.2g} of the row's largest logit "
        f"(tolerance {logits['relative_tolerance']:g});\n"
        "- every weight came back bit for bit;\n"
        f"- token ids and decoded text of {tokens['texts']:,} texts in many scripts, code, emoji and control "
        f"characters ({tokens['tokens']:,} tokens): {tokens['mismatches']} differ"
        + (f", {tokens['ties']} have other ids of the same score." if tokens["ties"] else ".")
    )
    warnings = "".join(
        f"\n> **{clients} loads this model and computes something else**: it ignores `{option}`.\n"
        for option, clients in report["ignored_by"].items()
    )
    return _CARD.format(
        warnings=warnings,
        name=_plain(source["run"]),
        architecture=f"`{logits['architecture']}`",
        facts="\n".join(f"| {key} | {value} |" for key, value in facts.items()),
        transformers_version=report["versions"]["transformers"],
        dtype=report["dtype"],
        checks=checks,
        tokenizer_notes=_tokenizer_notes(tokens),
        versions=", ".join(f"{library} {version}" for library, version in report["versions"].items()),
    )


def _tokenizer_notes(tokens: dict[str, Any]) -> str:
    """What a user of the tokenizer must know, from the report on it; one paragraph of lines."""
    begin = tokens["documents_begin_with"]
    is_put = tokens["begins_texts_with"] == [begin]
    notes = [
        f"Documents began with `{begin}` in training, and the tokenizer "
        + ("puts it first." if is_put else "does not put it first: do so where a text begins."),
        "Text of special tokens is read as these tokens unless `split_special_tokens=True`.",
    ]
    if tokens["loses_u2581"]:
        notes.append("Text with U+2581 does not come back as it was: the tokenizer writes spaces that way.")
    if lost := tokens["texts"] - tokens["restored"]:
        notes.append(
            f"Other text may not come back exactly either: {lost:,} of {tokens['texts']:,} made-up ones did not."
        )
    return textwrap.fill(" ".join(notes), 120)
