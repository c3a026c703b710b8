#!/usr/bin/env bash
# From your own text to a model in other people's software: tokenizer, shards, training, a stop, going on with
# another number of ranks, evaluation, Hugging Face, GGUF, text.
#
#   bash examples/train.sh [FOLDER]        FOLDER: where everything goes, runs/examples/train by default
#
# The text is this project's documentation, so that it works anywhere and offline. For yours, change `paths`. A model
# of this size learns to write lines that look like it, no more.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
longhaul() { "$python" "$root/launch/cli.py" "$@"; } # after `pip install` there is a command of this name
export CUDA_VISIBLE_DEVICES= DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 # on the CPU, also where there are GPUs
folder=${1:-$root/runs/examples/train}
rm -rf "$folder" && mkdir -p "$folder" && cd "$folder"

cat > mine.yaml <<END
run: {dir: run, seed: 1}
tokenizer: {model: tokenizer.model, vocab_size: 1024}
data:
  sources:
    - {name: mine, paths: ["$root/docs/*.md", "$root/docs/notes/*.md"], shards: shards}
  seq_len: 128
  val_fraction: 0.1
model: {family: llama, dim: 64, num_layers: 2, num_heads: 4, num_kv_heads: 2}
optim: {lr: 4e-3}
schedule: {warmup_steps: 10}
train: {num_steps: 200, global_batch_size: 16, micro_batch_size: 8, precision: fp32}
eval: {every_steps: 100, max_rows: 64}
checkpoint: {every_steps: 100, keep_last: 2}
log: {every_steps: 50}
END

echo "== text to a tokenizer and shards"
longhaul prepare mine.yaml

echo "== training on one rank, and a stop after some steps, as a batch system would do it"
"$python" "$root/launch/pretrain.py" mine.yaml & # not the function, whose shell would get the signal
training=$!
until grep -qs '"step": 20,' run/metrics.jsonl; do
  kill -0 "$training" # has not ended by itself
  sleep 0.1
done
kill -TERM "$training"
status=0 && wait "$training" || status=$?
test "$status" = 75 # stopped and resumable; it has saved where it was

echo "== the same run goes on with two ranks"
"$python" -m torch.distributed.run --nproc-per-node 2 --master-port "${PORT:-29531}" "$root/launch/pretrain.py" mine.yaml

echo "== held-out loss"
longhaul evaluate run

echo "== Hugging Face and GGUF: each is verified, or it is not there"
longhaul convert run hf --to hf
longhaul convert run gguf --to gguf --dtype q8_0

echo "== text, by transformers alone"
"$python" - hf <<'END'
import sys
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
transformers.set_seed(1)
ids = tokenizer("The ", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=40, do_sample=True, top_k=20)[0], skip_special_tokens=True))
END
if command -v llama-completion >/dev/null; then
  llama-completion -m gguf/*.gguf -p "The " -n 40 --temp 0 -no-cnv </dev/null
else
  echo "(llama.cpp's llama-completion is not on the PATH: llama-completion -m $folder/gguf/*.gguf -p 'The ' would write from the GGUF)"
fi
echo "made in $folder: run (checkpoints, curves), hf, gguf"
