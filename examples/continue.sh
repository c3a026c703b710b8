#!/usr/bin/env bash
# Going on from a published model: import it, verified, train it on more text, and give it back as it came.
#
#   bash examples/continue.sh [FOLDER]        FOLDER: where everything goes, runs/examples/continue by default
#
# The published model here is a tiny OLMo 2 with random weights that transformers writes, so that it works offline.
# For a real one: huggingface-cli download HuggingFaceTB/SmolLM2-135M --local-dir published
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
longhaul() { "$python" "$root/launch/cli.py" "$@"; }
export CUDA_VISIBLE_DEVICES= DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 # on the CPU, also where there are GPUs
folder=${1:-$root/runs/examples/continue}
rm -rf "$folder" && mkdir -p "$folder" && cd "$folder"

echo "== somebody's model, in Hugging Face's format"
"$python" - published "$root"/pretrain/*/*.py <<'END'
import json, sys
from pathlib import Path
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Olmo2Config, Olmo2ForCausalLM
folder, *texts = map(Path, sys.argv[1:])
tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
alphabet = pre_tokenizers.ByteLevel.alphabet()
kind = trainers.BpeTrainer(vocab_size=600, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False)
tokenizer.train_from_iterator((path.read_text() for path in texts), kind)
sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
model = Olmo2ForCausalLM(Olmo2Config(vocab_size=600, max_position_embeddings=128, eos_token_id=0, pad_token_id=0, **sizes))
model.save_pretrained(folder)
tokenizer.save(str(folder / "tokenizer.json"))
(folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}))
END

echo "== import: weights bit for bit, logits and token ids as in transformers, or it is not there"
longhaul convert published imported --from hf

echo "== imported/continue.yaml is a config to edit; here the few lines that matter are given on the command line"
text="data.sources.0.paths=['$root/pretrain/*/*.py']"
longhaul prepare imported/continue.yaml "$text" data.val_fraction=0.05
longhaul train imported/continue.yaml "$text" data.val_fraction=0.05 train.num_tokens=null train.num_steps=30 \
  train.global_batch_size=16 train.micro_batch_size=16 train.precision=fp32 schedule.warmup_steps=5 optim.lr=2e-3 \
  run.dir=continued

echo "== and back, with the tokenizer's files as they came"
longhaul convert continued hf --to hf
echo "made in $folder: imported (step 0), continued (step 30), hf"
