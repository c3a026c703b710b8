#!/usr/bin/env bash
# Tuning with LoRA on lines of JSON: the model of examples/train.sh learns to answer, and its adapters go to peft.
#
#   bash examples/tune.sh [FOLDER]        FOLDER: where examples/train.sh has left its run
#
# What it learns here, which of four kinds a thing is of, is small enough for its 200,000 parameters.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
longhaul() { "$python" "$root/launch/cli.py" "$@"; }
export CUDA_VISIBLE_DEVICES= DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 # on the CPU, also where there are GPUs
folder=${1:-$root/runs/examples/train}
test -d "$folder/run" || { echo "$folder/run is not there: run examples/train.sh first" >&2; exit 2; }
cd "$folder" && rm -rf tuned tuned-shards peft

echo "== examples: a prompt and a response a line"
"$python" - > examples.jsonl <<'END'
import json, random
random.seed(1)
kinds = {"oak": "tree", "birch": "tree", "carp": "fish", "trout": "fish", "iron": "metal", "copper": "metal", "jazz": "music", "opera": "music"}
words = "the old new one a we saw had near by there once again today"
for number in range(400):
    thing = random.choice(list(kinds))
    text = random.choices(words.split(), k=random.randint(2, 5))
    text.insert(random.randint(0, len(text)), thing)
    print(json.dumps({"prompt": f"{' '.join(text)} ({number})", "response": kinds[thing]}))
END

cat > tune.yaml <<END
run: {dir: tuned, seed: 1}
tokenizer: {model: tokenizer.model, vocab_size: 1024} # the base's
data:
  sources:
    - {name: kinds, paths: [examples.jsonl], shards: tuned-shards, examples: {template: "{prompt} is of the kind "}}
  seq_len: 128
  val_fraction: 0.1
model: {family: llama, dim: 64, num_layers: 2, num_heads: 4, num_kv_heads: 2} # the base's
resume: {from: run, optimizer: false, schedule: false, data: false} # its weights, and nothing else
optim: {lr: 1e-2, weight_decay: 0}
schedule: {warmup_steps: 5}
train: {num_steps: 100, global_batch_size: 16, micro_batch_size: 16, precision: fp32, lora: {rank: 16}}
eval: {every_steps: 100, metric: accuracy, max_rows: 8}
log: {every_steps: 20}
END
longhaul prepare tune.yaml
longhaul train tune.yaml

echo "== an answer"
longhaul generate tuned --prompt "we saw the old carp again (7) is of the kind " --temperature 0

echo "== the adapters alone, for peft on top of hf, the export of the base"
longhaul convert tuned peft --to peft
"$python" - hf peft <<'END' || echo "(peft is not installed: pip install peft)"
import sys
from importlib.util import find_spec
if not find_spec("peft"):
    sys.exit(1)
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer("we saw the old carp again (7) is of the kind ", return_tensors="pt")
print("peft says:", tokenizer.decode(model.generate(**ids, max_new_tokens=8, do_sample=False)[0], skip_special_tokens=True))
END
echo "made in $folder: examples.jsonl, tuned (adapters and the name of their base), peft"
