"""Shards, checkpoints and models from Python: `python examples/read_from_python.py [FOLDER]`.

FOLDER is where examples/train.sh has left its run, runs/examples/train by default. What is imported here is what
docs/architecture.md names; nothing is written.
"""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # not needed once the package is installed

import torch  # noqa: E402

from pretrain.checkpoints.run_folder import load_run  # noqa: E402
from pretrain.data.shard_reader import ShardReader  # noqa: E402
from pretrain.data.shards import Manifest  # noqa: E402
from pretrain.generation.generate import generate  # noqa: E402
from pretrain.generation.generate_options import GenerateOptions  # noqa: E402

folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "runs/examples/train"
if not (folder / "run").is_dir():
    sys.exit(f"{folder}/run is not there: run examples/train.sh first")

# A run: its config, tokenizer and model, of the newest checkpoint that verifies or of a step.
run = load_run(folder / "run")
num_weights = sum(parameter.numel() for parameter in run.model.parameters())
print(f"step {run.step}: {run.config.model.family}, {num_weights:,} weights, {run.tokenizer.vocab_size} ids")

# Shards: documents by number, as token ids. bos and eos are the first and the last.
shards = str(folder / "shards")
manifest = Manifest.load(shards)
held_out = manifest.shards("val")[0]
with closing(ShardReader(shards, held_out, manifest.dtype)) as reader:
    ids = reader.read(0)
    print(f"{held_out.num_documents} held-out documents; the first has {len(ids)} tokens and begins:")
print(run.tokenizer.decode(ids[1:40].tolist()))

# The model is a torch module: logits of any ids, and how surprised it is by each token of the document.
tokens_BT = torch.from_numpy(ids[: run.model.shape.seq_len].astype("int64"))[None]
with torch.no_grad():
    logits_BTV = run.model.logits(tokens_BT)[..., : run.tokenizer.vocab_size]
loss = torch.nn.functional.cross_entropy(logits_BTV[0, :-1], tokens_BT[0, 1:])
print(f"its loss over {tokens_BT.shape[1] - 1} tokens is {loss:.3f} nats a token")

# Text.
[completion] = generate(run.model, run.tokenizer, ["The run "], GenerateOptions(max_new_tokens=30, temperature=0.7))
print(f"The run {completion.text}")
