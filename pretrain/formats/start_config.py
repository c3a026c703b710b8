"""The config that an imported model's run folder has, and the one to edit that goes on training it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from pretrain.errors import ConfigError
from pretrain.formats.hf_config import PublishedConfig
from pretrain.options.config_docs import yaml_value
from pretrain.options.families import ModelShape
from pretrain.tokenizers.tokenizer import Tokenizer

_SEQ_LEN = 4096  # where nothing in the model asks for another length

_YAML = """\
# Goes on training what was imported into {run}, on your own text. Edit this, then:
#   python launch/prepare.py {start}
#   deepspeed launch/pretrain.py {start}

run:
  dir: {next_run} # another folder than the imported model's

resume:
  from: {run} # weights alone: steps, data and optimizer begin anew

tokenizer:
  model: {tokenizer} # the imported model's own: other ids would mean other tokens
  vocab_size: {vocab_size}
{special}
data:
  sources:
    - name: mine # your own text
      paths: ["corpus/*.jsonl.zst"] # one JSON object a line, with the text in `text`
      shards: {shards} # written by `prepare`, read by training
  seq_len: {seq_len} # {seq_len_why}
  val_fraction: 0.001 # documents held out

model: # as imported; another one is refused
{model}

optim:
  lr: 3e-5 # a place to start: a tenth of the rate that many such models began with
  weight_decay: 0.1

schedule:
  name: cosine
  warmup_steps: 100
  final_lr_ratio: 0.1

train:
  num_tokens: 1_000_000_000 # how much of your text, epochs included
  global_batch_size: 128 # rows in a step
  micro_batch_size: 1 # rows that one GPU computes at once
  precision: bf16 # with fp32 master weights
  activation_checkpointing: selective

parallel:
  zero_stage: {zero_stage} # states divided over the ranks; 3 divides the weights too

eval:
  every_steps: 100
  max_rows: 256

checkpoint:
  every_steps: 500
  keep_last: 2
"""


def _tokenizer_section(tokenizer: Tokenizer, written: Path, run: Path) -> dict[str, Any]:
    """Name the tokenizer that lies in `written`, and what begins and ends documents where it does not say that."""
    main = next(iter(tokenizer.files))
    section: dict[str, Any] = {"model": str(run / main), "vocab_size": tokenizer.vocab_size}
    try:
        plain = type(tokenizer)(written / main)  # type: ignore[call-arg]
        says_it = (plain.bos_id, plain.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)
    except ConfigError:
        says_it = False
    names = {"bos": tokenizer.name_of(tokenizer.bos_id), "eos": tokenizer.name_of(tokenizer.eos_id)}
    return section if says_it else section | names


def start_config(found: PublishedConfig, tokenizer: Tokenizer, written: Path, run: Path) -> dict[str, Any]:
    """Return the config of the run folder of an imported model, with the model's longest rows.

    Args:
        found: the published model.
        tokenizer: that was kept,
        written: in this folder,
        run: which becomes this one.
    """
    return {
        "run": {"dir": str(run)},
        "tokenizer": _tokenizer_section(tokenizer, written, run),
        "data": {"sources": [{"name": "mine", "shards": f"data/{run.name}/mine"}], "seq_len": found.seq_len},
        "model": found.options,
        "optim": {"lr": 3e-5},
        "train": {"num_steps": 1, "global_batch_size": 1, "micro_batch_size": 1},
    }


def start_yaml(found: PublishedConfig, shape: ModelShape, tokenizer: Tokenizer, written: Path, run: Path) -> str:
    """Write the config that goes on training an imported model, commented; arguments as for `start_config`."""
    seq_len, why = _row_length(found, shape)
    section = _tokenizer_section(tokenizer, written, run)
    special = "".join(f"  {key}: {yaml_value(section[key])}\n" for key in ("bos", "eos") if key in section)
    model = "\n".join(f"  {key}: {yaml_value(value)}" for key, value in found.options.items())
    num_weights = shape.num_layers * 12 * shape.dim**2
    return _YAML.format(
        run=yaml_value(str(run)), next_run=yaml_value(f"{run}-continued"),
        start=shlex.quote(str(run / "continue.yaml")),
        tokenizer=yaml_value(section["model"]), vocab_size=section["vocab_size"], special=special,
        shards=yaml_value(f"data/{run.name}/mine"),
        seq_len=seq_len, seq_len_why=why, model=model, zero_stage=1 if num_weights < 2_000_000_000 else 3,
    )  # fmt: skip


def _row_length(found: PublishedConfig, shape: ModelShape) -> tuple[int, str]:
    """Return tokens in a row, and why so many."""
    if shape.positions == "learned":
        return found.seq_len, "as many as it has learned positions"
    if shape.rope_scaling is not None and shape.rope_scaling.type == "yarn":
        return found.seq_len, "as YaRN scales its RoPE to"
    if shape.sliding_window is not None and 2 * shape.sliding_window > _SEQ_LEN:
        return min(found.seq_len, 2 * shape.sliding_window), f"more than its window; at most {found.seq_len}"
    return min(found.seq_len, _SEQ_LEN), f"the imported model's are up to {found.seq_len}"
