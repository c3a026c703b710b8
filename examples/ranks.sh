#!/usr/bin/env bash
# Several ranks and ZeRO's stages, here as processes on the CPU; on GPUs the commands are the same, without precision.
#
#   bash examples/ranks.sh [FOLDER]        FOLDER: where examples/train.sh has left its run
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
longhaul() { "$python" "$root/launch/cli.py" "$@"; }
export CUDA_VISIBLE_DEVICES= DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 # on the CPU, also where there are GPUs
folder=${1:-$root/runs/examples/train}
test -d "$folder/run" || { echo "$folder/run is not there: run examples/train.sh first" >&2; exit 2; }
cd "$folder"

echo "== what each stage would hold on 8 ranks, without starting any"
longhaul train mine.yaml train.micro_batch_size=2 --explain 8 | sed '/^DeepSpeed is told/,$d'

echo "== memory, speed and cost of a real model on GPUs that you need not have"
longhaul plan "$root/configs/llama-7b.yaml" --gpus 16 --gpu A100 | sed -n 1,12p

echo "== the finished run goes on for 20 steps: from ZeRO 1 to ZeRO 3, which divides the weights too"
# Batch and data do not change with the number of ranks or the stage: only the speed and who holds what.
rm -rf zero3 && cp -r run zero3
"$python" -m torch.distributed.run --nproc-per-node 2 --master-port "${PORT:-29532}" "$root/launch/pretrain.py" mine.yaml \
  run.dir=zero3 train.num_steps=220 parallel.zero_stage=3
# With all GPUs of a machine: deepspeed launch/pretrain.py mine.yaml; with several machines: docs/clusters.md
echo "made in $folder: zero3, whose checkpoints any number of ranks and any stage reads"
