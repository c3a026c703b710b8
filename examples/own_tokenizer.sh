#!/usr/bin/env bash
# A tokenizer.json of your own, or of a model that you like, instead of one that `prepare` trains.
#
#   bash examples/own_tokenizer.sh [FOLDER]        FOLDER: where everything goes, runs/examples/own_tokenizer by default
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
longhaul() { "$python" "$root/launch/cli.py" "$@"; }
export CUDA_VISIBLE_DEVICES= DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 # on the CPU, also where there are GPUs
folder=${1:-$root/runs/examples/own_tokenizer}
rm -rf "$folder" && mkdir -p "$folder" && cd "$folder"

echo "== a byte-level tokenizer, as the tokenizers library makes it; yours comes ready"
"$python" - "$root"/pretrain/*/*.py <<'END'
import sys
from pathlib import Path
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
alphabet = pre_tokenizers.ByteLevel.alphabet()
kind = trainers.BpeTrainer(vocab_size=1000, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False)
tokenizer.train_from_iterator((Path(path).read_text() for path in sys.argv[1:]), kind)
tokenizer.save("tokenizer.json")
END

cat > mine.yaml <<END
run: {dir: run, seed: 1}
tokenizer: {model: tokenizer.json, vocab_size: 1000, eos: "<|end|>"} # eos, as no tokenizer_config.json names it
data:
  sources:
    - {name: mine, paths: ["$root/pretrain/*/*.py"], shards: shards}
  seq_len: 128
  val_fraction: 0.05
model: {family: llama, dim: 64, num_layers: 2, num_heads: 4}
optim: {lr: 4e-3}
train: {num_steps: 20, global_batch_size: 16, micro_batch_size: 16, precision: fp32}
END

echo "== what it makes of the text, before anything is written"
longhaul prepare mine.yaml --dry-run
longhaul prepare mine.yaml
longhaul train mine.yaml
echo "made in $folder: shards of its ids, and run, whose exports will carry tokenizer.json byte for byte"
